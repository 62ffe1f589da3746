"""The command: its shorthands, its plan, its exit status, and one clear line for everything it refuses."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from mrmae.train import cli, loop
from mrmae.train.method.recipe import load_recipe
from mrmae.train.setup import Cadence, Setup

SMALL = ["--student", "test_vit", "--set", "student.decoder={depth: 1, width: 16, heads: 2}", "--device", "cpu"]


def _run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of `loop.train`, which trains nothing here."""
    calls: list[dict[str, Any]] = []

    def train(cache: Path, out: Path, recipe: Any, setup: Setup, cadence: Cadence) -> dict[str, Any]:
        calls.append({"cache": cache, "out": out, "recipe": recipe, "setup": setup, "cadence": cadence})
        return {"finished": True}

    monkeypatch.setattr(loop, "train", train)
    return calls


def test_shorthands_set_the_recipe_and_the_rest_says_how_to_run(captured: list[dict[str, Any]]) -> None:
    result = _run(
        "CACHE", "OUT", "--student", "vit_tiny_patch16_224", "--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.2,
        "--epochs", 100, "--batch-size", 512, "--blr", "1e-3", "--warmup-epochs", 5, "--mask-ratio", 0.6, "--seed", 7,
        "--precision", "fp32", "--compile", "--kernels", "torch", "--workers", 3, "--accum", 2, "--save-minutes", 5,
        "--keep", 2, "--log-every", 9, "--panels-every", 4, "--device", "cpu", "--set", "optim.weight_decay=0.1",
        "--online", "--teacher", "clip=open_clip:ViT-B-16", "--teacher", "dino=timm:vit_base_patch16_224.dino",
        "--hold-out", 0.01, "--probe-every", 10, "--wandb", "project", "--init", "mae.pth", "--export", "mae",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (call,) = captured
    wanted = load_recipe("mr-mae", [
        "student.model=vit_tiny_patch16_224", "prepare.mean=[0.5, 0.4, 0.3]", "prepare.std=[0.2, 0.2, 0.2]",
        "optim.epochs=100", "optim.batch_size=512", "optim.lr_per_256=1e-3", "optim.warmup_epochs=5", "mask.ratio=0.6",
        "seed=7", "optim.precision=fp32", "optim.weight_decay=0.1",
    ])  # fmt: skip
    assert call.pop("recipe") == wanted
    assert (call["cache"], call["out"]) == (Path("CACHE"), Path("OUT"))
    assert (call["setup"].command or "").startswith("train-mrmae ")
    assert replace(call["setup"], command=None) == Setup(
        device="cpu", compile=True, kernels="torch", workers=3, accum=2, online=True, hold_out=0.01, init=Path("mae.pth"),
        teachers=("clip=open_clip:ViT-B-16", "dino=timm:vit_base_patch16_224.dino"), export=("mae",),
    )  # fmt: skip
    assert call["cadence"] == Cadence(
        save_minutes=5.0, keep=2, log_every=9, panels_every=4, probe_every=10, wandb="project"
    )


def test_nothing_given_is_the_shipped_recipe(captured: list[dict[str, Any]]) -> None:
    assert _run("CACHE", "OUT").exit_code == 0
    assert _run("CACHE", "OUT", "--recipe", "mae").exit_code == 0
    assert [call["recipe"] for call in captured] == [load_recipe("mr-mae"), load_recipe("mae")]


@pytest.mark.parametrize(
    "args, warmup",
    [
        (["--epochs", "1"], 0),
        (["--epochs", "10"], 1),
        (["--epochs", "25"], 3),
        (["--epochs", "800"], 40),
        (["--epochs", "10", "--warmup-epochs", "4"], 4),
        (["--epochs", "10", "--set", "optim.warmup_epochs=5"], 5),
        (["--set", "optim.epochs=300"], 40),
    ],
)
def test_a_run_length_of_ones_own_brings_a_warm_up_that_fits(
    captured: list[dict[str, Any]], args: list[str], warmup: float
) -> None:
    assert _run("CACHE", "OUT", *args).exit_code == 0
    assert captured[0]["recipe"].optim.warmup_epochs == warmup


def test_recipes_and_students_are_listed_and_a_recipe_is_shown_without_a_cache() -> None:
    listed = _run("--recipe", "list")
    assert listed.exit_code == 0 and "mr-mae-focused MR-MAE with focused mimicking" in " ".join(listed.output.split())
    shown = _run("--show-recipe", "mr-mae")
    assert shown.exit_code == 0 and "transform: ln0              # inferred" in shown.output
    assert _run("--show-recipe", "mr-mea").output.startswith("Error: recipe 'mr-mea': is neither")
    students = _run("--list-students")
    assert students.exit_code == 0 and "width 192, 12 blocks, 3 heads, 5.5 M parameters" in students.output
    assert "mcmae_base" in students.output and "width 768, 11 blocks" in students.output


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_cache: Path, tmp_path: Path) -> None:
    result = _run(tiny_cache, tmp_path / "out", *SMALL, "--epochs", 10, "--batch-size", 8, "--dry-run")
    assert result.exit_code == 0, result.output
    for part in (
        "mr-mae (seed 0)", "24 images x 2 views", "column a", "random weights", "test_vit as patch 8 at 32 px",
        "4 of 16 patches visible, 12 predicted", "5 encoder, 17 decoder", "8 images per update; 3 updates per epoch",
        "4.69e-06 = 0.00015 x 8 / 256, warm-up 1 epoch, cosine to 0", "10 epochs; every image in every epoch",
        "1 block of width 16", "RANDOM WEIGHTS", "for 240 images in this one process", "10 micro-batches of 8 took", "small learning rate: 4.69e-06",
    ):  # fmt: skip
        assert part in result.output, part
    kib = (16 * (8 + 2) + 16 * (6 + 2)) / 1024  # int8 codes and a 2-byte scale per token, two teachers
    assert f"{kib:.1f} KiB per image" in result.output
    assert not (tmp_path / "out").exists()


def test_dry_run_recommends_more_views_for_a_long_run(tiny_cache: Path, tmp_path: Path) -> None:
    args = [tiny_cache, tmp_path / "out", *SMALL, "--batch-size", 8, "--dry-run"]
    assert (
        "views: 200 epochs show 2 stored crops of every image in turn; 4 are recommended: about" in _run(*args).output
    )
    assert "are recommended" not in _run(*args, "--epochs", 100).output


@pytest.mark.drawn
def test_trains_and_the_same_command_again_is_done(tiny_cache: Path, tmp_path: Path) -> None:
    args = [tiny_cache, tmp_path / "out", *SMALL, "--epochs", 2, "--batch-size", 8]
    first = _run(*args)
    assert first.exit_code == 0, first.output
    assert "epoch 2/2" in first.output and "finished: 2 epochs" in first.output
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["optim"]["warmup_epochs"] == 1
    for name in (
        "student/model.safetensors",
        "curves.png",
        "report.html",
        "panels/epoch-0002.png",
        "log.jsonl",
        "tensorboard",
    ):
        assert (tmp_path / "out" / name).exists(), name
    assert _run(*args).exit_code == 0
    refused = _run(*args, "--mask-ratio", 0.5)
    assert refused.exit_code == 1 and "mask.ratio was 0.75 and is now 0.5" in refused.output


def test_a_stopped_run_exits_with_the_signals_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train", lambda *_, **__: {"finished": False, "stopped": "SIGTERM"})
    assert _run("CACHE", "OUT").exit_code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "args, message",
    [
        (["--recipe", "mr-mea"], "mr-mae"),
        (["--student", "vit_tiny_patch16_242", "--batch-size", "8"], "vit_tiny_patch16_224"),
        (["--batch-size", "25"], "more than the 24 valid images"),
        (["--batch-size", "8", "--mask-ratio", "0.95"], "leaves 0 of 16"),
        (["--batch-size", "8", "--set", "optim.lr=1"], "optim.lr"),
        (["--batch-size", "8", "--epochs", "1", "--warmup-epochs", "1"], "warmup_epochs"),
        (["--batch-size", "8", "--device", "cuda:77"], "--device cuda:77"),
        (["--batch-size", "8", "--hold-out", "0.001"], "--hold-out 0.001: takes 0 of the 24"),
        (["--batch-size", "20", "--hold-out", "0.3"], "valid images of the cache to train on"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tiny_cache: Path, tmp_path: Path, args: list[str], message: str) -> None:
    result = _run(tiny_cache, tmp_path / "out", *args)
    assert result.exit_code == 1 and result.output.startswith("Error: ") and message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
