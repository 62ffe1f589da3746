"""What is wrong with a cache: checked when it is opened, every problem reported at once."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from mrmae.common.backend import Url, exists, read_bytes, size_of
from mrmae.shards.commit import FileFields, QualityFields, samples_id
from mrmae.shards.format import (
    FORMAT_VERSION,
    PIXELS,
    Plan,
    QuantiserFields,
    TeacherSpec,
    Unit,
    content_id,
    parsed,
    tail_path,
    units,
)
from mrmae.shards.store import column_folder, storage_of, unit_files

SHOWN = 50  # problems in one message


class TailFields(FileFields):
    """A teacher's tail in the manifest."""

    file: str


class ColumnFields(TypedDict):
    """A column in the manifest."""

    name: str
    id: str
    teacher: TeacherSpec
    quantiser: QuantiserFields
    quality: QualityFields | None
    tail: TailFields | None


class ShardFields(TypedDict):
    """A shard in the manifest."""

    count: int
    valid: int
    record_id: str
    files: dict[str, FileFields]


class ManifestFields(TypedDict):
    """manifest.json, beside the plan's fields."""

    format_version: int
    geometry_id: str
    n_valid: int
    samples_id: str
    columns: list[ColumnFields]
    shards: dict[str, dict[str, list[ShardFields]]]
    manifest_id: str


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished cache. ValueError when it was edited, is damaged or of another format version."""
    file = path / "manifest.json"
    todo = "run the same extract-features command again to write it anew"
    try:
        manifest: dict[str, Any] = parsed(read_bytes(file), ManifestFields)
        body = {name: value for name, value in manifest.items() if name != "manifest_id"}
        version, intact = manifest["format_version"], content_id(body) == manifest["manifest_id"]
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); {todo}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{file}: format version {version}; this mrmae reads {FORMAT_VERSION}; extract the cache anew")
    if not intact:
        raise ValueError(f"{file}: it does not match its own id, so it was edited or damaged; {todo}")
    if wrong := misnamed(manifest):
        raise ValueError(f"{file}: it is no manifest that mrmae writes ({wrong}), so it was edited; {todo}")
    return manifest


def misnamed(manifest: Mapping[str, Any]) -> str:
    """Which column or tail of a manifest has not the name that follows from its teacher; empty for none."""
    for column in manifest["columns"]:
        name, tap, tail = column["teacher"]["name"], column["teacher"]["tap"], column["tail"]
        if column["name"] != f"{name}.{tap}":
            return f"column {column['name']!r} of teacher {name!r}"
        if tail is not None and tail["file"] != tail_path(Path(), name).as_posix():
            return f"the tail of {column['name']}"
    return ""


def refuse_problems(path: Path, plan: Plan, manifest: Mapping[str, Any], table: Mapping[str, list[Any]]) -> None:
    """ValueError that lists everything wrong with names, sizes and ids; nothing is read but metadata."""
    found = [*id_problems(plan, manifest, table), *file_problems(path, plan, manifest)]
    if found:
        more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        todo = ("upload these files again from the folder it was extracted to" if isinstance(path, Url) else
                "run the same extract-features command again, it rewrites what is missing")  # fmt: skip
        raise ValueError(f"{path}: {len(found)} problems; the cache cannot be trusted; {todo}:\n  "
                         + "\n  ".join(found[:SHOWN] + more))  # fmt: skip


def id_problems(plan: Plan, manifest: Mapping[str, Any], table: Mapping[str, list[Any]]) -> Iterator[str]:
    """Where plan.json, manifest.json and samples.parquet do not belong together."""
    ids = {column["name"]: column["id"] for column in manifest["columns"]}
    if {PIXELS: manifest["geometry_id"], **ids} != plan.ids:
        yield "plan.json: its ids are not those of manifest.json"
    if samples_id(table) != manifest["samples_id"]:
        yield "samples.parquet: its rows are not those the manifest was written for, or manifest.json was edited"


def file_problems(path: Path, plan: Plan, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Files of the manifest that are missing or of another size, and missing metadata of columns."""
    for unit in units(plan):
        for name in unknown_names(path, plan, unit, promised(manifest, unit).get("files", {})):
            yield f"manifest.json: {name!r} is no file of shard {unit[2]} of {unit[1]}, view {unit[0]}"
    for file, n_bytes in promised_files(path, plan, manifest):
        name = file.relative_to(path).as_posix()
        try:
            size = size_of(file)
        except OSError as error:
            yield f"{name}: {error.strerror}"
            continue
        if size != n_bytes:
            yield f"{name}: {size} bytes; the manifest says {n_bytes}"
    for view, teacher in itertools.product(range(plan.n_views), plan.columns):
        folder = column_folder(path, plan, view, teacher.column)
        for file in storage_of(plan).metadata_paths(folder, plan.layout(teacher.column)):
            if not exists(file):
                yield f"{file.relative_to(path)}: missing metadata of a column"


def promised_files(path: Path, plan: Plan, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, int | None]]:
    """Every shard file and tail of the plan, and how many bytes the manifest says that it has; None where it does not say.

    The plan tells where files lie; a name in the manifest is only compared, never opened.
    """
    for unit in units(plan):
        files = promised(manifest, unit).get("files", {})
        for file in unit_files(path, plan, *unit):
            yield file, files.get(file.relative_to(path).as_posix(), {}).get("bytes")
    told = {column["name"]: column["tail"] for column in manifest["columns"]}
    for teacher in plan.columns:
        if tail := told.get(teacher.column):
            yield tail_path(path, teacher.name), tail["bytes"]


def unknown_names(path: Path, plan: Plan, unit: Unit, files: Iterable[str]) -> list[str]:
    """The names among `files`, as a manifest or a commit record tells them, that are none of the unit's."""
    return sorted(set(files) - {file.relative_to(path).as_posix() for file in unit_files(path, plan, *unit)})


def promised(manifest: Mapping[str, Any], unit: Unit) -> dict[str, Any]:
    """What the manifest says of a unit: count, valid, files; empty where it says nothing."""
    view, column, shard = unit
    entries = manifest["shards"].get(str(view), {}).get(column, [])
    return dict(entries[shard]) if shard < len(entries) else {}


def refuse_unfinished(path: Path, plan: Plan, done: int) -> None:
    """ValueError for a cache without a manifest: how far it is, and how to go on."""
    total = sum(1 for _ in units(plan))
    raise ValueError(f"{path}: this cache is unfinished (no manifest.json): {done} of {total} shards are committed; "
                     "a finished cache was expected; run the same extract-features command again, it continues where "
                     "it stopped, or use what is there with --allow-partial (open_cache(..., allow_partial=True))")  # fmt: skip
