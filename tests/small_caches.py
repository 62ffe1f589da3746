"""Small synthetic caches, written through the real writers."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrmae.extract.images import decode
from mrmae.extract.maps import GivenMap
from mrmae.shards import commit
from mrmae.shards.format import plan, samples, views
from mrmae.shards.format.blocks import BlockRule
from mrmae.shards.format.plan import Plan
from mrmae.shards.format.quantiser import NOT_QUANTISED, calibrate, quantise
from mrmae.shards.format.quantiser import quality as quality_of
from mrmae.shards.format.samples import Source, listing_id
from mrmae.shards.format.spec import TeacherSpec, ViewRecipe, encoding_of, key_hash
from mrmae.shards.format.tail import write_tail
from mrmae.shards.plans import Wanted, agree
from mrmae.shards.store.tar import PixelRow, digest_of_hashes

TEACHERS: Mapping[str, Mapping[str, Any]] = {
    "a": {"width": 8, "has_cls": True, "has_attention": True},
    "b": {"width": 6, "has_cls": False, "has_attention": False},
}
BROKEN = b"not an image at all"


def write_synthetic_cache(
    path: Path, n: int = 24, size: int = 32, grid: int = 4, n_views: int = 2,
    teachers: Mapping[str, Mapping[str, Any]] = TEACHERS, shard_samples: int = 8, labels: bool = True,
    dtype: str = "int8", seed: int = 0, bad: Sequence[int] = (), finalise: bool = True,
    format: str = "zarr",
    blocks: int = 0,
    images: Mapping[str, bytes] | None = None,
    maps: Mapping[str, Callable[[str, int], Any]] | None = None,
) -> Path:  # fmt: skip
    """A complete cache of n smooth random images (or of those given), whose features are functions of the pixels that can be learnt.

    size: a multiple of 2 * grid. blocks: token blocks per view, 0 for raster order.
    bad: positions of images (in the order they are made) that do not decode.
    maps: by name, what a key's view of that number shows, [l] of uint16 or float16, or [l, c] of float16.
    """
    given = images or smooth_images(n, seed, labels)
    images = {key: BROKEN if i in bad else data for i, (key, data) in enumerate(given.items())}
    sources = samples.canonical_sources(
        Source(key, key.split("/")[0] if labels else None, len(data), hashlib.sha256(data).hexdigest())
        for key, data in images.items()
    )
    specs = tuple(teacher_spec(name, size, grid, **about) for name, about in teachers.items())
    drawn = {f"{name}.map": value for name, value in (maps or {}).items()}
    first = {name: value(sources[0].key, 0) for name, value in (maps or {}).items()}
    told = [GivenMap(name, path, {"": x[None] if x.ndim == 2 else x}, "0" * 64) for name, x in first.items()]
    columns = (*specs, *(one.spec((grid, grid)) for one in told))
    listed = listing_id(sources)
    recipe = ViewRecipe(size=size, seed=seed)
    rule = BlockRule(seed, blocks) if blocks else None
    wanted = Plan(
        listed, n, recipe, (grid, grid), n_views, shard_samples, dtype, columns, format=format, token_layout=rule
    )
    made = agree(path, Wanted(wanted, rows=sources, extend=False)).plan
    rows = [[pixel_row(i, s, images[s.key], view, recipe) for i, s in enumerate(sources)] for view in range(n_views)]
    sample = [row for row in rows[0] if row.stored][:16]
    made = plan.freeze_quantisers(path, made, {
        **{spec.column: calibrate(features(sample, spec)["tokens"], dtype=dtype) for spec in specs},
        **dict.fromkeys(drawn, NOT_QUANTISED),
    })  # fmt: skip
    for view, column, shard in commit.missing(path, made):
        here = rows[view][shard * shard_samples : (shard + 1) * shard_samples]
        if column in drawn:
            values = np.stack([drawn[column](row.key, view) for row in here])
            kept = np.array([row.stored is not None for row in here])
            of = digest_of_hashes(row.sha256 for row in here)
            commit.store_column(path, made, view, column, shard, {"map": values}, kept, of, {"quality": None})
        else:
            write_unit(path, made, view, column, shard, here)
    for spec in specs:
        write_tail(path, spec.name, {"norm.weight": torch.ones(spec.width), "norm.bias": torch.zeros(spec.width)})
    if finalise:
        commit.finalise(path, made)
    return path


def write_unit(path: Path, made: Plan, view: int, column: str, shard: int, rows: Sequence[PixelRow]) -> None:
    """Store one shard of the pixels or of one teacher's column."""
    if column == plan.PIXELS:
        return commit.store_pixels(path, made, view, shard, rows)
    keep, quantiser = torch.tensor([row.stored is not None for row in rows]), made.quantisers[column]
    arrays = features(rows, made.teacher(column))
    tokens = arrays.pop("tokens")
    codes, scale = quantise(tokens, quantiser)
    arrays |= {} if scale is None else {"scale": scale}
    stored = {"tokens": codes.numpy(), **{name: array.half().numpy() for name, array in arrays.items()}}
    kept = None if scale is None else scale[keep]
    quality = quality_of(tokens[keep], codes[keep], kept, quantiser) if keep.any() else None
    of = digest_of_hashes(row.sha256 for row in rows)
    commit.store_column(path, made, view, column, shard, stored, keep.numpy(), of, {"quality": quality})


def smooth_images(n: int, seed: int, labels: bool) -> dict[str, bytes]:
    """PNG files of different sizes by key; the class decides on the colour, so that it can be learnt."""
    rng = np.random.default_rng(seed)
    images = {}
    for i in range(n):
        coarse = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
        coarse[..., i % 3] //= 4
        smooth = Image.fromarray(coarse).resize((40 + i % 7, 36 + i % 5), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        smooth.save(out, "PNG")
        images[f"{f'class {i % 3}/' if labels else ''}bild {i:03d} ü.png"] = out.getvalue()
    return images


def pixel_row(number: int, source: Source, data: bytes, view: int, recipe: ViewRecipe) -> PixelRow:
    """The stored view of one image, or its reason."""
    try:
        image = decode.decode_rgb(data)
    except views.BadImage as error:
        return PixelRow(number, source.key, source.label, None, None, error.reason, source.sha256)
    drawn = views.draw_view(key_hash(source.key), view, *image.shape[:2], recipe)
    stored = views.encode_view(views.render(image, drawn, recipe), recipe.stored)
    return PixelRow(number, source.key, source.label, drawn, stored, sha256=source.sha256)


def features(rows: Sequence[PixelRow], spec: TeacherSpec) -> dict[str, Tensor]:
    """A teacher's arrays, float32, for stored views: a fixed random map of each patch's 2 x 2 block means."""
    (size, _), (grid, _) = spec.input_size, spec.grid
    blank = np.zeros((size, size, 3), np.uint8)
    pixels = torch.from_numpy(
        np.stack([views.decode_view(row.stored, encoding_of("jpeg95"), size) if row.stored else blank for row in rows])
    )
    half = size // grid // 2  # pixels per side of a block: two by two blocks make a patch
    x = pixels.float() / 127.5 - 1
    blocks = x.reshape(len(rows), grid, 2, half, grid, 2, half, 3).mean(dim=(3, 6))
    patches = blocks.permute(0, 1, 3, 2, 4, 5).reshape(len(rows), grid * grid, 12)
    generator = torch.Generator().manual_seed(key_hash(spec.name) % 2**31)
    tokens = torch.sin(patches @ torch.randn(12, spec.width, generator=generator))
    norm = tokens.norm(dim=-1)
    arrays = {"tokens": tokens, "norm": norm}
    arrays |= {"cls": tokens.mean(dim=1)} if spec.has_cls else {}
    return arrays | ({"attention": norm.softmax(dim=-1)} if spec.has_attention else {})


def teacher_spec(
    name: str, size: int, grid: int, *, width: int, has_cls: bool, has_attention: bool, tap: str = "pre_tail"
) -> TeacherSpec:
    """A teacher that exists in these tests only."""
    return TeacherSpec(
        name=name, library="synthetic", model="sine", weights="random", tag=None,
        weights_sha256=hashlib.sha256(name.encode()).hexdigest(), activation=None, input_size=(size, size),
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", antialias=True, tap=tap,
        prefix_tokens=int(has_cls), native_grid=(grid, grid), grid=(grid, grid), resample="none", width=width,
        has_cls=has_cls, has_attention=has_attention, precision="fp32", attention_backend="none",
    )  # fmt: skip
