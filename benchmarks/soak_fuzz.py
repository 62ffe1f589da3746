"""Hostile and damaged caches against every command: python benchmarks/soak_fuzz.py [--cases 5000] [--case 17].

A case's number decides a cache (finished or not, both formats, token blocks, appended images), the mutation of one of its files
(mutations.py) and a command, which runs in a process forked from this one (imports done, one thread). It must end within 20 s
and 1 GB, with status 0 or a message that names a file, must write and delete nothing outside the cache and run nothing that lies
there. Status 0 must mean that nothing was lost: what was written equals what the whole cache gives, and `verify --full` notices
every change of meaning. A row per piece goes to results/fuzz.csv; a stopped soak goes on after the last piece of this commit and seed.
Exit 1 where a case failed; each prints how to run it alone.
"""

import csv
import dataclasses
import faulthandler
import functools
import gc
import hashlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before torch: threads do not survive a fork
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"

import click
import numpy as np
from measure import ROOT, commit, machine
from mutations import Mutation, mutate, pick
from PIL import Image
from rows import append

from mrmae.extract.cli import main as extract_features
from mrmae.extract.inspect.cli import main as inspect_cache
from mrmae.probe.cli import main as probe_features
from mrmae.train.cli import main as train_mrmae

SECONDS, BYTES = 20, 1 << 30  # a case's limits
GUARD = 3 << 30  # of address space: protects the machine, the verdict is about resident bytes
SHOWN = 20_000  # characters: what a command may say
EXTRACT = ["--size", "32", "--grid", "4", "--views", "2", "--shard-samples", "4", "--batch-size", "4", "--workers", "1",
           "--device", "cpu"]  # fmt: skip
VIT, CNN = ["--teacher", "vit=timm:test_vit/random"], ["--teacher", "cnn=timm:test_efficientnet/random"]
MAP = ["--map", "parts=kmeans:vit:5"]
for module in (
    "extract.inspect.compare",
    "extract.teachers.open_clip",
    "extract.run",
    "extract.inspect.pictures",
    "extract.teachers.timm",
    "probe.run",
    "train.loop",
):
    importlib.import_module(f"mrmae.{module}")  # commands import these late
BASES = {  # options of the extraction that makes a cache, and what ends it before its time
    "zarr": [*VIT, *CNN, *MAP],
    "webdataset": [*VIT, "--format", "webdataset", "--dtype", "fp8"],
    "zarr unfinished": [*VIT],
    "webdataset unfinished": [*VIT, "--format", "webdataset"],
    "zarr blocks appended": [*VIT, "--token-layout", "blocks"],
    "webdataset appended": [*VIT, *MAP, "--format", "webdataset"],
}
COMMANDS = {  # how often
    "show": 3, "show --json": 1, "verify": 3, "verify --full": 6, "repair --dry-run": 3, "repair --yes": 5, "convert": 6, "drop": 4,
    "stats": 3, "pictures": 3, "report": 2, "diff": 3, "train --dry-run": 3, "train": 3, "probe": 3, "extract": 5, "mend": 5,
}  # fmt: skip
TRAIN = ["--set", "student.model=test_vit", "--set", "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}", "--set",
         "student.fused_blocks=[2, 4]", "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--workers", "1", "--panels-every",
         "0", "--allow-partial"]  # fmt: skip
KINDS = ("crashed", "slow", "memory", "outside", "ran", "unclear", "wrong", "missed")
NAMED = re.compile(
    r"\.json\b|\.jsonl\b|\.lock\b|\.digests\b|pictures\.png\b|report\.html\b|\.npy\b|\.arrow\b|\.tar\b|\.safetensors\b|/c/\d|/(commits|views|tail|codebooks|stats|manifest)\b|\b(commits|views|tail|codebooks|manifest)/|^(commits|views|tail|codebooks|stats|manifest)[:(]|\bis not finished\b|: its bytes changed since the cache was begun",
    re.M,
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a forked process ended. code: negative for a signal, None where it was killed for its time. bytes: resident at most."""

    code: int | None
    said: str
    seconds: float
    bytes: int


def forked(call: Callable[[], Any], folder: Path, said: Path, *, seconds: float = SECONDS) -> Ended:
    """Run something in a process of its own, in `folder`."""
    sys.stdout.flush()
    began = time.monotonic()
    if not (pid := os.fork()):
        in_child(call, folder, said, seconds)
    watch = os.pidfd_open(pid)
    ready, _, _ = select.select([watch], [], [], seconds)
    os.close(watch)
    if not ready:
        os.killpg(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status) if ready else None
    text = said.read_text(errors="replace")
    return Ended(code, text, time.monotonic() - began, used.ru_maxrss << 10)


def in_child(call: Callable[[], Any], folder: Path, said: Path, seconds: float) -> None:
    """What a forked process does; it does not come back."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        null, out = os.open(os.devnull, os.O_RDONLY), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        faulthandler.dump_traceback_later(seconds - 1)
        most = memory_of("VmSize") + GUARD
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            call()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def memory_of(name: str) -> int:
    """A field of this process's /proc status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


# --- caches


def photographs(folder: Path) -> Path:
    """12 small images, labelled, in a train and a test part; one of them broken."""
    draw = np.random.default_rng(0)
    for i in range(12):
        path = folder / ("test" if i % 3 == 2 else "train") / f"class {i // 3 % 2}" / f"{i:03d} é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40 + i, 60 - i, 3), np.uint8)).save(path)
    (folder / "train" / "class 0" / "000 é.png").write_bytes(b"no image")
    return folder


def made_caches(work: Path) -> Path:
    """The folder of one cache of each kind, as `case` may copy them."""
    for folder in ("bases", "folder"):
        (work / folder).mkdir()
    photographs(work / "images")
    for name in BASES:
        for words in ways(name, work / "images", work / "bases" / name):
            run(work, extract_features, words)
        for record in (work / "bases" / name).glob("commits/*/*/*.json"):  # equal bytes in every run of this soak
            about = json.loads(record.read_bytes())
            told = {"written": 10**9, "seconds": {"write": 0.5}, "folder": str(work / "case" / "folder")}
            record.write_text(json.dumps(about | told))
        if "unfinished" not in name:
            run(work, inspect_cache, ["stats", str(work / "bases" / name)])
    shutil.rmtree(work / "folder")
    return work / "bases"


def run(work: Path, main: click.Command, words: list[str]) -> None:
    """Run a command that must succeed."""
    ended = forked(lambda: main.main(words), work / "folder", work / "said", seconds=120)
    assert ended.code == 0, ended.said


def ways(name: str, images: Path, cache: Path) -> list[list[str]]:
    """The extractions that make a cache, one after the other."""
    whole = [str(images), str(cache), *EXTRACT, *BASES[name]]
    if "unfinished" in name:
        return [[*whole, "--shards", "0/2"]]
    return [[*whole, "--include", "train/*"], [*whole, "--append"]] if "appended" in name else [whole]


# --- cases


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a case happens. cache: the copy that is mutated; bases: the whole ones; work: everything."""

    work: Path

    @property
    def case(self) -> Path:
        return self.work / "case"

    @property
    def cache(self) -> Path:
        return self.case / "cache"

    @property
    def out(self) -> Path:
        return self.case / "out"

    def prepare(self, base: str) -> None:
        """A fresh copy, and beside it what must not be touched, read or run."""
        shutil.rmtree(self.case, ignore_errors=True)
        for folder in ("outside", "folder", "out"):
            (self.case / folder).mkdir(parents=True)
        shutil.copytree(self.work / "bases" / base, self.cache, symlinks=True)
        (self.case / "victim.txt").write_text("not yours")
        (self.case / "outside" / "victim.txt").write_text("not yours")
        canary = f"import os\nos.makedirs({str(self.case / 'outside' / 'RAN')!r}, exist_ok=True)\n"
        for name in ("click", "numpy", "sitecustomize", "usercustomize", "mrmae", "json", "torch"):
            (self.case / "folder" / f"{name}.py").write_text(canary)

    def others(self) -> dict[str, tuple[int, int, int]]:
        """Everything outside the cache: kind, size and time of its last change."""
        found = {}
        for folder, folders, files in os.walk(self.work):
            if Path(folder) == self.case:
                folders[:] = sorted(set(folders) - {"cache", "out"})
            for name in (*folders, *files):
                about = os.lstat(os.path.join(folder, name))
                changes = 0 if name in folders else about.st_mtime_ns
                found[os.path.join(folder, name)] = (about.st_mode, about.st_size, changes)
        return found


def words_of(command: str, base: str, place: Place) -> tuple[click.Command, list[str]]:
    """The command line of a command."""
    cache, out = str(place.cache), str(place.out / "made")
    name, *options = command.split()
    match name:
        case "train":
            return train_mrmae, [cache, out, *TRAIN, *options]
        case "probe":
            return probe_features, [f"{cache}#vit", cache, "--out", out, "--set", "knn.k=2", "--device", "cpu", "--workers", "1",
                                    "--allow-partial"]  # fmt: skip
        case "extract":
            words = [*ways(base, place.work / "images", place.cache)[-1]]
            return extract_features, words[: words.index("--shards")] if "--shards" in words else words
        case "convert":
            to = "zarr" if base.startswith("webdataset") else "webdataset"
            return inspect_cache, [name, cache, out, "--format", to]
        case "drop":
            return inspect_cache, [name, cache, "vit", "--yes"]
        case "diff":
            return inspect_cache, [name, cache, str(place.work / "bases" / base)]
    return inspect_cache, [name, cache, *options]


def steps_of(command: str, base: str, place: Place) -> list[tuple[click.Command, list[str]]]:
    """The command lines of a command: `mend` is a repair, then the extraction again."""
    return [words_of(step, base, place) for step in (("repair --yes", "extract") if command == "mend" else (command,))]


def run_steps(steps: list[tuple[click.Command, list[str]]]) -> None:
    """Run command lines one after the other, up to the first that fails."""
    for main, words in steps:
        try:
            main.main(words)
        except SystemExit as end:
            if end.code:
                raise


def unfinished(said: str) -> list[str]:
    """What a command says of how much there is of an unfinished cache: fewer images give another result."""
    return [line for line in said.splitlines() if "UNFINISHED" in line]


def result(command: str, place: Place) -> dict[str, str]:
    """What a command that succeeded has written, by file: sha256."""
    match command.split()[0]:
        case "train" if "--dry-run" not in command:
            files = list((place.out / "made" / "student").rglob("*.safetensors"))
        case "convert":
            files = list((place.out / "made").rglob("*"))
        case "mend" | "extract" | "drop" | "stats" | "pictures":
            files = list(place.cache.rglob("*"))
        case "probe":
            return {"knn": found_by_probe(place.out / "made")}
        case _:
            return {}
    apart = (
        {"commits", ".digests"} if command == "stats" else {"commits", "stats", ".digests"}
    )  # records tell the time, moments are checked when read, the memory tells what was read in which order
    names = {file.relative_to(place.case).as_posix(): file for file in files if file.is_file()}
    names = {name: file for name, file in names.items() if not apart & set(name.split("/"))}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in names.items()}


def found_by_probe(out: Path) -> str:
    """The numbers of a probe's result."""
    tables = [json.loads(file.read_bytes()) for file in sorted(out.rglob("results/*.json"))]
    return json.dumps(
        [{key: value for key, value in table.items() if key in ("accuracy", "settings", "id")} for table in tables]
    )


class Fuzz:
    """Runs cases of one seed on one set of caches."""

    def __init__(self, work: Path, seed: int) -> None:
        self.place, self.seed = Place(work), seed
        made_caches(work)
        gc.collect()
        gc.freeze()  # forked processes then copy few pages
        self.nothing = forked(lambda: None, work, work / "said").bytes

    @functools.cache  # noqa: B019
    def whole(self, base: str, command: str) -> tuple[str, dict[str, str]]:
        """What a command says of the whole cache, and its result: it must succeed where the cache is finished."""
        self.place.prepare(base)
        steps = steps_of(command, base, self.place)
        ended = forked(lambda: run_steps(steps), self.place.case / "folder", self.place.work / "said", seconds=120)
        if ended.code != 0 and "unfinished" not in base:
            raise RuntimeError(f"{command} fails on the whole cache {base!r}: {ended}")
        return ended.said, result(command, self.place)

    def case(self, number: int, *, show: bool = False) -> tuple[list[str], Ended]:
        """What is wrong with how a case ended (kinds), and its end; said aloud where something is."""
        rng = np.random.default_rng([self.seed, number])
        base, command = pick(rng, list(BASES)), pick(rng, list(COMMANDS), list(COMMANDS.values()))
        usual, expected = self.whole(base, command)
        self.place.prepare(base)
        mutation = self.mutated(rng)
        before, steps = self.place.others(), steps_of(command, base, self.place)
        ended = forked(lambda: run_steps(steps), self.place.case / "folder", self.place.work / "said")
        ended = dataclasses.replace(ended, bytes=ended.bytes - self.nothing)
        changed = sorted(name for name, _ in self.place.others().items() ^ before.items())
        changed = [name for name in changed if name != str(self.place.work / "said")]
        wrong = (
            wrong_end(ended, usual, names=command != "diff", everything="--json" in command)
            + ["ran"] * any("RAN" in name for name in changed)
            + ["outside"] * bool(changed)
        )
        if ended.code == 0 and not mutation.forged:
            found, mine = result(command, self.place), f"cache/{mutation.file}"
            if command == "mend" and not mutation.same:
                mine = ""  # nothing may be left of the mutation
            other = any(
                found.get(name) != sha
                for name, sha in expected.items()
                if not mine or not f"{name}/".startswith(f"{mine}/")
            )
            wrong += ["wrong"] * (other and unfinished(usual) == unfinished(ended.said))
            wrong += ["missed"] * (command == "verify --full" and not mutation.same)
        if wrong or show:
            click.echo(f"{', '.join(wrong).upper() or 'right'}: case {number} of seed {self.seed}: {base}: {mutation}\n  {command}: status "
                       f"{ended.code}, {ended.seconds:.1f} s, {ended.bytes >> 20} MB {changed[:3]}\n"
                       f"    {told(ended.said)}".replace("\n", "\n    "), err=True)  # fmt: skip
        return wrong, ended

    def mutated(self, rng: np.random.Generator) -> Mutation:
        """Mutate the case's cache, in a process of its own: some mutations take memory or threads."""
        told = self.place.work / "mutation"

        def change() -> None:
            sys.set_int_max_str_digits(0)
            told.write_text(json.dumps(dataclasses.asdict(mutate(self.place.cache, self.place.case / "outside", rng))))

        ended = forked(change, self.place.case, self.place.work / "said", seconds=60)
        if ended.code != 0:
            raise RuntimeError(f"a mutation failed: {ended.said}")
        return Mutation(**json.loads(told.read_bytes()))


def told(said: str) -> str:
    """What a command said, of a traceback the end."""
    before, mark, trace = said.partition("Traceback (most recent")
    return "\n".join([before[-2000:].strip(), *trace.splitlines()[-12:]]) if mark else said[-2000:].strip()


def wrong_end(ended: Ended, usual: str, *, names: bool = True, everything: bool = False) -> list[str]:
    """Kinds of what is wrong with an end. usual: what the command says of the whole cache. names: it should name a file; the
    fields that differ are what `diff` names, the images of a part are what a probe names. everything: it shows all there is to
    programs, however long."""
    if ended.code is None:
        return ["slow"]
    memory = ["memory"] * (ended.bytes > BYTES)
    if "Traceback (most recent" in ended.said or ended.code not in (0, 1):
        return [*memory, "crashed"]
    unclear = (
        names
        and ended.code == 1
        and "DATA: " not in ended.said
        and ended.said != usual
        and not NAMED.search(ended.said)
    )
    return memory + ["unclear"] * (unclear or len(ended.said) > SHOWN and not (everything and ended.code == 0))


# --- the soak


def done_before(out: Path, seed: int) -> set[tuple[str, str]]:
    """First case and count of the pieces that have a row of this commit and seed."""
    if not out.exists():
        return set()
    with open(out, newline="") as file:
        return {
            (r["first"], r["cases"]) for r in csv.DictReader(file) if (r["commit"], r["seed"]) == (commit(), str(seed))
        }


@click.command()
@click.option("--cases", default=5000, type=click.IntRange(1), help="How many, from --first on.")
@click.option("--first", default=0, type=click.IntRange(0))
@click.option("--case", "only", multiple=True, type=int, help="Run these alone and show what happens.")
@click.option("--piece", default=250, type=click.IntRange(1), help="Cases per row.")
@click.option("--seed", default=0, type=click.IntRange(0))
@click.option("--folder", type=click.Path(path_type=Path), help="Where caches lie for a while; default: the system's.")
@click.option("--out", default=ROOT / "results" / "fuzz.csv", type=click.Path(path_type=Path))
def main(cases: int, first: int, only: tuple[int, ...], piece: int, seed: int, folder: Path | None, out: Path) -> None:
    """Mutate caches and run commands on them."""
    failed, before = 0, done_before(out, seed)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        os.environ |= {"HOME": f"{work}/home", "TMPDIR": f"{work}/tmp"}
        for name in ("home", "tmp"):
            (Path(work) / name).mkdir()
        fuzz = Fuzz(Path(work).resolve(), seed)
        for number in only:
            failed += bool(fuzz.case(number, show=True)[0])
        for start in range(first, first + cases, piece) if not only else ():
            numbers = range(start, min(start + piece, first + cases))
            if (str(start), str(len(numbers))) in before:
                continue
            row = soaked(fuzz, numbers)
            failed += row["failed"]
            append(out, [row | {"seed": seed} | {name: machine("cpu")[name] for name in ("commit", "date")}])
            click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
    raise SystemExit(bool(failed))


def soaked(fuzz: Fuzz, numbers: range) -> dict[str, Any]:
    """The row of a piece."""
    counts, seconds, most = Counter[str](), 0.0, 0
    for number in numbers:
        wrong, ended = fuzz.case(number)
        counts.update([*wrong, "succeeded" if ended.code == 0 else "told"])
        counts["failed"] += bool(wrong)
        seconds, most = max(seconds, ended.seconds), max(most, ended.bytes)
    return {"first": numbers.start, "cases": len(numbers), "failed": counts["failed"], "succeeded": counts["succeeded"],
            "told": counts["told"], **{kind: counts[kind] for kind in KINDS}, "most_s": seconds, "most_mb": most >> 20}  # fmt: skip


if __name__ == "__main__":
    main()
