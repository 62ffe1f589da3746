"""Thousands of faults in a finished cache: python benchmarks/soak_cache.py [--faults 10000]. Appends to results/soak_cache.csv.

Exit 1 where one is not noticed, not named with its repair, or where a clean cache raises an alarm.
"""

import csv
import datetime
import itertools
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import click
import numpy as np
from faults import KINDS, harmless, noticed_by, try_fault, well_told

from mrmae.shards import plan
from mrmae.shards.storage import FORMATS

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "tests"))
from conftest import write_synthetic_cache  # noqa: E402

COLUMNS = (
    "format",
    "kind",
    "faults",
    "noticed",
    "named_with_repair",
    "harmless",
    "false_alarms",
    "seed",
    "commit",
    "date",
)


@click.command()
@click.option("--faults", default=10_000, type=click.IntRange(1), help="How many, shared by the kinds.")
@click.option("--seed", default=0, type=click.IntRange(0))
@click.option("--out", default=ROOT / "results" / "soak_cache.csv", type=click.Path(path_type=Path))
def main(faults: int, seed: int, out: Path) -> None:
    """Inject faults of every kind into a cache of each format, one at a time, and count who is noticed."""
    rng, rows, missed = np.random.default_rng(seed), [], []
    with tempfile.TemporaryDirectory() as folder:
        for format, kind in itertools.product(FORMATS, KINDS):
            cache = Path(folder) / format
            if not cache.exists():
                write_synthetic_cache(cache, n=11, size=16, grid=2, n_views=2, shard_samples=3, bad=(2,), format=format)
            made = plan.load_plan(cache)
            counts: Counter[str] = Counter()
            for _ in range(-(-faults // (len(KINDS) * len(FORMATS)))):
                fault, found = try_fault(cache, made, kind, rng)
                same = not found and harmless(fault)
                counts.update(faults=1, noticed=bool(found), harmless=same, named=well_told(fault, found))
                if not (same or well_told(fault, found)):
                    missed.append((format, fault.kind, fault.files, found))
            alarms = len(noticed_by(cache))
            rows.append(
                [format, kind, counts["faults"], counts["noticed"], counts["named"], counts["harmless"], alarms]
            )
            click.echo(f"{format}, {kind}: {counts['noticed']} of {counts['faults']} noticed, {counts['named']} named with repair, "
                       f"{counts['harmless']} changed no value, {alarms} false alarms afterwards")  # fmt: skip
    append(out, rows, seed)
    for case in missed[:20]:
        click.echo(f"MISSED: {case}", err=True)
    raise SystemExit(bool(missed or any(row[-1] for row in rows)))


def append(out: Path, rows: list[list[object]], seed: int) -> None:
    """Add the rows to the results."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    new = not out.exists()
    with open(out, "a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([COLUMNS] if new else [])
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        writer.writerows([*row, seed, described.stdout.strip(), today] for row in rows)


if __name__ == "__main__":
    main()
