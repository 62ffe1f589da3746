"""A contact sheet of a cache: per image the view, every teacher's tokens as colours, and its attention."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mrmae.common.files import publish
from mrmae.common.pictures import Pictures, as_bytes, heat, pca_rgb, tiled
from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers

PNG = b"\x89PNG\r\n\x1a\n"


def contact_sheet(cache: Cache, n: int, *, view: int = 0) -> Image.Image:
    """n samples spread over the cache, a row each: view, per teacher its tokens, and attention or token norms."""
    if not len(cache.numbers):
        raise ValueError(f"{cache.path}: no sample can be read; expected at least one to show")
    numbers = cache.numbers[np.linspace(0, len(cache.numbers) - 1, min(n, len(cache.numbers))).astype(int)]
    columns = {f"view {view}": cache.read_pixels(numbers, numbers * 0 + view).numpy()}
    for name in cache.columns:
        columns |= teacher_pictures(cache, name, numbers, view)
    return tiled(columns)


def teacher_pictures(cache: Cache, name: str, numbers: Numbers, view: int) -> dict[str, Pictures]:
    """A column's tokens as colours, and its attention (where there is none: token norms), by heading."""
    column, views = cache.columns[name], numbers * 0 + view
    random = " RANDOM" if column.spec.weights == "random" else ""
    array = "attention" if "attention" in column.layout.arrays() else "norm"
    scores = cache.read_column(name, numbers, views, (array,))[array].float()
    return {
        f"{name}{random}": as_bytes(pca_rgb(cache.read_tokens(name, numbers, views), cache.grid)),
        f"{name}\n{array}": heat(scores, cache.grid),
    }


def refuse_to_replace(path: Path) -> None:
    """ValueError where `path` is there and is no PNG."""
    if not os.path.lexists(path):
        return
    content = path.read_bytes()[: len(PNG)] if path.is_file() else b""
    if content != PNG:
        raise ValueError(f"{path}: is there and is no PNG; a new name, or that of an older picture, was expected; choose another "
                         "with --out (nothing was changed)")  # fmt: skip


def write_sheet(cache: Cache, n: int, path: Path, *, view: int = 0) -> Path:
    """The PNG at `path`; an older PNG there is replaced. ValueError where something else has that name."""
    refuse_to_replace(path)
    out = io.BytesIO()
    contact_sheet(cache, n, view=view).save(out, "PNG")
    publish(path, out.getvalue(), replace=True)
    return path
