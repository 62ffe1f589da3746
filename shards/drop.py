"""A column is dropped from a cache; nothing else is touched.

Ids of what stays do not change: a column's id knows nothing of other columns, the geometry's nothing of their number.
"""

import contextlib
from collections.abc import Container
from pathlib import Path

from mrmae.common.backend import Url, exists, files_below
from mrmae.common.files import publish, remove
from mrmae.shards import claims
from mrmae.shards import commit as commits
from mrmae.shards.format import (
    NAME,
    PIXELS,
    Plan,
    codebook_path,
    commit_path,
    load_plan,
    product_path,
    read_samples,
    readable_json,
    stats_path,
    tail_name,
    tail_path,
)
from mrmae.shards.store import column_folder, refuse_foreign_entries


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
    plan = plan.without([column])
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
    return [teacher.column for teacher in plan.columns]


def refuse_damaged(path: Path, plan: Plan) -> None:
    """ValueError, naming the first, where shards of a finished cache are not committed any more: it would stay unfinished.

    Also where its samples cannot be read.
    """
    read_samples(path, plan.numbers)
    if absent := commits.missing(path, plan):
        raise ValueError(f"{commit_path(path, *absent[0])}: damaged, or a file of its shard is (shard {absent[0][2]} of "
                         f"{absent[0][1]}, view {absent[0][0]}; {len(absent)} in all); expected a whole cache; first run inspect-cache "
                         "repair (nothing was changed)")  # fmt: skip


def columns_called(path: Path, name: str) -> list[str]:
    """The columns of that name, or of the teacher of that name: of the plan, and what a killed drop has left."""
    records = path / "commits" / "0"
    names = (
        {file.relative_to(records).parts[0] for file in files_below(records)}
        if isinstance(path, Url)
        else {folder.name for folder in records.glob("*.*") if folder.is_dir()}
    )
    left = [name for name in names if "." in name.strip(".")]
    every = dict.fromkeys([*(spec.column for spec in load_plan(path).columns), *sorted(left)])
    return [column for column in every if name in (column, column.partition(".")[0])]


def orphaned_words(plan: Plan, gone: Container[str]) -> list[str]:
    """What to say of each computed map that stays while the column that it was computed from goes."""
    left = [spec for spec in plan.columns if spec.made and spec.column not in gone]
    return [
        f"{spec.column} was computed from {source} and stays as it is; without that no missing shard of it, and nothing for further images, "
        "can be computed"
        for spec in left
        if (source := str(spec.model_options["source"])) in gone
    ]


def files_of_column(path: Path, column: str) -> list[Path]:
    """Every file that goes with a column: records first (a half-removed shard must not look committed), shards, moments, and
    the codebook of product codes, and the tail (of a map, the codebook) where it is the teacher's last column.

    column: of the plan, or what a killed drop has left. ValueError where there is no such column, and where something of the
    cache is a link.
    """
    refuse_foreign_entries(path)
    plan = load_plan(path)
    teacher, dot, tap = column.partition(".")
    known = [spec.column for spec in plan.columns]
    proper = dot and NAME.fullmatch(teacher) and NAME.fullmatch(tap) and teacher != PIXELS
    folders = column_folders(path, plan, column) if proper else []
    if column not in known and not any(is_there(folder) for folder in folders):
        raise ValueError(f"{path}: there is no column {column!r}; it holds {sorted(known)}; choose one")
    files = [file for folder in folders for file in files_below(folder)]
    tail = tail_name(teacher, tap)
    last = tail not in {spec.tail_name for spec in plan.columns if spec.column != column}
    moments = stats_path(path, column)
    more = [
        moments,
        product_path(path, column),
        *(file for file in files_below(moments.parent) if file.match(f"{column}.*.safetensors")),
        *([tail_path(path, tail)] if last else []),
        *([codebook_path(path, teacher)] if last and tail == teacher else []),
    ]
    return files + [file for file in dict.fromkeys(more) if exists(file)]


def is_there(folder: Path) -> bool:
    """Whether there is such a folder, even an empty one; at a URL whether something lies below."""
    return bool(files_below(folder)) if isinstance(folder, Url) else folder.is_dir()


def column_folders(path: Path, plan: Plan, column: str) -> list[Path]:
    """The folders of a column's records and shards, in every view."""
    views = range(plan.n_views)
    records = [commit_path(path, view, column, 0).parent for view in views]
    return records + [column_folder(path, plan, view, column) for view in views]


def remove_empty(folder: Path) -> None:
    """Remove a column's folders, which hold no file any more; a teacher's own folder goes with its last column. A URL has none."""
    if isinstance(folder, Url):
        return
    for below in sorted((below for below in folder.rglob("*") if below.is_dir()), reverse=True):
        below.rmdir()
    with contextlib.suppress(OSError):  # never there, or the teacher has other columns
        folder.rmdir()
        folder.parent.rmdir()
