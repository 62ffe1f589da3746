"""How long shards of two ViT-B columns take to write and hash, by one thread and by several: python benchmarks/bench_write.py.

The same arrays over the same shards, one way and the other in turns; wall-clock time, which is what an accelerator waits for. A row
per number of threads in results/write.csv: the ratio to one thread, and views per second.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from bench_cache import teacher
from measure import ROOT, machine
from rows import append
from synthetic import SHARD, codes, write_cache

from mrmae.shards import commit
from mrmae.shards.format import Plan, commit_path, load_plan

GRID = 14
Arrays = dict[str, dict[str, np.ndarray]]


@click.command()
@click.option("--rounds", default=7, type=click.IntRange(1))
@click.option("--shards", default=8, type=click.IntRange(1), help=f"Of {SHARD} samples each, per round.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the cache lies for a while.")
@click.option("--out", default=ROOT / "results" / "write.csv", type=click.Path(path_type=Path))
def main(rounds: int, shards: int, folder: Path | None, out: Path) -> None:
    """Write and time."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        specs = [replace(teacher(), name=name) for name in ("clip", "dino")]
        path = write_cache(Path(work) / "cache", specs, n=shards * SHARD, size=28, grid=GRID)
        plan, draw = load_plan(path), np.random.default_rng(0)
        arrays = {spec.column: codes(SHARD, spec, draw) for spec in plan.columns}
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two:
            pools, seconds = {1: one, 2: two}, dict[int, list[float]]({1: [], 2: []})
            for _ in range(rounds):
                for threads, pool in pools.items():
                    seconds[threads].append(sum(written(path, plan, arrays, pool)))
    ratios = sorted(b / a for a, b in zip(seconds[1], seconds[2]))
    row = {"what": "two ViT-B int8 columns, write and hash", "threads": 2, "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1],
           "rounds": rounds} | {f"views_per_s_{n}": shards * SHARD / statistics.median(s) for n, s in seconds.items()}  # fmt: skip
    append(out, [row | machine("cpu")])
    click.echo("  ".join(f"{key} {value}" for key, value in row.items()))


def written(path: Path, plan: Plan, arrays: Arrays, pool: ThreadPoolExecutor) -> Iterator[float]:
    """Seconds that each shard took, all its columns at once as far as there are threads."""
    for shard in range(plan.n_shards):
        for column in arrays:
            commit_path(path, 0, column, shard).unlink()
        began = time.perf_counter()
        valid = np.ones(len(plan.ranges[shard]), bool)
        done = [
            pool.submit(commit.store_column, path, plan, 0, column, shard, each, valid, {"quality": {"snr_db": 40.0}})
            for column, each in arrays.items()
        ]
        for one in done:
            one.result()
        yield time.perf_counter() - began


if __name__ == "__main__":
    main()
