"""The work of an extraction: all teachers on the same decoded views, quantised, written and committed shard by shard.

What is left to do is always the plan minus the valid commits, so stopping anywhere and starting again is the same run.
"""

import contextlib
import dataclasses
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrmae.common.progress import Progress
from mrmae.common.versions import versions
from mrmae.extract.calibration import KeptBatches
from mrmae.extract.job import Job, cut, known_pixels, unfinished, view_pixels
from mrmae.extract.options import Options
from mrmae.extract.prepare import Batch, Prepared, prepared_batches
from mrmae.extract.teachers import Features
from mrmae.extract.workers import Units, wait_for_writers
from mrmae.shards import claims
from mrmae.shards import commit as commits
from mrmae.shards.claims import Claim
from mrmae.shards.format import PIXELS, Measured, measure, quantise, summarise
from mrmae.shards.store import PixelRow


class HopelessQuality(ValueError):
    """A shard whose quantised features are too far from the teacher's; it is not committed."""


def extract_missing(job: Job, kept: KeptBatches) -> None:
    """Compute, write and commit every shard of this process's part that is not committed yet.

    kept: what calibration has seen; emptied. Shards that another process has claimed come last: it may have done them by then.
    """
    todo = unfinished(job)
    while todo:
        todo = wait_for_writers(job.path, job.plan, extract_claimed(job, todo, kept))


def extract_claimed(job: Job, todo: Mapping[int, Units], kept: KeptBatches) -> dict[int, Units]:
    """The shards among `todo` that another process had claimed; all others are committed. One is written while the next is computed."""
    batches = list(cut(todo, job))
    total = sum(len(batch.numbers) * len(batch.views) for batch in batches)
    unit = "views" if job.plan.n_views > 1 else "images"
    what = "extracting" + (f" part {job.options.part}" if job.options.part.of > 1 else "")
    mine = Claimed(job, todo)
    with (
        contextlib.closing(mine),
        Progress(what, total, unit, left=work_of(batches, kept), pace=job.pace) as progress,
        ThreadPoolExecutor(1, "write") as writer,
        contextlib.closing(prepared_batches(
            job.images, job.plan.recipe, mine.batches(), known_pixels(job), workers=job.options.workers, in_turns=job.in_turns,
            ready={place: batch.prepared for place, batch in kept.items()},
        )) as stream,
    ):  # fmt: skip
        writing: Future[None] | None = None
        for shard, batches_of in itertools.groupby(timed(stream), key=lambda item: item[0].shard):
            parts = shard_parts(job, mine.units[shard], batches_of, kept, progress)
            if writing is not None:
                writing.result()
            writing = writer.submit(store_claimed, job, shard, parts, progress, mine)
        if writing is not None:
            writing.result()
    return mine.others


class Claimed:
    """The shards of `todo` as this process claims them, one after the other, just before their images are decoded.

    units: what each of them lacks; others: those that another process had claimed.
    """

    def __init__(self, job: Job, todo: Mapping[int, Units]) -> None:
        self.job, self.todo = job, todo
        self.units: dict[int, Units] = {}
        self.others: dict[int, Units] = {}
        self.claims: dict[int, Claim] = {}

    def batches(self) -> Iterator[Batch]:
        """The batches of the shards that were claimed and still lack something."""
        for shard, units in self.todo.items():
            claim = claims.take(claims.shard_lock(self.job.path, shard))
            if claim is None:
                self.others[shard] = units
                continue
            self.claims[shard] = claim
            self.units[shard] = [
                u for u in units if commits.valid_record(self.job.path, self.job.plan, *u, shard) is None
            ]
            if self.units[shard]:
                yield from cut({shard: self.units[shard]}, self.job)
            else:
                self.release(shard)

    def release(self, shard: int) -> None:
        """Let others have the shard."""
        self.claims.pop(shard).release()

    def close(self) -> None:
        """Let go of all that is left."""
        for shard in list(self.claims):
            self.release(shard)


def work_of(batches: Sequence[Batch], kept: KeptBatches) -> dict[str, int]:
    """How often each kind of work is still to be done: what an ETA is made of."""
    views = sum(len(batch.numbers) * len(batch.views) for batch in batches)
    known = {place: len(batch.prepared) * bool(batch.features) for place, batch in kept.items()}
    decoded = sum(len(batch.numbers) for batch in batches if (batch.shard, batch.numbers.start) in known)
    images = sum(len(batch.numbers) for batch in batches)
    return {"decode": images - decoded, "forward": views - sum(known.values()), "store": views}


@dataclasses.dataclass
class Part:
    """What a shard of one (view, column) gathers batch by batch: rows for the pixels, arrays for a teacher."""

    rows: list[PixelRow] = dataclasses.field(default_factory=list)
    arrays: dict[str, list[Tensor]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    measured: list[Measured] = dataclasses.field(default_factory=list)
    valid: list[bool] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))


Parts = dict[tuple[int, str], Part]
Waited = tuple[Batch, list[Prepared], float]


def timed(stream: Iterator[tuple[Batch, list[Prepared]]]) -> Iterator[Waited]:
    """The batches, each with the seconds that it was waited for."""
    began = time.monotonic()
    for batch, prepared in stream:
        yield batch, prepared, time.monotonic() - began
        began = time.monotonic()


def shard_parts(job: Job, units: Units, batches: Iterator[Waited], kept: KeptBatches, progress: Progress) -> Parts:
    """Everything of one shard, in memory: rows of pixels, codes of teachers. batches: those of the shard."""
    parts: Parts = {unit: Part() for unit in units}
    for batch, prepared, waited in batches:
        seen = kept.pop((batch.shard, batch.numbers.start), None)
        if seen is None:
            progress.spent("decode", len(prepared), job.decoding(prepared, waited))
        for view in batch.views:
            known = seen.features if seen is not None and view == 0 else {}
            here = {column: part for (of, column), part in parts.items() if of == view}
            if PIXELS in here:
                add_rows(
                    here.pop(PIXELS),
                    prepared,
                    view,
                    decode=sum(p.seconds for p in prepared) / len(batch.views),
                    wait=waited,
                )
            spent = [take(job, column, part, prepared, view, known.get(column)) for column, part in here.items()]
            if not known:
                progress.spent("forward", len(prepared), sum(forward for forward, _ in spent))
            progress.spent("store", len(prepared), sum(quantised for _, quantised in spent))
        progress.add(len(prepared) * len(batch.views))
    return parts


def add_rows(part: Part, prepared: Sequence[Prepared], view: int, *, decode: float, wait: float) -> None:
    """Add one batch to a view's pixels. decode, wait: seconds of the pool's threads, and of waiting for them."""
    part.rows += [p.rows[view] for p in prepared]
    part.seconds["decode"] += decode
    part.seconds["decode_wait"] += wait


def take(
    job: Job, column: str, part: Part, prepared: Sequence[Prepared], view: int, features: Features | None
) -> tuple[float, float]:
    """Add one batch to a teacher's part: forward (unless calibration did it), quantise, measure; the seconds of both."""
    began = time.monotonic()
    valid = [p.rows[view].jpeg is not None for p in prepared]
    part.valid += valid
    if not any(valid):
        return 0.0, 0.0
    features = features or job.teachers[column].forward(view_pixels(prepared, view))
    forward_at = time.monotonic()
    where = f"{job.path}: {column}, view {view}, samples {prepared[0].number} to {prepared[-1].number}"
    try:
        codes, scale = quantise(features.tokens, job.plan.quantisers[column])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    part.measured.append(measure(features.tokens, codes, scale, job.plan.quantisers[column]))
    stored = {"tokens": codes, "scale": scale, "cls": features.cls, "attention": features.attention,
              "norm": features.norm}  # fmt: skip
    for name, tensor in stored.items():
        if tensor is not None:
            part.arrays[name].append(tensor.cpu() if name == "tokens" else tensor.half().cpu())
    done = time.monotonic()
    part.seconds["forward"] += forward_at - began
    part.seconds["quantise"] += done - forward_at
    return forward_at - began, done - forward_at


def store_claimed(job: Job, shard: int, parts: Parts, progress: Progress, mine: Claimed) -> None:
    """Write and commit one shard, and let go of it."""
    store(job, shard, parts, progress)
    mine.release(shard)


def store(job: Job, shard: int, parts: Parts, progress: Progress) -> None:
    """Write and commit one shard: pixels first, so that a column never stands without its views.

    Raises HopelessQuality for a column that is too coarse, once all others are committed.
    """
    hopeless: list[HopelessQuality] = []
    for (view, column), part in sorted(parts.items(), key=lambda item: (item[0][1] != PIXELS, item[0])):
        about: dict[str, Any] = {"seconds": dict(part.seconds), **circumstances(job)}
        if column == PIXELS:
            commits.store_pixels(job.path, job.plan, view, shard, part.rows, about)
            progress.add(0, bytes=sum(len(row.jpeg or b"") for row in part.rows))
            continue
        arrays = whole_shard(part, job.plan.layout(column).arrays())
        if part.measured:
            about["quality"] = summarise(part.measured)
            if too_coarse(about["quality"]["snr_db"], job.options):
                hopeless.append(HopelessQuality(hopeless_text(job, view, column, shard, about["quality"]["snr_db"])))
                continue
        commits.store_column(job.path, job.plan, view, column, shard, arrays, part.valid, about)
        progress.add(0, bytes=sum(array.nbytes for array in arrays.values()))
    if hopeless:
        raise hopeless[0]


def too_coarse(snr_db: float, options: Options) -> bool:
    """Whether codes lose more of a shard than --min-snr allows; -300 dB says that there was no signal to lose."""
    return options.dtype != "float16" and -300 < snr_db < options.min_snr


def hopeless_text(job: Job, view: int, column: str, shard: int, snr_db: float) -> str:
    """Which shard is too coarse, and what can be done."""
    return (f"{job.path}: {column}, view {view}, shard {shard}: {job.options.dtype} keeps an SNR of {snr_db:.1f} dB; at least "
            f"{job.options.min_snr:g} were expected (--min-snr); use --dtype float16 with a new folder, leave this teacher out, "
            "or take it as it is with a lower --min-snr (what is committed stays, the same command goes on from there)")  # fmt: skip


def whole_shard(part: Part, stored: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray[Any, Any]]:
    """Every array with one row per sample of the shard; rows of bad images are zeros that are not written."""
    valid = np.array(part.valid, bool)
    arrays = {}
    for name, (shape, dtype) in stored.items():
        rows = torch.cat(part.arrays.pop(name)).numpy() if part.arrays[name] else np.zeros((0, *shape), dtype)
        arrays[name] = rows if valid.all() else np.zeros((len(valid), *shape), dtype)
        if not valid.all():
            arrays[name][valid] = rows
    return arrays


def circumstances(job: Job) -> dict[str, Any]:
    """What is recorded beside a shard and hashed nowhere: versions, device, time, command and where it was given."""
    return {"versions": versions(), "device": job.options.device, "written": int(time.time()),
            "command": job.options.command(), "folder": os.getcwd()}  # fmt: skip
