"""samples.parquet: every image's key, label, size and sha256, and what became of it. docs/format.md, "Plan, samples, tail"."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mrmae.common.backend import read_bytes
from mrmae.common.files import publish
from mrmae.shards.format.spec import canonical_order

SAMPLES = pa.schema([
    ("number", pa.int64()), ("key", pa.string()), ("label", pa.string()), ("bytes", pa.int64()),
    ("sha256", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("valid", pa.bool_()),
    ("reason", pa.string()),
])  # fmt: skip
NO_IMAGE: dict[str, Any] = {
    "key": "", "label": None, "bytes": 0, "sha256": "", "height": 0, "width": 0, "valid": False,
    "reason": "this row holds no image: it lies before an appended part",
}  # fmt: skip


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


def read_table(data: bytes) -> pa.Table:
    """The table of a parquet file, read by this thread alone.

    Arrow's own threads may hold Python's bytes a moment longer than the read; where the interpreter ends in that moment, the
    process aborts.
    """
    source = pa.BufferReader(data)
    with pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as parquet:
        return parquet.read(use_threads=False)


def read_samples(path: Path, n_rows: int | None = None) -> dict[str, list[Any]]:
    """The columns of samples.parquet by name, without the number, which is the position.

    Rows that hold no image, before an appended part, have the key "" and are not valid. n_rows: what comes behind is not part
    of the plan (an append was killed before it was planned). ValueError when it is missing or damaged.
    """
    file = path / "samples.parquet"
    try:
        table = read_table(read_bytes(file))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: cannot be read ({error}); it is damaged or missing; restore it") from None
    numbers = table["number"].to_pylist() if table.schema.equals(SAMPLES) else []
    if not numbers or numbers[0] != 0 or any(b <= a for a, b in itertools.pairwise(numbers)):
        raise ValueError(f"{file}: not a table of samples; expected {SAMPLES.names}, numbered from 0; restore it")
    columns = {name: table[name].to_pylist() for name in SAMPLES.names[1:]}
    if numbers[-1] == len(numbers) - 1:
        return {name: values[:n_rows] for name, values in columns.items()}
    rows = {name: [NO_IMAGE[name]] * (numbers[-1] + 1) for name in columns}
    for name, values in columns.items():
        for number, value in zip(numbers, values):
            rows[name][number] = value
    return {name: values[:n_rows] for name, values in rows.items()}
