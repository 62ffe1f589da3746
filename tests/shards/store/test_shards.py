"""Opened shards: any batch, from any thread; what is damaged, exchanged or gone is named with its sample and its repair."""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from mrmae.shards.cache import open_cache
from mrmae.shards.format import commit_path, plan, units
from mrmae.shards.store import unit_files
from mrmae.shards.store.shards import shard_parts

Make = Callable[..., Path]


def stored(path: Path, view: int, name: str) -> Any:
    """An array of teacher a's column, as plain zarr reads it."""
    return np.asarray(zarr.open_group(path / f"views/{view}/a.pre_tail.zarr", mode="r")[name][:])  # type: ignore[index]


def test_threads_read_the_same(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache, threads=3)
    rng = np.random.default_rng(0)
    expected = [stored(tiny_cache, view, "tokens") for view in range(2)]
    wrong: list[Any] = []

    def read(numbers: Any, views: Any) -> None:
        tokens = cache.read_column("a.pre_tail", numbers, views, ("tokens",))["tokens"].numpy()
        if not all(np.array_equal(t, expected[v][n]) for t, n, v in zip(tokens, numbers, views)):
            wrong.append(numbers)

    threads = [threading.Thread(target=read, args=(rng.integers(0, 24, 50), rng.integers(0, 2, 50))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def copy(tiny_cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_cache, tmp_path / "copy")
    return tmp_path / "copy"


def read_everything(path: Path) -> None:
    """Read every byte that a trainer may read."""
    cache = open_cache(path, threads=1)
    for view in range(cache.n_views):
        views = np.full_like(cache.numbers, view)
        cache.read_pixels(cache.numbers, views)
        for number in cache.numbers.tolist():
            cache.read_crop(number, view)
        for name, column in cache.columns.items():
            cache.read_column(name, cache.numbers, views, tuple(column.layout.arrays()))


def test_every_flipped_bit_is_found_and_the_repair_is_true(copy: Path, make_cache: Make) -> None:
    """Bits that carry data; a tar's headers and padding, which the reader never touches, are left to full hashing."""
    read_everything(copy)
    rng = np.random.default_rng(0)
    made = plan.load_plan(copy)
    files = [(unit, file) for unit in units(made) for file in unit_files(copy, made, *unit)]
    for case in range(60):
        unit, file = files[rng.integers(len(files))]
        content = file.read_bytes()
        at = int(rng.integers(len(content)))
        if file.suffix == ".tar" and not in_a_member(content, at):
            continue
        if file.suffix == ".npz":
            continue  # the next test
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :])
        record = commit_path(copy, *unit)
        with pytest.raises(
            ValueError, match=rf"{file.name}.*(crc32c|seal).*delete {re.escape(str(record))} and run the same"
        ):
            read_everything(copy)
        if case == 0:
            record.unlink()
            make_cache(copy)
            assert file.read_bytes() == content, "only following the advice repairs it"
        file.write_bytes(content)
    read_everything(copy)


def test_a_flipped_bit_in_a_sidecar_never_gives_other_data(copy: Path) -> None:
    sidecar = copy / "views/1/pixels/000001.index.npz"
    content, rng = sidecar.read_bytes(), np.random.default_rng(2)
    numbers, views = np.arange(8, 16), np.ones(8, np.int64)
    clean, found = open_cache(copy).read_pixels(numbers, views), 0
    for _ in range(80):
        at = int(rng.integers(len(content)))
        sidecar.write_bytes(content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :])
        try:
            assert torch.equal(open_cache(copy).read_pixels(numbers, views), clean)
        except ValueError as error:
            assert "000001.tar" in str(error) and "to repair, delete" in str(error)
            found += 1
    assert found > 30


EXCHANGES = {
    "shards of one array": ("views/0/a.pre_tail.zarr/tokens/c/0/0/0", "views/0/a.pre_tail.zarr/tokens/c/1/0/0"),
    "views of one array": ("views/0/a.pre_tail.zarr/norm/c/0/0", "views/1/a.pre_tail.zarr/norm/c/0/0"),
    "arrays of one shape": ("views/0/a.pre_tail.zarr/norm/c/0/0", "views/0/a.pre_tail.zarr/scale/c/0/0"),
    "teachers of one shape": ("views/0/a.pre_tail.zarr/norm/c/0/0", "views/0/b.pre_tail.zarr/norm/c/0/0"),
    "pixels of two views": ("views/0/pixels/000000", "views/1/pixels/000000"),
    "pixels of two shards": ("views/0/pixels/000000", "views/0/pixels/000001"),
}


@pytest.mark.parametrize("what", EXCHANGES)
def test_exchanged_shards_are_found_when_they_are_read(copy: Path, what: str) -> None:
    """Also where every chunk's crc32c and every file's size is right."""
    cache = open_cache(copy)
    one, other = (copy / name for name in EXCHANGES[what])
    for suffix in (".tar", ".index.npz") if "pixels" in what else ("",):
        a, b = one.with_name(one.name + suffix), other.with_name(other.name + suffix)
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
    with pytest.raises(ValueError, match="another shard|its index belongs to|keys of its index"):
        cache.read_view(0, 0)


def in_a_member(tar: bytes, at: int) -> bool:
    """Whether a byte of a tar lies in a member's content."""
    offset = 0
    while offset < len(tar) and tar[offset]:
        size = int(tar[offset + 124 : offset + 135], 8)
        if offset + 512 <= at < offset + 512 + size:
            return True
        offset += 512 + size + -size % 512
    return False


def test_damaged_indices_exchanged_shards_and_holes_are_found(copy: Path) -> None:
    tokens = [copy / f"views/0/a.pre_tail.zarr/tokens/c/{shard}/0/0" for shard in (0, 1)]
    sidecar = copy / "views/0/pixels/000000.index.npz"
    other_keys = (copy / "views/0/pixels/000001.index.npz").read_bytes()
    cases: list[tuple[Path, bytes, str]] = [
        (tokens[0], bytes(tokens[0].stat().st_size), "index fails its crc32c|never written|crc32c"),
        (copy / "views/0/pixels/000000.tar", bytes((copy / "views/0/pixels/000000.tar").stat().st_size), "crc32c"),
        (sidecar, other_keys, "its index belongs to"),
    ]
    for file, content, message in cases:
        before = file.read_bytes()
        assert len(content) == len(before)
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_everything(copy)
        file.write_bytes(before)
    read_everything(copy)


def test_a_file_that_vanishes_or_shrinks_after_opening_is_named(copy: Path) -> None:
    cache = open_cache(copy)
    file = copy / "views/0/a.pre_tail.zarr/norm/c/0/0"
    content = file.read_bytes()
    file.write_bytes(content[:40])
    with pytest.raises(ValueError, match=r"norm/c/0/0: the file is too short for its index; .*to repair, delete"):
        cache.read_column("a.pre_tail", [0], [0], ("norm",))
    file.unlink()
    with pytest.raises(ValueError, match="cannot be opened"):
        cache.read_column("a.pre_tail", [0], [0], ("norm",))
    file.write_bytes(content)
    row = cache.read_column("a.pre_tail", [3], [0], ("norm",))
    file.write_bytes(content[:10])
    with pytest.raises(
        ValueError, match=rf"ends within the chunk .* for sample 3 \({re.escape(repr(cache.keys[3]))}\)"
    ):
        cache.read_column("a.pre_tail", [3], [0], ("norm",))
    assert torch.isfinite(row["norm"]).all()


def test_a_batch_is_cut_by_view_and_shard_into_pieces_of_at_most_so_many() -> None:
    shards, views = np.array([1, 0, 1, 0, 0, 1]), np.array([0, 0, 0, 1, 0, 0])
    parts = [(positions.tolist(), view, shard) for positions, view, shard in shard_parts(shards, views, 2)]
    assert parts == [([1, 4], 0, 0), ([0, 2], 0, 1), ([5], 0, 1), ([3], 1, 0)]
    assert not [*shard_parts(shards[:0], views[:0], 2)]
