"""A zoo of image files: each is decoded to the pixels it was made of, or refused with a reason that names what is wrong.

Expected pixels are those the file was made of; for lossy files, and where a writer adds its own conversion, those of a
decoder that shares nothing with Pillow's (imagecodecs, tifffile). Warnings are errors: none may turn a good image bad.
"""

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from mrmae.extract.images.decode import decode_rgb
from mrmae.shards.format.views import BadImage, Pixels

pytestmark = pytest.mark.filterwarnings("error")
HEIGHT, WIDTH = 19, 45  # odd, and no multiple of a tile
Y, X = np.mgrid[:HEIGHT, :WIDTH]
COLOUR = np.stack([X / (WIDTH - 1), Y / (HEIGHT - 1), (np.sin(X / 5) + 1) / 2], -1)  # 0 to 1
ALPHA = np.where(X % 2, 1.0, 0.5)[..., None]
ON_WHITE = COLOUR * ALPHA + 1 - ALPHA


def as_bytes(share: Any) -> Pixels:
    return np.ascontiguousarray(np.rint(np.asarray(share) * 255).astype(np.uint8))


def as_gray(share: Any) -> Any:
    return np.repeat(share[..., :1], 3, -1)


RGB, RGBA = as_bytes(COLOUR), as_bytes(np.concatenate([COLOUR, ALPHA], -1))
GRAY = np.ascontiguousarray(RGB[..., 0])


def saved(image: Any, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def distance(data: bytes, expected: Any) -> int:
    """The largest difference of a decoded value."""
    got = decode_rgb(data)
    expected = np.asarray(expected)
    expected = np.repeat(expected[..., None], 3, -1) if expected.ndim == 2 else expected
    assert got.shape == expected.shape
    return int(abs(got.astype(int) - expected).max())


# --- TIFF


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # samples, what a viewer shows, tags
    "gray": (COLOUR[..., :1], as_gray(COLOUR), {"photometric": "minisblack"}),
    "zero is white": (COLOUR[..., :1], as_gray(1 - COLOUR), {"photometric": "miniswhite"}),
    "gray+alpha": (np.concatenate([COLOUR[..., :1], ALPHA], -1), as_gray(ON_WHITE),
                   {"photometric": "minisblack", "extrasamples": ["unassalpha"]}),
    "rgb": (COLOUR, COLOUR, {"photometric": "rgb"}),
    "rgb+alpha": (np.concatenate([COLOUR, ALPHA], -1), ON_WHITE, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "rgb+premultiplied": (np.concatenate([COLOUR * ALPHA, ALPHA], -1), ON_WHITE,
                          {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
    "rgb+infrared": (np.concatenate([COLOUR, ALPHA], -1), COLOUR, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    "cmyk": (np.concatenate([1 - COLOUR, 1 - ALPHA], -1), COLOUR * ALPHA, {"photometric": "separated"}),
}  # fmt: skip
DEPTHS = {"u1": 255, "u2": 65535, "u4": 2**32 - 1, "i1": 127, "i2": 32767, "i4": 2**31 - 1, "f2": 1, "f4": 1, "f8": 1}
STORED = [  # planar, byte order, compression, predictor, tile
    (planar, order, *packed, tile)
    for planar, order, packed, tile in itertools.product(
        ("contig", "separate"), "<>", ((None, None), ("lzw", None), ("zlib", True), ("packbits", None)), (None, (16, 32)))
]  # fmt: skip


def tiffs(kind: str, depth: str) -> Iterator[tuple[str, bytes]]:
    """(how it is stored, file) of a kind and depth."""
    share, _, tags = KINDS[kind]
    samples = np.rint(share * DEPTHS[depth]) if DEPTHS[depth] > 1 else share
    for planar, order, compression, predictor, tile in STORED:
        if share.shape[-1] == 1 and planar == "separate":
            continue
        array = np.moveaxis(samples, -1, 0) if planar == "separate" else samples
        more = {"planarconfig": planar} if share.shape[-1] > 1 else {}
        array = array[..., 0] if share.shape[-1] == 1 else array
        out = io.BytesIO()
        predictor = 3 if predictor and depth.startswith("f") else predictor
        tifffile.imwrite(out, np.ascontiguousarray(array.astype(depth)), byteorder=order, compression=compression,
                         predictor=predictor, tile=tile, metadata=None, **tags, **more)  # fmt: skip
        yield f"{planar} {order} {compression} {tile}", out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiff_is_decoded_to_its_pixels_or_refused_by_what_it_is(kind: str) -> None:
    """Within two levels: 16-bit colour keeps its high byte."""
    decoded = set()
    for depth in DEPTHS:
        for how, data in tiffs(kind, depth):
            try:
                assert distance(data, as_bytes(KINDS[kind][1])) <= 2, f"{depth} {how}"
                decoded.add((depth, *how.split()[:1]))
            except BadImage as error:
                assert error.reason.startswith("TIFF of ") or "white is undefined" in error.reason, (
                    depth,
                    how,
                    error.reason,
                )
    assert ("u1", "contig") in decoded and all(depth in ("u1", "u2") for depth, _ in decoded)
    assert ("u2", "contig") in decoded or kind == "gray+alpha"


@pytest.mark.parametrize("kind, depth, planar, compression", [
    ("rgb", "u2", "separate", None), ("rgb+alpha", "u2", "separate", None), ("cmyk", "u2", "separate", None),
    ("gray+alpha", "u1", "separate", "lzw"), ("gray", "i1", "contig", None),
])  # fmt: skip
def test_tiffs_that_pillow_decodes_wrongly_are_refused_by_their_tags(kind, depth, planar, compression) -> None:
    how = f"{planar} < {compression} None"
    data = dict(tiffs(kind, depth))[how]
    with Image.open(io.BytesIO(data)) as image:  # should Pillow mend this one day, the refusal can go
        wrong = abs(np.asarray(image.convert("RGB"), int) - as_bytes(KINDS[kind][1])).mean()
        assert wrong > 10
    with pytest.raises(BadImage, match="^TIFF of .*save it with"):
        decode_rgb(data)


def tiff(array: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, metadata=None, **options)
    return out.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
@pytest.mark.parametrize("colour", ["minisblack", "miniswhite"])
def test_tiffs_of_few_bits_reach_black_and_white(bits: int, colour: str) -> None:
    values = ((X + Y) % 2**bits).astype(np.uint8 if bits < 8 else np.uint16)
    data = tiff(values, photometric=colour, bitspersample=bits)
    share = values / (2**bits - 1)
    if (bits, colour) == (12, "miniswhite"):
        with pytest.raises(BadImage, match=r"TIFF of 1 x 12-bit unsigned samples, gray \(zero is white\)"):
            decode_rgb(data)
    else:
        assert distance(data, as_bytes(1 - share if colour == "miniswhite" else share)) == 0


def test_palettes_subsampled_colour_and_foreign_inks_of_tiffs() -> None:
    colours = np.random.default_rng(0).integers(1, 256, (3, 256)).astype(np.uint16)
    assert distance(tiff(GRAY, photometric="palette", colormap=colours * 257), colours.T[GRAY]) == 0
    with pytest.raises(BadImage, match="its palette is written in 8 instead of 16 bits"):
        decode_rgb(tiff(GRAY, photometric="palette", colormap=colours))
    cmyk = as_bytes(KINDS["cmyk"][0])
    with pytest.raises(BadImage, match="its inks are not cyan"):
        decode_rgb(tiff(cmyk, photometric="separated", extratags=[(332, 3, 1, 2, True)]))
    plain = tiff(RGB, photometric="ycbcr")
    assert decode_rgb(plain).shape == RGB.shape
    entry = struct.pack("<HHI", 530, 3, 2)
    assert entry in plain
    with pytest.raises(BadImage, match="its colour is subsampled without compression"):
        decode_rgb(plain.replace(entry + struct.pack("<HH", 1, 1), entry + struct.pack("<HH", 2, 2)))


@pytest.mark.parametrize("colour, options", [
    ("ycbcr", {"subsampling": (1, 1)}), ("ycbcr", {"subsampling": (2, 2), "tile": (16, 32)}), ("rgb", {}), ("minisblack", {}),
])  # fmt: skip
def test_jpeg_in_tiff_is_what_tifffile_reads(colour: str, options: dict[str, Any]) -> None:
    array = GRAY if colour == "minisblack" else RGB
    data = tiff(array, photometric=colour, compression="jpeg", **options)
    assert distance(data, tifffile.imread(io.BytesIO(data))) <= 1


def test_the_first_page_of_a_tiff_and_big_tiffs_are_read() -> None:
    assert distance(tiff(np.stack([RGB, 255 - RGB]), photometric="rgb", bigtiff=True), RGB) == 0
    with pytest.raises(
        BadImage, match="TIFF of 3 x 8-bit unsigned samples, RGB, compression 50002, which is not decoded"
    ):
        decode_rgb(tiff(RGB, photometric="rgb", compression="jpegxl"))


# --- PNG, written by hand: every colour type and depth, plain and interlaced


def packed(rows: Any, depth: int) -> bytes:
    """Rows of samples as a PNG's lines, filter 0."""
    if depth == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    bits = (
        ((rows.reshape(len(rows), -1, 1) >> np.arange(depth - 1, -1, -1)) & 1).reshape(len(rows), -1).astype(np.uint8)
    )
    return b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)


def png(
    samples: Any, depth: int, colour: int, *, interlaced: bool = False, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    """samples: [height, width, channels]."""
    height, width = samples.shape[:2]
    adam7 = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    passes = [samples[y::dy, x::dx] for y, dy, x, dx in adam7] if interlaced else [samples]
    body = b"".join(packed(part, depth) for part in passes if part.size)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    chunks = [(b"IHDR", head), *extra, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)  # fmt: skip


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour, depth", [
    *((0, depth) for depth in (1, 2, 4, 8, 16)), *((3, depth) for depth in (1, 2, 4, 8)),
    *((colour, depth) for colour in (2, 4, 6) for depth in (8, 16)),
])  # fmt: skip
def test_a_png_of_every_colour_type_and_depth_shows_its_pixels(colour: int, depth: int, interlaced: bool) -> None:
    top = 2**depth - 1
    share = {0: COLOUR[..., :1], 2: COLOUR, 3: COLOUR[..., :1], 4: KINDS["gray+alpha"][0], 6: KINDS["rgb+alpha"][0]}[
        colour
    ]
    samples = np.rint(share * top).astype(np.int64)
    seen = {2: samples / top, 4: as_gray(ON_WHITE), 6: ON_WHITE}.get(colour, as_gray(samples / top))
    palette = np.random.default_rng(0).integers(0, 256, (2**depth if colour == 3 else 1, 3)).astype(np.uint8)
    data = png(
        samples, depth, colour, interlaced=interlaced, extra=((b"PLTE", palette.tobytes()),) if colour == 3 else ()
    )
    expected = palette[samples[..., 0]] if colour == 3 else as_bytes(seen)
    assert distance(data, expected) <= (1 if colour in (2, 4, 6) else 0)
    if colour != 3:
        other = imagecodecs.png_decode(data)  # alpha is not laid on anything there
        assert (
            np.array_equal(other.reshape(samples.shape) // (257 if depth == 16 else 1), samples * 255 // top)
            or depth < 16
        )


# --- JPEG


def jpeg(array: Any, **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(array), level=95, **options))


@pytest.mark.parametrize("data", [
    *(saved(RGB, "JPEG", quality=95, subsampling=s, progressive=p) for s in (0, 1, 2) for p in (False, True)),
    jpeg(GRAY), jpeg(RGB, colorspace="RGB", outcolorspace="RGB"), jpeg(GRAY, lossless=True),
    saved(RGB, "JPEG", restart_marker_rows=1), saved(RGB, "JPEG", optimize=True), saved(RGB, "MPO", save_all=True),
], ids=itertools.count())  # fmt: skip
def test_a_jpeg_is_what_another_decoder_makes_of_it(data: bytes) -> None:
    assert distance(data, imagecodecs.jpeg8_decode(data)) <= 1


@pytest.mark.parametrize("colour", ["CMYK", "YCCK"])
def test_cmyk_jpegs_are_inverted_as_photoshop_and_browsers_take_them(colour: str) -> None:
    inks = as_bytes(1 - KINDS["cmyk"][0])
    data = jpeg(inks, colorspace="CMYK", outcolorspace=colour)
    expected = as_bytes(KINDS["cmyk"][1])
    assert abs(decode_rgb(data).astype(int) - expected).mean() < 2
    at = data.index(b"\xff\xee")
    bare = data[:at] + data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] :]  # without Adobe's marker
    if colour == "CMYK":
        assert abs(decode_rgb(bare).astype(int) - expected).mean() < 2


def test_jpegs_of_twelve_bits_and_jpegs_of_later_kinds_are_named() -> None:
    with pytest.raises(BadImage, match="begins like JPEG.*12-bit"):
        decode_rgb(jpeg(GRAY.astype(np.uint16) * 16, bitspersample=12))
    for data in (imagecodecs.jpeg2k_encode(RGB), imagecodecs.jpegxl_encode(RGB)):
        with pytest.raises(BadImage, match="not an image in a known format"):
            decode_rgb(data)


# --- WebP, AVIF, GIF, BMP, PPM


def ppm(magic: str, array: Any, top: int) -> bytes:
    head = f"{magic}\n# made by hand\n{array.shape[1]} {array.shape[0]}\n{top}\n".encode()
    return head + array.astype(">u2" if top > 255 else np.uint8).tobytes()


def text_ppm(magic: str, array: Any, top: int) -> bytes:
    head = f"{magic} {array.shape[1]} {array.shape[0]} {top}\n"
    return (head + "\n".join(" ".join(map(str, row.ravel())) for row in array)).encode()


def levels(top: int, array: Any = RGB) -> Any:
    return np.rint(array / 255 * top).astype(np.int64)


def bmp(
    bits: int, rows: bytes, *, compression: int = 0, more: bytes = b"", colours: int = 0, down: bool = True
) -> bytes:
    """more: masks or palette, behind the header."""
    head = struct.pack(
        "<IiiHHIIiiII", 40, WIDTH, -HEIGHT if down else HEIGHT, 1, bits, compression, len(rows), 0, 0, colours, 0
    )
    return b"BM" + struct.pack("<IHHI", 54 + len(more) + len(rows), 0, 0, 54 + len(more)) + head + more + rows


def lines(array: Any) -> bytes:
    """Rows, each filled up to four bytes."""
    return b"".join(row.tobytes() + bytes(-row.nbytes % 4) for row in array)


BGR = np.ascontiguousarray(RGB[..., ::-1])
FIVE = [levels(31)[..., i] for i in range(3)]
MASKS = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
LADDER = b"".join(struct.pack("4B", 255 - i, i, i // 2, 0) for i in range(256))  # blue, green, red of a palette
RUNS = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in GRAY[::-1]) + b"\0\1"
PALETTE_IMAGE = Image.fromarray(RGB).quantize(64)
EXACT: dict[str, Callable[[], tuple[bytes, Any]]] = {
    "webp lossless": lambda: (saved(RGB, "WEBP", lossless=True), RGB),
    "webp lossless alpha": lambda: (saved(RGBA, "WEBP", lossless=True, exact=True), as_bytes(ON_WHITE)),
    "gif": lambda: (saved(PALETTE_IMAGE, "GIF", interlace=0), PALETTE_IMAGE.convert("RGB")),
    "gif interlaced": lambda: (saved(PALETTE_IMAGE, "GIF", interlace=1), PALETTE_IMAGE.convert("RGB")),
    "bmp 24": lambda: (bmp(24, lines(BGR)), RGB),
    "bmp 24 upwards": lambda: (bmp(24, lines(BGR[::-1]), down=False), RGB),
    "bmp 32": lambda: (bmp(32, lines(np.dstack([BGR, 0 * GRAY]))), RGB),
    "bmp 555": lambda: (bmp(16, lines((FIVE[0] << 10 | FIVE[1] << 5 | FIVE[2]).astype("<u2"))), levels(31) * 255 // 31),
    "bmp 565": lambda: (bmp(16, lines((FIVE[0] << 11 | FIVE[1] << 6 | FIVE[2]).astype("<u2")), compression=3, more=MASKS),
                        np.dstack([FIVE[0] * 255 // 31, (FIVE[1] << 1) * 255 // 63, FIVE[2] * 255 // 31])),
    "bmp 8": lambda: (bmp(8, lines(GRAY), more=LADDER, colours=256), np.dstack([GRAY // 2, GRAY, 255 - GRAY])),
    "bmp rle8": lambda: (bmp(8, RUNS, compression=1, more=LADDER, colours=256, down=False),
                         np.dstack([GRAY // 2, GRAY, 255 - GRAY])),
    "P6": lambda: (ppm("P6", RGB, 255), RGB),
    "P6 16": lambda: (ppm("P6", levels(65535), 65535), RGB),
    "P5": lambda: (ppm("P5", GRAY, 255), GRAY),
    "P5 of 1000": lambda: (ppm("P5", levels(1000, GRAY), 1000), GRAY),
    "P5 16": lambda: (ppm("P5", levels(65535, GRAY), 65535), GRAY),
    "P2": lambda: (text_ppm("P2", GRAY, 255), GRAY),
    "P3": lambda: (text_ppm("P3", RGB, 255), RGB),
    "P4": lambda: (b"P4 %d %d\n" % (WIDTH, HEIGHT) + np.packbits(GRAY < 128, axis=1).tobytes(), (GRAY >= 128) * 255),
}  # fmt: skip
WRITTEN_LOSSY = {
    "webp": lambda: (data := saved(RGB, "WEBP", quality=80), imagecodecs.webp_decode(data)),
    "avif": lambda: (data := saved(RGB, "AVIF", quality=90), imagecodecs.avif_decode(data)),
    "avif gray": lambda: (data := imagecodecs.avif_encode(GRAY, level=90), imagecodecs.avif_decode(data)),
    "avif 10 bits": lambda: (imagecodecs.avif_encode(levels(1023).astype(np.uint16), level=100, bitspersample=10), RGB),
    "avif alpha": lambda: (saved(RGBA, "AVIF", quality=100, subsampling="4:4:4"), as_bytes(ON_WHITE)),
}


@pytest.mark.parametrize("name", EXACT)
def test_lossless_files_show_their_pixels(name: str) -> None:
    assert distance(*EXACT[name]()) <= (1 if "16" in name or "5" in name or "alpha" in name else 0)


@pytest.mark.parametrize("name", WRITTEN_LOSSY)
def test_lossy_files_are_what_another_decoder_makes_of_them(name: str) -> None:
    data, expected = WRITTEN_LOSSY[name]()
    assert distance(data, expected) <= 2


def test_the_first_frame_is_whole_in_every_animated_format() -> None:
    more = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}
    for kind, options in {
        "PNG": {},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }.items():
        assert distance(saved(RGB, kind, **more, **options), RGB) <= (3 if kind == "AVIF" else 0), kind
    gif = saved(PALETTE_IMAGE, "GIF", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    assert distance(gif, PALETTE_IMAGE.convert("RGB")) == 0


# --- damage, and what a header may say


WHOLE = {
    "JPEG": saved(RGB, "JPEG"), "progressive": saved(RGB, "JPEG", progressive=True), "PNG": saved(RGB, "PNG"),
    "interlaced": png(RGB.astype(np.int64), 8, 2, interlaced=True), "WEBP": saved(RGB, "WEBP"), "AVIF": saved(RGB, "AVIF"),
    "lossless": saved(RGB, "WEBP", lossless=True), "GIF": EXACT["gif"]()[0],
    "TIFF": tiff(RGB, photometric="rgb"), "LZW": tiff(RGB, photometric="rgb", compression="lzw"),
    "tiles": tiff(RGB, photometric="rgb", tile=(16, 16)), "BMP": EXACT["bmp 24"]()[0], "rle8": EXACT["bmp rle8"]()[0],
    "P6": EXACT["P6"]()[0], "P3": EXACT["P3"]()[0], "P5": EXACT["P5 16"]()[0],
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_a_truncated_file_is_refused_or_lost_nothing(kind: str) -> None:
    data = WHOLE[kind]
    whole = decode_rgb(data)
    last = len(data) - (4 if kind == "P3" else 1)  # a text whose last number lost a digit is a text
    for kept in sorted({*range(0, 40, 3), *np.linspace(0, last, 40).astype(int).tolist()}):
        try:
            assert np.array_equal(decode_rgb(data[:kept]), whole), f"{kept} of {len(data)} bytes"
        except BadImage as error:
            assert error.reason


@pytest.mark.parametrize("kind", WHOLE)
def test_garbage_behind_the_end_changes_nothing(kind: str) -> None:
    if kind != "P3":  # text goes on
        assert np.array_equal(decode_rgb(WHOLE[kind] + b"\0\xffgarbage" * 50), decode_rgb(WHOLE[kind]))


def huge(kind: str) -> bytes:
    """A small file whose header says 60,000 x 60,000 pixels."""
    data, side = bytearray(WHOLE[kind]), 60_000
    if kind == "PNG":
        return (
            bytes(data[:16])
            + (head := struct.pack(">II", side, side) + data[24:29])
            + struct.pack(">I", zlib.crc32(b"IHDR" + head))
            + data[33:]
        )
    if kind == "P6":
        return bytes(data).replace(b"%d %d" % (WIDTH, HEIGHT), b"%d %d" % (side, side))
    if kind == "TIFF":
        for tag, value in ((256, WIDTH), (257, HEIGHT)):
            old = struct.pack("<HHII", tag, 4, 1, value)
            assert old in data
            data = data.replace(old, struct.pack("<HHII", tag, 4, 1, side))
        return bytes(data)
    at, form = {
        "JPEG": (data.find(b"\xff\xc0") + 5, ">HH"),
        "GIF": (6, "<HH"),
        "BMP": (18, "<ii"),
        "lossless": (21, "<I"),
    }[kind]
    sizes = ((1 << 28) - 1,) if kind == "lossless" else (side, side)
    struct.pack_into(form, data, at, *sizes)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "P6", "TIFF", "GIF", "BMP", "lossless"])
def test_a_header_that_says_huge_is_refused_before_any_pixel(kind: str) -> None:
    with pytest.raises(
        BadImage, match="refused before decoding: (60000 x 60000|16384 x 16384) pixels; at most 178956970"
    ):
        decode_rgb(huge(kind))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9000), (9000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF"])
def test_one_pixel_and_one_line_are_images(kind: str, height: int, width: int) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    assert distance(saved(image, kind), image) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_images_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = Image.fromarray(RGB)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpositions that the orientation tells to undo
    if orientation > 1:
        turned = turned.transpose(Image.Transpose(undo[orientation]))
    data = saved(turned, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    assert distance(data, RGB) <= 4
