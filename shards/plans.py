"""Whether a command begins, continues, extends or appends to what is on disk, or is refused: one decision, `negotiate`.

It is pure: `look` reads the disk before it, `write_agreed` writes what it says. Asked again as more is known: with the options
alone, then with the images as they are listed; nothing slow happens before it has agreed to what is known.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mrmae.common.backend import Url, exists, files_below
from mrmae.common.files import TEMPORARY, publish
from mrmae.common.progress import counted
from mrmae.shards import claims
from mrmae.shards.claims import CACHE_LOCK, PLAN_LOCK
from mrmae.shards.commit import withdraw_manifest
from mrmae.shards.format import (
    Appended,
    Array,
    Numbers,
    Plan,
    Source,
    SourceTable,
    Values,
    canonical_sources,
    canonical_table,
    compare_specs,
    grown_id,
    joined_sources,
    listing_id,
    listing_ids,
    load_plan,
    plain,
    read_samples,
    read_sources,
    readable_json,
    shown,
    tar_path,
    write_sources,
)
from mrmae.shards.store import read_index, refuse_foreign_entries

DIGESTS = ".digests"  # which images were hashed when: what extract-features --append need not read again
TARS = ".tars"  # a folder, likewise: what is in tars
EMPTY_ROW = Source("", None, 0, "")  # before an appended part, which begins with a shard of its own
Step = Literal["remove manifest.json", "write samples.arrow", "begin plan.json", "replace plan.json"]


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies where a command wants its cache.

    rows: the images of the plan by number, key "" where a row holds none; None where samples.arrow is lost, and keys is then
    what the pixels' sidecars say of it, empty where they do not all tell. others: names, in a folder without a plan, of what no
    extraction has made. damage: the refusal of what cannot be read, or may not be.
    """

    path: Path
    plan: Plan | None = None
    rows: Sequence[Source] | None = None
    keys: Mapping[int, str] = dataclasses.field(default_factory=dict)
    others: Sequence[str] = ()
    damage: str = ""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a command asks for, as far as it is known by now.

    plan: without quantisers; listing_id "" leaves the id to the images. rows: its images, once they are listed, with their sha256
    where it is known, in canonical order, or by number where the plan names its parts.
    maps: by column, the sha256 of the values that are given for its images, new ones of a map that is there among them.
    append: images may be new. extend: teachers and views may be. limit: the images are the first so many of those given, 0: all.
    """

    plan: Plan
    rows: Sequence[Source] | None = None
    append: bool = False
    extend: bool = True
    limit: int = 0
    maps: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Differences:
    """The cache's images, `there`, and a command's, `rows`, which may be in any order.

    at: of every row its place in `there`, -1 where it holds no image or a new one. gone: places in `there` of what is not among the rows;
    new, changed: rows that are not there, or are with another size, or another hash where both are known.
    """

    there: SourceTable
    rows: SourceTable
    at: Numbers
    gone: Numbers
    new: Numbers
    changed: Numbers


@dataclasses.dataclass(frozen=True)
class Agreed:
    """The plan that a command goes on with, and the steps that make it so on disk, in their order.

    rows: its images by number, as far as they are known. new: how many of the command's images the plan `before` lacks.
    """

    plan: Plan
    rows: Sequence[Source]
    new: int
    steps: tuple[Step, ...]
    before: Plan | None


def negotiate(found: Found, wanted: Wanted) -> Agreed:
    """What the command goes on with. ValueError, for a person, where what is found and what is wanted do not go together.

    No file is read or written, no clock is looked at.
    """
    if found.damage:
        raise ValueError(found.damage)
    if found.plan is None:
        return begun(found, wanted)
    old, where = found.plan, str(found.path / "plan.json")
    if wanted.rows is None:
        plan = extended(old, wanted, where)
        return Agreed(plan, (), 0, steps_to(old, plan), old)
    there, rows = (SourceTable.of(each) for each in (images_there(found, old, wanted.rows), wanted.rows))
    differences = compare(there, rows)
    refuse_other_images(found.path, old, wanted, differences)
    plan = extended(old, wanted, where)
    refuse_other_rows(found.path, old, wanted, differences)
    plan, rows = grown(plan, there, rows.take(differences.new), wanted.maps)
    n_new = len(differences.new)
    return Agreed(plan, rows, n_new, steps_to(old, plan, samples=found.rows is None or n_new > 0), old)


def begun(found: Found, wanted: Wanted) -> Agreed:
    """The plan of a new cache. ValueError where its folder holds something else, or there is nothing to append to."""
    if found.others:
        raise ValueError(
            f"{found.path}: this folder is no cache (no plan.json) and holds {found.others[0]!r}; "
            "expected a new or empty folder; choose another one"
        )
    if wanted.append:
        raise ValueError(
            f"--append: there is no cache at {found.path}; one that exists was expected; leave --append out"
        )
    if wanted.rows is None:
        return Agreed(wanted.plan, (), 0, (), None)
    plan = wanted.plan
    if not plan.listing_id:
        plan = dataclasses.replace(plan, listing_id=listing_id(wanted.rows))
    elif not made_of(plan, wanted.rows):
        raise ValueError(f"{found.path}: the plan's listing id is not that of these images; compute it from them")
    return Agreed(plan, wanted.rows, len(wanted.rows), ("write samples.arrow", "begin plan.json"), None)


def steps_to(old: Plan, plan: Plan, *, samples: bool = False) -> tuple[Step, ...]:
    """What has to be written for `plan` to be on disk. samples: whether samples.arrow is part of it.

    The manifest goes first: the cache is unfinished until the new shards are committed. Samples come before the plan: rows
    behind the plan's last are no part of the cache, so that a kill between the two changes nothing.
    """
    steps: dict[Step, bool] = {
        "remove manifest.json": plan != old,
        "write samples.arrow": samples,
        "replace plan.json": plan != old,
    }
    return tuple(step for step, needed in steps.items() if needed)


def extended(old: Plan, wanted: Wanted, where: str) -> Plan:
    """`old` with the teachers and views that `wanted` adds. ValueError where they differ otherwise, naming the field and both
    values; the images are not looked at."""
    names = {teacher.column for teacher in wanted.plan.columns}
    gone = [teacher.column for teacher in old.columns if teacher.column not in names]
    if gone and wanted.extend:
        raise ValueError(f"{where}: the cache has column {gone[0]}, which this command does not ask for; teachers "
                         "(and maps) are added by repeating the cache's and giving one more --teacher (--map), and dropped with "
                         "inspect-cache drop (nothing was changed)")  # fmt: skip
    ordered = in_order_of(old, wanted.plan)
    added = ordered.columns[len(old.columns) :]
    new = dataclasses.replace(old, columns=(*old.columns, *added), n_views=max(old.n_views, ordered.n_views))
    same = dataclasses.replace(ordered, quantisers=old.quantisers, listing_id=old.listing_id, n_samples=old.n_samples,
                               appended=old.appended)  # fmt: skip
    compare_specs((new if wanted.extend else old).to_json(), same.to_json(), where)
    if new == old:
        return old
    if made := [name for name, quantiser in old.quantisers.items() if quantiser.source is not None]:
        raise ValueError(f"{where}: {made[0]} was made by inspect-cache convert from another dtype, so extract-features cannot "
                         "go on with it; add to the cache that it was made from, and convert again (nothing was changed)")  # fmt: skip
    return new


def in_order_of(old: Plan, plan: Plan) -> Plan:
    """`plan` with its columns in the order of `old`, new ones behind."""
    order = {teacher.column: i for i, teacher in enumerate(old.columns)}
    columns = sorted(plan.columns, key=lambda teacher: order.get(teacher.column, len(order)))
    return dataclasses.replace(plan, columns=tuple(columns))


def images_there(found: Found, plan: Plan, wanted: Sequence[Source]) -> Sequence[Source]:
    """The cache's images by number; where samples.arrow is lost, from the command's."""
    if found.rows is not None:
        return found.rows
    where, given = found.path / "samples.arrow", set(keys_of(wanted))
    if len(given) < plan.n_images:
        raise ValueError(f"{where}: lost, and IMAGES are {len(given)}; expected all {plan.n_images} images of the cache to write it "
                         "again; give all their folders, without new ones")  # fmt: skip
    if strangers := [key for key in found.keys.values() if key not in given]:
        raise ValueError(f"{where}: lost, and {strangers[0]!r} is not among IMAGES; expected all images of the cache to "
                         "write it again; give all their folders, without new ones")  # fmt: skip
    if plan.appended and not found.keys:
        raise ValueError(f"{where}: lost, and the pixels' sidecars do not all tell which image has which number; expected them "
                         "where images were appended; restore it from a copy (nothing was changed)")  # fmt: skip
    rows = {row.key: row for row in canonical_sources(row for row in wanted if row.key)}
    order = found.keys or dict(enumerate(rows))
    there = [rows.get(order.get(number, ""), EMPTY_ROW) for number in range(plan.n_rows)]
    if not made_of(plan, there):
        raise ValueError(f"{where}: lost, and these images are not those that the cache was made of; give the same images, or "
                         "restore it from a copy (nothing was changed)")  # fmt: skip
    return there


def compare(there: SourceTable, rows: SourceTable) -> Differences:
    """Which of these images are there. ValueError where the columns of a file are damaged."""
    none, n = np.zeros(0, np.int64), len(rows)
    if same_images(there, rows):
        keys = rows.columns["key"].array
        return Differences(there, rows, np.where(holds_image(keys), np.arange(n), -1), none, none, none)
    then, now = (table.columns["key"].checked() for table in (there, rows))
    at = pc.fill_null(pc.index_in(now, value_set=then), -1).to_numpy().astype(np.int64)
    here = holds_image(now)
    at[~here] = -1
    gone = holds_image(then)
    gone[at[at >= 0]] = False
    known = np.flatnonzero(at >= 0)
    changed = known[unlike(there, rows, at[known], known)]
    return Differences(there, rows, at, np.flatnonzero(gone), np.flatnonzero(here & (at < 0)), changed)


def holds_image(keys: pa.Array) -> Array:
    """Where rows hold an image, [rows]."""
    return np.array(pc.not_equal(keys, "").to_numpy(zero_copy_only=False))


def unlike(one: SourceTable, other: SourceTable, of_one: Numbers, of_other: Numbers) -> Array:
    """Where images have another size or, where both are known, another hash, [pairs]. of_one, of_other: the pairs' rows."""
    then, now = (table.columns["bytes"].numpy()[at] for table, at in ((one, of_one), (other, of_other)))
    found: Array = then != now
    then, now = (table.columns["sha256"].array for table in (one, other))
    if then.null_count < len(then) and now.null_count < len(now):
        other_hash = pc.not_equal(then.take(pa.array(of_one)), now.take(pa.array(of_other)))
        found |= pc.fill_null(other_hash, False).to_numpy(zero_copy_only=False)
    return found


def refuse_other_images(path: Path, plan: Plan, wanted: Wanted, differences: Differences) -> None:
    """ValueError, with an example, for other images than the cache's; only --append may bring new ones.

    With --append those that the cache has may be left out, without it they must be the cache's own. Where they differ, the
    cache's table of them is suspected first.
    """
    there, rows = differences.there, differences.rows
    gone, new, changed = differences.gone, differences.new, differences.changed
    if not len(changed) and (wanted.append or not len(gone) and not len(new)):
        return
    refuse_altered_samples(path, plan, there)
    then, now = ((there[int(differences.at[changed[0]])], rows[int(changed[0])]) if len(changed) else (EMPTY_ROW, EMPTY_ROW))  # fmt: skip
    if wanted.append:
        refuse_changed(path, then, now, len(changed))
    n_then, n_now = (int(holds_image(table.columns["key"].array).sum()) for table in (there, rows))
    what, key = (
        ("gone", there[int(gone[0])].key) if len(gone) else ("new", rows[int(new[0])].key) if len(new) else ("changed", now.key)
    )  # fmt: skip
    example = f"{what} is {key!r}" + (f", {differ(then, now)}" if what == "changed" else "")
    added = ", add --append to append the new ones" if len(new) and not len(changed) and wanted.extend else ""
    limit = (
        f" (--limit {wanted.limit} takes the first in canonical order of all that IMAGES are now)"
        if wanted.limit
        else ""
    )
    raise ValueError(f"{path}: it was begun with {counted(n_then, 'image')} and this command has {n_now}: {len(gone)} gone, "
                     f"{len(new)} new, {len(changed)} changed ({example}); a cache belongs to one set of images{limit}; "
                     f"give the same images{added}, or write to a new folder (nothing was changed)")  # fmt: skip


def differ(then: Source, now: Source) -> str:
    """How an image's size or, where both are known, hash is another one; empty where they are the same."""
    if then.bytes != now.bytes:
        return f"{then.bytes} bytes then and {now.bytes} now"
    other = then.sha256 and now.sha256 and then.sha256 != now.sha256
    return f"its sha256 was {then.sha256} and is now {now.sha256}" if other else ""


def refuse_changed(path: Path, then: Source, now: Source, n: int) -> NoReturn:
    """ValueError for n images under known keys whose bytes are others. then, now: the first."""
    raise ValueError(f"{path}: image {now.key!r} has other bytes than the image of that key in the cache ({differ(then, now)}; "
                     f"{n} such images); a key names one image, and what is cached stays; rename it, leave it out with "
                     "--include, or write to a new folder (nothing was changed)")  # fmt: skip


def same_images(there: Sequence[Source], rows: Sequence[Source]) -> bool:
    """Whether these are seen at a glance to be the images of the cache, in their order."""
    if not same_columns(there, rows, "key", "bytes"):
        return False
    then, now = (SourceTable.of(each).columns["sha256"].array for each in (there, rows))
    if now.null_count == len(now):
        return True
    return not pc.any(pc.not_equal(then, now)).as_py()  # unknown where one of them is


def same_columns(one: Sequence[Source], other: Sequence[Source], *names: str) -> bool:
    """Whether two tables have the same columns of these names; not known, False, where they are no tables."""
    if not isinstance(one, SourceTable) or not isinstance(other, SourceTable):
        return False
    return all(one.columns[name] == other.columns[name] for name in names)


def keys_of(rows: Sequence[Source]) -> Sequence[str]:
    """The keys of the rows that hold an image."""
    keys = SourceTable.of(rows).columns["key"]
    return Values(pc.filter(keys.array, pc.not_equal(keys.array, "")), "key")


def refuse_altered_samples(path: Path, plan: Plan, there: Sequence[Source]) -> None:
    """ValueError where the plan's ids are not those of its images."""
    if not made_of(plan, there):
        raise ValueError(f"{path / 'samples.arrow'}: its images are not those that the plan was made of; expected their "
                         "listing id; restore it from a copy, or remove it: the same command writes it again")  # fmt: skip


def refuse_other_rows(path: Path, plan: Plan, wanted: Wanted, differences: Differences) -> None:
    """ValueError where the plan's ids are not those of its images, or `wanted` has other labels or ids for the same images."""
    there, rows, at = differences.there, differences.rows, differences.at
    refuse_altered_samples(path, plan, there)
    if not same_columns(there, rows, "key", "label"):  # no id is made of labels
        known = np.flatnonzero(at >= 0)
        then, now = (table.columns["label"].checked() for table in (there, rows))
        then, now = then.take(pa.array(at[known])), now.take(pa.array(known))
        other = pc.fill_null(pc.not_equal(then, now), False).to_numpy(zero_copy_only=False)
        other = other | (then.is_null().to_numpy(zero_copy_only=False) != now.is_null().to_numpy(zero_copy_only=False))
        if len(where := np.flatnonzero(other)):
            first = rows[int(known[where[0]])]
            raise ValueError(f"{path / 'samples.arrow'}: the label of {first.key!r} is {shown(then[int(where[0])].as_py())} there and {shown(first.label)} in IMAGES "
                             f"({len(where)} such images); an image keeps its label; give the images with their labels of then, or if that "
                             "file was damaged, restore it from a copy or remove it: the same command writes it again")  # fmt: skip
    if wanted.plan.listing_id:
        before, now = ({name: each.to_json().get(name, []) for name in ("listing_id", "n_samples", "appended")}
                       for each in (plan, wanted.plan))  # fmt: skip
        compare_specs(before, now, str(path / "plan.json"))


def grown(plan: Plan, there: SourceTable, new: SourceTable, maps: Mapping[str, str]) -> tuple[Plan, SourceTable]:
    """(the plan with these images as a part of their own, all images by number), the same where there are none.

    maps: the sha256 of the values that are given for them, by column.
    """
    if not len(new):
        return plan, there
    ordered = canonical_table(new)
    id = grown_id(plan.parts[-1].listing_id, listing_id(ordered))
    other = {name: sha256 for name, sha256 in maps.items() if sha256 != plan.teacher(name).weights_sha256}
    plan = dataclasses.replace(plan, appended=(*plan.appended, Appended(id, len(ordered), other)))
    gap = plan.parts[-1].numbers.start - len(there)
    return plan, joined_sources([there, SourceTable.of([EMPTY_ROW] * gap), ordered])


def made_of(plan: Plan, rows: Sequence[Source]) -> bool:
    """Whether these are the images, by number, of which every part of the plan was made."""
    ids = [part.listing_id for part in plan.parts]
    return len(rows) == plan.n_rows and listing_ids(plan, rows) == ids


def look(path: Path, *, images: bool = True) -> Found:
    """What lies at `path`. images: samples.arrow is read, too, which takes seconds for a million of them."""
    try:
        refuse_foreign_entries(path)
        if not isinstance(path, Url) and path.exists() and not path.is_dir():
            return Found(path, damage=f"{path}: is a file; expected a new folder for the cache; choose another name")
        if not exists(path / "plan.json"):
            return Found(path, others=others(path))
        plan = load_plan(path)
        if not images:
            return Found(path, plan)
        if exists(path / "samples.arrow"):
            return Found(path, plan, read_sources(path))
        return Found(path, plan, None, keys_of_pixels(path, plan))
    except ValueError as error:
        return Found(path, damage=str(error))


def others(path: Path) -> list[str]:
    """Names of what lies in a folder without a plan and is no beginning of a cache."""
    ours = {DIGESTS, TARS, CACHE_LOCK, PLAN_LOCK}
    here = entries_of(path)
    return sorted(
        file.name for file in here if file.name not in ours and not file.match(TEMPORARY) and not is_samples(file)
    )


def entries_of(path: Path) -> list[Path]:
    """What lies in a folder; at a URL the objects and folders right below it, without the claims of those at work."""
    if not isinstance(path, Url):
        return list(path.iterdir()) if path.exists() else []
    names = {file.relative_to(path).parts[0] for file in files_below(path) if not file.match(".*.lock")}
    return [path / name for name in names - {claims.shared_folder(path / CACHE_LOCK).name}]


def is_samples(file: Path) -> bool:
    """Whether this is a cache's table of samples; one of something else is not replaced."""
    try:
        return file.name == "samples.arrow" and bool(read_samples(file.parent))
    except ValueError:
        return False


def keys_of_pixels(path: Path, plan: Plan) -> dict[int, str]:
    """The key of every number that holds an image, from the sidecars of view 0's pixels; empty where one of them is missing."""
    found: dict[int, str] = {}
    for shard, numbers in enumerate(plan.ranges):
        try:
            keys = read_index(tar_path(path, 0, shard)).keys
        except ValueError:
            return {}
        found |= zip(numbers, keys)
    return found if len(found) == plan.n_images else {}


def write_agreed(path: Path, agreed: Agreed) -> None:
    """Take the steps in turn. A kill between two of them leaves what the same command goes on with."""
    if agreed.steps:
        refuse_changed_plan(path, agreed.before)
    content = readable_json(agreed.plan.to_json())
    for step in agreed.steps:
        if step == "remove manifest.json":
            withdraw_manifest(path, agreed.before or agreed.plan)
        elif step == "write samples.arrow":
            write_sources(path, agreed.rows)
        else:
            publish(path / "plan.json", content, replace=step == "replace plan.json")


def refuse_changed_plan(path: Path, plan: Plan | None) -> None:
    """ValueError where the plan on disk is another one than this by now."""
    there = load_plan(path) if exists(path / "plan.json") else None
    if (there and plain(there.to_json())) != (plan and plain(plan.to_json())):
        raise ValueError(f"{path}: another command has extended or changed this cache meanwhile; everything committed so far "
                         "stays valid; run the newest command again, it finishes")  # fmt: skip


def agree(path: Path, wanted: Wanted) -> Agreed:
    """What is agreed with the disk and written there, for who knows all of the images beforehand."""
    agreed = negotiate(look(path), wanted)
    write_agreed(path, agreed)
    return agreed
