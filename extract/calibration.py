"""Calibration: quantisers and codebooks of columns that have none yet, from the first samples; what it computes is not computed again."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.common.progress import Progress
from mrmae.extract.asked_teachers import has_codebook
from mrmae.extract.made_maps import fit_kmeans
from mrmae.extract.pipeline import (
    ExtractJob,
    batches_decoded_ahead,
    behind_tail,
    halved,
    planned_batches,
    source_column,
    source_tokens,
    unfinished,
    view_pixels,
)
from mrmae.extract.prepare import KeptBatches, Prepared, PreparedBatch
from mrmae.shards import commit as commits
from mrmae.shards.format import (
    CALIBRATION_SAMPLES,
    NOT_QUANTISED,
    PIXELS,
    Numbers,
    Quantiser,
    SourceTable,
    TeacherSpec,
    calibrate,
    codebook_path,
    codebook_sha256,
    dequantise,
    first_rows,
    freeze_quantisers,
    hash_values,
    quantise,
    read_samples,
    write_codebook,
    write_samples,
)


def calibrated(job: ExtractJob) -> tuple[ExtractJob, KeptBatches]:
    """The job with every column's quantiser (of a computed map, its codebook) frozen in its plan, and the batches that calibration has seen.

    The first 256 readable samples in canonical order, view 0: a random part of the data set. They are neither decoded nor
    shown to the teachers again afterwards. Where a batch is too much for the device's memory, the job has half of it.
    """
    pending = {column: t for column, t in job.teachers.items() if column not in job.plan.quantisers}
    given = [t.column for t in job.plan.columns if t.is_map and not t.made and t.column not in job.plan.quantisers]
    made = [t for t in job.plan.columns if t.made and not has_codebook(job.path, job.plan, t.column)]
    if not pending and not given and not made:
        return job, {}
    fitted = {source_column(spec) for spec in made if spec.made == "kmeans"}
    to_see = {column: t for column, t in pending.items() if job.options.dtype != "float16" or column in fitted}
    to_see |= {column: job.teachers[column] for column in fitted - set(pending) if stored_sample(job, column) is None}
    try:
        kept = calibration_batches(dataclasses.replace(job, teachers=to_see)) if to_see else {}
    except torch.OutOfMemoryError:
        if job.options.batch_size == 1:
            raise
        return calibrated(halved(job))
    found = {column: calibrate(*features_of(kept, column), dtype=job.options.dtype) if column in to_see else
             Quantiser(job.options.dtype) for column in pending}  # fmt: skip
    quantisers = {**job.plan.quantisers, **found, **dict.fromkeys(given, NOT_QUANTISED)}
    job = with_hashes(job, kept)
    known = dataclasses.replace(job, plan=dataclasses.replace(job.plan, quantisers=quantisers))
    for spec in made:
        quantisers[spec.column] = with_codebook(known, spec, kept)
    plan = freeze_quantisers(job.path, job.plan, quantisers)
    todo = unfinished(job)
    return dataclasses.replace(job, plan=plan), {place: batch for place, batch in kept.items() if place[0] in todo}


def with_hashes(job: ExtractJob, kept: KeptBatches) -> ExtractJob:
    """The job, and its table of samples on disk, with the sha256 of the images that calibration has read: what is made of them later is
    made of the same bytes, whoever does it."""
    seen = {
        sample.number: sample.rows[0].sha256 for batch in kept.values() for sample in batch.samples if 0 in sample.rows
    }
    rows = SourceTable.of(job.images.rows)
    told = rows.columns["sha256"]
    known = told.array.is_valid().to_numpy(zero_copy_only=False).copy()
    if not (new := [number for number in seen if not known[number]]):
        return job
    hashes, known[new] = told.numpy().copy(), True
    hashes[new] = np.frombuffer(bytes.fromhex("".join(seen[number] for number in new)), np.uint8).reshape(-1, 32)
    column = hash_values(hashes, known)
    write_samples(job.path, {**read_samples(job.path, job.plan.numbers), "sha256": column})
    images = dataclasses.replace(job.images, rows=SourceTable({**rows.columns, "sha256": column}))
    return dataclasses.replace(job, images=images)


def with_codebook(job: ExtractJob, spec: TeacherSpec, kept: KeptBatches) -> Quantiser:
    """What stands in the plan of a computed map, its codebook written. ValueError where the plan's is another one and is lost."""
    vectors = job.texts[spec.column] if spec.made == "text" else fit_kmeans(sampled_tokens(job, spec, kept), spec.model_options["k"],
                                                                             f"--map {spec.name}")  # fmt: skip
    told = job.plan.quantisers.get(spec.column)
    sha256 = codebook_sha256(vectors.numpy())
    if told is not None and told.codebook is not None and told.codebook["sha256"] != sha256:
        raise ValueError(f"{codebook_path(job.path, spec.name)}: is lost or damaged, and what is computed now is not what map {spec.name} was begun "
                         f"with; restore it from a copy, or drop {spec.column} with inspect-cache drop, and ask for it again")  # fmt: skip
    write_codebook(job.path, spec.name, vectors.numpy())
    return told or dataclasses.replace(
        NOT_QUANTISED, codebook={"sha256": sha256, "of": job.plan.ids[source_column(spec)]}
    )


def sampled_tokens(job: ExtractJob, spec: TeacherSpec, kept: KeptBatches) -> Float[Tensor, "n d"]:
    """The tokens of the first 256 readable samples, as readers of the cache get them."""
    column = source_column(spec)
    if (numbers := stored_sample(job, column)) is not None:
        return source_tokens(job, spec, numbers, 0).flatten(0, 1)
    quantiser = job.plan.quantisers[column]
    parts = [
        dequantise(*quantise(tokens.to(job.options.device), quantiser), quantiser)
        for tokens in features_of(kept, column)
    ]
    return behind_tail(job, spec, torch.cat(parts)).flatten(0, 1)


def stored_sample(job: ExtractJob, column: str) -> Numbers | None:
    """The first 256 readable samples, where view 0 of a column has them all; else None."""
    found: list[int] = []
    for shard, numbers in enumerate(job.plan.ranges):
        pixels = commits.valid_record(job.path, job.plan, 0, PIXELS, shard)
        if pixels is None or commits.valid_record(job.path, job.plan, 0, column, shard) is None:
            return None
        found += [number for number in numbers if str(number) not in pixels["bad"]]
        if len(found) >= CALIBRATION_SAMPLES:
            break
    return np.array(found[:CALIBRATION_SAMPLES], np.int64) if found else None


def calibration_batches(job: ExtractJob) -> KeptBatches:
    """Whole batches until 256 samples are readable, and those decoded together with the last. ValueError when no image is."""
    kept: KeptBatches = {}
    readable, reason, todo = 0, "", unfinished(job)
    # Decoded with all the views that this process extracts, so that no image is decoded twice.
    every = planned_batches(job, {shard: [*todo.get(shard, []), (0, "")] for shard in range(job.plan.n_shards)})
    first = (batch for batch in every if 0 in batch.turn.shown)
    wanted = itertools.takewhile(lambda _: readable < CALIBRATION_SAMPLES, first)
    with Progress("calibrating", min(CALIBRATION_SAMPLES, job.plan.n_images)) as progress:
        for batch in batches_decoded_ahead(job, wanted, {}):
            kept[batch.planned.place] = batch
            here = sum(0 in sample.pixels for sample in batch.samples)
            if readable >= CALIBRATION_SAMPLES:
                continue
            if here:
                kept[batch.planned.place] = seen(job, batch)
            progress.add(min(here, CALIBRATION_SAMPLES - readable))
            readable += here
            reason = next((s.rows[0].reason or "" for s in batch.samples if s.rows[0].reason), reason)
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
