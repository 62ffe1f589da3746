"""Views: a crop and a flip drawn from (seed, key, view), rendered and stored, exactly.

A drawn view is recorded; replaying it never draws again. Everything here is uint8 height x width x 3 in sRGB.
"""

import dataclasses
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from mrmae.shards.format.spec import ViewRecipe

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
ATTEMPTS = 10  # of RandomResizedCrop, before its centred fallback


class BadImage(ValueError):
    """An image that cannot be decoded; `reason` says why, in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class View:
    """A crop box and a flip, in pixels of the decoded, upright image of source_height x source_width."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    source_height: int
    source_width: int


def draw_view(hash: int, view: int, height: int, width: int, recipe: ViewRecipe) -> View:
    """The view of this number of an image of this size: RandomResizedCrop's rule and a flip.

    hash: the key's hash, signed or unsigned. Philox4x64 with key (recipe.seed, hash) and counter (0, 0, 0, view); word
    0 is the flip, words 1 + 4k to 4 + 4k are area, ratio, top and left of attempt k. No state is shared between views.
    """
    seed_and_hash = np.array([recipe.seed, hash % 2**64], np.uint64)
    counter = np.array([0, 0, 0, view], np.uint64)
    words = [int(w) for w in np.random.Philox(key=seed_and_hash, counter=counter).random_raw(1 + 4 * ATTEMPTS)]
    flip = share(words[0]) < recipe.flip
    low, high = recipe.crop_scale
    log_low, log_high = (math.log(ratio) for ratio in recipe.crop_ratio)
    for area_word, ratio_word, top_word, left_word in zip(*(iter(words[1:]),) * 4):
        area = height * width * (low + (high - low) * share(area_word))
        ratio = math.exp(log_low + (log_high - log_low) * share(ratio_word))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = below(top_word, height - h + 1), below(left_word, width - w + 1)
            return View(top, left, h, w, flip, height, width)
    return centred(height, width, recipe.crop_ratio, flip)


def share(word: int) -> float:
    """A 64-bit word as a float in [0, 1), from its upper 53 bits."""
    return (word >> 11) * 2.0**-53


def below(word: int, n: int) -> int:
    """A 64-bit word as an integer in [0, n), by multiplication and shift."""
    return (word * n) >> 64


def centred(height: int, width: int, ratios: tuple[float, float], flip: bool) -> View:
    """The largest centred crop whose width / height lies within `ratios`."""
    ratio = min(max(width / height, ratios[0]), ratios[1])
    h = min(height, max(1, round(width / ratio)))
    w = min(width, max(1, round(height * ratio)))
    return View((height - h) // 2, (width - w) // 2, h, w, flip, height, width)


def render(image: Pixels, view: View, recipe: ViewRecipe) -> Pixels:
    """The view's pixels, uint8 [size, size, 3]: crop, resize with Pillow's antialiased filter, mirror.

    image: as decode_rgb gave it. ValueError when its size is not the one the view was drawn for.
    """
    if image.shape != (view.source_height, view.source_width, 3):
        raise ValueError(f"render: the image is {image.shape}; the view was drawn for "
                         f"({view.source_height}, {view.source_width}, 3); is this the same file?")  # fmt: skip
    crop = image[view.top : view.top + view.height, view.left : view.left + view.width]
    out = Image.fromarray(crop).resize((recipe.size, recipe.size), FILTERS[recipe.interpolation])
    return np.asarray(out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else out, np.uint8).copy()


def encode_jpeg(pixels: Pixels) -> bytes:
    """Baseline JPEG, quality 95, full chroma resolution (4:4:4)."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95, subsampling="4:4:4")
    return out.getvalue()


def decode_jpeg(data: bytes) -> Pixels:
    """Pixels of a stored view, uint8 [h, w, 3]. Raises BadImage when it does not decode."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"), np.uint8).copy()
    except OSError as error:
        raise BadImage(f"stored view does not decode: {error}") from None
