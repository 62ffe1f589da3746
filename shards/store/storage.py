"""The formats that a column can be stored in; each is a module with these functions. docs/format.md, "Columns"."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mrmae.shards.format import PIXELS, Array, Layout, Plan, tar_path
from mrmae.shards.store import tar_columns, zarr
from mrmae.shards.store.tar import index_path


class Shard(Protocol):
    """A shard opened for reading, from any thread."""

    def read(
        self, rows: Sequence[int], out: Mapping[str, Sequence[Array]], blocks: Sequence[int] | None = None
    ) -> None:
        """Read the samples at `rows` of every array in `out` into its contiguous buffers, verified. Raises Damaged.

        blocks: of arrays in blocks, the one of each sample to read; None: all of them, one behind the other.
        """

    def check(self, rows: Sequence[int]) -> None:
        """Read all there is of a shard in which the samples at `rows` are valid. Raises Damaged."""


class Storage(Protocol):
    """Where the files of a column lie, and how a shard of it is written and read. folder: column_folder's."""

    OVERHEAD_BYTES: int

    def column_folder(self, path: Path, view: int, column: str) -> Path: ...
    def shard_files(self, folder: Path, layout: Layout, shard: int) -> list[Path]: ...
    def metadata_paths(self, folder: Path, layout: Layout) -> list[Path]: ...
    def metadata(self, layout: Layout, attrs: Mapping[str, Any]) -> dict[str, bytes]: ...
    def create_column(self, folder: Path, layout: Layout, attrs: Mapping[str, Any]) -> None: ...
    def read_attributes(self, folder: Path) -> tuple[Layout, dict[str, Any]]: ...
    def write_column_shard(
        self, folder: Path, shard: int, arrays: Mapping[str, Array], valid: Sequence[bool] | Array, keys: Sequence[str],
        *, id: str | None = None, count: int | None = None,
    ) -> dict[str, Any]: ...  # fmt: skip
    def open_shard(
        self, folder: Path, layout: Layout, column_id: str, view: int, shard: int, keys: Sequence[str] | None
    ) -> Shard: ...


STORAGES: Mapping[str, Storage] = {"zarr": zarr, "webdataset": tar_columns}


def storage_of(plan: Plan) -> Storage:
    """The functions that write and read the columns of a plan's cache."""
    return STORAGES[plan.format]


def column_folder(path: Path, plan: Plan, view: int, column: str) -> Path:
    """Where a column of one view lies in the cache at `path`."""
    return storage_of(plan).column_folder(path, view, column)


def unit_files(path: Path, plan: Plan, view: int, column: str, shard: int) -> list[Path]:
    """The files of one unit of work."""
    if column == PIXELS:
        tar = tar_path(path, view, shard)
        return [tar, index_path(tar)]
    return storage_of(plan).shard_files(column_folder(path, plan, view, column), plan.layout(column), shard)
