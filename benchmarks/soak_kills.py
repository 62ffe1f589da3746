"""Extractions killed at random moments, full disks and lost permissions: python benchmarks/soak_kills.py [--kills 100].

One and two ranks. Every run is a process forked from this one (imports done, one thread, teachers built), which then lists, hashes, plans, calibrates, extracts and
finalises like extract-features. After each interruption every committed shard is verified in full; the same options
then go on, and may be killed again; the finished cache must have the bytes of the uninterrupted one. Disks: faults injected at the write
function, and, where this user may mount one, a real tmpfs that fills up and a real one that turns read-only in the middle.
Appended to results/soak_kills.csv. Exit 1 where anything went wrong.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads would not survive the fork

import click
import numpy as np
import torch
from measure import ROOT, machine
from PIL import Image
from rows import append

from mrmae.extract import run
from mrmae.extract.options import Options
from mrmae.extract.teachers import Teacher, build_teacher, parse_teacher
from mrmae.shards import audit, write
from mrmae.shards import commit as commits
from mrmae.shards import plan as plans
from mrmae.shards.spec import ViewRecipe

TEACHERS = ("vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random")
Setup = Callable[[], None]  # what a child does before it extracts


def photographs(folder: Path, n: int = 12) -> Path:
    """A folder with n small random images, one of them broken."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        Image.fromarray(draw.integers(0, 256, (40 + i, 60 - i, 3), np.uint8)).save(folder / f"{i:03d}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def contents(path: Path) -> dict[str, bytes]:
    """All files but the commit records, which tell the time."""
    files = (file for file in path.rglob("*") if file.is_file() and "commits" not in file.parts)
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


# --- children


def start(images: Path, cache: Path, teachers: dict[str, Teacher], rank: int, ranks: int, setup: Setup) -> int:
    """The id of a child that extracts as this rank of so many; it exits with 0, or with 3 after a told error."""
    if pid := os.fork():
        return pid
    code = 4
    try:
        with open(images.parent / f"said{rank}", "w") as said, contextlib.redirect_stderr(said):
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
            options = Options([images], cache, ViewRecipe(32), TEACHERS, views=2, grid=4, batch_size=4, workers=1,
                              shard_samples=4, device="cpu")  # fmt: skip
            setup()
            try:
                with mock.patch.object(run, "build_teacher", lambda request, **_: teachers[request.name]):
                    run.extract_features(options, say=lambda _: None)
                code = 0
            except (OSError, ValueError) as error:
                print(error, file=sys.stderr)
                code = 3
    finally:
        os._exit(code)


def finish(pids: list[int], seconds: float = 300) -> list[int]:
    """Exit statuses; negative: killed by that signal. RuntimeError where a child hangs."""
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            raise RuntimeError("an extraction hangs")
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


class Soak:
    """Runs extractions of one set of images; `whole` is the uninterrupted cache, `seconds` what it took."""

    def __init__(self, work: Path, rng: random.Random) -> None:
        self.work, self.rng = work, rng
        self.images = photographs(work / "images")
        self.teachers = {}
        for text in TEACHERS:
            request = parse_teacher(text)
            self.teachers[request.name] = build_teacher(request, grid=4, view_size=32, device="cpu", precision="fp32")
        began = time.monotonic()
        assert self.go_on(work / "whole", 1) == [0], (work / "said0").read_text()
        self.seconds, self.whole = time.monotonic() - began, contents(work / "whole")

    def begin(self, cache: Path, ranks: int, setup: Setup = lambda: None) -> list[int]:
        return [start(self.images, cache, self.teachers, rank, ranks, setup) for rank in range(ranks)]

    def go_on(self, cache: Path, ranks: int, setup: Setup = lambda: None) -> list[int]:
        """Exit statuses of the same command, left alone."""
        return finish(self.begin(cache, ranks, setup))

    def invalid_shards(self, cache: Path) -> int:
        """Committed shards in which anything is wrong."""
        if not (cache / "plan.json").exists():
            return 0
        made = plans.load_plan(cache)
        found = [
            p for p in audit.find_problems(cache, full=True) if p.unit and commits.valid_record(cache, made, *p.unit)
        ]
        return len(found)

    def killed(self, cache: Path, ranks: int) -> bool:
        """Whether the extraction was killed before it had finished, all ranks within a few milliseconds."""
        pids = self.begin(cache, ranks)
        time.sleep(self.rng.uniform(0, 1.2 * self.seconds))
        for pid in self.rng.sample(pids, len(pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            time.sleep(self.rng.choice((0, 0, 0.02)))
        return any(code == -signal.SIGKILL for code in finish(pids))

    def kills(self, ranks: int, wanted: int) -> Counter[str]:
        """Kills until there were enough: a cache is killed one to four times, then left to finish by one or two ranks."""
        counts: Counter[str] = Counter()
        while counts["events"] < wanted:
            cache = self.work / "c"
            for _ in range(self.rng.randint(1, 4)):
                counts["events"] += self.killed(cache, ranks)
                counts["invalid"] += self.invalid_shards(cache)
            self.check_end(cache, self.rng.choice((1, ranks)), counts)
        return counts

    def check_end(self, cache: Path, ranks: int, counts: Counter[str]) -> None:
        """Count whether the same command finishes, and whether with the same bytes; removes the cache."""
        counts["caches"] += 1
        counts["finished"] += set(self.go_on(cache, ranks)) == {0}
        counts["equal"] += contents(cache) == self.whole
        shutil.rmtree(cache)

    def refused_writes(self, code: int, times: int) -> Counter[str]:
        """Every write fails with this error from a random one on, until the command is run again."""
        counts: Counter[str] = Counter()
        for _ in range(times):
            cache, failing = self.work / "c", failing_from(self.rng.randrange(60), code)
            codes = self.go_on(cache, 1, partial(setattr, write, "write_durably", failing))
            self.count_refusal(cache, codes, counts)
            self.check_end(cache, 1, counts)
        return counts

    def count_refusal(self, cache: Path, codes: list[int], counts: Counter[str]) -> None:
        """Count an interruption that must have been told, with what to do."""
        said = (self.work / "said0").read_text()
        counts["events"] += 1
        if codes != [3] or "run the same command again" not in said:
            click.echo(f"not told: exit {codes}, {said[-400:]}", err=True)
        counts["told"] += codes == [3] and "could not be written" in said and "run the same command again" in said
        counts["invalid"] += self.invalid_shards(cache)

    def mounts(self, times: int, *, read_only: bool) -> Counter[str]:
        """A real tmpfs, too small or made read-only in the middle; then mended. Empty where this user may not mount."""
        counts: Counter[str] = Counter()
        for _ in range(times):
            with mounted(self.work / "disk", "64m" if read_only else f"{self.rng.randrange(60, 300)}k") as disk:
                if disk is None:
                    return counts
                pids = self.begin(disk / "c", 1)
                if read_only:
                    time.sleep(self.rng.uniform(0.1, 0.9) * self.seconds)
                    while subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True).returncode:
                        pass  # busy while a file is open for writing
                codes = finish(pids)
                if codes != [0]:  # else it had finished before the disk was taken away
                    self.count_refusal(disk / "c", codes, counts)
                subprocess.run(["mount", "-o", "remount,rw,size=64m", disk], check=True)
                self.check_end(disk / "c", 1, counts)
        return counts


def failing_from(first: int, code: int) -> Callable[[Path, Any], tuple[int, str]]:
    """The write function that fails with this error from its call number `first` on."""
    calls, real = iter(range(10**6)), write.write_durably

    def failing(path: Path, chunks: Any) -> tuple[int, str]:
        if next(calls) >= first:
            raise OSError(code, os.strerror(code))
        return real(path, chunks)

    return failing


@contextlib.contextmanager
def mounted(at: Path, size: str) -> Iterator[Path | None]:
    """A small file system of its own; None where this user may not mount."""
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], capture_output=True)
    try:
        yield at if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", at], check=True)


@click.command()
@click.option("--kills", default=100, type=click.IntRange(1), help="For one rank, and again for two.")
@click.option("--disks", default=20, type=click.IntRange(0), help="Of every kind.")
@click.option("--seed", default=0, type=int)
@click.option("--folder", type=click.Path(path_type=Path), help="Where caches lie for a while; default: the system's.")
@click.option("--out", default=ROOT / "results" / "soak_kills.csv", type=click.Path(path_type=Path))
def main(kills: int, disks: int, seed: int, folder: Path | None, out: Path) -> None:
    """Interrupt extractions in every way and count what came of it."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        soak = Soak(Path(work), random.Random(seed))
        ways: dict[str, Callable[[], Counter[str]]] = {
            "SIGKILL, 1 rank": lambda: soak.kills(1, kills),
            "SIGKILL, 2 ranks": lambda: soak.kills(2, kills),
            "disk full, injected": lambda: soak.refused_writes(errno.ENOSPC, disks),
            "no permission, injected": lambda: soak.refused_writes(errno.EACCES, disks),
            "disk full, a real tmpfs": lambda: soak.mounts(disks, read_only=False),
            "read-only, a real tmpfs": lambda: soak.mounts(disks, read_only=True),
        }
        for kind, interrupt in ways.items():
            counts = interrupt()
            if not counts:
                click.echo(f"{kind}: not run, this user may not mount")
                continue
            rows.append({"kind": kind, **{n: counts[n] for n in ("events", "caches", "invalid", "finished", "equal")},
                         "told": counts["told"] if "told" in counts or "SIGKILL" not in kind else "", "seed": seed})  # fmt: skip
            click.echo("  ".join(f"{k} {v}" for k, v in rows[-1].items()))
    about = machine("cpu")
    append(out, [row | {"commit": about["commit"], "date": about["date"]} for row in rows])
    wrong = [
        r
        for r in rows
        if r["invalid"] or not r["caches"] == r["finished"] == r["equal"] or r["told"] not in ("", r["events"])
    ]
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
