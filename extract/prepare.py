"""From encoded images to the views that students and teachers see, decoded ahead of use in a pool of threads."""

import dataclasses
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from mrmae.extract.images import OF_NOTHING, Sources, Unreadable, decoded_as, read_image, remember_hashes
from mrmae.extract.teachers import Features
from mrmae.shards.format import (
    BadImage,
    Encoding,
    Numbers,
    Pixels,
    Plan,
    Source,
    ViewRecipe,
    decode_view,
    draw_view,
    encode_view,
    key_hash,
    render,
    tar_path,
)
from mrmae.shards.plans import differ
from mrmae.shards.store import PixelRow, parse_row, read_hashes, read_index, read_members

BATCHES_DECODED_AHEAD = 3  # batches decoded or being decoded while one is with the teachers
SAMPLES_DECODED_AT_ONCE = 64  # samples decoded together where that and the teachers take turns


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a plan by sample number: `rows` as planned, `order[number]` their position in `sources`, -1 for not given.

    memory: a file that keeps the hash of what was read.
    """

    sources: Sources
    rows: Sequence[Source]
    order: Sequence[int] | Numbers
    max_pixels: int
    memory: Path

    def read(self, number: int, told: str) -> tuple[bytes, str]:
        """The encoded bytes of an image and their sha256. BadImage where there was nothing to read when it was listed, either.

        told: the sha256 of then, "" where nothing was made of the image yet. ValueError where its bytes are others now; OSError where it
        can no longer be read.
        """
        row, position = self.rows[number], int(self.order[number])
        if position < 0:
            raise ValueError(f"{row.key}: this image is not among IMAGES and something of it is missing in the cache; expected "
                             "all images that are not committed yet; give their folder too")  # fmt: skip
        try:
            data = read_image(self.sources, position)
        except Unreadable as error:
            if row.bytes == 0:
                raise BadImage(f"cannot be read: {error.strerror or error}") from None
            raise
        now = dataclasses.replace(row, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        if other := differ(row, now) or differ(dataclasses.replace(row, sha256=told), now):
            raise ValueError(f"{self.sources.where(position)}: its bytes changed since the cache was begun: {other}; expected the same "
                             "image; restore it, or write to a new cache")  # fmt: skip
        return data, now.sha256

    def decoded(self, number: int, data: bytes, encoding: Encoding) -> AbstractContextManager[Pixels]:
        """The image that these bytes are, [height, width, bands] as `encoding` keeps it, as long as it is needed. BadImage where it is none."""
        where = self.sources.where(int(self.order[number]))
        return decoded_as(data, encoding, max_pixels=self.max_pixels, where=where)

    def remember(self, rows: Sequence[PixelRow]) -> None:
        """Keep the hashes of images of which views were made just now, so that --append need not read these again."""
        at = [int(self.order[row.number]) for row in rows]
        remember_hashes(self.sources, [(i, row.sha256) for i, row in zip(at, rows) if i >= 0], self.memory)


@dataclasses.dataclass(frozen=True)
class StoredViews:
    """One sample's views as they are stored; a bad image's have a reason and no bytes. seconds: that a thread spent on them."""

    rows: Mapping[int, PixelRow]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One sample's views as stored (`rows`), and those that teachers see as pixels; a bad image has no pixels.

    seconds: that threads spent on it.
    """

    number: int
    rows: Mapping[int, PixelRow]
    pixels: Mapping[int, Pixels]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Turn:
    """What of a shard is computed and written together: `units`, (view, column) each.

    views: that their images are wanted of, as stored; shown: those of them that teachers see; ends: those that nothing is left to be done for
    afterwards. last: whether that is so for all.
    """

    units: tuple[tuple[int, str], ...]
    views: tuple[int, ...]
    shown: tuple[int, ...]
    ends: tuple[int, ...]
    last: bool


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """A fixed part of a shard, for one of its turns."""

    shard: int
    numbers: range
    turn: Turn

    @property
    def place(self) -> tuple[int, int]:
        """(shard, first number)."""
        return self.shard, self.numbers.start


@dataclasses.dataclass(frozen=True)
class PreparedBatch:
    """A batch with its samples. waited: seconds until they were prepared. features: of view 0 by column, where calibration has seen it."""

    planned: PlannedBatch
    samples: Sequence[Prepared]
    waited: float
    features: Mapping[str, Features] = dataclasses.field(default_factory=dict)


StoredRows = dict[int, dict[int, PixelRow]]  # by view, then number
KeptBatches = dict[tuple[int, int], PreparedBatch]  # by place: what calibration has prepared
BegunBatch = tuple[PlannedBatch, PreparedBatch | Sequence[Future[Prepared]]]


def store_views(
    images: Images, recipe: ViewRecipe, number: int, views: Sequence[int], stored: StoredRows
) -> StoredViews:
    """The sample's views as they are stored: those in `stored` as they are, the others drawn, rendered and encoded."""
    began = time.perf_counter()
    rows = {view: stored[view][number] for view in views if view in stored}
    if len(rows) < len(views):
        source, sha256 = images.rows[number], OF_NOTHING
        told = next((by_number[number].sha256 for by_number in stored.values()), "")
        try:
            data, sha256 = images.read(number, told)
            with images.decoded(number, data, recipe.stored) as image:
                for view in set(views) - set(rows):
                    crop = draw_view(key_hash(source.key), view, image.shape[0], image.shape[1], recipe)
                    stored_view = encode_view(render(image, crop, recipe), recipe.stored)
                    rows[view] = PixelRow(number, source.key, source.label, crop, stored_view, sha256=sha256)
        except BadImage as error:
            for view in set(views) - set(rows):
                rows[view] = PixelRow(number, source.key, source.label, None, None, error.reason, sha256)
    return StoredViews(rows, time.perf_counter() - began)


def show_views(number: int, views: "Future[StoredViews]", shown: Sequence[int], recipe: ViewRecipe) -> Prepared:
    """The sample with the pixels of some views: always those of the stored view, decoded, so that teachers see what the student will see."""
    found = views.result()
    began = time.perf_counter()
    pixels = {
        view: decode_view(row.stored, recipe.stored, recipe.size)
        for view, row in found.rows.items()
        if view in shown and row.stored is not None
    }
    return Prepared(number, found.rows, pixels, found.seconds + time.perf_counter() - began)


def prepared_batches(
    images: Images, recipe: ViewRecipe, batches: Iterable[PlannedBatch], stored: Callable[[int], StoredRows], *, workers: int,
    in_turns: bool, kept: KeptBatches,
) -> Generator[PreparedBatch, None, None]:  # fmt: skip
    """Every batch with its prepared samples, in order, a few batches ahead of use.

    stored: gives the views of a shard whose pixels are committed already; called once per run of its batches.
    in_turns: decode some batches, and nothing while they are in use: on a CPU both would take each other's cores and caches.
    kept: batches that are prepared already; emptied as they are used.
    """
    pool = ThreadPoolExecutor(workers, "decode")
    begun = begun_batches(pool, images, recipe, batches, stored, kept)
    try:
        if in_turns:
            for first in begun:
                several = max(1, SAMPLES_DECODED_AT_ONCE // max(len(first[0].numbers), 1))
                yield from [finished(*one) for one in [first, *itertools.islice(begun, several - 1)]]
            return
        ahead: deque[BegunBatch] = deque()
        for one in begun:
            ahead.append(one)
            if len(ahead) > BATCHES_DECODED_AHEAD:
                yield finished(*ahead.popleft())
        while ahead:
            yield finished(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def begun_batches(
    pool: ThreadPoolExecutor, images: Images, recipe: ViewRecipe, batches: Iterable[PlannedBatch],
    stored: Callable[[int], StoredRows], kept: KeptBatches,
) -> Iterator[BegunBatch]:  # fmt: skip
    """Every batch, handed to the pool as it is asked for. An image is decoded once for all turns of its shard: views stay as they are stored."""
    shard, known, made = -1, StoredRows(), dict[int, Future[StoredViews]]()
    for batch in batches:
        if batch.shard != shard:
            shard, known, made = batch.shard, stored(batch.shard), {}
        there = kept.pop(batch.place, None)
        if there is not None and {*batch.turn.shown} <= {*there.planned.turn.shown}:
            made |= {sample.number: settled(StoredViews(sample.rows, 0.0)) for sample in there.samples}
            yield batch, there
            continue
        ready = {} if {*batch.turn.views} <= known.keys() else made
        for number in batch.numbers:
            if number not in ready:
                ready[number] = pool.submit(store_views, images, recipe, number, batch.turn.views, known)
        # after those of the whole batch, so that no thread waits for another one's
        yield (
            batch,
            [pool.submit(show_views, number, ready[number], batch.turn.shown, recipe) for number in batch.numbers],
        )


def settled(views: StoredViews) -> "Future[StoredViews]":
    """A future that has ended."""
    future = Future[StoredViews]()
    future.set_result(views)
    return future


def finished(batch: PlannedBatch, samples: PreparedBatch | Sequence[Future[Prepared]]) -> PreparedBatch:
    """The batch once its samples are prepared."""
    if isinstance(samples, PreparedBatch):
        return dataclasses.replace(samples, planned=batch)
    began = time.monotonic()
    found = [sample.result() for sample in samples]
    return PreparedBatch(batch, found, time.monotonic() - began)


def stored_rows(path: Path, plan: Plan, view: int, shard: int) -> dict[int, PixelRow]:
    """The rows of a committed pixel tar, with their pixels, by sample number, every byte verified."""
    tar = tar_path(path, view, shard)
    extension, numbers = plan.recipe.stored.extension, plan.ranges[shard]
    index = read_index(tar, (extension, "json"))
    abouts = read_members(tar, range(len(numbers)), index.tables["json"])
    hashes = read_hashes(tar)
    rows = {number: dataclasses.replace(parse_row(about), sha256=sha256.tobytes().hex())
            for number, about, sha256 in zip(numbers, abouts, hashes)}  # fmt: skip
    good = [i for i, number in enumerate(numbers) if rows[number].view is not None]
    for i, content in zip(good, read_members(tar, good, index.tables[extension])):
        rows[numbers[i]] = dataclasses.replace(rows[numbers[i]], stored=content)
    return rows
