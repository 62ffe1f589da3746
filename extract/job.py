"""An extraction under way, and what of it is still to do: the plan minus the valid commits."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mrmae.common.progress import Pace
from mrmae.extract.options import Options
from mrmae.extract.prepare import Batch, Images, Prepared, StoredRows, stored_rows
from mrmae.extract.teachers import Teacher
from mrmae.extract.workers import Units
from mrmae.shards import commit as commits
from mrmae.shards.format import PIXELS, Plan


@dataclasses.dataclass(frozen=True)
class Job:
    """An extraction under way: the plan on disk, the images, and a teacher for every column."""

    path: Path
    plan: Plan
    images: Images
    teachers: Mapping[str, Teacher]
    options: Options
    pace: Pace = dataclasses.field(default_factory=Pace)

    @property
    def in_turns(self) -> bool:
        """Whether decoding and teachers would compete for the same cores."""
        return self.options.device == "cpu"

    def decoding(self, prepared: Sequence[Prepared], waited: float) -> float:
        """Seconds that decoding these samples took from the run. waited: for this batch, which in turns is for several."""
        return sum(p.seconds for p in prepared) / self.options.workers if self.in_turns else waited


def unfinished(job: Job) -> dict[int, Units]:
    """(view, column) of everything that this process's part has to do, by shard."""
    todo: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for view, column, shard in commits.missing(job.path, job.plan):
        refuse_requantised(job, column)
        if job.options.part.owns(shard):
            todo[shard].append((view, column))
    return dict(todo)


def refuse_requantised(job: Job, column: str) -> None:
    """ValueError for a column that was made from another one: what its teacher says is not what it holds."""
    quantiser = job.plan.quantisers.get(column)
    if quantiser is not None and quantiser.source is not None:
        raise ValueError(f"{job.path}: {column} was made by inspect-cache convert from column {quantiser.source[:19]} and "
                         "has shards missing; only that can write them: repeat the command that made this cache")  # fmt: skip


def cut(todo: Mapping[int, Units], job: Job) -> Iterator[Batch]:
    """The batches of the shards to do, cut at fixed offsets inside each shard."""
    ranges = job.plan.ranges
    for shard, units in todo.items():
        views = tuple(sorted({view for view, _ in units}))
        for at in range(0, len(ranges[shard]), job.options.batch_size):
            yield Batch(shard, ranges[shard][at : at + job.options.batch_size], views)


def known_pixels(job: Job) -> Callable[[int], StoredRows]:
    """Gives the views of a shard whose pixels are committed: teachers added later see the same bytes."""

    def rows(shard: int) -> StoredRows:
        views = range(job.plan.n_views)
        there = [v for v in views if commits.valid_record(job.path, job.plan, v, PIXELS, shard) is not None]
        return {view: stored_rows(job.path, job.plan, view, shard) for view in there}

    return rows


def view_pixels(prepared: Sequence[Prepared], view: int) -> Tensor:
    """uint8 [n, h, w, 3] of the readable samples, at least one."""
    return torch.from_numpy(np.stack([p.pixels[view] for p in prepared if view in p.pixels]))
