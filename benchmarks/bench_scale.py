"""What a data set's size alone costs, on hollow data (hollow.py): real metadata, no pixels.

    python benchmarks/bench_scale.py --samples 1300000 --folder /tmp               # minutes; 1.4 KB of disk a sample
    python benchmarks/bench_scale.py --samples 13000000 --folder /tmp --listed     # 0.2 KB of disk a sample
    python benchmarks/bench_scale.py --samples 100000000 --folder /tmp --open      # the rank's side alone

Each step in a process of its own, which is then thrown away: wall seconds, processor seconds, and the most memory beyond what was resident after
imports. One view, one teacher, shards of 3,400 samples. Images are one block each in tars of 20,000. `plan`, `resume` and `append` are all that a command does
before its first shard but building teachers and calibrating. With --listed there are no tars: images are columns already, as listing makes them. With --open the table and the manifest are written as finalising would, from
columns on disk, and ranks open them. Memory-mapped pages of files count as memory while they are resident. Appended to results/scale.csv.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from hollow import (
    BLOCK,
    EMPTY_SHA256,
    IN_TAR,
    SHARD,
    WINDOW,
    asked_plan,
    headers,
    listed_images,
    name_of,
    write_finished,
    write_shards,
    write_tars,
)
from measure import ROOT, machine, memory_mark, memory_peak, status_bytes
from rows import append

from mrmae.extract import run
from mrmae.extract.images import KeptIndices, Sources, digest_images, list_sources, remember_hashes
from mrmae.shards import commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format import commit_path, load_plan, units
from mrmae.shards.plans import DIGESTS, TARS, Wanted, look, negotiate, write_agreed
from mrmae.train import batches

BATCH = 256
MISSING = 100  # one shard in so many is missing when `resume` is measured
MORE = 100  # one image to so many that are there is new when `append` is measured
Told = dict[str, Any]


def images_below(folder: Path, n: int) -> Sources:
    """The images, listed from tars, where there are some."""
    tars = sorted(folder.glob("images/*.tar")) + sorted(folder.glob("more/*.tar"))
    return list_sources(tars, kept=KeptIndices(near=folder / "cache" / TARS)) if tars else listed_images(n)


def plan(folder: Path, n: int, *, more: bool = False) -> Told:
    """List the images, order them, agree on a plan, write it. more: another hundredth of images is appended."""
    began, path = time.perf_counter(), folder / "cache"
    sources = images_below(folder, n + more * (n // MORE))
    listed = time.perf_counter()
    options: Any = SimpleNamespace(append=False, cache=path, workers=1, max_pixels=1 << 20)
    agreed = negotiate(look(path), Wanted(asked_plan(len(sources)), sources.rows, append=more))
    assert agreed.new == len(sources) - n or not more
    write_agreed(path, agreed)
    images = run.images_of(options, sources, agreed)
    assert images.rows[0].key
    return {"list_s": listed - began}


def resume(folder: Path, n: int) -> Told:
    """The same where all but a hundredth is committed, and what is missing."""
    told = plan(folder, n)
    began = time.perf_counter()
    path = folder / "cache"
    missing = commit.missing(path, load_plan(path))
    assert 0 < len(missing) <= 2 + 2 * n // 3400 // MISSING, len(missing)
    return told | {"missing_s": time.perf_counter() - began}


def append_more(folder: Path, n: int) -> Told:
    """The same with --append of a hundredth of new images, all others given again; not that these are hashed, or were remembered."""
    return plan(folder, n, more=True)


def recall(folder: Path, n: int) -> Told:
    """The hashes of all images from the memory of them: what --append asks of those that are given again."""
    assert len(digest_images(images_below(folder, n), np.arange(n), folder / DIGESTS, workers=1)) == n
    return {}


def finalise(folder: Path, n: int) -> Told:
    """The table of samples and the manifest, from all commit records."""
    commit.finalise(folder / "cache", load_plan(folder / "cache"))
    return {"manifest_mb": (folder / "cache" / "manifest.json").stat().st_size / 1e6}


def opened(folder: Path, n: int) -> Told:
    """Open the finished cache, as every rank does."""
    cache = open_cache(folder / "cache")
    assert len(cache) == n
    return {}


def first_batch(folder: Path, n: int) -> Told:
    """Open, order the first epoch, and read a batch that one rank of eight begins with; memory is that of all three."""
    cache = open_cache(folder / "cache")
    began = time.perf_counter()
    numbers, _ = batches.split_off(cache, 0.0)
    order = batches.numbers_of_epoch(cache, numbers, seed=0, epoch=0)
    ordered = time.perf_counter()
    share = batches.Share(8 * BATCH, rank=3, ranks=8)
    mine = batches.micro_batch_of(order, 0, 0, share)
    batch = batches.load_batch(cache, mine, epoch=0, needed={"t": {"tokens", "scale"}})
    assert batch.pixels.shape[0] == BATCH and len(np.unique(mine // cache.shard_samples)) <= WINDOW
    return {"order_s": ordered - began, "batch_s": time.perf_counter() - ordered}


STEPS: dict[str, Callable[[Path, int], Told]] = {
    "plan": plan, "finalise": finalise, "open": opened, "first batch": first_batch, "resume": resume,
    "recall": recall, "append": append_more,
}  # fmt: skip


def measured(step: str, folder: Path, n: int) -> Told:
    """One step, in this process."""
    mark, began, cpu = memory_mark("cpu"), time.perf_counter(), time.process_time()
    told = STEPS[step](folder, n)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = memory_peak("cpu", mark)
    assert isinstance(peak, int)
    return {"wall_s": wall, "cpu_s": cpu, "peak_mb": peak / 1e6, "imports_mb": (mark or 0) / 1e6, "rss_mb": status_bytes("VmRSS") / 1e6, **told}  # fmt: skip


def prepared(step: str, folder: Path, n: int, kind: str) -> None:
    """What has to lie there before a step."""
    path = folder / "cache"
    if kind == "open":
        if step == "open":
            write_finished(path, n)
    elif step == "plan":
        path.mkdir(exist_ok=True)
        if kind == "tars":
            write_tars(folder / "images", n)
    elif step == "finalise":
        write_shards(path)
    elif step == "resume":
        (path / "manifest.json").unlink()
        for unit in units(load_plan(path)):
            if unit[2] % MISSING == 0:
                commit_path(path, *unit).unlink()

    elif step == "recall":
        sources = images_below(folder, n)
        for start in range(0, n, SHARD):
            shard = range(start, min(start + SHARD, n))
            remember_hashes(sources, [(i, EMPTY_SHA256) for i in shard], folder / DIGESTS)
    elif step == "append" and kind == "tars":
        (folder / "more").mkdir()
        for start in range(n, n + n // MORE, IN_TAR):
            numbers = range(start, min(start + IN_TAR, n + n // MORE))
            blocks = np.zeros((2 * len(numbers) + 2, BLOCK), np.uint8)
            blocks[:-2:2] = headers([name_of(i) for i in numbers])
            blocks.tofile(folder / "more" / f"{start}.tar")


def in_a_process(step: str, folder: Path, n: int, kind: str, what: str) -> Told:
    """`measured` or `prepared` in a process of its own."""
    call = [
        sys.executable,
        __file__,
        "--samples",
        str(n),
        "--folder",
        str(folder),
        f"--{kind}",
        "--step",
        step,
        "--what",
        what,
    ]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


@click.command()
@click.option("--samples", "n", default=1_300_000, type=click.IntRange(100_000))
@click.option("--folder", default=tempfile.gettempdir(), type=click.Path(path_type=Path))
@click.option("--tars", "kind", flag_value="tars", default=True, help="All of it, from tars.")
@click.option("--listed", "kind", flag_value="listed", help="All but listing.")
@click.option("--open", "kind", flag_value="open", help="Opening and the first batch.")
@click.option("--step", type=click.Choice([*STEPS]), hidden=True)
@click.option("--what", type=click.Choice(["measure", "prepare"]), hidden=True)
@click.option("--without", multiple=True, type=click.Choice(list(STEPS)), help="A step to leave out.")
@click.option("--keep", is_flag=True, help="Leave the data there.")
@click.option("--out", default=ROOT / "results" / "scale.csv", type=click.Path(path_type=Path))
def main(
    n: int, folder: Path, kind: str, step: str | None, what: str | None, without: Sequence[str], keep: bool, out: Path
) -> None:
    """Print and append a row per step."""
    if step:
        told = measured(step, folder, n) if what == "measure" else prepared(step, folder, n, kind) or {}
        click.echo(json.dumps(told))
        return
    work = folder / f"scale-{n}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    about = machine("cpu")
    for name in ("open", "first batch") if kind == "open" else STEPS:
        if name in without:
            continue
        before = in_a_process(name, work, n, kind, "prepare")
        row = before if "error" in before else in_a_process(name, work, n, kind, "measure")
        row = {"samples": n, "step": name, "from": kind, **row, "load": os.getloadavg()[0], **{k: about[k] for k in ("device", "commit", "date")}}  # fmt: skip
        click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        append(out, [row])
        if "error" in row:
            break
    if not keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
