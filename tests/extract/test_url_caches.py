"""A cache that is extracted to an object store is the one that a folder gets: through lost connections, kills and several workers."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from stores import others_soak

from mrmae.common import backend, leases, uploads
from mrmae.common.backend import files_below, locate, read_bytes
from mrmae.extract import run
from mrmae.extract.inspect.cli import main
from mrmae.shards import claims
from mrmae.shards import commit as commits
from mrmae.shards.cache import open_cache
from mrmae.shards.convert import convert_cache

VIT, CNN = "vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random"


class Killed(BaseException):
    """The end of a process, in this one."""


@pytest.fixture
def bucket(store: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a new bucket."""
    monkeypatch.setattr(uploads, "STORE_WAITS_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("mrmae.extract.workers.POLL_SECONDS", 0.02)
    monkeypatch.setitem(backend.RETRIES, "backoff", {"init_backoff": timedelta(milliseconds=1), "base": 2})
    name = re.sub("[^a-z0-9]+", "-", request.node.name)[-60:].strip("-")
    yield store.bucket(name)
    leases.held.clear()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 10 random images; `more` beside it has 5 others."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(3)
    for i in range(15):
        path = root / ("some" if i < 10 else "more") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8)).resize((40, 36)).save(path)
    return root / "some"


@pytest.fixture(scope="module")
def near(extract: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the images in a folder, shards of 4."""
    path = tmp_path_factory.mktemp("near") / "c"
    extract(images, path, VIT, shard_samples=4)
    return path


def inspect(*words: str | Path) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def expect_equal(url: str, folder: Path) -> None:
    """The objects at the URL are the files of the folder; commit records may tell other times, and which objects they are of."""
    far, here = (
        {f.relative_to(root).as_posix(): read_bytes(f) for f in files_below(root)} for root in (locate(url), folder)
    )
    far, here = ({name: content for name, content in found.items() if name != ".digests"} for found in (far, here))
    assert sorted(far) == sorted(here)
    assert not [name for name in here if far[name] != here[name] and not name.startswith(("commits/", "stats/"))]
    assert open_cache(url).manifest == open_cache(folder).manifest


def kill_at(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int) -> None:
    """As a SIGKILL at the so-many-th call of a function does: nothing is cleaned up, and no claim is given back or renewed."""
    real, calls = getattr(where, name), iter(range(1, 1000))

    def killed(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            for lease in leases.held.values():
                lease.lost = True
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(where, name, killed)


@pytest.mark.parametrize(
    "where, name, call",
    [
        (commits, "commit", 3),
        pytest.param(uploads, "expect_size", 12, marks=pytest.mark.soak),
        pytest.param(commits, "manifest_body", 1, marks=pytest.mark.soak),
    ],
    ids=["before-commit", "while-uploading", "finishing"],
)
def test_a_killed_extraction_to_a_url_is_continued(
    store: Any, bucket: str, extract: Any, images: Path, near: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int
) -> None:  # fmt: skip
    url = f"{bucket}/some/c"
    with monkeypatch.context() as patched:
        patched.setattr(leases, "LEASE_SECONDS", 0.5)  # of the one that is killed; it says so, and others go by that
        kill_at(patched, where, name, call)
        with pytest.raises(Killed):
            extract(images, url, VIT, shard_samples=4)
    leases.held.clear()
    with pytest.raises(ValueError, match="this cache is unfinished"):
        open_cache(url)
    store.proxy.cuts, store.proxy.refusals = 2, 2
    extract(images, url, VIT, shard_samples=4)
    time.sleep(0.5)
    claims.remove_locks(locate(url))  # of the dead, who are known to be by now
    expect_equal(url, near)


@others_soak
def test_two_workers_share_an_extraction_to_a_url(
    bucket: str, extract: Any, images: Path, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_at_a_time, build, url, ended = threading.Lock(), run.asked_teachers, f"{bucket}/c", []

    def asked_teachers(*arguments: Any) -> Any:
        with one_at_a_time:  # random weights are of the process's seed
            return build(*arguments)

    monkeypatch.setattr(run, "asked_teachers", asked_teachers)
    work = [threading.Thread(target=lambda: ended.append(extract(images, url, VIT, shard_samples=4))) for _ in range(2)]
    for one in work:
        one.start()
    for one in work:
        one.join(60)
    assert len(ended) == 2 and ended[0] == ended[1]
    expect_equal(url, near)


@pytest.mark.soak
def test_a_part_of_an_extraction_to_a_url_and_the_rest(bucket: str, extract: Any, images: Path, near: Path) -> None:
    url = f"{bucket}/c"
    assert extract(images, url, VIT, shard_samples=4, shards="0/2") == {}
    told = inspect("verify", url)
    assert told.exit_code == 1 and "the cache is unfinished, 4 of 6 shards are committed" in told.output
    extract(images, url, VIT)
    expect_equal(url, near)


@pytest.mark.soak
def test_a_cache_at_a_url_is_repaired_grown_and_reduced(
    store: Any, bucket: str, extract: Any, images: Path, tmp_path: Path
) -> None:
    url, folder = f"{bucket}/c", tmp_path / "c"
    for place in (url, folder):
        extract(images, place, VIT, shard_samples=8)
    name = "views/0/vit.pre_tail.zarr/tokens/c/0/0/0"
    store.put(f"{url}/{name}", b"?" * len((folder / name).read_bytes()))
    assert name in inspect("verify", url, "--full").output
    repaired = inspect("repair", url, "--yes", "--run")
    assert repaired.exit_code == 0 and f"{url} --teacher" in repaired.output, repaired.output
    expect_equal(url, folder)
    for place in (url, folder):
        extract(images, place, VIT, CNN, views=2)
        assert inspect("stats", place).exit_code == 0
        dropped = inspect("drop", place, "vit", "--yes")
        assert dropped.exit_code == 0 and "it holds cnn.last" in dropped.output, dropped.output
    expect_equal(url, folder)
    assert inspect("verify", url, "--full").exit_code == 0


@pytest.mark.soak
def test_images_are_appended_to_a_cache_at_a_url(bucket: str, extract: Any, images: Path, tmp_path: Path) -> None:
    url, folder = f"{bucket}/c", tmp_path / "c"
    for place in (url, folder):
        extract(images, place, VIT, shard_samples=8)
        extract(images.parent / "more", place, VIT, append=True)
    expect_equal(url, folder)


def test_an_object_that_another_writer_overwrote_is_not_committed(
    store: Any, bucket: str, make_cache: Any, tmp_path: Path
) -> None:
    """A record tells which objects it is of: one of the same size and name is not enough, one with the same bytes is."""
    folder = make_cache(tmp_path / "c", n=8, n_views=1)
    opened, url = open_cache(folder), locate(f"{bucket}/c")
    convert_cache(opened, url, opened.plan, about={}, progress=lambda n: None)
    unit = (0, "a.pre_tail", 0)
    assert commits.valid_record(url, opened.plan, *unit) is not None and not commits.missing(url, opened.plan)
    name = "views/0/a.pre_tail.zarr/norm/c/0/0"
    content = (folder / name).read_bytes()
    store.put(url / name, content[:-1] + bytes([content[-1] ^ 1]))
    assert commits.valid_record(url, opened.plan, *unit) is None and commits.missing(url, opened.plan) == [unit]
    assert "norm/c/0/0 (shard 0 of a.pre_tail, view 0): its sha256 is not" in inspect("verify", url, "--full").output
    store.put(url / name, content)
    assert commits.valid_record(url, opened.plan, *unit) is not None
    dropped = inspect("drop", url, "b", "--yes")
    assert dropped.exit_code == 0 and not files_below(url / "views/0/b.pre_tail.zarr"), dropped.output
    assert inspect("verify", url, "--full").exit_code == 0


def test_a_cache_is_not_begun_where_nothing_can_be_written(
    store: Any, bucket: str, extract: Any, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(backend.Unreachable, match="://no-bucket.*is the URL right"):
        extract(images, f"{store.scheme}://no-bucket/c", VIT)
    store.proxy.refusals, store.proxy.refusal = 10**9, b"403 Forbidden"
    with pytest.raises(backend.Unreachable, match="the credentials in the environment may not read this"):
        extract(images, f"{bucket}/c", VIT)
    store.proxy.refusals, store.proxy.refusal = 0, b"503 Slow Down"
    store.deafen(monkeypatch)
    with pytest.raises(ValueError, match="accepted a second write over an object"):
        extract(images, f"{bucket}/c", VIT)
    assert not [file for file in files_below(locate(bucket)) if not file.match(".probe.*.writing")]
    store.put(f"{bucket}/c/holiday.txt", b"1")
    with pytest.raises(ValueError, match="this folder is no cache .* and holds 'holiday.txt'"):
        extract(images, f"{bucket}/c", VIT)


def test_who_was_taken_over_is_told_so_though_the_shard_is_written_by_now(
    store: Any, bucket: str, make_cache: Any, tmp_path: Path
) -> None:
    """Also where a store tells its objects from the same bytes of whoever took over."""
    folder = make_cache(tmp_path / "c", n=8, n_views=1)
    opened, url = open_cache(folder), locate(f"{bucket}/c")
    lease = leases.take_lease(url / "x.lock", url, "one")  # type: ignore[arg-type]
    assert lease

    def another_writes() -> Any:
        store.upload(folder, bucket.removeprefix(f"{store.scheme}://"), "c")
        lease.lost = True
        raise FileExistsError

    with pytest.raises(leases.LeaseLost, match="another process has taken this over"):
        commits.store(url, opened.plan, (0, "a.pre_tail", 0), None, another_writes)
    assert commits.valid_record(url, opened.plan, 0, "a.pre_tail", 0) is not None


@pytest.mark.soak
def test_workers_that_are_killed_beside_others_leave_the_cache_of_a_folder(
    store: Any, bucket: str, images: Path, near: Path, tmp_path: Path
) -> None:
    """Processes of the command itself: the first stops itself between a shard's files and its record, or while it plans, and is killed by SIGKILL
    then; two others finish, and one whose claims were taken over while it was stopped ends with a line that says so."""
    url, script = f"{bucket}/c", tmp_path / "worker.py"
    script.write_text(f"""
import os, signal, sys, torch
from mrmae.common import leases
from mrmae.extract import run
from mrmae.extract.cli import main
from mrmae.shards import commit
leases.LEASE_SECONDS = 4.0
torch.set_num_threads(1)
where, calls = sys.argv.pop(1), iter(range(100))
def stopping(owner, name, call):
    real = getattr(owner, name)
    def stopped(*arguments, **named):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*arguments, **named)
    setattr(owner, name, stopped)
if where == "commit":
    stopping(commit, "commit", 3)
if where == "plan":
    stopping(run, "calibrated", 0)
main([{str(images)!r}, {url!r}, "--teacher", {VIT!r}, "--size", "32", "--grid", "4", "--batch-size", "4", "--device", "cpu",
      "--workers", "2", "--shard-samples", "4"])
""")  # fmt: skip

    def started(where: str) -> subprocess.Popen[str]:
        words = [sys.executable, str(script), where]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def stopped(process: subprocess.Popen[str]) -> bool:
        return (
            process.poll() is not None
            or Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        )

    planner, asleep = started("plan"), None
    try:
        assert waited_for(lambda: stopped(planner)) and planner.poll() is None
        asleep = started(
            "commit"
        )  # waits for the planner's lease to run out, plans, and stops before its fourth record
        time.sleep(1)
        planner.kill()
        assert waited_for(lambda: stopped(asleep)) and asleep.poll() is None, asleep.communicate()
        others = [started("nowhere"), started("nowhere")]
        told = [process.communicate(timeout=120)[0] for process in others]
        assert [process.returncode for process in others] == [0, 0], told
        assert any("has not renewed its claim" in text for text in told)
        asleep.send_signal(signal.SIGCONT)
        text = asleep.communicate(timeout=60)[0]
        assert asleep.returncode == 1 and "another process has taken this over" in text, text
    finally:
        for process in (planner, asleep):
            if process is not None:
                process.kill()
                process.communicate()
    assert waited_for(
        lambda: not (claims.living_shares(locate(url) / claims.CACHE_LOCK) or files_below(locate(url) / ".lock.shared"))
    )  # type: ignore[arg-type]
    assert inspect("verify", url, "--full").exit_code == 0
    expect_equal(url, near)


def waited_for(ready: Any, seconds: float = 90) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not (found := ready()) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(found)


def test_a_user_without_a_home_is_told_what_to_set(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match="no home folder.*set XDG_CACHE_HOME"):
        run.of_this_machine(run.Options(images=["images"], cache=locate(f"{bucket}/c")), run.DIGESTS)
