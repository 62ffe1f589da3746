"""Every short command, hundreds of times beside others: python benchmarks/soak_exits.py [--runs 300] [--only verify].

Several at once, which is the load: what goes wrong while an interpreter ends (threads of libraries, buffers freed late) does so
rarely, and only there. Commands run in forks of a process that has imported everything, and end as a process does (zygote.py);
those that only print help, which import next to nothing, and with --real all, are processes of their own. A status other than 0
is a failure, and so is a word on the way out. One row per command, appended to results/exits.csv as soon as it is done; a stopped
soak goes on after the last command of this commit. Exit 1 where a run failed.
"""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from subprocess import PIPE
from typing import Any

import click
import numpy as np
from measure import ROOT, machine
from PIL import Image
from rows import append
from zygote import MAINS, SECONDS

from mrmae.shards.format import commit_path, load_plan

SMALL = ["--size", "32", "--grid", "4", "--views", "2", "--shard-samples", "16", "--device", "cpu"]
TEACHER = ["--teacher", "vit=timm:test_vit/random"]
STUDENT = ["--student", "vit_tiny_patch16_224", "--device", "cpu", "--batch-size", "8"]
LAST_WORDS = ("terminate called", "Traceback", "Fatal Python error", "Exception ignored")  # not what a clean exit says
Words = list[str]
Run = Callable[[Sequence[str]], tuple[int, str]]  # words -> (status, negative for a signal; stderr)


def commands(images: Path, cache: Path, damaged: Path) -> dict[str, Callable[[Path], Words]]:
    """The words of every command, given a new folder of the run's own, by name."""
    again = ["extract-features", str(images), str(cache), *TEACHER, *SMALL]
    whole = str(cache)
    return {
        "inspect-cache --help": lambda new: ["inspect-cache", "--help"],
        "show": lambda new: ["inspect-cache", "show", whole],
        "show --json": lambda new: ["inspect-cache", "show", whole, "--json"],
        "verify": lambda new: ["inspect-cache", "verify", whole],
        "verify --full": lambda new: ["inspect-cache", "verify", whole, "--full"],
        "stats": lambda new: ["inspect-cache", "stats", copied(cache, new)],
        "pictures": lambda new: ["inspect-cache", "pictures", whole, "--out", str(new / "sheet.png")],
        "diff": lambda new: ["inspect-cache", "diff", whole, whole],
        "convert": lambda new: ["inspect-cache", "convert", whole, str(new / "c"), "--format", "webdataset"],
        "drop": lambda new: ["inspect-cache", "drop", copied(cache, new), "vit", "--yes"],
        "repair, nothing to do": lambda new: ["inspect-cache", "repair", whole],
        "repair --dry-run": lambda new: ["inspect-cache", "repair", str(damaged), "--dry-run"],
        "repair": lambda new: ["inspect-cache", "repair", copied(damaged, new), "--yes"],
        "extract-features --help": lambda new: ["extract-features", "--help"],
        "extract-features, nothing to do": lambda new: again,
        "extract-features --dry-run": lambda new: [*again[:2], str(new / "c"), *again[3:], "--dry-run"],
        "extract-features": lambda new: [*again[:2], str(new / "c"), *again[3:]],
        "train-mrmae --help": lambda new: ["train-mrmae", "--help"],
        "train-mrmae --dry-run": lambda new: ["train-mrmae", whole, str(new / "run"), *STUDENT, "--dry-run"],
        "probe-features --help": lambda new: ["probe-features", "--help"],
        "probe-features": lambda new: ["probe-features", f"{whole}#vit", whole, "--out", str(new / "p"),
                                       "--device", "cpu"],
        "show-features --help": lambda new: ["show-features", "--help"],
        "show-features": lambda new: ["show-features", str(next(images.rglob("*.png"))), *TEACHER, *SMALL[:4],
                                      "--out", str(new / "f.png"), "--device", "cpu"],
    }  # fmt: skip


def copied(cache: Path, new: Path) -> str:
    """A copy of a cache for a command that changes it."""
    return str(shutil.copytree(cache, new / "copy"))


def photographs(folder: Path, n: int = 16) -> Path:
    """A folder with a train and a test part of n random images each, in two classes."""
    draw = np.random.default_rng(0)
    for i in range(2 * n):
        file = folder / ("train", "test")[i % 2] / f"class {i // 2 % 2}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40 + i, 60 - i, 3), np.uint8)).save(file)
    return folder


def prepared(work: Path) -> tuple[Path, Path, Path]:
    """Images, a finished cache of them, and one with a damaged commit record."""
    images, cache, damaged = photographs(work / "images"), work / "cache", work / "damaged"
    code, said = run(["extract-features", str(images), str(cache), *TEACHER, *SMALL])
    if code:
        raise click.ClickException(said)
    shutil.copytree(cache, damaged)
    commit_path(damaged, 0, load_plan(damaged).columns[0].column, 0).write_text("{}")
    return images, cache, damaged


def run(words: Sequence[str]) -> tuple[int, str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", MAINS[words[0]], *words[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 124, f"did not end within {SECONDS} s"
    return done.returncode, done.stderr


@contextlib.contextmanager
def forks(n: int, work: Path) -> Iterator[Run]:
    """What runs a command in a fork of one of n processes."""
    command, free = [sys.executable, str(ROOT / "zygote.py")], SimpleQueue[tuple[subprocess.Popen[str], Path]]()
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # before numpy: threads do not survive a fork
    with contextlib.ExitStack() as stack:
        for i in range(n):
            zygote = stack.enter_context(subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=alone))
            free.put((zygote, work / f"said {i}"))

        def run(words: Sequence[str]) -> tuple[int, str]:
            zygote, said = free.get()
            try:
                print(json.dumps([words, os.devnull, str(said)]), file=zygote.stdin, flush=True)
                return int(zygote.stdout.readline()), said.read_text(errors="replace")  # type: ignore[union-attr]
            finally:
                free.put((zygote, said))

        yield run


def soak(run: Run, words: Callable[[Path], Words], runs: int, at_once: int, work: Path) -> dict[str, Any]:
    """How often a command ended well, and how else; the first failures go to stderr."""
    began = time.monotonic()

    def one(_: int) -> tuple[int, str]:
        with tempfile.TemporaryDirectory(dir=work) as new:
            return run(words(Path(new)))

    with ThreadPoolExecutor(at_once) as pool:
        ended = list(pool.map(one, range(runs)))
    failed = [(code, said) for code, said in ended if code or any(word in said for word in LAST_WORDS)]
    for code, said in failed[:3]:
        click.echo(f"FAILED: status {code}: {said.strip()[-500:]}", err=True)
    statuses = Counter(code for code, _ in failed)
    how = " ".join(f"{code}:{n}" for code, n in sorted(statuses.items()))
    return {"runs": runs, "failed": len(failed), "statuses": how, "at_once": at_once,
            "seconds_per_run": (time.monotonic() - began) / runs}  # fmt: skip


def done_before(out: Path, about: Mapping[str, str], runs: int) -> set[tuple[str, str]]:
    """Commands, and how they were run, that have a row of this commit with so many runs."""
    if not out.exists():
        return set()
    with open(out, newline="") as file:
        return {(r["command"], r["processes"]) for r in csv.DictReader(file)
                if r["commit"] == about["commit"] and int(r["runs"]) >= runs}  # fmt: skip


@click.command()
@click.option("--runs", default=300, type=click.IntRange(1), help="Of every command.")
@click.option("--at-once", default=4, type=click.IntRange(1), help="Processes beside each other.")
@click.option("--real", is_flag=True, help="Every run is a process of its own, and spends some 2 s on imports.")
@click.option("--only", multiple=True, metavar="NAME", help="These commands; default: all.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where caches lie for a while; default: the system's.")
@click.option("--out", default=ROOT / "results" / "exits.csv", type=click.Path(path_type=Path))
def main(runs: int, at_once: int, real: bool, only: tuple[str, ...], folder: Path | None, out: Path) -> None:
    """Run every short command many times, several at once, and count how they ended."""
    about, wrong = machine("cpu"), 0
    about |= {"python": sys.version.split()[0], **{name: version(name) for name in ("pyarrow", "zarr")}}
    before = done_before(out, about, runs)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        every = commands(*prepared(Path(work)))
        if unknown := set(only) - set(every):
            raise click.BadParameter(f"{unknown.pop()!r}; expected {', '.join(every)}", param_hint="--only")
        with forks(0 if real else at_once, Path(work)) as fork:
            for name in only or every:
                processes = "real" if real or name.endswith("--help") else "forked"
                if (name, processes) in before:
                    continue
                row = soak(run if processes == "real" else fork, every[name], runs, at_once, Path(work))
                wrong += row["failed"]
                append(out, [{"command": name, "processes": processes, **row, **about}])
                click.echo(f"{name}, {processes}: " + "  ".join(f"{key} {value}" for key, value in row.items()))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
