"""samples.parquet: every image's key, label, size and sha256, and what became of it. docs/format.md, "Plan, samples, tail"."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mrmae.common.backend import read_bytes
from mrmae.common.files import publish
from mrmae.shards.format.spec import canonical_order, shown

SAMPLES = pa.schema([
    ("number", pa.int64()), ("key", pa.string()), ("label", pa.string()), ("bytes", pa.int64()),
    ("sha256", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("valid", pa.bool_()),
    ("reason", pa.string()),
])  # fmt: skip
NO_IMAGE: dict[str, Any] = {
    "key": "", "label": None, "bytes": 0, "sha256": "", "height": 0, "width": 0, "valid": False,
    "reason": "this row holds no image: it lies before an appended part",
}  # fmt: skip
MOST_UNPACKED = 64  # bytes of a column for one of the file: hashes and keys do not compress as well by far


@dataclasses.dataclass(frozen=True)
class Source:
    """An image of the data set: key, label, size and sha256 (hex) of the encoded file."""

    key: str
    label: str | None
    bytes: int
    sha256: str


def canonical_sources(sources: Iterable[Source]) -> list[Source]:
    """The sources in canonical order: position = sample number. ValueError names duplicate keys."""
    sources = list(sources)
    return [sources[i] for i in canonical_order([source.key for source in sources])]


def write_samples(path: Path, table: Mapping[str, Sequence[Any]]) -> None:
    """Write samples.parquet. table: its columns by name, without the number, which is the position.

    Rows without a key, those before an appended part, are left out.
    """
    numbers = [number for number, key in enumerate(table["key"]) if key]
    columns = {"number": numbers, **{name: [values[i] for i in numbers] for name, values in table.items()}}
    out = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, SAMPLES), out, compression="zstd", write_page_checksum=True)
    publish(path / "samples.parquet", out.getvalue().to_pybytes(), replace=True)


def write_sources(path: Path, sources: Sequence[Source]) -> None:
    """Write samples.parquet with what is known before any image is decoded; finalising fills in the rest."""
    table = {name: [getattr(source, name) for source in sources] for name in ("key", "label", "bytes", "sha256")}
    unknown = {name: [None] * len(sources) for name in ("height", "width", "valid", "reason")}
    write_samples(path, table | unknown)


def read_samples(path: Path, parts: Sequence[range] | None = None) -> dict[str, list[Any]]:
    """The columns of samples.parquet by name, without the number, which is the position.

    parts: the sample numbers of the plan's parts; what comes behind is no part of the plan (an append was killed before it was
    planned). None: one part, as long as the table. Rows that hold no image, before an appended part, have the key "" and are not
    valid. ValueError when the file is missing, damaged, or has other numbers.
    """
    file = path / "samples.parquet"
    try:
        table = read_table(read_bytes(file))
        parts = [range(len(table))] if parts is None else parts
        n = refuse_other_numbers(table["number"].to_numpy(), parts)
        columns = {name: table[name].slice(0, n).to_pylist() for name in SAMPLES.names[1:]}
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise ValueError(
            f"{file}: cannot be read ({error}); it is damaged, missing or another cache's; restore it"
        ) from None
    if n == parts[-1].stop:
        return columns
    rows = {name: [NO_IMAGE[name]] * parts[-1].stop for name in columns}
    for name, values in columns.items():
        for part, end in zip(parts, itertools.accumulate(map(len, parts))):
            rows[name][part.start : part.stop] = values[end - len(part) : end]
    return rows


def read_table(data: bytes) -> pa.Table:
    """The table of samples in a parquet file, read by this thread alone.

    Arrow's own threads may hold Python's bytes a moment longer than the read; where the interpreter ends in that moment, the
    process aborts. ValueError, before anything is allocated, where the file is too short for what it says of itself.
    """
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True) as parquet:
        about = parquet.metadata
        claimed = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if not parquet.schema_arrow.equals(SAMPLES):
            raise ValueError(f"its columns are {shown(parquet.schema_arrow.names)}; expected {SAMPLES.names}")
        if not 0 < about.num_rows <= len(data) or claimed > MOST_UNPACKED * len(data):
            raise ValueError(
                f"it says that it holds {about.num_rows} rows and {claimed} bytes, in a file of {len(data)}"
            )
        table = parquet.read(use_threads=False)
    if empty := [name for name in ("number", "key", "bytes", "sha256") if table[name].null_count]:
        raise ValueError(f"its column {empty[0]} has rows without a value")
    return table


def refuse_other_numbers(numbers: Any, parts: Sequence[range]) -> int:
    """Rows of the table that are the plan's. ValueError unless they have the numbers of its parts."""
    n = sum(map(len, parts))
    if len(numbers) < n:
        raise ValueError(f"it has {len(numbers)} rows; the plan says {n}")
    for part, end in zip(parts, itertools.accumulate(map(len, parts))):
        if not np.array_equal(numbers[end - len(part) : end], np.arange(part.start, part.stop)):
            raise ValueError(f"its rows are not numbered {part.start} to {part.stop - 1} as the plan's samples are")
    if (numbers[n:] < parts[-1].stop).any():  # a killed append leaves rows with higher numbers
        raise ValueError("it has rows twice")
    return n
