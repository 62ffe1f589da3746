"""Boxes that a person gives: any number per image, from a file by key, as a view shows them.

A view sees the part of a box that lies in its crop, mirrored where it is; a box with nothing in it is not there.
"""

import csv
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64

from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers, View, canonical_json

SIDES = ("x0", "y0", "x1", "y1")
BOXES_FORM = "a .parquet or .csv with the columns key, x0, y0, x1 and y1, in pixels of the upright image, and perhaps label: a row per box"
Corners = Float64[np.ndarray[Any, Any], "n 4"]


@dataclasses.dataclass(frozen=True)
class BoxFile:
    """Boxes as they were given. corners: by key (x0, y0, x1, y1), in pixels of the upright image. labels: by key, one each, None without."""

    file: Path
    corners: Mapping[str, Corners]
    labels: Mapping[str, Sequence[str | None]]

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"--boxes {self.file}"

    def seen(self, key: str, view: View, size: int) -> tuple[Corners, Numbers]:
        """The boxes that a view of this image shows, in its pixels, and which of the image's they are."""
        corners = self.corners.get(key, np.zeros((0, 4)))
        outside = (corners[:, 2] > view.source_width) | (corners[:, 3] > view.source_height)
        if outside.any():
            raise ValueError(f"{self.where}: {key!r} has the box {corners[outside][0].tolist()}, and the image is {view.source_width} x {view.source_height} pixels; "
                             "expected x0, y0, x1, y1 within the upright image; correct the file")  # fmt: skip
        return on_view(corners, view, size)

    def id(self, keys: Sequence[str]) -> str:
        """Of the boxes of these images, whatever the order and the kind of the file."""
        digest = hashlib.sha256()
        for key in sorted(set(keys) & self.corners.keys()):
            digest.update(canonical_json([key, self.corners[key].tolist(), list(self.labels[key])]))
        return "sha256:" + digest.hexdigest()

    def refuse_unfit(self, cache: Cache, numbers: Numbers) -> None:
        """ValueError where no image of these has a box, or one has a box that is not within it."""
        keys = cache.keys[:]
        having = [number for number in numbers.tolist() if keys[number] in self.corners]
        if not having:
            raise ValueError(f"{self.where}: has no box for any of the {len(numbers):,} images, first {cache.keys[numbers[0]]!r}, but for others, first "
                             f"{next(iter(self.corners))!r}; expected keys as inspect-cache names them; correct the file")  # fmt: skip
        for number in having:
            self.seen(cache.keys[number], cache.read_crop(number, 0), cache.size)


def on_view(corners: Corners, view: View, size: int) -> tuple[Corners, Numbers]:
    """Boxes of the upright image in pixels of a view of size x size: moved, cut to the crop, scaled, mirrored; and which of them are left."""
    across, down = size / view.width, size / view.height
    moved = (corners - [view.left, view.top, view.left, view.top]) * [across, down, across, down]
    moved = moved.clip(0, size)
    if view.flip:
        moved = np.stack([size - moved[:, 2], moved[:, 1], size - moved[:, 0], moved[:, 3]], axis=1)
    left = np.flatnonzero((moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1]))
    return moved[left], left


def read_box_file(path: Path) -> BoxFile:
    """The boxes of a file, every value checked. ValueError, naming file, key and value, for what is no such file, and for a box without an area."""
    corners, labels = dict[str, list[list[float]]](), dict[str, list[str | None]]()
    try:
        for key, box, label in box_rows(path):
            x0, y0, x1, y1 = box
            if not (np.isfinite(box).all() and 0 <= x0 < x1 and 0 <= y0 < y1):
                raise ValueError(f"{key!r} has the box {box}; 0 <= x0 < x1 and 0 <= y0 < y1 were expected")
            corners.setdefault(key, []).append(box)
            labels.setdefault(key, []).append(label)
    except (OSError, ValueError, TypeError, csv.Error, pa.ArrowException) as error:
        raise ValueError(
            f"--boxes {path}: cannot be read as boxes ({error}); expected {BOXES_FORM}; correct the file"
        ) from None
    if not corners:
        raise ValueError(f"--boxes {path}: is empty; expected {BOXES_FORM}; correct the file")
    return BoxFile(path, {key: np.array(boxes, np.float64) for key, boxes in corners.items()}, labels)


def box_rows(path: Path) -> Iterator[tuple[str, list[float], str | None]]:
    """(key, x0 y0 x1 y1, label) of every row."""
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            refuse_lacking_sides(reader.fieldnames or ())
            yield from map(checked_box, reader)
    elif path.suffix == ".parquet":
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            refuse_lacking_sides(names)
            for group in range(parquet.num_row_groups):
                wanted = ["key", *SIDES, *(["label"] if "label" in names else [])]
                yield from map(
                    checked_box, parquet.read_row_group(group, columns=wanted, use_threads=False).to_pylist()
                )
    else:
        raise ValueError(f"the name ends in {path.suffix!r}; .parquet or .csv was expected")


def refuse_lacking_sides(names: Sequence[str]) -> None:
    """ValueError unless there are a key and four sides."""
    if not {"key", *SIDES} <= set(names):
        raise ValueError(f"its columns are {list(names)}; key, x0, y0, x1 and y1 were expected")


def checked_box(row: Mapping[str, Any]) -> tuple[str, list[float], str | None]:
    """A row in its own types. ValueError for a key that is no text and a side that is no number."""
    key, label = row["key"], row.get("label")
    try:
        box = [float(row[side]) for side in SIDES]
    except (TypeError, ValueError):
        raise ValueError(f"{key!r} has the box {[row[side] for side in SIDES]}; four numbers were expected") from None
    if not isinstance(key, str) or not key:
        raise ValueError(f"key {key!r} was found; text was expected")
    return key, box, None if label in (None, "") else str(label)
