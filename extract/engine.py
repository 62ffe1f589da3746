"""The work of an extraction: all teachers on the same decoded views, quantised, written and committed shard by shard.

What is left to do is always the plan minus the valid commits, so stopping anywhere and starting again is the same run.
"""

import dataclasses
import functools
import importlib.metadata
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrmae.extract.decode import Batch, Images, Prepared, StoredRows, prepared_batches, stored_rows
from mrmae.extract.options import Options
from mrmae.extract.progress import Pace, Progress
from mrmae.extract.teachers import Features, Teacher
from mrmae.shards import commit as commits
from mrmae.shards import plan as plans
from mrmae.shards.plan import PIXELS, Plan
from mrmae.shards.quantize import CALIBRATION_SAMPLES, Measured, Quantiser, calibrate, measure, quantise, summarise
from mrmae.shards.webdataset_io import PixelRow


class HopelessQuality(ValueError):
    """A shard whose quantised features are too far from the teacher's; it is not committed."""


Kept = dict[tuple[int, int, str], Features]  # calibration's features of view 0, by shard, first number, column


@dataclasses.dataclass(frozen=True)
class Job:
    """An extraction under way: the plan on disk, the images, and a teacher for every column."""

    path: Path
    plan: Plan
    images: Images
    teachers: Mapping[str, Teacher]
    options: Options
    pace: Pace = dataclasses.field(default_factory=Pace)


# --- calibration


def calibrated(job: Job) -> tuple[Job, Kept]:
    """The job with every column's quantiser frozen in its plan, and the features that calibration computed.

    The first 1,024 readable samples in canonical order, view 0: a random part of the data set. They are not computed
    again afterwards.
    """
    pending = {column: t for column, t in job.teachers.items() if column not in job.plan.quantisers}
    if not pending:
        return job, {}
    kept: Kept = {}
    if job.options.dtype == "float16":
        found = {column: Quantiser(job.options.dtype) for column in pending}
    else:
        kept = calibration_features(dataclasses.replace(job, teachers=pending))
        found = {column: calibrate(first_rows(kept, column), dtype=job.options.dtype) for column in pending}
    plan = plans.freeze_quantisers(job.path, job.plan, {**job.plan.quantisers, **found})
    return dataclasses.replace(job, plan=plan), kept


def calibration_features(job: Job) -> Kept:
    """Features of view 0 for whole batches until 1,024 samples are readable. ValueError when no image is."""
    kept: Kept = {}
    readable, reason = 0, ""
    work = cut({shard: [(0, column) for column in job.teachers] for shard in range(job.plan.n_shards)}, job)
    batches = prepared_batches(job.images, job.plan.recipe, work, known_pixels(job), workers=job.options.workers)
    first = min(CALIBRATION_SAMPLES, job.plan.n_images)
    # Their forward is done here, so that shards which hold them take less time later.
    left = {"calibrating": first, "known": first * job.plan.n_views}
    left["new"] = max(0, views_of(unfinished(job), job) - left["known"])
    with Progress("calibrating", first, left=left, pace=job.pace) as progress:
        for batch, prepared in batches:
            pixels = view_pixels(prepared, 0)
            if pixels is not None:
                for column, teacher in job.teachers.items():
                    kept[batch.shard, batch.numbers.start, column] = teacher.forward(pixels)
                readable += len(pixels)
            reason = next((p.rows[0].reason or "" for p in prepared if p.rows[0].reason), reason)
            progress.add(len(prepared))
            job.pace.add("known", len(prepared), sum(p.seconds for p in prepared) / job.options.workers)
            if readable >= CALIBRATION_SAMPLES:
                batches.close()
                break
    if not readable:
        raise ValueError(f"{job.path}: none of the {job.plan.n_images} images can be read, the first says: {reason}; "
                         "expected photographs; check IMAGES")  # fmt: skip
    return kept


def first_rows(kept: Kept, column: str) -> Tensor:
    """Tokens [n, l, d] of the first 1,024 samples of a column."""
    return torch.cat([f.tokens.cpu() for key, f in kept.items() if key[2] == column])[:CALIBRATION_SAMPLES]


# --- the shards


def extract_missing(job: Job, kept: Kept) -> None:
    """Compute, write and commit every shard of this process's part that is not committed yet.

    One shard is written while the next is computed.
    """
    todo = unfinished(job)
    stream = prepared_batches(
        job.images, job.plan.recipe, cut(todo, job), known_pixels(job), workers=job.options.workers
    )
    total, known = views_of(todo, job), views_of(todo, job, kept)
    unit = "views" if job.plan.n_views > 1 else "images"
    what = "extracting" + (f" part {job.options.part}" if job.options.part.of > 1 else "")
    left = {"new": total - known, "known": known}
    with Progress(what, total, unit, left=left, pace=job.pace) as progress, ThreadPoolExecutor(1, "write") as writer:
        writing: deque[Future[None]] = deque()
        for shard, units in todo.items():
            parts = shard_parts(job, shard, units, stream, kept, progress)
            while len(writing) > 1:
                writing.popleft().result()
            writing.append(writer.submit(store, job, shard, parts, progress))
        while writing:
            writing.popleft().result()


def refuse_requantised(job: Job, column: str) -> None:
    """ValueError for a column that was made from another one: what its teacher says is not what it holds."""
    quantiser = job.plan.quantisers.get(column)
    if quantiser is not None and quantiser.source is not None:
        raise ValueError(f"{job.path}: {column} was made by inspect-cache convert from column {quantiser.source[:19]} and "
                         "has shards missing; only that can write them: repeat the command that made this cache")  # fmt: skip


def unfinished(job: Job) -> dict[int, list[tuple[int, str]]]:
    """(view, column) of everything that this process's part has to do, by shard."""
    todo: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for view, column, shard in commits.missing(job.path, job.plan):
        refuse_requantised(job, column)
        if job.options.part.owns(shard):
            todo[shard].append((view, column))
    return todo


def views_of(todo: Mapping[int, Sequence[tuple[int, str]]], job: Job, kept: Kept | None = None) -> int:
    """How many views the batches of these shards hold; kept: only of batches among these."""
    starts = None if kept is None else {(shard, start) for shard, start, _ in kept}
    return sum(len(batch.numbers) * len(batch.views) for batch in cut(todo, job)
               if starts is None or (batch.shard, batch.numbers.start) in starts)  # fmt: skip


def cut(todo: Mapping[int, Sequence[tuple[int, str]]], job: Job) -> Iterator[Batch]:
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


@dataclasses.dataclass
class Part:
    """What a shard of one (view, column) gathers batch by batch: rows for the pixels, arrays for a teacher."""

    rows: list[PixelRow] = dataclasses.field(default_factory=list)
    arrays: dict[str, list[Tensor]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    measured: list[Measured] = dataclasses.field(default_factory=list)
    valid: list[bool] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))


Parts = dict[tuple[int, str], Part]


def shard_parts(
    job: Job,
    shard: int,
    units: Sequence[tuple[int, str]],
    stream: Iterator[tuple[Batch, list[Prepared]]],
    kept: Kept,
    progress: Progress,
) -> Parts:
    """Everything of one shard, in memory: rows of pixels, codes of teachers."""
    parts: Parts = {unit: Part() for unit in units}
    samples = len(job.plan.ranges[shard])
    for _ in range(-(-samples // job.options.batch_size)):
        waited = time.monotonic()
        batch, prepared = next(stream)
        waited = time.monotonic() - waited
        assert batch.shard == shard, "batches come in the order of the shards"
        known = any((shard, batch.numbers.start, column) in kept for _, column in parts)
        for (view, column), part in parts.items():
            if column == PIXELS:
                part.rows += [p.rows[view] for p in prepared]
                part.seconds["decode"] += sum(p.seconds for p in prepared) / len(batch.views)
                part.seconds["decode_wait"] += waited
            else:
                features = kept.pop((shard, batch.numbers.start, column), None) if view == 0 else None
                take(job, column, part, prepared, view, features)
        progress.add(len(prepared) * len(batch.views), kind="known" if known else "new")
    return parts


def take(job: Job, column: str, part: Part, prepared: Sequence[Prepared], view: int, features: Features | None) -> None:
    """Add one batch to a teacher's part: forward (unless calibration did it), quantise, measure."""
    began = time.monotonic()
    pixels = view_pixels(prepared, view)
    part.valid += [view in p.pixels for p in prepared]
    if pixels is None:
        return
    features = features or job.teachers[column].forward(pixels)
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
    part.seconds["forward"] += time.monotonic() - began


def view_pixels(prepared: Sequence[Prepared], view: int) -> Tensor | None:
    """uint8 [n, h, w, 3] of the readable samples; None where there are none."""
    pixels = [p.pixels[view] for p in prepared if view in p.pixels]
    return torch.from_numpy(np.stack(pixels)) if pixels else None


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


@functools.cache
def versions() -> dict[str, str]:
    """What is installed of what computes, found without importing it: open_clip alone would take seconds."""
    packages = {"torch": "torch", "timm": "timm", "open_clip": "open_clip_torch", "numpy": "numpy", "PIL": "pillow"}
    return {name: importlib.metadata.version(package) for name, package in packages.items()}
