"""Columns as webdataset tars beside the pixels': the same samples in the same order, one `.npy` member per array.

Sample n is NNNNNNNNN.tokens.npy, .scale.npy, ... and NNNNNNNNN.json; of an array in blocks each block is a member of its own,
.tokens.0.npy and on. A bad image is a JSON-only row. Plain `webdataset` decodes
them; we read the arrays' bytes in place, by the sidecar index. docs/format.md, "Column tars".
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from mrmae.common.backend import exists
from mrmae.common.files import publish
from mrmae.shards.format import Array, Layout, canonical_json, plain, shown
from mrmae.shards.store import zarr
from mrmae.shards.store.reader import Damaged, File, opened, read_members
from mrmae.shards.store.tar import Member, TarIndex, index_path, member_name, own_index, write_tar
from mrmae.shards.store.zarr import check_rows, checked_rows, shard_record

# Per array and sample: tar header, npy header, padding, its line in the index, its share of the JSON.
OVERHEAD_BYTES = 1024
METADATA = "column.json"
NPY_HEADER = 128  # bytes; long enough for every shape here


def column_folder(path: Path, view: int, column: str) -> Path:
    """The tar series of a column of one view."""
    teacher, _, tap = column.partition(".")
    return path / "views" / str(view) / teacher / tap


def shard_files(folder: Path, layout: Layout, shard: int) -> list[Path]:
    """The files of one shard: the tar and its sidecar index."""
    tar = folder / f"{shard:06d}.tar"
    return [tar, index_path(tar)]


def metadata_paths(folder: Path, layout: Layout) -> list[Path]:
    """The file beside the tars that tells what they hold."""
    return [folder / METADATA]


def metadata(layout: Layout, attrs: Mapping[str, Any]) -> dict[str, bytes]:
    """The content of that file, by its name: what a zarr group has as attributes."""
    return {METADATA: canonical_json({"attributes": {**attrs, "layout": plain(layout.to_json())}}) + b"\n"}


def create_column(folder: Path, layout: Layout, attrs: Mapping[str, Any]) -> None:
    """Write what the column holds: `column_id` and `view`, which its sidecars repeat, and whatever a reader should know.

    A file that exists is left as it is: it was written from the same plan.
    """
    path = folder / METADATA
    if not exists(path):
        publish(path, metadata(layout, attrs)[METADATA], replace=True)


def read_attributes(folder: Path) -> tuple[Layout, dict[str, Any]]:
    """The layout and all attributes of a column that create_column made."""
    return zarr.read_attributes(folder, METADATA)


def write_column_shard(
    folder: Path, shard: int, arrays: Mapping[str, Array], valid: Sequence[bool] | Array, keys: Sequence[str],
    *, id: str | None = None, count: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The commit record of one shard of a column: files, count, valid.

    arrays: every stored array, [samples of the shard, ...] in its stored dtype and order. valid: which rows hold a sample; the
    others become a JSON member alone. keys: of all samples of the shard, bad ones too. id, count: as in zarr.
    Raises ValueError for a wrong name, shape, dtype, value or number of keys.
    """
    layout, attributes = read_attributes(folder)
    keep = checked_rows(folder, layout, shard, arrays, valid, count)
    if len(keys) != len(keep):
        raise ValueError(f"{folder} shard {shard}: {len(keys)} keys; expected {len(keep)}, one per row")
    of = belongs_to(id or attributes["column_id"], attributes["view"], shard)
    members = list(column_members(cut(layout, arrays), keep, keys, shard * layout.shard_samples))
    return shard_record(write_tar(shard_files(folder, layout, shard)[0], members, of), keep)


def pieces(layout: Layout) -> dict[str, tuple[str, int]]:
    """(array, block) of every member of a sample, by extension without `.npy`, in order: a block's arrays are neighbours."""
    cut = [name for name in layout.arrays() if layout.blocks_of(name) > 1]
    found = {f"{name}.{block}": (name, block) for block in range(layout.blocks) for name in cut}
    return found | {name: (name, 0) for name in layout.arrays() if name not in cut}


def cut(layout: Layout, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """What every member holds of a shard's arrays, [samples, ...], by extension without `.npy`."""
    return {
        piece: in_parts(arrays[name], layout.blocks_of(name))[:, block]
        for piece, (name, block) in pieces(layout).items()
    }


def in_parts(array: Array, blocks: int) -> Array:
    """[samples, blocks, rows of a block, ...]: a view."""
    return array.reshape(len(array), blocks, array.shape[1] // blocks, *array.shape[2:])


def belongs_to(column_id: str, view: int, shard: int) -> dict[str, Any]:
    """What the sidecar says its tar is: exchanged tars are told apart."""
    return {"column_id": column_id, "view": view, "shard": shard}


def column_members(arrays: Mapping[str, Array], keep: Array, keys: Sequence[str], start: int) -> Iterator[Member]:
    """The members of every row, in order. start: number of the first sample."""
    little = {name: np.ascontiguousarray(a).astype(a.dtype.newbyteorder("<"), copy=False) for name, a in arrays.items()}
    headers = {name: npy_header(array.dtype, array.shape[1:]) for name, array in little.items()}
    for row, (key, valid) in enumerate(zip(keys, keep.tolist())):
        if valid:
            for name, array in little.items():
                yield member_name(start + row, f"{name}.npy"), key, (headers[name], array[row])
        yield member_name(start + row, "json"), key, (row_json(start + row, key, valid),)


def row_json(number: int, key: str, valid: bool) -> bytes:
    """The JSON member of a row; why an image is bad stands in its pixel tar."""
    return canonical_json({"number": number, "key": key, "valid": valid})


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The 128 bytes before an array's own in a .npy file, format 1.0; numpy may pad its own differently."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    magic = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
    return magic + text.ljust(NPY_HEADER - 11).encode() + b"\n"


class TarShard:
    """One shard of a column, its sidecar index in memory. Thread-safe."""

    def __init__(self, tar: Path, index: TarIndex, layout: Layout, start: int) -> None:
        self.tar, self.index, self.layout, self.start = tar, index, layout, start
        self.pieces = pieces(layout)
        empty = {name: np.empty((1, *shape), np.dtype(dtype).newbyteorder("<"))
                 for name, (shape, dtype) in layout.arrays().items()}  # fmt: skip
        self.headers = {piece: npy_header(array.dtype, array.shape[1:]) for piece, array in cut(layout, empty).items()}

    def read(
        self, rows: Sequence[int], out: Mapping[str, Sequence[Array]], blocks: Sequence[int] | None = None
    ) -> None:
        """Read the samples at `rows` of every array in `out` into its contiguous buffers, verified.

        blocks: of arrays in blocks, the one of each sample to read; None: all of them, one behind the other.
        Raises Damaged, naming the row, where a member is absent, short or fails its crc32c.
        """
        wanted = list(self.members(rows, out, blocks))
        places = [self.index.tables[f"{piece}.npy"][row].tolist() for row, piece, _ in wanted]
        with opened(self.tar) as file:
            file.expect([(offset, n_bytes) for offset, n_bytes, _ in places if offset >= 0])
            for (row, piece, buffer), place in zip(wanted, places):
                self.read_member(file, row, place, self.headers[piece], buffer)

    def members(
        self, rows: Sequence[int], out: Mapping[str, Sequence[Array]], blocks: Sequence[int] | None
    ) -> Iterator[tuple[int, str, Array]]:
        """(row, extension without `.npy`, buffer) of every member to read; a sample's are neighbours."""
        for i, row in enumerate(rows):
            for piece, (name, block) in self.pieces.items():
                if name not in out:
                    continue
                if self.layout.blocks_of(name) == 1:
                    yield row, piece, out[name][i]
                elif blocks is None:
                    yield row, piece, in_parts(out[name][i][None], self.layout.blocks_of(name))[0, block]
                elif block == blocks[i]:
                    yield row, piece, out[name][i]

    def read_member(self, file: File, row: int, place: Sequence[int], expected: bytes, out: Array) -> None:
        """Read and verify one array."""
        offset, n_bytes, crc = place
        if offset < 0:
            raise Damaged(self.tar, row, "this sample was never written")
        if n_bytes != NPY_HEADER + out.nbytes:
            raise Damaged(self.tar, row, f"the member has {n_bytes} bytes; expected {NPY_HEADER + out.nbytes}")
        header = bytearray(NPY_HEADER)
        got = file.read_into([header, out], offset, n_bytes)
        if got != n_bytes:
            raise Damaged(self.tar, row, f"the file ends within the member ({got} of {n_bytes} bytes)")
        if header != expected:
            raise Damaged(self.tar, row, "the member does not begin as an array of this column does")
        if google_crc32c.extend(google_crc32c.value(expected), out) != crc:
            raise Damaged(self.tar, row, "the member fails its crc32c")

    def check(self, rows: Sequence[int]) -> None:
        """Read every array of the samples at `rows`, and the JSON of every sample. Raises Damaged, also for values that are never written."""
        check_rows(self.read, self.layout, rows, lambda _: self.tar)
        everyone, valid = range(len(self.index.keys)), set(rows)
        for row, content in enumerate(read_members(self.tar, everyone, self.index.tables["json"])):
            if content != row_json(self.start + row, self.index.keys[row], row in valid):
                raise Damaged(self.tar, row, f"its JSON is another row's: {shown(content)}")


def open_shard(
    folder: Path, layout: Layout, column_id: str, view: int, shard: int, keys: Sequence[str] | None
) -> TarShard:
    """A shard whose sidecar belongs to this column, view and shard, and these samples (None: any). Raises Damaged."""
    tar = shard_files(folder, layout, shard)[0]
    extensions = [*(f"{piece}.npy" for piece in pieces(layout)), "json"]
    index = own_index(tar, belongs_to(column_id, view, shard), keys, extensions)
    return TarShard(tar, index, layout, shard * layout.shard_samples)
