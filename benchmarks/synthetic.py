"""A finished cache of random views and random int8 codes: its speed is a real one's, what it says is nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mrmae.shards import commit
from mrmae.shards.format import (
    Plan,
    Quantiser,
    Source,
    TeacherSpec,
    ViewRecipe,
    key_hash,
    listing_id,
    plan,
    samples,
    views,
)
from mrmae.shards.plans import Wanted, agree
from mrmae.shards.store import PixelRow, digest_of_hashes

SHARD = 32


def write_cache(
    path: Path, specs: Sequence[TeacherSpec], *, n: int, size: int, grid: int, format: str = "zarr"
) -> Path:
    """A cache of `n` images with a column of every teacher, through the real writers."""
    rng = np.random.default_rng(0)
    sources = samples.canonical_sources(Source(f"{i:06d}.png", None, 1, f"{i:064x}") for i in range(n))
    recipe, listed = ViewRecipe(size=size), listing_id(sources)
    made = Plan(listed, n, recipe, (grid, grid), 1, SHARD, "int8", tuple(specs), format=format)
    made = agree(path, Wanted(made, rows=sources)).plan
    quantisers = {
        s.column: Quantiser("int8", np.zeros(s.width, np.float32), np.ones(s.width, np.float32), standardised=True)
        for s in specs
    }
    made = plan.freeze_quantisers(path, made, quantisers)
    for view, column, shard in commit.missing(path, made):
        mine = range(shard * SHARD, min(n, (shard + 1) * SHARD))
        if column == plan.PIXELS:
            rows = [pixel_row(i, sources[i], recipe, rng) for i in mine]
            commit.store_pixels(path, made, view, shard, rows, {"seconds": {"write": 0.0}})
        else:
            arrays = codes(len(mine), made.teacher(column), rng)
            quality = {"snr_db": 40.0, "p999_one_minus_cos": 0.0, "zero_tokens": 0}
            of, valid = digest_of_hashes(sources[i].sha256 for i in mine), np.ones(len(mine), bool)
            commit.store_column(path, made, view, column, shard, arrays, valid, of, {"quality": quality})
    commit.finalise(path, made)
    return path


def pixel_row(number: int, source: Source, recipe: ViewRecipe, rng: np.random.Generator) -> PixelRow:
    """A view of blocks and noise, which as a JPEG is about as large as a photograph's."""
    side = recipe.size
    coarse = rng.integers(0, 256, (side // 8 + 1, side // 8 + 1, 3)).astype(np.uint8)
    image = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:side, :side] // 8 * 7
    image = image + rng.integers(0, 8, (side, side, 3)).astype(np.uint8)
    drawn = views.draw_view(key_hash(source.key), 0, side, side, recipe)
    stored = views.encode_view(views.render(image, drawn, recipe), recipe.stored)
    return PixelRow(number, source.key, None, drawn, stored, sha256=source.sha256)


def codes(n: int, spec: TeacherSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a shard of `n` samples of this teacher holds."""
    l = spec.grid[0] * spec.grid[1]
    arrays = {
        "tokens": rng.integers(-127, 128, (n, l, spec.width), np.int8),
        "scale": np.full((n, l), 0.02, np.float16),
        "norm": np.ones((n, l), np.float16),
    }
    arrays |= {"cls": np.zeros((n, spec.width), np.float16)} if spec.has_cls else {}
    return arrays | ({"attention": np.full((n, l), 1 / l, np.float16)} if spec.has_attention else {})
