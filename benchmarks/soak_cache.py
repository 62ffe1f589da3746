"""Thousands of faults in finished caches of both formats: python benchmarks/soak_cache.py [--faults 10000] [--format zarr].

One row per format and kind, appended to results/soak_cache.csv as soon as it is done; a stopped soak goes on after the last
row of this commit and seed. Exit 1 where a fault is not noticed, not named with its repair, or where a clean cache raises an alarm.
"""

import csv
import itertools
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
from faults import KINDS, harmless, noticed_by, try_fault, well_told
from measure import machine
from rows import append

from mrmae.shards.format import plan
from mrmae.shards.store import STORAGES

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "tests"))
from small_caches import TEACHERS, write_synthetic_cache  # noqa: E402


def tiny_cache(folder: Path, format: str) -> Path:
    """Three shards, two views, one teacher with CLS and attention, one bad image: small, so that a fault takes 50 ms."""
    return write_synthetic_cache(folder / format, n=6, size=16, grid=2, n_views=2, shard_samples=2, bad=(2,),
                                 teachers={"a": TEACHERS["a"]}, format=format)  # fmt: skip


def soak(cache: Path, kind: str, faults: int, seed: list[int]) -> dict[str, Any]:
    """Inject faults of one kind, one at a time, and count who is noticed; those who are not go to stderr."""
    made, rng, counts = plan.load_plan(cache), np.random.default_rng(seed), Counter[str]()
    for _ in range(faults):
        fault, found = try_fault(cache, made, kind, rng)
        same = not found and harmless(fault)
        counts.update(faults=1, noticed=bool(found), harmless=same, named_with_repair=well_told(fault, found))
        if not (same or well_told(fault, found)):
            counts["missed"] += 1
            click.echo(f"MISSED: {fault.kind} {fault.files} {found}", err=True)
    return {name: counts[name] for name in ("faults", "noticed", "named_with_repair", "harmless", "missed")} | {
        "false_alarms": len(noticed_by(cache))
    }


def done_before(out: Path, commit: str, seed: int) -> set[tuple[str, str]]:
    """(format, kind) that have a row of this commit and seed."""
    if not out.exists():
        return set()
    with open(out, newline="") as file:
        return {
            (r["format"], r["kind"]) for r in csv.DictReader(file) if (r["commit"], r["seed"]) == (commit, str(seed))
        }


@click.command()
@click.option("--faults", default=10_000, type=click.IntRange(1), help="How many, shared by formats and kinds.")
@click.option("--format", "formats", multiple=True, default=tuple(STORAGES), type=click.Choice(list(STORAGES)))
@click.option("--seed", default=0, type=click.IntRange(0))
@click.option("--folder", type=click.Path(path_type=Path), help="Where caches lie for a while; default: the system's.")
@click.option("--out", default=ROOT / "results" / "soak_cache.csv", type=click.Path(path_type=Path))
def main(faults: int, formats: tuple[str, ...], seed: int, folder: Path | None, out: Path) -> None:
    """Inject faults of every kind into a cache of each format."""
    about, wrong = machine("cpu"), 0
    before = done_before(out, about["commit"], seed)
    each = -(-faults // (len(formats) * len(KINDS)))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        caches = {format: tiny_cache(Path(work), format) for format in formats}
        for format, (i, kind) in itertools.product(formats, enumerate(KINDS)):
            if (format, kind) in before:
                continue
            row = soak(caches[format], kind, each, [seed, i])
            wrong += row["missed"] + row["false_alarms"]
            append(
                out,
                [
                    {
                        "format": format,
                        "kind": kind,
                        **row,
                        "seed": seed,
                        "commit": about["commit"],
                        "date": about["date"],
                    }
                ],
            )
            click.echo(f"{format} {kind}: " + "  ".join(f"{name} {n}" for name, n in row.items()))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
