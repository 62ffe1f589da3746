"""A contact sheet of a cache: per image the view, every teacher's tokens as colours, and its attention."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mrmae.common.pictures import (
    COLOUR_NOTE,
    STRIPES_NOTE,
    Strip,
    as_bytes,
    draw_sheet,
    heat,
    pca_rgb,
    publish_png,
    ranges,
    refuse_to_replace,
)
from mrmae.common.progress import counted
from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers


def contact_sheet(cache: Cache, n: int, *, view: int = 0) -> Image.Image:
    """n samples spread over the cache, a row each: view, per teacher its tokens, and attention or token norms."""
    if not len(cache.numbers):
        raise ValueError(f"{cache.path}: no sample can be read; expected at least one to show")
    numbers = cache.numbers[np.linspace(0, len(cache.numbers) - 1, min(n, len(cache.numbers))).astype(int)]
    keys = [cache.keys[number] for number in numbers]
    pixels = cache.read_pixels(numbers, numbers * 0 + view).numpy()
    columns = [Strip(f"view {view}", pixels, f"as the teachers saw it, {cache.size} px", captions=keys)]
    for name in cache.columns:
        columns += teacher_columns(cache, name, numbers, view)
    rows, per_row = cache.grid
    title = f"{cache.path.name}: {len(numbers)} of {counted(len(cache.numbers), 'image')}, {rows} x {per_row} patches"
    return draw_sheet(columns, title=title, notes=(COLOUR_NOTE, STRIPES_NOTE))


def teacher_columns(cache: Cache, name: str, numbers: Numbers, view: int) -> Sequence[Strip]:
    """A teacher's tokens as colours, and its attention (where there is none: token norms)."""
    column, views = cache.columns[name], numbers * 0 + view
    random = "RANDOM WEIGHTS" if column.spec.weights == "random" else ""
    array = "attention" if "attention" in column.layout.arrays() else "norm"
    scores = cache.read_column(name, numbers, views, (array,))[array].float()
    what = "of CLS to each patch, last block" if array == "attention" else "length of each token"
    tokens = as_bytes(pca_rgb(cache.read_tokens(name, numbers, views), cache.grid))
    return (
        Strip(name, tokens, f"{column.spec.model}: tokens as colours", random),
        Strip(f"{name}, {array}", heat(scores, cache.grid), what, captions=ranges(scores)),
    )


def write_sheet(cache: Cache, n: int, path: Path, *, view: int = 0) -> Path:
    """The PNG at `path`; an older PNG there is replaced. ValueError where something else has that name."""
    refuse_to_replace(path)
    return publish_png(path, contact_sheet(cache, n, view=view))
