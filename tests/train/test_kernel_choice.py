"""A run settles who computes its kernels: as asked, as it began, as remembered, or measured; all of it without a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import train_quietly

from mrmae.kernels.choose import Choice
from mrmae.train import checkpoint, kernel_choice
from mrmae.train import run as runs
from mrmae.train.method import load_recipe
from mrmae.train.ranks import Ranks
from mrmae.train.setup import Setup

QUICK = (
    "student.model=test_vit",
    "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
    "optim.epochs=1",
    "optim.batch_size=12",
    "optim.warmup_epochs=0",
)
TORCH = dict.fromkeys(kernel_choice.KERNELS, "torch")
MEASURED = Choice(
    "GPU A", TORCH | {"pixel_loss": "triton"}, dict.fromkeys(kernel_choice.KERNELS, "1 ms against 2 eager")
)


def a_run(cache: Path, **options: Any) -> runs.Run:
    return runs.build_run(cache, Path("out"), load_recipe("mr-mae", QUICK), Ranks(), Setup("cpu", **options))


def on_gpu(asked: str = "auto", began: Choice | None = None, rank: int = 0) -> Any:
    """The part of a run on a GPU that is looked at before anything is measured."""
    return SimpleNamespace(
        setup=Setup(kernels=asked),
        choice=began,
        device=torch.device("cuda:0"),
        notes=[],
        finished=False,
        ranks=Ranks(rank, 1 + rank),
        model=SimpleNamespace(kernels=asked),
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU called `GPU A` on which measuring finds `MEASURED`; the list holds what was measured."""
    asked: list[Any] = []
    monkeypatch.setattr(kernel_choice, "device_name", lambda _: "GPU A")
    monkeypatch.setattr(kernel_choice, "TRITON_INSTALLED", True)
    monkeypatch.setattr(kernel_choice, "measured_or_remembered", lambda run, name, **how: asked.append(run) or MEASURED)
    return asked


def test_a_new_run_is_measured_and_what_is_asked_for_is_taken(gpu: list[Any]) -> None:
    run = on_gpu()
    kernel_choice.settle_kernels(run, warn=pytest.fail)
    assert run.model.kernels == MEASURED.chosen and gpu == [run]
    for asked in ("triton", "torch"):
        forced = on_gpu(asked, began=MEASURED)
        kernel_choice.settle_kernels(forced, warn=pytest.fail)
        assert forced.model.kernels == asked and set(forced.choice.chosen.values()) == {asked}
        assert kernel_choice.choice_words(forced.choice) == f"{asked} (--kernels {asked})"
    assert gpu == [run]


def test_a_continued_run_keeps_its_kernels_unless_the_device_is_another(gpu: list[Any]) -> None:
    same = on_gpu(began=kernel_choice.choice_of_state(kernel_choice.state_of_choice(MEASURED), torch.device("cpu")))
    kernel_choice.settle_kernels(same, warn=pytest.fail)
    assert same.model.kernels == MEASURED.chosen and not gpu and not same.notes
    assert kernel_choice.choice_words(same.choice) == "torch, triton (as this run began)"
    other = on_gpu(began=Choice("GPU B", TORCH))
    kernel_choice.settle_kernels(other, warn=pytest.fail)
    assert other.model.kernels == MEASURED.chosen and gpu == [other]
    assert other.notes[0].startswith("kernels: this run began on GPU B and goes on on GPU A")
    old = on_gpu(began=kernel_choice.choice_of_state(None, torch.device("cuda:0")))
    kernel_choice.settle_kernels(old, warn=pytest.fail)
    assert old.model.kernels == TORCH and gpu == [other], "before there was a choice the reference computed"
    done = on_gpu(began=Choice("GPU B", TORCH))
    done.finished = True
    kernel_choice.settle_kernels(done, warn=pytest.fail)
    assert gpu == [other] and not done.notes, "nothing is left to train"


def test_every_rank_takes_what_rank_0_decides(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(kernel_choice, "agree_on", lambda value, ranks: sent.append(value) or MEASURED)
    run = on_gpu(rank=1)
    kernel_choice.settle_kernels(run, warn=pytest.fail)
    assert sent == [None] and not gpu and run.model.kernels == MEASURED.chosen


def test_without_triton_the_reference_computes(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "TRITON_INSTALLED", False)
    run = on_gpu()
    kernel_choice.settle_kernels(run, warn=pytest.fail)
    assert run.model.kernels == TORCH and not gpu
    assert kernel_choice.choice_words(run.choice) == "torch (triton is not installed)"


def test_the_calls_of_a_run_are_found_without_changing_it(tiny_cache: Path) -> None:
    run = a_run(tiny_cache)
    before, random = {k: v.clone() for k, v in run.model.state_dict().items()}, torch.random.get_rng_state()
    calls = kernel_choice.calls_of(run)
    assert [c["function"] for c in calls] == ["gather_patches", "embed_tokens", *2 * ["mimic_loss"], "pixel_loss"]
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random) and run.model.training and run.model.kernels == "auto"
    image, pred, ids = calls[-1]["tensors"]
    l, patch = run.info.n_patches, run.info.patch
    assert (image["dtype"], image["shape"]) == ("uint8", [12, run.info.size, run.info.size, 3])
    assert (pred["shape"], pred["grad"]) == ([12, run.model.n_predict, 3 * patch**2], True) and ids["most"] < l
    assert kernel_choice.calls_of(run) == calls, "the same batch asks for the same"


def test_what_was_measured_is_remembered_by_device_versions_and_shapes(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, bool]] = []

    def measure(calls: Any, device: str, *, compiled: bool, name: str) -> Choice:
        measured.append((name, compiled))
        return MEASURED

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "tried_on", measure)
    run = a_run(tiny_cache)

    def settle(name: str = "GPU A", keep: bool = True, warn: Any = pytest.fail, run: runs.Run = run) -> Choice:
        return kernel_choice.measured_or_remembered(run, name, warn=warn, keep=keep)

    assert settle(keep=False) == MEASURED and not list(tmp_path.iterdir()), "a dry run writes nothing"
    assert settle() == MEASURED and len(measured) == 2
    again = settle()
    assert again.chosen == MEASURED.chosen and len(measured) == 2
    assert "pixel_loss triton (1 ms against 2 eager (remembered))" in kernel_choice.choice_words(again)
    settle("GPU B")
    settle(run=a_run(tiny_cache, compile=True))
    assert measured == [("GPU A", False), ("GPU A", False), ("GPU B", False), ("GPU A", True)]
    assert len(list((tmp_path / "mrmae/kernels").iterdir())) == 3
    path = next((tmp_path / "mrmae/kernels").iterdir())
    about = json.loads(path.read_text())["about"]
    for damaged in (b"{", b"\xff\xfe", b"[]", json.dumps({"format": kernel_choice.FORMAT, "about": about}).encode()):
        said: list[str] = []
        path.write_bytes(damaged)
        assert kernel_choice.kept_choice(path, about, said.append) is None
        assert len(said) == 1 and said[0].startswith(f"{path}: ") and "measured again" in said[0]
    kernel_choice.keep_choice(path, about, MEASURED, pytest.fail)
    said = []
    assert kernel_choice.kept_choice(path, about | {"torch": "another"}, said.append) is None and len(said) == 1
    foreign = json.loads(path.read_text())
    foreign["choice"]["chosen"]["pixel_loss"] = "cuda"
    path.write_text(json.dumps(foreign))
    assert kernel_choice.kept_choice(path, about, said.append) is None and "other words" in said[1]


def test_a_user_without_a_home_has_kernels_measured_every_time(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(kernel_choice, "tried_on", lambda *_, **__: MEASURED)
    assert kernel_choice.measured_or_remembered(a_run(tiny_cache), "GPU A", warn=pytest.fail, keep=True) == MEASURED


def test_what_went_wrong_is_said_and_not_remembered(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Choice("GPU A", TORCH, {k: "no answer within 120 s" for k in TORCH}, ("pixel_loss",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "tried_on", lambda *_, **__: wrong)
    run, said = a_run(tiny_cache), []  # type: ignore[var-annotated]
    for _ in range(2):
        assert kernel_choice.measured_or_remembered(run, "GPU A", warn=said.append, keep=True) == wrong
    line = "kernels: pixel_loss is not right on GPU A: no answer within 120 s; the reference computes it"
    assert said == [line, line] and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    kernel_choice.keep_choice(tmp_path / "file" / "x.json", {}, MEASURED, said.append)
    assert len(said) == 1 and "cannot be written" in said[0]


def test_checkpoint_and_run_json_say_who_computed(tiny_cache: Path, tmp_path: Path) -> None:
    train_quietly(tiny_cache, tmp_path / "out", load_recipe("mr-mae", QUICK))
    (path,) = checkpoint.list_checkpoints(tmp_path / "out/checkpoints")
    assert checkpoint.read_checkpoint(path)["kernels"] == {"device": "cpu", "chosen": TORCH}
    (start,) = json.loads((tmp_path / "out/run.json").read_text())["starts"]
    assert start["kernels_chosen"]["why"] == {"all": "no CUDA device"} and start["kernels"] == "auto"
