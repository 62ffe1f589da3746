"""Fine-tuning: it learns, it resumes exactly, its settings reach the optimiser, and classifiers are replaced aloud."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.layers.drop import DropPath
from torch import Tensor
from training import train_quietly

from mrmae.probe import finetune as module
from mrmae.probe.classifier import MaskedConvClassifier, trainable
from mrmae.probe.cli import main
from mrmae.probe.data import Data, open_data
from mrmae.probe.finetune import finetune, finetune_optimizer, set_rates, soft, update_size
from mrmae.probe.settings import Finetune, settings_from
from mrmae.probe.sources import FeatureSource, open_source
from mrmae.train.method.recipe import load_recipe

QUICK = ("finetune.epochs=4", "finetune.warmup_epochs=1", "finetune.batch_size=12", "finetune.blr=0.05", "finetune.auto_augment=''",
         "finetune.erase=0.0", "finetune.mixup=0.0", "finetune.cutmix=0.0", "finetune.drop_path=0.0")  # fmt: skip
PUBLISHED = {
    "epochs": 100, "batch_size": 1024, "blr": 5e-4, "layer_decay": 0.65, "weight_decay": 0.05, "betas": (0.9, 0.999),
    "warmup_epochs": 5, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "erase": 0.25,
    "auto_augment": "rand-m9-mstd0.5-inc1", "min_lr": 1e-6,
}  # fmt: skip


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Data:
    return open_data([str(images)], tmp_path)


def run(
    source: FeatureSource, data: Data, folder: Path, *sets: str, said: list[str] | None = None
) -> tuple[Tensor, list[str]]:
    settings = settings_from([*QUICK, *sets]).finetune
    return finetune(
        source,
        data,
        settings,
        folder=folder,
        say=(said if said is not None else []).append,
        seed=0,
        device="cpu",
        workers=1,
    )


def test_the_defaults_are_the_published_settings() -> None:
    for name, value in PUBLISHED.items():
        assert getattr(Finetune(), name) == value, name


def test_a_student_learns_the_classes_and_keeps_its_weights(trained: Path, data: Data, tmp_path: Path) -> None:
    source = open_source(str(trained))
    assert source.teacher
    before = {name: x.clone() for name, x in source.teacher.tower.module.state_dict().items()}
    predicted, notes = run(source, data, tmp_path / "fine")
    assert (predicted == data.labels(data.test)).double().mean() > 0.8 and notes == []
    after = source.teacher.tower.module.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())  # other probes still read the frozen model
    assert (tmp_path / "fine" / "model.safetensors").is_file() and not (tmp_path / "fine" / "checkpoints").exists()


def test_the_published_augmentation_never_asks_for_no_bit(trained: Path, data: Data) -> None:
    transform = module.Augmented(open_source(str(trained)), data, Finetune()).transform
    (op,) = [op for step in transform.transforms for op in getattr(step, "ops", ()) if op.name.startswith("Posterize")]
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    picture = Image.new("RGB", (32, 32), (200, 100, 50))
    assert op(picture).getpixel((0, 0)) == (128, 0, 0)  # one bit of each channel


def test_a_fine_tuned_student_is_a_classifier_of_timm_s(trained: Path, data: Data, tmp_path: Path) -> None:
    source, said = open_source(str(trained)), list[str]()
    predicted, _ = run(source, data, tmp_path / "fine", said=said)
    assert said == [f'classifier  timm.create_model("local-dir:{tmp_path}/fine", pretrained=True)']
    model = timm.create_model(f"local-dir:{tmp_path}/fine", pretrained=True)
    assert torch.equal(module.predict_classes(model, source, data.test, device="cpu", workers=1), predicted)
    assert model.pretrained_cfg["label_names"] == data.classes and model.num_classes == 3
    prepared = timm.data.resolve_model_data_config(model)
    assert prepared["input_size"] == (3, 32, 32) and tuple(prepared["mean"]) == source.spec.mean


def test_stopped_after_an_epoch_and_continued_gives_the_same_weights(
    trained: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (
        "finetune.mixup=0.8",
        "finetune.auto_augment=rand-m9-mstd0.5-inc1",
        "finetune.drop_path=0.2",
        "finetune.ema=0.9",
    )
    run(open_source(str(trained)), data, tmp_path / "whole", *sets)
    train_epoch: Callable[..., None] = module.train_epoch

    def stop_at_two(*args: Any, epoch: int, **how: Any) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        train_epoch(*args, epoch=epoch, **how)

    monkeypatch.setattr(module, "train_epoch", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        run(open_source(str(trained)), data, tmp_path / "parts", *sets)
    monkeypatch.undo()
    said: list[str] = []
    run(open_source(str(trained)), data, tmp_path / "parts", *sets, said=said)
    assert said[0] == "fine-tuning continues after epoch 2 of 4"
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two


def test_the_student_becomes_maes_classifier(trained: Path) -> None:
    source = open_source(str(trained))
    model: Any = trainable(source, 7, drop_path=0.3)[0]
    assert (
        isinstance(model.norm, torch.nn.Identity) and model.head.weight.abs().max() < 1e-3 and not model.head.bias.any()
    )
    rates = [block.drop_path1.drop_prob for block in model.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3) and rates == sorted(rates)
    assert isinstance(model.blocks[-1].drop_path2, DropPath)
    assert all(p.requires_grad for p in model.parameters())
    pixels = torch.randn(2, 3, 32, 32)
    model.eval()
    tokens = model.forward_features(pixels)
    wanted = model.head(model.fc_norm(tokens[:, 1:].mean(1)))
    assert torch.allclose(model(pixels), wanted, atol=1e-6)


def test_rates_fall_towards_the_input_and_vectors_do_not_decay(trained: Path) -> None:
    model = trainable(open_source(str(trained)), 3, drop_path=0.0)[0]
    optimizer = finetune_optimizer(model, Finetune(layer_decay=0.5, blr=1.0))
    set_rates(optimizer, 1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rate = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert rate["head.weight"] == 1.0
    blocks = [rate[f"blocks.{i}.attn.qkv.weight"] for i in range(len(model.blocks))]  # type: ignore[arg-type]
    assert (
        all(a == pytest.approx(b * 0.5) for a, b in zip(blocks, blocks[1:]))
        and rate["patch_embed.proj.weight"] < blocks[0]
    )
    assert decay["head.weight"] == 0.05 and decay["head.bias"] == decay["fc_norm.weight"] == 0.0


@pytest.fixture
def of_seven(tmp_path: Path) -> str:
    """A timm model whose weights hold a classifier of seven classes."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "seven.safetensors")
    return f"timm:test_vit@{tmp_path / 'seven.safetensors'}"


def test_a_classifier_of_another_number_of_classes_is_refused_naming_both_and_the_way_out(
    of_seven: str, images: Path, tmp_path: Path
) -> None:
    how = [of_seven, str(images), "--probe", "finetune", "--out", str(tmp_path / "out"), "--workers", "1"]
    how += [word for text in (*QUICK, "finetune.epochs=1", "finetune.warmup_epochs=0.5") for word in ("--set", text)]
    refused = CliRunner().invoke(main, how)
    assert refused.exit_code == 1 and "Traceback" not in refused.output
    assert "the classifier in its weights has 7 classes, DATA has 3; the same number was expected" in refused.output
    assert "--set finetune.new_head=true" in refused.output
    allowed = CliRunner().invoke(main, [*how, "--set", "finetune.new_head=true"])
    assert allowed.exit_code == 0, allowed.output
    assert "note: the classifier of 7 classes that the weights hold is replaced by a new one of 3" in allowed.output


def test_a_classifier_that_fits_is_where_fine_tuning_begins(of_seven: str) -> None:
    source = open_source(of_seven)
    stored = safetensors.torch.load_file(of_seven.partition("@")[2])
    model, notes = trainable(source, 7, drop_path=0.1)
    assert notes == ["fine-tuning begins with the classifier of 7 classes that the weights hold"]
    assert all(torch.equal(x, stored[name]) for name, x in model.state_dict().items())
    anew, _ = trainable(source, 7, drop_path=0.1, new_head=True)
    assert not torch.equal(anew.state_dict()["head.weight"], stored["head.weight"])
    assert torch.equal(anew.state_dict()["blocks.0.attn.qkv.weight"], stored["blocks.0.attn.qkv.weight"])


def test_weights_without_a_classifier_get_a_new_one(data: Data, tmp_path: Path) -> None:
    predicted, notes = run(open_source("timm:test_resnet/random?input_size=32"), data, tmp_path / "cnn",
                           "finetune.epochs=1", "finetune.warmup_epochs=0.5")  # fmt: skip
    assert len(predicted) == 12 and notes == []


@pytest.fixture(scope="module")
def mcmae(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of MCMAE's student of 32 px, trained for two epochs."""
    root = tmp_path_factory.mktemp("mcmae")
    cache = make_cache(root / "cache", n=8, grid=2, n_views=1, teachers={})
    recipe = load_recipe("mr-mcmae", ["student.model=test_mcmae", "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
                                      "optim.epochs=2", "optim.warmup_epochs=1", "optim.batch_size=4", "terms.mimic=null"])  # fmt: skip
    train_quietly(cache, root / "out", recipe)
    return root / "out"


def test_mcmaes_student_learns_the_classes_at_its_own_size_and_another(mcmae: Path, data: Data, tmp_path: Path) -> None:
    for size in (32, 48):
        source = open_source(str(mcmae), size=size)
        predicted, _ = run(source, data, tmp_path / str(size), "finetune.layer_decay=1.0", "finetune.epochs=8")
        assert (predicted == data.labels(data.test)).double().mean() > 0.8, size


def test_mcmaes_student_becomes_the_classifier_of_its_code(mcmae: Path) -> None:
    source = open_source(str(mcmae))
    model = trainable(source, 7, drop_path=0.3)[0]
    assert isinstance(model, MaskedConvClassifier) and source.teacher
    names = dict(model.named_parameters())
    assert not any("output_decode" in name or name.startswith("student.norm") for name in names)
    paths = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert (
        len(paths) == 2 * (1 + 2 + 3) and paths[0] == 0 and paths[-1] == pytest.approx(0.3) and paths == sorted(paths)
    )
    pixels = torch.randn(2, 3, 32, 32)
    model.eval()
    frozen: Any = source.teacher.tower.module
    wanted = model.head(model.fc_norm(frozen.forward_features(pixels).mean(1)))
    assert torch.allclose(model(pixels), wanted, atol=1e-6)
    optimizer = finetune_optimizer(model, Finetune(layer_decay=0.5, blr=1.0))
    set_rates(optimizer, 1.0)
    groups = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    rate = {name: group["lr"] for name, x in names.items() for group, p in groups if p is x}
    decay = {name: group["weight_decay"] for name, x in names.items() for group, p in groups if p is x}
    blocks = [rate[f"student.blocks3.{i}.attn.qkv.weight"] for i in range(3)]
    assert rate["head.weight"] == rate["fc_norm.weight"] == 1.0 and blocks == [0.125, 0.25, 0.5]
    stem = (
        "blocks1.0.conv1.weight",
        "blocks2.1.mlp.fc2.weight",
        "patch_embed3.proj.weight",
        "patch_embed4.weight",
        "pos_embed",
    )
    assert {rate[f"student.{name}"] for name in stem} == {0.0625}
    assert decay["student.pos_embed"] == decay["head.bias"] == 0 and decay["student.blocks1.0.conv1.weight"] == 0.05


def test_a_column_cannot_be_fine_tuned(tiny_cache: Path) -> None:
    with pytest.raises(ValueError, match="a cache column has no model to fine-tune"):
        trainable(open_source(f"{tiny_cache}#a"), 3, drop_path=0.0)


def test_a_loss_that_is_no_number_stops_with_the_epoch(trained: Path, data: Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the loss of epoch [12] is .*; lower finetune.blr"):
        run(open_source(str(trained)), data, tmp_path / "nan", "finetune.blr=1e30")


def test_updates_are_even_and_never_larger_than_the_train_part() -> None:
    assert [update_size(1024, 25), update_size(8, 25), update_size(7, 25), update_size(64, 2)] == [24, 8, 6, 2]
    assert soft(torch.tensor([1]), 4, 0.1).tolist() == [pytest.approx([0.025, 0.925, 0.025, 0.025])]


def test_micro_batches_give_the_update_of_the_whole_batch(trained: Path, data: Data, tmp_path: Path) -> None:
    weights = []
    for micro in (12, 4):
        sets = (
            "finetune.epochs=2",
            f"finetune.micro_batch={micro}",
            "finetune.crop_scale=[1.0, 1.0]",
            "finetune.blr=0.001",
        )
        torch.manual_seed(0)
        run(open_source(str(trained)), data, tmp_path / str(micro), *sets)
        weights.append(safetensors.torch.load_file(tmp_path / str(micro) / "model.safetensors"))
    assert all((weights[0][name] - x).abs().max() < 2e-4 for name, x in weights[1].items())
