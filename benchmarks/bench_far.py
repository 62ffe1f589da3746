"""Epochs of a cache behind a line of 50 MB/s: by ranges, through a local cache for the first time, and again, beside a local path.

    python benchmarks/bench_far.py                     # about two minutes
    python benchmarks/bench_far.py --samples 512 --rounds 2 --out /tmp/far.csv

The cache is synthetic: int8 tokens of 14 x 14 x 768, views of 224 px, shards of 32. An epoch reads tokens, scales and views in the
trainer's order, batches of 64, and has the next window fetched ahead as the trainer does; the store is slow_store.py in a process of
its own. *again* and *path* are read in turns, epoch by epoch, both from this machine's page cache, and a ratio is taken within each
turn. *kept*: which share of the shards was still there in the next epoch where the bound is that share of the cache (counted, over a
folder, without the line). Rows are appended to results/far.csv.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench_cache import COLUMN, GRID, teacher
from measure import ROOT, machine
from rows import append
from synthetic import write_cache

from mrmae.shards import near as near_shards
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import PIXELS
from mrmae.shards.near import NearFolder, bytes_below
from mrmae.shards.order import WINDOW, EpochOrder

BATCH = 64
PLENTY = 1 << 40
SHARES = (0.5, 0.9)
ORDERS = 12  # epochs of which the kept share is counted


def epoch_of(cache: Cache, epoch: int) -> float:
    """Seconds that reading an epoch took."""
    order = EpochOrder(cache.numbers, cache.shard_samples, seed=0, epoch=epoch)
    began, seen = time.perf_counter(), -1
    for at in range(0, len(order), BATCH):
        numbers = order[at : at + BATCH]
        views = np.zeros_like(numbers)
        cache.read_column(COLUMN, numbers, views)
        cache.read_pixels(numbers, views)
        if cache.local is not None and (window := order.window_at(at)) != seen:
            seen = window
            cache.local.expect(
                [(0, column, shard) for shard in order.shards_of(window + 1) for column in (PIXELS, COLUMN)]
            )
    return time.perf_counter() - began


@contextmanager
def store(folder: Path, mb_per_s: float) -> Iterator[str]:
    """The URL of a cache in the folder, behind the line; the environment leads there."""
    command = [sys.executable, str(Path(__file__).with_name("slow_store.py")), str(folder), "--mb-per-s", str(mb_per_s)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1",
                       "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}"}  # fmt: skip
        yield "s3://far/cache"
    finally:
        server.kill()
        server.wait()


def row_of(what: str, seconds: list[float], beside: list[float] | None = None, **more: Any) -> dict[str, Any]:
    """A row: seconds of an epoch, and how many times those of another that was read in turns."""
    row = {"what": what, "seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds), **more}
    if beside:
        ratios = [ours / theirs for ours, theirs in zip(seconds, beside)]
        row |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return row


def far_rows(path: Path, work: Path, mb_per_s: float, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Epochs through the line, the first and the later ones through a local cache."""
    with store(path.parent, mb_per_s) as url:
        direct = open_cache(url)
        ranges = epoch_of(direct, 0)
        near = open_cache(url, near=NearFolder(work / "near", PLENTY), threads=threads)
        first = epoch_of(near, 0)
        assert near.local is not None
        least = near.local.fetched_bytes / mb_per_s / 1e6
        fetched = near.local.fetched_bytes
        again, from_path, local = list[float](), list[float](), open_cache(path, threads=threads)
        epoch_of(local, 0)
        for epoch in range(1, rounds + 1):
            pair: list[tuple[list[float], Cache]] = [(again, near), (from_path, local)]
            for seconds, cache in pair if epoch % 2 else pair[::-1]:
                seconds.append(epoch_of(cache, epoch))
        assert near.local.fetched_bytes == fetched, "nothing is fetched twice"
    return [
        row_of("by ranges", [ranges], [least]),
        row_of("first, through the local cache", [first], [least]),
        row_of("the line alone", [least]),
        row_of("again, through the local cache", again, from_path),
        row_of("from a path", from_path),
    ]


def kept_rows(path: Path, work: Path, threads: int) -> list[dict[str, Any]]:
    """Which share of the units was still there in the next epoch, for bounds of these shares of the cache."""
    whole, near_shards.TOUCH_SECONDS = bytes_below(str(path / "views")), 0.0  # these epochs are shorter than a second
    found = []
    for share in SHARES:
        cache = open_cache(path, near=NearFolder(work / f"near{share}", int(share * whole)), threads=threads)
        assert cache.local is not None
        shares = []
        for epoch in range(ORDERS):
            before = cache.local.fetched
            order = EpochOrder(cache.numbers, cache.shard_samples, seed=0, epoch=epoch)
            for window in range(-(-len(order.turn) // WINDOW)):
                units = [(0, column, shard) for shard in order.shards_of(window) for column in (PIXELS, COLUMN)]
                for unit in units:
                    cache.local.copy(unit)
            shares.append(1 - (cache.local.fetched - before) / (2 * len(order.turn)))
        counted = 1 - (1 - share) * (1 - np.log(1 - share))
        found.append({"what": f"kept where {share:.0%} fit", "ratio": statistics.mean(shares[1:]), "ratio_low": min(shares[1:]),
                      "ratio_high": max(shares[1:]), "counted": float(counted)})  # fmt: skip
    return found


@click.command(context_settings={"show_default": True})
@click.option("--samples", default=2048, type=click.IntRange(256))
@click.option("--mb-per-s", default=50.0, type=click.FloatRange(0.1), help="Of the line.")
@click.option("--rounds", default=5, type=click.IntRange(1))
@click.option("--threads", default=2, type=click.IntRange(1), help="That read, but by ranges, where there are 16.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the cache lies for a while; default: the system's."
)
@click.option("--out", default=ROOT / "results" / "far.csv", type=click.Path(path_type=Path))
def main(samples: int, mb_per_s: float, rounds: int, threads: int, folder: Path | None, out: Path) -> None:
    """Print and append rows."""
    torch.set_num_threads(threads)
    about = {name: value for name, value in machine("cpu").items() if name in ("device", "torch", "commit", "date")}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        work = Path(place)
        path = write_cache(work / "store" / "cache", [teacher()], n=samples, size=224, grid=GRID)
        parts: list[Callable[[], list[dict[str, Any]]]] = [
            lambda: far_rows(path, work, mb_per_s, rounds, threads),
            lambda: kept_rows(path, work, threads),
        ]
        rows = [row for part in parts for row in part()]
        whole = bytes_below(str(path / "views"))
    common = {"samples": samples, "bytes": whole, "mb_per_s": mb_per_s, "rounds": rounds, "threads": threads,
              "load": f"{os.getloadavg()[0]:.1f}", **about}  # fmt: skip
    for row in rows:
        click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    append(out, [row | common for row in rows])


if __name__ == "__main__":
    main()
