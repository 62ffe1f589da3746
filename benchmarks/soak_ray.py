"""Actors of the Ray engine, killed by SIGKILL: python benchmarks/soak_ray.py [--kills 40].

A cluster of this machine and two actors extract the folder of images of soak_kills.py, a shard of one image each. An actor of this
command is killed in every life while it plans, and whenever something more is committed. At the end of a life everything committed is
verified in full, and every byte is that of one process's uninterrupted cache. A row of results/kills.csv per piece of ten kills;
exit 1 where anything went wrong.
"""

import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
from measure import ROOT, machine
from rows import append
from soak_kills import COLUMNS, PIECE, contents, photographs, wrong

from mrmae.extract.options import Options
from mrmae.extract.ray_engine import RayPool, connected, extract_on_ray
from mrmae.extract.run import extract_features
from mrmae.shards.format import ViewRecipe

TEACHERS = ("vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random")
ACTORS = 2
SHARE = 0.7  # of the moments at which something was committed


def options_for(work: Path, cache: Path) -> Options:
    """The extraction, into `cache`."""
    return Options(images=[work / "IMAGES"], cache=cache, recipe=ViewRecipe(32), grid=4, batch_size=4, device="cpu", workers=1, views=2,
                   teachers=TEACHERS, shard_samples=1)  # fmt: skip


def ancestors(pid: int) -> Iterator[int]:
    """The processes that a process descends from."""
    with contextlib.suppress(OSError, ValueError):
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            yield pid


def actors() -> list[int]:
    """The actors of this very process's cluster."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"ray::ShardWorker" in file.read_bytes() and os.getpid() in ancestors(int(file.parent.name)):
                found.append(int(file.parent.name))
    return found


def kill_actors(cache: Path, most: int, ended: threading.Event, rng: random.Random, killed: list[int]) -> None:
    """Kill actors until so many are, or the extraction has ended: one that plans, then one now and then when more is committed."""
    seen, planning = 0, cache / ".planning.lock"
    while not planning.exists() and not ended.wait(0.01):
        pass
    ended.wait(rng.uniform(0, 0.3))
    begun = [pid for pid in actors() if planning.exists() and f"process {pid} on" in planning.read_text()]
    for pid in begun:
        kill(pid, killed)
    while len(killed) < most and not ended.wait(0.02):
        there = len(list(cache.glob("commits/*/*/*.json")))
        if there > seen and (alive := actors()) and rng.random() < SHARE:
            kill(rng.choice(alive), killed)
        seen = max(seen, there)


def kill(pid: int, killed: list[int]) -> None:
    """SIGKILL, counted where it found somebody."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)


def life(work: Path, right: dict[str, object], most: int, rng: random.Random) -> Counter[str]:
    """What came of one cache whose actors were killed at most so often."""
    out, ended, killed = work / "OUT", threading.Event(), list[int]()
    shutil.rmtree(out, ignore_errors=True)
    thread = threading.Thread(target=kill_actors, args=(out, most, ended, rng, killed))
    thread.start()
    try:
        finished = bool(extract_on_ray(options_for(work, out), RayPool(ACTORS, gpus=0), say=lambda _: None))
    except ValueError as error:  # what the command ends with
        click.echo(f"WRONG: {error}", err=True)
        finished = False
    finally:
        ended.set()
        thread.join()
    found = wrong(out, right, ())
    for text in found:
        click.echo(f"WRONG: {text}", err=True)
    return Counter(events=len(killed), caches=1, invalid=len(found), finished=finished, equal=contents(out) == right)


@click.command()
@click.option("--kills", default=40, type=click.IntRange(1), help="At least so many.")
@click.option("--seed", default=0, type=int, help="Of the first piece; those that follow count on.")
@click.option("--out", default=ROOT / "results" / "kills.csv", type=click.Path(path_type=Path))
def main(kills: int, seed: int, out: Path) -> None:
    """Kill actors and count what came of it."""
    about = {name: value for name, value in machine("cpu").items() if name in ("commit", "date", "torch")}
    work, bad = Path(tempfile.mkdtemp()), 0
    photographs(work / "IMAGES", 12)
    extract_features(options_for(work, work / "WHOLE"), say=lambda _: None)
    right = contents(work / "WHOLE")
    with connected(RayPool(ACTORS + 1)):
        for number in range(seed, seed + -(-kills // PIECE)):
            rng, counts, began = random.Random(number), Counter[str](), time.monotonic()
            while counts["events"] < PIECE:
                counts += life(work, right, PIECE - counts["events"], rng)
            row = {
                "kind": "extract with Ray actors",
                **{name: counts[name] for name in COLUMNS},
                "told": "",
                "seed": number,
            }
            append(out, [row | about])
            click.echo(
                "  ".join(f"{name} {value}" for name, value in row.items()) + f"  in {time.monotonic() - began:.0f} s"
            )
            bad += counts["invalid"] + 2 * counts["caches"] - counts["finished"] - counts["equal"]
    if not bad:
        shutil.rmtree(work)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
