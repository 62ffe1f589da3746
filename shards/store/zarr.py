"""Columns as zarr v3 groups of sharded arrays: zarr writes the metadata, we write the shard files, byte by byte.

A shard file (zarr v3 `sharding_indexed`) is a 32-byte seal, one chunk per sample or per block of a sample's tokens (its
raw bytes and their crc32c), an index of (offset, bytes) per chunk, and the index's crc32c. Absent chunks read as the fill value: the sentinel. The seal
is unused space to other readers, which go by the index; it tells us exchanged shards apart.
docs/format.md, "Columns".
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from mrmae.common.backend import exists
from mrmae.common.files import Published, publish
from mrmae.shards.format import DTYPES, IN_BLOCKS, Array, Layout, canonical_json, read_json
from mrmae.shards.store.reader import ABSENT, Damaged, ShardFile

OVERHEAD_BYTES = 20  # per chunk: its crc32c and index entry
METADATA = "zarr.json"
CHECKED_AT_ONCE = 64  # samples in memory where all of a shard is checked
MOST_METADATA_BYTES = 1 << 24  # a quantiser and a teacher as in the plan
DIMENSIONS = {
    "tokens": ("sample", "patch", "channel"),
    "scale": ("sample", "patch"),
    "cls": ("sample", "channel"),
    "attention": ("sample", "patch"),
    "norm": ("sample", "patch"),
    "map": ("sample", "patch"),
}
STORED = {"patch": "stored_patch"}  # in blocks: not the raster's


class AttributeFields(TypedDict):
    """What a column's attributes say of its shards."""

    layout: Layout
    column_id: NotRequired[str]
    view: NotRequired[int]


class MetadataFields(TypedDict):
    """A file of metadata of a column, as far as we read it."""

    attributes: AttributeFields


def column_folder(path: Path, view: int, column: str) -> Path:
    """The zarr group of a column of one view."""
    return path / "views" / str(view) / f"{column}.zarr"


def shard_path(folder: Path, name: str, shard: int, dims: int) -> Path:
    """A shard file of an array with this many dimensions, under zarr's default chunk key encoding."""
    return folder.joinpath(name, "c", str(shard), *["0"] * (dims - 1))


def shard_files(folder: Path, layout: Layout, shard: int) -> list[Path]:
    """The files of one shard: one per array, in the order of layout.arrays()."""
    return [shard_path(folder, name, shard, 1 + len(shape)) for name, (shape, _) in layout.arrays().items()]


def metadata_paths(folder: Path, layout: Layout) -> list[Path]:
    """The zarr.json files of a column."""
    return [folder / "zarr.json", *(folder / name / "zarr.json" for name in layout.arrays())]


def create_column(folder: Path, layout: Layout, attrs: Mapping[str, Any]) -> None:
    """Write the zarr metadata of a column: a group with `attrs`, and one sharded array per stored array.

    attrs: `column_id` and `view`, which seal its shards, and whatever a reader should know.

    Metadata that exists is left as it is: it was written from the same plan.
    """
    absent = [path for path in metadata_paths(folder, layout) if not exists(path)]
    contents = metadata(layout, attrs) if absent else {}
    for path in absent:
        publish(path, contents[path.relative_to(folder).as_posix()], replace=True)


def metadata(layout: Layout, attrs: Mapping[str, Any]) -> dict[str, bytes]:
    """The content of a column's zarr.json files, by path inside its folder."""
    memory: dict[str, Any] = {}
    zarr.create_group(MemoryStore(memory), zarr_format=3, attributes={**attrs, "layout": layout.to_json()})
    return {METADATA: memory[METADATA].to_bytes(), **metadata_of_arrays(layout)}


@functools.lru_cache(maxsize=64)  # every view of a column has the same: 3 ms an array
def metadata_of_arrays(layout: Layout) -> Mapping[str, bytes]:
    """The same of a column's arrays. Do not change it."""
    memory: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(memory), zarr_format=3)
    for name, (shape, dtype) in layout.arrays().items():
        blocks = layout.blocks_of(name)
        group.create_array(
            name,
            shape=(layout.n, *shape),
            shards=(layout.shard_samples, *shape),
            chunks=(1, shape[0] // blocks, *shape[1:]),
            dtype=dtype,
            fill_value=unwritten(layout, name, dtype),
            filters=None,
            compressors=Crc32cCodec(),
            dimension_names=[
                STORED.get(d, d) if blocks > 1 else d for d in (*dimensions(layout, name), "channel")[: 1 + len(shape)]
            ],
            attributes={"encoding": "e4m3fn"} if name == "tokens" and layout.dtype == "fp8" else None,
        )
    return {name: content.to_bytes() for name, content in memory.items() if name != METADATA}


def dimensions(layout: Layout, name: str) -> tuple[str, ...]:
    """What an array's dimensions are called."""
    return ("sample", "patch", "code") if name == "tokens" and DTYPES[layout.dtype].product else DIMENSIONS[name]


def unwritten(layout: Layout, name: str, dtype: str) -> float:
    """What an element that was never written reads as; for ids and bits, of which any may be a value, 0."""
    return DTYPES[layout.dtype].unwritten if name == "tokens" else 0 if dtype == "uint16" else np.nan


def read_attributes(folder: Path, file: str = METADATA) -> tuple[Layout, dict[str, Any]]:
    """The layout and all attributes of a column that create_column made; file: where in the folder they stand."""
    try:
        attributes = read_json(folder / file, MetadataFields, MOST_METADATA_BYTES)["attributes"]
        return Layout(**attributes["layout"]), attributes
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {file}: this is not a column of a cache ({error}); create it first") from None


def write_column_shard(
    folder: Path, shard: int, arrays: Mapping[str, Array], valid: Sequence[bool] | Array, keys: Sequence[str] = (),
    *, id: str | None = None, count: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The commit record of one shard of a column: files, count, valid.

    arrays: every stored array, [samples of the shard, ...] in its stored dtype and order. valid: which rows hold a sample;
    the others are not written and read as the sentinel. keys: of the samples; zarr has no place for them. id, count: of an
    appended part's shard, which has an id of its own, and of a part's last shard; else as the column's attributes say.
    Raises ValueError for a wrong name, shape, dtype or value.
    """
    layout, attributes = read_attributes(folder)
    keep = checked_rows(folder, layout, shard, arrays, valid, count)
    files: list[Published] = []
    for name, path in zip(layout.arrays(), shard_files(folder, layout, shard)):
        mark = seal(id or attributes.get("column_id"), attributes.get("view"), name, shard)
        files.append(publish(path, shard_chunks(mark, arrays[name], keep, layout, layout.blocks_of(name))))
    return shard_record(files, keep)


def shard_record(files: Sequence[Published], keep: Array) -> dict[str, Any]:
    """What is committed of a shard of a column."""
    return {
        "files": list(files),
        "count": len(keep),
        "valid": int(keep.sum()),
    }


class ZarrShard:
    """One shard of a column, its files opened. Thread-safe."""

    def __init__(self, files: Mapping[str, ShardFile], layout: Layout) -> None:
        self.files, self.layout = files, layout

    def read(
        self, rows: Sequence[int], out: Mapping[str, Sequence[Array]], blocks: Sequence[int] | None = None
    ) -> None:
        """Read the samples at `rows` of every array in `out` into its contiguous buffers, verified. Raises Damaged.

        blocks: of arrays in blocks, the one of each sample to read; None: all of them, one behind the other.
        """
        for name, buffers in out.items():
            self.files[name].read(rows, buffers, blocks if name in IN_BLOCKS else None)

    def check(self, rows: Sequence[int]) -> None:
        """Read every array of the samples at `rows`. Raises Damaged, also for values that are never written."""
        check_rows(self.read, self.layout, rows, lambda name: self.files[name].path)


def open_shard(
    folder: Path, layout: Layout, column_id: str, view: int, shard: int, keys: Sequence[str] | None = None
) -> ZarrShard:
    """A shard, once read sealed as this column's, view's and shard's. keys: zarr has no place for them."""
    files = zip(layout.arrays(), shard_files(folder, layout, shard))
    return ZarrShard({name: ShardFile(path, layout.shard_samples, seal(column_id, view, name, shard), layout.blocks_of(name))
                      for name, path in files}, layout)  # fmt: skip


def checked_rows(
    folder: Path, layout: Layout, shard: int, arrays: Mapping[str, Array], valid: Sequence[bool] | Array,
    count: int | None = None,
) -> Array:  # fmt: skip
    """`valid` as an array, once it is known that these arrays are a whole shard, of `count` samples. Raises ValueError."""
    keep = np.asarray(valid, bool)
    where = f"{folder} shard {shard}"
    count = layout.count(shard) if count is None else count
    if len(keep) != count:
        raise ValueError(f"{where}: {len(keep)} rows; the plan says {count}; write whole shards")
    check_arrays(arrays, keep, layout, where)
    return keep


def check_arrays(arrays: Mapping[str, Array], keep: Array, layout: Layout, where: str) -> None:
    """Refuse, with ValueError, what would be written wrongly: names, shapes, dtypes, NaN, infinities, sentinels."""
    expected = layout.arrays()
    if set(arrays) != set(expected):
        raise ValueError(f"{where}: arrays {sorted(arrays)} were given; expected {sorted(expected)}")
    for name, (shape, dtype) in expected.items():
        array = arrays[name]
        if array.shape != (len(keep), *shape) or array.dtype != np.dtype(dtype):
            raise ValueError(f"{where}: {name} is {array.dtype}{list(array.shape)}; "
                             f"expected {dtype}{[len(keep), *shape]}")  # fmt: skip
        if wrong := wrong_values(array, keep, layout, name):
            raise ValueError(f"{where}: {wrong}; expected numbers; this teacher's features cannot be stored so")


def check_rows(read: Callable[..., None], layout: Layout, rows: Sequence[int], file_of: Callable[[str], Path]) -> None:
    """Read every array of the samples at `rows`. Raises Damaged, also for values that are never written. read: a shard's; file_of: an array's file."""
    for start in range(0, len(rows), CHECKED_AT_ONCE):
        some = rows[start : start + CHECKED_AT_ONCE]
        arrays = {name: np.empty((len(some), *shape), dtype) for name, (shape, dtype) in layout.arrays().items()}
        read(some, {name: list(array) for name, array in arrays.items()})
        for name, array in arrays.items():
            for row, values in zip(some, array):
                if wrong := wrong_values(values, np.array(True), layout, name):
                    raise Damaged(file_of(name), row, f"{wrong}, which no command writes")


def wrong_values(array: Array, keep: Array, layout: Layout, name: str) -> str:
    """How many values of an array's kept rows are no numbers, in words; empty for none."""
    if array.dtype == np.uint16:  # of a map, where any may be a value
        return ""
    refused = DTYPES[layout.dtype].refused if name == "tokens" else ()
    kind = f"codes that are no number ({' or '.join(map(str, refused))})" if refused else "NaN or infinite"
    wrong = unfit(array, keep, refused)
    return f"{wrong} values of {name} are {kind}" if wrong else ""


def unfit(array: Array, keep: Array, refused: Sequence[int]) -> int:
    """How many values of the kept rows are refused codes or, where there are none, NaN or infinite.

    Compares integers of the array's own width, 20 times as fast as numpy's float16 and mixed comparisons.
    """
    if refused:
        bad = [array == array.dtype.type(code) for code in refused]
    else:
        bad = [(array.view(np.uint16) & np.uint16(0x7FFF)) >= 0x7C00]
    return sum(int(part[keep].sum()) for part in bad if part.any())


def seal(column_id: str | None, view: int | None, name: str, shard: int) -> bytes:
    """The first 32 bytes of a shard file: sha256 of what it is a shard of."""
    return hashlib.sha256(canonical_json([column_id, view, name, shard])).digest()


def shard_chunks(mark: bytes, array: Array, keep: Array, layout: Layout, blocks: int) -> Iterator[Any]:
    """The bytes of a shard file: seal, chunks with their crc32c, the index, the index's crc32c."""
    index = np.full((layout.shard_samples, blocks, 2), ABSENT, "<u8")
    array = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    chunks = array.reshape(len(array), blocks, -1)
    offset, chunk_bytes = len(mark), chunks[:1, 0].nbytes + 4
    yield mark
    for i in np.flatnonzero(keep):
        for block in range(blocks):
            yield chunks[i, block]
            yield crc32c_bytes(chunks[i, block])
            index[i, block] = offset, chunk_bytes
            offset += chunk_bytes
    yield index
    yield crc32c_bytes(index)


def crc32c_bytes(array: Array) -> bytes:
    """crc32c of a contiguous array, as the four little-endian bytes that zarr stores."""
    return int(google_crc32c.value(array)).to_bytes(4, "little")
