"""Images are appended to a cache: their shards come behind, and nothing that is there changes.

An appended part begins with a shard of its own, so that the last, partial shard before it stays as it is; the rows between
hold no image. Its ids derive from the data set up to it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mrmae.common.files import publish
from mrmae.shards.begin import refuse_other_images
from mrmae.shards.commit import withdraw_manifest
from mrmae.shards.extend import extend_plan
from mrmae.shards.format import (
    SAMPLES,
    Appended,
    Plan,
    Source,
    canonical_sources,
    dataset_ids,
    grown_dataset_id,
    load_plan,
    read_samples,
    read_sources,
    readable_json,
    tar_path,
    write_samples,
    write_sources,
)
from mrmae.shards.store import read_index


def is_grown(path: Path) -> bool:
    """Whether there is a cache to which images were appended."""
    return (path / "plan.json").exists() and bool(load_plan(path).appended)


def admit(
    path: Path, wanted: Plan, given: Sequence[Source], *, append: bool, say: Callable[[str], None]
) -> tuple[Plan, list[Source]]:
    """The plan on disk, grown by what is new, and its images by number.

    wanted: the plan of this command, whatever its images. given: the images of this command; with `append` those that the
    cache has may be left out and others are appended, without it they must be the cache's own.
    Raises ValueError, and changes nothing, for images that differ and for a plan that is no addition.
    """
    old = load_plan(path)
    if not (path / "samples.parquet").exists():
        restore_samples(path, old, given)
    there = {row.key: row for row in read_sources(path) if row.key}
    new = [row for row in given if row.key not in there]
    changed = [row.key for row in given if row.key in there and row.sha256 != there[row.key].sha256]
    if append and changed:
        raise ValueError(f"{path}: image {changed[0]!r} has other bytes than the image of that key in the cache ({len(changed)} "
                         "such images); a key names one image, and what is cached stays; rename it, leave it out with "
                         "--include, or write to a new folder (nothing was changed)")  # fmt: skip
    if not append and (new or changed or len(given) < len(there)):
        refuse_other_images(path, given)
    same = dataclasses.replace(
        wanted, dataset_id=old.dataset_id, n_samples=old.n_samples, appended=old.appended, quantisers={}
    )
    plan = extend_plan(path, same)
    if append:
        say(
            f"{len(given) - len(new)} of {len(given)} images are in the cache already and are skipped; {len(new)} are new"
        )
    if new:
        plan = append_rows(path, plan, new)
    return plan, read_sources(path)


def restore_samples(path: Path, plan: Plan, given: Sequence[Source]) -> None:
    """Write a lost samples.parquet: the pixels' sidecars tell which image has which number.

    Raises ValueError where they do not all tell, or where these images are not the plan's.
    """
    known, where = {row.key: row for row in given}, path / "samples.parquet"
    if len(known) < plan.n_images:
        raise ValueError(f"{where}: lost, and IMAGES are {len(known)}; expected all {plan.n_images} images of the cache to write it "
                         "again; give all their folders, without new ones")  # fmt: skip
    rows = [Source("", None, 0, "")] * plan.n_rows
    for shard, numbers in enumerate(plan.ranges):
        keys = read_index(tar_path(path, 0, shard)).keys
        if strangers := [key for key in keys if key not in known]:
            raise ValueError(f"{where}: lost, and {strangers[0]!r} is not among IMAGES; expected all images of the cache to "
                             "write it again; give all their folders, without new ones")  # fmt: skip
        rows[numbers.start : numbers.stop] = [known[key] for key in keys]
    if dataset_ids(plan, rows) != [part.dataset_id for part in plan.parts]:
        raise ValueError(f"{where}: lost, and these images are not those that the cache was made of; give the same images, or "
                         "restore it from a copy (nothing was changed)")  # fmt: skip
    write_sources(path, rows)


def append_rows(path: Path, plan: Plan, new: Sequence[Source]) -> Plan:
    """The plan with these images behind the others, on disk too, where the cache is then unfinished.

    samples.parquet is written before plan.json: rows behind the plan's last are no part of the cache, so that a kill between
    the two changes nothing.
    """
    ordered = canonical_sources(new)
    id = grown_dataset_id(plan.parts[-1].dataset_id, [(row.key, row.bytes, row.sha256) for row in ordered])
    grown = dataclasses.replace(plan, appended=(*plan.appended, Appended(id, len(ordered))))
    first = grown.parts[-1].numbers.start
    table = read_samples(path, plan.numbers)
    known = [field.name for field in dataclasses.fields(Source)]
    for name in SAMPLES.names[1:]:
        gap = first - len(table[name])
        table[name] += ["" if name == "key" else None] * gap
        table[name] += [getattr(row, name) for row in ordered] if name in known else [None] * len(ordered)
    withdraw_manifest(path, plan)
    write_samples(path, table)
    publish(path / "plan.json", readable_json(grown.to_json()), replace=True)
    return grown
