"""What is wrong with a cache: checked when it is opened, every problem reported at once."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mrmae.shards.commit import samples_id, units
from mrmae.shards.plan import PIXELS, Plan
from mrmae.shards.remote import RemotePath
from mrmae.shards.spec import FORMAT_VERSION, content_id

SHOWN = 50  # problems in one message


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished cache. ValueError when it was edited, is damaged or of another format version."""
    file = path / "manifest.json"
    todo = "run the same extract-features command again to write it anew"
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        body = {name: value for name, value in manifest.items() if name != "manifest_id"}
        version, intact = manifest["format_version"], content_id(body) == manifest["manifest_id"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); {todo}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{file}: format version {version}; this mrmae reads {FORMAT_VERSION}; use a matching one")
    if not intact:
        raise ValueError(f"{file}: it does not match its own id, so it was edited or damaged; {todo}")
    return manifest


def refuse_problems(path: Path, plan: Plan, manifest: Mapping[str, Any], table: Mapping[str, list[Any]]) -> None:
    """ValueError that lists everything wrong with names, sizes and ids; nothing is read but metadata."""
    found = [*id_problems(plan, manifest, table), *file_problems(path, plan, manifest)]
    if found:
        more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        todo = ("upload these files again from the folder it was extracted to" if isinstance(path, RemotePath) else
                "run the same extract-features command again, it rewrites what is missing")  # fmt: skip
        raise ValueError(f"{path}: {len(found)} problems; the cache cannot be trusted; {todo}:\n  "
                         + "\n  ".join(found[:SHOWN] + more))  # fmt: skip


def id_problems(plan: Plan, manifest: Mapping[str, Any], table: Mapping[str, list[Any]]) -> Iterator[str]:
    """Where plan.json, manifest.json and samples.parquet do not belong together."""
    ids = {column["name"]: column["id"] for column in manifest["columns"]}
    if {PIXELS: manifest["geometry_id"], **ids} != plan.ids:
        yield "plan.json: its ids are not those of manifest.json"
    if len(table["key"]) != plan.n_rows:
        yield f"samples.parquet: {len(table['key'])} rows; the manifest says {plan.n_rows}"
    elif samples_id(table) != manifest["samples_id"]:
        yield "samples.parquet: its rows are not those the manifest was written for, or manifest.json was edited"


def file_problems(path: Path, plan: Plan, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Files of the manifest that are missing or of another size, and missing metadata of columns."""
    for name, n_bytes in promised_files(manifest):
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            yield f"{name}: {error.strerror}"
            continue
        if size != n_bytes:
            yield f"{name}: {size} bytes; the manifest says {n_bytes}"
    for view, teacher in itertools.product(range(plan.n_views), plan.columns):
        folder = plan.column_folder(path, view, teacher.column)
        for file in plan.storage.metadata_paths(folder, plan.layout(teacher.column)):
            if not file.exists():
                yield f"{file.relative_to(path)}: missing metadata of a column"


def promised_files(manifest: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(relative path, bytes) of every shard file and tail."""
    for columns in manifest["shards"].values():
        for shard in itertools.chain.from_iterable(columns.values()):
            for name, about in shard["files"].items():
                yield name, about["bytes"]
    for column in manifest["columns"]:
        if column["tail"]:
            yield column["tail"]["file"], column["tail"]["bytes"]


def refuse_unfinished(path: Path, plan: Plan, done: int) -> None:
    """ValueError for a cache without a manifest: how far it is, and how to go on."""
    total = sum(1 for _ in units(plan))
    raise ValueError(f"{path}: this cache is unfinished (no manifest.json): {done} of {total} shards are committed; "
                     "a finished cache was expected; run the same extract-features command again, it continues where "
                     "it stopped, or use what is there with --allow-partial (open_cache(..., allow_partial=True))")  # fmt: skip
