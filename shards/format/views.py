"""Views: a crop and a flip drawn from (seed, key, view), rendered and stored, exactly.

A drawn view is recorded; replaying it never draws again. Pixels are [height, width, bands]: uint8 in sRGB, or a file's own bands.
"""

import dataclasses
import functools
import io
import math
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from PIL import Image

from mrmae.shards.format.spec import Array, Encoding, ViewRecipe

Pixels = Array  # [h, w, bands], of an encoding's dtype
ZSTD = Zstd(level=1)  # behind byte planes: level 9 saves a twentieth more at ten times the time
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
    """The view's pixels, [size, size, bands]: crop, resize with Pillow's antialiased filter, mirror.

    A crop of the view's size stays as it is, bit for bit. image: as it was decoded. ValueError when its size is not the one the view
    was drawn for.
    """
    stored, size = recipe.stored, (recipe.size, recipe.size)
    if image.shape != (view.source_height, view.source_width, stored.bands):
        raise ValueError(f"render: the image is {image.shape}; the view was drawn for "
                         f"({view.source_height}, {view.source_width}, {stored.bands}); is this the same file?")  # fmt: skip
    crop = image[view.top : view.top + view.height, view.left : view.left + view.width]
    if crop.shape[:2] != size:
        filter = FILTERS[recipe.interpolation]
        if stored.as_shown:
            crop = np.asarray(Image.fromarray(crop).resize(size, filter), np.uint8)
        else:
            crop = np.stack([resized_band(crop[..., band], size, filter) for band in range(stored.bands)], axis=-1)
    return np.ascontiguousarray(crop[:, ::-1] if view.flip else crop).copy()


def resized_band(band: Array, size: tuple[int, int], filter: Image.Resampling) -> Array:
    """A band at another size, in its own dtype: interpolated in fp32; integers are rounded to the nearest (ties to even).

    What a filter overshoots is cut to the dtype's range.
    """
    out = np.asarray(Image.fromarray(band.astype(np.float32)).resize(size, filter), np.float32)
    if band.dtype.kind == "f":
        return out.clip(np.finfo(band.dtype).min, np.finfo(band.dtype).max).astype(band.dtype)
    return np.rint(out).clip(0, np.iinfo(band.dtype).max).astype(band.dtype)


def encode_view(pixels: Pixels, encoding: Encoding) -> bytes:
    """The bytes of a stored view. All encodings but JPEG keep every bit.

    jpg: baseline, quality 95, full chroma resolution (4:4:4). png: RGB, or 16-bit gray. npy.zst: `byte_planes` as .npy in Zstandard.
    """
    if encoding.extension == "npy.zst":
        planes = byte_planes(pixels)
        return bytes(ZSTD.encode(planes_header(planes.shape) + planes.tobytes()))
    out, image = io.BytesIO(), Image.fromarray(pixels if encoding.as_shown else pixels[..., 0])
    if encoding.extension == "png":
        image.save(out, "PNG", compress_level=6)
    else:
        image.save(out, "JPEG", quality=95, subsampling="4:4:4")
    return out.getvalue()


def decode_view(data: bytes, encoding: Encoding, size: int) -> Pixels:
    """Pixels of a stored view, [size, size, bands]. Raises BadImage when it does not decode to that."""
    try:
        if encoding.extension == "npy.zst":
            return unpacked(data, (size, size, encoding.bands), np.dtype(encoding.dtype))
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.size != (size, size):
                raise BadImage(f"stored view has {image.width} x {image.height} pixels; {size} x {size} were expected")
            if encoding.as_shown:
                return np.asarray(image.convert("RGB"), np.uint8).copy()
            return np.asarray(image).astype(np.uint16)[..., None]
    except BadImage:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise BadImage(f"stored view does not decode: {error}") from None


def byte_planes(pixels: Pixels) -> Array:
    """uint8 [bytes, h, w, bands]: every number's lowest byte, then the next: Zstandard packs sensor data a quarter smaller so."""
    little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
    return np.ascontiguousarray(np.moveaxis(little[..., None].view(np.uint8), -1, 0))


def unpacked(data: bytes, shape: tuple[int, int, int], dtype: "np.dtype[Any]") -> Pixels:
    """The numbers whose byte planes lie in Zstandard; no more memory than they need is taken. Raises BadImage for others."""
    header, out = planes_header((dtype.itemsize, *shape)), np.empty((*shape, dtype.itemsize), np.uint8)
    packed = np.empty(len(header) + out.size, np.uint8)
    ZSTD.decode(data, packed)
    if packed[: len(header)].tobytes() != header:
        raise BadImage(f"stored view does not decode: expected {shape[2]} bands of {dtype}")
    np.moveaxis(out, -1, 0)[:] = packed[len(header) :].reshape(dtype.itemsize, *shape)
    return out.view(dtype.newbyteorder("<"))[..., 0].astype(dtype, copy=False)


@functools.cache
def planes_header(shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of a uint8 array of this shape in a .npy file."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue()
