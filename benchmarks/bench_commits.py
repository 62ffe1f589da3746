"""Reading and extraction of two checkouts of this repository in turns: what a change of the code costs, whatever this machine's mood.

    git worktree add ../old COMMIT && make -C ../old venv
    python benchmarks/bench_commits.py ../old            # against this checkout: 5 minutes
    python benchmarks/bench_commits.py ../old --rounds 15 --only epoch

A process of each checkout, by its own interpreter and its own benchmarks, on the same core with one thread, does the same pass in turns,
the first of a round now the one, now the other; the clock is processor time. `random` and `epoch`: every token and scale of the cache
of bench_cache.py, in its orders; `extract`: images of the shared tar through MobileNetV2, from the listing to the manifest, without
building the teacher; `memory`: the most that a process has resident during one extraction of four views in one shard, MB in place of seconds. Ratios are new / old time of one round. Appended to results/commits.csv.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, cast

import click
import torch
from measure import ROOT, machine
from rows import append

KINDS = ("random", "epoch", "extract", "memory")
WORKER = """
import json, os, sys, time
from pathlib import Path
import numpy as np
import torch
root, kind, data, images, samples, work = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6])
sys.path.insert(0, str(root / "benchmarks"))
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
torch.set_num_threads(1)
import bench_cache, bench_extract, mrmae.shards.cache, readers
from mrmae.extract.run import extract_features
assert Path(mrmae.shards.cache.__file__).resolve().is_relative_to(root), mrmae.shards.cache.__file__
if kind in ("extract", "memory"):
    keep = getattr(bench_extract, "keep_memory", None)  # what the command does to the allocator
    keep("cpu") if keep else bench_extract.be_a_batch_job("cpu")
    folder = bench_extract.images_of(data / "data/clothing-small.tar", images, work / "images")
    text = bench_extract.CASES["cnn"].format(root=data)
    def turn(i):
        options = bench_extract.Options([folder], work / f"cache{i}", teachers=(text,), device="cpu")
        with bench_extract.timed_building() as building:
            took = bench_extract.spent(lambda: extract_features(options, say=lambda _: None))
        return took[1] - building[0][1]
    if kind == "memory":
        def turn(i):
            extract_features(bench_extract.Options([folder], work / "cache", teachers=(text,), device="cpu", views=4, shard_samples=images), say=lambda _: None)
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1e3
else:
    path = bench_cache.write_cache(work / "cache", [bench_cache.teacher()], n=samples, size=28, grid=bench_cache.GRID)
    reader = readers.ours(path, 1)
    def turn(i):
        order = bench_cache.order_of(kind, samples, i)
        began = time.process_time()
        bench_cache.pass_over(reader, order)
        return time.process_time() - began
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(turn(int(line))), flush=True)
"""


def start(checkout: Path, kind: str, data: Path, images: int, samples: int, work: Path) -> "subprocess.Popen[str]":
    """A process of the checkout that waits for round numbers and answers with seconds."""
    work.mkdir()
    words = [checkout / ".venv/bin/python", "-c", WORKER, checkout, kind, data, images, samples, work]
    process = subprocess.Popen([str(w) for w in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd=checkout)  # fmt: skip
    if cast(IO[str], process.stdout).readline().strip() != "ready":
        raise click.ClickException(f"{checkout}: its process ended before the first round: see above")
    return process


def ask(process: "subprocess.Popen[str]", round: int) -> float:
    """Seconds of processor time of one pass."""
    print(round, file=process.stdin, flush=True)
    line = cast(IO[str], process.stdout).readline()
    if not line:
        raise click.ClickException(f"a process ended in round {round}: see above")
    return float(json.loads(line))


def one_kind(kind: str, old: Path, new: Path, data: Path, images: int, samples: int, rounds: int, work: Path) -> dict[str, Any]:  # fmt: skip
    """The row of one kind of work."""
    both = [
        start(checkout, kind, data, images, samples, work / name) for name, checkout in (("old", old), ("new", new))
    ]
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for which in (0, 1) if i % 2 else (1, 0):
            took = ask(both[which], i)
            if i:  # round 0 opens files and warms caches
                times[which].append(took)
    for process in both:
        cast(IO[str], process.stdin).close()
        process.wait(60)
    ratios = sorted(n / o for o, n in zip(*times))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return {"what": kind, "old_s": statistics.median(times[0]), "new_s": statistics.median(times[1]),
            "ratio": statistics.median(ratios), "ratio_p25": low, "ratio_p75": high, "rounds": rounds,
            "samples": images if kind in ("extract", "memory") else samples}  # fmt: skip


def commit_of(checkout: Path) -> str:
    """The commit a checkout stands on."""
    said = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return said.stdout.strip()


@click.command()
@click.argument("old", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=9, type=click.IntRange(1))
@click.option("--samples", default=1024, type=click.IntRange(128), help="Of the cache that is read.")
@click.option("--images", default=128, type=click.IntRange(1), help="Of an extraction.")
@click.option("--only", "kinds", multiple=True, type=click.Choice(KINDS), help="Default: all.")
@click.option("--data-root", default=ROOT.parents[1] / "shared", type=click.Path(path_type=Path))
@click.option("--out", default=ROOT / "results" / "commits.csv", type=click.Path(path_type=Path))
def main(old: Path, rounds: int, samples: int, images: int, kinds: tuple[str, ...], data_root: Path, out: Path) -> None:
    """Print and append a row per kind of work. OLD: another checkout, with its environment in .venv."""
    torch.set_num_threads(1)  # so that `device` tells the clock
    about = machine("cpu")
    for kind in kinds or KINDS:
        with tempfile.TemporaryDirectory() as work:
            row = one_kind(
                kind, old.resolve(), ROOT.parent.resolve(), data_root.resolve(), images, samples, rounds, Path(work)
            )
        row |= {"old": commit_of(old), "load": os.getloadavg()[0], **{k: about[k] for k in ("device", "torch", "commit", "date")}}  # fmt: skip
        click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        append(out, [row])


if __name__ == "__main__":
    sys.exit(main())
