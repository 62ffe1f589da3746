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
from jaxtyping import Float64

from mrmae.common.tables import IMAGE_COLUMNS, table_rows
from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers, View, canonical_json

SIDES = (("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"))
LABEL_COLUMNS = ("label", "class", "category")
BOXES_FORM = (
    "a .parquet, .csv or .tsv with a row per box: key, x0, y0, x1 and y1 (or x1, y1, x2, y2, or xmin, ymin, xmax, ymax), corners in pixels of the "
    "upright image, and perhaps label"
)
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


def read_box_file(path: Path, where: str = "") -> BoxFile:
    """The boxes of a file, every value checked. ValueError, naming file, key and value, for what is no such file, and for a box without an area.

    where: how messages name it, without a word as the option --boxes.
    """
    where = where or f"--boxes {path}"
    corners, labels = dict[str, list[list[float]]](), dict[str, list[str | None]]()
    try:
        for key, box, label in box_rows(table_rows(path)):
            x0, y0, x1, y1 = box
            if not (np.isfinite(box).all() and 0 <= x0 < x1 and 0 <= y0 < y1):
                raise ValueError(
                    f"{key!r} has the box {box}; 0 <= x0 < x1 and 0 <= y0 < y1, corners in pixels, were expected"
                )
            corners.setdefault(key, []).append(box)
            labels.setdefault(key, []).append(label)
    except (OSError, ValueError, TypeError, csv.Error, pa.ArrowException) as error:
        raise ValueError(
            f"{where}: cannot be read as boxes ({error}); expected {BOXES_FORM}; correct the file"
        ) from None
    if not corners:
        raise ValueError(f"{where}: is empty; expected {BOXES_FORM}; correct the file")
    return BoxFile(path, {key: np.array(boxes, np.float64) for key, boxes in corners.items()}, labels)


def box_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float], str | None]]:
    """(key, x0 y0 x1 y1, label) of every row. ValueError unless there are an image and four sides."""
    if not rows:
        return
    there = {str(name).lower(): name for name in rows[0]}
    key = next((there[name] for name in ("key", *IMAGE_COLUMNS) if name in there), None)
    sides = next((names for names in SIDES if set(names) <= there.keys()), None)
    if key is None or sides is None:
        raise ValueError(f"its columns are {list(rows[0])}; key, x0, y0, x1 and y1 were expected")
    label = next((there[name] for name in LABEL_COLUMNS if name in there), None)
    for row in rows:
        yield checked_box(row[key], [row[there[name]] for name in sides], None if label is None else row[label])


def checked_box(key: Any, sides: list[Any], label: Any) -> tuple[str, list[float], str | None]:
    """A row in its own types. ValueError for a key that is no text and a side that is no number."""
    try:
        box = [float(side) for side in sides]
    except (TypeError, ValueError):
        raise ValueError(f"{key!r} has the box {sides}; four numbers were expected") from None
    if not isinstance(key, str) or not key:
        raise ValueError(f"key {key!r} was found; text was expected")
    return key, box, None if label in (None, "") else str(label)
