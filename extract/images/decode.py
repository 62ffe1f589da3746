"""An image file as a viewer shows it, uint8 height x width x 3 in sRGB, or the reason why it cannot be shown."""

import contextlib
import dataclasses
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, features

from mrmae.extract.images.room import Room
from mrmae.extract.images.tiff import BITS, PHOTOMETRIC, tiff_defect, tiff_in_words, unopened_tiff
from mrmae.shards.format import BadImage, Pixels

# A closed list: Pillow's other plugins include one that starts Ghostscript.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF")
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
    return Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)


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
    refuse_pixels(image.width, image.height, max_pixels)
    if (tags := tiff_tags(image)) and (defect := tiff_defect(tags)):
        raise BadImage(f"{tiff_in_words(tags)}: {defect}")


def refuse_pixels(width: int, height: int, max_pixels: int) -> None:
    """BadImage for more pixels than are allowed."""
    if width * height > max_pixels:
        raise BadImage(f"refused before decoding: {width} x {height} pixels; at most {max_pixels} are allowed")


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
