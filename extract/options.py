"""What extract-features can be told, and what it chooses where it is told nothing."""

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from mrmae.common.backend import expect_utf8, locate
from mrmae.common.device import resolve_device
from mrmae.extract.images import MAX_PIXELS
from mrmae.extract.teachers import DEFAULT_TEACHERS
from mrmae.extract.workers import ProcessPart, local_rank, process_part
from mrmae.shards.format import (
    DTYPES,
    BlockRule,
    Plan,
    Source,
    TeacherSpec,
    ViewRecipe,
    compare_specs,
    default_shard_samples,
)
from mrmae.shards.plans import Wanted

SAID = ("views", "grid", "dtype", "format", "token_layout", "blocks", "precision", "batch_size", "shard_samples", "max_bad", "min_snr",
        "max_pixels", "limit")  # fmt: skip

WAITING_WORKERS = 4  # decoding threads per core where images come from a URL: most of them wait for it


@dataclasses.dataclass(frozen=True)
class Options:
    """What extract-features can be told. 0, -1 and "auto" choose; see the command's --help.

    grid: patches per side of the student; recipe.size must be a multiple of it. shards: 'i/n', this process's part of
    the shards. limit: only the first so many images in canonical order, 0 for all. append: images may be new to a cache that exists. teachers: as in parse_teacher; several taps of one model as ?tap=a,b. maps: NAME=FILE each, or
    computed, NAME=text:TEACHER:FILE and NAME=kmeans:TEACHER:K. part: follows from it and from torchrun's environment.
    """

    images: Sequence[str | os.PathLike[str]]
    cache: Path
    recipe: ViewRecipe = dataclasses.field(default_factory=lambda: ViewRecipe(224))
    teachers: Sequence[str] = DEFAULT_TEACHERS
    maps: Sequence[str] = ()
    include: Sequence[str] = ()
    limit: int = 0
    views: int = 1
    grid: int = 14
    dtype: str = "int8"
    format: str = "zarr"
    token_layout: str = "raster"
    blocks: int = 4
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 0
    workers: int = 0
    shard_samples: int = 0
    max_bad: int = -1
    min_snr: float | None = None
    max_pixels: int = MAX_PIXELS
    allow_torchscript: bool = False
    allow_code: bool = False
    shards: str = ""
    append: bool = False
    part: ProcessPart = ProcessPart()

    def resolved(self) -> "Options":
        """The same with device, precision, batch size and workers chosen. ValueError for what cannot be."""
        given = [("IMAGES", i) for i in self.images] + [("--include", i) for i in self.include]
        given += [("--teacher", teacher) for teacher in self.teachers] + [("--map", text) for text in self.maps]
        for name, text in [*given, ("the working folder", os.getcwd())]:
            expect_utf8(text, name)
        refuse_untiled(self.recipe.size, self.grid)
        if rule := self.block_rule():
            rule.rows(self.grid**2)
        rank, ranks = local_rank()
        far = any("://" in os.fspath(image) for image in self.images)
        device = resolve_device(self.device, rank)
        kind = device.type
        return dataclasses.replace(
            self,
            cache=locate(self.cache),
            part=process_part(self.shards),
            teachers=tuple(one for text in self.teachers for one in one_per_tap(text)),
            device=str(device),
            precision=("fp16" if kind == "cuda" else "fp32") if self.precision == "auto" else self.precision,
            batch_size=self.batch_size or (64 if kind == "cuda" else 8),
            workers=self.workers or max(1, len(os.sched_getaffinity(0)) // ranks) * (WAITING_WORKERS if far else 1),
        )

    @property
    def least_snr(self) -> float:
        """dB that a shard's codes must keep of a teacher."""
        return DTYPES[self.dtype].least_snr if self.min_snr is None else self.min_snr

    def block_rule(self) -> BlockRule | None:
        """How tokens are cut into blocks; None for raster order."""
        if self.token_layout == "raster" and self.blocks != Options.blocks:
            raise ValueError(f"--blocks {self.blocks}: tokens are stored in raster order; --token-layout blocks was "
                             "expected with it; give that, or leave --blocks out")  # fmt: skip
        return BlockRule(self.recipe.seed, self.blocks) if self.token_layout == "blocks" else None

    def command(self) -> str:
        """The command line that means the same, for commit records and for who has to repeat it."""
        recipe, default = self.recipe, Options(images=(), cache=self.cache)
        words = ["extract-features", *(os.fspath(image) for image in self.images), os.fspath(self.cache)]
        words += [word for pattern in self.include for word in ("--include", pattern)]
        words += [word for teacher in self.teachers for word in ("--teacher", teacher)]
        words += [word for text in self.maps for word in ("--map", text)]
        words += ["--crop-scale", *map(repr, recipe.crop_scale)] * (recipe.crop_scale != default.recipe.crop_scale)
        values = {name: getattr(recipe, name) for name in ("flip", "size", "seed", "encoding")}
        values |= {name: getattr(self, name) for name in SAID}
        usual = {
            name: getattr(default.recipe if name in ("flip", "size", "seed", "encoding") else default, name)
            for name in values
        }
        for name, value in values.items():
            words += [f"--{name.replace('_', '-')}", str(value)] * (value != usual[name])
        words += ["--append"] * self.append + ["--allow-torchscript"] * self.allow_torchscript
        return shlex.join(words + ["--allow-code"] * self.allow_code)


def asked(
    options: Options, there: Plan | None, teachers: Sequence[TeacherSpec] | None = None, rows: Sequence[Source] | None = None,
    maps: Mapping[str, str] | None = None,
) -> Wanted:  # fmt: skip
    """What the options ask for, as far as it is known by now. What they leave open is as in the plan that is there.

    there: that plan, if any. teachers: with the maps; None before they are built, and those that are there stand for them. rows: the
    images, once they are listed. maps: as of Wanted.
    """
    if there is not None:  # before columns of another grid come into a plan
        compare_specs(there.grid, (options.grid, options.grid), str(options.cache / "plan.json"), field="grid")
    columns = (() if there is None else there.columns) if teachers is None else tuple(teachers)
    n, l, stored = 1 if rows is None else len(rows), options.grid**2, DTYPES[options.dtype]
    usual = default_shard_samples(n, l * max((stored.token_bytes(t.width) for t in columns), default=stored.bytes))
    plan = Plan(
        listing_id="",
        n_samples=n,
        recipe=options.recipe,
        grid=(options.grid, options.grid),
        n_views=options.views,
        shard_samples=options.shard_samples or (usual if there is None else there.shard_samples),
        dtype=options.dtype,
        columns=columns,
        format=options.format,
        token_layout=options.block_rule(),
    )
    return Wanted(plan, rows, append=options.append, limit=options.limit, maps=maps or {})


def refuse_untiled(size: int, grid: int) -> None:
    """ValueError where a grid does not cut a view into whole pixels."""
    if size % grid:
        raise ValueError(f"--size {size}: is not a multiple of --grid {grid}; the student's patches tile the view; change one of "
                         "them")  # fmt: skip


def one_per_tap(text: str) -> list[str]:
    """A teacher's text once for every tap of `?tap=a,b`."""
    before, mark, query = text.rpartition("?")
    pairs = query.split("&")
    taps = next((pair[4:].split(",") for pair in pairs if mark and pair.startswith("tap=")), [])
    if len(taps) < 2:
        return [text]
    return [before + mark + "&".join(f"tap={tap}" if p.startswith("tap=") else p for p in pairs) for tap in taps]
