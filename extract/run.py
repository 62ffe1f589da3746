"""extract-features as a function: list, plan, calibrate, compute what is missing, finalise, report."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrmae.common.files import make_folder
from mrmae.common.progress import human_bytes, human_time
from mrmae.extract.calibration import calibrated
from mrmae.extract.estimate import cost_of_choices, estimate_text, measure_rates, plan_text
from mrmae.extract.images import Sources, digest_images, list_sources
from mrmae.extract.options import Options
from mrmae.extract.pipeline import ExtractJob, extract_missing
from mrmae.extract.prepare import Images, KeptBatches
from mrmae.extract.recorded import complete_teacher
from mrmae.extract.teachers import Teacher, TeacherRequest, build_teacher, parse_teacher
from mrmae.extract.workers import take_the_plan, wait_for_plan, wait_for_shards
from mrmae.shards import claims
from mrmae.shards import commit as commits
from mrmae.shards.append import admit, is_grown
from mrmae.shards.begin import DIGESTS, refuse_other_folder, refuse_other_images, start_plan
from mrmae.shards.extend import extend_plan, extended
from mrmae.shards.format import (
    BEHIND,
    DTYPES,
    Plan,
    Source,
    TeacherSpec,
    canonical_order,
    dataset_id,
    default_shard_samples,
    load_plan,
    plain,
    read_sources,
    read_tail,
    tail_path,
    taps_behind,
    write_tail,
)

__all__ = ["Options", "TooManyBad", "extract_features"]

SHOWN_BAD = 100


class TooManyBad(ValueError):
    """More images are unreadable than --max-bad allows; everything is committed, no manifest was written."""


@dataclasses.dataclass(frozen=True)
class Teachers:
    """The teachers asked for. built: by column; the cache is complete where one is missing, and its spec recorded."""

    specs: Sequence[TeacherSpec]
    built: Mapping[str, Teacher]


def extract_features(options: Options, *, dry_run: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The manifest of the finished cache; an empty dict after a dry run or a part. The same options again resume.

    say: receives the plan and the summary, line by line; progress goes to stderr.
    Raises ValueError and OSError for what a user can mend; what was committed before stays valid.
    """
    began, options = time.monotonic(), options.resolved()
    refuse_other_folder(options.cache)
    refuse_nothing_to_append_to(options)
    refuse_other_options(options)
    sources = list_sources(options.images, options.include)
    teachers = asked_teachers(options, say if options.part.leads else lambda line: None)
    shard_samples = options.shard_samples or usual_shard_samples(len(sources), teachers.specs, options)
    wanted = planned(options, "", len(sources), teachers, shard_samples)
    if options.part.leads:
        say(plan_text(options.cache, wanted, labels=len({image.label for image in sources} - {None})))
        for note in sources.notes:
            say(note)
    if dry_run:
        say(cost_of_choices(wanted))
        say(estimate_text(measure_rates(sources, teachers.built, options), teachers.specs, options, len(sources)))
        return {}
    with contextlib.ExitStack() as held:
        job, kept = (begin if options.part.leads else join)(options, sources, teachers, shard_samples, say, held)
        finished = (job.path / "manifest.json").exists() and not commits.missing(job.path, job.plan)
        extract_missing(job, kept)
        if options.shards or not options.part.leads:
            say(f"{job.path}: part {options.part} is committed" + (
                "; when all are, the same command without --shards finishes" if options.shards else ""))  # fmt: skip
            return {}
        wait_for_shards(job.path, job.plan)
        with take_the_plan(job.path):
            refuse_changed_plan(job)
            refuse_too_many_bad(job)
            manifest = commits.finalise(job.path, job.plan)
    say(summary(job, manifest, time.monotonic() - began, nothing_done=finished))
    return manifest


def asked_teachers(options: Options, say: Callable[[str], None]) -> Teachers:
    """The teachers of the options, built where something of theirs may have to be computed.

    What follows from another column and its tail is left out, aloud.
    """
    requests = [parse_teacher(text) for text in options.teachers]
    specs: dict[int, TeacherSpec] = {}
    built: dict[str, Teacher] = {}
    for i in sorted(range(len(requests)), key=lambda i: requests[i].tap in BEHIND):
        name, tap = requests[i].name, requests[i].tap
        if tap in BEHIND and follows(options, requests[i], list(specs.values()), built):
            say(f"{name}.{tap}: is not stored twice, it follows from {name}.pre_tail and the tail: readers know it as a column, "
                f"recipes as terms.NAME.teacher_tap={tap}, probes as CACHE#{name}.{tap}")  # fmt: skip
            continue
        spec = complete_teacher(options, options.teachers[i])
        if spec is None:
            teacher = build_teacher(requests[i], grid=options.grid, view_size=options.recipe.size, device=options.device,
                                    precision=options.precision, allow_torchscript=options.allow_torchscript)  # fmt: skip
            spec = teacher.spec
            built[spec.column] = teacher
        specs[i] = spec
    return Teachers([specs[i] for i in sorted(specs)], built)


def follows(
    options: Options, request: TeacherRequest, specs: Sequence[TeacherSpec], built: Mapping[str, Teacher]
) -> bool:
    """Whether the asked-for tap follows from a column of `specs`; not where the cache stores it already."""
    source, column = f"{request.name}.pre_tail", f"{request.name}.{request.tap}"
    if source not in [spec.column for spec in specs]:
        return False
    if (options.cache / "plan.json").exists() and column in {t.column for t in load_plan(options.cache).columns}:
        return False
    tail = built[source].tail if source in built else read_tail(options.cache, request.name)
    return request.tap in taps_behind(tail)


def usual_shard_samples(n: int, teachers: Sequence[TeacherSpec], options: Options) -> int:
    """Samples per shard: as the cache has it already, else from the bytes of one sample's tokens in the widest column."""
    if (options.cache / "plan.json").exists():
        return load_plan(options.cache).shard_samples
    width = max((teacher.width for teacher in teachers), default=1)
    token_bytes = options.grid**2 * width * DTYPES[options.dtype].bytes
    return default_shard_samples(n, token_bytes)


def refuse_nothing_to_append_to(options: Options) -> None:
    """ValueError where --append was given for a cache that does not exist."""
    if options.append and not (options.cache / "plan.json").exists():
        raise ValueError(
            f"--append: there is no cache at {options.cache}; one that exists was expected; leave --append out"
        )


def refuse_other_options(options: Options) -> None:
    """ValueError where the cache was begun with options that no command can change, whatever its teachers and images."""
    if not (options.cache / "plan.json").exists():
        return
    old = load_plan(options.cache)
    shard_samples = options.shard_samples or old.shard_samples
    wanted = planned(options, "", old.n_samples, Teachers(old.columns, {}), shard_samples)
    extended(old, of_the_images_of(old, wanted), str(options.cache / "plan.json"))


def refuse_other_plan(options: Options, sources: Sources, wanted: Plan) -> None:
    """ValueError where `wanted` differs from the plan on disk and adds nothing, or has other images than the command may have.

    All that can be said before an image is read.
    """
    path = options.cache
    if not (path / "plan.json").exists():
        return
    old = load_plan(path)
    extended(old, of_the_images_of(old, wanted), str(path / "plan.json"))
    there = {key: (size, sha) for key, size, sha in known_digests(path)}
    if there and not options.append and there.keys() != {image.key for image in sources}:
        refuse_other_images(path, [Source(image.key, image.label, *there.get(image.key, (0, ""))) for image in sources])


def of_the_images_of(old: Plan, wanted: Plan) -> Plan:
    """`wanted` for the images of the plan `old`, whatever its own."""
    return dataclasses.replace(wanted, dataset_id=old.dataset_id, n_samples=old.n_samples, appended=old.appended)


def positions(sources: Sources, rows: Sequence[Source]) -> list[int]:
    """Where each row's image is among the sources, -1 for not there."""
    at = {image.key: i for i, image in enumerate(sources)}
    return [at.get(row.key, -1) for row in rows]


def begin(
    options: Options, sources: Sources, teachers: Teachers, shard_samples: int, say: Callable[[str], None],
    held: contextlib.ExitStack,
) -> tuple[ExtractJob, KeptBatches]:  # fmt: skip
    """The job, planned and calibrated while no other process does, and what calibration has seen.

    held: keeps this process's share of the cache until the end.
    """
    make_folder(options.cache)
    held.enter_context(claims.at_work(options.cache))
    with take_the_plan(options.cache):
        job, kept = calibrated(start(options, sources, teachers, shard_samples, say))
        commits.create_columns(job.path, job.plan)
    return job, kept


def start(
    options: Options, sources: Sources, teachers: Teachers, shard_samples: int, say: Callable[[str], None]
) -> ExtractJob:
    """The job, its plan written or found equal on disk."""
    path = options.cache
    refuse_other_plan(options, sources, planned(options, "", len(sources), teachers, shard_samples))
    order = canonical_order([image.key for image in sources])
    known = [] if options.append else known_digests(path)  # the bytes of what is appended decide, not only their number
    digests = digest_images(sources, order, known, path / DIGESTS, workers=options.workers)
    rows = [Source(key, sources[i].label, size, sha) for i, (key, size, sha) in zip(order, digests)]
    plan = planned(options, dataset_id(digests), len(rows), teachers, shard_samples)
    if options.append or is_grown(path):
        plan, rows = admit(path, plan, rows, append=options.append, say=say)
        order = positions(sources, rows)
    else:
        if (path / "plan.json").exists() and load_plan(path).dataset_id == plan.dataset_id:
            plan = extend_plan(path, plan)
        plan = start_plan(path, plan, rows)
    for teacher in teachers.built.values():
        if teacher.tail and not tail_path(path, teacher.spec.name).exists():
            write_tail(path, teacher.spec.name, teacher.tail)
    images = Images(sources, rows, order, options.max_pixels)
    return ExtractJob(path, plan, images, teachers.built, options)


def join(
    options: Options, sources: Sources, teachers: Teachers, shard_samples: int, say: Callable[[str], None],
    held: contextlib.ExitStack,
) -> tuple[ExtractJob, KeptBatches]:  # fmt: skip
    """The job as the leading process planned and calibrated it; waits for that. held: as in `begin`.

    ValueError where this process sees other images.
    """
    keys = {image.key for image in sources}
    plan = wait_for_plan(options.cache, planned(options, "", len(keys), teachers, shard_samples), keys, options.part)
    held.enter_context(claims.at_work(options.cache))
    rows = read_sources(options.cache)
    order = positions(sources, rows)
    missing = not options.append and any(at < 0 and row.key for at, row in zip(order, rows))
    if missing or keys - {row.key for row in rows}:
        raise ValueError(f"{options.cache}: part {options.part} sees other images than the plan's; expected the same "
                         "IMAGES everywhere; check paths and mounts")  # fmt: skip
    images = Images(sources, rows, order, options.max_pixels)
    job = ExtractJob(options.cache, plan, images, teachers.built, options)
    refuse_changed_plan(job)
    return job, {}


def refuse_changed_plan(job: ExtractJob) -> None:
    """ValueError where another command changed the plan on disk since this process read it."""
    if plain(load_plan(job.path).to_json()) != plain(job.plan.to_json()):
        raise ValueError(f"{job.path}: another command has extended or changed this cache meanwhile; everything committed so far "
                         "stays valid; run the newest command again, it finishes")  # fmt: skip


def planned(options: Options, dataset: str, n: int, teachers: Teachers, shard_samples: int) -> Plan:
    """The plan that the options ask for."""
    return Plan(
        dataset_id=dataset,
        n_samples=n,
        recipe=options.recipe,
        grid=(options.grid, options.grid),
        n_views=options.views,
        shard_samples=shard_samples,
        dtype=options.dtype,
        columns=tuple(teachers.specs),
        format=options.format,
        token_layout=options.block_rule(),
    )


def known_digests(path: Path) -> list[tuple[str, int, str]]:
    """The digests of an existing plan: images of the same key and size are checked when they are decoded."""
    if not ((path / "plan.json").exists() and (path / "samples.parquet").exists()):
        return []
    return [(row.key, row.bytes, row.sha256) for row in read_sources(path) if row.key]


def refuse_too_many_bad(job: ExtractJob) -> None:
    """TooManyBad, listing them, when more images are bad than allowed."""
    bad = commits.bad_images(job.path, job.plan)
    if len(bad) == job.plan.n_images:
        raise ValueError(
            f"{job.path}: none of the {len(bad)} images can be read; expected photographs; check IMAGES:\n{bad_list(job, bad)}"
        )
    allowed = job.options.max_bad if job.options.max_bad >= 0 else max(3, job.plan.n_images // 1000)
    if len(bad) > allowed:
        commits.withdraw_manifest(job.path, job.plan)
        raise TooManyBad(
            f"{job.path}: {len(bad)} of {job.plan.n_images} images cannot be read; at most {allowed} may; everything "
            f"else is committed: mend nothing and raise --max-bad to {len(bad)} to finish without running again, or "
            f"leave them out in a new cache:\n{bad_list(job, bad)}"
        )


def bad_list(job: ExtractJob, bad: Mapping[int, str]) -> str:
    """The bad images and their reasons, one per line; past a hundred, how many more."""
    lines = [f"  {job.images.rows[number].key}: {bad[number]}" for number in sorted(bad)]
    more = [f"  ... and {len(lines) - SHOWN_BAD} more (commits/0/pixels/*.json holds all)"] * (len(lines) > SHOWN_BAD)
    return "\n".join(lines[:SHOWN_BAD] + more)


def summary(job: ExtractJob, manifest: Mapping[str, Any], seconds: float, *, nothing_done: bool) -> str:
    """What was made, how large it is, and how faithful the stored features are."""
    size = sum(file["bytes"] for columns in manifest["shards"].values() for shards in columns.values()
               for shard in shards for file in shard["files"].values())  # fmt: skip
    head = f"{job.path}: {manifest['n_valid']} images, {job.plan.n_views} view(s), {human_bytes(size)}"
    lines = [head + (", complete before; nothing was left to do" if nothing_done else f", {human_time(seconds)}")]
    for column in manifest["columns"]:
        quality, teacher = column["quality"], column["teacher"]
        weights = ", RANDOM weights: these features know nothing" if teacher["weights"] == "random" else ""
        made = ", requantised from another column by inspect-cache convert" if column["quantiser"].get("source") else ""
        lines.append(f"  {column['name']}: SNR {quality['snr_db']:.1f} dB in the worst shard, "
                     f"p99.9 of 1 - cos {quality['p999_one_minus_cos']:.2g}{made}{weights}")  # fmt: skip
    bad = commits.bad_images(job.path, job.plan)
    if bad:
        lines.append(f"{len(bad)} images cannot be read; their rows are kept and flagged:\n{bad_list(job, bad)}")
    return "\n".join(lines)
