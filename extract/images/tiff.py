"""TIFFs that Pillow would open and decode wrongly, by their tags, and in words what those are that it does not open."""

import io
from collections.abc import Mapping
from typing import Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

BITS, COMPRESSION, PHOTOMETRIC, SAMPLES_TAG, PLANAR, PALETTE = 258, 259, 262, 277, 284, 320
INKS, EXTRA, FORMAT_TAG, SUBSAMPLING = 332, 338, 339, 530
COLOURS = {0: "gray (zero is white)", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}


def tiff_defect(tags: Mapping[int, Any]) -> str | None:
    """Why the pixels of a TIFF with these tags cannot be trusted; None for all that are decoded rightly.

    Found by comparing every kind that Pillow opens with tifffile: it takes the planes of uncompressed 16-bit files for
    8-bit ones, leaves gray beside alpha in planes black, reads signed bytes as unsigned, and colour that is stored for
    several pixels together as if it were not.
    """
    uncompressed, colour = tags.get(COMPRESSION, 1) == 1, tags.get(PHOTOMETRIC, 0)
    if tags.get(PLANAR, 1) == 2 and tags.get(SAMPLES_TAG, 1) > 1:
        if colour in (0, 1):
            return "save it with its channels interleaved"
        if uncompressed and (max(tags.get(BITS, (1,))) > 8 or tuple(tags.get(EXTRA, (2,))) != (2,)):
            return "save it with its channels interleaved, or compressed"
    if any(kind not in (1, 4) for kind in tags.get(FORMAT_TAG, (1,))):
        return "white is undefined; save it with 8 or 16 unsigned bits"
    if colour == 6 and uncompressed and tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1):
        return "its colour is subsampled without compression; save it as RGB"
    if colour == 5 and tags.get(INKS, 1) != 1:
        return "its inks are not cyan, magenta, yellow and black; save it as RGB"
    if colour == 3 and 0 < max(tags.get(PALETTE, (0,))) < 256:
        return "its palette is written in 8 instead of 16 bits; save it again"
    return None


def tiff_in_words(tags: Mapping[int, Any]) -> str:
    """What a TIFF with these tags is, for a person: `TIFF of 3 x 16-bit unsigned samples in planes, RGB, compression 1`."""
    bits, colour, kinds = tags.get(BITS, (1,)), tags.get(PHOTOMETRIC, 0), tags.get(FORMAT_TAG, (1,))
    kind = " and ".join(dict.fromkeys(SAMPLE_FORMATS.get(kind, f"format {kind}") for kind in kinds))
    planes = " in planes" if tags.get(PLANAR, 1) == 2 else ""
    extra = f" + {len(tags[EXTRA])} extra" if EXTRA in tags else ""
    return (f"TIFF of {tags.get(SAMPLES_TAG, 1)} x {max(bits)}-bit {kind} samples{planes}, {COLOURS.get(colour, f'photometric {colour}')}"
            f"{extra}, compression {tags.get(COMPRESSION, 1)}")  # fmt: skip


def unopened_tiff(data: bytes) -> str | None:
    """What a TIFF that Pillow does not open is, by the tags of its first directory; None where they cannot be read."""
    file = io.BytesIO(data)
    try:
        directory = ImageFileDirectory_v2(file.read(16 if b"+" in data[2:4] else 8))
        file.seek(directory.next)
        directory.load(file)
        return tiff_in_words(directory) if len(directory) else None
    except Exception:  # noqa: BLE001  Pillow's parsers raise nearly any type on damaged files
        return None
