"""A finished cache grows and shrinks: teachers and views are added, a column is dropped, nothing else is touched.

Ids of what exists do not change: a column's id knows nothing of other columns, the geometry's nothing of their number.
"""

import contextlib
import dataclasses
from pathlib import Path

from mrmae.common.backend import exists, refuse_url
from mrmae.common.files import publish, remove
from mrmae.shards import claims
from mrmae.shards import commit as commits
from mrmae.shards.format import NAME, PIXELS, Plan, commit_path, compare_specs, load_plan, readable_json, tail_path
from mrmae.shards.stats import stats_path
from mrmae.shards.store import column_folder, refuse_foreign_entries


def extend_plan(path: Path, wanted: Plan) -> Plan:
    """The plan on disk with the teachers and views of `wanted` that it does not have yet; written if there are any.

    The manifest is removed then: the cache is unfinished until the new shards are committed.
    Raises ValueError, and changes nothing, for anything that differs and is no addition.
    """
    old = load_plan(path)
    new = extended(old, wanted, str(path / "plan.json"))
    if new != old:
        commits.withdraw_manifest(path, old)
        publish(path / "plan.json", readable_json(new.to_json()), replace=True)
    return new


def extended(old: Plan, wanted: Plan, where: str) -> Plan:
    """`old` with what `wanted` adds. ValueError where they differ otherwise, naming the field and both values."""
    names = {teacher.column for teacher in wanted.columns}
    if gone := [teacher.column for teacher in old.columns if teacher.column not in names]:
        raise ValueError(f"{where}: the cache has column {gone[0]}, which this command does not ask for; teachers are "
                         "added by repeating the cache's and giving one more --teacher, and dropped with inspect-cache "
                         "drop (nothing was changed)")  # fmt: skip
    ordered = in_order_of(old, wanted)
    added = ordered.columns[len(old.columns) :]
    grown = dataclasses.replace(old, columns=(*old.columns, *added), n_views=max(old.n_views, wanted.n_views))
    same = dataclasses.replace(ordered, quantisers=old.quantisers)
    compare_specs(grown.to_json(), same.to_json(), where)
    if grown == old:
        return old
    if made := [name for name, quantiser in old.quantisers.items() if quantiser.source is not None]:
        raise ValueError(f"{where}: {made[0]} was made by inspect-cache convert from another dtype, so extract-features cannot "
                         "go on with it; add to the cache that it was made from, and convert again (nothing was changed)")  # fmt: skip
    return grown


def in_order_of(old: Plan, plan: Plan) -> Plan:
    """`plan` with its columns in the order of `old`, new ones behind."""
    order = {teacher.column: i for i, teacher in enumerate(old.columns)}
    columns = sorted(plan.columns, key=lambda teacher: order.get(teacher.column, len(order)))
    return dataclasses.replace(plan, columns=tuple(columns))


def drop_column(path: Path, column: str) -> list[str]:
    """The remaining columns, once a column's shards, records, moments and (where no other tap needs it) tail are gone.

    The plan goes first: whatever is left by a kill is no part of the cache; the same call removes it. A complete cache
    is finalised again. ValueError where there is no such column, or where someone is at work on the cache.
    """
    files_of_column(path, column)  # refused before anything is made there
    with claims.alone(path):
        return dropped(path, column)


def dropped(path: Path, column: str) -> list[str]:
    """The same, while nobody else is at work on the cache."""
    files, plan = files_of_column(path, column), load_plan(path)
    kept = tuple(teacher for teacher in plan.columns if teacher.column != column)
    quantisers = {name: quantiser for name, quantiser in plan.quantisers.items() if name != column}
    plan = dataclasses.replace(plan, columns=kept, quantisers=quantisers)
    if exists(path / "manifest.json"):
        refuse_damaged(path, plan)
    commits.withdraw_manifest(path, plan)
    publish(path / "plan.json", readable_json(plan.to_json()), replace=True)
    for file in files:
        remove(file)
    if not commits.missing(path, plan):
        commits.finalise(path, plan)
    for folder in reversed(column_folders(path, plan, column)):  # as long as there is one, the same call goes on
        remove_empty(folder)
    return [teacher.column for teacher in kept]


def refuse_damaged(path: Path, plan: Plan) -> None:
    """ValueError, naming the first, where shards of a finished cache are not committed any more: it would stay unfinished."""
    if absent := commits.missing(path, plan):
        raise ValueError(f"{commit_path(path, *absent[0])}: damaged, or a file of its shard is (shard {absent[0][2]} of "
                         f"{absent[0][1]}, view {absent[0][0]}; {len(absent)} in all); expected a whole cache; first run inspect-cache "
                         "repair (nothing was changed)")  # fmt: skip


def columns_called(path: Path, name: str) -> list[str]:
    """The columns of that name, or of the teacher of that name: of the plan, and what a killed drop has left."""
    refuse_url(path)
    left = [folder.name for folder in (path / "commits" / "0").glob("*.*") if folder.is_dir()]
    every = dict.fromkeys([*(spec.column for spec in load_plan(path).columns), *sorted(left)])
    return [column for column in every if name in (column, column.partition(".")[0])]


def files_of_column(path: Path, column: str) -> list[Path]:
    """Every file that goes with a column: records first (a half-removed shard must not look committed), shards, moments, and
    the tail where it is the teacher's last column.

    column: of the plan, or what a killed drop has left. ValueError where there is no such column, and where something of the
    cache is a link.
    """
    refuse_url(path)
    refuse_foreign_entries(path)
    plan = load_plan(path)
    teacher, dot, tap = column.partition(".")
    known = [spec.column for spec in plan.columns]
    proper = dot and NAME.fullmatch(teacher) and NAME.fullmatch(tap) and teacher != PIXELS
    folders = column_folders(path, plan, column) if proper else []
    if column not in known and not any(folder.is_dir() for folder in folders):
        raise ValueError(f"{path}: there is no column {column!r}; it holds {sorted(known)}; choose one")
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if not file.is_dir()]
    last = teacher not in {spec.name for spec in plan.columns if spec.column != column}
    more = [stats_path(path, column), *([tail_path(path, teacher)] if last else [])]
    return files + [file for file in more if file.exists()]


def column_folders(path: Path, plan: Plan, column: str) -> list[Path]:
    """The folders of a column's records and shards, in every view."""
    views = range(plan.n_views)
    records = [commit_path(path, view, column, 0).parent for view in views]
    return records + [column_folder(path, plan, view, column) for view in views]


def remove_empty(folder: Path) -> None:
    """Remove a column's folders, which hold no file any more; a teacher's own folder goes with its last column."""
    for below in sorted((below for below in folder.rglob("*") if below.is_dir()), reverse=True):
        below.rmdir()
    with contextlib.suppress(OSError):  # never there, or the teacher has other columns
        folder.rmdir()
        folder.parent.rmdir()
