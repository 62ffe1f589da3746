"""Views: decode an image as a viewer shows it, draw a crop and a flip from (seed, key, view), render it, exactly.

A drawn view is recorded; replaying it never draws again. Everything here is uint8 height x width x 3 in sRGB.
"""

import contextlib
import dataclasses
import io
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, features

from mrmae.shards.room import Room
from mrmae.shards.spec import ViewRecipe
from mrmae.shards.tiff import BITS, PHOTOMETRIC, tiff_defect, tiff_in_words, unopened_tiff

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# A closed list: Pillow's other plugins include one that starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF")
MAX_PIXELS = 178_956_970  # what Pillow refuses as a bomb by default: 0.5 GB of RGB
MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"RIFF": "WEBP",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*": "TIFF",
    b"MM\0": "TIFF",
}
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# By EXIF orientation: a view of upright pixels in which they lie as the file stores them.
AS_STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}
TILE = 1 << 18  # pixels converted together: what lies beside an image and its result stays small
# At the peak of decoding, measured: 7.5 to 7.6 for RGB, RGBA and CMYK, 4.5 for gray; rendering takes 3 and 7 for the crop.
# A progressive JPEG holds all coefficients, a WebP two canvases, a compressed TIFF a strip, which may be the whole image.
PIXEL_BYTES = {"progressive": 16, "WEBP": 18, "AVIF": 14, "TIFF": 16}  # others: 10
DECODING_BYTES = 4 << 30
DECODING = Room(DECODING_BYTES)
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


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The first frame as uint8 [height, width, 3], as a viewer shows it.

    EXIF orientation is applied, ICC profiles are converted to sRGB (a broken profile is ignored), alpha is laid over
    white, 16-bit gray is rounded to 8 bits, CMYK, palette and gray become RGB.
    Raises BadImage for anything that does not decode completely, and, before decoding, above `max_pixels`.
    """
    with decoded(data, max_pixels=max_pixels) as image:
        return image


@contextlib.contextmanager
def decoded(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Iterator[Pixels]:
    """The image as decode_rgb gives it, for as long as its memory is needed.

    All threads together hold at most DECODING_BYTES of images: more wait, after the header and before the first pixel.
    """
    with contextlib.ExitStack() as held:
        with bad_if_it_fails(data):
            image = held.enter_context(contextlib.closing(open_image(data)))
            refuse_by_header(image, max_pixels)
        held.enter_context(DECODING.taken(decoding_bytes(image)))
        with bad_if_it_fails(data):
            pixels = upright_pixels(image)
        image.close()
        del image
        yield pixels


@contextlib.contextmanager
def bad_if_it_fails(data: bytes) -> Iterator[None]:
    """Whatever Pillow raises inside becomes a BadImage with its reason."""
    try:
        with only_our_limit():
            yield
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(unidentified(data)) from None
    except Exception as error:  # noqa: BLE001  Pillow's parsers raise nearly any type on damaged files
        raise BadImage(f"does not decode: {error or type(error).__name__}") from None


def open_image(data: bytes) -> Image.Image:
    """The image, its header read and no pixel yet."""
    if not data:
        raise BadImage("the file has zero bytes")
    if brand(data) in ("avif", "avis") and not features.check("avif"):
        raise BadImage("is AVIF, which this build of Pillow cannot decode; install one that can, or save it as PNG")
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decoding_bytes(image: Image.Image) -> int:
    """About what decoding an opened image takes at its peak, and rendering views of it."""
    format = "progressive" if image.info.get("progressive") else image.format or ""
    return image.width * image.height * PIXEL_BYTES.get(format, 10)


@dataclasses.dataclass
class PillowLimit:
    """Pillow's global limit while it is set aside: by how many threads, and what it was."""

    lock: threading.Lock
    users: int = 0
    kept: int | None = None


PILLOW_LIMIT = PillowLimit(threading.Lock())


@contextlib.contextmanager
def only_our_limit() -> Iterator[None]:
    """Inside, Pillow neither refuses nor warns of large images; outside, its limit is as the program that imports us left it.

    Pillow's limit is one global of the process, which it checks when it opens images and again in TIFF, WebP and crop.
    The first thread to come in sets it aside and the last to leave puts it back, unless somebody has set another meanwhile.
    """
    with PILLOW_LIMIT.lock:
        if not PILLOW_LIMIT.users:
            PILLOW_LIMIT.kept, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        PILLOW_LIMIT.users += 1
    try:
        yield
    finally:
        with PILLOW_LIMIT.lock:
            PILLOW_LIMIT.users -= 1
            if not PILLOW_LIMIT.users and Image.MAX_IMAGE_PIXELS is None:
                Image.MAX_IMAGE_PIXELS = PILLOW_LIMIT.kept


def brand(data: bytes) -> str:
    """The four letters by which AVIF and HEIF files name themselves; empty for others."""
    return data[8:12].decode("latin-1") if data[4:8] == b"ftyp" else ""


def unidentified(data: bytes) -> str:
    """Why bytes that no decoder takes are no image of ours."""
    if brand(data) in ("heic", "heix", "hevc", "mif1", "msf1"):
        return f"is HEIF (brand {brand(data)}), which is not decoded; save it as PNG or JPEG"
    if data[:2] in (b"II", b"MM") and (what := unopened_tiff(data)):
        return f"{what}, which is not decoded; save it with 8 or 16 unsigned bits"
    format = next((format for magic, format in MAGIC.items() if data.startswith(magic)), None)
    if format:
        return f"begins like {format}, but its header is cut, damaged or of a kind that is not decoded{refusal(data, format)}"
    return f"not an image in a known format; first bytes {data[:8]!r}"


def refusal(data: bytes, format: str) -> str:
    """What Pillow's reader of this format has against the bytes, behind a colon; empty where it does not say."""
    try:
        Image.OPEN[format][0](io.BytesIO(data), "")
    except Exception as error:  # noqa: BLE001  Pillow's parsers raise nearly any type on damaged files
        return f": {error}" if str(error) else ""
    return ""


def refuse_by_header(image: Image.Image, max_pixels: int) -> None:
    """BadImage for an opened image that is too large, or that Pillow would decode wrongly."""
    if image.width * image.height > max_pixels:
        raise BadImage(
            f"refused before decoding: {image.width} x {image.height} pixels; at most {max_pixels} are allowed"
        )
    if (tags := tiff_tags(image)) and (defect := tiff_defect(tags)):
        raise BadImage(f"{tiff_in_words(tags)}: {defect}")


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF; none for other formats."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def upright_pixels(image: Image.Image) -> Pixels:
    """Pixels of an opened, not yet loaded image, converted in tiles: beside Pillow's own there is one copy, the result."""
    eight = gray_depth(image)
    profile = image.info.get("icc_profile")
    image.load()
    turn = orientation(image)  # after load: TIFF images come upright from it
    width, height = image.size
    out = np.empty((width, height, 3) if turn in (5, 6, 7, 8) else (height, width, 3), np.uint8)
    stored = AS_STORED.get(turn, AS_STORED[1])(out)
    convert: Callable[[Image.Image], Image.Image] | None = None
    for box in tiles(width, height):
        tile = image if box == (0, 0, width, height) else image.crop(box)
        colour, alpha = split_alpha(eight(tile))
        convert = convert or to_srgb(colour, profile)
        colour = convert(colour)
        if alpha is not None:
            colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
        stored[box[1] : box[3], box[0] : box[2]] = np.asarray(colour, np.uint8)
    return out


def tiles(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) that cover an image, of at most TILE pixels each."""
    w = min(width, TILE)
    h = max(1, TILE // w)
    for top in range(0, height, h):
        for left in range(0, width, w):
            yield left, top, min(left + w, width), min(top + h, height)


def gray_depth(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes 8 bits of tiles of an opened image: nothing where it has no more."""
    tags = tiff_tags(image)
    inverted = bool(tags) and tags.get(PHOTOMETRIC, 0) == 0  # zero is white, which Pillow overlooks in 16-bit files
    bits = int(tags.get(BITS, (16,))[0])  # 12 in 12-bit TIFFs, which Pillow unpacks without scaling
    if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I"):  # there scaled to 16 bits
        return lambda tile: eight_bits(tile, bits, inverted)
    if image.mode in ("I", "F"):
        raise BadImage(f"samples are 32-bit or signed (mode {image.mode}), so white is undefined; "
                       "save it with 8 or 16 unsigned bits")  # fmt: skip
    return lambda tile: tile


def eight_bits(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """A 16-bit gray image rounded to 8 bits (Pillow's own conversion clips), as L, or LA where a gray is transparent."""
    top = 2**bits - 1
    wide = np.asarray(image).astype(np.uint32)
    gray = ((wide * 255 + top // 2) // top).clip(0, 255).astype(np.uint8)
    out = Image.fromarray(255 - gray if inverted else gray)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        out.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    return out


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  a damaged EXIF block does not make the pixels bad
        return 1


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour channels without alpha or palette, and alpha as L where the image has any transparency."""
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    elif image.mode in ("1", "L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    if image.mode in ("RGBA", "LA"):
        return image.convert("RGB" if image.mode == "RGBA" else "L"), image.getchannel("A")
    return (image.convert("L") if image.mode == "1" else image), None


def to_srgb(image: Image.Image, profile: bytes | None) -> Callable[[Image.Image], Image.Image]:
    """What converts tiles like this one to sRGB: the ICC profile where that works, else Pillow's plain conversion."""
    if image.mode == "LAB":
        return through_profile("LAB", ImageCms.createProfile("LAB"), 0)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else None
        if source and not ImageCms.getProfileDescription(source).strip().startswith("sRGB"):
            convert = through_profile(image.mode, source, ImageCms.getDefaultIntent(source))
            convert(image)  # a profile that does not fit shows only here
            return convert
    except Exception:  # noqa: BLE001  a broken or mismatched profile is ignored, as viewers do
        pass
    return lambda tile: tile.convert("RGB")


def through_profile(mode: str, source: Any, intent: Any) -> Callable[[Image.Image], Image.Image]:
    """What converts images of this mode from `source` to sRGB."""
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    return transform.apply


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
