"""Which of a cache's own descriptions to believe: plan.json, manifest.json, commit records, columns' attributes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrmae.common.backend import exists, read_bytes
from mrmae.shards import verify
from mrmae.shards.commit import read_record
from mrmae.shards.format import Plan, Unit, column_attributes, commit_path, load_plan, parsed, units
from mrmae.shards.store import column_folder, storage_of

METADATA_FIELDS = ("zarr_format", "node_type", "attributes", "shape", "data_type", "chunk_grid", "chunk_key_encoding",
                   "fill_value", "codecs")  # fmt: skip
Manifest = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a file of the cache. unit: the shard (view, column, shard) it belongs to, if any."""

    file: str
    what: str
    unit: Unit | None = None

    def __str__(self) -> str:
        view, column, shard = self.unit or (0, "", 0)
        whose = f" (shard {shard} of {column}, view {view})" if self.unit else ""
        return f"{self.file}{whose}: {self.what}"


def manifest_of(path: Path) -> tuple[Manifest | None, list[Problem]]:
    """The manifest, None where it is absent or cannot be trusted."""
    if not exists(path / "manifest.json"):
        return None, []
    try:
        return verify.read_manifest(path), []
    except (ValueError, OSError) as error:
        return None, [Problem("manifest.json", reason(error, path / "manifest.json"))]


def trusted(path: Path) -> tuple[Plan, Manifest | None, list[Problem]]:
    """The plan, and the manifest that belongs to it (else None).

    Where plan.json and manifest.json contradict each other, commit records and columns' attributes decide who is right.
    Raises ValueError where neither can be read.
    """
    manifest, problems = manifest_of(path)
    promised = None
    try:
        promised = Plan.from_json(plan_fields(manifest), str(path / "manifest.json")) if manifest else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        manifest, problems = None, [Problem("manifest.json", f"it is no manifest ({error}), so it was edited")]
    try:
        plan = load_plan(path)
        fields = parsed(read_bytes(path / "plan.json"), dict[str, Any])
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        if promised is None:
            raise ValueError(f"{path}: neither plan.json nor manifest.json can be read ({reason(error, path)}); this is "
                             "no cache, or one that must be extracted anew") from None  # fmt: skip
        said = f"cannot be read ({reason(error, path / 'plan.json')}); the manifest holds the same"
        return promised, manifest, [*problems, Problem("plan.json", said)]
    if manifest is None or promised is None or fields == plan_fields(manifest):
        return plan, manifest, problems
    if agreement(path, promised) > agreement(path, plan):
        return promised, manifest, [Problem("plan.json", "it is not the plan of the manifest and of the shards")]
    return plan, None, [Problem("manifest.json", "it is not the manifest of plan.json and of the shards")]


def agreement(path: Path, plan: Plan) -> int:
    """How many commit records and columns say that they were written for this plan."""
    found = 0
    for view, column, shard in units(plan):
        record = read_record(commit_path(path, view, column, shard))
        found += record is not None and record.get("id") == plan.shard_ids(shard).get(column)
    for teacher in plan.columns:
        try:
            attributes = storage_of(plan).read_attributes(column_folder(path, plan, 0, teacher.column))[1]
        except ValueError:
            continue
        expected = column_attributes(plan, 0, teacher.column) if teacher.column in plan.quantisers else None
        found += {name: attributes.get(name) for name in expected or {}} == expected
    return found


def plan_fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """plan.json's fields, as a manifest repeats them."""
    not_there = ("geometry_id", "n_valid", "samples_id", "shards", "manifest_id", "columns")
    return {
        **{name: value for name, value in manifest.items() if name not in not_there},
        "columns": [column["teacher"] for column in manifest["columns"]],
        "quantisers": {column["name"]: column["quantiser"] for column in manifest["columns"]},
    }


def fields_of(content: bytes) -> dict[str, Any] | None:
    """What a column's metadata say of the data (other versions of zarr may add fields); None where they are not JSON."""
    try:
        fields = parsed(content, dict[str, Any])
        return {name: value for name, value in fields.items() if name in METADATA_FIELDS}
    except ValueError:
        return None


def reason(error: Exception, file: Path) -> str:
    """An error's message without the file's name in front."""
    return str(error).removeprefix(f"{file}: ") or type(error).__name__
