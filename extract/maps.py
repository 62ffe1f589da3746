"""Maps that a person gives: a value, or several, per patch of every image, from a file by key, as a view shows them.

`[l]` is what the patches of the only view are: nothing is done to it. `[h, w]`, of any size, is the whole upright image: a view sees
its crop of it and its flip. Ids and bits (integers) are taken at the middle of each patch, scores (floats) as the mean over its area.
`[views, l, c]` are c numbers for each patch of each view, as they are: a crop or a flip of latents is not the latents of the crop.
"""

import dataclasses
import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mrmae.common.progress import counted
from mrmae.shards.format import FP16_MAX, MAP_DTYPES, NAME, Array, TeacherSpec, View, canonical_json

IDS, SCORES = MAP_DTYPES
MOST_ID = 2**16 - 1
MOST_NUMBERS = 4096  # of a patch
MAP_FORM = "NAME=FILE, a .npz or .parquet with an array [l], [h, w] or [views, l, c] per image"
SCORES_EXPECTED = f"finite scores of at most {FP16_MAX:.0f}, which float16 holds"
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class GivenMap:
    """A map as it was given. values: by key, all uint16 or all float16, all [l], all [h, w] or all [views, l, c]. sha256: of keys and values."""

    name: str
    file: Path
    values: Mapping[str, Array]
    sha256: str

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"--map {self.name}={self.file}"

    @property
    def dtype(self) -> str:
        """uint16 for ids and bits, float16 for scores."""
        return next(iter(self.values.values())).dtype.name

    @property
    def of_view(self) -> bool:
        """Whether it holds the patches of views, [l] or [views, l, c], and not whole images."""
        return next(iter(self.values.values())).ndim != 2

    @property
    def width(self) -> int:
        """Numbers per patch."""
        return width_of(next(iter(self.values.values())))

    def spec(self, grid: tuple[int, int]) -> TeacherSpec:
        """The map as a column of a cache: what changes its numbers."""
        resample = "none" if self.of_view else "nearest" if self.dtype == IDS else "area"
        return TeacherSpec(
            name=self.name, library="map", model=self.dtype, weights="file", tag=None, weights_sha256=self.sha256, activation=None,
            input_size=grid, mean=(), std=(), interpolation="none", antialias=False, tap="map", prefix_tokens=0, native_grid=grid,
            grid=grid, resample=resample, width=self.width, has_cls=False, has_attention=False, precision="fp32", attention_backend="none",
        )  # fmt: skip

    def refuse_lacking(self, keys: Sequence[str]) -> None:
        """ValueError, naming the first, where images have no value."""
        if lacking := [key for key in keys if key not in self.values]:
            raise ValueError(f"{self.where}: has no key {lacking[0]!r} ({len(lacking)} of {counted(len(keys), 'image')} are not in it); "
                             "expected every image's key, as inspect-cache and --include name it; add them to the file")  # fmt: skip

    def seen(self, key: str, view: int, crop: View, grid: tuple[int, int]) -> Array:
        """[l] or [l, c]: what the view of this number of the image of this key shows. crop: the view."""
        values = self.values[key]
        if values.ndim == 3:
            seen: Array = values[view]
            return seen
        return values if values.ndim == 1 else on_grid(values, crop, grid).ravel()


def read_map(text: str, *, grid: int, views: int) -> GivenMap:
    """The map of `NAME=FILE`, every value checked. ValueError, naming file, key and value, for what is no map of such a grid."""
    name, equals, file = text.partition("=")
    if not (equals and file and NAME.fullmatch(name)):
        raise ValueError(
            f"--map {text}: has no name, no file, or a name that cannot be a folder's; expected {MAP_FORM}"
        )
    path, values = Path(file), dict[str, Array]()
    for key, array in arrays_of(path, f"--map {name}={file}"):
        if key in values:
            raise ValueError(
                f"--map {name}={file}: {key!r} is there twice; expected one array per image; correct the file"
            )
        values[key] = checked_map(array, f"--map {name}={file}: {key!r}", grid=grid, views=views)
        first = next(iter(values.values()))
        kinds = [(array.dtype, array.ndim, width_of(array)) for array in (values[key], first)]
        if kinds[0] != kinds[1]:
            kind, other = (
                f"{dtype} with {ndim} dimensions" + f", {c} numbers per patch" * (ndim == 3) for dtype, ndim, c in kinds
            )
            raise ValueError(
                f"--map {name}={file}: {key!r} is {kind}; {next(iter(values))!r} is {other}; expected all images alike; correct the file"
            )
    if not values:
        raise ValueError(f"--map {name}={file}: is empty; expected {MAP_FORM}; write an array for every image")
    return GivenMap(name, path, values, sha256_of(values))


def arrays_of(path: Path, where: str) -> Iterator[tuple[str, Array]]:
    """(key, array) of every image of a file, nothing unpickled. ValueError where it is no such file."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                yield from ((key, file[key]) for key in file.files)
        elif path.suffix == ".parquet":
            yield from parquet_rows(path)
        else:
            raise ValueError(f"the name ends in {path.suffix!r}; .npz or .parquet was expected")
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise ValueError(
            f"{where}: cannot be read as a map ({error}); expected {MAP_FORM}, without pickled objects; write it anew"
        ) from None


def width_of(array: Array) -> int:
    """Numbers per patch."""
    return array.shape[2] if array.ndim == 3 else 1


def parquet_rows(path: Path) -> Iterator[tuple[str, Array]]:
    """(key, array) of every row of a parquet file with the columns `key`, text, and `map`, lists, lists of lists, or one deeper."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        if not {"key", "map"} <= set(file.schema_arrow.names):
            raise ValueError(f"its columns are {file.schema_arrow.names}; key and map were expected")
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["key", "map"], use_threads=False)
            for key, row in zip(table["key"], table["map"]):
                if not isinstance(key.as_py(), str) or not row.is_valid:
                    raise ValueError(f"key {key.as_py()!r} has the map {row.as_py()!r}; text and a list were expected")
                yield key.as_py(), as_array(row)


def as_array(row: Any) -> Array:
    """A list of numbers, or of equally long lists, as an array of its own dtype."""
    if not pa.types.is_nested(row.type.value_type):
        return np.asarray(row.values.to_numpy(zero_copy_only=False))
    return np.stack([as_array(line) for line in row.values])


def checked_map(array: Array, where: str, *, grid: int, views: int) -> Array:
    """The array as it is stored, uint16 or float16. ValueError for another shape, or a value that has no place there."""
    if array.ndim == 3:
        return checked_numbers(array, where, grid=grid, views=views)
    if array.shape != (grid * grid,) and (array.ndim != 2 or not array.size):
        raise ValueError(f"{where}: has the shape {list(array.shape)}; expected [{grid * grid}], the patches of a {grid} x {grid} grid, "
                         "or [h, w], the whole image; correct the file, or --grid")  # fmt: skip
    if array.ndim == 1 and views > 1:
        raise ValueError(f"{where}: has the shape {list(array.shape)}, the patches of one view; --views {views} show other patches each; "
                         "expected [h, w], the whole image, which every view crops; or give --views 1")  # fmt: skip
    if array.dtype.kind in "bui":
        array = array.astype(np.int64 if array.dtype != np.uint64 else np.uint64)
        wrong = array[(array < 0) | (array > MOST_ID)]
        expected, dtype = f"ids or bits of 0 to {MOST_ID}", IDS
    elif array.dtype.kind == "f":
        wrong, expected, dtype = array[~(np.abs(array) <= FP16_MAX)], SCORES_EXPECTED, SCORES
    else:
        raise ValueError(
            f"{where}: holds {array.dtype}; expected integers (ids, bits) or floats (scores); correct the file"
        )
    if wrong.size:
        raise ValueError(
            f"{where}: holds {wrong.flat[0]} ({wrong.size} such values); expected {expected}; correct the file"
        )
    return np.ascontiguousarray(array, dtype)


def checked_numbers(array: Array, where: str, *, grid: int, views: int) -> Array:
    """Likewise of several numbers per patch of each view: float16."""
    if array.shape[:2] != (views, grid * grid) or not 2 <= array.shape[2] <= MOST_NUMBERS:
        raise ValueError(f"{where}: has the shape {list(array.shape)}; expected [{views}, {grid * grid}, c], 2 to {MOST_NUMBERS} numbers for each patch of "
                         "each of --views; correct the file, --views or --grid")  # fmt: skip
    if array.dtype.kind != "f":
        raise ValueError(
            f"{where}: holds {array.dtype}; expected floats where a patch has several numbers; correct the file"
        )
    if (wrong := array[~(np.abs(array) <= FP16_MAX)]).size:
        raise ValueError(
            f"{where}: holds {wrong.flat[0]} ({wrong.size} such values); expected {SCORES_EXPECTED}; correct the file"
        )
    return np.ascontiguousarray(array, SCORES)


def sha256_of(values: Mapping[str, Array]) -> str:
    """Of keys, shapes and values, whatever the order and the kind of the file."""
    digest = hashlib.sha256()
    for key in sorted(values):
        array = values[key]
        digest.update(canonical_json([key, array.dtype.name, list(array.shape)]))
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def on_grid(whole: Array, view: View, grid: tuple[int, int]) -> Array:
    """[rows, columns]: what the patches of a view show of a map of the whole image.

    The crop's edges are scaled to the map. Integers: the value at the middle of each patch. Floats: the mean over its area.
    """
    rows = edges(view.top, view.height, view.source_height, whole.shape[0], grid[0])
    columns = edges(view.left, view.width, view.source_width, whole.shape[1], grid[1])
    if whole.dtype == IDS:
        seen = whole[np.ix_(middles(rows), middles(columns))]
    else:
        seen = (shares(rows, whole.shape[0]) @ whole.astype(np.float64) @ shares(columns, whole.shape[1]).T).astype(
            SCORES
        )
    return np.ascontiguousarray(seen[:, ::-1] if view.flip else seen)


def edges(start: int, length: int, of: int, cells: int, patches: int) -> Floats:
    """Where the patches of a crop begin and end along one side, counted in cells of the map."""
    return (start + length * np.arange(patches + 1) / patches) * cells / of


def middles(edges: Floats) -> Array:
    """The cell in the middle of each patch."""
    return np.floor((edges[:-1] + edges[1:]) / 2).astype(np.int64)


def shares(edges: Floats, cells: int) -> Floats:
    """[patches, cells]: which share of each patch lies in each cell; rows sum to 1."""
    cell = np.arange(cells)
    overlap = np.minimum(edges[1:, None], cell + 1) - np.maximum(edges[:-1, None], cell)
    return overlap.clip(0) / (edges[1:] - edges[:-1])[:, None]
