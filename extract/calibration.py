"""Calibration: the quantisers of columns that have none yet, from the first samples; what it computes is not computed again."""

import dataclasses
import itertools
from collections.abc import Sequence

from torch import Tensor

from mrmae.common.progress import Progress
from mrmae.extract.pipeline import ExtractJob, batches_decoded_ahead, planned_batches, unfinished, view_pixels
from mrmae.extract.prepare import KeptBatches, Prepared, PreparedBatch
from mrmae.shards.format import CALIBRATION_SAMPLES, NOT_QUANTISED, Quantiser, calibrate, first_rows, freeze_quantisers


def calibrated(job: ExtractJob) -> tuple[ExtractJob, KeptBatches]:
    """The job with every column's quantiser frozen in its plan, and the batches that calibration has seen.

    The first 256 readable samples in canonical order, view 0: a random part of the data set. They are neither decoded nor
    shown to the teachers again afterwards.
    """
    pending = {column: t for column, t in job.teachers.items() if column not in job.plan.quantisers}
    maps = [t.column for t in job.plan.columns if t.is_map and t.column not in job.plan.quantisers]
    if not pending and not maps:
        return job, {}
    kept: KeptBatches = {}
    if not pending or job.options.dtype == "float16":
        found = {column: Quantiser(job.options.dtype) for column in pending}
    else:
        kept = calibration_batches(dataclasses.replace(job, teachers=pending))
        found = {column: calibrate(*features_of(kept, column), dtype=job.options.dtype) for column in pending}
    plan = freeze_quantisers(job.path, job.plan, {**job.plan.quantisers, **found, **dict.fromkeys(maps, NOT_QUANTISED)})
    todo = unfinished(job)
    return dataclasses.replace(job, plan=plan), {place: batch for place, batch in kept.items() if place[0] in todo}


def calibration_batches(job: ExtractJob) -> KeptBatches:
    """Whole batches until 256 samples are readable, and those decoded together with the last. ValueError when no image is."""
    kept: KeptBatches = {}
    readable, reason, todo = 0, "", unfinished(job)
    # Decoded with all the views that this process extracts, so that no image is decoded twice.
    every = planned_batches(job, {shard: [*todo.get(shard, []), (0, "")] for shard in range(job.plan.n_shards)})
    wanted = itertools.takewhile(lambda _: readable < CALIBRATION_SAMPLES, every)
    with Progress("calibrating", min(CALIBRATION_SAMPLES, job.plan.n_images)) as progress:
        for batch in batches_decoded_ahead(job, wanted, {}):
            kept[batch.planned.place] = batch
            here = sum(0 in sample.pixels for sample in batch.samples)
            if readable >= CALIBRATION_SAMPLES:
                continue
            if here:
                kept[batch.planned.place] = seen(job, batch)
            readable += here
            reason = next((s.rows[0].reason or "" for s in batch.samples if s.rows[0].reason), reason)
            progress.add(len(batch.samples))
    if not readable:
        raise ValueError(f"{job.path}: none of the {job.plan.n_images} images can be read, the first says: {reason}; "
                         "expected photographs; check IMAGES")  # fmt: skip
    return kept


def seen(job: ExtractJob, batch: PreparedBatch) -> PreparedBatch:
    """The batch with view 0's features; its pixels are let go of where no other teacher has still to see them."""
    pixels = view_pixels(batch.samples, 0)
    features = {column: teacher.forward(pixels) for column, teacher in job.teachers.items()}
    seen_by_all = len(job.teachers) == sum(not teacher.is_map for teacher in job.plan.columns)
    return dataclasses.replace(
        batch, features=features, samples=without(0, batch.samples) if seen_by_all else batch.samples
    )


def without(view: int, samples: Sequence[Prepared]) -> list[Prepared]:
    """The samples without this view's pixels, which nobody will look at again."""
    return [dataclasses.replace(s, pixels={v: x for v, x in s.pixels.items() if v != view}) for s in samples]


def features_of(kept: KeptBatches, column: str) -> list[Tensor]:
    """Tokens [b, l, d] of a column, batch by batch, of the first 256 samples."""
    found = [batch.features[column].tokens for batch in kept.values() if column in batch.features]
    return [tokens.cpu() for tokens in first_rows(found, CALIBRATION_SAMPLES)]
