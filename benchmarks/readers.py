"""Ways to read the same samples' tokens and scales into a batch buffer, for bench_cache.py."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrmae.shards.cache import open_cache
from mrmae.shards.format import Array, Numbers
from mrmae.shards.store import column_folder

BATCH = 64
COLUMN = "t.pre_tail"
Reader = Callable[[Numbers], Mapping[str, Array]]  # numbers -> arrays, [BATCH, ...] each


def readers_of(paths: Mapping[str, Path], work: Path, threads: int) -> dict[str, Reader]:
    """Every reader by name, its files written where it needs its own. paths: the same cache by storage format."""
    cache = open_cache(next(iter(paths.values())), threads=threads)
    every = np.arange(len(cache))
    rows = {name: t.numpy() for name, t in cache.read_column(COLUMN, every, np.zeros_like(every)).items()}
    found = {"memcpy": copying(rows, threads)}
    found |= {f"mrmae {format}": ours(path, threads) for format, path in paths.items()}
    found["np.memmap"] = mapped(rows, work, threads)
    if "zarr" in paths:
        folder = column_folder(paths["zarr"], open_cache(paths["zarr"]).plan, 0, COLUMN)
        found |= {"zarr-python": zarr_python(folder, threads), "tensorstore": tensorstore(folder, threads)}
    found["webdataset"] = webdataset(rows, work)
    check = np.arange(BATCH)
    for name, reader in found.items():
        for array, values in reader(check).items():
            assert np.array_equal(values, rows[array][check]), f"{name} reads other {array}"
    return found


def buffers(rows: Mapping[str, Array]) -> dict[str, Array]:
    """A batch buffer for every array."""
    return {name: np.empty((BATCH, *array.shape[1:]), array.dtype) for name, array in rows.items()}


def ours(path: Path, threads: int) -> Reader:
    """The cache's own reader, crc32c verified."""
    cache = open_cache(path, threads=threads)
    out = {name: torch.from_numpy(b) for name, b in buffers(
        {n: np.empty((1, *shape), dtype) for n, (shape, dtype) in cache.columns[COLUMN].layout.arrays().items() if n != "norm"}
    ).items()}  # fmt: skip
    views = np.zeros(BATCH, np.int64)
    return lambda numbers: {
        n: t.numpy() for n, t in cache.read_column(COLUMN, numbers, views, tuple(out), out=out).items()
    }


def in_threads(copy: Callable[[int, int], None], threads: int) -> Callable[[], None]:
    """Calls `copy(start, stop)` for equal parts of a batch, one per thread."""
    cuts = [BATCH * i // threads for i in range(threads + 1)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(copy, cuts[:-1], cuts[1:])).clear() if threads > 1 else copy(0, BATCH)


def copying(rows: Mapping[str, Array], threads: int) -> Reader:
    """A plain copy of as many consecutive rows, from memory as large as the cache."""
    out, at = buffers(rows), [0]

    def copy(a: int, b: int) -> None:
        for name, buffer in out.items():
            np.copyto(buffer[a:b], rows[name][at[0] + a : at[0] + b])

    run = in_threads(copy, threads)

    def read(numbers: Array) -> dict[str, Array]:
        run()
        at[0] = (at[0] + BATCH) % (len(rows["tokens"]) - BATCH + 1) // BATCH * BATCH
        return out

    return read


def mapped(rows: Mapping[str, Array], work: Path, threads: int) -> Reader:
    """np.memmap of raw files, row by row; nothing is verified."""
    maps = {}
    for name, array in rows.items():
        array.tofile(work / f"{name}.raw")
        maps[name] = np.memmap(work / f"{name}.raw", array.dtype, "r", shape=array.shape)
    out, wanted = buffers(rows), [np.arange(BATCH)]

    def copy(a: int, b: int) -> None:
        for i in range(a, b):
            for name, buffer in out.items():
                buffer[i] = maps[name][wanted[0][i]]

    run = in_threads(copy, threads)

    def read(numbers: Array) -> dict[str, Array]:
        wanted[0] = numbers
        run()
        return out

    return read


def zarr_python(folder: Path, threads: int) -> Reader:
    """zarr-python on the same shards."""
    import zarr

    zarr.config.set({"async.concurrency": max(8, threads), "threading.max_workers": threads})
    group = zarr.open_group(folder, mode="r")
    return lambda numbers: {name: group[name].oindex[numbers] for name in ("tokens", "scale")}  # type: ignore[index, union-attr]


def tensorstore(folder: Path, threads: int) -> Reader:
    """tensorstore on the same shards."""
    import tensorstore as ts

    context = ts.Context({"data_copy_concurrency": {"limit": threads}, "file_io_concurrency": {"limit": max(threads, 4)},
                          "cache_pool": {"total_bytes_limit": 0}})  # fmt: skip
    stores = {name: ts.open({"driver": "zarr3", "kvstore": f"file://{folder}/{name}/"}, context=context).result()
              for name in ("tokens", "scale")}  # fmt: skip

    def read(numbers: Array) -> dict[str, Array]:
        waiting = {name: store[numbers].read() for name, store in stores.items()}
        return {name: future.result() for name, future in waiting.items()}

    return read


def webdataset(rows: Mapping[str, Array], work: Path) -> Reader:
    """Plain webdataset over tars of one .npy per array: in its own order, again and again."""
    import webdataset as wds

    with wds.ShardWriter(str(work / "plain-%06d.tar"), maxcount=256, verbose=0) as writer:
        for i in range(len(rows["tokens"])):
            writer.write({"__key__": f"{i:09d}", **{f"{name}.npy": array[i] for name, array in rows.items()}})
    urls = sorted(str(file) for file in work.glob("plain-*.tar"))
    out = buffers(rows)

    def stream() -> Iterator[dict[str, Any]]:
        while True:
            yield from wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode()

    samples = stream()

    def read(numbers: Array) -> dict[str, Array]:
        for i in range(BATCH):
            sample = next(samples)
            for name, buffer in out.items():
                buffer[i] = sample[f"{name}.npy"]
        return out

    return read
