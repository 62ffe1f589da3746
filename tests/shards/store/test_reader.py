"""Reading bytes: a call that gives fewer than asked for is asked again, and an index leads nowhere outside its file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch

from mrmae.shards.cache import open_cache
from mrmae.shards.format.plan import load_plan
from mrmae.shards.store import reader
from mrmae.shards.store.reader import Damaged, LocalFile, ShardFile
from mrmae.shards.store.storage import column_folder
from mrmae.shards.store.zarr import seal, shard_path

Make = Callable[..., Path]


@pytest.fixture
def a_few_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network file system, a signal, or the kernel's 2 GiB a call may have it."""
    real = os.preadv, os.pread

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        return real[0](file, [memoryview(buffers[0]).cast("B")[:5]], offset, flags)

    monkeypatch.setattr(reader.os, "preadv", preadv)
    monkeypatch.setattr(reader.os, "pread", lambda file, n, offset: real[1](file, min(n, 7), offset))


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_a_short_read_is_no_damage(make_cache: Make, tmp_path: Path, a_few_bytes_at_a_time: None, format: str) -> None:
    cache = open_cache(make_cache(tmp_path / "c", n=3, size=16, grid=2, n_views=1, format=format))
    sample = cache[1].views[0]
    assert sample["pixels"].shape == (16, 16, 3) and bool(sample["a"]["tokens"].isfinite().all())


def test_a_file_that_ends_early_still_is(tmp_path: Path, a_few_bytes_at_a_time: None) -> None:
    (tmp_path / "f").write_bytes(bytes(range(20)))
    file, (first, second) = LocalFile(tmp_path / "f"), (np.zeros(6, np.uint16), bytearray(30))
    assert file.read_into([first, second], 4, 16) == 16
    assert bytes(first) + bytes(second[:4]) == bytes(range(4, 20))
    assert file.read(100, 15) == bytes(range(15, 20)) and file.read(5, 2**70) == b""


def test_a_length_from_metadata_allocates_no_more_than_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert LocalFile(tmp_path / "f").read(2**60, 1) == b"bc"


@pytest.mark.parametrize("place", [(2**63, 132), (2**64 - 2, 132), (0, 2**63), (10**6, 132)])
def test_an_index_that_leads_outside_its_file_is_damage(
    make_cache: Make, tmp_path: Path, place: tuple[int, int]
) -> None:
    path = make_cache(tmp_path / "c", n=3, size=16, grid=2, n_views=1, shard_samples=4)
    plan = load_plan(path)
    file = shard_path(column_folder(path, plan, 0, "a.pre_tail"), "tokens", 0, 3)
    data = bytearray(file.read_bytes())
    index = np.frombuffer(data[-68:-4], "<u8").reshape(4, 2).copy()
    index[1] = place
    data[-68:-4] = index.tobytes()
    data[-4:] = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    file.write_bytes(data)
    shard = ShardFile(file, 4, seal(plan.ids["a.pre_tail"], 0, "tokens", 0))
    with pytest.raises(Damaged, match=f"places a chunk of {place[1]} bytes at {place[0]}, outside") as caught:
        shard.read([1], [np.zeros((4, 8), np.int8)])
    assert caught.value.row == 1


def test_what_is_not_in_memory_is_asked_for_side_by_side(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the page cache never has it; where it always has, nothing is asked for."""
    numbers = np.array([3, 6, 1, 17])  # three of one shard, one of another
    expected = open_cache(tiny_cache).read_column("a.pre_tail", numbers, numbers * 0)["tokens"]
    asked: list[int] = []
    real = os.preadv

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        return real(file, buffers, offset)

    monkeypatch.setattr(reader.os, "posix_fadvise", lambda _file, _offset, n_bytes, _advice: asked.append(n_bytes))
    cache = open_cache(tiny_cache)
    assert torch.equal(cache.read_column("a.pre_tail", numbers, numbers * 0, ("tokens",))["tokens"], expected)
    assert not asked, "just read: it lies in memory"
    monkeypatch.setattr(reader.os, "preadv", preadv)
    monkeypatch.setattr(reader, "NOT_WAITING", 8)
    assert torch.equal(cache.read_column("a.pre_tail", numbers, numbers * 0, ("tokens",))["tokens"], expected)
    assert asked == [16 * 8 + 4] * 3, "one alone has no company"
