"""Micro-batches prepared ahead by threads and copied to the device while it works, and how long training waited for them."""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from mrmae.shards.format import PIXELS, Numbers
from mrmae.shards.order import WINDOW, EpochOrder
from mrmae.train import batches
from mrmae.train.batches import Loaded, tensors_of
from mrmae.train.method import MAP, Batch, chosen_blocks, draw_masks, draw_of, partner_targets
from mrmae.train.pairs import partners_of
from mrmae.train.run import Run, columns_read

BATCHES_AHEAD = 4  # micro-batches in memory beside the one in use
LOADERS = 2


def feed_of(run: Run) -> "Feed":
    """This rank's micro-batches from where the run is to its end."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> EpochOrder:
        return batches.numbers_of_epoch(run.cache, run.numbers, seed=run.recipe.seed, epoch=epoch)

    fetch_next = fetching_ahead(run, order)

    def load(epoch: int, update: int, micro: int) -> Loaded:
        numbers = batches.micro_batch_of(order(epoch), update, micro, run.share)
        loaded = load_masked(run, numbers, epoch=epoch, update=update)
        fetch_next(epoch, update)
        return loaded

    start = batches.Position(run.epoch, run.update)
    todo = batches.jobs(start, epochs=run.recipe.optim.epochs, updates=run.updates, accum=run.share.accum)
    return Feed(load, todo, run.device)


def fetching_ahead(run: Run, order: Callable[[int], EpochOrder]) -> Callable[[int, int], None]:
    """To be called with epoch and update: where a window begins, has the shards of the next one fetched, if shards are kept near.

    Nothing where two windows are more than may be kept: the next one would drive out what is read now.
    """
    local, epochs = run.cache.local, run.recipe.optim.epochs
    columns = (PIXELS, *columns_read(run.info, run.needed, online=run.setup.online))
    if local is None or not run.cache.manifest or 2 * local.window_bytes(columns, WINDOW) > local.near.most_bytes:
        return lambda epoch, update: None
    begun: set[tuple[int, int]] = set()

    def fetch_next(epoch: int, update: int) -> None:
        now = order(epoch)
        window = now.window_at(update * run.share.batch_size)
        if (epoch, window) in begun:
            return
        begun.add((epoch, window))
        shards = now.shards_of(window + 1) or (order(epoch + 1).shards_of(0) if epoch + 1 < epochs else [])
        local.expect([(v, column, shard) for shard in shards for column in columns for v in range(run.cache.n_views)])

    return fetch_next


def load_masked(run: Run, numbers: Numbers, *, epoch: int, update: int = 0) -> Loaded:
    """These samples on the host as an update of `epoch` shows them, with their masks.

    Where teachers run in the step there are no targets yet but maps, and no masks: they may follow the teachers' attention. Masks
    that compare the student's own embeddings are drawn in the step, too.
    """
    draw = draw_of(run.recipe, run.info, epoch, update)
    given: dict[str, Any] = {"labels": None if run.labels is None else run.labels.rows(numbers)}
    if run.boxes is not None:
        given["boxes"] = batches.boxes_seen(run.cache, numbers, run.boxes, run.recipe, epoch=epoch)
    if run.online:
        stored = {target: arrays for target, arrays in run.needed.items() if target.startswith(MAP)}
        batch = batches.load_batch(run.cache, numbers, epoch=epoch, needed=stored)
        batches.refuse_unfit_map(run.cache, numbers, batch, run.recipe)
        batch = replace(batch, **given)
        return with_partner(run, batch, numbers, epoch=epoch, needed=stored), draw
    blocks = None
    if run.recipe.mask.sampler == "stored_block":
        blocks = chosen_blocks(run.cache.hashes[torch.from_numpy(numbers)], draw).numpy()
    batch = batches.load_batch(run.cache, numbers, epoch=epoch, needed=run.needed, blocks=blocks)
    batches.refuse_unfit_map(run.cache, numbers, batch, run.recipe)
    batch = with_partner(run, replace(batch, **given), numbers, epoch=epoch, needed=run.needed)
    if run.recipe.mask.sampler == "similarity":
        return batch, draw
    masks = draw_masks(batch, draw, recipe=run.recipe.mask, l=run.info.n_patches)
    gather = batch.rows == "grid" and batches.reads_only_visible(run.recipe)
    return (batches.visible_rows(batch, masks) if gather else batch), masks


def with_partner(run: Run, batch: Batch, numbers: Numbers, *, epoch: int, needed: Mapping[str, set[str]]) -> Batch:
    """The batch with each image's partner, where the recipe pairs them; what teachers say of it only if a term reads that."""
    if not run.recipe.prepare.pair:
        return batch
    others, views = partners_of(run.cache, numbers, run.pairs, epoch=epoch)
    arrays = needed if partner_targets(run.recipe) else {}
    return replace(batch, partner=batches.load_batch(run.cache, others, epoch=epoch, needed=arrays, views=views))


class Feed:
    """Micro-batches with their masks, in order, on the device; `BATCHES_AHEAD` of them are prepared while the device works.

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
        for _ in range(BATCHES_AHEAD):
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

    def __iter__(self) -> Self:
        return self

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
