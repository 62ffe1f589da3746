"""A cache is begun, or found to be the one that was begun with the same plan and images."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mrmae.common.files import TEMPORARY, publish
from mrmae.shards.claims import CACHE_LOCK, PLAN_LOCK
from mrmae.shards.format import (
    Plan,
    Source,
    compare_specs,
    dataset_ids,
    load_plan,
    read_samples,
    readable_json,
    write_sources,
)
from mrmae.shards.store import refuse_foreign_entries

DIGESTS = ".digests.jsonl"  # which images were hashed when: what extract-features begins with


def start_plan(path: Path, plan: Plan, sources: Sequence[Source]) -> Plan:
    """The plan as it stands on disk: newly written, or an equal one from before, with its quantisers.

    sources: in canonical order. A plan that adds to the one on disk goes through extend.extend_plan first. Raises ValueError, and changes nothing, where the plan on disk differs (naming the
    first field and both values), or where the folder holds something else.
    """
    if dataset_ids(plan, sources) != [part.dataset_id for part in plan.parts]:
        raise ValueError(f"{path}: the plan's dataset id is not that of these images; compute it from them")
    refuse_foreign_entries(path)
    if (path / "plan.json").exists():
        old = load_plan(path)
        if old.dataset_id != plan.dataset_id:
            refuse_other_images(path, sources)
        unfrozen = dataclasses.replace(plan, quantisers=old.quantisers)
        compare_specs(old.to_json(), unfrozen.to_json(), str(path / "plan.json"))
        if not (path / "samples.parquet").exists():
            write_sources(path, sources)
        return old
    refuse_other_folder(path)
    write_sources(path, sources)
    publish(path / "plan.json", readable_json(plan.to_json()))
    return plan


def refuse_other_folder(path: Path) -> None:
    """ValueError where `path` is a file, or a folder that holds something else than a cache, begun or whole."""
    refuse_foreign_entries(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; expected a new folder for the cache; choose another name")
    if not path.exists() or (path / "plan.json").exists():
        return
    ours = {DIGESTS, CACHE_LOCK, PLAN_LOCK, *(file.name for file in path.glob(TEMPORARY))}
    if (path / "samples.parquet").exists():
        with contextlib.suppress(ValueError):  # a table of something else is not replaced
            read_samples(path)
            ours.add("samples.parquet")
    if others := sorted(file.name for file in path.iterdir() if file.name not in ours):
        raise ValueError(
            f"{path}: this folder is no cache (no plan.json) and holds {others[0]!r}; "
            "expected a new or empty folder; choose another one"
        )


def refuse_other_images(path: Path, sources: Sequence[Source]) -> None:
    """ValueError that names an image by which the cache's data set and these images differ."""
    table = read_samples(path, load_plan(path).numbers)
    then = {key: sha for key, sha in zip(table["key"], table["sha256"]) if key}
    now = {source.key: source.sha256 for source in sources}
    changed = [key for key in then if now.get(key, then[key]) != then[key]]
    gone, new = [key for key in then if key and key not in now], [key for key in now if key not in then]
    example = next((f"{what} {keys[0]!r}" for what, keys in
                    (("gone is", gone), ("new is", new), ("changed is", changed)) if keys), "the order")  # fmt: skip
    added = ", add --append to append the new ones" if new and not changed else ""
    raise ValueError(f"{path}: it was begun with {len(then)} images and this command has {len(now)}: {len(gone)} gone, "
                     f"{len(new)} new, {len(changed)} changed ({example}); a cache belongs to one set of images; "
                     f"give the same images{added}, or write to a new folder (nothing was changed)")  # fmt: skip
