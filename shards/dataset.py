"""A cache as torch data sets, for a training loop of one's own.

    cache = open_cache("photos.cache")
    for epoch in range(20):
        for batch in DataLoader(CacheEpoch(cache, 64, epoch=epoch, columns=["dino"]), batch_size=None, num_workers=2):
            batch["pixels"], batch["label"], batch["dino"]    # uint8 [b, h, w, 3], int64 [b], float32 [b, patches, channels]

CacheImages is the map-style view of the same, for samplers of one's own. An opened cache may be pickled and forked; one at a URL
may only be pickled: give DataLoader multiprocessing_context="spawn".
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers
from mrmae.shards.order import EpochOrder, view_of

Item = dict[str, Any]


def class_names(cache: Cache) -> list[str]:
    """The labels of a cache, sorted: `label` in a batch is an index into them, -1 where an image has none."""
    return sorted({label for label in cache.labels if label is not None})


class CacheImages(Dataset[Item]):
    """Item i is the i-th readable image, in canonical order, with the view that it shows in `epoch`.

    An item: `number`, `key`, `label` (index into `classes`, -1 for none), `pixels` uint8 [h, w, 3], and per name in `columns`
    its dequantised tokens, float32 [patches, channels]. columns: of `Cache.columns`, `.derived` or `.teachers`.
    Raises ValueError for a column that the cache does not have.
    """

    def __init__(self, cache: Cache, *, columns: Sequence[str] = (), epoch: int = 0) -> None:
        self.cache, self.epoch, self.classes = cache, epoch, class_names(cache)
        self.columns = {name: cache.teachers.get(name, name) for name in columns}
        for column in self.columns.values():
            cache.column(column)

    def __len__(self) -> int:
        return len(self.cache.numbers)

    def __getitem__(self, i: int) -> Item:
        return self.__getitems__([i])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Several items in one read: DataLoader asks for a batch so."""
        batch = self.batch(self.cache.numbers[np.asarray(positions)])
        return [{name: values[i] for name, values in batch.items()} for i in range(len(positions))]

    def batch(self, numbers: Numbers) -> Item:
        """These samples, stacked; `key` is a list."""
        cache = self.cache
        views = view_of(cache.hashes.numpy()[numbers], self.epoch, cache.n_views)
        index: dict[str | None, int] = {None: -1, **{name: i for i, name in enumerate(self.classes)}}
        about = {
            "number": torch.from_numpy(numbers),
            "key": [cache.keys[number] for number in numbers],
            "label": torch.tensor([index[cache.labels[number]] for number in numbers]),
            "pixels": cache.read_pixels(numbers, views),
        }
        return about | {name: cache.read_tokens(column, numbers, views) for name, column in self.columns.items()}


class CacheEpoch(IterableDataset[Item]):
    """The whole batches of one epoch, in the order in which train-mrmae reads it: give DataLoader batch_size=None.

    batch_size: images of one batch of one rank. The order is global, a function of (seed, epoch) alone: rank r of `ranks` takes its
    part of every batch of all, workers take turns, and what would be a partial batch is left out, another one every epoch.
    columns: as of CacheImages. Raises ValueError where the cache has less than one batch.
    """

    def __init__(
        self, cache: Cache, batch_size: int, *, seed: int = 0, epoch: int = 0, rank: int = 0, ranks: int = 1, columns: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.images = CacheImages(cache, columns=columns, epoch=epoch)
        self.seed, self.batch_size, self.rank, self.ranks = seed, batch_size, rank, ranks
        if not len(self):
            raise ValueError(f"{cache.path}: {len(self.images)} images are less than a batch of {batch_size} for each of {ranks} ranks; "
                             "at least one was expected; give a smaller batch_size")  # fmt: skip

    def __len__(self) -> int:
        return len(self.images) // (self.batch_size * self.ranks)

    def __iter__(self) -> Iterator[Item]:
        cache, worker = self.images.cache, get_worker_info()
        order = EpochOrder(cache.numbers, cache.shard_samples, seed=self.seed, epoch=self.images.epoch)
        mine, of = (worker.id, worker.num_workers) if worker else (0, 1)
        for at in range(mine, len(self), of):
            first = (at * self.ranks + self.rank) * self.batch_size
            yield self.images.batch(order[first : first + self.batch_size])
