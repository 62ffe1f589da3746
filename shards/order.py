"""The order in which an epoch reads a cache: global, from (seed, epoch) alone, the same for any number of ranks.

A position in it is the whole state of a reader: resuming means computing the order again and skipping.
"""

from typing import Any

import numpy as np

from mrmae.shards.format import Numbers

VIEWS_FOR, MOST_USEFUL_VIEWS = ((25, 1), (100, 2)), 4  # (epochs at most, views)


def epoch_order(numbers: int | Numbers, shard_samples: int, *, seed: int, epoch: int, window: int = 8) -> Numbers:
    """Sample numbers in the order of one epoch: shards permuted, samples shuffled within every `window` shards.

    numbers: how many samples there are, or the numbers to visit (the valid ones). Each is visited once; leaving some
    out keeps the order of the others, as long as the last shard keeps one. window 0: ascending, no shuffling.
    """
    numbers = np.arange(numbers, dtype=np.int64) if isinstance(numbers, int) else np.asarray(numbers, np.int64)
    if window == 0 or not len(numbers):
        return numbers
    shards = numbers // shard_samples
    turn = np.argsort(words(int(shards.max()) + 1, seed, epoch, 0), kind="stable").argsort(kind="stable")
    return numbers[np.lexsort((words(int(numbers.max()) + 1, seed, epoch, 1)[numbers], turn[shards] // window))]


def words(n: int, seed: int, epoch: int, purpose: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """n random 64-bit words: Philox, whose raw output no version of numpy may change."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], np.uint64)).random_raw(n)


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
