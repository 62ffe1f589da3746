"""extract-features as a function: list, plan, calibrate, compute what is missing, finalise, report."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrmae.extract.decode import Images
from mrmae.extract.digest import digest_images
from mrmae.extract.engine import Job, calibrated, extract_missing
from mrmae.extract.images import Sources, list_sources
from mrmae.extract.options import Options
from mrmae.extract.plan import describe
from mrmae.extract.progress import human_bytes, human_time
from mrmae.extract.teachers import Teacher, build_teacher, parse_teacher
from mrmae.shards import commit as commits
from mrmae.shards import plan as plans
from mrmae.shards.plan import Plan, Source
from mrmae.shards.spec import canonical_order, dataset_id
from mrmae.shards.write import make_folder, remove

__all__ = ["Options", "TooManyBad", "extract_features"]

SPOOL = ".hashes.writing"  # named like a temporary file: a cache may begin in a folder that holds nothing else
SHOWN_BAD = 100


class TooManyBad(ValueError):
    """More images are unreadable than --max-bad allows; everything is committed, no manifest was written."""


def extract_features(options: Options, *, dry_run: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The manifest of the finished cache; an empty dict after a dry run. The same options again resume.

    say: receives the plan and the summary, line by line; progress goes to stderr.
    Raises ValueError and OSError for what a user can mend; what was committed before stays valid.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("extract-features: was started by torchrun with several ranks; expected one process; "
                         "start it without torchrun")  # fmt: skip
    began, options = time.monotonic(), options.resolved()
    sources = list_sources(options.images, options.include)
    teachers = [
        build_teacher(parse_teacher(text), grid=options.grid, view_size=options.recipe.size, device=options.device,
                      precision=options.precision, allow_torchscript=options.allow_torchscript)
        for text in options.teachers
    ]  # fmt: skip
    shard_samples = options.shard_samples or default_shard_samples(len(sources), teachers, options)
    say(describe(options.cache, options.recipe, [teacher.spec for teacher in teachers], images=len(sources),
                 labels=len({image.label for image in sources} - {None}), views=options.views, dtype=options.dtype,
                 shard_samples=shard_samples))  # fmt: skip
    if dry_run:
        return {}
    job = start(options, sources, teachers, shard_samples)
    finished = (job.path / "manifest.json").exists() and not commits.missing(job.path, job.plan)
    job, kept = calibrated(job)
    extract_missing(job, kept)
    refuse_too_many_bad(job)
    manifest = commits.finalise(job.path, job.plan)
    say(summary(job, manifest, time.monotonic() - began, nothing_done=finished))
    return manifest


def default_shard_samples(n: int, teachers: Sequence[Teacher], options: Options) -> int:
    """Samples per shard, from the bytes of one sample's tokens in the widest column."""
    width = max((teacher.spec.width for teacher in teachers), default=1)
    token_bytes = options.grid**2 * width * (1 if options.dtype == "int8" else 2)
    return plans.default_shard_samples(n, token_bytes)


def start(options: Options, sources: Sources, teachers: Sequence[Teacher], shard_samples: int) -> Job:
    """The job, its plan written or found equal on disk."""
    path = options.cache
    order = canonical_order([image.key for image in sources])
    plans.refuse_other_folder(path)
    make_folder(path)
    digests = digest_images(sources, order, known_digests(path), path / SPOOL, workers=options.workers)
    rows = [Source(key, sources[i].label, size, sha) for i, (key, size, sha) in zip(order, digests)]
    plan = Plan(
        dataset_id=dataset_id(digests),
        n_samples=len(rows),
        recipe=options.recipe,
        grid=(options.grid, options.grid),
        n_views=options.views,
        shard_samples=shard_samples,
        dtype=options.dtype,
        columns=tuple(teacher.spec for teacher in teachers),
    )
    plan = plans.start(path, plan, rows)
    remove(path / SPOOL)
    for teacher in teachers:
        if teacher.tail and not plans.tail_path(path, teacher.spec.name).exists():
            plans.write_tail(path, teacher.spec.name, teacher.tail)
    images = Images(sources, rows, order, options.max_pixels)
    return Job(path, plan, images, {teacher.spec.column: teacher for teacher in teachers}, options)


def known_digests(path: Path) -> list[tuple[str, int, str]]:
    """The digests of an existing plan: images of the same key and size are checked when they are decoded."""
    if not (path / "plan.json").exists():
        return []
    return [(row.key, row.bytes, row.sha256) for row in plans.read_sources(path)]


def refuse_too_many_bad(job: Job) -> None:
    """TooManyBad, listing them, when more images are bad than allowed."""
    bad = commits.bad_images(job.path, job.plan)
    allowed = job.options.max_bad if job.options.max_bad >= 0 else max(3, job.plan.n_samples // 1000)
    if len(bad) > allowed:
        remove(job.path / "manifest.json")
        raise TooManyBad(
            f"{job.path}: {len(bad)} of {job.plan.n_samples} images cannot be read; at most {allowed} may; everything "
            f"else is committed: mend nothing and raise --max-bad to {len(bad)} to finish without running again, or "
            f"leave them out in a new cache:\n{bad_list(job, bad)}"
        )


def bad_list(job: Job, bad: Mapping[int, str]) -> str:
    """The bad images and their reasons, one per line; past a hundred, how many more."""
    lines = [f"  {job.images.rows[number].key}: {bad[number]}" for number in sorted(bad)]
    more = [f"  ... and {len(lines) - SHOWN_BAD} more (commits/0/pixels/*.json holds all)"] * (len(lines) > SHOWN_BAD)
    return "\n".join(lines[:SHOWN_BAD] + more)


def summary(job: Job, manifest: Mapping[str, Any], seconds: float, *, nothing_done: bool) -> str:
    """What was made, how large it is, and how faithful the stored features are."""
    size = sum(file["bytes"] for columns in manifest["shards"].values() for shards in columns.values()
               for shard in shards for file in shard["files"].values())  # fmt: skip
    head = f"{job.path}: {manifest['n_valid']} images, {job.plan.n_views} view(s), {human_bytes(size)}"
    lines = [head + (", complete before; nothing was left to do" if nothing_done else f", {human_time(seconds)}")]
    for column in manifest["columns"]:
        quality, teacher = column["quality"], column["teacher"]
        weights = ", RANDOM weights: these features know nothing" if teacher["weights"] == "random" else ""
        lines.append(f"  {column['name']}: SNR {quality['snr_db']:.1f} dB in the worst shard, "
                     f"p99.9 of 1 - cos {quality['p999_one_minus_cos']:.2g}{weights}")  # fmt: skip
    bad = commits.bad_images(job.path, job.plan)
    if bad:
        lines.append(f"{len(bad)} images cannot be read; their rows are kept and flagged:\n{bad_list(job, bad)}")
    return "\n".join(lines)
