"""Fine-tuning end to end with MAE's published settings (arXiv 2111.06377, table 9): timm's augmentation and optimiser parts.

One checkpoint per epoch; the same call continues, with the numbers of an uninterrupted run (the same `workers` given).
"""

import copy
import functools
import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int64
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mrmae.common.files import publish
from mrmae.common.progress import Progress
from mrmae.extract.teachers import normalise
from mrmae.probe.classifier import classifier_config, trainable
from mrmae.probe.data import Data, Split, shown_images
from mrmae.probe.settings import Finetune
from mrmae.probe.sources import FeatureSource
from mrmae.train.checkpoint import latest_checkpoint, save_checkpoint
from mrmae.train.export import CONFIG, WEIGHTS
from mrmae.train.optim import base_lr, lr_at

EVAL_BATCH = 32


def finetune(
    source: FeatureSource, data: Data, settings: Finetune, *, folder: Path, say: Callable[[str], None], seed: int, device: str, workers: int,
) -> tuple[Int64[Tensor, "n"], list[str]]:  # fmt: skip
    """Predicted classes of the test part by the fine-tuned model, and what to say about it.

    folder: holds the checkpoint of the last whole epoch, then `model.safetensors`, with a config.json that makes it a timm model. Raises ValueError for a source without
    a model, for settings that do not fit, and where the loss is not finite.
    """
    torch.manual_seed(seed)
    model, notes = trainable(source, len(data.classes), drop_path=settings.drop_path, new_head=settings.new_head)
    model.to(device)
    optimizer = finetune_optimizer(model, settings)
    average = ModelEmaV3(model, decay=settings.ema) if settings.ema else None
    state = latest_checkpoint(folder / "checkpoints", warn=say)
    first = 0
    if state is not None:
        first = restore(state, model, optimizer, average)
        say(f"fine-tuning continues after epoch {first} of {settings.epochs}")
    feed = Augmented(source, data, settings)
    with Progress("fine-tuning", settings.epochs - first, "epochs") as progress:
        for epoch in range(first, settings.epochs):
            train_epoch(
                model, optimizer, average, feed, settings, epoch=epoch, seed=seed, device=device, workers=workers
            )
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            kept |= {"ema": average.module.state_dict()} if average else {}
            save_checkpoint(folder / "checkpoints", kept, step=epoch + 1, keep=1)
            progress.add()
    final = average.module if average else model
    predicted = predict_classes(final, source, data.test, device=device, workers=workers)
    weights = {name: x.detach().cpu().contiguous() for name, x in final.state_dict().items()}
    publish(folder / WEIGHTS, safetensors.torch.save(weights), replace=True)
    if (config := classifier_config(source, final, data.classes)) is not None:
        publish(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode(), replace=True)
        say(f'classifier  timm.create_model("local-dir:{folder}", pretrained=True)')
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return predicted, notes


class Augmented(Dataset[tuple[Tensor, int]]):
    """Train images as timm augments them: random crop, flip, RandAugment, erasing; normalised for the source."""

    def __init__(self, source: FeatureSource, data: Data, settings: Finetune) -> None:
        spec = source.spec
        self.part, self.labels, self.n_classes = data.train, data.labels(data.train).tolist(), len(data.classes)
        self.transform: Any = create_transform(
            spec.input_size[0], is_training=True, scale=settings.crop_scale, color_jitter=0.0, interpolation=spec.interpolation,
            auto_augment=settings.auto_augment or None, mean=spec.mean, std=spec.std, re_prob=settings.erase, re_mode="pixel",
        )  # fmt: skip
        keep_a_bit(self.transform)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with self.part.image(i) as image:
            return self.transform(Image.fromarray(image)), self.labels[i]


def keep_a_bit(transform: Any) -> None:
    """Have timm's posterise keep at least one bit: at the strongest level it asks Pillow for none, which newer ones refuse.

    (Older ones made the picture black.)
    """
    for step in transform.transforms:
        for op in getattr(step, "ops", ()):
            if op.name.startswith("Posterize"):
                op.level_fn = functools.partial(at_least_one, op.level_fn)


def at_least_one(level_of: Callable[..., tuple[int, ...]], *args: Any) -> tuple[int, ...]:
    """What `level_of` gives, and 1 where that is less."""
    return tuple(max(1, value) for value in level_of(*args))


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: ModelEmaV3 | None, feed: Augmented, settings: Finetune, *,
    epoch: int, seed: int, device: str, workers: int,
) -> None:  # fmt: skip
    """One pass over the train part. Everything random follows from (seed, epoch)."""
    seed_everything(seed, epoch)
    size = update_size(settings.batch_size, len(feed))
    updates = len(feed) // size
    mixup = build_mixup(settings, feed.n_classes)
    order = torch.randperm(len(feed))[: updates * size].tolist()
    micro = max(2, min(settings.micro_batch, size) // 2 * 2)
    splits: list[list[int]] = [ids[a : a + micro] for ids in batches_of(order, size) for a in range(0, size, micro)]
    loader: DataLoader[Any] = DataLoader(feed, batch_sampler=splits, num_workers=workers if workers > 1 else 0)
    per_update = len(splits) // updates
    model.train()
    for step, (x, labels) in enumerate(loader):
        at = epoch + (step // per_update) / updates
        set_rates(optimizer, lr_at(at, peak=base_lr(settings.blr, size), warmup_epochs=min(settings.warmup_epochs, settings.epochs / 2),
                                   epochs=settings.epochs, min_lr=settings.min_lr))  # fmt: skip
        x, target = mixup(x, labels) if mixup else (x, soft(labels, feed.n_classes, settings.label_smoothing))
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            logits = model(x.to(device))
        loss = torch.nn.functional.cross_entropy(logits.float(), target.to(device)) * (len(x) / size)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"fine-tuning: the loss of epoch {epoch + 1} is {loss.item()}; expected a number; lower finetune.blr"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        if (step + 1) % per_update == 0:
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update(model)


def finetune_optimizer(model: nn.Module, settings: Finetune) -> torch.optim.Optimizer:
    """AdamW whose rates shrink by layer_decay per layer towards the input; no decay of 1-D parameters."""
    made: torch.optim.Optimizer = create_optimizer_v2(
        model,
        "adamw",
        lr=settings.blr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        betas=settings.betas,
    )
    return made


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every group's rate: `lr` times the scale of its layer."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def build_mixup(settings: Finetune, n_classes: int) -> Any:
    """timm's mixup and cutmix with smoothed labels; None where both are off."""
    if settings.mixup <= 0 and settings.cutmix <= 0:
        return None
    return Mixup(mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix, label_smoothing=settings.label_smoothing,  # type: ignore[no-untyped-call]
                 num_classes=n_classes)  # fmt: skip


def soft(labels: Int64[Tensor, "b"], n_classes: int, smoothing: float) -> Float[Tensor, "b c"]:
    """Smoothed one-hot labels."""
    return torch.nn.functional.one_hot(labels, n_classes) * (1 - smoothing) + smoothing / n_classes


def update_size(batch_size: int, n: int) -> int:
    """Images per update: at most the train part, and even, which timm's mixup needs."""
    return max(2, min(batch_size, n) // 2 * 2)


def batches_of(order: list[int], size: int) -> list[list[int]]:
    return [order[a : a + size] for a in range(0, len(order), size)]


def seed_everything(seed: int, epoch: int) -> None:
    """timm's augmentations draw from Python's and numpy's generators, mixup from numpy's, drop path from torch's."""
    value = (seed * 100_003 + epoch) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def restore(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, average: ModelEmaV3 | None
) -> int:
    """Bring everything to where `state` was saved; returns the epochs done."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(copy.copy(state["optimizer"]))
    if average:
        average.module.load_state_dict(state["ema"])
    return int(state["epoch"])


@torch.no_grad()
def predict_classes(
    model: nn.Module, source: FeatureSource, part: Split, *, device: str, workers: int
) -> Int64[Tensor, "n"]:
    """Predicted classes of a part's evaluation views."""
    model.eval()
    found = []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(part), EVAL_BATCH):
            ids = range(start, min(start + EVAL_BATCH, len(part)))
            pixels = shown_images(part, ids, source.size, source.spec.interpolation, pool)
            found.append(model(normalise(pixels.to(device), source.spec)).argmax(1).cpu())
    return torch.cat(found)
