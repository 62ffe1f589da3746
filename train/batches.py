"""From a cache to batches on the device, prepared ahead by threads: which images, which view, which masks, in which order.

Everything is a function of (seed, epoch, sample), so the order, the views and the masks are the same for any number of
ranks, threads or resumes. Each epoch is one permutation of all valid images; its last partial batch is dropped, and as the
permutation changes with the epoch, so does what is dropped.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mrmae.shards.cache import Cache
from mrmae.shards.stream import epoch_order, view_of
from mrmae.train.masks import Masks
from mrmae.train.recipe import Recipe
from mrmae.train.targets import Batch, CacheInfo, TeacherInfo

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Loaded = tuple[Batch, Masks]
AHEAD = 4  # micro-batches in memory beside the one in use
LOADERS = 2


def cache_info(cache: Cache) -> CacheInfo:
    """What the student needs to know of a cache: size, grid, and each teacher's width, statistics and extras."""
    teachers = {}
    for teacher, column in cache.teachers.items():
        spec, quantiser = cache.columns[column].spec, cache.columns[column].quantiser
        teachers[teacher] = TeacherInfo(
            width=spec.width,
            channel_mean=_tensor(quantiser.channel_mean),
            channel_std=_tensor(quantiser.channel_std),
            has_cls=spec.has_cls,
            has_attention=spec.has_attention,
            column=column,
            has_scale=quantiser.dtype == "int8",
        )
    return CacheInfo(size=cache.size, grid=cache.grid, teachers=teachers)


def _tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.as_tensor(np.asarray(values, np.float32))


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process trains: `rank` of `ranks`, in `accum` micro-batches one after another."""

    batch_size: int
    rank: int = 0
    ranks: int = 1
    accum: int = 1

    @property
    def micro_size(self) -> int:
        """Images per forward pass of this process."""
        return self.batch_size // (self.ranks * self.accum)


def check_share(share: Share, n_samples: int) -> None:
    """Raise ValueError where a batch does not fit the cache, or does not split evenly over ranks and micro-batches."""
    parts = share.ranks * share.accum
    if share.batch_size > n_samples:
        raise ValueError(
            f"optim.batch_size: is {share.batch_size}, more than the {n_samples} valid images of the cache; an epoch must"
            f" hold at least one batch; give --batch-size {n_samples} or less"
        )
    if share.batch_size % parts:
        raise ValueError(
            f"optim.batch_size: is {share.batch_size}, which does not split evenly over {share.ranks} processes x"
            f" {share.accum} micro-batches; give a multiple of {parts}"
        )


def updates_per_epoch(n_samples: int, batch_size: int) -> int:
    """Whole batches in one pass over the cache."""
    return n_samples // batch_size


def numbers_of_epoch(cache: Cache, *, seed: int, epoch: int) -> Numbers:
    """The cache's valid sample numbers in the order of `epoch`: global, whatever the number of ranks."""
    return epoch_order(cache.numbers, cache.shard_samples, seed=seed, epoch=epoch)


def rows_of(order: Numbers, update: int, micro: int, share: Share) -> Numbers:
    """The sample numbers of one micro-batch of this rank in update `update` of the epoch."""
    size = share.micro_size
    start = update * share.batch_size + (share.rank * share.accum + micro) * size
    return order[start : start + size]


def views_of(cache: Cache, numbers: Numbers, *, epoch: int) -> Numbers:
    """Each sample's view in this epoch: (epoch + hash) mod K, so every image goes through its views in turn."""
    return view_of(cache.hashes.numpy()[numbers], epoch, cache.n_views)


def load_batch(cache: Cache, numbers: Numbers, *, epoch: int, needed: Mapping[str, set[str]]) -> Batch:
    """The batch of these samples on the host: hashes, pixels of the epoch's views, and only the arrays that are needed.

    needed: teacher -> arrays of its column (`tokens`, `scale`, `cls`, `attention`, `norm`).
    """
    samples = cache.hashes[torch.from_numpy(numbers)]
    views = views_of(cache, numbers, epoch=epoch)
    targets = {
        teacher: cache.read_column(cache.teachers[teacher], numbers, views, arrays=tuple(sorted(arrays)))
        for teacher, arrays in needed.items()
        if arrays
    }
    return Batch(samples=samples, pixels=cache.read_pixels(numbers, views), targets=targets)


@dataclass(frozen=True)
class Position:
    """A point in a run: `update` updates of epoch `epoch` (both from 0) are done."""

    epoch: int
    update: int


def jobs(start: Position, *, epochs: int, updates: int, accum: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, update, micro) of every micro-batch from `start` to the end of the run."""
    for epoch in range(start.epoch, epochs):
        for update in range(start.update if epoch == start.epoch else 0, updates):
            for micro in range(accum):
                yield epoch, update, micro


class Feed:
    """Micro-batches with their masks, in order, on the device; `AHEAD` of them are prepared while the device works.

    load: makes one (batch, masks) on the host; called from `LOADERS` threads, so that one batch is collated while the next is
    read (the cache reads and decodes in threads of its own). `waited_s` is the time `next` had to wait for it: the stall.
    Close it, or use it in a `with`.
    """

    def __init__(
        self,
        load: Callable[[int, int, int], Loaded],
        todo: Iterator[tuple[int, int, int]],
        device: torch.device,
    ) -> None:
        self.waited_s = 0.0
        self._load, self._todo, self._device = load, todo, device
        self._pool = ThreadPoolExecutor(LOADERS, thread_name_prefix="loader")
        self._queue: deque[Future[Loaded]] = deque()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: tuple[Loaded, torch.cuda.Event] | None = None
        for _ in range(AHEAD):
            self._submit()

    def _submit(self) -> None:
        job = next(self._todo, None)
        if job is not None:
            self._queue.append(self._pool.submit(self._prepare, *job))

    def _prepare(self, epoch: int, update: int, micro: int) -> Loaded:
        loaded = self._load(epoch, update, micro)
        return tensors_of(loaded, Tensor.pin_memory) if self._copies is not None else loaded

    def _pull(self) -> Loaded | None:
        if not self._queue:
            return None
        start = time.perf_counter()
        loaded = self._queue.popleft().result()
        self.waited_s += time.perf_counter() - start
        self._submit()
        return loaded

    def __next__(self) -> Loaded:
        """The next micro-batch. Raises what its loading raised, and StopIteration at the end of the run."""
        if self._copies is not None:
            return self._next_from_stream(self._copies)
        loaded = self._pull()
        if loaded is None:
            raise StopIteration
        return tensors_of(loaded, lambda t: t.to(self._device))

    def _next_from_stream(self, copies: torch.cuda.Stream) -> Loaded:
        """The micro-batch copied during the step before; starts the copy of the one after it."""
        current = self._next or self._copy(copies)
        if current is None:
            raise StopIteration
        loaded, done = current
        compute = torch.cuda.current_stream(self._device)
        compute.wait_event(done)

        def belongs(tensor: Tensor) -> Tensor:
            tensor.record_stream(compute)  # its memory may be reused only after the step has used it
            return tensor

        tensors_of(loaded, belongs)
        self._next = self._copy(copies)
        return loaded

    def _copy(self, copies: torch.cuda.Stream) -> tuple[Loaded, torch.cuda.Event] | None:
        loaded = self._pull()
        if loaded is None:
            return None
        with torch.cuda.stream(copies):
            moved = tensors_of(loaded, lambda t: t.to(self._device, non_blocking=True))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(copies)
        return moved, done

    def close(self) -> None:
        """Stop the threads; what they are loading is finished and thrown away."""
        self._todo = iter(())
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensors_of(loaded: Loaded, change: Callable[[Tensor], Tensor]) -> Loaded:
    """The same batch and masks with every tensor replaced by `change(tensor)`."""
    batch, masks = loaded
    targets = {t: {name: change(v) for name, v in arrays.items()} for t, arrays in batch.targets.items()}
    moved = replace(batch, samples=change(batch.samples), pixels=change(batch.pixels), targets=targets)
    return moved, Masks(ids_keep=change(masks.ids_keep), ids_predict=change(masks.ids_predict))


def reads_only_visible(recipe: Recipe) -> bool:
    """Whether teachers' tokens are read at visible patches only, so that the others need not leave the host."""
    return all(term.positions != "predicted" for term in recipe.terms.values() if term.target == "teachers")


def visible_rows(batch: Batch, masks: Masks) -> Batch:
    """The same batch with only the visible rows of every teacher's tokens and scales: a quarter of the bytes to copy."""
    rows = torch.arange(len(batch.samples))[:, None]
    targets = {
        teacher: {name: v[rows, masks.ids_keep] if name in ("tokens", "scale") else v for name, v in arrays.items()}
        for teacher, arrays in batch.targets.items()
    }
    return replace(batch, targets=targets, rows="visible")


def default_workers() -> int:
    """Reading threads: one fewer than the cores this process may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))
