"""The plan of a cache (plan.json): what will be written, under which names, and what proves it.

The plan is written first and never changes, except that calibration freezes the quantisers in it, once.
docs/format.md, "Plan". What a command makes of it is decided in shards/plans.py.
"""

import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mrmae.common.errors import shortened
from mrmae.common.files import publish
from mrmae.shards.format.blocks import BlockRule
from mrmae.shards.format.layout import Layout
from mrmae.shards.format.product import product_path
from mrmae.shards.format.quantiser import DTYPES, NOT_QUANTISED, Quantiser
from mrmae.shards.format.samples import Source, SourceTable, dataset_id, grown_id, listing_id, read_samples
from mrmae.shards.format.shape import expect_kind, read_json
from mrmae.shards.format.spec import (
    FORMAT_VERSION,
    LARGEST_GRID,
    TeacherSpec,
    ViewRecipe,
    column_id,
    compare_specs,
    expect,
    from_json,
    geometry_id,
    plain,
    shown,
)

FORMATS = ("zarr", "webdataset")  # how columns can be stored
PIXELS = "pixels"  # the column that every cache has
MOST_ROWS = 10**9  # members of tars are named by nine digits
MOST_PLAN_BYTES = 1 << 23  # a hundred columns of 1,536 channels have 6 MB; the shape of more takes seconds to check
MOST_EMPTY_ROWS = 4 * 10**6  # before appended parts; every array and list of samples has them
MOST_SHARD_SAMPLES = 1 << 20  # a shard's index has 16 bytes of each
MOST_VIEWS = 1024
MOST_SHARDS = 500_000  # of all views and columns: the manifest lists them
Unit = tuple[int, str, int]  # view, column, shard: the unit of work
VALUE = {  # by dtype, in a column's attributes
    "int8": "channel_mean + channel_std * scale[sample, patch] * tokens[sample, patch, channel]",
    "fp8": "channel_mean + channel_std * scale[sample, patch] * e4m3fn(tokens[sample, patch, channel])",
    "float16": "tokens[sample, patch, channel]",
    "product": "mean + entries[tokens[sample, patch, group], component] @ basis, of codebooks/<teacher>.<tap>.safetensors",
    "map": "map[sample, patch]",
    "vectors": "map[sample, patch, channel]",
}


@dataclasses.dataclass(frozen=True)
class Appended:
    """Images appended to a cache: how many, and the id of the listing with them.

    maps: by column, the sha256 of the values that were given for these images, where it is not the column's own.
    """

    listing_id: str
    n_samples: int
    maps: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        expect(self.n_samples > 0, "appended.n_samples", self.n_samples, "at least one")


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive samples that came together, the first images or an appended part, and the id of the listing up to them.

    maps: as of Appended.
    """

    numbers: range
    listing_id: str
    maps: Mapping[str, str] = dataclasses.field(default_factory=dict)


def is_of_map(quantiser: Quantiser, *, made: bool) -> bool:
    """Whether this stands in a quantiser's place for a map; made: for a computed one."""
    expected = NOT_QUANTISED.to_json() | ({"codebook": quantiser.codebook} if made else {})
    return quantiser.to_json() == expected and (not made or set(quantiser.codebook or ()) == {"sha256", "of"})


class CodebookFields(TypedDict):
    """Of a computed map: its codebook's file, and the column it is computed from; of product codes their codebook's file."""

    sha256: str
    of: NotRequired[str]
    bytes: NotRequired[int]


class QuantiserFields(TypedDict):
    """A quantiser in JSON."""

    dtype: str
    standardised: bool
    channel_mean: list[float] | None
    channel_std: list[float] | None
    source: NotRequired[str]
    codebook: NotRequired[CodebookFields]


class PlanFields(TypedDict):
    """plan.json."""

    format_version: int
    listing_id: str
    n_samples: int
    recipe: ViewRecipe
    grid: tuple[int, int]
    n_views: int
    shard_samples: int
    dtype: str
    columns: list[TeacherSpec]
    quantisers: dict[str, QuantiserFields]
    format: NotRequired[str]
    appended: NotRequired[list[Appended]]
    token_layout: NotRequired[BlockRule]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything needed to resume, and to refuse a command with other options.

    listing_id, n_samples: of the images the cache was made for; appended: those that came later, in turn.
    quantisers: by column name; empty until calibration. format: how columns are stored; no part of their ids.
    token_layout: the rule of the blocks, None for raster order. Ids and names follow from the fields.
    """

    listing_id: str
    n_samples: int
    recipe: ViewRecipe
    grid: tuple[int, int]
    n_views: int
    shard_samples: int
    dtype: str
    columns: tuple[TeacherSpec, ...]
    quantisers: Mapping[str, Quantiser] = dataclasses.field(default_factory=dict)
    format: str = "zarr"
    appended: tuple[Appended, ...] = ()
    token_layout: BlockRule | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(
                f"plan: format {shown(self.format)} is not known; expected {' or '.join(FORMATS)}; choose one"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"plan: dtype {shown(self.dtype)} is not known; expected {', '.join(DTYPES)}; choose one")
        names = [teacher.column for teacher in self.columns]
        if len(set(names)) < len(names):
            raise ValueError(
                f"plan: columns {shown(names)} repeat; expected one column per teacher and tap; rename a teacher"
            )
        weights = {teacher.name: teacher.weights_sha256 for teacher in self.columns}
        for teacher in self.columns:
            if weights[teacher.name] != teacher.weights_sha256:
                raise ValueError(f"plan: two models are named {teacher.name}; expected one name per model, with one or "
                                 "several taps; rename one")  # fmt: skip
        for teacher in self.columns:
            if teacher.grid != self.grid:
                raise ValueError(f"plan: teacher {teacher.name} has grid {teacher.grid}; the cache has {self.grid}; "
                                 "all teachers of a cache share one grid")  # fmt: skip
        if min(self.n_views, self.shard_samples, self.n_samples) < 1:
            raise ValueError(f"plan: {self.n_samples} samples, {self.n_views} views, shards of {self.shard_samples}; "
                             "expected at least one of each")  # fmt: skip
        for n in self.grid:
            expect(0 < n <= LARGEST_GRID, "grid", self.grid, f"1 to {LARGEST_GRID} patches per side")
        self.refuse_too_many()
        if self.token_layout is not None:
            self.token_layout.rows(self.grid[0] * self.grid[1])

    def refuse_too_many(self) -> None:
        """ValueError where numbers would not fit the names of files, or lists of them the memory."""
        shards = self.n_views * (1 + len(self.columns)) * sum(-(-n // self.shard_samples) for n in self.part_sizes)
        for what, n, most, todo in (
            ("samples per shard", self.shard_samples, MOST_SHARD_SAMPLES, "choose a smaller --shard-samples"),
            ("rows of samples", self.n_rows, MOST_ROWS, "split the images over several caches"),
            (
                "empty rows before appended parts",
                self.n_rows - self.n_images,
                MOST_EMPTY_ROWS,
                "extract a new cache of all",
            ),
            ("views", self.n_views, MOST_VIEWS, "choose fewer --views"),
            ("shards of all views and columns", shards, MOST_SHARDS, "choose a larger --shard-samples"),
        ):
            if n > most:
                raise ValueError(f"plan: {n} {what}; at most {most} were expected; {todo}")

    def refuse_foreign_quantisers(self) -> None:
        """ValueError for a quantiser of no column, of another dtype or of another number of channels."""
        widths = {teacher.column: teacher.width for teacher in self.columns}
        maps = {teacher.column: bool(teacher.made) for teacher in self.columns if teacher.is_map}
        for name, quantiser in self.quantisers.items():
            if name in maps and is_of_map(quantiser, made=maps[name]):
                continue
            if name not in widths:
                raise ValueError(f"plan: a quantiser is of {name!r}, which is no column; expected the plan's columns")
            if name in maps or quantiser.dtype != self.dtype or quantiser.width not in (None, widths[name]):
                raise ValueError(f"plan: the quantiser of {name} has {quantiser.width or 'any'} channels of {quantiser.dtype}; "
                                 f"its column has {widths[name]} of {self.dtype}")  # fmt: skip

    @property
    def part_sizes(self) -> list[int]:
        """Images of every part."""
        return [self.n_samples, *(more.n_samples for more in self.appended)]

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The first images, then every appended part, which begins with a shard of its own."""
        parts = [Part(range(self.n_samples), self.listing_id)]
        for more in self.appended:
            start = -(-parts[-1].numbers.stop // self.shard_samples) * self.shard_samples
            parts.append(Part(range(start, start + more.n_samples), more.listing_id, more.maps))
        return parts

    @property
    def n_rows(self) -> int:
        """Rows of every array: the last sample's number, and one."""
        return self.parts[-1].numbers.stop

    @property
    def n_images(self) -> int:
        """Images, without the empty rows before an appended part."""
        return sum(self.part_sizes)

    def holding(self, images: int) -> tuple[int, int]:
        """(parts, rows) that hold the first so many images, of 1 to all there are."""
        left = images
        for number, part in enumerate(self.parts, 1):
            if left <= len(part.numbers):
                return number, part.numbers.start + left
            left -= len(part.numbers)
        raise ValueError(f"{images} images; at most {self.n_images} were expected")

    @property
    def numbers(self) -> list[range]:
        """The sample numbers of every part."""
        return [part.numbers for part in self.parts]

    @functools.cached_property
    def ranges(self) -> list[range]:
        """The sample numbers of every shard; the last of each part may be shorter."""
        return [range(part.numbers.start + at.start, part.numbers.start + at.stop)
                for part in self.parts for at in shard_ranges(len(part.numbers), self.shard_samples)]  # fmt: skip

    @property
    def geometry_id(self) -> str:
        """Id of the views that all columns share (of the first images)."""
        return self.ids[PIXELS]

    @property
    def ids(self) -> dict[str, str]:
        """Id of the numbers of every column that has a quantiser, by name; for the pixels, of the views (of the first images)."""
        return self.part_ids[0]

    @functools.cached_property
    def part_ids(self) -> list[dict[str, str]]:
        """The same for every part: an appended one has ids of its own, from the listing up to it."""
        found, blocks = [], None if self.token_layout is None else plain(self.token_layout)
        for part in self.parts:
            geometry = geometry_id(part.listing_id, self.recipe)
            specs = [self.spec_in(part, t) for t in self.columns if t.column in self.quantisers]
            named = {t.column: column_id(t, geometry, self.quantisers[t.column].to_json(), None if t.is_map else blocks)
                     for t in specs}  # fmt: skip
            found.append({PIXELS: geometry, **named})
        return found

    def spec_in(self, part: Part, spec: TeacherSpec) -> TeacherSpec:
        """A column's spec for the images of a part: of a map, with the values that were given for them."""
        return dataclasses.replace(spec, weights_sha256=part.maps.get(spec.column, spec.weights_sha256))

    def without(self, columns: Collection[str]) -> "Plan":
        """The same plan without these columns."""
        appended = [dataclasses.replace(more, maps={name: sha256 for name, sha256 in more.maps.items() if name not in columns})
                    for more in self.appended]  # fmt: skip
        return dataclasses.replace(
            self,
            columns=tuple(teacher for teacher in self.columns if teacher.column not in columns),
            quantisers={name: quantiser for name, quantiser in self.quantisers.items() if name not in columns},
            appended=tuple(appended),
        )

    def shard_ids(self, shard: int) -> dict[str, str]:
        """Ids of the pixels and of every column with a quantiser, as a shard's records and seals hold them."""
        first = self.ranges[shard].start
        return next(ids for part, ids in zip(self.parts, self.part_ids) if first in part.numbers)

    @property
    def n_shards(self) -> int:
        """Shards per view and column."""
        return len(self.ranges)

    def teacher(self, column: str) -> TeacherSpec:
        """The teacher of a column."""
        return next(teacher for teacher in self.columns if teacher.column == column)

    def layout(self, column: str) -> Layout:
        """The arrays of a teacher's column."""
        teacher, (h, w) = self.teacher(column), self.grid
        return Layout(self.n_rows, h * w, teacher.width, self.shard_samples, self.dtype,
                      teacher.has_cls, teacher.has_attention,
                      1 if self.token_layout is None or teacher.is_map else self.token_layout.blocks,
                      teacher.model if teacher.is_map else None)  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The plan as plan.json holds it; raster order, and that nothing was appended or given anew, go without saying."""
        fields: dict[str, Any] = {"format_version": FORMAT_VERSION}
        fields |= {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        for more in fields["appended"]:
            if not more["maps"]:
                del more["maps"]
        if not self.appended:
            del fields["appended"]
        if self.token_layout is None:
            del fields["token_layout"]
        return fields | {"quantisers": {name: q.to_json() for name, q in self.quantisers.items()}}

    @staticmethod
    def from_json(fields: Mapping[str, Any], where: str) -> "Plan":
        """The plan that `to_json` described. where: the file, for errors. ValueError where it is damaged."""
        try:
            expect_kind(fields, PlanFields)
            plan = Plan(
                **{
                    **{name: value for name, value in fields.items() if name != "format_version"},
                    "recipe": from_json(ViewRecipe, fields["recipe"], where),
                    "grid": tuple(fields["grid"]),
                    "columns": tuple(from_json(TeacherSpec, column, where) for column in fields["columns"]),
                    "quantisers": {name: Quantiser.from_json(q) for name, q in fields["quantisers"].items()},
                    "appended": tuple(Appended(**part) for part in fields.get("appended", ())),
                    "token_layout": BlockRule.from_json(fields.get("token_layout")),
                }
            )
            plan.refuse_foreign_quantisers()
            return plan
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            what = str(error) if isinstance(error, ValueError) else repr(error)
            if what.startswith(where):
                raise
            raise ValueError(f"{where}: damaged ({shortened(what)}); expected the fields of a plan; restore it, or where the cache "
                             "was finished, run inspect-cache repair") from None  # fmt: skip


def shard_ranges(n: int, shard_samples: int) -> list[range]:
    """The sample numbers of every shard: consecutive ranges, the last may be shorter."""
    return [range(start, min(start + shard_samples, n)) for start in range(0, n, shard_samples)]


def default_shard_samples(n: int, token_bytes: int) -> int:
    """Samples per shard: the smaller of 512 MB of tokens and n / 64, at least 64. token_bytes: of one sample."""
    return max(64, min(512 * 10**6 // max(token_bytes, 1), n // 64))


def dataset_ids(plan: Plan, rows: Sequence[Source]) -> list[str]:
    """Id of the data set up to and with every part of the plan, computed from the images by number."""
    return ids_of_parts(plan, rows, dataset_id)


def listing_ids(plan: Plan, rows: Sequence[Source]) -> list[str]:
    """Id of the listing up to and with every part of the plan, computed from the images by number."""
    return ids_of_parts(plan, rows, listing_id)


def ids_of_parts(plan: Plan, rows: Sequence[Source], id_of: Callable[[Sequence[Source]], str]) -> list[str]:
    """An id up to and with every part. id_of: of images alone."""
    ids: list[str] = []
    for part in plan.parts:
        here = id_of(rows[part.numbers.start : part.numbers.stop])
        ids.append(grown_id(ids[-1], here) if ids else here)
    return ids


def load_plan(path: Path) -> Plan:
    """The plan of the cache at `path`. ValueError when there is none or it is of another format version."""
    file = path / "plan.json"
    try:
        fields = read_json(file, dict[str, Any], MOST_PLAN_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no cache here (no plan.json); run extract-features first") from None
    except NotADirectoryError:
        raise ValueError(f"{path}: is a file; a cache is a folder that extract-features makes of images; make one with "
                         f"extract-features {shlex.quote(str(path))} CACHE, and give CACHE here") from None  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON ({error}); restore it, or where the cache was finished, run "
                         "inspect-cache repair; otherwise extract anew") from None  # fmt: skip
    if (version := fields.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format version {shown(version)}; this mrmae reads {FORMAT_VERSION}; extract the cache anew"
        )
    return with_codebooks(Plan.from_json(fields, str(file)), path)


def with_codebooks(plan: Plan, path: Path) -> Plan:
    """The plan, whose product codes are decoded by the codebooks in the cache at `path`, read when they are first used."""
    if not any(quantiser.stored.product for quantiser in plan.quantisers.values()):
        return plan
    found = {
        name: dataclasses.replace(quantiser, file=product_path(path, name)) if quantiser.stored.product else quantiser
        for name, quantiser in plan.quantisers.items()
    }
    return dataclasses.replace(plan, quantisers=found)


def freeze_quantisers(path: Path, plan: Plan, quantisers: Mapping[str, Quantiser]) -> Plan:
    """The plan with its columns' quantisers, on disk too, codebooks of product codes first. ValueError when others were frozen before."""
    frozen = dataclasses.replace(plan, quantisers=dict(quantisers))
    if set(quantisers) != {teacher.column for teacher in plan.columns}:
        raise ValueError(f"{path}: quantisers for {sorted(quantisers)}; expected one for every column of the plan")
    before = {name: q.to_json() for name, q in load_plan(path).quantisers.items()}
    now = {name: frozen.quantisers[name].to_json() for name in before}
    compare_specs({"quantisers": before}, {"quantisers": now}, str(path / "plan.json"))
    if len(before) == len(quantisers):
        return load_plan(path)
    if others := {quantisers[t.column].dtype for t in plan.columns if not t.is_map} - {plan.dtype}:
        raise ValueError(
            f"{path}: a quantiser is of {others.pop()}; the cache has {plan.dtype}; its columns share one dtype"
        )
    for name, quantiser in quantisers.items():
        if quantiser.stored.product and name not in before:
            publish(product_path(path, name), quantiser.codebook_bytes(), replace=True)
    publish(path / "plan.json", readable_json(frozen.to_json()), replace=True)
    return with_codebooks(frozen, path)


def read_sources(path: Path) -> SourceTable:
    """The images of the cache at `path` by number, as its samples.arrow tells of them; key "" where a row holds none."""
    return SourceTable(read_samples(path, load_plan(path).numbers))


def units(plan: Plan) -> Iterator[Unit]:
    """Every unit of work: by view, then shard, pixels before teachers."""
    for view in range(plan.n_views):
        for shard in range(plan.n_shards):
            for column in (PIXELS, *(teacher.column for teacher in plan.columns)):
                yield view, column, shard


def tar_path(path: Path, view: int, shard: int) -> Path:
    """The pixel tar of a shard."""
    return path / "views" / str(view) / PIXELS / f"{shard:06d}.tar"


def commit_path(path: Path, view: int, column: str, shard: int) -> Path:
    """Where a unit's commit record lies."""
    return path / "commits" / str(view) / column / f"{shard:06d}.json"


def pixels_of(plan: Plan, view: int, shard: int) -> dict[str, Any]:
    """What a pixel tar belongs to: its sidecar says so, that exchanged tars are told apart."""
    return {"geometry_id": plan.shard_ids(shard)[PIXELS], "view": view, "shard": shard}


def column_attributes(plan: Plan, view: int, column: str) -> dict[str, Any]:
    """What a column's metadata say of it, in either format: enough to dequantise without the rest of the cache."""
    layout = {} if plan.token_layout is None else {"token_layout": plain(plan.token_layout)}
    teacher = plan.teacher(column)
    kind = ("vectors" if teacher.width > 1 else "map") if teacher.is_map else plan.dtype
    kind = "product" if kind == plan.dtype and DTYPES[plan.dtype].product else kind
    return {
        **layout,
        "format_version": FORMAT_VERSION,
        "column_id": plan.ids[column],
        "view": view,
        "teacher": plain(teacher),
        "quantiser": plan.quantisers[column].to_json(),
        "value": VALUE[kind],
    }


def readable_json(value: Any) -> bytes:
    """Indented JSON with sorted keys, lists of numbers on one line."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    one_line = re.sub(
        r"\[[\s\d.,eE+-]*\]",
        lambda found: re.sub(r"\s+(?=\])|(?<=\[)\s+", "", re.sub(r"\s+", " ", found.group())),
        text,
    )
    return (one_line + "\n").encode()
