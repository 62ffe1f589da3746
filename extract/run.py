"""extract-features as a function, from above downwards: options, disk, images, teachers, plan, shards, manifest."""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from mrmae.common.backend import Url, exists, files_below
from mrmae.common.files import make_folder, users_folder
from mrmae.extract.asked_teachers import Teachers, asked_teachers, write_tails
from mrmae.extract.calibration import calibrated
from mrmae.extract.estimate import cost_of_choices, estimate_text, measure_rates, plan_text
from mrmae.extract.images import BAND_SUFFIXES, SUFFIXES, KeptIndices, Sources, digest_images, list_sources
from mrmae.extract.options import Options, asked
from mrmae.extract.pipeline import ExtractJob, extract_missing
from mrmae.extract.prepare import Images, KeptBatches
from mrmae.extract.report import refuse_too_many_bad, summary
from mrmae.extract.workers import plan_of_others, take_the_plan, wait_for_shards
from mrmae.shards import claims
from mrmae.shards import commit as commits
from mrmae.shards.format import SourceTable, Values
from mrmae.shards.manifest import Manifest, read_manifest
from mrmae.shards.plans import (
    DIGESTS,
    TARS,
    Agreed,
    Wanted,
    look,
    negotiate,
    refuse_changed,
    refuse_changed_plan,
    write_agreed,
)

__all__ = ["Options", "extract_features"]

Say = Callable[[str], None]


def extract_features(options: Options, *, dry_run: bool = False, say: Say = print) -> dict[str, Any]:
    """The manifest of the finished cache; an empty dict after a dry run or a part. The same options again resume.

    say: receives the plan and the summary, line by line; progress goes to stderr.
    Raises ValueError and OSError for what a user can mend; what was committed before stays valid.
    """
    began, options = time.monotonic(), options.resolved()
    lead_say: Say = say if options.part.leads else lambda line: None
    sources, teachers, wanted = what_is_asked(options, lead_say, dry_run=dry_run)
    if dry_run:
        negotiate(look(options.cache), wanted)
        say_plan(options, sources, wanted, lead_say)
        lead_say(cost_of_choices(wanted.plan))
        lead_say(estimate_text(measure_rates(sources, teachers.built, options), teachers.specs, options, len(sources)))
        return {}
    with contextlib.ExitStack() as held:
        job, kept = begin(options, sources, teachers, wanted, lead_say, held)
        finished, open_yet = is_finished(job), not exists(job.path / "manifest.json")
        extract_missing(job, kept)
        if options.shards or not options.part.leads:
            say(f"{job.path}: part {options.part} is committed" + (
                "; when all are, the same command without --shards finishes" if options.shards else ""))  # fmt: skip
            return {}
        manifest = finish_cache(job, by_others=open_yet)
    say(summary(job, manifest, time.monotonic() - began, nothing_done=finished))
    return manifest


def kept_indices(options: Options, *, read_only: bool) -> KeptIndices:
    """The memory of what is in tars, and the lock that lets one process at a time read those at URLs."""
    alone = functools.partial(take_the_plan, options.cache)
    return KeptIndices(
        options.cache / TARS, of_this_machine(options, TARS), alone, headers_only=True, read_only=read_only
    )


def what_is_asked(options: Options, say: Say, *, dry_run: bool = False) -> tuple[Sources, Teachers, Wanted]:
    """The images, the teachers and the plan that resolved options ask for; refused before anything slow where no command could go on."""
    found = look(options.cache, images=False)
    negotiate(found, asked(options, found.plan))  # options no command could go on with cost nobody any time
    suffixes = SUFFIXES if options.recipe.stored.as_shown else BAND_SUFFIXES
    if isinstance(options.cache, Url) and not dry_run:
        make_folder(options.cache)  # refused before tars are read, where the store lets two writers mix
    kept = kept_indices(options, read_only=dry_run) if not dry_run or files_below(options.cache / TARS) else None
    sources = list_sources(options.images, options.include, suffixes, kept).first(options.limit)
    teachers = asked_teachers(options, found.plan, sources.keys, say)
    return sources, teachers, asked(options, found.plan, teachers.specs, sources.rows, teachers.map_sha256)


def is_finished(job: ExtractJob) -> bool:
    """Whether there is nothing to do, not even a manifest to write."""
    return exists(job.path / "manifest.json") and not commits.missing(job.path, job.plan)


def finish_cache(job: ExtractJob, *, by_others: bool = False) -> Manifest:
    """The manifest, once every shard is committed, by whomever. by_others: where there is one by now, as there was none, it is theirs."""
    wait_for_shards(job.path, job.plan)
    with take_the_plan(job.path):
        refuse_changed_plan(job.path, job.plan)
        refuse_too_many_bad(job)
        if by_others and exists(job.path / "manifest.json"):
            return read_manifest(job.path)
        return commits.finalise(job.path, job.plan)


def begin(
    options: Options, sources: Sources, teachers: Teachers, wanted: Wanted, say: Say, held: contextlib.ExitStack
) -> tuple[ExtractJob, KeptBatches]:
    """The job, planned and calibrated while no other process does, and what calibration has seen; or as others have planned it.

    held: keeps this process's share of the cache until the end.
    """
    make_folder(options.cache)
    held.enter_context(claims.at_work(options.cache))
    joins = not options.part.first or any(claims.writers(options.cache))
    if joins and (agreed := plan_of_others(options.cache, wanted)):
        say_plan(options, sources, wanted, say)
        return job_of(options, sources, teachers, agreed), {}
    with take_the_plan(options.cache):
        found = look(options.cache)  # another command may have planned meanwhile
        wanted = asked(options, found.plan, wanted.plan.columns, wanted.rows, wanted.maps)
        agreed = negotiate(found, wanted)
        if options.append and teachers.maps:
            there = SourceTable.of(found.rows or ()).columns["key"].array
            given_keys = sources.keys.array
            new = Values(given_keys.filter(pc.invert(pc.is_in(given_keys, value_set=there))), "key")
            for given in teachers.maps.values():
                given.refuse_lacking(new)
        say_plan(options, sources, wanted, say)  # not before it is agreed to, and before anything is read for hours
        if options.append:
            refuse_changed_images(options, sources, agreed)
            n = len(sources)
            say(f"{n - agreed.new} of {n} images are in the cache already and are skipped; {agreed.new} are new")
        write_agreed(options.cache, agreed)
        write_tails(options.cache, teachers)
        job, kept = calibrated(job_of(options, sources, teachers, agreed))
        commits.create_columns(job.path, job.plan)
    return job, kept


def say_plan(options: Options, sources: Sources, wanted: Wanted, say: Say) -> None:
    """Say what will be written, and what was odd about the listing of the images."""
    say(plan_text(options.cache, wanted.plan, labels=len(sources.labels.array.drop_null().unique())))
    for note in sources.notes:
        say(note)


def refuse_changed_images(options: Options, sources: Sources, agreed: Agreed) -> None:
    """ValueError where an image that is given has other bytes than those that the cache was made of; they are hashed for that."""
    assert agreed.before is not None, "there is something to append to"
    path, plan = options.cache, agreed.before
    rows = SourceTable.of(agreed.rows)[: plan.n_rows]
    told = SourceTable({**rows.columns, "sha256": commits.known_hashes(path, plan, rows)})
    at = sources.places(told.columns["key"].array)
    asked = np.flatnonzero((at >= 0) & told.columns["sha256"].array.is_valid().to_numpy(zero_copy_only=False))
    found = digest_images(sources, at[asked], memory_of(options), workers=options.workers)
    then, now = told.columns["sha256"].numpy()[asked], found.columns["sha256"].numpy()
    if len(changed := np.flatnonzero((then != now).any(axis=1))):
        refuse_changed(path, told[int(asked[changed[0]])], found[int(changed[0])], len(changed))


def memory_of(options: Options) -> Path:
    """Where this machine remembers the hashes of images: a file to which lines are added."""
    return of_this_machine(options, DIGESTS)


def of_this_machine(options: Options, name: str) -> Path:
    """Where a memory of this machine lies: in the cache, or where that is at a URL, in the user's folder."""
    if not isinstance(options.cache, Url):
        return options.cache / name
    if (here := users_folder()) is None:
        raise ValueError(f"{options.cache}: this user has no home folder, where a cache at a URL keeps what this machine remembers of "
                         "images; set XDG_CACHE_HOME to a folder on a disk of this machine")  # fmt: skip
    make_folder(here)
    return here / f"{name[1:]}-{hashlib.sha256(str(options.cache).encode()).hexdigest()[:16]}"


def job_of(options: Options, sources: Sources, teachers: Teachers, agreed: Agreed) -> ExtractJob:
    """The extraction of the agreed plan."""
    images = images_of(options, sources, agreed)
    return ExtractJob(options.cache, agreed.plan, images, teachers.built, options, teachers.maps, teachers.texts)


def images_of(options: Options, sources: Sources, agreed: Agreed) -> Images:
    """The images of the agreed plan, and where each is among those that are given."""
    order = sources.places(
        SourceTable.of(agreed.rows).columns["key"].array
    )  # with --append not every image need be given
    return Images(sources, agreed.rows, order, options.max_pixels, memory_of(options))
