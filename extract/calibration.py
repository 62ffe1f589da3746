"""Calibration: the quantisers of columns that have none yet, from the first samples; what it computes is not computed again."""

import dataclasses
import itertools
import time
from collections.abc import Mapping

from torch import Tensor

from mrmae.common.progress import Progress
from mrmae.extract.job import Job, cut, known_pixels, unfinished, view_pixels
from mrmae.extract.prepare import Prepared, prepared_batches
from mrmae.extract.teachers import Features
from mrmae.shards.format import (
    CALIBRATION_SAMPLES,
    Quantiser,
    calibrate,
    first_rows,
    freeze_quantisers,
    measure,
    quantise,
)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A batch that calibration has decoded: its samples with every view that is to be extracted, and view 0's features by column.

    Pixels of view 0 are there only where a teacher has still to see them.
    """

    prepared: list[Prepared]
    features: dict[str, Features]


KeptBatches = dict[tuple[int, int], Kept]  # by shard and first number


def calibrated(job: Job) -> tuple[Job, KeptBatches]:
    """The job with every column's quantiser frozen in its plan, and the batches that calibration has seen.

    The first 256 readable samples in canonical order, view 0: a random part of the data set. They are neither decoded nor
    shown to the teachers again afterwards.
    """
    pending = {column: t for column, t in job.teachers.items() if column not in job.plan.quantisers}
    if not pending:
        return job, {}
    kept: KeptBatches = {}
    if job.options.dtype == "float16":
        found = {column: Quantiser(job.options.dtype) for column in pending}
    else:
        kept = calibration_batches(dataclasses.replace(job, teachers=pending))
        found = {column: calibrate(*features_of(kept, column), dtype=job.options.dtype) for column in pending}
    plan = freeze_quantisers(job.path, job.plan, {**job.plan.quantisers, **found})
    todo = unfinished(job)
    return dataclasses.replace(job, plan=plan), {place: batch for place, batch in kept.items() if place[0] in todo}


def calibration_batches(job: Job) -> KeptBatches:
    """Whole batches until 256 samples are readable. ValueError when no image is."""
    kept: KeptBatches = {}
    readable, reason, todo = 0, "", unfinished(job)
    # Decoded with all the views that this process extracts, so that no image is decoded twice.
    work = cut({shard: [*todo.get(shard, []), (0, "")] for shard in range(job.plan.n_shards)}, job)
    batches = prepared_batches(
        job.images, job.plan.recipe, itertools.takewhile(lambda _: readable < CALIBRATION_SAMPLES, work), known_pixels(job),
        workers=job.options.workers, in_turns=job.in_turns,
    )  # fmt: skip
    seen_by_all = len(job.teachers) == len(job.plan.columns)
    first = min(CALIBRATION_SAMPLES, job.plan.n_images)
    with Progress("calibrating", first, left=work_of(job, first), pace=job.pace) as progress:
        began = time.monotonic()
        for batch, prepared in batches:
            decoded = time.monotonic()
            progress.spent("decode", len(prepared), job.decoding(prepared, decoded - began))
            place, here = (batch.shard, batch.numbers.start), sum(0 in p.pixels for p in prepared)
            if readable >= CALIBRATION_SAMPLES:  # decoded together with the last that were needed
                kept[place], began = Kept(prepared, {}), time.monotonic()
                continue
            features = {}
            if here:
                pixels = view_pixels(prepared, 0)
                features = {c: teacher.forward(pixels) for c, teacher in job.teachers.items()}
            kept[place] = Kept(without(0, prepared) if seen_by_all else prepared, features)
            progress.spent("forward", len(prepared), time.monotonic() - decoded)
            if features and not readable:
                try_storing(job, features, len(prepared), progress)
            readable += here
            reason = next((p.rows[0].reason or "" for p in prepared if p.rows[0].reason), reason)
            progress.add(len(prepared))
            began = time.monotonic()
    if not readable:
        raise ValueError(f"{job.path}: none of the {job.plan.n_images} images can be read, the first says: {reason}; "
                         "expected photographs; check IMAGES")  # fmt: skip
    return kept


def without(view: int, prepared: list[Prepared]) -> list[Prepared]:
    """The samples without this view's pixels, which nobody will look at again."""
    return [dataclasses.replace(p, pixels={v: x for v, x in p.pixels.items() if v != view}) for p in prepared]


def work_of(job: Job, calibrating: int) -> dict[str, int]:
    """How often each kind of work is still to be done by this process, calibration included: what an ETA is made of."""
    batches = list(cut(unfinished(job), job))
    views = sum(len(batch.numbers) * len(batch.views) for batch in batches)
    images = sum(len(batch.numbers) for batch in batches)
    return {
        "calibrate": calibrating,
        "decode": max(images, calibrating),
        "forward": max(views, calibrating),
        "store": views,
    }


def try_storing(job: Job, features: Mapping[str, Features], n: int, progress: Progress) -> None:
    """Calibrate on one batch and quantise it, for nothing but to know how long these take."""
    for _ in range(2):  # the first time is slower
        began = time.monotonic()
        found = {column: calibrate(f.tokens, dtype=job.options.dtype) for column, f in features.items()}
        calibrated_at = time.monotonic()
        for column, f in features.items():
            measure(f.tokens, *quantise(f.tokens, found[column]), found[column])
        progress.pace.add("calibrate", n, calibrated_at - began)
        progress.pace.add("store", n, time.monotonic() - calibrated_at)


def features_of(kept: KeptBatches, column: str) -> list[Tensor]:
    """Tokens [b, l, d] of a column, batch by batch, of the first 256 samples."""
    seen = [batch.features[column].tokens for batch in kept.values() if column in batch.features]
    return [tokens.cpu() for tokens in first_rows(seen, CALIBRATION_SAMPLES)]
