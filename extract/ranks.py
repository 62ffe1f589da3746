"""Several processes, one extraction: who does which shards, and how the others wait for the one that plans.

A shard belongs to one process, by its number alone, and what is computed for it does not depend on how many there are.
Processes see each other only through the cache's folder, so they may run on different machines, or one after another.
"""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from mrmae.shards import commit as commits
from mrmae.shards import plan as plans
from mrmae.shards.commit import Unit
from mrmae.shards.extend import in_order_of
from mrmae.shards.plan import Plan
from mrmae.shards.samples import read_samples
from mrmae.shards.spec import compare_specs

POLL_SECONDS = 0.2
OTHER_PLAN_SECONDS = 3600.0  # so long the leading process may hash new images before it extends the plan
SAY_AFTER_SECONDS, SAY_EVERY_SECONDS = 10.0, 60.0
Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Part:
    """This process's share: shards whose number is `index` modulo `of`. Number 0 plans and calibrates for all."""

    index: int = 0
    of: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process plans and calibrates."""
        return self.index == 0

    def owns(self, shard: int) -> bool:
        """Whether the shard is this process's work."""
        return shard % self.of == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def part_of(shards: str, environment: Mapping[str, str] = os.environ) -> Part:
    """This process's part: rank RANK of WORLD_SIZE (torchrun sets both) within part i of n, for `shards` = 'i/n'.

    Raises ValueError for anything else than 0 <= i < n.
    """
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    match = re.fullmatch(r"(\d+)/(\d+)", shards or "0/1")
    index, of = (int(match[1]), int(match[2])) if match else (1, 0)
    if not index < of:
        raise ValueError(f"--shards {shards}: is no part; expected i/n with 0 <= i < n, e.g. "
                         "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT with --array=0-7")  # fmt: skip
    return Part(index * world + rank, of * world)


def local_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(number of this process on its machine, how many there are), as torchrun says."""
    return int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))


def wait_for_plan(job_path: Path, wanted: Plan, keys: set[str]) -> Plan:
    """The plan on disk, as soon as it is `wanted` (but for the data set, not hashed here), calibrated, and has these images.

    One that goes on lacking some is returned, too. ValueError when another plan stays there.
    """
    why, began = ["there is none yet"], time.monotonic()

    def ready() -> Plan | None:
        if not (job_path / "plan.json").exists():
            return None
        found = plans.load_plan(job_path)
        same = dataclasses.replace(in_order_of(found, wanted), quantisers=found.quantisers, dataset_id=found.dataset_id,
                                   n_samples=found.n_samples, appended=found.appended)  # fmt: skip
        try:
            compare_specs(found.to_json(), same.to_json(), "the plan there")
        except ValueError as error:
            if time.monotonic() - began > OTHER_PLAN_SECONDS:
                raise
            why[0] = str(error)
            return None
        if set(found.quantisers) != {teacher.column for teacher in found.columns}:
            why[0] = "it is not calibrated yet"
            return None
        lacks = not keys <= set(read_samples(job_path, found.n_rows)["key"])
        if lacks and time.monotonic() - began <= OTHER_PLAN_SECONDS:
            why[0] = "it does not have all of these images"
            return None
        return found

    return wait(ready, lambda: f"{job_path}: waiting for part 0 (rank 0) to plan: {why[0]}")


def wait_for_shards(path: Path, plan: Plan) -> None:
    """Return when every shard is committed, by whomever."""
    left: list[Unit] = commits.missing(path, plan)

    def ready() -> bool | None:
        left[:] = [unit for unit in left if commits.valid_record(path, plan, *unit) is None]
        return not left or None

    wait(ready, lambda: f"{path}: waiting for other ranks: {len(left)} shards are not committed yet")


def wait(ready: Callable[[], Found | None], what: Callable[[], str]) -> Found:
    """What `ready` returns, once it is not None; says now and then on stderr what it waits for."""
    said = time.monotonic() - SAY_EVERY_SECONDS + SAY_AFTER_SECONDS
    while (found := ready()) is None:
        if time.monotonic() - said >= SAY_EVERY_SECONDS:
            said = time.monotonic()
            print(what(), file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    return found
