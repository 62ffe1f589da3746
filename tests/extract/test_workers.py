"""Several processes make the cache that one makes, in any number, one after another or at once, killed or not."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from contents import contents_without_records as contents
from processes import elsewhere

from mrmae.extract import run
from mrmae.extract.options import Options, asked
from mrmae.extract.workers import ProcessPart, process_part
from mrmae.shards import claims
from mrmae.shards.cache import open_cache
from mrmae.shards.format.spec import ViewRecipe

VIT, CNN = "vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random"


def test_ranks_share_a_part() -> None:
    assert process_part("", {}) == ProcessPart(0, 1) and process_part("2/3", {}) == ProcessPart(2, 3)
    assert process_part("2/3", {"RANK": "1", "WORLD_SIZE": "4"}) == ProcessPart(2, 3, 1, 4)
    parts = [process_part(f"{i}/3", {"RANK": str(r), "WORLD_SIZE": "2"}) for i in range(3) for r in range(2)]
    assert [p.leads for p in parts] == [True, False] * 3 and [p.first for p in parts] == [True] + [False] * 5
    shards = [7, 1, 4, 19, 10, 13, 16, 2]
    assert parts[2].in_order(shards) == [1, 7, 13, 19, 16, 10, 4], "its own first, then the other rank's from behind"
    assert parts[3].in_order(shards) == [4, 10, 16, 19, 13, 7, 1]
    for text in ("3/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ValueError, match=f"--shards {text}: is no part; expected i/n"):
            process_part(text, {})


def test_ranks_share_the_cores_and_the_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = Options(images=[tmp_path], cache=tmp_path / "c", recipe=ViewRecipe(32), grid=4, device="cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert options.resolved().workers == 1 and options.resolved().device == "cpu"


def test_a_part_and_a_number_of_ranks_are_nothing_a_plan_knows_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that any other continues what one has begun."""
    asked_for = []
    for shards, world in (("", "1"), ("0/2", "1"), ("2/3", "1"), ("", "4")):
        monkeypatch.setenv("WORLD_SIZE", world)
        options = Options(
            images=[], cache=tmp_path, recipe=ViewRecipe(32), grid=4, device="cpu", shards=shards
        ).resolved()
        asked_for.append(asked(options, None, [], ["a", "b"]))
    assert asked_for[1:] == asked_for[:-1]


def test_parts_one_after_another_make_the_same_cache(
    extract: Any, photo_folder: Path, extracted: Path, tmp_path: Path
) -> None:
    """Whichever comes first plans."""
    said: list[str] = []
    options = {"views": 2, "shard_samples": 8, "say": said.append}
    for part in ("2/3", "0/3"):
        assert extract(photo_folder, tmp_path / "c", VIT, CNN, shards=part, **options) == {}
    assert "part 0/3 is committed; when all are, the same command without --shards finishes" in said[-1]
    with pytest.raises(ValueError, match="12 of 18 shards are committed"):
        open_cache(tmp_path / "c")
    extract(photo_folder, tmp_path / "c", VIT, CNN, shards="1/2", **options)  # another number of parts continues
    extract(photo_folder, tmp_path / "c", VIT, CNN, **options)
    assert "nothing was left to do" not in said[-1]
    assert contents(tmp_path / "c") == contents(extracted)


def test_a_rank_does_what_others_leave(
    extract: Any, photo_folder: Path, extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert extract(photo_folder, tmp_path / "c", VIT, CNN, views=2, shard_samples=8) == {}
    monkeypatch.setenv("RANK", "0")
    extract(photo_folder, tmp_path / "c", VIT, CNN, views=2, shard_samples=8, say=said.append)
    assert contents(tmp_path / "c") == contents(extracted)


def test_who_comes_late_goes_by_the_plan_of_those_at_work(
    extract: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is planned again, and nobody waits; images that are no part of the plan are still refused."""
    extract(photo_folder, tmp_path / "c", VIT, shard_samples=8, shards="0/2")
    monkeypatch.setattr(run, "calibrated", lambda *_: pytest.fail("planned again"))
    with elsewhere(claims.shard_lock(tmp_path / "c", 0)), elsewhere(tmp_path / "c/.planning.lock"):
        assert extract(photo_folder, tmp_path / "c", VIT, shard_samples=8, shards="0/2") == {}, "all of it is there"
        assert extract(photo_folder, tmp_path / "c", VIT, shard_samples=8, shards="1/2") == {}
    monkeypatch.undo()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes(b"")
    with elsewhere(claims.shard_lock(tmp_path / "c", 0)), pytest.raises(ValueError, match="20 gone, 1 new"):
        extract(tmp_path / "other", tmp_path / "c", VIT, shard_samples=8, shards="1/2")
    assert extract(photo_folder, tmp_path / "c", VIT, shard_samples=8)["n_valid"] == 20


def command(folder: Path, cache: Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mrmae.extract.cli", str(folder),
            str(cache), "--teacher", VIT, "--teacher", CNN, "--size", "32", "--grid", "4", "--views", "2",
            "--batch-size", "4", "--shard-samples", "8", "--device", "cpu"]  # fmt: skip


def children(parent: int) -> list[int]:
    """Ids of a process's children, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # processes end while one looks
            if entry.name.isdecimal() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


@pytest.mark.soak
def test_torchrun_killed_and_continued_makes_the_same_cache(
    extract: Any, photo_folder: Path, extracted: Path, tmp_path: Path
) -> None:
    """Two real ranks; killed at the first commit, continued by one process."""
    cache = tmp_path / "c"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(photo_folder, cache), env=environment, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(cache.glob("commits/*/*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert list(cache.glob("commits/*/*/*.json")), process.communicate()[0]
    for pid in [*children(process.pid), process.pid]:  # torchrun's workers have sessions of their own
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    extract(photo_folder, cache, VIT, CNN, views=2, shard_samples=8)
    assert contents(cache) == contents(extracted)


@pytest.mark.soak
def test_torchrun_makes_the_same_cache(photo_folder: Path, extracted: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(photo_folder, tmp_path / "c"), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is committed") == 1 and contents(tmp_path / "c") == contents(extracted)
