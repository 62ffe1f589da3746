"""The work of an extraction: all teachers on the same decoded views, quantised, written and committed shard by shard.

What is left to do is always the plan minus the valid commits, so stopping anywhere and starting again is the same run.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrmae.common.progress import Progress
from mrmae.common.versions import versions
from mrmae.extract.estimate import time_left
from mrmae.extract.made_maps import compared_tokens
from mrmae.extract.maps import GivenMap
from mrmae.extract.options import Options
from mrmae.extract.prepare import (
    Images,
    KeptBatches,
    PlannedBatch,
    Prepared,
    PreparedBatch,
    StoredRows,
    Turn,
    prepared_batches,
    stored_rows,
)
from mrmae.extract.teachers import Features, Teacher
from mrmae.extract.workers import ClaimedShards, Units, wait_for_writers
from mrmae.shards import commit as commits
from mrmae.shards.format import (
    PIXELS,
    SAMPLES_AT_ONCE,
    Measured,
    Numbers,
    Plan,
    SourceTable,
    TeacherSpec,
    apply_tail,
    dequantise,
    measure,
    quantise,
    read_codebook,
    read_tail,
    signed_hashes,
    summarise,
)
from mrmae.shards.store import PixelRow, Shards, digest_of_hashes

WRITERS = 4  # threads that write a shard, each a column or the pixels of a view: benchmarks/bench_write.py
TIMED_BATCHES = 10  # after the first one, which warms up


class HopelessQuality(ValueError):
    """A shard whose quantised features are too far from the teacher's; it is not committed."""


@dataclasses.dataclass(frozen=True)
class ExtractJob:
    """An extraction under way: the plan on disk, the images, and a teacher or a given map for every column that something is missing of.

    texts: by column of a computed map, its prompts' vectors, where they are not in the cache yet.
    """

    path: Path
    plan: Plan
    images: Images
    teachers: Mapping[str, Teacher]
    options: Options
    maps: Mapping[str, GivenMap] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def shards(self) -> Shards:
        """What is committed, to be read."""
        keys = SourceTable.of(self.images.rows).columns["key"]
        return Shards(self.path, self.plan, keys, signed_hashes(keys), self.options.workers)

    @property
    def in_turns(self) -> bool:
        """Whether decoding and teachers would compete for the same cores."""
        return self.options.device == "cpu"


# --- which shards, and their batches


def extract_missing(job: ExtractJob, kept: KeptBatches, shards: Collection[int] | None = None) -> ExtractJob:
    """Compute, write and commit every shard of this process's part that is not committed yet; the job with the batch that sufficed.

    kept: what calibration has seen; emptied. shards: only these, and no line of progress. Shards that another process has claimed come last: it may have done them by
    then. Where a batch is too much for the device's memory, what is left goes on with half of it, said aloud.
    """
    todo = unfinished(job, shards)
    others: dict[int, Units] = {}
    while todo:
        try:
            others |= extract_claimed(job, todo, kept, quiet=shards is not None)
        except torch.OutOfMemoryError:
            if job.options.batch_size == 1:
                raise
            job, kept = halved(job), {}
            todo = unfinished(job, todo)
            continue
        todo = wait_for_writers(job.path, job.plan, others)
        others = {shard: units for shard, units in others.items() if shard not in todo}
    return job


def halved(job: ExtractJob) -> ExtractJob:
    """The same with half the batch, which is said on stderr."""
    size = job.options.batch_size // 2
    text = f"{job.path}: --batch-size {job.options.batch_size} is too much for the memory of {job.options.device}; going on with {size}"
    print(text, file=sys.stderr, flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return dataclasses.replace(job, options=dataclasses.replace(job.options, batch_size=size))


def unfinished(job: ExtractJob, shards: Collection[int] | None = None) -> dict[int, Units]:
    """(view, column) of everything that this process's part has to do (in these shards), by shard, in the order in which it takes them."""
    todo: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for view, column, shard in commits.missing(job.path, job.plan, shards):
        refuse_requantised(job, column)
        refuse_other_map(job, column, shard)
        refuse_other_source(job, column)
        todo[shard].append((view, column))
    return {shard: todo[shard] for shard in job.options.part.in_order(todo)}


def refuse_requantised(job: ExtractJob, column: str) -> None:
    """ValueError for a column that was made from another one: what its teacher says is not what it holds."""
    quantiser = job.plan.quantisers.get(column)
    if quantiser is not None and quantiser.source is not None:
        raise ValueError(f"{job.path}: {column} was made by inspect-cache convert from column {quantiser.source[:19]} and "
                         "has shards missing; only that can write them: repeat the command that made this cache")  # fmt: skip


def refuse_other_map(job: ExtractJob, column: str, shard: int) -> None:
    """ValueError for a shard of a map whose values were given by another file."""
    if (given := job.maps.get(column)) is None:
        return
    first = job.plan.ranges[shard].start
    part = next(part for part in job.plan.parts if first in part.numbers)
    told = job.plan.spec_in(part, job.plan.teacher(column)).weights_sha256
    if told != given.sha256:
        raise ValueError(f"{given.where}: its values are {given.sha256[:15]}...; shard {shard} of {column} is missing in {job.path} and its "
                         f"values were {told[:15]}...; give the file of then with --map")  # fmt: skip


def refuse_other_source(job: ExtractJob, column: str) -> None:
    """ValueError for a computed map whose teacher's column is another one by now: what is missing would not go with what is there."""
    quantiser = job.plan.quantisers.get(column)
    if quantiser is not None and quantiser.codebook is not None and job.plan.teacher(column).made:
        source, of = source_column(job.plan.teacher(column)), quantiser.codebook["of"]
        if job.plan.ids.get(source) != of:
            raise ValueError(f"{job.path}: {column} was computed from column {of[:19]}, and {source} is {str(job.plan.ids.get(source))[:19]}; "
                             f"shards of it are missing, which only the former can write; drop {column} with inspect-cache drop, and ask "
                             "for it again")  # fmt: skip


def source_column(spec: TeacherSpec) -> str:
    """The stored column that a computed map's tokens follow from, where they are not stored themselves: see `source_tokens`."""
    return str(spec.model_options["source"])


def extract_claimed(
    job: ExtractJob, todo: Mapping[int, Units], kept: KeptBatches, *, quiet: bool = False
) -> dict[int, Units]:
    """The shards among `todo` that another process had claimed; all others are committed. One is written while the next is computed."""
    what = "extracting" + (f" part {job.options.part}" if job.options.part.of > 1 else "")
    total = sum(view_count(job, shard, units) for shard, units in todo.items())
    mine = ClaimedShards(job.path, job.plan, todo)
    with (
        contextlib.closing(mine),
        Progress(what, total, "views" if job.plan.n_views > 1 else "images", quiet=quiet) as progress,
        ThreadPoolExecutor(1, "write") as writer,
        contextlib.closing(batches_decoded_ahead(job, claimed_batches(job, mine, progress), kept)) as stream,
    ):  # fmt: skip
        writing: Future[None] | None = None
        turns = itertools.groupby(
            timed(job, stream, progress), key=lambda batch: (batch.planned.shard, batch.planned.turn)
        )
        for (shard, now), batches in turns:
            write = extract_shard(job, shard, now.units, batches, progress)
            if writing is not None:
                writing.result()
            writing = writer.submit(mine.released_after, shard, write) if now.last else writer.submit(write)
        if writing is not None:
            writing.result()
    return mine.others


def claimed_batches(job: ExtractJob, mine: ClaimedShards, progress: Progress) -> Iterator[PlannedBatch]:
    """The batches of the shards as this process claims them; what others have done or do counts as done already."""
    for shard, units in mine:
        yield from planned_batches(job, {shard: units})
        progress.add(0, already=view_count(job, shard, mine.todo[shard]) - view_count(job, shard, units))


def planned_batches(job: ExtractJob, todo: Mapping[int, Units]) -> Iterator[PlannedBatch]:
    """The batches of the shards to do, turn by turn, cut at fixed offsets inside each shard."""
    for shard, units in todo.items():
        numbers = job.plan.ranges[shard]
        for now in turns_of(units):
            for at in range(0, len(numbers), job.options.batch_size):
                yield PlannedBatch(shard, numbers[at : at + job.options.batch_size], now)


def turns_of(units: Units) -> list[Turn]:
    """A shard's turns: the pixels of all views, so that images are decoded once, with the columns of one view; then the columns of each other view.

    So no more than two views' columns are in memory: one is computed, one is written.
    """
    pixels = tuple(unit for unit in units if unit[1] == PIXELS)
    columns: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for unit in sorted(set(units) - set(pixels)):
        columns[unit[0]].append(unit)
    first, others = tuple(sorted(columns)[:1]), sorted(columns)[1:]
    stored, alone = {view for view, _ in pixels}, {view for view, _ in pixels} - set(columns)
    begun = (*pixels, *(unit for view in first for unit in columns[view]))
    turns = [Turn(begun, tuple(sorted({*first, *stored})), first, tuple(sorted({*first, *alone})), not others)]
    turns += [Turn(tuple(columns[view]), (view,), (view,), (view,), view == others[-1]) for view in others]
    return turns if units else []


def view_count(job: ExtractJob, shard: int, units: Units) -> int:
    """How many views of a shard's images something is to be done for."""
    return len(job.plan.ranges[shard]) * len({view for view, _ in units})


def batches_decoded_ahead(
    job: ExtractJob, batches: Iterable[PlannedBatch], kept: KeptBatches
) -> Generator[PreparedBatch, None, None]:
    """The batches with their samples prepared, a few ahead of use."""
    return prepared_batches(job.images, job.plan.recipe, batches, known_pixels(job), workers=job.options.workers,
                            in_turns=job.in_turns, kept=kept)  # fmt: skip


def timed(job: ExtractJob, stream: Iterable[PreparedBatch], progress: Progress) -> Iterator[PreparedBatch]:
    """The same batches; once ten are done after a first one, the first rank says how long all that are left take. Calibration's do not count."""
    done = views = 0
    began = time.monotonic()
    for batch in stream:
        yield batch
        if batch.features or done > TIMED_BATCHES:
            continue
        done, views = done + 1, views + len(batch.samples) * len(batch.planned.turn.ends)
        if done == 1:
            began, views = time.monotonic(), 0
        elif done == 1 + TIMED_BATCHES and job.options.part.leads:
            progress.say(
                time_left(job.options.part, views=views, seconds=time.monotonic() - began, left=progress.left())
            )


def known_pixels(job: ExtractJob) -> Callable[[int], StoredRows]:
    """Gives the views of a shard whose pixels are committed: teachers added later see the same bytes."""

    def rows(shard: int) -> StoredRows:
        views = range(job.plan.n_views)
        there = [v for v in views if commits.valid_record(job.path, job.plan, v, PIXELS, shard) is not None]
        return {view: stored_rows(job.path, job.plan, view, shard) for view in there}

    return rows


# --- one shard


@dataclasses.dataclass
class Gathered:
    """What a shard of one (view, column) gathers batch by batch: rows for the pixels, arrays for a teacher, of images of these hashes."""

    rows: list[PixelRow] = dataclasses.field(default_factory=list)
    arrays: dict[str, list[Tensor]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    measured: list[Measured] = dataclasses.field(default_factory=list)
    valid: list[bool] = dataclasses.field(default_factory=list)
    hashes: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))


def extract_shard(
    job: ExtractJob, shard: int, units: Units, batches: Iterable[PreparedBatch], progress: Progress
) -> Callable[[], None]:
    """Compute `units` of a shard; what comes back writes and commits them, while the next may be computed.

    The unit of work: whoever shares an extraction among processes or machines calls this, and the bytes are the same.
    """
    gathered = {unit: Gathered() for unit in units}
    for batch in batches:
        for (view, column), into in gathered.items():
            into.hashes += [sample.rows[view].sha256 for sample in batch.samples]
            if column == PIXELS:
                add_pixels(view, batch, into)
            elif column in job.maps:
                add_map(job, view, column, batch, into)
            elif job.plan.teacher(column).made:  # computed from what is stored, once that is
                into.valid += [sample.rows[view].stored is not None for sample in batch.samples]
            else:
                add_features(job, view, column, batch, into)
        known, n = bool(batch.features) and 0 in batch.planned.turn.shown, len(batch.samples)
        progress.add(n * (len(batch.planned.turn.ends) - known), already=n * known)
    arrived(job.options.device)
    return lambda: commit_shard(job, shard, gathered, progress)


def arrived(device: str) -> None:
    """Wait until all that a GPU was asked to copy to the host is there."""
    if device.startswith("cuda"):
        torch.cuda.current_stream(device).synchronize()


def add_pixels(view: int, batch: PreparedBatch, into: Gathered) -> None:
    """Add one batch to a view's pixels, with the seconds of the pool's threads and those of waiting for them."""
    into.rows += [sample.rows[view] for sample in batch.samples]
    into.seconds["decode"] += sum(sample.seconds for sample in batch.samples) / len(batch.planned.turn.views)
    into.seconds["decode_wait"] += batch.waited


def add_features(job: ExtractJob, view: int, column: str, batch: PreparedBatch, into: Gathered) -> None:
    """Add one batch to a teacher's column: forward (unless calibration did it), quantise, measure."""
    began = time.monotonic()
    valid = [sample.rows[view].stored is not None for sample in batch.samples]
    into.valid += valid
    if not any(valid):
        return
    known = batch.features.get(column) if view == 0 else None
    features = known or job.teachers[column].forward(view_pixels(batch.samples, view))
    forward_at = time.monotonic()
    where = f"{job.path}: {column}, view {view}, samples {batch.samples[0].number} to {batch.samples[-1].number}"
    add_codes(job, column, features, where, into)
    into.seconds["forward"] += forward_at - began
    into.seconds["quantise"] += time.monotonic() - forward_at


def add_map(job: ExtractJob, view: int, column: str, batch: PreparedBatch, into: Gathered) -> None:
    """Add what a map says of one batch: of every readable image the patches of its view."""
    for sample in batch.samples:
        crop = sample.rows[view].view
        into.valid.append(crop is not None)
        if crop is not None:
            seen = job.maps[column].seen(sample.rows[view].key, view, crop, job.plan.grid)
            into.arrays["map"].append(torch.from_numpy(seen[None]))


def view_pixels(samples: Sequence[Prepared], view: int) -> Tensor:
    """[n, h, w, bands] of the readable samples, at least one."""
    return torch.from_numpy(np.stack([sample.pixels[view] for sample in samples if view in sample.pixels]))


def add_codes(job: ExtractJob, column: str, features: Features, where: str, into: Gathered) -> None:
    """Add features as they are stored, and how far that is from what they were."""
    quantiser = job.plan.quantisers[column]
    try:
        codes, scale = quantise(features.tokens, quantiser)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    into.measured.append(measure(features.tokens, codes, scale, quantiser))
    stored = {"tokens": codes, "scale": scale, "cls": features.cls, "attention": features.attention,
              "norm": features.norm}  # fmt: skip
    for name, tensor in stored.items():
        if tensor is not None:  # copied while the next batch is prepared and launched; arrived() waits for it
            into.arrays[name].append((tensor if name == "tokens" else tensor.half()).to("cpu", non_blocking=True))


def commit_shard(job: ExtractJob, shard: int, gathered: Mapping[tuple[int, str], Gathered], progress: Progress) -> None:
    """Write and commit one shard: pixels first, so that a column never stands without its views, and last what is computed from columns.

    Several units at a time: each is hashed by a thread of its own. Raises HopelessQuality for a column that is too coarse, once all others
    are committed.
    """
    hopeless: list[HopelessQuality] = []
    with ThreadPoolExecutor(min(WRITERS, job.options.workers), "unit") as pool:
        for now in range(3):
            units = sorted(unit for unit in gathered if write_order(job.plan, unit[1]) == now)
            written = [pool.submit(commit_unit, job, shard, *unit, gathered[unit], progress) for unit in units]
            wait(written)
            for one in written:
                try:
                    one.result()
                except HopelessQuality as error:
                    hopeless.append(error)
    if hopeless:
        raise hopeless[0]


def commit_unit(job: ExtractJob, shard: int, view: int, column: str, found: Gathered, progress: Progress) -> None:
    """Write and commit a shard of one column or of the pixels. HopelessQuality, and nothing is written, where it is too coarse."""
    about: dict[str, Any] = {"seconds": dict(found.seconds), **circumstances(job)}
    if column == PIXELS:
        commits.store_pixels(job.path, job.plan, view, shard, found.rows, about)
        if view == 0:
            job.images.remember(found.rows)
        progress.add(0, bytes=sum(len(row.stored or b"") for row in found.rows))
        return
    if job.plan.teacher(column).made:
        if commits.valid_record(job.path, job.plan, view, source_column(job.plan.teacher(column)), shard) is None:
            return  # too coarse: the command ends with that
        began = time.monotonic()
        found.arrays["map"] = made_map(job, view, column, shard, found.valid)
        about["seconds"] = {"forward": time.monotonic() - began}
    arrays = whole_shard(found, job.plan.layout(column).arrays())
    if found.measured:
        about["quality"] = summarise(found.measured)
        if too_coarse(about["quality"]["snr_db"], job.options):
            raise HopelessQuality(hopeless_text(job, view, column, shard, about["quality"]["snr_db"]))
    made_of = digest_of_hashes(found.hashes)
    commits.store_column(job.path, job.plan, view, column, shard, arrays, found.valid, made_of, about)
    progress.add(0, bytes=sum(array.nbytes for array in arrays.values()))


def write_order(plan: Plan, column: str) -> int:
    """When a column of a shard is written: the views first, what is computed from other columns last."""
    return 0 if column == PIXELS else 2 if plan.teacher(column).made else 1


def made_map(job: ExtractJob, view: int, column: str, shard: int, valid: Sequence[bool]) -> list[Tensor]:
    """A computed map of a shard's readable samples, [n, l] each, from its teacher's column, which is committed."""
    spec, quantiser = job.plan.teacher(column), job.plan.quantisers[column]
    assert quantiser.codebook is not None, "frozen with its codebook"
    vectors = torch.from_numpy(read_codebook(job.path, spec.name, quantiser.codebook["sha256"])).to(job.options.device)
    numbers = np.arange(job.plan.ranges[shard].start, job.plan.ranges[shard].stop)[np.array(valid, bool)]
    return [compared_tokens(source_tokens(job, spec, part, view), vectors, spec.made).cpu()
            for at in range(0, len(numbers), SAMPLES_AT_ONCE) if len(part := numbers[at : at + SAMPLES_AT_ONCE])]  # fmt: skip


def source_tokens(job: ExtractJob, spec: TeacherSpec, numbers: Numbers, view: int) -> Tensor:
    """The tokens that a computed map compares, float32 [b, l, d] on the job's device, as readers of the cache get them."""
    column = source_column(spec)
    stored = {name: array for name, array in job.plan.layout(column).arrays().items() if name in ("tokens", "scale")}
    arrays = {name: np.empty((len(numbers), *shape), dtype) for name, (shape, dtype) in stored.items()}
    job.shards.read(column, numbers, np.full(len(numbers), view), arrays)
    codes, scale = (
        torch.from_numpy(arrays[name]).to(job.options.device) if name in arrays else None
        for name in ("tokens", "scale")
    )
    assert codes is not None
    return behind_tail(job, spec, dequantise(codes, scale, job.plan.quantisers[column]))


def behind_tail(job: ExtractJob, spec: TeacherSpec, tokens: Tensor) -> Tensor:
    """Stored tokens at the tap that a computed map compares."""
    of = str(spec.model_options["of"])
    if of == source_column(spec):
        return tokens
    teacher, _, tap = of.partition(".")
    return apply_tail(tokens, read_tail(job.path, teacher), tap)


def whole_shard(found: Gathered, stored: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray[Any, Any]]:
    """Every array with one row per sample of the shard; rows of bad images are zeros that are not written."""
    valid = np.array(found.valid, bool)
    arrays = {}
    for name, (shape, dtype) in stored.items():
        rows = torch.cat(found.arrays.pop(name)).numpy() if found.arrays[name] else np.zeros((0, *shape), dtype)
        arrays[name] = rows if valid.all() else np.zeros((len(valid), *shape), dtype)
        if not valid.all():
            arrays[name][valid] = rows
    return arrays


def too_coarse(snr_db: float, options: Options) -> bool:
    """Whether codes lose more of a shard than --min-snr allows; -300 dB says that there was no signal to lose."""
    return options.dtype != "float16" and -300 < snr_db < options.least_snr


def hopeless_text(job: ExtractJob, view: int, column: str, shard: int, snr_db: float) -> str:
    """Which shard is too coarse, and what can be done."""
    return (f"{job.path}: {column}, view {view}, shard {shard}: {job.options.dtype} keeps an SNR of {snr_db:.1f} dB; at least "
            f"{job.options.least_snr:g} were expected (--min-snr); use --dtype float16 with a new folder, leave this teacher out, "
            "or take it as it is with a lower --min-snr (what is committed stays, the same command goes on from there)")  # fmt: skip


def circumstances(job: ExtractJob) -> dict[str, Any]:
    """What is recorded beside a shard and hashed nowhere: versions, device, time, command and where it was given."""
    return {"versions": versions(), "device": job.options.device, "written": int(time.time()),
            "command": job.options.command(), "folder": os.getcwd()}  # fmt: skip
