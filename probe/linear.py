"""Linear probe on cached features: BatchNorm without affine + Linear, one head per learning rate, all in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mrmae.probe.settings import Linear
from mrmae.train.optim import lr_at

BATCH_NORM_EPS = 1e-6  # of the BatchNorm, as in MAE's probe
ROWS = 4096  # per chunk of logits: 131 MB for 8 heads of 1000 classes


def probe_linear(
    train: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], test: Float[Tensor, "m d"], settings: Linear, *, n_classes: int, seed: int,
    held: Bool[Tensor, "n"] | None = None,
) -> tuple[Int64[Tensor, "h m"], int, list[str]]:  # fmt: skip
    """Every head's classes of the test rows, the head that a held-out part of train chooses, and what to say about the choice.

    held: which train rows choose; without it, a share of every class.
    """
    held = held if held is not None else hold_out(labels, settings.held_out, seed=seed)
    labels, held = labels.to(train.device), held.to(train.device)
    how: dict[str, Any] = {"lrs": settings.lrs, "n_classes": n_classes, "epochs": settings.epochs,
                           "batch_size": settings.batch_size, "momentum": settings.momentum, "seed": seed}  # fmt: skip
    if bool(held.any()):
        fit, choose = standardise(train[~held], train[held])
        heads = train_heads(fit, labels[~held], **how)
        predicted, loss = predict_linear(*heads, choose), cross_entropy(*heads, choose, labels[held])
        best, notes = choose_head(predicted, loss, labels[held].cpu()), []
    else:
        best = len(settings.lrs) // 2
        notes = [f"one train image per class: none can be held out: lr {settings.lrs[best]:g} is the headline unseen"]
    train, test = standardise(train, test)
    return predict_linear(*train_heads(train, labels, **how), test), best, notes


def train_heads(
    x: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], *,
    lrs: Sequence[float], n_classes: int, epochs: int, batch_size: int, momentum: float, seed: int,
) -> tuple[Float[Tensor, "h c d"], Float[Tensor, "h c"]]:  # fmt: skip
    """Weights and biases of one linear head per learning rate, for standardised features.

    lrs: per 256 images. SGD with momentum, no decay, half-cosine to 0. Heads never mix: each is what it would be if it
    were trained alone. The same seed gives the same order and start.
    MAE (arXiv 2111.06377), appendix A.1 uses LARS; a sweep of SGD rates is ours.
    """
    n, generator = len(x), torch.Generator().manual_seed(seed)
    size = min(batch_size, n)
    start = (0.01 * torch.randn(n_classes, x.shape[1], generator=generator)).to(x.device)
    weight, bias = start.expand(len(lrs), -1, -1).clone(), start.new_zeros(len(lrs), n_classes)
    moved = [torch.zeros_like(weight), torch.zeros_like(bias)]
    rates = torch.tensor([lr * size / 256 for lr in lrs], device=x.device)
    steps = max(1, n // size)
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator).to(x.device)
        for step in range(steps):
            ids = order[step * size : (step + 1) * size]
            rate = rates * lr_at(epoch + step / steps, peak=1.0, warmup_epochs=0, epochs=epochs)
            for value, buffer, gradient in zip((weight, bias), moved, gradients(weight, bias, x[ids], labels[ids])):
                buffer.mul_(momentum).add_(gradient)
                value.sub_(rate.view(-1, *[1] * (value.ndim - 1)) * buffer)
    return weight, bias


def gradients(
    weight: Tensor, bias: Tensor, x: Float[Tensor, "b d"], labels: Int64[Tensor, "b"]
) -> tuple[Tensor, Tensor]:
    """Of every head's mean cross-entropy: (softmax - onehot)^T x / b."""
    error = scores(weight, bias, x).softmax(-1)
    error[:, torch.arange(len(x), device=x.device), labels] -= 1
    return torch.einsum("hbc,bd->hcd", error, x) / len(x), error.mean(1)


def scores(
    weight: Float[Tensor, "h c d"], bias: Float[Tensor, "h c"], x: Float[Tensor, "b d"]
) -> Float[Tensor, "h b c"]:
    """Every head's logits."""
    return torch.einsum("bd,hcd->hbc", x, weight) + bias[:, None]


def predict_linear(weight: Tensor, bias: Tensor, x: Float[Tensor, "n d"]) -> Int64[Tensor, "h n"]:
    """Every head's predicted classes, on the CPU."""
    return torch.cat([scores(weight, bias, rows).argmax(-1).cpu() for rows in torch.split(x, ROWS)], dim=1)


def standardise(train: Float[Tensor, "n d"], *others: Float[Tensor, "m d"]) -> list[Tensor]:
    """Features as a BatchNorm without affine gives them, with the train part's own statistics instead of running ones.

    A channel that is constant over the train part becomes 0 everywhere.
    """
    mean, var = train.double().mean(0), train.double().var(0, correction=0)
    scale = torch.where(var > 1e-12 * mean.square(), (var + BATCH_NORM_EPS).rsqrt(), 0.0)
    return [((x.double() - mean) * scale).float() for x in (train, *others)]


def hold_out(labels: Int64[Tensor, "n"], share: float, *, seed: int) -> Bool[Tensor, "n"]:
    """Which train images choose the learning rate: about `share` of every class, at least one, and never all of it.

    A class of one image is only learnt from; all False where every class is like that, or share is 0.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in range(int(labels.max()) + 1 if share else 0):
        ids = (labels == label).nonzero().flatten()
        if len(ids) > 1:
            count = min(max(1, round(share * len(ids))), len(ids) - 1)
            held[ids[torch.randperm(len(ids), generator=generator)[:count]]] = True
    return held


def accuracy(predicted: Int64[Tensor, "... n"], labels: Int64[Tensor, "n"]) -> Float[Tensor, "..."]:
    """Share of equal entries."""
    return (predicted == labels).double().mean(-1)


def cross_entropy(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> Float[Tensor, "h"]:
    """Every head's mean cross-entropy, on the CPU: breaks ties between heads of equal accuracy."""
    total = torch.zeros(len(weight), device=x.device)
    for rows, truth in zip(torch.split(x, ROWS), torch.split(labels, ROWS)):
        total += torch.stack([F.cross_entropy(logits, truth, reduction="sum") for logits in scores(weight, bias, rows)])
    return (total / len(x)).cpu()


def choose_head(predicted: Tensor, loss: Tensor, labels: Tensor) -> int:
    """The head with the highest accuracy, of equal ones the one with the lowest loss; heads that diverged are last."""
    right, finite = accuracy(predicted, labels), torch.isfinite(loss)
    order = sorted(range(len(loss)), key=lambda h: (not bool(finite[h]), -float(right[h]), float(loss[h])))
    return order[0]
