"""The order in which an epoch reads a cache: global, from (seed, epoch) alone, the same for any number of ranks.

A position in it is the whole state of a reader: resuming means computing the order again and skipping.
"""

import functools
from typing import Any

import numpy as np

from mrmae.shards.format import Numbers

WINDOW = 8  # shards whose samples are mixed
WINDOWS_KEPT = 4  # of an epoch, about 0.2 MB each
VIEWS_FOR, MOST_USEFUL_VIEWS = ((25, 1), (100, 2)), 4  # (epochs at most, views)


class EpochOrder:
    """Sample numbers in the order of one epoch: shards permuted, samples shuffled within every `window` shards.

    numbers: how many samples there are, or the numbers to visit (the valid ones), ascending. Each is visited once; leaving some
    out keeps the order of the others, as long as the last shard keeps one. window 0: ascending, no shuffling.
    `order[start:stop]` computes the windows that it lies in, of which the last few are kept: an epoch of a hundred million samples
    is never in memory. Thread-safe.
    """

    def __init__(
        self, numbers: int | Numbers, shard_samples: int, *, seed: int, epoch: int, window: int = WINDOW
    ) -> None:
        self.numbers = np.arange(numbers, dtype=np.int64) if isinstance(numbers, int) else np.asarray(numbers, np.int64)
        self.shard_samples, self.seed, self.epoch, self.window = shard_samples, seed, epoch, window
        n_shards = int(self.numbers[-1]) // shard_samples + 1 if len(self.numbers) else 0
        self.bounds = np.searchsorted(
            self.numbers, np.arange(n_shards + 1) * shard_samples
        )  # of every shard's in numbers
        self.turn = np.argsort(words(n_shards, seed, epoch, 0), kind="stable")
        first = np.arange(0, n_shards, window or n_shards + 1)
        self.ends = (
            np.add.reduceat(np.diff(self.bounds)[self.turn], first).cumsum() if n_shards else np.zeros(0, np.int64)
        )
        self.kept = functools.lru_cache(maxsize=WINDOWS_KEPT)(self.shuffled)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: slice) -> Numbers:
        start, stop, step = which.indices(len(self))
        if step < 1:
            return self[:][which]
        if self.window == 0 or start >= stop:
            return self.numbers[start:stop:step]
        first, last = self.window_at(start), self.window_at(stop - 1)
        before = int(self.ends[first - 1]) if first else 0
        found = [self.kept(window) for window in range(first, last + 1)]
        return np.concatenate(found)[start - before : stop - before : step]

    def window_at(self, position: int) -> int:
        """In which window a position lies."""
        return int(np.searchsorted(self.ends, position, "right"))

    def shards_of(self, window: int) -> list[int]:
        """The shards of a window; none behind the last."""
        return [int(shard) for shard in self.turn[window * self.window : (window + 1) * self.window]]

    def shuffled(self, window: int) -> Numbers:
        """The numbers of one window, in their order."""
        found, keys = [], []
        for shard in sorted(self.shards_of(window)):
            here = self.numbers[self.bounds[shard] : self.bounds[shard + 1]]
            first = shard * self.shard_samples
            found.append(here)
            keys.append(words(self.shard_samples, self.seed, self.epoch, 1, first)[here - first])
        return np.concatenate(found)[np.argsort(np.concatenate(keys), kind="stable")]


def epoch_order(numbers: int | Numbers, shard_samples: int, *, seed: int, epoch: int, window: int = WINDOW) -> Numbers:
    """The whole of an `EpochOrder`."""
    return EpochOrder(numbers, shard_samples, seed=seed, epoch=epoch, window=window)[:]


def words(n: int, seed: int, epoch: int, purpose: int, first: int = 0) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """n random 64-bit words from the `first` one on: Philox, whose raw output no version of numpy may change.

    A counter stands for four words.
    """
    key, skipped = np.array([seed % 2**64, epoch], np.uint64), first % 4
    philox = np.random.Philox(key=key, counter=np.array([first // 4, 0, 0, purpose], np.uint64))
    return philox.random_raw(skipped + n)[skipped:]


def view_of(hashes: Numbers, epoch: int, n_views: int) -> Numbers:
    """The view that each sample shows in this epoch: (epoch + hash) mod n_views, of the unsigned hash.

    hashes: of the keys, int64 as in `Cache.hashes` (or uint64).
    """
    unsigned = np.asarray(hashes).view(np.uint64)
    return ((epoch + (unsigned % np.uint64(n_views)).astype(np.int64)) % n_views).astype(np.int64)


def views_for(epochs: int) -> int:
    """How many stored views of an image a run of so many epochs should go through in turn.

    One for short runs: in 20 epochs of docs/evidence.md two and four made no difference. More for longer ones is a rule of thumb,
    not measured: MAE draws a new crop in every epoch.
    """
    return next((views for longest, views in VIEWS_FOR if epochs <= longest), MOST_USEFUL_VIEWS)


def views_words() -> str:
    """The same for a person."""
    steps = ", ".join(f"{views} for up to {longest} epochs" for longest, views in VIEWS_FOR)
    return f"{steps}, {MOST_USEFUL_VIEWS} for more (up to 20 epochs measured, beyond a rule of thumb)"
