"""Several processes are one run: same samples, views and masks for any number of them; they stop, skip and fail together."""

import functools
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from training import train_quietly

from mrmae.train import ranks
from mrmae.train import run as runs
from mrmae.train.checkpoint import list_checkpoints, read_checkpoint
from mrmae.train.log import read_rows
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import load_recipe
from mrmae.train.ranks import Ranks

QUICK = (
    "student.model=test_vit_of_3",
    "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
    "optim.epochs=4",
    "optim.batch_size=4",
    "optim.warmup_epochs=1",
    "optim.lr_per_256=0.1",
)
STEPS = 24  # four epochs of six updates
# One rank, in float64. It notes what every update is trained on, does what `event` says at a step, and leaves its error in a file.
RANK = """
import functools, hashlib, json, os, signal, sys, traceback
os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True",
                   "TORCHELASTIC_RESTART_COUNT": "0"})
import torch
torch.set_num_threads(1)
sys.path.append(tests)
import training  # the student
from pathlib import Path
from mrmae.train import loop, ranks, run
from mrmae.train.setup import Cadence, Setup
from mrmae.train.method.recipe import load_recipe
run.build_model = functools.partial(run.build_model, dtype=torch.float64)
step, with_targets = loop.step, loop.with_targets
seen = open(Path(folder) / f"seen-{rank}-of-{size}.jsonl", "a")
at = [0]
def note(loaded, *args, **options):
    batch, masks = whole = with_targets(loaded, *args, **options)
    for i, sample in enumerate(batch.samples.tolist()):
        view = hashlib.sha256(batch.pixels[i].numpy().tobytes()).hexdigest()
        seen.write(json.dumps([at[0], sample, view, masks.ids_keep[i].tolist(), masks.ids_predict[i].tolist()]) + "\\n")
    seen.flush()
    return whole
def eventful(current, live, forward):
    at[0] = current.step
    here = rank == size - 1 and current.step == event_step
    if here and event == "fail":
        raise ValueError("shard 7 is damaged")
    if here and event.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, event))
    if here and event == "nan":
        real = forward
        def forward(batch, masks):
            loss, terms = real(batch, masks)
            return loss * float("nan"), terms
    return step(current, live, forward)
loop.step, loop.with_targets = eventful, note
try:
    probe = options.pop("probe_every", 0)
    setup = Setup(device="cpu", **options)
    cadence = Cadence(panels_every=0, tensorboard=False, page=False, log_every=1, probe_every=probe)
    loop.train(cache, out, load_recipe("mr-mae", recipe), setup, cadence)
except BaseException as error:
    (Path(folder) / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    raise SystemExit(1)
"""


@pytest.fixture
def launch(warm: list[str], tiny_cache: Path, tmp_path: Path) -> Iterator[Callable[..., list[int]]]:
    """`launch(size, out)`: that many ranks, as torchrun sets them up, their store kept by this process; their exit codes."""
    started: list[subprocess.Popen[bytes]] = []

    def run(
        size: int, out: Path, *, event: str = "", event_step: int = -1, more: tuple[str, ...] = (), **options: Any
    ) -> list[int]:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        given = {"size": size, "port": store.port, "folder": str(tmp_path), "cache": str(tiny_cache), "out": str(out),
                 "tests": str(Path(__file__).parents[1]), "recipe": [*QUICK, *more], "options": options, "event": event, "event_step": event_step}  # fmt: skip
        own = [
            subprocess.Popen([*warm, "-c", f"globals().update({given | {'rank': rank}})\n{RANK}"])
            for rank in range(size)
        ]
        started.extend(own)
        end = time.monotonic() + 120
        return [process.wait(max(0.0, end - time.monotonic())) for process in own]

    yield run
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def alone(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, in float64, in this one."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "build_model", functools.partial(build_model, dtype=torch.float64))
        train_quietly(tiny_cache, out, load_recipe("mr-mae", QUICK), log_every=1)
    return out


def _seen(folder: Path, *sizes: int) -> dict[int, list[Any]]:
    """What every update was trained on, over the ranks of runs of these sizes, in a fixed order."""
    updates: dict[int, list[Any]] = {}
    for size in sizes:
        for rank in range(size):
            for line in (folder / f"seen-{rank}-of-{size}.jsonl").read_text().splitlines():
                update, *what = json.loads(line)
                updates.setdefault(update, []).append(what)
    return {update: sorted(what) for update, what in updates.items()}


def _losses(out: Path) -> list[dict[str, float]]:
    return [{**row["terms"], "loss": row["loss"]} for row in read_rows(out / "log.jsonl", "step")]


def _assert_same_losses(out: Path, other: Path) -> None:
    one, two = _losses(out), _losses(other)
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-6)


def test_two_ranks_equal_one_and_a_run_resumed_with_another_number_equals_both(
    launch: Callable[..., list[int]], tmp_path: Path, alone: Path
) -> None:
    assert launch(2, tmp_path / "two") == [0, 0]
    whole = _seen(tmp_path, 2)
    assert sorted(whole) == list(range(STEPS)) and all(len(what) == 4 for what in whole.values())
    for file in tmp_path.glob("seen-*"):
        file.unlink()
    # The last of two ranks is told to stop in the middle of epoch 2: both do, after the same update. They share near shards, which are left out then.
    near = {"local_cache": str(tmp_path / "near"), "local_cache_bytes": "1MB"}
    assert launch(2, tmp_path / "changed", event="SIGUSR1", event_step=8, **near) == [0, 0]
    assert len(list((tmp_path / "near").iterdir())) == 18, "2 views of 3 shards of 2 columns and the pixels, each once"
    assert sorted(_seen(tmp_path, 2)) == list(range(9))
    assert launch(1, tmp_path / "changed") == [0]
    assert _seen(tmp_path, 2, 1) == whole  # samples, views and masks, bit for bit
    for out in ("two", "changed"):
        _assert_same_losses(tmp_path / out, alone)


def test_batch_norms_and_contrast_see_all_ranks_and_the_copy_follows_alike(
    launch: Callable[..., list[int]], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = "terms.ctx={tap: final, positions: pooled, head: predictor, target: ema, distance: 2-2cos}"
    told = "terms.told={tap: final, positions: pooled, target: views, views: both, distance: infonce}"
    more = (followed, told, "prepare.pair=true", "optim.epochs=1", "optim.warmup_epochs=0")
    assert launch(2, tmp_path / "two", more=more) == [0, 0]
    monkeypatch.setattr(runs, "build_model", functools.partial(build_model, dtype=torch.float64))
    train_quietly(tiny_cache, tmp_path / "one", load_recipe("mr-mae", [*QUICK, *more]), log_every=1)
    two, one = (
        read_checkpoint(list_checkpoints(tmp_path / out / "checkpoints")[-1])["model"] for out in ("two", "one")
    )
    assert {"follower.projectors.ctx.1.running_var", "heads.ctx.predictor.1.running_mean"} <= one.keys()
    for name, x in one.items():
        assert (x - two[name]).abs().max() <= 1e-7 * x.abs().max(), name


def test_the_first_update_in_fp32_has_the_same_loss(
    launch: Callable[..., list[int]], tmp_path: Path, alone: Path
) -> None:
    # Two forked ranks in float64 and one process in float32 would differ by rounding alone.
    one = _losses(alone)[0]
    out = tmp_path / "fp32"
    cache = json.loads((alone / "run.json").read_text())["cache"]
    train_quietly(cache, out, load_recipe("mr-mae", [*QUICK, "optim.epochs=2"]), log_every=1)
    assert _losses(out)[0] == pytest.approx(one, rel=1e-6)


def test_a_rank_that_fails_stops_the_others_with_its_error(launch: Callable[..., list[int]], tmp_path: Path) -> None:
    assert launch(2, tmp_path / "out", event="fail", event_step=3) == [1, 1]
    assert (tmp_path / "error-1").read_text() == "ValueError: shard 7 is damaged"
    expected = "OtherRankFailed: rank 0 stopped because rank 1 failed: ValueError: shard 7 is damaged"
    assert (tmp_path / "error-0").read_text() == expected


def test_a_rank_that_is_killed_stops_the_others_saying_so(launch: Callable[..., list[int]], tmp_path: Path) -> None:
    assert launch(2, tmp_path / "out", event="SIGKILL", event_step=3) == [1, -signal.SIGKILL]
    text = (tmp_path / "error-0").read_text()
    assert text.startswith("OtherRankFailed: rank 0 stopped because another process ended without a word")


def test_an_out_that_cannot_be_written_stops_every_rank(launch: Callable[..., list[int]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert launch(2, tmp_path / "file" / "out") == [1, 1]
    assert "out: cannot be written" in (tmp_path / "error-0").read_text()
    assert "rank 1 stopped because rank 0 failed: ValueError" in (tmp_path / "error-1").read_text()


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    launch: Callable[..., list[int]], tmp_path: Path
) -> None:
    assert launch(2, tmp_path / "out", event="nan", event_step=5, hold_out=0.0) == [0, 0]
    assert [row["step"] for row in read_rows(tmp_path / "out" / "log.jsonl", "step") if row["skipped"]] == [6]


def test_ranks_share_out_what_is_held_out(launch: Callable[..., list[int]], tmp_path: Path) -> None:
    for size in (1, 2):
        assert launch(size, tmp_path / str(size), hold_out=0.3, probe_every=2) == [0] * size
    one, two = (read_rows(tmp_path / str(size) / "log.jsonl", "epoch") for size in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-6)
        assert a.get("knn_top1") == b.get("knn_top1")
        assert a.get("rankme", 0) == pytest.approx(b.get("rankme", 0), rel=1e-5)


def test_gradients_live_in_the_buckets_that_are_reduced() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        wrapped = ranks.replicated(model, Ranks(0, 2), torch.device("cpu"))
        wrapped(torch.ones(1, 4)).sum().backward()
        storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    finally:
        ranks.leave_ranks()
    assert len(storages) == 1


def test_a_signal_while_the_ranks_agree_counts_from_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    request = ranks.StopRequest(Ranks(0, 2))

    def nobody_asked_yet(flag: torch.Tensor, _operation: Any) -> None:
        request.received = "SIGUSR1"  # the signal arrives after this rank gave its answer

    monkeypatch.setattr(dist, "all_reduce", nobody_asked_yet)
    assert request.agreed() is None  # the other ranks go on; so must this one
    assert request.agreed() == "SIGUSR1"
