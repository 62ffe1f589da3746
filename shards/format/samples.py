"""samples.arrow: every image's key, label, size and sha256, and what became of it. docs/format.md, "Plan, samples, tail".

Columns of a mapped file, of which only what is asked for becomes Python's: lists of objects for thirteen million images fill 17 GB.
"""

import dataclasses
import hashlib
import itertools
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mrmae.common.backend import Url, read_bytes, size_of
from mrmae.common.files import publish_by
from mrmae.shards.format.spec import FORMAT_VERSION, Array, Numbers, canonical_order, content_id, shown, signed_hashes

SAMPLES_FILE, ARROW_MAGIC = "samples.arrow", b"ARROW1"
SAMPLES = pa.schema([
    ("key", pa.large_string()), ("hash", pa.int64()), ("label", pa.large_string()), ("bytes", pa.int64()), ("sha256", pa.binary(32)),
    ("height", pa.int32()), ("width", pa.int32()), ("valid", pa.bool_()), ("reason", pa.large_string()),
])  # fmt: skip
ALWAYS = ("key", "hash", "bytes")  # columns without nulls
LISTED = ("key", "bytes")  # what is known of an image before it is read
IDENTITY = (*LISTED, "sha256")  # what a data set's id is made of
NO_IMAGE: dict[str, Any] = {
    "key": "", "label": None, "bytes": 0, "sha256": "", "height": 0, "width": 0, "valid": False,
    "reason": "this row holds no image: it lies before an appended part",
}  # fmt: skip
ROWS_AT_ONCE = 1 << 16  # rows that become Python's at a time


class Values(Sequence[Any]):
    """A column of a table: an Arrow array that reads as a sequence of text (hashes: hex), numbers or truth, None where null.

    file: where it is mapped from, if it is: it is mapped anew where it is unpickled. mapped: the mapping. origin: what `file` is a copy of, which may be
    gone by then. ValueError, naming the file, for text that is damaged.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, array: pa.Array, name: str, file: Path | None = None, mapped: mmap.mmap | None = None, origin: Path | None = None
    ) -> None:  # fmt: skip
        self.array, self.name, self.file, self.mapped, self.origin = array, name, file, mapped, origin

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file is None:
            return Values, (self.array, self.name)
        return mapped_again, (self.file, self.name, len(self), self.origin)

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, which: int) -> Any: ...
    @overload
    def __getitem__(self, which: slice) -> list[Any]: ...
    def __getitem__(self, which: int | slice) -> Any:
        if isinstance(which, slice):
            return self.plain(self.array[which])
        if not -len(self) <= which < len(self):
            raise IndexError(f"row {which} of {len(self)}")
        return self.plain(self.array.slice(int(which) % len(self), 1))[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self.plain(self.array.slice(start, ROWS_AT_ONCE))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Values):
            return bool(self.array.equals(other.array))
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def plain(self, array: pa.Array) -> list[Any]:
        """Rows of this column as Python's."""
        values: list[Any] = self.checked(array).to_pylist()
        return ["" if value is None else value.hex() for value in values] if self.is_hash else values

    def checked(self, array: pa.Array | None = None) -> pa.Array:
        """The array, or rows of it, every value of which can be read. ValueError where it is damaged."""
        array = self.array if array is None else array
        try:
            array.validate(full=True)  # offsets of a damaged file lead anywhere
        except pa.ArrowException as error:
            raise ValueError(
                f"{self.file or SAMPLES_FILE}: its column {self.name} is damaged ({error}); restore it"
            ) from None
        return array

    @property
    def is_hash(self) -> bool:
        """Whether the values are 32 bytes each."""
        return bool(pa.types.is_fixed_size_binary(self.array.type))

    def head(self, n: int) -> "Values":
        """The first n rows."""
        return Values(self.array.slice(0, n), self.name, self.file, self.mapped, self.origin)

    def numpy(self) -> Array:
        """Numbers, or truth (null: False), as an array, without a copy of numbers; of hashes the bytes, [rows, 32]."""
        if self.is_hash:
            return np.frombuffer(self.array.buffers()[1], np.uint8).reshape(-1, 32)[self.array.offset :][: len(self)]
        if pa.types.is_boolean(self.array.type):
            return np.asarray(pc.fill_null(self.array, False).to_numpy(zero_copy_only=False))
        return np.asarray(self.array.to_numpy())

    @property
    def digest(self) -> str:
        """sha256, in hex, of all values: little-endian numbers, a byte per truth, 32 per sha256; of text all lengths in bytes as int64 (null:
        -1), then all text."""
        digest, array = hashlib.sha256(), self.array
        array.validate()
        text = pa.types.is_large_string(array.type)
        for start in range(0, len(array), ROWS_AT_ONCE):
            part = array.slice(start, ROWS_AT_ONCE)
            if text:
                digest.update(pc.fill_null(pc.binary_length(part), -1).to_numpy())
            elif self.is_hash:
                digest.update(part.buffers()[1].slice(32 * part.offset, 32 * len(part)))
            else:
                digest.update(
                    pc.fill_null(part, False).cast(pa.int8()).to_numpy()
                    if pa.types.is_boolean(part.type)
                    else pc.fill_null(part, 0).to_numpy()
                )
            self.let_go(part)
        if text and len(array):
            _, offsets, data = array.buffers()
            first, last = (int(np.frombuffer(offsets, np.int64)[array.offset + i]) for i in (0, len(array)))
            if last > first:
                digest.update(data.slice(first, last - first))
        return digest.hexdigest()

    def let_go(self, part: pa.Array) -> None:
        """Take the pages of some rows out of memory, where a file holds them: what was only looked over need not stay."""
        if self.mapped is None or pa.types.is_large_string(part.type) or pa.types.is_boolean(part.type):
            return
        width, page = part.type.bit_width // 8, mmap.PAGESIZE
        first = part.buffers()[1].address + part.offset * width - pa.py_buffer(self.mapped).address
        start, stop = -(-first // page) * page, (first + len(part) * width) // page * page
        if stop > start:
            self.mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)


SampleTable = Mapping[str, Values]


@dataclasses.dataclass(frozen=True)
class Source:
    """An image of the data set: key, label, size and sha256 (hex, "" before it is known) of the encoded file."""

    key: str
    label: str | None
    bytes: int
    sha256: str


SOURCE = dataclasses.fields(Source)


class SourceTable(Sequence[Source]):
    """Images as columns: key, label, bytes, sha256 by name. hashes: of their keys, where they are known."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, columns: SampleTable, hashes: Values | None = None) -> None:
        self.columns, self.hashes = {field.name: columns[field.name] for field in SOURCE}, hashes

    @staticmethod
    def of(rows: Sequence[Source]) -> "SourceTable":
        """The same images as columns."""
        if isinstance(rows, SourceTable):
            return rows
        return SourceTable({f.name: sample_values([getattr(row, f.name) for row in rows], f.name) for f in SOURCE})

    def __len__(self) -> int:
        return len(self.columns["key"])

    @overload
    def __getitem__(self, which: int) -> Source: ...
    @overload
    def __getitem__(self, which: slice) -> "SourceTable": ...
    def __getitem__(self, which: int | slice) -> "Source | SourceTable":
        if isinstance(which, slice):
            return SourceTable({name: Values(v.array[which], name) for name, v in self.columns.items()})
        return Source(**{name: values[which] for name, values in self.columns.items()})

    def take(self, which: Numbers) -> "SourceTable":
        """These rows, in this order."""
        at = pa.array(which)
        return SourceTable({name: Values(values.array.take(at), name) for name, values in self.columns.items()})

    def __iter__(self) -> Iterator[Source]:
        return (Source(*row) for row in zip(*self.columns.values()))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SourceTable):
            return self.columns == other.columns
        return isinstance(other, Sequence) and list(self) == list(other)


def sample_values(values: Any, name: str) -> Values:
    """A column of the table, of anything that holds its values. ValueError for values of another kind."""
    if isinstance(values, Values):
        return values
    if name == "sha256" and not isinstance(values, pa.Array):
        values = [bytes.fromhex(value) if value else None for value in values]
    array = values if isinstance(values, pa.Array) else pa.array(values, SAMPLES.field(name).type)
    return Values(array, name)


def hash_values(hashes: Array, known: Array) -> Values:
    """The column of sha256 of uint8 [rows, 32]; null, and zeros beneath, where a row's is not `known`."""
    mask = None if known.all() else pa.py_buffer(np.packbits(known, bitorder="little"))
    data = pa.py_buffer(np.ascontiguousarray(hashes if mask is None else np.where(known[:, None], hashes, 0), np.uint8))
    return Values(pa.Array.from_buffers(pa.binary(32), len(hashes), [mask, data]), "sha256")


def nulls(n: int, type: pa.DataType) -> pa.Array:
    """A column of nulls, zeros beneath, of which a file gets every byte and the memory none: pages of zeros that nobody writes to."""
    text = pa.types.is_large_string(type)
    sizes = [(n + 7) // 8, 8 * (n + 1) if text else (n * type.bit_width + 7) // 8, *([0] if text else [])]
    return pa.Array.from_buffers(type, n, [pa.py_buffer(np.zeros(size, np.uint8)) for size in sizes], null_count=n)


def canonical_sources(sources: Iterable[Source]) -> list[Source]:
    """The sources in canonical order: position = sample number. ValueError names duplicate keys."""
    sources = list(sources)
    return [sources[i] for i in canonical_order([source.key for source in sources])]


def canonical_table(rows: SourceTable) -> SourceTable:
    """The same of columns."""
    keys = rows.columns["key"]
    by_key = np.asarray(pc.array_sort_indices(keys.array))
    ordered = rows.take(by_key[np.argsort(signed_hashes(keys)[by_key].view(np.uint64), kind="stable")])
    again = ordered.columns["key"].array
    if pc.any(pc.equal(again[1:], again[:-1])).as_py():
        canonical_order(keys)  # names it
    return ordered


def joined_sources(parts: Sequence[SourceTable]) -> SourceTable:
    """The images of several tables, one behind the other."""
    return SourceTable({f.name: Values(pa.concat_arrays([part.columns[f.name].array for part in parts]), f.name) for f in SOURCE})  # fmt: skip


def dataset_id(rows: Sequence[Source]) -> str:
    """Id of the data set of these images, which are in canonical order. ValueError where there are none."""
    return id_of_columns(rows, IDENTITY)


def listing_id(rows: Sequence[Source]) -> str:
    """Id of what is known of these images before any is read, in canonical order. ValueError where there are none."""
    return id_of_columns(rows, LISTED)


def id_of_columns(rows: Sequence[Source], names: Sequence[str]) -> str:
    """Content id of how many images there are, and of these columns."""
    if not len(rows):
        raise ValueError("data set: there are no images; expected at least one; check the path and --include")
    columns = SourceTable.of(rows).columns
    return content_id({"images": len(rows), **{name: columns[name].digest for name in names}})


def grown_id(before: str, appended: str) -> str:
    """Id of a listing, or of a data set, with images appended: of its ids until then and of the appended images alone."""
    return content_id({"format_version": FORMAT_VERSION, "before": before, "appended": appended})


def write_samples(path: Path, table: Mapping[str, Any]) -> None:
    """Write samples.arrow. table: its columns by name; a column of hashes, where there is none, follows from the keys."""
    columns = {name: sample_values(values, name) for name, values in table.items()}
    if "hash" not in columns:
        columns["hash"] = sample_values(signed_hashes(columns["key"]), "hash")
    write_arrow(path / SAMPLES_FILE, columns, SAMPLES)


def write_arrow(file: Path, columns: SampleTable, schema: pa.Schema) -> None:
    """Publish an Arrow file of one record batch, not compressed, in the place of one that is there."""
    batch = pa.record_batch([columns[name].array for name in schema.names], schema)

    def write(file: Path) -> None:
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, schema) as writer:
            writer.write_batch(batch)

    publish_by(file, write)


def write_sources(path: Path, sources: Sequence[Source]) -> None:
    """Write samples.arrow with what is known before images are read; finalising fills in the rest."""
    table = SourceTable.of(sources)
    unknown = {name: nulls(len(table), SAMPLES.field(name).type) for name in ("height", "width", "valid", "reason")}
    known = {} if table.hashes is None else {"hash": table.hashes}
    write_samples(path, {**table.columns, **known, **unknown})


def read_samples(path: Path, parts: Sequence[range] | None = None, copy: Path | None = None) -> dict[str, Values]:
    """The columns of samples.arrow by name; a sample's number is its row.

    parts: the sample numbers of the plan's parts; what comes behind is no part of the plan (an append was killed before it was
    planned). None: one part, as long as the table. Rows that hold no image, before an appended part, have the key "" and are not
    valid. copy: a file to read instead. ValueError when the file is missing, damaged, or has too few rows.
    """
    origin, file = path / SAMPLES_FILE, copy or path / SAMPLES_FILE
    try:
        batch, mapped = read_arrow(file, SAMPLES, ALWAYS)
        n = len(batch) if parts is None else parts[-1].stop
        if not 0 < n <= len(batch):
            raise ValueError(f"it has {len(batch)} rows; the plan says {n}")
        table = {name: Values(batch[name].slice(0, n), name, file, mapped, origin) for name in SAMPLES.names}
        for before, part in zip(parts or (), (parts or ())[1:]):
            if other := [key for key in table["key"][before.stop : part.start] if key]:
                raise ValueError(f"{shown(other[0])} lies before an appended part, where no image does")
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise ValueError(
            f"{file}: cannot be read ({error}); it is damaged, missing or another cache's; restore it"
        ) from None
    return table


def read_arrow(file: Path, schema: pa.Schema, always: Sequence[str]) -> tuple[pa.RecordBatch, mmap.mmap | None]:
    """The table in a file, mapped, and the mapping; of an object read whole, and None. ValueError, or Arrow's, where it is not of this schema.
    always: columns without nulls.

    Read as the stream that an Arrow file holds: what its footer says beside that is nobody's to check.
    """
    held = mapped_file(file)
    content = pa.py_buffer(held)
    if {content[: len(ARROW_MAGIC)].to_pybytes(), content[-len(ARROW_MAGIC) :].to_pybytes()} != {ARROW_MAGIC}:
        raise ValueError("it is no whole Arrow file")
    messages = pa.ipc.MessageReader.open_stream(content.slice(8))
    head, first, *more = [*itertools.islice(messages, 3), None, None]
    if head is None or first is None or first.type != "record batch" or any(more):
        raise ValueError("it does not hold one part")
    if not pa.ipc.read_schema(head).equals(schema):
        raise ValueError(f"its columns are {shown(pa.ipc.read_schema(head).names)}; expected {schema.names}")
    if is_compressed(first.metadata.to_pybytes()):  # it may unpack to more than the memory
        raise ValueError("it is compressed")
    batch = pa.ipc.read_record_batch(first, schema)
    batch.validate()
    for name in always:
        if batch[name].null_count:
            raise ValueError(f"its column {name} has rows without a value")
    return batch, held if isinstance(held, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def is_compressed(message: bytes) -> bool:
    """Whether the message of a record batch has `compression`: the fourth field of the table that is the third of Arrow's Message.fbs."""

    def field(table: int, slot: int) -> int:
        names = table - struct.unpack_from("<i", message, table)[0]
        n_bytes = struct.unpack_from("<H", message, names)[0]
        at = struct.unpack_from("<H", message, names + 4 + 2 * slot)[0] if 4 + 2 * slot < n_bytes else 0
        return table + at if at else 0

    header = field(struct.unpack_from("<I", message)[0], 2)
    return bool(field(header + struct.unpack_from("<I", message, header)[0], 3))


def mapped_file(file: Path) -> Any:
    """The content of a file as a buffer. Changes to a mapped one are seen by nobody else."""
    if isinstance(file, Url):
        return read_bytes(file)
    size_of(file)  # a regular file
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)


def mapped_again(file: Path, name: str, n: int, origin: Path) -> Values:
    """The first n rows of a column, from its file, or from what that was a copy of."""
    try:
        batch, mapped = read_arrow(file, SAMPLES, ALWAYS)
    except FileNotFoundError:
        file = origin
        batch, mapped = read_arrow(file, SAMPLES, ALWAYS)
    return Values(batch[name].slice(0, n), name, file, mapped, origin)
