"""A contact sheet of a cache: per image the view, every teacher's tokens as colours, its attention, and the maps."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mrmae.common.pictures import (
    CELL,
    COLOUR_NOTE,
    ENOUGH_IMAGES,
    STRIPES_NOTE,
    Pictures,
    Strip,
    as_bytes,
    colour_images,
    content_rgb,
    draw_sheet,
    heat,
    pca_rgb,
    publish_png,
    ranges,
    refuse_to_replace,
    stretch_of,
)
from mrmae.common.progress import counted
from mrmae.extract.boxes import BoxFile
from mrmae.extract.made_maps import made_in_words
from mrmae.shards.cache import Cache
from mrmae.shards.format import Array, Numbers

GOLDEN_RATIO = 0.618033988749895
SHOWN_IDS = 8
BOX_COLOUR = (255, 214, 0)


def contact_sheet(
    cache: Cache, n: int, *, view: int = 0, bands: Sequence[int] | None = None, boxes: BoxFile | None = None
) -> Image.Image:
    """n samples spread over the cache, a row each: view, per teacher its tokens, and attention or token norms; the maps; the boxes.

    bands: which of the view's, from 1; None: RGB as it is, and of other views the first three. With boxes only samples that have some
    are shown.
    """
    if not len(cache.numbers):
        raise ValueError(f"{cache.path}: no sample can be read; expected at least one to show")
    among = cache.numbers
    if boxes is not None:
        boxes.refuse_unfit(cache, cache.numbers)
        keys = cache.keys[:]
        among = np.array([number for number in cache.numbers.tolist() if keys[number] in boxes.corners], np.int64)
    numbers = spread(among, n)
    keys = [cache.keys[number] for number in numbers]
    pixels, note = cache.read_pixels(numbers, numbers * 0 + view), f"as the teachers saw it, {cache.size} px"
    if cache.encoding.as_shown and not bands:
        shown = pixels.numpy()
    else:
        stretch = stretch_of(pixels, bands)
        shown, note = stretch.rgb(pixels), f"{cache.size} px, {cache.encoding.words}; {stretch.note}"
    strips = [Strip(f"view {view}", shown, note, captions=keys)]
    if boxes is not None:
        strips.append(boxes_strip(cache, boxes, numbers, view, shown))
    for name in cache.columns:
        strips += teacher_strips(cache, name, numbers, view)
    strips += [map_strip(cache, name, numbers, view) for name in cache.maps]
    rows, per_row = cache.grid
    title = f"{cache.path.name}: {len(numbers)} of {counted(len(cache.numbers), 'image')}, {rows} x {per_row} patches"
    return draw_sheet(strips, title=title, notes=(COLOUR_NOTE, STRIPES_NOTE))


def spread(numbers: Numbers, n: int) -> Numbers:
    """At most n of the numbers, from the first to the last."""
    chosen: Numbers = numbers[np.linspace(0, len(numbers) - 1, min(n, len(numbers))).astype(int)]
    return chosen


def teacher_strips(cache: Cache, name: str, numbers: Numbers, view: int) -> list[Strip]:
    """A teacher's tokens as colours, with and without what the position says, and its attention (where there is none: norms)."""
    column = cache.columns[name]
    random = "RANDOM WEIGHTS" if column.spec.weights == "random" else ""
    array = "attention" if "attention" in column.layout.arrays() else "norm"
    scores = cache.read_column(name, numbers, numbers * 0 + view, (array,))[array].float()
    what = "of CLS to each patch, last block" if array == "attention" else "length of each token"
    every = np.concatenate(
        [numbers, np.setdiff1d(spread(cache.numbers, colour_images(cache.grid[0] * cache.grid[1])), numbers)]
    )
    tokens = cache.read_tokens(name, every, every * 0 + view)
    strips = [Strip(name, as_bytes(pca_rgb(tokens[: len(numbers)], cache.grid)), column.spec.model, random)]
    if len(every) >= ENOUGH_IMAGES:
        content = as_bytes(content_rgb(tokens, cache.grid)[: len(numbers)])
        strips.append(Strip(f"{name}, content", content, f"without the position's mean over {len(every)} images"))
    return [*strips, Strip(f"{name}, {array}", heat(scores, cache.grid), what, captions=ranges(scores))]


def map_strip(cache: Cache, name: str, numbers: Numbers, view: int) -> Strip:
    """A map: scores as brightness, ids and bits as colours, several numbers per patch as tokens."""
    spec = cache.maps[name].spec
    values = cache.read_column(name, numbers, numbers * 0 + view, ("map",))["map"]
    if spec.width > 1:
        return Strip(name, as_bytes(pca_rgb(values.float(), cache.grid)), f"{spec.width} numbers as given")
    if values.is_floating_point():
        what = f"cosine of {spec.model_options['of']} with prompts" if spec.made else "scores as given"
        return Strip(name, heat(values.float(), cache.grid), what, captions=ranges(values.float()))
    colours = id_rgb(values.numpy(), black=not spec.made).reshape(-1, *cache.grid, 3)
    captions = [in_few_words(sorted(set(row.tolist()))) for row in values]
    return Strip(name, colours, made_in_words(spec) if spec.made else "a colour per id, black is 0", captions=captions)


def boxes_strip(cache: Cache, boxes: BoxFile, numbers: Numbers, view: int, shown: Array) -> Strip:
    """The views, as they are shown, with what they show of their boxes, and the patches' borders, in a picture of whole cells."""
    scale = -(-CELL // cache.size)
    size, drawn, captions = cache.size * scale, [], []
    for number, pixels in zip(numbers.tolist(), shown):
        key = cache.keys[number]
        corners, which = boxes.seen(key, cache.read_crop(number, view), size)
        picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
        brush = ImageDraw.Draw(picture)
        for row in range(1, cache.grid[0]):
            brush.line([0, row * size / cache.grid[0], size, row * size / cache.grid[0]], (140, 140, 140))
        for column in range(1, cache.grid[1]):
            brush.line([column * size / cache.grid[1], 0, column * size / cache.grid[1], size], (140, 140, 140))
        for box in corners.tolist():
            brush.rectangle(box, outline=BOX_COLOUR, width=max(1, size // 100))
        drawn.append(np.asarray(picture))
        names = [label for i in which.tolist() if (label := boxes.labels[key][i]) is not None]
        captions.append(
            f"{len(which)} of {counted(len(boxes.corners[key]), 'box', 'boxes')}"
            + (f": {', '.join(names)}" if names else "")
        )
    return Strip("boxes", np.stack(drawn), boxes.file.name, captions=captions)


def id_rgb(ids: Array, *, black: bool = True) -> Pictures:
    """A colour per id, black for 0 where that is no id but nothing: neighbouring ids differ by the golden ratio of the colour circle."""
    hues = np.unique(ids)
    colours = np.array(
        [colorsys.hsv_to_rgb(hue * GOLDEN_RATIO % 1, 0.65, 0.95 if hue or not black else 0) for hue in hues.tolist()]
    )
    return np.asarray((colours * 255).round()[np.searchsorted(hues, ids)], np.uint8)


def in_few_words(ids: Sequence[int]) -> str:
    """The ids that are there, or how many."""
    return f"ids {', '.join(map(str, ids))}" if len(ids) <= SHOWN_IDS else f"{len(ids)} ids, {ids[0]} to {ids[-1]}"


def write_sheet(
    cache: Cache, n: int, path: Path, *, view: int = 0, bands: Sequence[int] | None = None, boxes: BoxFile | None = None
) -> Path:
    """The PNG at `path`; an older sheet there is replaced. ValueError where something else has that name."""
    refuse_to_replace(path)
    return publish_png(path, contact_sheet(cache, n, view=view, bands=bands, boxes=boxes))
