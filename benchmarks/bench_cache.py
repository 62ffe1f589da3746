"""Reading a cache beside a memcpy, zarr-python, tensorstore, plain webdataset and np.memmap on the same samples.

    python benchmarks/bench_cache.py                       # all cores: 2 minutes
    python benchmarks/bench_cache.py --threads 1           # one thread; the clock is then processor time
    python benchmarks/bench_cache.py --samples 512 --rounds 3 --only warm

The cache is synthetic: random int8 tokens of 14 x 14 x 768 with scales, small views. Within a round every reader reads the same
samples, in the same order, batch by batch, and a ratio to the memcpy is taken within the round. Settings: ours verifies every crc32c;
memcpy copies the same bytes, consecutive rows, from memory as large as the cache into the batch buffer; memmap copies row by row from a raw file, no
checksum; zarr-python reads by orthogonal selection with `async.concurrency` 8 (rows one by one are slower); tensorstore by one
indexed read per batch and array, no cache pool, crc32c verified; webdataset streams tars of one .npy per array, unshuffled, so
it has no random order; all with the same number of threads. Appended to results/cache.csv.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import openings
import torch
from measure import ROOT, machine
from readers import BATCH, COLUMN, Reader, readers_of
from rows import append
from synthetic import SHARD, write_cache

from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import Numbers, TeacherSpec
from mrmae.shards.order import epoch_order, view_of

GRID, WIDTH = 14, 768
GOALS = {"random": 30, "epoch": 25}  # per cent of a memcpy with as many threads


def teacher() -> TeacherSpec:
    """A teacher that exists here only."""
    return TeacherSpec(
        name="t", library="synthetic", model="random codes", weights="random", tag=None, weights_sha256="0" * 64,
        activation=None, input_size=(28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", antialias=True,
        tap="pre_tail", prefix_tokens=0, native_grid=(GRID, GRID), grid=(GRID, GRID), resample="none", width=WIDTH,
        has_cls=False, has_attention=False, precision="fp32", attention_backend="none",
    )  # fmt: skip


def order_of(mode: str, n: int, round: int) -> Numbers:
    """Sample numbers of one pass: drawn at random, or an epoch as the trainer reads it."""
    if mode == "random":
        return np.random.default_rng(round).permutation(n)
    return epoch_order(n, SHARD, seed=0, epoch=round) if mode == "epoch" else np.arange(n)


def pass_over(reader: Reader, order: Numbers) -> None:
    """Every whole batch of the order."""
    for at in range(0, len(order) - BATCH + 1, BATCH):
        reader(order[at : at + BATCH])


def warm_rows(readers: dict[str, Reader], n: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """GB/s of every reader in every order, its share of the memcpy of the same round, and the goal."""
    now = time.process_time if threads == 1 else time.perf_counter
    n_bytes = n // BATCH * BATCH * (GRID**2 * WIDTH + 2 * GRID**2)
    rows = []
    for mode in ("random", "epoch", "stream"):
        # webdataset has one order; in the others it is left out
        chosen = {
            name: r for name, r in readers.items() if name == "memcpy" or (name == "webdataset") == (mode == "stream")
        }
        speeds: dict[str, list[float]] = {name: [] for name in chosen}
        for i in range(rounds + 1):
            for name, reader in chosen.items():
                began = now()
                pass_over(reader, order_of(mode, n, i))
                speeds[name] += [n_bytes / (now() - began) / 1e9] * (i > 0)  # round 0 opens files and warms caches
        for name, values in speeds.items():
            share = [100 * v / m for v, m in zip(values, speeds["memcpy"])]
            rows.append({"what": f"warm {mode}", "reader": name, "value": statistics.median(values), "unit": "GB/s",
                         "low": min(values), "high": max(values), "pct_memcpy": statistics.median(share),
                         "goal_pct": GOALS.get(mode, "") if name.startswith("mrmae") else "", "rounds": rounds})  # fmt: skip
    return rows


# --- memory, cold reads


def resident_mb() -> float:
    """Memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory_row(cache: Cache, epochs: int = 10) -> dict[str, Any]:
    """Slope of resident memory over epochs that read tokens, scales and pixels, the first two left out."""
    sizes = []
    for epoch in range(epochs):
        order = epoch_order(cache.numbers, cache.shard_samples, seed=0, epoch=epoch)
        views = view_of(cache.hashes.numpy()[order], epoch, cache.n_views)
        for at in range(0, len(order), BATCH):
            rows = slice(at, at + BATCH)
            cache.read_column(COLUMN, order[rows], views[rows])
            cache.read_pixels(order[rows], views[rows])
        sizes.append(resident_mb())
    slope = float(np.polyfit(np.arange(2, epochs), sizes[2:], 1)[0])
    return {"what": f"memory over {epochs} epochs", "reader": "mrmae zarr", "value": slope, "unit": "MB/epoch",
            "low": min(sizes[2:]), "high": max(sizes[2:])}  # fmt: skip


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def direct_rate(folder: Path) -> float:
    """Bytes per second of reading the folder's larger files one after another with O_DIRECT, 4 MB at a time."""
    import mmap

    buffer, total, began = mmap.mmap(-1, 4 << 20), 0, time.perf_counter()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.stat().st_size < 1 << 20:
            continue
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        while (got := os.preadv(descriptor, [buffer], total_of(descriptor))) > 0:
            total += got
            os.lseek(descriptor, got, os.SEEK_CUR)
        os.close(descriptor)
    return total / (time.perf_counter() - began)


def total_of(descriptor: int) -> int:
    """Where the file is read next."""
    return os.lseek(descriptor, 0, os.SEEK_CUR)


def cold_rows(cache_path: Path, readers: dict[str, Reader], n: int, rounds: int) -> list[dict[str, Any]]:
    """A shuffled epoch with nothing in the page cache, beside O_DIRECT reads of the same files, which go around it."""
    n_bytes = n // BATCH * BATCH * (GRID**2 * WIDTH + 2 * GRID**2)
    name = next(name for name in readers if name.startswith("mrmae"))
    cold, direct = [], []
    for i in range(rounds):
        forget(cache_path)
        began = time.perf_counter()
        pass_over(readers[name], order_of("epoch", n, i))
        cold.append(n_bytes / (time.perf_counter() - began) / 1e9)
        try:
            direct.append(direct_rate(cache_path / "views") / 1e9)
        except OSError as error:
            click.echo(f"cold: not measured, O_DIRECT is refused ({error.strerror})")
            return []
    share = statistics.median(100 * c / d for c, d in zip(cold, direct))
    both = {"unit": "GB/s", "rounds": rounds}
    return [
        {"what": "cold epoch", "reader": name, "value": statistics.median(cold), "low": min(cold), "high": max(cold),
         "pct_direct": share, "goal_pct": 90, **both},
        {"what": "cold sequential", "reader": "O_DIRECT", "value": statistics.median(direct), "low": min(direct),
         "high": max(direct), **both},
    ]  # fmt: skip


@click.command()
@click.option("--samples", default=1024, type=click.IntRange(2 * BATCH))
@click.option("--threads", default=0, type=click.IntRange(0), help="0: as many as cores.")
@click.option("--rounds", default=5, type=click.IntRange(1))
@click.option(
    "--format", "formats", multiple=True, default=("zarr", "webdataset"), help="How the cache stores columns."
)
@click.option("--only", type=click.Choice(["warm", "open", "memory", "cold"]))
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the cache lies for a while; default: the system's."
)
@click.option("--out", default=ROOT / "results" / "cache.csv", type=click.Path(path_type=Path))
def main(samples: int, threads: int, rounds: int, formats: tuple[str, ...], only: str | None, folder: Path | None, out: Path) -> None:  # fmt: skip
    """Print and append rows; exit 1 where a goal is missed."""
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)  # readers use none of them; `device` tells the number
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        paths = {f: write_cache(Path(work) / f, [teacher()], n=samples, size=28, grid=GRID, format=f) for f in formats}
        readers = readers_of(paths, Path(work), threads)
        want: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "warm": lambda: warm_rows(readers, samples, threads, rounds),
            "memory": lambda: [memory_row(open_cache(paths[formats[0]], threads=threads))],
            "open": lambda: openings.rows(Path(work)),
            "cold": lambda: cold_rows(paths[formats[0]], readers, samples, min(rounds, 3)),
        }
        for name in [only] if only else want:
            rows += want[name]()
    about = machine("cpu")
    common = {"samples": samples, "threads": threads, "load": os.getloadavg()[0], **{k: about[k] for k in ("device", "torch", "commit", "date")}}  # fmt: skip
    for row in rows:
        click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    append(out, [row | common for row in rows])
    raise SystemExit(any(row.get("pct_memcpy", 100.0) < (row.get("goal_pct") or 0) for row in rows))


if __name__ == "__main__":
    main()
