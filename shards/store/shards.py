"""All shards of a cache: each opened when it is first read and kept, a batch of any samples read from them in threads."""

import concurrent.futures
import os
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from mrmae.common.backend import Unreachable, Url
from mrmae.shards.format import (
    IN_BLOCKS,
    PIXELS,
    Array,
    Numbers,
    Plan,
    Unit,
    View,
    commit_path,
    pixels_of,
    signed_hashes,
    tar_path,
)
from mrmae.shards.store.reader import Damaged
from mrmae.shards.store.storage import Shard, column_folder, storage_of
from mrmae.shards.store.tar import PixelShard, open_pixels

PIXELS_AT_ONCE = 8  # JPEGs per thread and call: enough to pay for the call, few enough to share a small batch
MOST_OPENED = 512  # shards whose indices are kept, about 0.3 MB each of a ViT-B: a window of 8 in 4 views of 15 columns
REMOTE_PIXELS = 64  # the same at a URL, where neighbours should come in one request
NEAR_TRIES = 3  # of a copy that goes while it is read, or is damaged
Made = TypeVar("Made")


class Nearby(Protocol):
    """Copies of units on a nearer disk; shards/near.py has them."""

    def copies(self, units: Collection[Unit]) -> None: ...
    def copy(self, unit: Unit) -> Path | None: ...
    def spoiled(self, unit: Unit, error: Damaged, inode: int) -> None: ...


class Shards:
    """What Cache reads through. Thread-safe; may be pickled: shards and threads are opened anew where it arrives.

    keys, hashes: of every sample, hashes as signed 64-bit integers. threads: for one batch. near: copies to read instead.
    """

    def __init__(
        self, path: Path, plan: Plan, keys: Sequence[str], hashes: Numbers, threads: int, near: Nearby | None = None
    ) -> None:
        self.path, self.plan, self.keys, self.hashes, self.threads = path, plan, keys, hashes, threads
        self.near = near
        self._opened: OrderedDict[tuple[Path, Unit], Shard | PixelShard] = OrderedDict()  # their indices stay in memory
        self._opening = threading.Lock()
        self._pool: tuple[int, concurrent.futures.ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_opening", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(
        self, column: str, numbers: Numbers, views: Numbers, out: Mapping[str, Array], blocks: Numbers | None = None
    ) -> None:
        """Fill `out`, arrays [b, ...] by name, with these samples of a column, verified; PIXELS has one array, its name.

        blocks: of arrays in blocks, the one of each sample to read; None: all of them, in raster order.
        Raises ValueError that names shard, sample and repair.
        """
        remote = isinstance(self.path, Url) and self.near is None
        at_once = 2**62 if column != PIXELS else REMOTE_PIXELS if remote else PIXELS_AT_ONCE
        parts = list(shard_parts(numbers // self.plan.shard_samples, views, at_once))
        if self.near is not None:
            self.near.copies({(view, column, shard) for _, view, shard in parts})

        def read_parts(share: Sequence[tuple[Numbers, int, int]]) -> None:
            for positions, view, shard in share:
                self.read_part((view, column, shard), positions, numbers[positions], out, blocks)

        # A call costs more than a local read: one per thread. At a URL a call waits: one per request.
        n = len(parts) if remote else min(self.threads, len(parts))
        if n <= 1:
            read_parts(parts)
            return
        calls = [self.pool().submit(read_parts, parts[i::n]) for i in range(n)]
        concurrent.futures.wait(calls)  # all of them: nobody writes to the buffer after an error
        for call in calls:
            call.result()

    def read_part(
        self, unit: Unit, positions: Numbers, numbers: Numbers, out: Mapping[str, Array], blocks: Numbers | None
    ) -> None:
        """Fill `out` at the positions of a batch that hold these samples of one shard."""
        rows = (numbers % self.plan.shard_samples).tolist()
        cut = IN_BLOCKS if self.plan.token_layout and blocks is None else ()
        stored = {name: np.empty((len(rows), *a.shape[1:]), a.dtype) for name, a in out.items() if name in cut}
        buffers = {name: list(stored[name]) if name in stored else [array[i] for i in positions]
                   for name, array in out.items()}  # fmt: skip
        which = None if blocks is None else blocks[positions].tolist()
        try:  # no context manager: this runs once per shard and batch
            self.of_unit(unit, lambda shard: shard.read(rows, buffers, which))
        except (Damaged, Unreachable) as error:
            raise self.told(error, unit, int(numbers[0])) from None
        if stored:
            order = self.stored_order(numbers, unit[0])
            for name, array in stored.items():
                out[name][positions[:, None], order] = array

    def stored_order(self, numbers: Numbers, view: int) -> Numbers:
        """[b, l]: the grid index of every stored row of tokens in blocks."""
        assert self.plan.token_layout is not None
        (height, width), views = self.plan.grid, np.full(len(numbers), view)
        return self.plan.token_layout.order(self.hashes[numbers], views, height * width)

    def crop(self, number: int, view: int) -> View:
        """The recorded crop and flip of one sample's view."""
        shard, row = divmod(number, self.plan.shard_samples)
        try:
            return self.of_unit((view, PIXELS, shard), lambda pixels: crop_of(pixels, row))
        except (Damaged, Unreachable) as error:
            raise self.told(error, (view, PIXELS, shard), number) from None

    def pixels(self, view: int, shard: int) -> PixelShard:
        """The views of one shard, where the cache itself has them: for its index."""
        pixels = self.opened((view, PIXELS, shard), self.path)
        assert isinstance(pixels, PixelShard)
        return pixels

    def of_unit(self, unit: Unit, read: Callable[[Shard | PixelShard], Made]) -> Made:
        """What `read` makes of a shard: of its copy where one is or comes near, else of its files in the cache. Raises Damaged."""
        for _ in range(NEAR_TRIES if self.near is not None else 0):
            assert self.near is not None
            if (copy := self.near.copy(unit)) is None:
                break
            try:
                inode = copy.stat().st_ino
                return read(self.opened(unit, copy))
            except FileNotFoundError:  # it had to make room just now
                continue
            except Damaged as error:
                if copy not in error.path.parents:
                    raise
                with self._opening:
                    self._opened.pop((copy, unit), None)
                self.near.spoiled(unit, error, inode)
        return read(self.opened(unit, self.path))

    def opened(self, unit: Unit, path: Path) -> Shard | PixelShard:
        """A shard of the cache at `path`, or of a copy there, opened, once it is known to be this cache's. Raises Damaged."""
        key = path, unit
        with self._opening:
            if (there := self._opened.get(key)) is not None:
                self._opened.move_to_end(key)
                return there
        opened = self.newly_opened(unit, path)
        with self._opening:
            self._opened.setdefault(key, opened)
            if len(self._opened) > MOST_OPENED:
                self._opened.popitem(last=False)
        return opened

    def newly_opened(self, unit: Unit, path: Path) -> Shard | PixelShard:
        """A shard, opened and compared with what the cache says of it. Raises Damaged."""
        (view, column, shard), plan = unit, self.plan
        rows = slice(plan.ranges[shard].start, plan.ranges[shard].stop)
        keys = self.keys[rows]
        if not np.array_equal(signed_hashes(keys), self.hashes[rows]):
            raise Damaged(
                self.path / "samples.arrow",
                None,
                f"its keys and their hashes do not fit in rows {rows.start} to {rows.stop - 1}",
            )
        if column == PIXELS:
            tar = tar_path(path, view, shard)
            return open_pixels(tar, pixels_of(plan, view, shard), keys, plan.recipe.stored)
        folder, id = column_folder(path, plan, view, column), plan.shard_ids(shard)[column]
        return storage_of(plan).open_shard(folder, plan.layout(column), id, view, shard, keys)

    def told(self, error: Damaged | Unreachable, unit: Unit, number: int) -> ValueError | Unreachable:
        """What is damaged or does not answer, with what a user should know. number: the first sample read."""
        if isinstance(error, Damaged):
            return ValueError(self.repair_text(error, unit))
        view, column, shard = unit
        return Unreachable(f"sample {number} ({self.keys[number]!r}), shard {shard} of {column}, view {view}: {error}")

    def repair_text(self, error: Damaged, unit: Unit) -> str:
        """What is damaged, whose sample it is, and how to repair it."""
        _, column, shard = unit
        number = shard * self.plan.shard_samples + (error.row or 0)
        whose = "" if error.row is None else f" for sample {number} ({self.keys[number]!r})"
        if isinstance(error.path, Url):
            return (f"{error.path}: {error.what}{whose}; the manifest promises whole shards; inspect-cache repair "
                    f"{shlex.quote(str(self.path))} finds all that is damaged and names the command that writes it anew; or upload this file "
                    "again from where it was copied")  # fmt: skip
        made = self.plan.quantisers.get(column)
        command = "inspect-cache convert" if made is not None and made.source else "extract-features"
        return (f"{error.path}: {error.what}{whose}; the manifest promises whole shards; to repair, delete "
                f"{commit_path(self.path, *unit)} and run the same {command} command again, "
                f"which rewrites this shard only; inspect-cache repair {shlex.quote(str(self.path))} finds all that is damaged and "
                "names the command")  # fmt: skip

    def pool(self) -> concurrent.futures.ThreadPoolExecutor:
        """This process's reading threads (threads do not survive a fork)."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), concurrent.futures.ThreadPoolExecutor(self.threads, "cache"))
        return self._pool[1]


def crop_of(pixels: Shard | PixelShard, row: int) -> View:
    """The recorded crop and flip of a view. Raises Damaged."""
    assert isinstance(pixels, PixelShard)
    return pixels.crop(row)


def shard_parts(shards: Numbers, views: Numbers, at_once: int) -> Iterator[tuple[Numbers, int, int]]:
    """(positions, view, shard) for each part of a batch that lies in one shard, positions ascending, at most so many."""
    order = np.lexsort((shards, views))
    cuts = np.flatnonzero((np.diff(shards[order]) != 0) | (np.diff(views[order]) != 0)) + 1
    for part in np.split(order, cuts) if len(order) else []:
        for start in range(0, len(part), at_once):
            yield part[start : start + at_once], int(views[part[0]]), int(shards[part[0]])
