"""manifest.json: what a finished cache holds, by size, hash and id. It follows from the plan, the samples and the commit records.

What it says of shards stands in tables beside it (shard_table.py). docs/format.md, "Manifest". Commit records come first: where they
and the manifest disagree, the manifest is written anew.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from mrmae.common.backend import exists, read_bytes
from mrmae.common.files import publish
from mrmae.shards.format import (
    FORMAT_VERSION,
    SAMPLES,
    Plan,
    QuantiserFields,
    SampleTable,
    SourceTable,
    TeacherSpec,
    Unit,
    codebook_path,
    content_id,
    dataset_ids,
    expect_kind,
    kept_path,
    plain,
    read_json,
    readable_json,
    shown,
    tail_name,
    tail_path,
)
from mrmae.shards.shard_table import (
    SHARDS_IN_TABLE,
    ShardTable,
    read_shard_table,
    shard_tables,
    unit_names,
    write_shard_tables,
)

MOST_MANIFEST_BYTES = 1 << 26  # a KB for each part of a cache that grew every hour for years


class FileFields(TypedDict):
    """What a commit record and the manifest say of a file."""

    bytes: int
    sha256: str


class QualityFields(TypedDict):
    """What storing cost a column."""

    snr_db: float
    p999_one_minus_cos: float
    zero_tokens: int


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


class ManifestFields(TypedDict):
    """manifest.json, beside the plan's fields."""

    format_version: int
    dataset_ids: list[str]
    geometry_id: str
    n_valid: int
    samples: dict[str, str]
    columns: list[ColumnFields]
    shards: list[dict[str, str]]
    manifest_id: str


class Manifest(dict[str, Any]):
    """The fields of manifest.json, and the tables of shards that it holds the digests of, each read when it is asked for. Empty: there is none."""

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        super().__init__(fields)
        self.path = path
        self._tables: dict[int, ShardTable] = {}

    def table(self, number: int) -> ShardTable:
        """One of the tables. ValueError where it is not the one that the manifest was written with."""
        if number not in self._tables:
            self._tables[number] = read_shard_table(self.path, number, self["shards"][number])
        return self._tables[number]

    def tables(self) -> Iterator[ShardTable]:
        """All of them."""
        return (self.table(number) for number in range(len(self.get("shards", ()))))

    def told(self, unit: Unit) -> dict[str, Any]:
        """What is said of a unit: count, valid, record_id, and files in the order of the plan; empty where nothing is."""
        number = unit[2] // SHARDS_IN_TABLE
        return self.table(number).entry(unit) if number < len(self.get("shards", ())) else {}

    def entry(self, plan: Plan, unit: Unit) -> dict[str, Any]:
        """The same with files by name; without any where they are not as many as the plan's."""
        if told := self.told(unit):
            names = unit_names(plan, unit)
            told["files"] = dict(zip(names, told["files"])) if len(names) == len(told["files"]) else {}
        return told


def read_manifest(path: Path) -> Manifest:
    """The manifest of a finished cache. ValueError when it was edited, is damaged or of another format version."""
    file = path / "manifest.json"
    todo = "run the same extract-features command again to write it anew"
    try:
        manifest: dict[str, Any] = read_json(file, dict[str, Any], MOST_MANIFEST_BYTES)
        version = manifest.get("format_version", FORMAT_VERSION)
        if version == FORMAT_VERSION:
            expect_kind(manifest, ManifestFields)
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); {todo}") from None
    if version != FORMAT_VERSION:  # another one's fields are others
        raise ValueError(
            f"{file}: format version {shown(version)}; this mrmae reads {FORMAT_VERSION}; extract the cache anew"
        )
    if (
        content_id({name: value for name, value in manifest.items() if name != "manifest_id"})
        != manifest["manifest_id"]
    ):
        raise ValueError(f"{file}: it does not match its own id, so it was edited or damaged; {todo}")
    if wrong := misnamed(manifest):
        raise ValueError(f"{file}: it is no manifest that mrmae writes ({wrong}), so it was edited; {todo}")
    return Manifest(manifest, path)


def misnamed(manifest: Mapping[str, Any]) -> str:
    """Which column or tail of a manifest has not the name that follows from its teacher; empty for none."""
    for column in manifest["columns"]:
        name, tap, tail = column["teacher"]["name"], column["teacher"]["tap"], column["tail"]
        if column["name"] != f"{name}.{tap}":
            return f"column {shown(column['name'])} of teacher {shown(name)}"
        kept = (
            codebook_path(Path(), name)
            if column["teacher"]["library"] == "map"
            else tail_path(Path(), tail_name(name, tap))
        )
        if tail is not None and tail["file"] != kept.as_posix():
            return f"the tail of {column['name']}"
    return ""


def plan_fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """plan.json's fields, as a manifest repeats them."""
    not_there = ("dataset_ids", "geometry_id", "n_valid", "samples", "shards", "manifest_id", "columns")
    return {
        **{name: value for name, value in manifest.items() if name not in not_there},
        "columns": [column["teacher"] for column in manifest["columns"]],
        "quantisers": {column["name"]: column["quantiser"] for column in manifest["columns"]},
    }


def write_manifest(path: Path, plan: Plan, records: Mapping[Unit, Mapping[str, Any]], samples: SampleTable) -> Manifest:
    """The manifest, written with its tables of shards, which come first."""
    tables = shard_tables(plan, records)
    write_shard_tables(path, tables)
    body = manifest_body(path, plan, records, samples, tables)
    manifest = Manifest({**body, "manifest_id": content_id(body)}, path)
    publish(path / "manifest.json", readable_json(manifest), replace=True)
    return manifest


def manifest_body(
    path: Path, plan: Plan, records: Mapping[Unit, Mapping[str, Any]], samples: SampleTable, tables: Sequence[ShardTable]
) -> dict[str, Any]:  # fmt: skip
    """All of the manifest but its own id. records: of every unit; samples: the final ones."""
    return {
        **{name: value for name, value in plan.to_json().items() if name not in ("columns", "quantisers")},
        "dataset_ids": dataset_ids(plan, SourceTable(samples)),
        "geometry_id": plan.geometry_id,
        "n_valid": int(samples["valid"].numpy().sum()),
        "samples": samples_digests(samples),
        "columns": [column_summary(path, plan, teacher.column, records) for teacher in plan.columns],
        "shards": [table.digests for table in tables],
    }


def column_summary(path: Path, plan: Plan, column: str, records: Mapping[Unit, Mapping[str, Any]]) -> dict[str, Any]:
    """A column as the manifest names it: id, teacher, quantiser, tail or codebook, and the worst quality of its shards."""
    teacher = plan.teacher(column)
    tail = kept_path(path, teacher)
    return {
        "name": column,
        "id": plan.ids[column],
        "teacher": plain(teacher),
        "quantiser": plan.quantisers[column].to_json(),
        "quality": worst_quality([record for unit, record in records.items() if unit[1] == column]),
        "tail": file_summary(path, tail) if exists(tail) else None,
    }


def worst_quality(records: Sequence[Mapping[str, Any]]) -> dict[str, float | int] | None:
    """The lowest SNR, the largest 1 - cos and all zero tokens of a column's shards; None where none was measured."""
    quality = [record["quality"] for record in records if record.get("quality")]
    if not quality:
        return None
    return {
        "snr_db": min(q["snr_db"] for q in quality),
        "p999_one_minus_cos": max(q["p999_one_minus_cos"] for q in quality),
        "zero_tokens": sum(q["zero_tokens"] for q in quality),
    }


def samples_digests(table: SampleTable, names: Sequence[str] = SAMPLES.names) -> dict[str, str]:
    """The digest of every column of samples.arrow (not of its bytes: they depend on pyarrow's version), or of these."""
    return {name: table[name].digest for name in names}


def file_summary(path: Path, file: Path) -> dict[str, Any]:
    """Name, size and sha256 of a small file."""
    data = read_bytes(file)
    return {"file": file.relative_to(path).as_posix(), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
