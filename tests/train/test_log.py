"""Logs read as one run, are valid JSON whatever the loss was, and lines say what they should."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mrmae.train import log


def _row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step", "epoch": 1, "epochs": 2, "step": step, "loss": 2.0, "terms": {"pixels": 1.0, "mimic/clip": 1.0},
        "images_per_s": 123.4, "stall": 0.012, "lr": 1e-4, "eta_s": 200.0, "skipped": 0, **more,
    }  # fmt: skip


def _quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def _log(out: Path, step: int, tensorboard: bool = False) -> log.RunLog:
    return log.RunLog(out, step=step, total=10, console=_quiet(), tensorboard=tensorboard)


def test_rows_written_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    first = _log(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(_row(step))
    first.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "step", "ste')  # cut by a kill
    second = _log(tmp_path, 2)
    second.write(_row(3, loss=5.0))
    second.close()
    rows = log.read_rows(tmp_path / "log.jsonl", "step")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.0), (2, 2.0), (3, 5.0)]


def test_a_loss_that_is_not_finite_is_null_in_valid_json(tmp_path: Path) -> None:
    run = _log(tmp_path, 0)
    run.write(_row(1, loss=math.nan, terms={"pixels": math.inf}))
    run.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] is None and row["terms"] == {"pixels": None}


def test_the_line_of_an_epoch_says_what_is_explained_beyond_a_prediction_without_an_image() -> None:
    row = _row(3, explained={"position": {"mimic/clip": 0.1234, "mimic/dino": -0.05}, "patch_mean": {"pixels": None}})
    assert "explained beyond position mimic/clip 12.3 %, mimic/dino -5.0 %" in log.epoch_line(row)
    assert "explained beyond patch mean pixels nan" in log.epoch_line(row)
    assert "explained" not in log.epoch_line(_row(3))


def test_tensorboard_gets_every_term(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = _log(tmp_path, 0, tensorboard=True)
    run.write(_row(1))
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"step/loss", "step/loss/pixels", "step/loss/mimic/clip", "step/lr"} <= set(events.Tags()["scalars"])
    assert events.Scalars("step/loss/pixels")[0].value == 1.0


def test_held_out_losses_reach_the_boards_and_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Board:
        """What stands in for wandb."""

        def init(self, **how: Any) -> "Board":
            calls.append(how)
            return self

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Board())
    row = _row(3, kind="epoch", held_out={"loss": 2.5, "pixels": 1.5}, knn_top1=0.25, resumed=[2],
               knn={"k": 20, "bank": 1800, "queries": 200}, rankme=31.25, rank={"images": 1800, "channels": 192})  # fmt: skip
    for _ in range(2):
        with log.RunLog(tmp_path, step=0, total=10, console=_quiet(), tensorboard=False, wandb="project") as run:
            run.write(row)
    first, written, end, again, *_ = calls
    assert first["project"] == "project" and first["id"] == again["id"] and end == "finished"
    assert written[0] == 3 and written[1]["epoch/held_out/pixels"] == 1.5 and written[1]["epoch/knn_top1"] == 0.25
    assert written[1]["epoch/rankme"] == 31.25
    assert written[1]["epoch/resumed_after_update"] == 2.0
    assert log.epoch_line(row) == (
        "epoch 1/2 done  mean loss 2.0000 (pixels 1.0000, mimic/clip 1.0000)  held out 2.5000 (pixels 1.5000)"
        "  20-NN top-1 25.0 % of 200 images held out, by the labels of 1,800 trained on  RankMe 31.2 of at most 192 on 1,800 images trained on"
        "  (continued after update 2)"
    )


def test_wandb_that_is_not_installed_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--wandb project: .* pip install 'mrmae\[wandb\]'"):
        log.RunLog(tmp_path, step=0, total=10, console=_quiet(), tensorboard=False, wandb="project")


class BrokenBoard:
    """What stands in for wandb, or for a TensorBoard writer, and fails at `broken` and all that follows it."""

    def __init__(self, broken: str) -> None:
        self._works = ("init", "log", "add_scalar")[: ("init", "log", "finish").index(broken)]

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> "BrokenBoard":
            if name not in self._works:
                raise OSError(28, f"{name} failed")
            return self

        return call


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_board_that_fails_is_one_warning_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def board(*_: Any) -> Any:
        return BrokenBoard(broken).init()

    monkeypatch.setitem(sys.modules, "wandb", BrokenBoard(broken))
    monkeypatch.setattr(log, "_board", board)
    console = _quiet()
    with log.RunLog(tmp_path, step=0, total=10, console=console, tensorboard=True, wandb="project") as run:
        for step in (1, 2):
            run.write(_row(step))
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sorted(line.split(":")[0] for line in said) == ["WARNING TensorBoard", "WARNING Weights & Biases"]
    assert [row["step"] for row in log.read_rows(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_is_named_and_closes(tmp_path: Path) -> None:
    run = _log(tmp_path, 0)
    run._file = open("/dev/full", "a")
    with pytest.raises(OSError, match="log.jsonl: could not be written: No space left"), run:
        run.write(_row(1))


def test_progress_line_says_where_how_fast_and_how_long() -> None:
    line = log.progress_line(_row(1, skipped=2))
    for part in (
        "epoch 1/2 update 1  loss 2.0000 (pixels 1.0000, mimic/clip 1.0000)",
        "123.4 img/s",
        "stall 1.2 %",
        "lr 1.00e-04",
    ):
        assert part in line
    assert "2 skipped" in line and "ETA 3 min 20 s" in line


def test_the_line_of_an_epoch_that_was_continued_says_after_which_updates() -> None:
    line = log.epoch_line(_row(12, kind="epoch", resumed=[3, 10]))
    assert line.endswith("mean loss 2.0000 (pixels 1.0000, mimic/clip 1.0000)  (continued after update 3, 10)")


def test_plain_lines_are_rationed_and_the_last_one_always_comes(tmp_path: Path) -> None:
    console = _quiet()
    run = log.RunLog(tmp_path, step=0, total=10, console=console, tensorboard=False)
    for step in range(5):
        run.show(_row(step))
    run.show(_row(5), always=True)
    run.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("epoch 1/2") == 2


def test_epoch_lines_are_rationed_but_for_the_last_and_those_with_images_held_out(tmp_path: Path) -> None:
    console = _quiet()
    run = log.RunLog(tmp_path, step=0, total=10, console=console, tensorboard=False)
    for epoch, more in enumerate(({}, {}, {"held_out": {"loss": 3.0}}, {}, {}), start=1):
        run.show_epoch(_row(epoch, kind="epoch", **{**more, "epoch": epoch, "epochs": 5}))
    run.close()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[1] for line in lines] == ["1/5", "3/5", "5/5"]


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    run = log.RunLog(tmp_path, step=0, total=10, console=console, tensorboard=False)
    run.show(_row(7))
    run.say("saved")
    run.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "7/10" in text and "saved" in text


@pytest.mark.parametrize(
    "seconds, text", [(4.6, "5 s"), (200, "3 min 20 s"), (18_120, "5 h 02 min"), (183_600, "2 d 03 h"), (math.inf, "?")]
)
def test_times_read_as_people_say_them(seconds: float, text: str) -> None:
    assert f"ETA {text}" in log.progress_line(_row(1, eta_s=seconds))


def test_readback_returns_vectors_in_order() -> None:
    back = log.Readback()
    values = torch.tensor([1.0, 2.0])
    back.push(1, values)
    values += 1  # the vector may be reused by the next step
    back.push(2, values)
    assert back.ready() == [(1, [1.0, 2.0]), (2, [2.0, 3.0])]
    assert back.ready(wait=True) == []


def test_means_leave_skipped_steps_out_and_survive_a_checkpoint() -> None:
    sums = log.Sums()
    sums.add({"loss": 1.0}, skipped=False)
    sums.add({"loss": math.nan}, skipped=True)
    sums = log.Sums(**sums.state())
    sums.add({"loss": 3.0}, skipped=False)
    assert sums.means() == {"loss": 2.0} and (sums.n, sums.skipped) == (2, 1)
    assert math.isnan(log.Sums().means()["loss"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_readback_does_not_wait_for_the_device() -> None:
    back = log.Readback()
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]
    back.push(1, torch.ones(2, device="cuda"))
    assert back.ready() == []
    assert back.ready(wait=True) == [(1, [1.0, 1.0])]
