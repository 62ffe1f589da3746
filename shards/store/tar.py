"""Webdataset tars: plain USTAR files, byte-reproducible, with a sidecar index for random access; the views' pixels in them.

A sample is NNNNNNNNN.jpg (or .png, .npy.zst) and NNNNNNNNN.json; a bad image is a JSON-only row. docs/format.md, "Pixel tars". Columns in tars
are in tar_columns.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import google_crc32c
import numpy as np

from mrmae.common.backend import read_bytes
from mrmae.common.files import Chunk, Published, publish
from mrmae.shards.format import (
    FORMAT_VERSION,
    PIXELS,
    Array,
    BadImage,
    Encoding,
    Numbers,
    View,
    canonical_json,
    decode_view,
    parsed,
    shown,
)
from mrmae.shards.store.reader import Damaged, read_members

BLOCK = 512
REGULAR = tarfile.TarInfo()  # mtime, uid and gid are 0, user and group empty
REGULAR.mode = 0o644
EMPTY_HEADER = bytearray(REGULAR.tobuf(tarfile.USTAR_FORMAT))
EMPTY_HEADER[148:156] = b" " * 8
NUMBER_DIGITS = 9
HEADER_TRIES = 10
ReadBack = TypeVar("ReadBack")
Member = tuple[str, str, tuple[Chunk, ...]]  # name, key of its sample, content in parts


@dataclasses.dataclass(frozen=True)
class PixelRow:
    """One sample of a pixel tar. view and stored, its encoded pixels, are None exactly where the image is bad, and `reason` says why.

    sha256: in hex, of the encoded image that the view was made of; of no bytes where that could not be read; "" where it was not looked up.
    """

    number: int
    key: str
    label: str | None
    view: View | None
    stored: bytes | None
    reason: str | None = None
    sha256: str = ""


class IndexFields(TypedDict):
    """What a sidecar tells beside the members' places."""

    of: dict[str, Any]
    keys: list[str]
    extensions: list[str]


class RowFields(TypedDict):
    """A row's JSON; crop, flip and source where it is valid."""

    number: int
    key: str
    label: str | None
    valid: bool
    reason: str | None
    crop: NotRequired[tuple[int, int, int, int]]
    flip: NotRequired[bool]
    source: NotRequired[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """A tar's sidecar: what it belongs to, keys of its samples, (offset, bytes, crc32c) of each one's members.

    tables: by extension, int64 [samples, 3]; -1 where a sample has no such member.
    """

    of: dict[str, Any]
    keys: list[str]
    tables: dict[str, Numbers]


def write_pixel_tar(
    path: Path, rows: Sequence[PixelRow], about: Mapping[str, Any] | None = None, *, extension: str = "jpg"
) -> dict[str, Any]:
    """The commit record of a new tar and its sidecar index: files, count, valid, first, last, sizes, the digest of the images' hashes, bad.

    extension: of the members with pixels. about: what the sidecar says it belongs to (geometry id, view, shard). Rows must be in ascending order of their numbers, every sample of the shard exactly once.
    """
    if [row.number for row in rows] != list(range(rows[0].number, rows[0].number + len(rows))):
        raise ValueError(f"{path}: the rows are not one range of samples in order; expected every sample once")
    hashes = b"".join(bytes.fromhex(row.sha256) for row in rows)
    assert len(hashes) == 32 * len(rows), "every row tells of which bytes it was made"
    members = [member for row in rows for member in row_members(row, extension)]
    files = write_tar(path, members, about or {}, sha256=np.frombuffer(hashes, np.uint8).reshape(-1, 32))
    return {
        "files": list(files),
        "count": len(rows),
        "valid": sum(row.view is not None for row in rows),
        "first": rows[0].key,
        "last": rows[-1].key,
        "heights": [row.view.source_height if row.view else 0 for row in rows],
        "widths": [row.view.source_width if row.view else 0 for row in rows],
        "sha256": digest_of_hashes(row.sha256 for row in rows),
        "bad": {str(row.number): row.reason for row in rows if row.view is None},
    }


def index_path(path: Path) -> Path:
    """The sidecar of a tar: NNNNNN.index.npz beside NNNNNN.tar."""
    return path.with_name(path.stem + ".index.npz")


def row_members(row: PixelRow, extension: str) -> Iterator[Member]:
    """A row's members."""
    assert (row.view is None) == (row.stored is None) == (row.reason is not None), "a row is good or bad"
    about: dict[str, Any] = {"number": row.number, "key": row.key, "label": row.label, "valid": row.view is not None}
    if row.view is not None and row.stored is not None:
        yield member_name(row.number, extension), row.key, (row.stored,)
        about |= {
            "crop": [row.view.top, row.view.left, row.view.height, row.view.width],
            "flip": row.view.flip,
            "source": [row.view.source_height, row.view.source_width],
            "crc32c": int(google_crc32c.value(row.stored)),
        }
    yield member_name(row.number, "json"), row.key, (canonical_json(about | {"reason": row.reason}),)


def member_name(number: int, extension: str) -> str:
    """NNNNNNNNN.extension."""
    return f"{number:0{NUMBER_DIGITS}d}.{extension}"


def write_tar(
    path: Path, members: Sequence[Member], of: Mapping[str, Any], **more: Array
) -> tuple[Published, Published]:
    """The new tar and its sidecar index. of: what the sidecar says that the tar belongs to. more: arrays beside the members' places."""
    tar = publish(path, tar_chunks(members))
    return tar, publish(index_path(path), sidecar(tar, members, of, more))


def tar_chunks(members: Sequence[Member]) -> Iterator[Chunk]:
    """The bytes of a USTAR file: per member header, content, padding; then two zero blocks."""
    for name, _, parts in members:
        size = bytes_of(parts)
        yield header(name, size)
        yield from parts
        yield bytes(-size % BLOCK)
    yield bytes(2 * BLOCK)


def header(name: str, size: int) -> bytes:
    """A member's USTAR header as tarfile makes it: mode 0644, all else zero or empty.

    From one of tarfile's own: its 60 us per member would make a shard of columns 1.4 times as long to write, one of pixels 1.5.
    """
    assert len(name) <= 100 and size < 8**11, "what USTAR can say; shards are far smaller"
    block = name.encode("ascii").ljust(100, b"\0") + EMPTY_HEADER[100:124] + b"%011o" % size + EMPTY_HEADER[135:]
    return block[:148] + b"%06o\0" % sum(block) + block[155:]  # the sum counts its own field as eight spaces


def bytes_of(parts: Sequence[Chunk]) -> int:
    """Bytes of a member's content."""
    return sum(memoryview(part).nbytes for part in parts)


def crc32c_of(parts: Sequence[Chunk]) -> int:
    """crc32c of a member's content."""
    return functools.reduce(lambda crc, part: int(google_crc32c.extend(crc, part)), parts, 0)


def sidecar(tar: Published, members: Sequence[Member], of: Mapping[str, Any], more: Mapping[str, Array]) -> bytes:
    """The index, an npz without compression. about: JSON as bytes; members: int64 [samples, extensions, 3]; and `more`."""
    parts_of = {tuple(name.split(".", 1)): parts for name, _, parts in members}
    key_of = {name[:NUMBER_DIGITS]: key for name, key, _ in members}
    rows = {number: row for row, number in enumerate(key_of)}
    columns = {extension: i for i, extension in enumerate(dict.fromkeys(extension for _, extension in parts_of))}
    table, offset = np.full((len(rows), len(columns), 3), -1, "<i8"), 0
    for (number, extension), parts in parts_of.items():
        offset, size = offset + BLOCK, bytes_of(parts)
        table[rows[number], columns[extension]] = offset, size, crc32c_of(parts)
        offset += size + -size % BLOCK
    about = {"of": dict(of), "format_version": FORMAT_VERSION, "tar": {"bytes": tar.bytes, "sha256": tar.sha256},
             "extensions": list(columns), "keys": list(key_of.values())}  # fmt: skip
    content = io.BytesIO()
    arrays: dict[str, Any] = {"about": np.frombuffer(canonical_json(about), np.uint8), "members": table, **more}
    np.savez(content, **arrays)
    return content.getvalue()


def digest_of_hashes(hashes: Iterable[str]) -> str:
    """sha256, in hex, of the hashes (in hex) of a shard's images, one after the other."""
    return hashlib.sha256(bytes.fromhex("".join(hashes))).hexdigest()


def read_index(path: Path, extensions: Sequence[str] = ("jpg", "json")) -> TarIndex:
    """The sidecar index of a tar whose members have these extensions. Raises ValueError when it is missing or damaged."""
    try:
        data = read_bytes(index_path(path))
        text, places = undisturbed(lambda: index_arrays(data, "about", "members"))
        about = parsed(text.tobytes(), IndexFields)
        keys, columns = about["keys"], about["extensions"]
        if places.dtype != "<i8" or places.shape != (len(keys), len(columns), 3):
            raise ValueError("its keys and members do not fit")
        absent = np.full((len(keys), 3), -1)
        tables = {name: places[:, columns.index(name)] if name in columns else absent for name in extensions}
        return TarIndex(about["of"], keys, tables)
    except Exception as error:  # a flipped bit makes zipfile, struct and numpy raise a dozen kinds
        raise ValueError(f"{index_path(path)}: missing or damaged ({error})") from None


def read_hashes(path: Path) -> Array:
    """sha256 of the encoded images that a pixel tar was made of, uint8 [samples, 32], from its sidecar. ValueError as read_index."""
    try:
        data = read_bytes(index_path(path))
        (hashes,) = undisturbed(lambda: index_arrays(data, "sha256"))
        if hashes.dtype != np.uint8 or hashes.ndim != 2 or hashes.shape[1] != 32:
            raise ValueError("its hashes are none")
        return hashes
    except Exception as error:  # as of read_index
        raise ValueError(f"{index_path(path)}: missing or damaged ({error})") from None


def index_arrays(data: bytes, *names: str) -> list[Array]:
    """These arrays of an index."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        refuse_larger(arrays.zip, len(data))
        return [arrays[name] for name in names]


def undisturbed(read: Callable[[], ReadBack]) -> ReadBack:
    """What `read` returns, tried again after a SystemError: numpy reads headers with ast, where threads of Python 3.11 that collect
    garbage meanwhile disturb each other ("AST constructor recursion depth mismatch")."""
    for _ in range(HEADER_TRIES):
        with contextlib.suppress(SystemError):
            return read()
    return read()


def own_index(path: Path, of: Mapping[str, Any], keys: Sequence[str] | None, extensions: Sequence[str]) -> TarIndex:
    """The sidecar index of a tar that belongs to `of` and holds these samples (None: any). Raises Damaged."""
    try:
        index = read_index(path, extensions)
    except ValueError as error:
        raise Damaged(path, None, str(error)) from None
    if index.of != of:
        raise Damaged(path, None, f"its index belongs to {shown(index.of)}")
    if keys is not None and index.keys != list(keys):
        raise Damaged(path, None, "the keys of its index are not those of samples.arrow")
    return index if keys is None else dataclasses.replace(index, keys=list(keys))  # one copy of every key in memory


def refuse_larger(archive: zipfile.ZipFile, n_bytes: int) -> None:
    """ValueError where an array of an npz would take more memory than the file's n_bytes."""
    for info in archive.infolist():
        with archive.open(info) as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if info.compress_type != zipfile.ZIP_STORED or math.prod(shape) * dtype.itemsize > n_bytes:
            raise ValueError(f"{info.filename} is larger than the file")


def parse_row(content: bytes) -> PixelRow:
    """The row that a JSON member describes, without its pixels. ValueError where it describes none."""
    about = parsed(content, RowFields)
    view = None
    if about["valid"]:
        if missing := {"crop", "flip", "source"} - set(about):
            raise ValueError(f"the row of {shown(about['key'])} has no {min(missing)}")
        (top, left, height, width), (source_height, source_width) = about["crop"], about["source"]
        view = View(top, left, height, width, about["flip"], source_height, source_width)
    return PixelRow(about["number"], about["key"], about["label"], view, None, about["reason"])


class PixelShard:
    """The views of one shard, its sidecar index in memory. Thread-safe."""

    def __init__(self, tar: Path, index: TarIndex, encoding: Encoding) -> None:
        self.tar, self.index, self.encoding = tar, index, encoding

    def read(
        self, rows: Sequence[int], out: Mapping[str, Sequence[Array]], blocks: Sequence[int] | None = None
    ) -> None:
        """Decode the views at `rows` into the buffers of PIXELS, [size, size, bands]. Raises Damaged. blocks: pixels have none."""
        places = self.index.tables[self.encoding.extension]
        for row, buffer, content in zip(rows, out[PIXELS], read_members(self.tar, rows, places)):
            try:
                buffer[:] = decode_view(content, self.encoding, len(buffer))
            except (BadImage, ValueError) as error:
                raise Damaged(self.tar, row, str(error)) from None

    def crop(self, row: int) -> View:
        """The recorded crop and flip of a view. Raises Damaged."""
        (content,) = read_members(self.tar, [row], self.index.tables["json"])
        view = parse_row(content).view
        assert view is not None, "a readable sample has a view"
        return view


def open_pixels(tar: Path, of: Mapping[str, Any], keys: Sequence[str] | None, encoding: Encoding) -> PixelShard:
    """The views of a shard whose sidecar belongs to `of` and holds these samples (None: any). Raises Damaged."""
    return PixelShard(tar, own_index(tar, of, keys, (encoding.extension, "json")), encoding)
