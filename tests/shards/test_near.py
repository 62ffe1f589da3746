"""Whole shards kept near: the bytes of the cache, fetched once, within a bound, whatever happens to the copies, the disk or the store."""

import errno
import functools
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import ends, forked, wait_until

from mrmae.shards import claims, near
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import PIXELS, units
from mrmae.shards.near import NearFolder, bytes_below

PLENTY = 1 << 30
COLUMN = "a.pre_tail"


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are fetched from now on, in this process."""
    found: list[str] = []
    real = near.file_pieces

    def noted(path: Path) -> Iterator[bytes]:
        found.append("/".join(path.parts[path.parts.index("views") :]))
        yield from real(path)

    monkeypatch.setattr(near, "file_pieces", noted)
    return found


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "said", set())


def opened(path: Path | str, folder: Path, most_bytes: int = PLENTY, **options: Any) -> Cache:
    return open_cache(path, near=NearFolder(folder, most_bytes), threads=2, **options)


def content(cache: Cache, shards: slice = slice(None)) -> list[bytes]:
    """All that there is of some shards, as bytes."""
    numbers = cache.numbers.reshape(-1, cache.shard_samples)[shards].ravel()
    found = []
    for view in range(cache.n_views):
        where = numbers, np.full(len(numbers), view)
        found += [t.numpy().tobytes() for c, about in cache.columns.items() for t in cache.read_column(c, *where, tuple(about.layout.arrays())).values()]  # fmt: skip
        found.append(cache.read_pixels(*where).numpy().tobytes())
    return found


def kept(folder: Path) -> list[str]:
    """Names of all units that lie there."""
    return [entry.name for entry in folder.iterdir() if near.UNIT_NAME.fullmatch(entry.name)]


def strange(folder: Path) -> list[str]:
    """What lies there beside units."""
    return [entry.name for entry in folder.iterdir() if not near.UNIT_NAME.fullmatch(entry.name)]


def held(file: Path) -> claims.Claim:
    """A lock that is not free, as if another process held it."""
    claim = claims.take(file)
    assert claim is not None
    return claim


def copied(cache: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(cache, tmp_path / "c"))


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_each_file_is_fetched_once_and_found_by_the_next_run(
    make_cache: Callable[..., Path], tmp_path: Path, fetches: list[str], format: str
) -> None:
    path = make_cache(tmp_path / "c", format=format, n=8, shard_samples=4, n_views=1)
    expected = content(open_cache(path))
    first = opened(path, tmp_path / "near")
    assert content(first) == content(first) == expected
    assert len(fetches) == len(set(fetches)) and first.local is not None
    assert first.local.fetched == len(kept(tmp_path / "near")) == len(list(units(first.plan)))
    assert first.local.fetched_bytes == bytes_below(str(tmp_path / "near")), "locks are gone, or empty"
    fetches.clear()
    shutil.rmtree(path / "views")
    later = opened(path, tmp_path / "near", files=False)
    assert content(later) == content(pickle.loads(pickle.dumps(later.narrowed(None, None)))) == expected
    assert not fetches and not strange(tmp_path / "near")
    assert later.read_crop(3, 0) == later[3].views[0]["view"]


def test_the_table_of_samples_at_a_url_is_fetched_once_and_shared(
    s3: Any, make_cache: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = make_cache(tmp_path / "c", n=24, shard_samples=12, n_views=1, teachers={})
    url, size = s3.upload(there, "near-table"), (there / "samples.arrow").stat().st_size

    def bytes_of(work: Callable[[], Cache]) -> tuple[int, Cache]:
        before = s3.proxy.answer_bytes
        cache = work()
        return s3.proxy.answer_bytes - before, cache

    alone, far = bytes_of(lambda: open_cache(url))
    first, cache = bytes_of(lambda: opened(url, tmp_path / "near"))
    later, again = bytes_of(lambda: opened(url, tmp_path / "near"))
    ask = 1000  # what the store says of the object
    assert size > 4 * ask and alone < first < alone + ask and later < alone - size + ask, (alone, first, later, size)
    (copy,) = (tmp_path / "near").glob("*/samples.arrow")
    assert again.keys.file == cache.keys.file == copy and again.keys == far.keys and again.labels == far.labels
    taken, loaded = bytes_of(lambda: pickle.loads(pickle.dumps(again)))
    assert not taken and loaded.keys == far.keys and loaded.keys.file == copy, "a loader's process maps it, too"
    data = bytearray(copy.read_bytes())
    data[data.index(far.keys[3].encode())] ^= 1
    copy.write_bytes(data)
    assert opened(url, tmp_path / "near").keys == far.keys
    assert "damaged: its rows are not those of the manifest" in capsys.readouterr().err and not copy.exists()
    assert opened(url, tmp_path / "near").keys == far.keys and copy.exists()
    message = pickle.dumps(opened(url, tmp_path / "near"))
    near.remove_unit(tmp_path / "near", copy.parent.name)
    assert pickle.loads(message).keys == far.keys, "one that had to make room is read from afar"
    assert opened(url, tmp_path / "near", size - 1).keys == far.keys and not copy.exists()
    assert "samples.arrow has" in capsys.readouterr().err


def test_two_processes_at_once_fetch_each_file_once(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real = content(open_cache(tiny_cache)), near.file_pieces
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def slow(path: Path) -> Iterator[bytes]:
        os.write(log, f"{path}\n".encode())
        time.sleep(0.005)  # the other process comes meanwhile
        yield from real(path)

    monkeypatch.setattr(near, "file_pieces", slow)

    def read() -> None:
        assert content(opened(tiny_cache, tmp_path / "near")) == expected

    assert ends([forked(read), forked(read)]) == [0, 0]
    fetched = (tmp_path / "log").read_text().splitlines()
    cache = open_cache(tiny_cache)
    assert len(fetched) == len(set(fetched)) and len(kept(tmp_path / "near")) == len(list(units(cache.plan)))


def test_what_a_killed_process_left_is_removed_and_fetched_anew(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real, folder = content(open_cache(tiny_cache)), near.file_pieces, tmp_path / "near"

    def killed(path: Path) -> Iterator[bytes]:
        if path.suffix == ".tar" or "scale" in path.parts:
            yield next(iter(real(path)))[:100]
            os.kill(os.getpid(), signal.SIGKILL)
        yield from real(path)

    with monkeypatch.context() as patched:
        patched.setattr(near, "file_pieces", killed)
        pid = forked(lambda: content(opened(tiny_cache, folder)))
        assert ends([pid]) == [-signal.SIGKILL]
    left = [name for name in strange(folder) if near.FETCHED.fullmatch(name)]
    assert left and not kept(folder), "nothing is there under its name before it is whole"
    (folder / f".{'0' * 64}.1-0.gone").mkdir()
    mine = folder / "notes.txt"
    mine.write_text("not ours")
    cache = opened(tiny_cache, folder)
    assert strange(folder) == ["notes.txt"], "removed when a run begins"
    assert content(cache) == expected and mine.read_text() == "not ours"


def test_the_least_recently_used_go_and_the_bound_is_kept(
    tiny_cache: Path, tmp_path: Path, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    far, folder = open_cache(tiny_cache), tmp_path / "near"
    whole = opened(tiny_cache, tmp_path / "all")
    assert whole.local is not None
    of_shard = [
        sum(whole.local.promised(unit).bytes for unit in units(whole.plan) if unit[2] == shard) for shard in range(3)
    ]  # type: ignore[union-attr]
    bound = max(of_shard[0] + of_shard[1], of_shard[0] + of_shard[2]) + 100
    assert sum(of_shard) > bound
    monkeypatch.setattr(near, "TOUCH_SECONDS", 0.0)
    real, most = near.NearShards.reserve, [0]

    def watched(self: Any, *given: Any) -> bool:
        done = real(self, *given)
        most[0] = max(most[0], bytes_below(str(folder)))
        return done

    monkeypatch.setattr(near.NearShards, "reserve", watched)
    cache = opened(tiny_cache, folder, bound)
    for shard in (0, 1, 0, 2):  # 1 is the oldest when 2 comes
        assert content(cache, slice(shard, shard + 1)) == content(far, slice(shard, shard + 1))
    assert 0 < most[0] <= bound + 1000, "lock files say who holds them"
    fetches.clear()
    content(cache, slice(0, 1))
    content(cache, slice(2, 3))
    assert not fetches
    content(cache, slice(1, 2))
    assert fetches


def test_a_shard_that_goes_while_it_is_read_comes_again(tiny_cache: Path, tmp_path: Path) -> None:
    cache, far = opened(tiny_cache, tmp_path / "near"), open_cache(tiny_cache)
    content(cache)
    for name in kept(tmp_path / "near"):
        near.remove_unit(tmp_path / "near", name)
    assert content(cache) == content(far), "also what was seen less than a second ago"


@pytest.mark.parametrize("how", ["altered", "shortened", "a file is gone"])
def test_a_damaged_copy_is_fetched_again_and_said_once(
    tiny_cache: Path, tmp_path: Path, fetches: list[str], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    far, folder = open_cache(tiny_cache), tmp_path / "near"
    cache = opened(tiny_cache, folder)
    content(cache)
    (file,) = folder.glob(f"*/views/1/{COLUMN}.zarr/tokens/c/1/0/0")
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data if how == "altered" else data[:-40])
    if how == "a file is gone":
        file.unlink()
    fetches.clear()
    again = opened(tiny_cache, folder)
    assert content(again) == content(again) == content(far)
    assert len(fetches) == len(cache.columns[COLUMN].layout.arrays()), "the files of that shard and no others"
    said = capsys.readouterr().err
    assert how != "shortened" or f"0 has {len(data) - 40} bytes, not {len(data)}" in said, "seen before it is read"
    assert said.count("fetched again") == 1 and f"{file.relative_to(folder).parts[0]}: damaged: " in said, said


def test_what_the_store_has_otherwise_is_never_kept(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fetches: list[str]
) -> None:
    path = copied(tiny_cache, tmp_path)
    expected = content(open_cache(path), slice(1, 3))
    file = path / f"views/0/{COLUMN}.zarr/norm/c/0/0"
    data = bytearray(file.read_bytes())
    data[40] ^= 1  # of sample 0
    file.write_bytes(data)
    cache = opened(path, tmp_path / "near")
    assert content(cache, slice(1, 3)) == expected
    cache.read_column(COLUMN, [0, 1], [0, 0], ("tokens", "scale"))  # whole, in the store
    cache.read_column(COLUMN, [1], [0], ("norm",))
    with pytest.raises(ValueError, match=rf"{file}: the chunk fails its crc32c for sample 0"):
        cache.read_column(COLUMN, [0], [0], ("norm",))
    assert not list((tmp_path / "near").glob(f"*/views/0/{COLUMN}.zarr/norm/c/0/0"))
    assert fetches.count(f"views/0/{COLUMN}.zarr/norm/c/0/0") == 1, "not again for every batch"
    said = capsys.readouterr().err
    assert said.count("not those that the cache promises") == 1 and "reading from" in said


def test_a_full_disk_is_said_and_the_store_is_read(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, real, tried = content(open_cache(tiny_cache)), near.download, [0]

    def full(source: Path, target: Path, about: Any) -> None:
        tried[0] += 1
        if tried[0] > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target, about)

    monkeypatch.setattr(near, "download", full)
    cache = opened(tiny_cache, tmp_path / "near")
    assert content(cache) == content(cache) == expected and tried[0] < 20, "after that it is left in peace for a while"
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and f"reading from {tiny_cache}" in said
    assert not strange(tmp_path / "near")
    monkeypatch.setattr(near, "download", real)
    assert cache.local is not None
    cache.local._paused_until = 0.0
    assert content(cache) == expected and len(kept(tmp_path / "near")) == len(list(units(cache.plan)))


def test_a_bound_below_one_shard_or_below_what_is_read_at_a_time_is_said(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(open_cache(tiny_cache))
    assert content(opened(tiny_cache, tmp_path / "near", 500)) == expected
    said = capsys.readouterr().err
    assert "more than --local-cache-bytes 500" in said and not kept(tmp_path / "near")
    with held(tmp_path / "near" / f".{'1' * 64}.lock"):  # somebody fetches something that takes all the room
        taken = tmp_path / "near" / f".{'1' * 64}.1-1.writing"
        taken.mkdir()
        (taken / "x").write_bytes(bytes(80_000))
        assert content(opened(tiny_cache, tmp_path / "near", 100_000)) == expected
        assert "100 kB are too few for what is read at a time" in capsys.readouterr().err and taken.exists()


def test_no_wait_for_another_process_is_without_end(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(near, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(near, "ROOM_SECONDS", 0.05)
    monkeypatch.setattr(near, "GLANCE_SECONDS", 0.01)
    far, cache = open_cache(tiny_cache), opened(tiny_cache, tmp_path / "near")
    assert cache.local is not None
    wanted = cache.local.promised((0, COLUMN, 0))
    assert wanted is not None
    with held(tmp_path / "near" / f".{wanted.name}.lock"):
        assert content(cache) == content(far)
    assert "another process has fetched the same shard for very long" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "near")
    with held(tmp_path / "near" / ".room.lock"):
        assert content(opened(tiny_cache, tmp_path / "near")) == content(far)
        assert not kept(tmp_path / "near") and "made room for very long" in capsys.readouterr().err


def test_what_is_expected_is_fetched_in_the_background(tiny_cache: Path, tmp_path: Path, fetches: list[str]) -> None:
    cache = opened(tiny_cache, tmp_path / "near")
    local = cache.local
    assert local is not None
    local.expect([(0, PIXELS, 2), (0, COLUMN, 2)])
    wait_until(lambda: len(kept(tmp_path / "near")) == 2 and not local._ahead)
    fetches.clear()
    cache.read_column(COLUMN, [16, 17], [0, 0])
    cache.read_pixels([16], [0])
    assert not fetches
    cache.read_pixels([0], [0])
    assert fetches


def test_an_unfinished_cache_goes_by_its_commit_records(tiny_cache: Path, tmp_path: Path, fetches: list[str]) -> None:
    path = copied(tiny_cache, tmp_path)
    (path / "manifest.json").unlink()
    (path / "commits/0/b.pre_tail/000001.json").unlink()
    far, cache = open_cache(path, allow_partial=True), opened(path, tmp_path / "near", allow_partial=True)
    assert len(cache.numbers) == 16 and content(cache) == content(far) and fetches
    assert len(kept(tmp_path / "near")) == 2 * len(list(units(cache.plan))) // 3


def test_a_folder_that_cannot_be_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / "file", r"--local-cache .*/file: cannot be written \(Not a directory\)"),
        (tmp_path / "file" / "x", "cannot be written"),
        (Path("s3://bucket/x"), "--local-cache s3://bucket/x: is a URL; a folder on a disk of this machine"),
        (tiny_cache / "near", "lies in the cache"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(tiny_cache, folder)
    assert (
        near.near_asked("x", "2.5 GB") == NearFolder(Path("x"), 2_500_000_000) and near.near_asked(None, None) is None
    )
    for folder_given, size, message in (
        ("x", None, "belong together"),
        (None, 5, "belong together"),
        ("x", "much", "--local-cache-bytes 'much': "),
    ):
        with pytest.raises(ValueError, match=message):
            near.near_asked(folder_given, size)


def test_other_bytes_at_the_same_place_have_another_name(
    make_cache: Callable[..., Path], tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(tiny_cache, tmp_path)
    content(opened(path, tmp_path / "near"))
    shutil.rmtree(path)
    path = make_cache(path, n=8, n_views=1)
    assert content(opened(path, tmp_path / "near")) == content(open_cache(path))
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.soak
def test_readers_that_are_killed_at_any_moment_leave_a_folder_within_its_bound(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time share a folder that holds half of the cache; a hundred of them are killed."""
    monkeypatch.setattr(near, "TOUCH_SECONDS", 0.0)
    far, folder, rng = open_cache(tiny_cache), tmp_path / "near", np.random.default_rng(0)
    expected = [content(far, slice(shard, shard + 1)) for shard in range(3)]
    bound = bytes_below(str(tiny_cache / "views")) // 2

    def read(order: list[int]) -> None:
        cache = opened(tiny_cache, folder, bound)
        for shard in order:
            assert content(cache, slice(shard, shard + 1)) == expected[shard]

    killed = 0
    while killed < 100:
        pids = [forked(functools.partial(read, order.tolist())) for order in rng.integers(0, 3, (3, 6))]
        victims = pids[: int(rng.integers(0, 4))]
        time.sleep(float(rng.uniform(0, 0.4)))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        codes = ends(pids, 60)
        killed += codes.count(-signal.SIGKILL)
        assert set(codes) <= {0, -signal.SIGKILL} and set(codes[len(victims) :]) <= {0}
        whole = sum(bytes_below(str(folder / name)) for name in kept(folder))
        assert whole <= bound
    read([0, 1, 2])
    assert not strange(folder)
