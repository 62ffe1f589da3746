"""manifest/NNNNNN.arrow: count, record, sizes and hashes of some thousand shards; manifest.json holds the digests of their columns.

Tables of numbers that are mapped, and read where they are asked for: as JSON the shards of a billion images have 0.7 GB.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mrmae.shards.format import PIXELS, Array, Plan, SampleTable, Unit, Values, read_arrow, shown, write_arrow
from mrmae.shards.store import unit_files

SHARDS_IN_TABLE = 4096  # shard numbers that one table tells of
# A row per file; the files of a unit of work in the order in which the plan names them, so that no path stands here.
SHARD_TABLE = pa.schema([
    ("view", pa.int32()), ("column", pa.large_string()), ("shard", pa.int32()), ("count", pa.int32()), ("valid", pa.int32()),
    ("record_id", pa.binary(32)), ("bytes", pa.int64()), ("sha256", pa.binary(32)),
])  # fmt: skip
ID = "sha256:"


@dataclasses.dataclass(frozen=True)
class ShardTable:
    """What a finished cache's manifest says of up to SHARDS_IN_TABLE shards.

    columns: of SHARD_TABLE by name. arrays: those that are no text. rows: of each view and column.
    """

    columns: SampleTable
    arrays: Mapping[str, Array]
    rows: Mapping[tuple[int, str], range]

    @staticmethod
    def of(columns: SampleTable) -> "ShardTable":
        """Rows of one view and column lie together, in the order of shards. ValueError for text that is damaged."""
        arrays = {name: values.numpy() for name, values in columns.items() if name != "column"}
        views, names = arrays["view"], columns["column"].array
        names.validate(full=True)
        other = np.diff(views).astype(bool) | pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
        starts = [0, *(np.flatnonzero(other) + 1).tolist(), len(views)]
        groups = [range(start, stop) for start, stop in zip(starts, starts[1:]) if start < stop]
        return ShardTable(columns, arrays, {(int(views[group[0]]), names[group[0]].as_py()): group for group in groups})

    def entry(self, unit: Unit) -> dict[str, Any]:
        """count, valid, record_id and files, [{bytes, sha256}], of a unit; empty where it is not told of."""
        view, column, shard = unit
        group = self.rows.get((view, column), range(0))
        within = self.arrays["shard"][group.start : group.stop]
        rows = slice(*(group.start + int(np.searchsorted(within, shard, side)) for side in ("left", "right")))
        numbers, hashes = (
            self.arrays["bytes"][rows].tolist(),
            [row.tobytes().hex() for row in self.arrays["sha256"][rows]],
        )
        if not numbers:
            return {}
        told = {name: int(self.arrays[name][rows.start]) for name in ("count", "valid")}
        told["record_id"] = ID + self.arrays["record_id"][rows.start].tobytes().hex()
        return {**told, "files": [{"bytes": n, "sha256": sha256} for n, sha256 in zip(numbers, hashes)]}

    @property
    def digests(self) -> dict[str, str]:
        """What manifest.json holds: the digest of every column."""
        return {name: self.columns[name].digest for name in SHARD_TABLE.names}


def table_file(path: Path, table: int) -> Path:
    """Where the table of shards table * SHARDS_IN_TABLE and on lies."""
    return path / "manifest" / f"{table:06d}.arrow"


def n_tables(plan: Plan) -> int:
    """How many tables a finished cache has."""
    return -(-plan.n_shards // SHARDS_IN_TABLE)


def shard_tables(plan: Plan, records: Mapping[Unit, Mapping[str, Any]]) -> list[ShardTable]:
    """The tables of a finished cache. records: of every unit."""
    every = range(plan.n_shards)
    return [ShardTable.of(columns_of(plan, records, every[start : start + SHARDS_IN_TABLE]))
            for start in range(0, plan.n_shards, SHARDS_IN_TABLE)]  # fmt: skip


def columns_of(plan: Plan, records: Mapping[Unit, Mapping[str, Any]], shards: range) -> dict[str, Values]:
    """The columns of the table of these shards: by view, then column in the plan's order, then shard, then file."""
    rows: dict[str, list[Any]] = {name: [] for name in SHARD_TABLE.names}
    for view in range(plan.n_views):
        for column in (PIXELS, *(teacher.column for teacher in plan.columns)):
            for shard in shards:
                record = records[view, column, shard]
                told = {"view": view, "column": column, "shard": shard, "count": record["count"], "valid": record["valid"],
                        "record_id": bytes.fromhex(record["record_id"].removeprefix(ID))}  # fmt: skip
                for name in unit_names(plan, (view, column, shard)):
                    file = record["files"][name]
                    for key, value in (
                        told | {"bytes": file["bytes"], "sha256": bytes.fromhex(file["sha256"])}
                    ).items():
                        rows[key].append(value)
    return {name: Values(pa.array(values, SHARD_TABLE.field(name).type), name) for name, values in rows.items()}


def unit_names(plan: Plan, unit: Unit) -> list[str]:
    """The names of a unit's files inside the cache, in the order of the tables."""
    return [file.as_posix() for file in unit_files(Path(), plan, *unit)]


def write_shard_tables(path: Path, tables: Sequence[ShardTable]) -> None:
    """Put them in the place of those that are there."""
    for number, table in enumerate(tables):
        write_arrow(table_file(path, number), table.columns, SHARD_TABLE)


def read_shard_table(path: Path, number: int, digests: Mapping[str, str]) -> ShardTable:
    """A table, mapped. digests: of its columns, as manifest.json has them. ValueError where it is missing, damaged or another one."""
    file = table_file(path, number)
    todo = "run the same extract-features command again to write it anew"
    try:
        batch, mapped = read_arrow(file, SHARD_TABLE, SHARD_TABLE.names)
        table = ShardTable.of({name: Values(batch[name], name, None, mapped) for name in SHARD_TABLE.names})
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise ValueError(f"{file}: cannot be read ({error}), so it is damaged or missing; {todo}") from None
    if wrong := [name for name, digest in table.digests.items() if digest != digests.get(name)]:
        raise ValueError(
            f"{file}: its column {shown(wrong[0])} is not the one of manifest.json, so it was edited or damaged; {todo}"
        )
    return table
