"""A cache, opened: checked once, then read by number or key, alone or in batches.

    cache = open_cache("photos.cache")
    cache["cats/a.jpg"].views[0]["clip"]["tokens"]        # float32 [patches, channels]

Reads are thread-safe, every chunk is verified by its crc32c, and an opened cache may be pickled (spawned workers).
"""

import bisect
import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mrmae.common.backend import Url, exists, locate, read_bytes, refresh
from mrmae.common.suggest import nearest
from mrmae.shards.check import refuse_other_plan, refuse_problems, refuse_unfinished
from mrmae.shards.commit import bad_in, committed, known_hashes, valid_records
from mrmae.shards.format import (
    IN_BLOCKS,
    NO_IMAGE,
    PIXELS,
    BlockRule,
    Layout,
    Numbers,
    Plan,
    Quantiser,
    SampleTable,
    SourceTable,
    TeacherSpec,
    Unit,
    Values,
    View,
    apply_tail,
    content_id,
    dataset_ids,
    dequantise,
    derived_specs,
    load_plan,
    parse_tail,
    sample_values,
    tail_path,
    units,
)
from mrmae.shards.manifest import Manifest, read_manifest
from mrmae.shards.near import NearFolder, NearShards, near_folder, near_samples
from mrmae.shards.store import Shards, refuse_foreign_entries

Indices = Sequence[int] | Numbers | Tensor
Flags = np.ndarray[Any, np.dtype[np.bool_]]

REMOTE_THREADS = 16
NEAR_KEYS = 500  # keys compared with one that is not there


@dataclasses.dataclass(frozen=True)
class Column:
    """One teacher's column: what made it, how it is stored, the id of its numbers, its arrays."""

    spec: TeacherSpec
    quantiser: Quantiser
    id: str
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Derived:
    """A column that is not stored but follows from a stored one, at `pre_tail`, and its teacher's tail.

    spec: of the teacher at this tap. source: the stored column. id: of its numbers.
    """

    spec: TeacherSpec
    source: str
    id: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample. views: per view its `pixels` [h, w, bands], its `view`, and a dict of tensors per column, stored or derived.

    Columns stand under their names, `clip.post_ln`; a teacher's name alone, `clip`, is its first column.

    A bad image has valid=False, a reason, and no views.
    """

    number: int
    key: str
    label: str | None
    valid: bool
    reason: str | None
    views: list[dict[str, Any]]


class Cache:
    """A cache opened by open_cache.

    keys, labels, reasons: per sample, in canonical order; a row before an appended part has the key "". numbers: the samples that
    can be read. encoding: of the views: their bands and dtype. grid: (height, width) of a view in patches. blocks: how tokens are cut into blocks, None where they lie in raster
    order. columns: those stored of teachers, by name `<teacher>.<tap>`; maps: those of maps, `<name>.map`; teachers: (first) column
    name by teacher name; ids: dataset, geometry and column ids. local: the shards that are kept on a disk of this machine, None where none are.
    """

    def __init__(
        self, path: Path, plan: Plan, manifest: Manifest, table: SampleTable, readable: Flags, threads: int,
        near: NearFolder | None = None,
    ) -> None:  # fmt: skip
        self.path, self.plan, self.manifest, self.threads = path, plan, manifest, threads
        self.table, self.readable = table, readable
        self.keys: Sequence[str] = table["key"]
        self.reasons: Sequence[str | None] = table["reason"]
        self.size, self.grid, self.dtype, self.blocks = plan.recipe.size, plan.grid, plan.dtype, plan.token_layout
        self.n_views, self.shard_samples, self.encoding = plan.n_views, plan.shard_samples, plan.recipe.stored
        self.stored = {t.column: Column(t, plan.quantisers[t.column], plan.ids[t.column], plan.layout(t.column))
                       for t in plan.columns if t.column in plan.quantisers}  # fmt: skip
        self.columns = {name: column for name, column in self.stored.items() if not column.spec.is_map}
        self.maps = {name: column for name, column in self.stored.items() if column.spec.is_map}
        self.teachers = {column.spec.name: name for name, column in reversed(self.columns.items())}
        self.ids = {"dataset": self.dataset_id, "geometry": plan.geometry_id,
                    **{name: column.id for name, column in self.stored.items()}}  # fmt: skip
        self.local = None if near is None else NearShards(near, path, plan, manifest)
        self.shards = Shards(path, plan, self.keys, table["hash"].numpy(), threads, self.local)
        self.complete = bool(manifest)  # all that was asked for is committed
        self.whole = self.complete  # and it holds every image that the manifest tells of
        self._tails: dict[str, dict[str, Tensor]] = {}

    def narrowed(self, columns: Sequence[str] | None, views: int | None, images: int | None = None) -> "Cache":
        """The same cache as if it held only these columns and the first so many views and images; None leaves all of them.

        Maps stay. What is read of them is the same, however many more the cache has by now. Raises ValueError for what it does not hold.
        """
        every = [teacher.column for teacher in self.plan.columns]
        kept = every if columns is None else [*columns, *self.maps]
        n_views, n_images = views or self.n_views, images or self.plan.n_images
        if lacking := [name for name in columns or () if name not in self.columns]:
            raise ValueError(f"{self.path}: there is no column {lacking[0]!r}; it holds {', '.join(self.columns) or 'none'}; "
                             "choose one (in a recipe, null takes all there are), or extract with that teacher")  # fmt: skip
        for what, n, there, more in (
            ("views of every image", n_views, self.n_views, "extract with more --views"),
            ("images", n_images, self.plan.n_images, "append more"),
        ):
            if n > there:
                raise ValueError(f"{self.path}: {n} {what} are wanted and {there} are stored; at most that was expected; {more}, or "
                                 "choose fewer (in a recipe, null takes all there are)")  # fmt: skip
        parts, rows = self.plan.holding(n_images)
        plan = self.plan.without([name for name in every if name not in kept])
        plan = dataclasses.replace(plan, appended=plan.appended[: parts - 1], n_views=n_views)
        table = {name: values.head(plan.n_rows) for name, values in self.table.items()}
        readable = self.readable[: plan.n_rows].copy()
        readable[rows:] = False
        near = None if self.local is None else self.local.near
        cache = Cache(self.path, plan, self.manifest, table, readable, self.threads, near)
        cache.complete, cache.whole = self.complete, self.whole and len(cache) == len(self)
        return cache

    @functools.cached_property
    def numbers(self) -> Numbers:
        """The samples that can be read, ascending."""
        return np.flatnonzero(self.readable)

    @property
    def dataset_id(self) -> str:
        """Id of the images, keys and bytes; where some were not read yet, of their listing."""
        if self.manifest:
            return str(self.manifest["dataset_ids"][len(self.plan.parts) - 1])
        rows = SourceTable(self.table)
        known = all(rows[p.start : p.stop].columns["sha256"].array.null_count == 0 for p in self.plan.numbers)
        return dataset_ids(self.plan, rows)[-1] if known else self.plan.parts[-1].listing_id

    @property
    def unfinished(self) -> str | None:
        """How much of an unfinished cache is read, with an id of which samples and their bytes; None for a finished one."""
        if self.complete:
            return None
        hashes = hashlib.sha256(self.table["sha256"].numpy()[self.numbers].tobytes()).hexdigest()
        return (
            f"{len(self.numbers)} of {self.plan.n_images} images ({content_id([self.numbers.tolist(), hashes])[7:23]})"
        )

    def __getstate__(self) -> dict[str, Any]:
        lazy = ("hashes", "labels", "number_of", "derived", "numbers")
        return {**{name: value for name, value in self.__dict__.items() if name not in lazy}, "_tails": {}}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, which: int | str) -> Sample:
        """The sample of this number or key, tokens dequantised. Raises IndexError or KeyError."""
        number = self.number(which)
        readable = bool(self.readable[number])
        views = [self.read_view(number, view) for view in range(self.n_views)] if readable else []
        return Sample(number, self.keys[number], self.labels[number], readable, self.reasons[number], views)

    @functools.cached_property
    def labels(self) -> Values:
        """Of every sample, None for none. ValueError where they are not those that the manifest was written for."""
        labels, told = self.table["label"], self.manifest.get("samples", {}).get("label")
        if told and self.whole and labels.digest != told:
            raise ValueError(
                f"{self.path / 'samples.arrow'}: its labels are not those that the manifest was written for; restore it from a copy"
            )
        return labels

    @functools.cached_property
    def hashes(self) -> Int64[Tensor, "n"]:
        """Hash of every sample's key, as signed 64-bit integers."""
        with warnings.catch_warnings():  # of memory that may not be written; it may, and nobody else sees it
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self.shards.hashes)

    @functools.cached_property
    def number_of(self) -> dict[str, int]:
        """Sample number by key."""
        return {key: number for number, key in enumerate(self.keys) if key}

    def number(self, which: int | str) -> int:
        """The sample number of a key or (negative from the end) a position. Raises KeyError or IndexError, saying what there is."""
        if isinstance(which, str):
            if which not in self.number_of:
                raise KeyError(
                    f"{self.path}: no image has the key {which!r}; near it in the alphabet is {self.near(which)!r}"
                )
            return self.number_of[which]
        if not -len(self) <= which < len(self):
            raise IndexError(f"{self.path}: sample {which} is not there; the cache has {len(self)}")
        return which % len(self)

    def near(self, key: str) -> str:
        """The key most like this one among its neighbours in the alphabet: comparing a million keys takes minutes."""
        keys = sorted(self.number_of)
        at = bisect.bisect(keys, key)
        return nearest(key, keys[max(0, at - NEAR_KEYS) : at + NEAR_KEYS], 1, cutoff=0.0)[0]

    def read_view(self, number: int, view: int) -> dict[str, Any]:
        """One view of one sample: pixels, crop, and the tensors of every column by its name, as float32.

        A teacher's own name stands for its first column.
        """
        one: dict[str, Any] = {"pixels": self.read_pixels([number], [view])[0], "view": self.read_crop(number, view)}
        for name, column in self.columns.items():
            raw = self.read_column(name, [number], [view], tuple(column.layout.arrays()))
            tokens = dequantise(raw.pop("tokens"), raw.pop("scale", None), column.quantiser)
            one[name] = {"tokens": tokens[0], **{array: values[0].float() for array, values in raw.items()}}
        for name, about in self.derived.items():
            tail, source = self.tail(about.spec.tail_name), one[about.source]
            one[name] = {
                array: apply_tail(source[array], tail, about.spec.tap) for array in ("tokens", "cls") if array in source
            }
        for name in self.maps:
            one[name] = {"map": self.read_column(name, [number], [view], ("map",))["map"][0]}
        return one | {teacher: one[name] for teacher, name in self.teachers.items()}

    def read_pixels(
        self, numbers: Indices, views: Indices, *, out: Shaped[Tensor, "b h w c"] | None = None
    ) -> Shaped[Tensor, "b h w c"]:
        """Decoded views, [b, size, size, bands] as the encoding says: uint8 and RGB, or a file's bands. views: which view of each sample.

        out: a buffer to fill.
        """
        at, of = self.checked(numbers, views)
        if out is None:
            dtype = getattr(torch, self.encoding.dtype)
            out = torch.empty(len(at), self.size, self.size, self.encoding.bands, dtype=dtype)
        self.shards.read(PIXELS, at, of, {PIXELS: out.numpy()})
        return out

    def read_crop(self, number: int, view: int) -> View:
        """The recorded crop and flip of one sample's view."""
        self.checked([number], [view])
        return self.shards.crop(number, view)

    def read_tokens(
        self, column: str, numbers: Indices, views: Indices, *, tap: str | None = None
    ) -> Float[Tensor, "b l d"]:
        """Dequantised tokens, float32 [b, l, d], of a stored or a derived column.

        tap: of the column's teacher, instead of the column's own: `post_ln`, `projected`.
        """
        name = column if tap is None else f"{column.partition('.')[0]}.{tap}"
        if name not in self.derived:
            raw = self.read_column(name, numbers, views)
            return dequantise(raw["tokens"], raw.get("scale"), self.columns[name].quantiser)
        about = self.derived[name]
        return apply_tail(
            self.read_tokens(about.source, numbers, views), self.tail(about.spec.tail_name), about.spec.tap
        )

    def read_cls(self, column: str, numbers: Indices, views: Indices) -> Float[Tensor, "b d"]:
        """CLS tokens, float32 [b, d], of a stored or a derived column. ValueError where there are none."""
        if column not in self.derived:
            return self.read_column(column, numbers, views, ("cls",))["cls"].float()
        about = self.derived[column]
        return apply_tail(self.read_cls(about.source, numbers, views), self.tail(about.spec.tail_name), about.spec.tap)

    def read_column(
        self, column: str, numbers: Indices, views: Indices, arrays: Sequence[str] = ("tokens", "scale"),
        *, out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The named arrays of a column for these samples, [b, ...] in their stored dtypes, patches in raster order.

        views: which view of each sample. `scale` is left out where tokens have none (float16). out: buffers to fill.
        Raises ValueError for an array that the column does not have.
        """
        at, of = self.checked(numbers, views)
        empty = self.buffers(column, arrays, 0 if out else len(at))
        tensors = {name: out[name] for name in empty} if out else empty
        self.shards.read(column, at, of, {name: tensor.numpy() for name, tensor in tensors.items()})
        return tensors

    def read_block(
        self,
        column: str,
        numbers: Indices,
        views: Indices,
        blocks: Indices,
        arrays: Sequence[str] = ("tokens", "scale"),
    ) -> dict[str, Tensor]:
        """As read_column, but of tokens and scale one block of each sample, [b, l / B, ...]; nothing else of them is read.

        blocks: which block of each sample; `block_ids` tells the patches. ValueError where the cache has no blocks.
        """
        (at, of), rule = self.checked(numbers, views), self.block_rule()
        which = self.checked_blocks(blocks, len(at))
        tensors = self.buffers(column, arrays, len(at), rule.blocks)
        self.shards.read(column, at, of, {name: tensor.numpy() for name, tensor in tensors.items()}, which)
        return tensors

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

    def buffers(self, column: str, arrays: Sequence[str], n: int, blocks: int = 1) -> dict[str, Tensor]:
        """Empty tensors [n, ...] for the named arrays of a column; of those in blocks, for one of so many.

        ValueError for a column or an array that the cache does not have.
        """
        if column not in self.stored:
            raise ValueError(f"{self.path}: there is no column {column!r}; it holds {sorted(self.stored)}; "
                             "choose one, or extract with that teacher or map")  # fmt: skip
        stored = self.stored[column].layout.arrays()
        arrays = [name for name in arrays if name != "scale" or name in stored]
        if lacking := [name for name in arrays if name not in stored]:
            raise ValueError(f"{self.path}: column {column} has no {lacking[0]}; it holds {sorted(stored)}; "
                             "choose a teacher that has it")  # fmt: skip
        found = {}
        for name in arrays:
            (first, *rest), dtype = stored[name]
            first //= blocks if name in IN_BLOCKS else 1
            found[name] = torch.empty(n, first, *rest, dtype=getattr(torch, dtype))
        return found

    def block_ids(self, numbers: Indices, views: Indices, blocks: Indices) -> Int64[Tensor, "b n"]:
        """Grid indices, ascending, of one block of each sample: what `read_block` reads. ValueError without blocks."""
        (at, of), rule = self.checked(numbers, views), self.block_rule()
        which = self.checked_blocks(blocks, len(at))
        return torch.from_numpy(rule.ids(self.hashes.numpy()[at], of, which, self.grid[0] * self.grid[1]))

    def checked_blocks(self, blocks: Indices, n: int) -> Numbers:
        """As int64. ValueError unless they are one block of the rule for each of n samples."""
        which, last = np.asarray(blocks, np.int64), self.block_rule().blocks - 1
        if which.shape != (n,) or ((which < 0) | (which > last)).any():
            raise ValueError(
                f"{self.path}: blocks {which.tolist()} for {n} samples; expected one of 0 to {last} per sample"
            )
        return which

    def block_rule(self) -> BlockRule:
        """How tokens are cut. ValueError where they lie in raster order."""
        if self.blocks is None:
            raise ValueError(f"{self.path}: its tokens lie in raster order; token blocks were expected; extract a cache with "
                             "--token-layout blocks")  # fmt: skip
        return self.blocks

    @functools.cached_property
    def derived(self) -> dict[str, Derived]:
        """The columns that follow from stored ones and their teachers' tails, by name, but for those that are stored."""
        specs = [column.spec for column in self.columns.values()]
        found = derived_specs(specs, lambda name: self.tail(name) if exists(tail_path(self.path, name)) else {})
        return {name: Derived(spec, source, content_id({"column": self.columns[source].id, "tap": spec.tap}))
                for name, (spec, source) in found.items()}  # fmt: skip

    def column(self, name: str) -> Column | Derived:
        """What is known of a stored or derived column. ValueError where there is none of that name."""
        if (found := self.columns.get(name) or self.derived.get(name)) is None:
            raise ValueError(f"{self.path}: there is no column {name!r}; it holds {sorted(self.columns)}, and from their tails "
                             f"follow {sorted(self.derived)}; choose one, or extract with that teacher")  # fmt: skip
        return found

    def tail(self, teacher: str) -> dict[str, Tensor]:
        """A teacher's final norm and projection, by tensor name, whose bytes are those of the manifest; of `mae.input_9` what its block does."""
        path = tail_path(self.path, teacher)
        if not exists(path):
            raise ValueError(f"{path}: this cache stores no tail for teacher {teacher}; taps after it need one")
        if teacher not in self._tails:
            data = read_bytes(path)
            tails = [column["tail"] for column in self.manifest.get("columns", []) if column["tail"]]
            told = [about for about in tails if about["file"] == tail_path(Path(), teacher).as_posix()]
            if told and hashlib.sha256(data).hexdigest() != told[0]["sha256"]:
                raise ValueError(f"{path}: its sha256 is not that of the manifest, so it was altered or damaged; to repair, "
                                 "delete it and run the same extract-features command again")  # fmt: skip
            behind = [c.spec for c in self.columns.values() if c.spec.tail_name == teacher]
            width = next(
                (spec.width for spec in behind if spec.tap == "pre_tail" or spec.tap.startswith("input_")), None
            )
            self._tails[teacher] = parse_tail(path, data, width)
        return self._tails[teacher]


def open_cache(
    path: str | os.PathLike[str],
    *,
    allow_partial: bool = False,
    columns: Sequence[str] | None = None,
    views: int | None = None,
    images: int | None = None,
    threads: int | None = None,
    files: bool = True,
    near: NearFolder | None = None,
) -> Cache:
    """The cache at `path`, after checking that every file is there and of its size.

    path: a folder, or a URL: s3://, gs://, az://BUCKET/PATH, with credentials in the environment.
    columns, views, images: what is asked for, where not all: these columns and the first so many views and images. An unfinished
    cache that has them whole, as one has that more of either are being added to, is opened like a finished one.
    allow_partial: also open an unfinished cache, with the samples that are committed in all that is asked for and in the pixels;
    what is not asked for may then lack samples.
    threads: for reading; default: as many as there are cores, at most 8; at a URL 16, which mostly wait.
    files: False where another process on this machine looks whether a finished cache's files are there; what is read is verified in any case.
    near: where whole shards are kept on a disk of this machine, for a cache that is far away.
    Raises ValueError with all problems at once, or with how far an unfinished cache is; Unreachable where a URL does not
    answer.
    """
    path = locate(path)
    near = near and near_folder(near, path)
    if isinstance(path, Url):
        refresh(path)
        threads = threads or (REMOTE_THREADS if near is None else None)
    if files:
        refuse_foreign_entries(path)
    plan, threads = load_plan(path), threads or min(8, os.cpu_count() or 1)
    manifest = read_manifest(path) if exists(path / "manifest.json") else Manifest({}, path)
    table = near_samples(near, path, plan, manifest)
    if not manifest:
        done = committed(path, plan)
        rows = plan.holding(min(images or plan.n_images, plan.n_images))[1]
        asked = {unit for unit in units(plan) if is_asked(unit, columns, views) and plan.ranges[unit[2]].start < rows}
        complete = asked <= done and any(given is not None for given in (columns, views, images))
        if not (allow_partial or complete):
            refuse_unfinished(path, plan, len(done))
        refuse_other_plan(path, plan, done)
        cache = open_unfinished(path, plan, table, {shard for _, _, shard in asked - done}, threads, near)
        cache.complete = complete
        return cache
    refuse_problems(path, plan, manifest, table, files=files)
    return Cache(path, plan, manifest, table, table["valid"].numpy(), threads, near)


def is_asked(unit: Unit, columns: Sequence[str] | None, views: int | None) -> bool:
    """Whether a unit belongs to the pixels or to these columns, in the first so many views; None: to any."""
    view, column, _ = unit
    return (columns is None or column in (PIXELS, *columns)) and (views is None or view < views)


def open_unfinished(
    path: Path, plan: Plan, table: SampleTable, missing: Collection[int], threads: int, near: NearFolder | None
) -> Cache:
    """A cache without a manifest, restricted to the shards that are not `missing`; the images' hashes are those of its pixels."""
    readable, reasons = np.zeros(plan.n_rows, bool), [NO_IMAGE["reason"]] * plan.n_rows
    for shard, rows in enumerate(plan.ranges):
        readable[rows.start : rows.stop], reasons[rows.start : rows.stop] = shard not in missing, [None] * len(rows)
    records = valid_records(path, plan, (unit for unit in units(plan) if unit[1] == PIXELS))
    for number, reason in bad_in(records).items():
        readable[number], reasons[number] = False, reason
    told = {"reason": sample_values(reasons, "reason"), "sha256": known_hashes(path, plan, SourceTable(table), records)}
    return Cache(path, plan, Manifest({}, path), {**table, **told}, readable, threads, near)
