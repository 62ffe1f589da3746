"""Several processes, one extraction: whoever comes first plans, and each takes the next shard that nobody has claimed.

What is computed for a shard does not depend on who does it, or on how many there are. Processes see each other only through the
cache's folder: they may run on different machines, come and go, or run one after another.
"""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mrmae.common.backend import Url, exists
from mrmae.common.progress import counted, human_time
from mrmae.shards import claims
from mrmae.shards import commit as commits
from mrmae.shards.claims import Claim
from mrmae.shards.format import Plan, Unit
from mrmae.shards.plans import Agreed, Wanted, look, negotiate

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.2, 5.0  # between two looks: the longer the wait, the rarer
FAR_POLLS = 4  # times as long at a URL, where looks are requests, and a hundred idle processes would be throttled
GRACE_SECONDS = 900.0  # without a sign of life of who is waited for: a job array's first task may start that much later
LONGEST_SECONDS = 86_400.0  # even for one who lives: hashing ten million images, or a shard on a CPU, takes hours
SAY_AFTER_SECONDS, SAY_EVERY_SECONDS = 10.0, 60.0
SHOWN_UNITS = 5
Units = Sequence[tuple[int, str]]  # (view, column) of a shard
Awaited = TypeVar("Awaited")


@dataclasses.dataclass(frozen=True)
class ProcessPart:
    """This process's share: part `index` of `of`, where --shards names one, and there rank `rank` of `ranks`."""

    index: int = 0
    of: int = 1
    rank: int = 0
    ranks: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process speaks for its part, and finishes the cache where no part is named."""
        return self.rank == 0

    @property
    def first(self) -> bool:
        """Whether it is the one that is expected to plan; whoever comes before it does."""
        return self.index == self.rank == 0

    def owns(self, shard: int) -> bool:
        """Whether the shard belongs to this part; its ranks share it."""
        return shard % self.of == self.index

    def in_order(self, shards: Iterable[int]) -> list[int]:
        """Those of this part: this rank's own ones first, then what slower ranks have left, from behind."""
        mine: list[int] = []
        others: list[int] = []
        for shard in sorted(filter(self.owns, shards)):
            (mine if shard // self.of % self.ranks == self.rank else others).append(shard)
        return mine + others[::-1]

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def process_part(shards: str, environment: Mapping[str, str] = os.environ) -> ProcessPart:
    """This process's part: rank RANK of WORLD_SIZE (torchrun sets both) within part i of n, for `shards` = 'i/n'.

    Raises ValueError for anything else than 0 <= i < n.
    """
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    match = re.fullmatch(r"(\d+)/(\d+)", shards or "0/1")
    index, of = (int(match[1]), int(match[2])) if match else (1, 0)
    if not index < of:
        raise ValueError(f"--shards {shards}: is no part; expected i/n with 0 <= i < n, e.g. "
                         "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT with --array=0-7")  # fmt: skip
    return ProcessPart(index, of, rank, world)


def local_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(number of this process on its machine, how many there are), as torchrun says."""
    return int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))


def plan_of_others(path: Path, wanted: Wanted) -> Agreed | None:
    """The plan on disk, where it is calibrated and all that is wanted; None where something is to be planned first."""
    if not exists(path / "plan.json"):
        return None
    try:
        agreed = negotiate(look(path), dataclasses.replace(wanted, append=True, extend=False))
    except ValueError:
        return None  # who plans says what is wrong
    calibrated = set(agreed.plan.quantisers) == {teacher.column for teacher in agreed.plan.columns}
    return agreed if calibrated and not agreed.new and not agreed.steps else None


def take_the_plan(path: Path) -> Claim:
    """The lock of who plans, calibrates and finalises, once nobody else does."""
    lock = path / claims.PLAN_LOCK
    return wait_until(
        lambda: claims.take(lock),
        lambda: f"{path}: waiting for another process that plans or finishes this cache",
        lambda: claims.held_by(lock),
        "stop that process, then run this command again",
        FAR_POLLS if isinstance(path, Url) else 1.0,
    )


class ClaimedShards:
    """The shards of `todo` as this process claims them, one after the other, just before their images are decoded.

    units: what each shard lacks that is this process's; others: those that another process had claimed. Iterates over all, with
    nothing to do for others and for those that were done meanwhile.
    """

    def __init__(self, path: Path, plan: Plan, todo: Mapping[int, Units]) -> None:
        self.path, self.plan, self.todo = path, plan, todo
        self.units: dict[int, Units] = {}
        self.others: dict[int, Units] = {}
        self.claims: dict[int, Claim] = {}

    def __iter__(self) -> Iterator[tuple[int, Units]]:
        for shard, units in self.todo.items():
            claim = claims.take(claims.shard_lock(self.path, shard))
            if claim is None:
                self.others[shard] = units
                yield shard, []
                continue
            self.claims[shard] = claim
            lacks = [u for u in units if commits.valid_record(self.path, self.plan, *u, shard) is None]
            if lacks:
                self.units[shard] = lacks
            else:
                self.release(shard)
            yield shard, lacks

    def released_after(self, shard: int, write: Callable[[], None]) -> None:
        """Let others have the shard once it is written."""
        write()
        self.release(shard)

    def release(self, shard: int) -> None:
        """Let others have the shard."""
        self.claims.pop(shard).release()

    def close(self) -> None:
        """Let go of all that is left."""
        for shard in list(self.claims):
            self.release(shard)


def wait_for_writers(path: Path, plan: Plan, others: Mapping[int, Units]) -> dict[int, Units]:
    """Those of the shards that others had claimed which they let go of unfinished; as soon as there is one, or all are finished."""
    left = dict(others)

    def ready() -> dict[int, Units] | None:
        free = {shard: left[shard] for shard in left if claims.held_by(claims.shard_lock(path, shard)) is None}
        for shard, units in list(free.items()):
            if all(commits.valid_record(path, plan, *unit, shard) for unit in units):
                del free[shard], left[shard]
        return free if free or not left else None

    return wait_until(
        ready,
        lambda: f"{path}: waiting for the writers of {counted(len(left), 'shard')}, the first is shard {min(left)}",
        lambda: next((who for shard in left if (who := claims.held_by(claims.shard_lock(path, shard)))), None),
        "stop them, then run this command again",
        FAR_POLLS if isinstance(path, Url) else 1.0,
    )


def wait_for_shards(path: Path, plan: Plan) -> None:
    """Return when every shard is committed, by whomever. ValueError, naming them, for those that nobody commits."""
    left: list[Unit] = commits.missing(path, plan)
    counts: list[int] = [len(left)]

    def ready() -> bool | None:
        done = commits.valid_records(path, plan, left, few=True)
        left[:] = [unit for unit in left if unit not in done]
        return not left or None

    def living() -> str | None:
        counts.append(len(left))
        return "some are committed" if counts[-1] < counts.pop(0) else next(claims.writers(path), None)

    wait_until(
        ready,
        lambda: (
            f"{path}: waiting for other processes: {counted(len(left), 'shard is', 'shards are')} not committed yet: "
            f"{units_in_words(left)}"
        ),
        living,
        "run the same command again, it does them",
        FAR_POLLS if isinstance(path, Url) else 1.0,
    )


def units_in_words(units: Sequence[Unit]) -> str:
    """The first few units."""
    named = [f"shard {shard} of {column}, view {view}" for view, column, shard in units[:SHOWN_UNITS]]
    return "; ".join(named) + f" and {len(units) - SHOWN_UNITS} more" * (len(units) > SHOWN_UNITS)


def wait_until(
    ready: Callable[[], Awaited | None],
    what: Callable[[], str],
    living: Callable[[], str | None],
    todo: str,
    polls: float = 1.0,
) -> Awaited:
    """What `ready` returns, once it is not None; says now and then on stderr what it waits for, for whom and since when.

    living: who is at work on it, None where nobody is. polls: how many times as long as usual between two looks. ValueError, ending with `todo`, when nobody was for GRACE_SECONDS.
    """
    began = seen = time.monotonic()
    since, said = time.strftime("%H:%M:%S"), began - SAY_EVERY_SECONDS + SAY_AFTER_SECONDS
    while (found := ready()) is None:
        now, who = time.monotonic(), living()
        seen = now if who else seen
        text = f"{what()}, since {since}; {who or 'nobody'} is at work on it"
        if now - seen > GRACE_SECONDS or now - began > LONGEST_SECONDS:
            raise ValueError(f"{text}, and this has waited for {human_time(now - began)}; {todo}")
        if now - said >= SAY_EVERY_SECONDS:
            said = now
            print(text, file=sys.stderr, flush=True)
        time.sleep(polls * min(POLL_SECONDS + (now - began) / 100, LONGEST_POLL_SECONDS))
    return found
