"""Views: every kind of image decodes to what a viewer shows; draws are golden; replays are bit-identical."""

import io
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from mrmae.extract.images import decode
from mrmae.extract.images.decode import decode_rgb
from mrmae.extract.images.room import Room
from mrmae.shards.format.spec import ViewRecipe
from mrmae.shards.format.views import BadImage, Pixels, View, render

RECIPE = ViewRecipe(size=32)


def picture(height: int = 20, width: int = 30) -> Pixels:
    """A smooth gradient whose four corners differ."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.cos(x / 9)], -1).astype(np.uint8)


def saved(image: Image.Image | Pixels, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def png(rows: list[bytes], width: int, depth: int, colour: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: Pillow cannot write 16-bit colour."""
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", head), *extra, (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(tags: dict[int, tuple[int, int]], data: bytes, order: str = "<") -> bytes:
    """An uncompressed one-strip TIFF from {tag: (type, value)}; the pixel data follow the header."""
    tags = {**tags, 273: (4, 8), 279: (4, len(data))}
    entries = b""
    for tag, (kind, value) in sorted(tags.items()):
        packed = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        entries += struct.pack(order + "HHI", tag, kind, 1) + packed
    start = 8 + len(data)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + data + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)


@pytest.mark.parametrize("kind,options", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("BMP", {}),
                                          ("TIFF", {"compression": "tiff_lzw"})])  # fmt: skip
def test_lossless_formats_decode_exactly(kind: str, options: dict[str, Any]) -> None:
    assert np.array_equal(decode_rgb(saved(picture(), kind, **options)), picture())


@pytest.mark.parametrize("kind,options", [("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}),
                                          ("WEBP", {"quality": 95})])  # fmt: skip
def test_lossy_formats_decode_closely(kind: str, options: dict[str, Any]) -> None:
    assert abs(decode_rgb(saved(picture(), kind, **options)).astype(int) - picture()).max() <= 16


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    upright = picture()
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1], 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    got = decode_rgb(saved(np.ascontiguousarray(stored), kind, exif=exif, **options))
    assert got.shape == upright.shape
    assert abs(got.astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)


def test_gray_and_one_bit_images_become_equal_channels() -> None:
    gray = picture()[..., 0]
    assert np.array_equal(decode_rgb(saved(gray, "PNG")), np.repeat(gray[..., None], 3, -1))
    bits = Image.fromarray(gray > 100)
    assert np.array_equal(decode_rgb(saved(bits, "PNG"))[..., 1], (gray > 100) * np.uint8(255))


def test_adobe_inverted_cmyk_jpeg_is_not_a_negative() -> None:
    cmyk = Image.fromarray(picture()).convert("CMYK")
    data = saved(cmyk, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data[:64]
    assert abs(decode_rgb(data).astype(int) - picture()).max() <= 6


def test_cmyk_tiff_decodes() -> None:
    cmyk = Image.fromarray(picture()).convert("CMYK")
    assert abs(decode_rgb(saved(cmyk, "TIFF")).astype(int) - picture()).max() <= 1


def test_palette_with_transparency_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 0, 0, 0])
    image.putpixel((1, 0), 1)
    assert decode_rgb(saved(image, "PNG"))[0].tolist() == [[200, 10, 20], [0, 0, 0]]
    for kind in ("PNG", "GIF"):
        assert decode_rgb(saved(image, kind, transparency=1))[0].tolist() == [[200, 10, 20], [255, 255, 255]]
    half = saved(image, "PNG", transparency=bytes([255, 128]))
    assert decode_rgb(half)[0, 1].tolist() == [127, 127, 127]


@pytest.mark.parametrize("mode,pixel,expected", [
    ("RGBA", (100, 0, 200, 0), (255, 255, 255)), ("RGBA", (100, 0, 200, 255), (100, 0, 200)),
    ("RGBA", (100, 0, 200, 128), (177, 127, 227)), ("LA", (0, 128), (127, 127, 127)),
])  # fmt: skip
def test_alpha_lies_on_white(mode: str, pixel: Any, expected: Any) -> None:
    assert tuple(decode_rgb(saved(Image.new(mode, (1, 1), pixel), "PNG"))[0, 0]) == expected


def test_a_transparent_colour_lies_on_white() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decode_rgb(saved(image, "PNG", transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]
    gray = Image.fromarray(np.array([[1, 4]], np.uint8))
    assert decode_rgb(saved(gray, "PNG", transparency=4))[0, :, 0].tolist() == [1, 255]


WIDE = [0, 1, 128, 129, 257, 32768, 65407, 65535]


def test_16_bit_gray_is_rounded_not_clipped() -> None:
    expected = [round(v / 257) for v in WIDE]
    wide = np.array([WIDE], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decode_rgb(saved(wide, kind))[0, :, 0].tolist() == expected, kind
    for order in "<>":
        tags = {256: (3, 8), 257: (3, 1), 258: (3, 16), 259: (3, 1), 262: (3, 1), 277: (3, 1)}
        assert decode_rgb(tiff(tags, struct.pack(order + "8H", *WIDE), order))[0, :, 0].tolist() == expected


def test_16_bit_tiff_with_white_at_zero_is_inverted() -> None:
    tags = {256: (3, 8), 257: (3, 1), 258: (3, 16), 259: (3, 1), 262: (3, 0), 277: (3, 1)}
    got = decode_rgb(tiff(tags, struct.pack("<8H", *WIDE)))
    assert got[0, :, 0].tolist() == [255 - round(v / 257) for v in WIDE]


def test_12_bit_tiff_reaches_white() -> None:
    data = bytes([0xFF, 0xF0, 0x00])  # 0xfff, 0x000
    tags = {256: (3, 2), 257: (3, 1), 258: (3, 12), 259: (3, 1), 262: (3, 1), 277: (3, 1)}
    assert decode_rgb(tiff(tags, data))[0, :, 0].tolist() == [255, 0]


def test_16_bit_gray_png_with_a_transparent_gray_lies_on_white() -> None:
    data = png([struct.pack(">3H", 0, 5, 65535)], 3, 16, 0, (b"tRNS", struct.pack(">H", 5)))
    assert decode_rgb(data)[0, :, 0].tolist() == [0, 255, 255]


def test_16_bit_colour_png_with_a_transparent_colour_lies_on_white() -> None:
    row = struct.pack(">6H", 65535, 0, 0, 1000, 2000, 3000)
    data = png([row], 2, 16, 2, (b"tRNS", struct.pack(">3H", 65535, 0, 0)))
    assert decode_rgb(data)[0].tolist() == [[255, 255, 255], [3, 7, 11]]


def test_lab_tiff_decodes() -> None:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    lab = ImageCms.profileToProfile(Image.fromarray(picture()), *profiles, outputMode="LAB")
    assert lab is not None
    assert np.abs(decode_rgb(saved(lab, "TIFF")).astype(int) - picture()).mean() < 2, "8-bit Lab is coarse"


@pytest.mark.parametrize("colour,channels", [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_png_is_within_one_level(colour: int, channels: int) -> None:
    """Pillow keeps the high byte of 16-bit colour, at most one level from rounding; docs/format.md says so."""
    values = np.array([[v] * channels for v in WIDE], np.uint16)
    if channels in (2, 4):
        values[:, -1] = 65535
    got = decode_rgb(png([values.astype(">u2").tobytes()], 8, 16, colour))[0, :, 0]
    assert all(abs(int(g) - v / 257) < 1 for g, v in zip(got, WIDE))


def test_16_bit_colour_tiff_is_within_one_level() -> None:
    import tifffile

    out = io.BytesIO()
    tifffile.imwrite(out, np.array([[[v, v, v] for v in WIDE]], np.uint16), photometric="rgb")
    got = decode_rgb(out.getvalue())[0, :, 0]
    assert all(abs(int(g) - v / 257) < 1 for g, v in zip(got, WIDE))


@pytest.mark.parametrize("array", [np.ones((2, 2), np.float32), np.ones((2, 2), np.int32)])
def test_samples_without_a_white_are_refused(array: Any) -> None:
    with pytest.raises(BadImage, match="white is undefined"):
        decode_rgb(saved(Image.fromarray(array), "TIFF"))


def swapped_profile() -> bytes:
    """A matrix profile whose red and green primaries are exchanged: impossible to overlook when applied."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    table = {profile[132 + 12 * i : 136 + 12 * i]: 132 + 12 * i for i in range(int.from_bytes(profile[128:132], "big"))}
    out = bytearray(profile)
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    out[red + 4 : red + 12], out[green + 4 : green + 12] = out[green + 4 : green + 12], out[red + 4 : red + 12]
    return bytes(out).replace("sRGB built-in".encode("utf-16-be"), "swap built-in".encode("utf-16-be"))


def test_icc_profiles_are_converted_to_srgb() -> None:
    data = saved(picture(), "PNG", icc_profile=swapped_profile())
    assert abs(decode_rgb(data).astype(int) - picture()[..., [1, 0, 2]]).max() <= 2
    alpha = Image.fromarray(picture()).convert("RGBA")
    data = saved(alpha, "PNG", icc_profile=swapped_profile())
    assert abs(decode_rgb(data).astype(int) - picture()[..., [1, 0, 2]]).max() <= 2


def test_srgb_profiles_change_nothing_and_bad_profiles_are_ignored() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile", srgb[:200], swapped_profile()[:300]):
        assert np.array_equal(decode_rgb(saved(picture(), "PNG", icc_profile=profile)), picture())
    gray = picture()[..., 0]
    got = decode_rgb(saved(gray, "PNG", icc_profile=swapped_profile()))
    assert np.array_equal(got[..., 2], gray), "a colour profile on a gray image does not fit"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=[second], **lossless)
    assert decode_rgb(data)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_truncated_images_are_refused_with_a_reason(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = saved(noise, kind)
    assert decode_rgb(data).shape == (64, 64, 3)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(BadImage) as caught:
            decode_rgb(data[: int(len(data) * share)])
        assert caught.value.reason


def test_empty_and_foreign_files_are_refused_with_a_reason() -> None:
    with pytest.raises(BadImage, match="zero bytes"):
        decode_rgb(b"")
    with pytest.raises(BadImage, match="not an image in a known format; first bytes b'%PDF-1.4'"):
        decode_rgb(b"%PDF-1.4 and so on")
    with pytest.raises(BadImage, match="not an image"):
        decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF"):
        data = saved(picture(), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                damaged[at] = rng.integers(256)
            try:
                assert decode_rgb(bytes(damaged), max_pixels=10**6).shape[2] == 3
            except BadImage as error:
                assert error.reason


def test_a_bomb_is_refused_by_its_header() -> None:
    tiny = png([b"\0"], 1, 8, 0)
    bomb = tiny.replace(struct.pack(">II", 1, 1), struct.pack(">II", 20000, 15000))
    head, ihdr = bomb.index(b"IHDR"), bomb[bomb.index(b"IHDR") :][:17]
    bomb = bomb[: head + 17] + struct.pack(">I", zlib.crc32(ihdr)) + bomb[head + 21 :]
    with pytest.raises(BadImage, match=r"refused before decoding: .*178956970"):
        decode_rgb(bomb)
    with pytest.raises(BadImage, match="at most 599"):
        decode_rgb(saved(picture(), "PNG"), max_pixels=599)
    assert decode_rgb(saved(picture(), "PNG"), max_pixels=600).shape == (20, 30, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "PPM"])
def test_our_limit_of_pixels_is_the_only_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own refuses above twice its number and warns above it, which is an error under PYTHONWARNINGS=error."""
    for theirs in (250, 500):  # of 600 pixels: an error, a warning
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode_rgb(saved(picture(), kind), max_pixels=600).shape == (20, 30, 3)
        with pytest.raises(BadImage, match="30 x 20 pixels; at most 599 are allowed"):
            decode_rgb(saved(picture(), kind), max_pixels=599)
        assert Image.MAX_IMAGE_PIXELS == theirs, "the importing program's limit is as it was"


def test_pillows_limit_comes_back_after_the_last_of_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    data = saved(picture(), "TIFF")
    with ThreadPoolExecutor(8) as pool:
        assert all(image.shape == (20, 30, 3) for image in pool.map(decode_rgb, [data] * 400))
    assert Image.MAX_IMAGE_PIXELS == 250
    with decode.only_our_limit():
        Image.MAX_IMAGE_PIXELS = 300  # by another thread of the program
    assert Image.MAX_IMAGE_PIXELS == 300


def test_what_this_pillow_cannot_decode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadImage, match=r"is HEIF \(brand heic\)"):
        decode_rgb(b"\0\0\0\x18ftypheic" + bytes(12))
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    monkeypatch.setattr(decode.features, "check", lambda feature: False)
    with warnings.catch_warnings(), pytest.raises(BadImage, match="is AVIF, which this build of Pillow cannot decode"):
        warnings.simplefilter("error")
        decode_rgb(saved(picture(), "AVIF"))


def peak_bytes(work: Callable[[], object]) -> int:
    """By how much this process's memory grew at most while it worked (Linux)."""

    def status(field: str) -> int:
        return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P", "L"])
def test_decoding_takes_at_most_what_it_takes_room_for(mode: str) -> None:
    side = 2500
    kind, options = ("JPEG", {"progressive": True}) if mode == "CMYK" else ("PNG", {"compress_level": 1})
    data = saved(Image.new(mode, (side, side), 0), kind, **options)
    with Image.open(io.BytesIO(data)) as image:
        room = decode.decoding_bytes(image)
    assert peak_bytes(lambda: decode_rgb(data)) < room + 20e6, "the last: tiles"


def test_many_threads_hold_no_more_images_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until their views are rendered; order and pixels do not depend on it."""
    side, lock, held, most = 100, threading.Lock(), 0, 0
    data = [saved(Image.new("RGB", (side, side), (i, 0, 0)), "PNG") for i in range(32)]

    def rendered(one: bytes) -> int:
        nonlocal held, most
        with decode.decoded(one) as image:
            with lock:
                held += 1
                most = max(most, held)
            time.sleep(0.002)
            pixel = int(render(image, View(0, 0, side, side, False, side, side), RECIPE)[0, 0, 0])
            with lock:
                held -= 1
        return pixel

    monkeypatch.setattr(decode, "DECODING", Room(35 * side**2))
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(rendered, data)) == list(range(32))
        for damaged in (data[0][:-100], b"no image"):
            with pytest.raises(BadImage):
                pool.submit(rendered, damaged).result()
    assert most == 3 and decode.DECODING.free_bytes == 35 * side**2


def test_tiles_and_their_edges_change_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Image.fromarray(np.dstack([picture(), picture()[..., 0]]))
    files = [saved(half, "PNG", icc_profile=swapped_profile()), saved(half.convert("RGB").quantize(16), "GIF"),
             saved(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100, "TIFF"),
             tiff({256: (3, 30), 257: (3, 20), 258: (3, 16), 259: (3, 1), 262: (3, 1), 277: (3, 1)},
                  (np.arange(600) * 100).astype(">u2").tobytes(), ">"),
             saved(Image.fromarray(picture()).convert("1"), "PNG"), saved(picture(), "JPEG", quality=100)]  # fmt: skip
    whole = [decode_rgb(data) for data in files]
    for tile in (1, 7, 30, 100):
        monkeypatch.setattr(decode, "TILE", tile)
        assert all(np.array_equal(decode_rgb(data), image) for data, image in zip(files, whole))
