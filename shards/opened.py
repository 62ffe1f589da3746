"""The files of an opened cache: shards and tar indices that stay in memory, read in threads, with errors that say how to repair."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mrmae.common.backend import Unreachable, Url
from mrmae.shards.format import PIXELS, Layout, Plan, Quantiser, TeacherSpec, commit_path, pixels_of, tar_path
from mrmae.shards.store import Damaged, Shard, TarIndex, column_folder, read_index, storage_of

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Indices = Sequence[int] | Numbers | Tensor


@dataclasses.dataclass(frozen=True)
class Column:
    """One teacher's column: what made it, how it is stored, the id of its numbers, its arrays."""

    spec: TeacherSpec
    quantiser: Quantiser
    id: str
    layout: Layout


class OpenedFiles:
    """What Cache reads through. Thread-safe; may be pickled: files and threads are opened anew where it arrives.

    keys, readable, reasons: per sample. columns: those that are stored, by name.
    """

    def __init__(
        self, path: Path, plan: Plan, table: Mapping[str, list[Any]], readable: Sequence[bool], threads: int
    ) -> None:
        self.path, self.plan, self.threads = path, plan, threads
        self.keys: list[str] = table["key"]
        self.reasons: list[str | None] = table["reason"]
        self.readable = np.asarray(readable, bool)
        self.n_views, self.shard_samples = plan.n_views, plan.shard_samples
        self.columns = {t.column: Column(t, plan.quantisers[t.column], plan.ids[t.column], plan.layout(t.column))
                        for t in plan.columns if t.column in plan.quantisers}  # fmt: skip
        self._opened: dict[tuple[str, int, int], Any] = {}  # by column, view, shard: their indices stay in memory
        self._pool: tuple[int, concurrent.futures.ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_pool": None}

    def __len__(self) -> int:
        return len(self.keys)

    def checked(self, numbers: Indices, views: Indices) -> tuple[Numbers, Numbers]:
        """Both as int64 arrays. Raises ValueError for samples that cannot be read, and for views that are not there."""
        at, of = np.asarray(numbers, np.int64), np.asarray(views, np.int64)
        if at.shape != of.shape or at.ndim != 1:
            raise ValueError(f"{self.path}: {at.shape} numbers and {of.shape} views; expected one view per number")
        for name, values, n in (("sample", at, len(self)), ("view", of, self.n_views)):
            if (wrong := values[(values < 0) | (values >= n)]).size:
                raise ValueError(f"{self.path}: {name} {wrong[0]} is not in the cache; it has {n}")
        if (wrong := at[~self.readable[at]]).size:
            why = self.reasons[wrong[0]] or "it is not extracted yet"
            raise ValueError(f"{self.path}: sample {wrong[0]} ({self.keys[wrong[0]]!r}) cannot be read: {why}; "
                             "take samples from Cache.numbers")  # fmt: skip
        return at, of

    def run(
        self, column: str, read: Callable[[Numbers, int, int], None], numbers: Numbers, views: Numbers,
        *, at_once: int = 2**62,
    ) -> None:  # fmt: skip
        """Call read(positions, view, shard) in threads for each shard's part of the batch.

        at_once: positions per call, at most. Raises ValueError that names shard, sample and repair.
        """

        def explained(part: tuple[Numbers, int, int]) -> None:
            try:
                read(*part)
            except Damaged as error:
                raise ValueError(self.repair_text(error, column, *part[1:])) from None
            except Unreachable as error:
                number = int(numbers[part[0][0]])
                raise Unreachable(f"sample {number} ({self.keys[number]!r}), shard {part[2]} of {column}, view {part[1]}: "
                                  f"{error}") from None  # fmt: skip

        def all_explained(share: Sequence[tuple[Numbers, int, int]]) -> None:
            for part in share:
                explained(part)

        parts = list(shard_parts(numbers // self.shard_samples, views, at_once))
        # A call costs more than a local read: one per thread. At a URL a call waits: one per request.
        n = len(parts) if isinstance(self.path, Url) else min(self.threads, len(parts))
        if n <= 1:
            all_explained(parts)
            return
        calls = [self.pool().submit(all_explained, parts[i::n]) for i in range(n)]
        concurrent.futures.wait(calls)  # all of them: nobody writes to the buffer after an error
        for call in calls:
            call.result()

    def repair_text(self, error: Damaged, column: str, view: int, shard: int) -> str:
        """What is damaged, whose sample it is, and how to repair it."""
        number = shard * self.shard_samples + (error.row or 0)
        whose = "" if error.row is None else f" for sample {number} ({self.keys[number]!r})"
        if isinstance(error.path, Url):
            return (f"{error.path}: {error.what}{whose}; the manifest promises whole shards; upload this file again from the "
                    "folder that the cache was extracted to (inspect-cache verify --full there says whether it is whole)")  # fmt: skip
        made = self.plan.quantisers.get(column)
        command = "inspect-cache convert" if made is not None and made.source else "extract-features"
        return (f"{error.path}: {error.what}{whose}; the manifest promises whole shards; to repair, delete "
                f"{commit_path(self.path, view, column, shard)} and run the same {command} command again, "
                "which rewrites this shard only")  # fmt: skip

    def column_shard(self, column: str, view: int, shard: int) -> Shard:
        """The opened shard of a column."""
        opened: Shard | None = self._opened.get((column, view, shard))
        if opened is None:
            folder, layout = column_folder(self.path, self.plan, view, column), self.columns[column].layout
            args = folder, layout, self.plan.shard_ids(shard)[column], view, shard, self.shard_keys(shard)
            opened = self._opened.setdefault((column, view, shard), storage_of(self.plan).open_shard(*args))
        return opened

    def shard_keys(self, shard: int) -> list[str]:
        """Keys of a shard's samples."""
        numbers = self.plan.ranges[shard]
        return self.keys[numbers.start : numbers.stop]

    def pixel_index(self, view: int, shard: int) -> TarIndex:
        """The index of a pixel tar, once its keys are known to be this cache's."""
        path = tar_path(self.path, view, shard)
        index = self._opened.get((PIXELS, view, shard))
        if index is None:
            try:
                index = read_index(path)
            except ValueError as error:
                raise Damaged(path, None, str(error)) from None
            if index.of != pixels_of(self.plan, view, shard):
                raise Damaged(path, None, f"its index belongs to {index.of}")
            if index.keys != self.shard_keys(shard):
                raise Damaged(path, None, "the keys of its index are not those of samples.parquet")
            index = dataclasses.replace(index, keys=self.shard_keys(shard))  # one copy of every key in memory
            self._opened[PIXELS, view, shard] = index
        assert isinstance(index, TarIndex)
        return index

    def pool(self) -> concurrent.futures.ThreadPoolExecutor:
        """This process's reading threads (threads do not survive a fork)."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), concurrent.futures.ThreadPoolExecutor(self.threads, "cache"))
        return self._pool[1]


def shard_parts(shards: Numbers, views: Numbers, at_once: int) -> Iterator[tuple[Numbers, int, int]]:
    """(positions, view, shard) for each part of a batch that lies in one shard, positions ascending."""
    order = np.lexsort((shards, views))
    cuts = np.flatnonzero((np.diff(shards[order]) != 0) | (np.diff(views[order]) != 0)) + 1
    for part in np.split(order, cuts) if len(order) else []:
        for start in range(0, len(part), at_once):
            yield part[start : start + at_once], int(views[part[0]]), int(shards[part[0]])
