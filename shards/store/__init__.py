"""How a cache's columns and views lie in files: zarr v3 and webdataset tars behind one protocol, read at the speed of the disk."""

from mrmae.shards.store.links import foreign_entries, refuse_foreign_entries
from mrmae.shards.store.reader import Damaged, read_members
from mrmae.shards.store.shards import Shards
from mrmae.shards.store.storage import STORAGES, Shard, column_folder, storage_of, unit_files
from mrmae.shards.store.tar import (
    PixelRow,
    TarIndex,
    digest_of_hashes,
    index_path,
    parse_row,
    read_hashes,
    read_index,
    undisturbed,
    write_pixel_tar,
)
from mrmae.shards.store.zarr import MOST_METADATA_BYTES

__all__ = [
    "Damaged",
    "MOST_METADATA_BYTES",
    "PixelRow",
    "STORAGES",
    "Shard",
    "Shards",
    "TarIndex",
    "column_folder",
    "digest_of_hashes",
    "foreign_entries",
    "index_path",
    "parse_row",
    "read_hashes",
    "read_index",
    "read_members",
    "refuse_foreign_entries",
    "storage_of",
    "undisturbed",
    "unit_files",
    "write_pixel_tar",
]
