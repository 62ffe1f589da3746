"""Pixels as webdataset tars: plain USTAR files, byte-reproducible, with a sidecar index for random access.

A sample is NNNNNNNNN.jpg and NNNNNNNNN.json; a bad image is a JSON-only row. docs/format.md, "Pixel tars".
"""

import dataclasses
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from mrmae.shards.spec import FORMAT_VERSION, canonical_json
from mrmae.shards.views import View
from mrmae.shards.write import Published, publish

BLOCK = 512


@dataclasses.dataclass(frozen=True)
class PixelRow:
    """One sample of a pixel tar. view and jpeg are None exactly where the image is bad, and `reason` says why."""

    number: int
    key: str
    label: str | None
    view: View | None
    jpeg: bytes | None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class PixelIndex:
    """A tar's sidecar: what it belongs to, keys of its samples, (offset, bytes, crc32c) of each one's JPEG and JSON.

    jpegs, abouts: int64 [samples, 3]; offset -1 where a bad image has no JPEG.
    """

    of: dict[str, Any]
    keys: list[str]
    jpegs: np.ndarray[Any, np.dtype[np.int64]]
    abouts: np.ndarray[Any, np.dtype[np.int64]]


def write_pixel_tar(path: Path, rows: Sequence[PixelRow], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The commit record of a new tar and its sidecar index: files, count, valid, first, last, sizes, bad.

    about: what the sidecar says it belongs to (geometry id, view, shard). Rows must be in ascending order of their numbers, every sample of the shard exactly once.
    """
    if [row.number for row in rows] != list(range(rows[0].number, rows[0].number + len(rows))):
        raise ValueError(f"{path}: the rows are not one range of samples in order; expected every sample once")
    members = [member for row in rows for member in row_members(row)]
    tar = publish(path, tar_chunks(members))
    index = publish(index_path(path), sidecar(tar, rows, members, about or {}))
    return {
        "files": {str(file.path): {"bytes": file.bytes, "sha256": file.sha256} for file in (tar, index)},
        "count": len(rows),
        "valid": sum(row.view is not None for row in rows),
        "first": rows[0].key,
        "last": rows[-1].key,
        "heights": [row.view.source_height if row.view else 0 for row in rows],
        "widths": [row.view.source_width if row.view else 0 for row in rows],
        "bad": {str(row.number): row.reason for row in rows if row.view is None},
    }


def index_path(path: Path) -> Path:
    """The sidecar of a tar: NNNNNN.index.json beside NNNNNN.tar."""
    return path.with_name(path.stem + ".index.json")


def row_members(row: PixelRow) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a row's members."""
    name = f"{row.number:09d}"
    assert (row.view is None) == (row.jpeg is None) == (row.reason is not None), "a row is good or bad"
    about: dict[str, Any] = {"number": row.number, "key": row.key, "label": row.label, "valid": row.view is not None}
    if row.view is not None and row.jpeg is not None:
        yield f"{name}.jpg", row.jpeg
        about |= {
            "crop": [row.view.top, row.view.left, row.view.height, row.view.width],
            "flip": row.view.flip,
            "source": [row.view.source_height, row.view.source_width],
            "crc32c": int(google_crc32c.value(row.jpeg)),
        }
    yield f"{name}.json", canonical_json(about | {"reason": row.reason})


def tar_chunks(members: Sequence[tuple[str, bytes]]) -> Iterator[bytes]:
    """The bytes of a USTAR file: per member header, content, padding; then two zero blocks."""
    for name, content in members:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644  # mtime, uid and gid are 0, user and group empty
        yield info.tobuf(tarfile.USTAR_FORMAT)
        yield content
        yield bytes(-len(content) % BLOCK)
    yield bytes(2 * BLOCK)


def sidecar(
    tar: Published, rows: Sequence[PixelRow], members: Sequence[tuple[str, bytes]], about: Mapping[str, Any]
) -> bytes:
    """The index: what the tar belongs to, its size and sha256, and [name, key, offset, bytes, crc32c] of every member."""
    keys = {f"{row.number:09d}": row.key for row in rows}
    offset, table = 0, []
    for name, content in members:
        offset += BLOCK
        table.append([name, keys[name[:9]], offset, len(content), int(google_crc32c.value(content))])
        offset += len(content) + -len(content) % BLOCK
    head = {"of": dict(about), "format_version": FORMAT_VERSION, "tar": {"bytes": tar.bytes, "sha256": tar.sha256}}
    return canonical_json(head | {"members": table})


def read_index(path: Path) -> PixelIndex:
    """The sidecar index of a tar. Raises ValueError when it is missing or damaged."""
    try:
        content = json.loads(index_path(path).read_bytes())
        members = content["members"]
        rows = {name: i for i, name in enumerate(dict.fromkeys(member[0][:9] for member in members))}
        keys, tables = [""] * len(rows), {kind: np.full((len(rows), 3), -1, np.int64) for kind in ("jpg", "json")}
        for name, key, *place in members:
            row, kind = rows[name[:9]], name[10:]
            keys[row] = key
            tables[kind][row] = place
        return PixelIndex(content["of"], keys, tables["jpg"], tables["json"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{index_path(path)}: missing or damaged ({error})") from None


def parse_row(content: bytes) -> PixelRow:
    """The row that a JSON member describes, without its JPEG."""
    about = json.loads(content)
    view = None
    if about["valid"]:
        (top, left, height, width), (source_height, source_width) = about["crop"], about["source"]
        view = View(top, left, height, width, about["flip"], source_height, source_width)
    return PixelRow(about["number"], about["key"], about["label"], view, None, about["reason"])
