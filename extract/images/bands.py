"""Images as numbers: every band of a TIFF, a .npy, a PNG or a photograph as the file holds it, or the reason why they cannot be kept so."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator

import numpy as np

from mrmae.extract.images.decode import (
    AS_STORED,
    DECODING,
    MAX_PIXELS,
    bad_if_it_fails,
    decoded,
    open_image,
    orientation,
    refuse_pixels,
)
from mrmae.shards.format import Array, BadImage, Encoding, Pixels
from mrmae.shards.store import undisturbed

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
COPIES = 4  # of an image in memory at the peak: as the file has it, upright, checked, and a crop's bands as floats
MODES = {
    "L": 1,
    "LA": 2,
    "RGB": 3,
    "RGBA": 4,
    "I;16": 1,
    "I;16B": 1,
    "I;16L": 1,
}  # of Pillow's, those that are the file's own numbers


@dataclasses.dataclass(frozen=True)
class OpenedBands:
    """An image whose header is read. turn: its EXIF orientation. read: gives its numbers, [h, w, bands] as they lie in the file."""

    height: int
    width: int
    bands: int
    dtype: "np.dtype[np.generic]"
    read: Callable[[], Array]
    turn: int = 1


def decoded_as(
    data: bytes, encoding: Encoding, *, max_pixels: int = MAX_PIXELS, where: str = "this image"
) -> contextlib.AbstractContextManager[Pixels]:
    """The image as views of this encoding hold it, for as long as its memory is needed: as shown, or its own bands.

    where: how messages name the file. Raises BadImage as `decoded` does, and for other bands than the encoding's or numbers that
    are not finite; ValueError where what reads TIFFs is not installed.
    """
    return (
        decoded(data, max_pixels=max_pixels) if encoding.as_shown else decoded_bands(data, encoding, max_pixels, where)
    )


@contextlib.contextmanager
def decoded_bands(data: bytes, encoding: Encoding, max_pixels: int, where: str) -> Iterator[Pixels]:
    """The upright image, [height, width, bands], every number as the file holds it."""
    if data[:4] in TIFF_MAGIC:
        refuse_without_tifffile(where)
    with contextlib.ExitStack() as held:
        with bad_if_it_fails(data):
            opened = held.enter_context(open_bands(data, encoding.bands))
            refuse_pixels(opened.width, opened.height, max_pixels)
            refuse_other_bands(opened, encoding)
        dtype = np.dtype(encoding.dtype)
        held.enter_context(DECODING.taken(COPIES * opened.height * opened.width * opened.bands * dtype.itemsize))
        with bad_if_it_fails(data):
            pixels = upright(opened, dtype)
            refuse_not_finite(pixels)
        yield pixels


def refuse_without_tifffile(where: str) -> None:
    """ValueError where tifffile is not installed."""
    try:
        import tifffile  # noqa: F401  PLC0415  an extra
    except ImportError:
        raise ValueError(f"{where}: is a TIFF, whose bands are read with tifffile, which is not installed; pip install 'mrmae[bands]', or save "
                         "the images as .npy") from None  # fmt: skip


@contextlib.contextmanager
def open_bands(data: bytes, bands: int) -> Iterator[OpenedBands]:
    """The image, its header read and no number yet. bands: how many are wanted, which decides where an axis could be either."""
    if data.startswith(NPY_MAGIC):
        yield open_npy(data, bands)
    elif data[:4] in TIFF_MAGIC:
        with open_tiff(data) as opened:
            yield opened
    else:
        with contextlib.closing(open_image(data)) as image:
            refuse_changed_numbers(data, image.mode)
            dtype = np.dtype(np.uint16 if image.mode.startswith("I;16") else np.uint8)
            count = MODES[image.mode]
            turn = orientation(image)
            yield OpenedBands(
                image.height, image.width, count, dtype, lambda: np.atleast_3d(np.asarray(image, dtype)), turn
            )


def open_npy(data: bytes, bands: int) -> OpenedBands:
    """A .npy of [h, w], [h, w, bands], or [bands, h, w] where only the first axis has that length."""
    file = io.BytesIO(data)
    shape, _, dtype = undisturbed(lambda: npy_about(file))
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImage(
            f"holds an array {list(shape)}; [height, width] or [height, width, bands] was expected; save it so"
        )
    first = len(shape) == 3 and shape[2] != bands == shape[0]
    height, width, count = (shape[1], shape[2], shape[0]) if first else (*shape[:2], 1 if len(shape) == 2 else shape[2])

    def read() -> Array:
        file.seek(0)
        array: Array = undisturbed(lambda: np.load(io.BytesIO(data), allow_pickle=False))
        return np.moveaxis(array, 0, -1) if first else array.reshape(height, width, count)

    return OpenedBands(height, width, count, dtype, read)


def npy_about(file: io.BytesIO) -> tuple[tuple[int, ...], bool, "np.dtype[np.generic]"]:
    """(shape, whether in Fortran's order, dtype) of a .npy."""
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


@contextlib.contextmanager
def open_tiff(data: bytes) -> Iterator[OpenedBands]:
    """A TIFF's first series: one page, whose samples are the bands, or equal pages, which are."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series, turn = file.series[0], file.pages.first.tags.get("Orientation")
        kept = [(name, n) for name, n in zip(series.axes, series.shape) if n > 1 or name in "YX"]
        others = [name for name, _ in kept if name not in "YX"]
        if "Y" not in series.axes or "X" not in series.axes or len(others) > 1:
            raise BadImage(f"is a TIFF with the axes {series.axes} of {list(series.shape)}; rows, columns and one axis of bands were "
                           "expected; save it so")  # fmt: skip
        sizes, order = dict(kept), [[name for name, _ in kept].index(name) for name in ("Y", "X", *others)]

        def read() -> Array:
            array = np.asarray(series.asarray()).reshape([n for _, n in kept])
            return np.atleast_3d(array.transpose(order))

        count = sizes[others[0]] if others else 1
        dtype = np.dtype(series.dtype)
        yield OpenedBands(sizes["Y"], sizes["X"], count, dtype, read, int(turn.value) if turn is not None else 1)


def refuse_changed_numbers(data: bytes, mode: str) -> None:
    """BadImage for an image that Pillow opens with other numbers than its file holds."""
    if data[1:4] == b"PNG" and (data[24] not in (8, 16) or (data[24] == 16 and data[25] != 0)):
        kind = "with colour or alpha" if data[24] == 16 else "gray or palette"
        raise BadImage(f"is a {data[24]}-bit PNG {kind}, whose bands are not read; save it as TIFF or .npy")
    if mode not in MODES:
        raise BadImage(f"has mode {mode}, whose bands are not read; save it as TIFF or .npy")


def refuse_other_bands(opened: OpenedBands, encoding: Encoding) -> None:
    """BadImage for other bands, or another dtype, than the views hold. float32 also takes what it holds exactly."""
    dtype = opened.dtype.newbyteorder("=")
    exact = encoding.dtype == "float32" and dtype.kind in "iuf" and np.can_cast(dtype, np.float32, "safe")
    if opened.bands != encoding.bands or (dtype != np.dtype(encoding.dtype) and not exact):
        raise BadImage(f"has {opened.bands} x {dtype} per pixel; {encoding.bands} x {encoding.dtype} were expected "
                       f"(--encoding {encoding.name}); all images of a cache have the same bands; leave this one out, or convert it")  # fmt: skip


def upright(opened: OpenedBands, dtype: "np.dtype[np.generic]") -> Pixels:
    """The numbers in the machine's byte order, turned as the orientation says."""
    height, width = (opened.width, opened.height) if opened.turn in (5, 6, 7, 8) else (opened.height, opened.width)
    out = np.empty((height, width, opened.bands), dtype)
    AS_STORED.get(opened.turn, AS_STORED[1])(out)[...] = opened.read()
    return out


def refuse_not_finite(pixels: Pixels) -> None:
    """BadImage naming the first NaN or infinity, its band (from 1) and place."""
    if pixels.dtype.kind != "f" or np.isfinite(pixels).all():
        return
    wrong = ~np.isfinite(pixels)
    row, column, band = np.argwhere(wrong)[0].tolist()
    raise BadImage(f"band {band + 1} holds {pixels[row, column, band]} at row {row}, column {column} ({int(wrong.sum())} such numbers); finite "
                   "ones were expected; fill them, or leave this image out")  # fmt: skip
