"""A run learns, resumes to the same bits, stops when told, guards itself, and explains itself."""

import functools
import io
import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor
from training import train_quietly

from mrmae.probe.students import locate_student, read_student
from mrmae.shards.cache import open_cache
from mrmae.shards.order import view_of
from mrmae.train import checkpoint, loop, optim, pictures, resume
from mrmae.train import run as runs
from mrmae.train.log import read_rows
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import Recipe, load_recipe
from mrmae.train.run_page import run_page

QUICK = (
    "student.model=test_vit_of_3",
    "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
    "optim.epochs=4",
    "optim.batch_size=4",
    "optim.warmup_epochs=1",
    "optim.lr_per_256=0.1",
)
UPDATES = 6  # of an epoch: the tiny cache has 24 images
# A process that trains like `_train`, but dies by SIGKILL in the middle of epoch 2, after a checkpoint in its middle.
KILLED = f"""
import os, signal, sys
sys.path.append({str(Path(__file__).parents[1])!r})
import training  # the student
from mrmae.train import loop
from mrmae.train.setup import Cadence, Setup
from mrmae.train.method.recipe import load_recipe
step = loop.step
def dying(run, live, forward):
    if run.step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    live.saved_at -= 3600 if run.step == 7 else 0
    return step(run, live, forward)
loop.step = dying
recipe = load_recipe("mr-mae", sys.argv[3:])
loop.train(sys.argv[1], sys.argv[2], recipe, Setup(device="cpu"), Cadence(panels_every=0, tensorboard=False, page=False))
"""


def quick(name: str = "mr-mae", *overrides: str) -> Recipe:
    """Four epochs of six updates on the tiny cache."""
    return load_recipe(name, [*QUICK, *overrides])


def _train(cache: Path, out: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    console = Console(file=io.StringIO(), width=250)
    return train_quietly(cache, out, recipe, console, **options) | {"said": console.file.getvalue()}  # type: ignore[attr-defined]


def _state(out: Path) -> checkpoint.State:
    return checkpoint.read_checkpoint(checkpoint.list_checkpoints(out / "checkpoints")[-1])


def _assert_same_bits(out: Path, other: Path) -> None:
    def tensors(state: checkpoint.State) -> dict[str, Tensor]:
        parts = {"": state["optimizer"]} if "state" in state["optimizer"] else state["optimizer"]
        moments = {
            f"{name}{i}.{k}": v
            for name, part in parts.items()
            for i, slot in part["state"].items()
            for k, v in slot.items()
        }
        return {**state["model"], **moments}

    one, two = _state(out), _state(other)
    ours, theirs = tensors(one), tensors(two)
    assert one["step"] == two["step"] and ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert _epoch_losses(out) == _epoch_losses(other)


def _epoch_losses(out: Path) -> list[tuple[int, float, dict[str, float]]]:
    return [(row["epoch"], row["loss"], row["terms"]) for row in read_rows(out / "log.jsonl", "epoch")]


def _raise_signal_at(step: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.step

    def with_signal(run: Any, live: Any, forward: Any) -> Tensor:
        if run.step == step:
            signal.raise_signal(getattr(signal, name))
        return original(run, live, forward)

    monkeypatch.setattr(loop, "step", with_signal)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums have the same order, hence the same bits, in every process; and tiny matrices are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `quick()`, with curves: they are left out of what a test begins, not of what is there before it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert _train(tiny_cache, out, quick(), log_every=1)["finished"]
    return out


def test_every_loss_term_falls_in_every_epoch_and_features_are_learnt(whole: Path) -> None:
    epochs = [terms for _, _, terms in _epoch_losses(whole)]
    assert len(epochs) == 4 and epochs[0].keys() == {"mimic/a", "mimic/b", "pixels"}
    for before, after in itertools.pairwise(epochs):
        assert all(after[name] < before[name] for name in before), (before, after)
    assert epochs[-1]["mimic/a"] < 0.9 and epochs[-1]["mimic/b"] < 0.7  # predicting zero costs 1 on these targets


def test_learning_rate_follows_the_schedule_at_every_update(whole: Path) -> None:
    rows = read_rows(whole / "log.jsonl", "step")
    assert [row["step"] for row in rows] == list(range(1, 4 * UPDATES + 1))
    for row in rows:
        at = (row["step"] - 1) / UPDATES
        assert row["lr"] == optim.lr_at(at, peak=0.1 * 4 / 256, warmup_epochs=1, epochs=4)


def test_killed_in_mid_epoch_and_resumed_gives_the_same_bits(
    tiny_cache: Path, tmp_path: Path, whole: Path, warm: list[str]
) -> None:
    args = [*warm, "-c", KILLED, str(tiny_cache), str(tmp_path / "out"), *QUICK]
    killed = subprocess.run(
        args, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert _state(tmp_path / "out")["step"] == 8  # neither an epoch's end nor the update before the kill
    assert _train(tiny_cache, tmp_path / "out", quick())["finished"]
    _assert_same_bits(tmp_path / "out", whole)


@pytest.mark.parametrize("optimiser", ["muon", "schedule-free"])
def test_other_optimisers_stopped_in_mid_epoch_and_resumed_give_the_same_bits(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: str
) -> None:
    recipe = quick("mr-mae", f"optim.name={optimiser}", "optim.epochs=2")
    _train(tiny_cache, tmp_path / "whole", recipe)
    with monkeypatch.context() as context:
        _raise_signal_at(8, "SIGTERM", context)
        assert not _train(tiny_cache, tmp_path / "out", recipe, probe_every=1)["finished"]
    assert _train(tiny_cache, tmp_path / "out", recipe)["finished"]
    _assert_same_bits(tmp_path / "out", tmp_path / "whole")
    first, last = _epoch_losses(tmp_path / "whole")
    assert all(last[2][name] < loss for name, loss in first[2].items())


def test_averaged_weights_are_what_a_cut_run_saves_evaluates_draws_and_exports(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[Tensor] = []
    seen: dict[str, dict[str, Tensor]] = {}
    guarded_step, name = optim.guarded_step, "student.blocks.1.mlp.fc1.weight"

    def noted_step(optimizer: Any, norm: Tensor) -> Tensor:
        gradients.append(runs_of[0].model.get_parameter(name).grad.double().clone())
        return guarded_step(optimizer, norm)

    def noted_build(*args: Any, **options: Any) -> runs.Run:
        runs_of.append(runs.build_run(*args, **options))
        return runs_of[-1]

    def note(what: str, given: Any) -> None:
        seen[what] = {key: x.clone() for key, x in getattr(given, "model", given).state_dict().items()}

    runs_of: list[runs.Run] = []
    monkeypatch.setattr(resume, "build_run", noted_build)
    for what in ("draw_run_panels", "export_student"):
        monkeypatch.setattr(loop, what, lambda given, *_, what=what, **__: note(what, given))
    monkeypatch.setattr(loop, "held_out_loss", lambda run: note("held out", run) or {"loss": 0.0})
    monkeypatch.setattr(loop, "probe_student", lambda run: note("probed", run) or {})
    recipe = quick("mr-mae", "optim.name=schedule-free", "optim.epochs=2")
    options = {"hold_out": 0.2, "probe_every": 1, "panels_every": 1, "log_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(optim, "guarded_step", noted_step)
        _raise_signal_at(6, "SIGTERM", patch)
        assert not _train(tiny_cache, tmp_path / "out", recipe, **options)["finished"]
    first, cut = (checkpoint.read_checkpoint(p) for p in checkpoint.list_checkpoints(tmp_path / "out" / "checkpoints"))
    assert cut["step"] == 7 and cut["update"] > 0 and sorted(seen) == ["draw_run_panels", "held out", "probed"]
    assert all(torch.equal(x, weights[key]) for weights in seen.values() for key, x in first["model"].items())

    rates = [row["lr"] for row in read_rows(tmp_path / "out" / "log.jsonl", "step")]
    peak, n = 0.1 * 4 / 256, runs_of[0].updates
    assert rates == [peak * min(step / n, 1) for step in range(7)]
    x = z = build_model(recipe, runs_of[0].info).get_parameter(name).detach().double()
    y, v, total = x, torch.zeros_like(x), 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates), 1):  # arXiv 2405.15682, algorithm 1
        v, rate = 0.95 * v + 0.05 * g * g, lr * (1 - 0.95**t) ** 0.5
        z, total = z - rate * (g / (v.sqrt() + 1e-8) + 0.05 * y), total + rate**2
        x = x + (rate**2 / total if total else 0.0) * (z - x)
        y = 0.1 * z + 0.9 * x
    read = read_student(locate_student(tmp_path / "out")).model
    student = read.get_parameter(name.removeprefix("student.")).detach().double()
    assert (student - x).norm() < 1e-6 * x.norm() and (student - y).norm() > 1e-4 * x.norm()

    assert _train(tiny_cache, tmp_path / "out", recipe, **options)["finished"]
    last = _state(tmp_path / "out")["model"]
    assert all(torch.equal(x, seen["export_student"][key]) for key, x in last.items())
    for weights in seen.values():
        assert all(torch.equal(x, weights[key]) for key, x in last.items())


def test_a_cache_of_tars_trains_to_the_same_bits(make_cache: Callable[..., Path], tmp_path: Path, whole: Path) -> None:
    """The same data in the other format: every loss and, after 24 updates, every weight and moment."""
    _train(make_cache(tmp_path / "cache", format="webdataset"), tmp_path / "out", quick(), log_every=1)
    _assert_same_bits(tmp_path / "out", whole)
    losses = [[row["loss"] for row in read_rows(out / "log.jsonl", "step")] for out in (tmp_path / "out", whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 4 * UPDATES


@pytest.mark.parametrize("dtype", ["fp8", "float16", "pq4"])
def test_other_dtypes_train_to_nearly_the_same_losses(
    make_cache: Callable[..., Path], tmp_path: Path, whole: Path, dtype: str
) -> None:
    _train(make_cache(tmp_path / "cache", dtype=dtype), tmp_path / "out", quick())
    for (_, _, ours), (_, _, int8) in zip(_epoch_losses(tmp_path / "out"), _epoch_losses(whole)):
        assert ours == pytest.approx(int8, rel=0.05 if dtype == "pq4" else 0.02) and ours != int8


@pytest.mark.parametrize("name, step", [("SIGTERM", 8), ("SIGUSR1", 5), ("SIGINT", 0)])
def test_a_signal_saves_says_how_to_go_on_and_the_same_call_does(
    tiny_cache: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        _raise_signal_at(step, name, patch)
        stopped = _train(tiny_cache, tmp_path / "out", quick(), command="train-mrmae CACHE OUT")
    assert (stopped["finished"], stopped["stopped"], stopped["step"]) == (False, name, step + 1)
    assert f"stopped by {name}" in stopped["said"] and "train-mrmae CACHE OUT" in stopped["said"]
    page = run_page(tmp_path / "out")
    assert f"UNFINISHED: stopped by {name} after update {step + 1} of {4 * UPDATES} (epoch" in page
    assert page.count("train-mrmae CACHE OUT</code>") == 2
    assert signal.getsignal(getattr(signal, name)) is before
    assert _train(tiny_cache, tmp_path / "out", quick())["finished"]
    assert "UNFINISHED" not in run_page(tmp_path / "out")
    _assert_same_bits(tmp_path / "out", whole)


def test_log_rows_and_the_epochs_seconds_go_on_over_a_restart(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick("mr-mae", "optim.epochs=2")
    monkeypatch.setattr(loop, "SHOWN_SECONDS", -1.0)  # shown after every update, written every four
    _train(tiny_cache, tmp_path / "whole", recipe, log_every=4)
    with monkeypatch.context() as patch:
        _raise_signal_at(9, "SIGTERM", patch)  # saved after update 10; the row of update 12 begins with update 9
        _train(tiny_cache, tmp_path / "out", recipe, log_every=4)
    before = _state(tmp_path / "out")["epoch_seconds"]
    _train(tiny_cache, tmp_path / "out", recipe, log_every=4)
    told = [
        [(row["step"], row["loss"], row["terms"], row["grad_norm"]) for row in read_rows(out / "log.jsonl", "step")]
        for out in (tmp_path / "whole", tmp_path / "out")
    ]
    assert told[0] == told[1] and [step for step, *_ in told[0]] == [4, 8, 12]
    assert read_rows(tmp_path / "out" / "log.jsonl", "epoch")[-1]["seconds"] > before > 0


def test_a_damaged_newest_checkpoint_costs_its_updates_only(tiny_cache: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    _train(tiny_cache, out, quick())
    os.truncate(checkpoint.list_checkpoints(out / "checkpoints")[-1], 1000)
    again = _train(tiny_cache, out, quick())
    assert again["finished"] and "WARNING" in again["said"] and "step-000000024.pt" in again["said"]
    assert json.loads((out / "run.json").read_text())["starts"][-1]["from_step"] == 3 * UPDATES
    _assert_same_bits(out, whole)


def test_a_finished_run_is_recognised_and_its_results_written_again(tiny_cache: Path, tmp_path: Path) -> None:
    recipe = quick("mae", "optim.epochs=2")
    first = _train(tiny_cache, tmp_path / "out", recipe)
    assert "10 updates took" in first["said"] and "for the 1 that are left, until" in first["said"]
    (tmp_path / "out" / "student" / "model.safetensors").unlink()
    again = _train(tiny_cache, tmp_path / "out", recipe)
    assert again["finished"] and again["step"] == 2 * UPDATES and again["updates"] == 0
    assert "this run is finished: all 2 epochs are done" in again["said"] and "before this start" in again["said"]
    assert (tmp_path / "out" / "student" / "model.safetensors").exists()


def test_a_picture_that_a_kill_after_the_save_prevented_is_drawn_by_the_next_start(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick("mae", "optim.epochs=2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mrmae.train.loop.draw_run_panels", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        _train(tiny_cache, tmp_path / "out", recipe, panels_every=2)
    assert _state(tmp_path / "out")["step"] == 2 * UPDATES and not list((tmp_path / "out").glob("panels/*"))
    assert _train(tiny_cache, tmp_path / "out", recipe, panels_every=2)["finished"]
    assert [file.name for file in (tmp_path / "out" / "panels").iterdir()] == ["epoch-0002.png"]


def test_more_epochs_continue_and_the_change_of_schedule_is_said(tiny_cache: Path, tmp_path: Path) -> None:
    _train(tiny_cache, tmp_path / "out", quick("mae", "optim.epochs=2"))
    longer = _train(tiny_cache, tmp_path / "out", quick("mae", "optim.epochs=3", "optim.warmup_epochs=2"))
    assert longer["finished"] and longer["step"] == 3 * UPDATES
    (note,) = longer["notes"]
    assert "optim.epochs 2 -> 3" in note and "warmup_epochs" in note and note in longer["said"]
    assert [epoch for epoch, *_ in _epoch_losses(tmp_path / "out")] == [1, 2, 3]
    with pytest.raises(ValueError, match="optim.epochs was 3 and is now 2"):
        _train(tiny_cache, tmp_path / "out", quick("mae", "optim.epochs=2", "optim.warmup_epochs=1"))


def test_accumulated_micro_batches_equal_one_batch(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "build_model", functools.partial(build_model, dtype=torch.float64))
    for accum in (1, 4):
        _train(tiny_cache, tmp_path / str(accum), quick(), accum=accum)
    one, four = _epoch_losses(tmp_path / "1"), _epoch_losses(tmp_path / "4")
    assert [loss for _, loss, _ in one] == pytest.approx([loss for _, loss, _ in four], rel=1e-9)
    weights = [_state(tmp_path / str(accum))["model"] for accum in (1, 4)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-7, atol=1e-9)


def _poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], term: str) -> list[dict[str, Tensor]]:
    """Make one term's value and the gradients NaN at `steps`; returns the weights seen before each of those updates."""
    original, seen = loop.step, []

    def poisoned(run: Any, live: Any, forward: Any) -> Tensor:
        def bad(batch: Any, masks: Any) -> Any:
            loss, terms = forward(batch, masks)
            return loss * float("nan"), {**terms, term: terms[term] * float("nan")}

        seen.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        return original(run, live, bad if run.step in steps else forward)

    monkeypatch.setattr(loop, "step", poisoned)
    return seen


def test_an_update_that_is_not_finite_is_skipped_and_the_schedule_goes_on(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _poison(monkeypatch, {3, 4, 8}, "pixels")
    summary = _train(tiny_cache, tmp_path / "out", quick(), log_every=1)
    assert summary["finished"] and summary["step"] == 4 * UPDATES
    for name, weight in seen[3].items():
        assert torch.equal(weight, seen[4][name]) and torch.equal(weight, seen[5][name])
    rows = {row["step"]: row for row in read_rows(tmp_path / "out" / "log.jsonl", "step")}
    assert [step for step, row in rows.items() if row["skipped"]] == [4, 5, 9]
    assert [row["skipped"] for row in read_rows(tmp_path / "out" / "log.jsonl", "epoch")] == [2, 1, 0, 0]
    assert rows[10]["lr"] == optim.lr_at(9 / UPDATES, peak=0.1 * 4 / 256, warmup_epochs=1, epochs=4)


def test_three_in_a_row_stop_the_run_naming_the_term_with_the_state_saved(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        seen = _poison(patch, {7, 8, 9}, "mimic/b")
        with pytest.raises(
            loop.Diverged, match="update 10: .*term mimic/b; .*optim.lr_per_256, --blr, is 0.1"
        ) as first:
            _train(tiny_cache, tmp_path / "out", quick())
    state = _state(tmp_path / "out")
    assert state["step"] == 10
    for name, weight in seen[7].items():
        assert torch.equal(weight, state["model"][name])
    with pytest.raises(loop.Diverged) as again:
        _train(tiny_cache, tmp_path / "out", quick())
    assert str(again.value) == str(first.value)
    newest = checkpoint.list_checkpoints(tmp_path / "out" / "checkpoints")[-1]
    assert f"saved in {newest}: without this file the run goes on" in str(first.value)
    newest.unlink()
    assert _train(tiny_cache, tmp_path / "out", quick())["finished"]


def test_a_resumed_run_diverges_at_the_same_update_as_an_uninterrupted_one(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {7, 8, 9}, "pixels")
    with monkeypatch.context() as patch:
        _raise_signal_at(8, "SIGTERM", patch)
        assert _train(tiny_cache, tmp_path / "out", quick())["step"] == 9  # two of three are skipped by now
    with pytest.raises(loop.Diverged, match="diverged at update 10:"):
        _train(tiny_cache, tmp_path / "out", quick())


@pytest.mark.drawn
def test_divergence_in_a_short_epoch_is_told_and_saved_though_no_picture_can_be_drawn(
    tiny_cache: Path, tmp_path: Path
) -> None:
    recipe = quick("mr-mae", "optim.lr_per_256=1e9", "optim.warmup_epochs=0", "optim.batch_size=24")
    told = []
    for _ in range(2):
        with pytest.raises(loop.Diverged, match=r"optim.lr_per_256, --blr, is 1e\+09") as error:
            _train(tiny_cache, tmp_path / "out", recipe, panels_every=1, hold_out=0.0, page=True)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert "UNFINISHED: diverged at update" in (tmp_path / "out" / "report.html").read_text()
    assert all(value.isfinite().all() for value in _state(tmp_path / "out")["model"].values())


@pytest.mark.drawn
def test_a_picture_that_fails_is_one_warning_and_the_state_is_saved_before_it(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def fail(*_: Any, **__: Any) -> None:
        saved.append(_state(tmp_path / "out")["step"])
        raise np.linalg.LinAlgError("no convergence\nat all")

    monkeypatch.setattr(loop, "draw_run_panels", fail)
    monkeypatch.setattr(loop, "draw_curves", fail)
    monkeypatch.setattr(loop, "write_run_page", fail)
    summary = _train(tiny_cache, tmp_path / "out", quick("mae", "optim.epochs=2"), panels_every=1, page=True)
    assert summary["finished"] and (tmp_path / "out" / "student" / "model.safetensors").exists()
    assert saved == [UPDATES, *[2 * UPDATES] * 3]
    warnings = [line for line in summary["said"].splitlines() if line.startswith("WARNING")]
    assert [line.split(":")[0] for line in warnings] == [
        "WARNING panels", "WARNING curves.png", "WARNING report.html"
    ]  # fmt: skip
    assert "LinAlgError: no convergence at all" in warnings[0]


def test_out_explains_itself_and_says_random(whole: Path, tiny_cache: Path) -> None:
    facts = json.loads((whole / "run.json").read_text())
    assert facts["teachers"]["a"]["weights"] == "random"
    assert facts["cache_ids"]["dataset"].startswith("sha256:") and "column a" in facts["cache_ids"]
    assert facts["starts"][0]["device"] == "cpu" and "torch" in facts["starts"][0]["versions"]
    resolved = load_recipe(str(whole / "recipe.yaml"))
    assert resolved == quick(
        "mr-mae", "prepare.images=24", "prepare.views=2", "prepare.columns=[a.pre_tail, b.pre_tail]"
    )
    text = (whole / "README.md").read_text()
    assert "RANDOM WEIGHTS" in text and "timm.create_model" in text and "same command" in text
    card = (whole / "student" / "README.md").read_text()
    assert "RANDOM WEIGHTS" in card and str(tiny_cache) not in card and str(whole) not in card
    assert (whole / "curves.png").stat().st_size > 1000


def test_every_update_sees_the_same_shapes_in_the_same_types(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = loop.with_targets, []

    def noted(*args: Any, **options: Any) -> Any:
        batch, masks = original(*args, **options)
        tensors = {"pixels": batch.pixels, "keep": masks.ids_keep, "predict": masks.ids_predict}
        tensors |= {f"{t}.{name}": x for t, arrays in batch.targets.items() for name, x in arrays.items()}
        seen.append({name: (tuple(x.shape), x.dtype) for name, x in tensors.items()})
        return batch, masks

    monkeypatch.setattr(loop, "with_targets", noted)
    summary = _train(tiny_cache, tmp_path / "out", quick("mr-mae", "optim.epochs=2", "optim.batch_size=5"))
    assert summary["finished"] and all(shapes == seen[0] for shapes in seen) and len(seen) == 2 * 4
    assert seen[0]["pixels"] == ((5, 32, 32, 3), torch.uint8) and seen[0]["a.tokens"] == ((5, 4, 8), torch.int8)


def test_begins_from_published_weights_and_gives_them_back(whole: Path, tiny_cache: Path, tmp_path: Path) -> None:
    first = _train(tiny_cache, tmp_path / "out", quick("mae", "optim.epochs=2"), export=("mae",))
    assert first["finished"]
    weights = torch.load(tmp_path / "out" / "published.pth", weights_only=True)["model"]
    again = _train(
        tiny_cache, tmp_path / "next", quick("mae", "optim.epochs=2"), init=tmp_path / "out" / "published.pth"
    )
    assert "encoder loaded" in again["said"] and again["loss"] < first["loss"]
    assert {"cls_token", "decoder_pred.weight", "blocks.0.attn.qkv.weight"} <= weights.keys()


def test_the_student_opens_in_timm(whole: Path) -> None:
    student = timm.create_model(f"local-dir:{whole / 'student'}", pretrained=True)
    state = _state(whole)["model"]
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, state[f"student.{name}"]), name


@pytest.mark.parametrize("name", ["mr-mae", "mimic-only"])
def test_panels_are_drawn_when_due(tiny_cache: Path, tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, [x for x in (*QUICK, "optim.epochs=3") if name == "mr-mae" or "decoder" not in x])
    _train(tiny_cache, tmp_path / "out", recipe, panels_every=2)
    assert sorted(p.name for p in (tmp_path / "out" / "panels").iterdir()) == ["epoch-0002.png", "epoch-0003.png"]


def test_panels_show_what_their_titles_say(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(pictures, "publish_png", lambda *_: None)
    monkeypatch.setattr(
        pictures, "draw_sheet", lambda strips, **_: drawn.update({s.heading: s.pictures for s in strips})
    )
    _train(tiny_cache, tmp_path / "out", quick("mr-mae", "optim.epochs=2"), panels_every=2)
    cache = open_cache(tiny_cache)
    numbers = cache.numbers[: pictures.PANEL_ROWS]
    views = view_of(cache.hashes.numpy()[numbers], 0, cache.n_views)
    first = ["view", "seen by the student", "reconstruction", "prediction alone"]
    assert list(drawn) == [*first, "teacher a", "a, predicted", "teacher b", "b, predicted", "student"]
    pixels = cache.read_pixels(numbers, views).numpy()
    assert np.array_equal(drawn["view"], pixels)
    hidden = (drawn["seen by the student"] != pixels).any(axis=-1)
    for name in ("reconstruction", "prediction alone"):
        close = np.isclose(drawn[name].astype(int), pixels, atol=1).all(axis=-1)
        assert 0.6 < hidden.mean() <= 0.75 and close[~hidden].mean() > 0.99 > close[hidden].mean()


@pytest.mark.parametrize("name", ["mr-mae-focused", "mr-mae-fused", "mimic-masked"])
def test_other_recipes_train_from_the_cache(tiny_cache: Path, tmp_path: Path, name: str) -> None:
    summary = _train(tiny_cache, tmp_path / "out", quick(name, "optim.epochs=2", "student.fused_blocks=[1, 2]"))
    assert summary["finished"] and all(value == value for value in summary["terms"].values())


# ---- refused before anything is trained


def _refuse(cache: Path, out: Path, recipe: Recipe, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        _train(cache, out, recipe, **options)


def test_another_recipe_in_the_same_out_is_refused_naming_both_values(tiny_cache: Path, whole: Path) -> None:
    _refuse(tiny_cache, whole, quick("mr-mae", "mask.ratio=0.5"), "another recipe: mask.ratio was 0.75 and is now 0.5")
    _refuse(tiny_cache, whole, quick("mae"), "another recipe: name was mr-mae and is now mae")


def test_another_cache_on_resume_is_refused_naming_ids(
    make_cache: Callable[..., Path], tmp_path: Path, whole: Path
) -> None:
    other = make_cache(tmp_path / "other", seed=1)
    _refuse(other, whole, quick(), "another cache: dataset was sha256:.* and is now sha256:")


def test_a_teacher_added_to_the_cache_does_not_break_a_run_that_ignores_it(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    about = {"width": 8, "has_cls": True, "has_attention": True}
    recipe = quick("mr-mae", "optim.epochs=2", "terms.mimic.teachers=[a]")
    _train(make_cache(tmp_path / "one", teachers={"a": about}), tmp_path / "out", recipe)
    two = make_cache(tmp_path / "two", teachers={"a": about, "c": about})
    assert _train(two, tmp_path / "out", recipe)["finished"]


def test_an_unfinished_cache_is_refused(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", n=8, n_views=1, finalise=False)
    _refuse(cache, tmp_path / "out", quick(), "unfinished|not finished")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    _refuse(tmp_path / "absent", tmp_path / "out", quick(), "absent")


def test_a_missing_teacher_or_attention_is_refused_saying_what_there_is(
    make_cache: Callable[..., Path], tiny_cache: Path, tmp_path: Path
) -> None:
    _refuse(
        tiny_cache,
        tmp_path / "out",
        quick("mr-mae", "terms.mimic.teachers=[clip]"),
        "'clip'; the cache has a.pre_tail, b",
    )
    about = {"width": 6, "has_cls": False, "has_attention": False}
    cache = make_cache(tmp_path / "cache", n=8, n_views=1, teachers={"b": about})
    _refuse(cache, tmp_path / "out", quick("mr-mae-focused"), "with attention: none")
    assert not (tmp_path / "out").exists()


def test_a_batch_larger_than_the_cache_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    _refuse(tiny_cache, tmp_path / "out", quick("mr-mae", "optim.batch_size=25"), "25, more than the 24 valid images")
    _refuse(tiny_cache, tmp_path / "out", quick(), "split evenly", accum=3)


def test_a_mask_that_leaves_no_patch_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    _refuse(tiny_cache, tmp_path / "out", quick("mr-mae", "mask.ratio=0.95"), "leaves 0 of 16 patches visible")


def test_an_unknown_student_is_refused_with_the_nearest_names(tiny_cache: Path, tmp_path: Path) -> None:
    _refuse(tiny_cache, tmp_path / "out", quick("mr-mae", "student.model=vit_tiny_patch16_242"), "vit_tiny_patch16_224")


def test_a_warm_up_as_long_as_the_run_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    _refuse(tiny_cache, tmp_path / "out", quick("mr-mae", "optim.warmup_epochs=4"), "warmup_epochs: is 4 in a run of 4")


def test_a_schedule_that_would_rise_to_its_end_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    recipe = quick("mr-mae", "optim.lr_per_256=1.5e-4", "optim.min_lr=1e-5")  # MaskAlign's, at four images
    told = r"optim.min_lr: is 1e-05, above the peak learning rate 2.34e-06 = 0.00015 x 4 / 256; .* --set optim.min_lr=0"
    _refuse(tiny_cache, tmp_path / "out", recipe, told)
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_not_a_run_is_refused_and_left_alone(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("precious")
    _refuse(tiny_cache, tmp_path, quick(), "not a run .*holiday.jpg")
    _refuse(tiny_cache, tiny_cache, quick(), "not a run")
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_an_out_that_cannot_be_written_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _refuse(tiny_cache, tmp_path / "file" / "out", quick(), "out: cannot be written")


def test_two_processes_cannot_train_into_one_out(tiny_cache: Path, tmp_path: Path) -> None:
    with resume.claim_out(tmp_path / "out"):
        _refuse(tiny_cache, tmp_path / "out", quick(), "another process is training into it")


def test_an_unusable_device_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    _refuse(tiny_cache, tmp_path / "out", quick(), "--device banana", device="banana")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_with_the_file_named_and_earlier_checkpoints_whole(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.save

    def full(state: Any, path: Path, **options: Any) -> None:
        if state["step"] == 2 * UPDATES:
            path.symlink_to("/dev/full")
        original(state, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="step-000000012.pt: could not be written"):
            _train(tiny_cache, tmp_path / "out", quick())
    assert _state(tmp_path / "out")["step"] == UPDATES
    assert _train(tiny_cache, tmp_path / "out", quick())["finished"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_a_compiled_run_is_one_graph_for_all_epochs(
    backend: str, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 images, a third of them held out, batches of five: the last images of an epoch, and of those held out, fill no batch."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counting, compile = CompileCounterWithBackend(backend), torch.compile  # type: ignore[no-untyped-call]
    monkeypatch.setattr(loop.torch, "compile", lambda model, **how: compile(model, backend=counting, **how))  # type: ignore[attr-defined]
    recipe = quick("mr-mae", "optim.epochs=3", "optim.batch_size=5")
    done = _train(tiny_cache, tmp_path / "out", recipe, compile=True, hold_out=0.3)
    assert done["finished"] and done["step"] == 9 and "left out" in done["said"]
    assert counting.frame_count == 1, "compiled again"
    assert not torch._dynamo.utils.counters["graph_break"]
    if backend == "inductor":
        plain = _train(tiny_cache, tmp_path / "plain", recipe, hold_out=0.3)
        assert done["loss"] == pytest.approx(plain["loss"], rel=1e-5)
