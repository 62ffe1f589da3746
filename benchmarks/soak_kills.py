"""Commands killed at random moments, and failing disks: python benchmarks/soak_kills.py [--kills 1000] [--only 'train*'].

Every scenario is an entry of SCENARIOS. Its command lines run as processes forked from this one (imports done, one
thread), die by SIGKILL at a random moment or at a random one of their file operations, alone or together, and are given
again until they finish. After every kill each committed shard is verified in full and compared with the uninterrupted
cache, each checkpoint read back; at the end every byte of the cache, every loss and every weight must be those of the
uninterrupted command. --sweep: also once before every single file operation, where random kills may miss a window.
Disks: errors injected into file operations, and, where this user may mount one, a real tmpfs that fills up.

A row of results/kills.csv per piece of ten kills, or per eighth of the operations; a stopped soak goes on after the last row
of this commit. Exit 1 where anything went wrong; what was found then is kept.
"""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import fnmatch
import gc
import hashlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads would not survive the fork

import click
import matplotlib.pyplot  # noqa: F401  what commands import late would be imported after every fork
import numpy as np
import torch
import torch.distributed as dist
import torch.utils.tensorboard  # noqa: F401
from measure import ROOT, machine
from PIL import Image
from rows import append

from mrmae.extract import cli as extract
from mrmae.extract import run as extract_run  # noqa: F401
from mrmae.extract.inspect import cli as inspect
from mrmae.shards import check
from mrmae.shards import commit as commits
from mrmae.shards.format import Unit, units
from mrmae.shards.format import plan as plans
from mrmae.shards.plans import DIGESTS
from mrmae.shards.store import unit_files
from mrmae.train import cli as train
from mrmae.train import loop  # noqa: F401
from mrmae.train.checkpoint import list_checkpoints, read_checkpoint
from mrmae.train.log import read_rows

PROGRAMS = {"extract-features": extract.main, "inspect-cache": inspect.main, "train-mrmae": train.main}
Stop = tuple[int, int]  # at which file operation, and with which error; 0 is a kill
NEVER: Stop = (0, 0)
Aim = Mapping[int, int | float]  # which jobs to kill: before which file operation, or after how many seconds
MAKING = ("open", "os.mkdir", "os.link", "os.rename")  # names of audit events
CLOCKS = ("time", "time_ns", "monotonic", "monotonic_ns")
OPERATIONS = (*MAKING, "os.remove", "os.rmdir", "os.truncate")
TORCHRUN = {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "soak", "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
HANGS = 120.0  # seconds
PIECE = 10  # kills per row, at most
SWEEPS = 8  # rows per scenario that is swept
NUMBER = re.compile(r"[0-9a-f-]*[0-9][0-9a-f-]*")  # of a shard or a view, and what makes a temporary name one's own
COLUMNS = ("events", "caches", "invalid", "finished", "equal", "refused")
WRONG = ("invalid", "refused", "unfinished", "unequal", "untold")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is killed: `commands` at once, where there are IMAGES, SOME of them and SOURCE, a finished cache of all.

    ranks: processes of each, as torchrun starts them; where one dies, it stops the others. before: makes the OUT that is
    there first. damaged: some of its shards are. last: finishes a cache after its parts. once: refused where all is done.
    clocks: by how many seconds the clocks of the processes are wrong, in turns. locks: whether the file system has any; without, who finishes
    beside another may end with an error, whole cache or not, and is given again (docs/log.md). planning: kills
    come at one of the operations that planning takes.
    """

    commands: tuple[str, ...]
    ranks: int = 1
    before: str = ""
    damaged: bool = False
    last: str = ""
    once: bool = False
    clocks: tuple[float, ...] = (0.0,)
    locks: bool = True
    planning: bool = False


VIT, CNN = "--teacher vit=timm:test_vit/random", "--teacher cnn=timm:test_efficientnet/random"
SMALL = "--size 32 --grid 4 --batch-size 4 --workers 1 --shard-samples 4 --device cpu"
BOTH = f"extract-features IMAGES OUT {VIT} {CNN} --views 2 {SMALL}"
LESS = f"extract-features SOME OUT {VIT} {SMALL}"
MORE = f"extract-features IMAGES OUT {VIT} {SMALL} --append"
SOURCE = BOTH.replace("OUT", "SOURCE")
ONE = BOTH.replace("--shard-samples 4", "--shard-samples 16")  # all images in one shard
TRAIN = ("train-mrmae SOURCE OUT --student test_vit --set student.decoder.depth=1 --set student.decoder.width=16"
         " --set student.decoder.heads=2 --epochs 2 --batch-size 4 --blr 0.1 --warmup-epochs 1 --device cpu --workers 1"
         " --save-minutes 0 --keep 2 --log-every 1 --panels-every 2")  # fmt: skip
SCENARIOS = {
    "extract zarr": Scenario((BOTH,)),
    "extract webdataset": Scenario((f"{BOTH} --format webdataset",)),
    "extract blocks in fp8": Scenario((f"{BOTH} --token-layout blocks --dtype fp8",)),
    "extract with 2 ranks": Scenario((BOTH,), ranks=2),
    "extract in 2 parts": Scenario((f"{BOTH} --shards 0/2", f"{BOTH} --shards 1/2"), last=BOTH),
    "extract in overlapping parts": Scenario(
        tuple(f"{BOTH} --shards {part}" for part in ("0/2", "1/2", "1/3")), last=BOTH
    ),
    "extract by 3 processes": Scenario((BOTH,) * 3),
    "extract by 3 processes, clocks apart": Scenario((BOTH,) * 3, clocks=(-420.0, 0.0, 660.0)),
    "extract in 2 parts, clocks apart": Scenario(
        (f"{BOTH} --shards 0/2", f"{BOTH} --shards 1/2"), last=BOTH, clocks=(3600.0, -300.0)
    ),
    "two on one shard": Scenario((ONE, ONE)),
    "two on one shard, clocks apart": Scenario((ONE, ONE), clocks=(-420.0, 660.0)),
    "two on one shard without locks, clocks apart": Scenario(  # planned before
        (ONE, ONE), before=f"{ONE} --shards 1/2", locks=False, clocks=(-420.0, 660.0)
    ),
    "planners": Scenario((BOTH, BOTH), planning=True),
    "extract in parts beside the whole": Scenario((f"{BOTH} --shards 0/2", f"{BOTH} --shards 1/2", BOTH)),
    "append": Scenario((MORE,), before=LESS),
    "append twice at once": Scenario((MORE, MORE), before=LESS),
    "append with 2 ranks": Scenario((MORE,), before=LESS, ranks=2),
    "another teacher": Scenario((f"extract-features SOME OUT {VIT} {CNN} {SMALL}",), before=LESS),
    "another view": Scenario((f"{LESS} --views 2",), before=LESS),
    "convert": Scenario(("inspect-cache convert SOURCE OUT --format webdataset",)),
    "convert to fp8": Scenario(("inspect-cache convert SOURCE OUT --dtype fp8 --drop cnn",)),
    "repair": Scenario(("inspect-cache repair OUT --run --yes",), before=BOTH, damaged=True),
    "extract what was damaged": Scenario((BOTH,), before=BOTH, damaged=True),
    "drop": Scenario(("inspect-cache drop OUT cnn --yes",), before=BOTH, once=True),
    "train": Scenario((TRAIN,)),
    "train with 2 ranks": Scenario((TRAIN,), ranks=2),
}


def photographs(folder: Path, n: int) -> None:
    """A folder with n small random images and a broken one; the first are those of every other such folder."""
    folder.mkdir(parents=True)
    for i in range(n):
        draw = np.random.default_rng(i)
        Image.fromarray(draw.integers(0, 256, (40 + i, 60 - i, 3), np.uint8)).save(folder / f"{i:03d}.png")
    (folder / "broken.png").write_bytes(b"no image")


def furnished(work: Path) -> Path:
    """A folder in which scenarios run: IMAGES, SOME of them, and SOURCE."""
    photographs(work / "SOME", 7)
    photographs(work / "IMAGES", 12)
    assert ends_well(SOURCE, work), (work / "said last").read_text()
    return work


# --- a child


def start(
    command: str, work: Path, said: Path, about: dict[str, str], stop: Stop, clock: float = 0.0, locks: bool = True
) -> int:
    """The id of a child that runs a command line in the folder `work`.

    What it says goes to `said`, its file operations to said.operations.
    about: additions to its environment. stop: see watch. clock: by how many seconds its clocks are wrong. locks: whether there are any.
    """
    if pid := os.fork():
        return pid
    code = 70
    try:
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        os.environ |= about
        os.chdir(work)
        torch.set_num_threads(1)  # makes torch's pool anew, before two threads want to at once
        shift_clocks(clock)
        if not locks:
            forget_locks()
        seen = watch(work, *stop)
        sys.argv = shlex.split(command)
        try:
            PROGRAMS[sys.argv[0]](sys.argv[1:])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        said.with_suffix(".operations").write_text("\n".join(seen))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def shift_clocks(seconds: float) -> None:
    """Make every clock of this process wrong: the time of day, and the one that counts from when a machine was started."""
    nanoseconds, real, text = int(seconds * 1e9), {name: getattr(time, name) for name in CLOCKS}, time.strftime
    time.time, time.monotonic = lambda: real["time"]() + seconds, lambda: real["monotonic"]() + seconds
    time.time_ns, time.monotonic_ns = (
        lambda: real["time_ns"]() + nanoseconds,
        lambda: real["monotonic_ns"]() + nanoseconds,
    )
    time.strftime = lambda form, at=None: text(form, time.localtime(time.time()) if at is None else at)  # type: ignore[assignment]


def forget_locks() -> None:
    """Make this process's file systems know no locks."""

    def none(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = none


def watch(work: Path, at: int, code: int) -> list[str]:
    """The file operations of this process that change something in `work`, its current folder, as they come; numbers are #.

    SIGKILL before number `at` (from 1; 0: never); with an error's `code` that error there and ever after
    instead, wherever something is made.
    """
    seen, below = list[str](), os.fspath(work) + os.sep

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not isinstance(given[0], str | os.PathLike):
            return
        path = os.fspath(given[0])
        if os.path.isabs(path) and not path.startswith(below):
            return
        if event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if event == "os.remove" and given[1] == -1 and not os.path.lexists(path):
            return
        seen.append(f"{event} {NUMBER.sub('#', path)}")
        if len(seen) == at and not code:
            os.kill(os.getpid(), signal.SIGKILL)
        if 0 < at <= len(seen) and code and event in MAKING:
            raise OSError(code, os.strerror(code))

    sys.addaudithook(hook)
    return seen


def ended(pids: Collection[int], seconds: float = HANGS, late: int = -signal.SIGXCPU) -> dict[int, int]:
    """Exit statuses by id; negative: killed by that signal. What runs after so many seconds is killed, with `late`."""
    end, codes = time.monotonic() + seconds, dict[int, int]()
    while left := [pid for pid in pids if pid not in codes]:
        is_late = time.monotonic() > end
        for pid in left:
            if is_late:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if is_late else os.WNOHANG)
            if done:
                codes[pid] = late if is_late else os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return codes


def ends_well(command: str, work: Path) -> bool:
    """Whether a command line, left alone, ends with 0."""
    pid = start(command, work, work / "said last", {}, NEVER)
    return ended([pid]) == {pid: 0}


# --- what is right


def contents(out: Path) -> dict[str, Any]:
    """What does not depend on interruptions: of a cache all files but commit records, which tell the time, locks, and what is
    remembered of images; of a run its student, its last state and every loss; nothing of nothing."""
    if not (out / "log.jsonl").exists():
        files = {file.relative_to(out).as_posix(): file for file in out.rglob("*") if file.is_file()}
        told = {name for name in files if name.startswith("commits/") or name.endswith(".lock") or name == DIGESTS}
        return {name: digest(file.read_bytes()) for name, file in files.items() if name not in told}
    losses = [(row["kind"], row["step"], row["loss"], row["terms"]) for row in read_rows(out / "log.jsonl")]
    state = read_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    moments = {f"{i}.{name}": x for i, slot in state["optimizer"]["state"].items() for name, x in slot.items()}
    tensors = {name: digest(x.numpy().tobytes()) for name, x in {**state["model"], **moments}.items()}
    student = {name: digest((out / "student" / name).read_bytes()) for name in ("config.json", "model.safetensors")}
    return {
        "losses": losses,
        "step": state["step"],
        "pictures": sorted(file.name for file in out.rglob("*.png")),
        **tensors,
        **student,
    }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wrong(out: Path, right: Mapping[str, Any], damaged: Collection[Unit]) -> list[str]:
    """What is committed and damaged, or has other bytes than `right` says, but for shards that were damaged before;
    checkpoints that cannot be read."""
    found: list[str] = []
    if (out / "plan.json").exists():
        made = plans.load_plan(out)
        done = [u for u in units(made) if u not in damaged and commits.valid_record(out, made, *u)]
        found += [str(problem) for problem in check.find_problems(out, full=True) if problem.unit in done]
        for file in (file for unit in done for file in unit_files(out, made, *unit)):
            if digest(file.read_bytes()) != right.get(file.relative_to(out).as_posix()):
                found.append(f"{file}: other bytes")
    for file in list_checkpoints(out / "checkpoints"):
        try:
            read_checkpoint(file)
        except ValueError as error:
            found.append(str(error))
    return found


def damage(out: Path) -> list[Unit]:
    """The shards of which one file has another last byte now: every fourth."""
    made = plans.load_plan(out)
    chosen = list(units(made))[::4]
    for unit in chosen:
        file = unit_files(out, made, *unit)[0]
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    return chosen


# --- lives


class Soak:
    """One scenario, whose OUT comes and goes in `work`, as `furnished` made it. whole: what its commands make uninterrupted;
    seconds, operations of each job: how."""

    def __init__(self, work: Path, kind: str) -> None:
        self.work, self.kind, self.scene = work, kind, SCENARIOS[kind]
        self.out, self.before, self.damaged = work / "OUT", work / f"before {kind}", list[Unit]()
        self.counts, self.running, self.rng = Counter[str](), dict[int, int](), random.Random()
        self.jobs = set(range(len(self.scene.commands) * self.scene.ranks))
        self.renew()
        if self.scene.before:
            assert ends_well(self.scene.before, work), self.said()
        self.first = contents(self.out)
        if self.scene.before:
            self.damaged = damage(self.out) if self.scene.damaged else []
            shutil.copytree(self.out, self.before)
        began = time.monotonic()
        assert self.finishes(self.jobs), self.said()
        self.seconds, self.whole = time.monotonic() - began, contents(self.out)
        self.operations = {job: (work / f"said{job}.operations").read_text().splitlines() for job in self.jobs}

    def said(self) -> str:
        """The last words of every process."""
        return "\n".join(f"{file.name}: {file.read_text()[-1500:]}" for file in sorted(self.work.glob("said*[!s]")))

    def renew(self) -> None:
        """OUT as the commands find it first."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before.exists():
            shutil.copytree(self.before, self.out)

    def begin(self, jobs: Collection[int], stops: Mapping[int, Stop]) -> None:
        """Start jobs: number i is rank i % ranks of command i // ranks."""
        ranks = self.scene.ranks
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        for job in jobs:
            about = {"RANK": str(job % ranks), "LOCAL_RANK": str(job % ranks), "WORLD_SIZE": str(ranks),
                     "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
            if self.store:
                about |= {**TORCHRUN, "MASTER_PORT": str(self.store.port)}
            command, said = self.scene.commands[job // ranks], self.work / f"said{job}"
            clock = self.scene.clocks[job % len(self.scene.clocks)]
            self.running[job] = start(command, self.work, said, about, stops.get(job, NEVER), clock, self.scene.locks)

    def end(self, jobs: Collection[int], *patience: Any) -> dict[int, int]:
        """Exit statuses of running jobs, by job. patience: see ended."""
        pids = {self.running.pop(job): job for job in jobs}
        codes = {pids[pid]: code for pid, code in ended(pids, *patience).items()}
        there = self.scene.once and 1 in codes.values() and contents(self.out) == self.whole
        return {job: 0 if there and code == 1 else code for job, code in codes.items()}

    def finishes(self, left: Collection[int]) -> bool:
        """Whether the jobs left, and those that run, and then the last command, end with 0."""
        self.begin(set(left) - self.running.keys(), {})
        codes = self.end(list(self.running))
        good = set(codes.values()) <= {0}
        if not good and not self.scene.locks and set(codes.values()) <= {0, 1}:
            good = ends_well(self.scene.commands[0], self.work)
        return good and (not self.scene.last or ends_well(self.scene.last, self.work))

    def at_random(self, left: Collection[int]) -> Aim:
        """At least one of the jobs left, each at an operation or a moment; what runs already, at a moment."""
        victims = self.rng.sample(sorted(left), self.rng.randint(1, len(left)))
        if self.scene.planning and not self.running:
            return {job: self.rng.randint(1, self.planned_after()) for job in victims}
        at_operation = {job for job in victims if job not in self.running and self.rng.random() < 0.5}
        return {job: self.rng.randint(1, len(self.operations[job])) if job in at_operation and self.operations[job] else self.rng.uniform(0, 1.1 * self.seconds)
                for job in victims}  # fmt: skip

    def planned_after(self) -> int:
        """How many operations planning takes: those before a first shard is claimed, of the process that did it."""
        planner = max(self.operations.values(), key=len)
        return next(i for i, operation in enumerate(planner) if "/commits/" in operation)

    def kill(self, left: set[int], aim: Aim) -> set[int]:
        """The jobs still left after those aimed at were killed; others may go on meanwhile."""
        self.begin(left - self.running.keys(), {job: (at, 0) for job, at in aim.items() if isinstance(at, int)})
        began = time.monotonic()
        for at, job in sorted((at, job) for job, at in aim.items() if isinstance(at, float)):
            time.sleep(max(0.0, began + at - time.monotonic()))
            os.kill(self.running[job], signal.SIGKILL)
        codes = self.end(aim, 2 * self.seconds, -signal.SIGKILL)
        killed = -signal.SIGKILL in codes.values()
        self.counts["events"] += killed
        allowed = {0, -signal.SIGKILL} if self.scene.locks else {0, 1, -signal.SIGKILL}
        if self.scene.ranks > 1:
            for pid in self.running.values() if killed else ():
                os.kill(pid, signal.SIGTERM)
            codes |= self.end(list(self.running))
            allowed |= {1, -signal.SIGTERM, 128 + signal.SIGTERM} if killed else set()
        if strange := {job: code for job, code in codes.items() if code not in allowed}:
            self.complain("refused", f"ended by themselves, with {strange}, when aimed at {aim}")
        done = {job for job, code in codes.items() if code == 0}
        return left - done if self.scene.ranks == 1 or done == left else left

    def life(self, aims: Iterable[Callable[[set[int]], Aim]]) -> None:
        """OUT from its beginning: killed as aimed, then left to finish. aims: given the jobs that are left."""
        self.renew()
        left, aimed = set(self.jobs), list[Aim]()
        for aim in aims:
            if left:
                aimed.append(aim(left))
                left = self.kill(left, aimed[-1])
            if found := wrong(self.out, {**self.first, **self.whole}, self.damaged):
                self.complain("invalid", "\n".join([f"after {aimed}:", *found]))
        self.close(self.finishes(left), f"after {aimed}")

    def close(self, good: bool, after: str) -> None:
        """Count whether the commands finished, and with the right contents, after what."""
        self.counts.update(caches=1, finished=good)
        if not good:
            self.complain("unfinished", f"does not end with 0 {after}")
        now = contents(self.out)
        self.counts["equal"] += now == self.whole
        if now != self.whole:
            names = sorted(name for name in now.keys() | self.whole if now.get(name) != self.whole.get(name))
            self.complain("unequal", f"differ {after}: {names[:20]}")

    def complain(self, what: str, text: str) -> None:
        """Count something wrong, say it, and keep OUT as it is."""
        self.counts[what] += 1
        kept = self.work / f"kept{len(list(self.work.glob('kept*')))}"
        if self.out.exists():
            shutil.copytree(self.out, kept)
        click.echo(f"WRONG: {self.kind}: {what}: {text}\n{self.said()}\n{kept}", err=True)

    def piece(self, *, kills: int, seed: int) -> Counter[str]:
        """What came of so many kills, or a few more."""
        self.rng, self.counts = random.Random(f"{self.kind} {seed}"), Counter(events=0, invalid=0)
        while self.counts["events"] < kills:
            self.life([self.at_random] * self.rng.randint(1, 4))
        return self.counts

    def sweep(self, *, part: int) -> Counter[str]:
        """What came of one kill, in a life of its own, before every operation of a part: part 0 are those that follow
        another one for the first time."""
        self.counts = Counter(events=0, invalid=0)
        for job, operations in self.operations.items():
            pairs = list(zip(["", *operations], operations))
            first = [pairs.index(pair) + 1 for pair in dict.fromkeys(pairs)]
            others = [at for at in range(1, len(pairs) + 1) if at not in first]
            for at in others[part - 1 :: SWEEPS - 1] if part else first:
                self.life([lambda left, aim={job: at}: aim])
        return self.counts

    # --- disks

    def refused(self, *, code: int, times: int, seed: int) -> Counter[str]:
        """Every making of a file fails with this error from a random one on, until the command is given again."""
        self.rng, self.counts = random.Random(f"{code} {seed}"), Counter(told=0)
        for _ in range(times):
            self.renew()
            at = self.rng.randint(1, len(self.operations[0]))
            self.begin(self.jobs, {0: (at, code)})
            self.hear(self.end(self.jobs))
            self.close(self.finishes(self.jobs), f"with {errno.errorcode[code]} from operation {at} on")
        return self.counts

    def hear(self, codes: Mapping[int, int]) -> None:
        """Count an interruption that must have been told, with what to do."""
        said = (self.work / "said0").read_text()
        told = codes == {0: 1} and "could not be written" in said and "run the same command again" in said
        self.counts.update(events=1, told=told)
        if not told:
            self.complain("untold", f"exit {codes}")
        if found := wrong(self.out, self.whole, ()):
            self.complain("invalid", "\n".join(found))

    def mounts(self, *, times: int, seed: int) -> Counter[str]:
        """A real tmpfs that is too small, then grows. Empty where this user may not mount."""
        self.rng, self.counts = random.Random(seed), Counter()
        for _ in range(times):
            self.renew()
            size = f"{self.rng.randrange(60, 300)}k"
            with mounted(self.out, size) as there:
                if not there:
                    return self.counts
                self.begin(self.jobs, {})
                codes = self.end(self.jobs)
                if codes != {0: 0}:  # else it was large enough
                    self.hear(codes)
                subprocess.run(["mount", "-o", "remount,size=64m", self.out], check=True)
                self.close(self.finishes(self.jobs), f"of {size}")
        return self.counts


@contextlib.contextmanager
def mounted(at: Path, size: str) -> Iterator[bool]:
    """Whether a small file system of its own lies there; not where this user may not mount."""
    at.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", at], check=True)


# --- rows


def done_before(out: Path, commit: str) -> set[tuple[str, str]]:
    """(kind, seed) that have a row of this commit."""
    if not out.exists():
        return set()
    with open(out, newline="") as file:
        return {(row["kind"], row["seed"]) for row in csv.DictReader(file) if row["commit"] == commit}


Run = tuple[str, int, str, Callable[[Soak], Counter[str]]]  # a row: its kind and seed, the scenario, and what makes it
DISKS = {
    "disk full, injected": partial(Soak.refused, code=errno.ENOSPC),
    "no permission, injected": partial(Soak.refused, code=errno.EACCES),
    "read-only, injected": partial(Soak.refused, code=errno.EROFS),
    "disk full, a real tmpfs": Soak.mounts,
}


def rows_wanted(kinds: Collection[str], kills: int, sweep: bool, disks: int, seed: int) -> Iterator[Run]:
    """Every row: scenarios in turns; who stops early has some of each."""
    each = -(-kills // len(kinds))
    for done in range(0, each, PIECE):
        number = seed + done // PIECE
        for kind in kinds:
            yield kind, number, kind, partial(Soak.piece, kills=min(PIECE, each - done), seed=number)
    for part in range(SWEEPS if sweep else 0):
        for kind in kinds:
            yield f"{kind}, swept", part, kind, partial(Soak.sweep, part=part)
    for kind, fail in DISKS.items() if disks else ():
        yield kind, seed, "extract zarr", partial(fail, times=disks, seed=seed)


@click.command()
@click.option("--kills", default=1000, type=click.IntRange(0), help="At least so many, shared by the scenarios.")
@click.option("--sweep", is_flag=True, help="Also kill once before every file operation.")
@click.option("--only", default=("*",), multiple=True, metavar="GLOB", help="Scenarios by name; repeatable.")
@click.option("--disks", default=20, type=click.IntRange(0), help="Failing disks, of every kind.")
@click.option("--seed", default=0, type=int, help="Of the first piece; those that follow count on.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where caches lie for a while; default: the system's.")
@click.option("--out", default=ROOT / "results" / "kills.csv", type=click.Path(path_type=Path))
def main(kills: int, sweep: bool, only: tuple[str, ...], disks: int, seed: int, folder: Path | None, out: Path) -> None:
    """Interrupt commands in every way and count what came of it."""
    torch.set_num_threads(1)
    kinds = [kind for kind in SCENARIOS if any(fnmatch.fnmatch(kind, glob) for glob in only)]
    if not kinds:
        raise click.BadParameter(f"{only}: none of {', '.join(SCENARIOS)}", param_hint="--only")
    about = {name: value for name, value in machine("cpu").items() if name in ("commit", "date", "torch")}
    before, work = done_before(out, about["commit"]), furnished(Path(tempfile.mkdtemp(dir=folder)))
    soaks, wrongs = dict[str, Soak](), 0
    for kind, number, scene, run in rows_wanted(kinds, kills, sweep, disks, seed):
        if (kind, str(number)) in before:
            continue
        began = time.monotonic()
        counts = run(soaks.get(scene) or soaks.setdefault(scene, Soak(work, scene)))
        if not counts["caches"]:
            click.echo(f"{kind}: not run, this user may not mount")
            continue
        row = {"kind": kind, **{name: counts[name] for name in COLUMNS}, "told": counts.get("told", ""), "seed": number}
        append(out, [row | about])
        click.echo(
            "  ".join(f"{name} {value}" for name, value in row.items()) + f"  in {time.monotonic() - began:.0f} s"
        )
        wrongs += sum(counts[what] for what in WRONG)
    if not wrongs:
        shutil.rmtree(work)
    raise SystemExit(bool(wrongs))


if __name__ == "__main__":
    gc.freeze()  # what lies here is not walked by a child's collector, which would copy its pages
    main()
