"""Tokens and scores as pictures, and pictures as a sheet with title, headings and captions."""

import contextlib
import dataclasses
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mrmae.common.files import publish
from mrmae.common.progress import counted

CELL, GAP, MARGIN = 200, 8, 12  # pixels
INK, PALE_INK, RED, PAPER = (30, 30, 30), (95, 95, 95), (190, 20, 20), (255, 255, 255)
TITLE, HEADING, SMALL = 19, 14, 11  # pixels of text
STRETCH = 0.02  # of the numbers at either end are black or full
DRAWN_BY = "mrmae"  # as the pictures' own Software says
Pictures = np.ndarray[Any, np.dtype[np.uint8]]
COLOUR_NOTE = ("Tokens as colours: a model's three main directions over all these images as red, green and blue; equal colours mean "
               "similar tokens in every row of a column, and nothing across columns.")  # fmt: skip
STRIPES_NOTE = ("What every row of a column has in common (stripes, borders, corners) is the position, not the picture; where it says "
                "content, the mean over the images at each position is taken out, and is grey.")  # fmt: skip
ENOUGH_IMAGES = 4  # for a mean at each position that is not mostly the image itself
COLOUR_IMAGES, COLOUR_TOKENS = (
    32,
    16_384,
)  # over which colours are taken where there are many: at most 0.1 GB of 1,024 channels


# --- tokens and scores


@dataclasses.dataclass(frozen=True)
class Palette:
    """Which colour a token has: `(token - mean) @ directions`, from `low` (0) to `high` (1) in red, green and blue.

    mean: one, or one for every position.
    """

    mean: Float[Tensor, "*l d"]
    directions: Float[Tensor, "d 3"]
    low: Float[Tensor, "3"]
    high: Float[Tensor, "3"]

    def rgb(self, tokens: Float[Tensor, "b n d"], ids: Int64[Tensor, "b n"] | None = None) -> Float[Tensor, "b n 3"]:
        """The tokens, at `ids` of the grid if they are not all, as colours in 0..1, fp32 on the CPU.

        What lies outside the range has its nearest colour.
        """
        mean = self.mean if ids is None or self.mean.ndim == 1 else self.mean[ids.cpu()]
        found = (tokens.detach().double().cpu() - mean) @ self.directions
        return ((found - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1).float()


def palette_of(tokens: Float[Tensor, "b l d"], *, by_position: bool = False) -> Palette:
    """The three main directions of the tokens; colours span the middle 98 % of each.

    by_position: of what several images differ in at the same position; the mean over the images there is the middle grey.
    Each direction's sign is fixed by its largest entry.
    """
    x = tokens.detach().double().cpu()
    by_position = by_position and len(x) > 1
    mean = x.mean(0) if by_position else x.flatten(0, 1).mean(0)
    x = (x - mean).flatten(0, 1)
    directions = torch.linalg.svd(x, full_matrices=False)[2][:3] if len(x) < x.shape[1] else main_directions(x)
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    directions = torch.nn.functional.pad(directions, (0, 0, 0, 3 - len(directions))).T
    found = x @ directions
    high = quantile(found.abs(), 0.98) if by_position else quantile(found, 0.99)
    return Palette(mean, directions, -high if by_position else quantile(found, 0.01), high)


def main_directions(x: Float[Tensor, "n d"]) -> Float[Tensor, "3 d"]:
    """The eigenvectors of the three largest eigenvalues of `x`'s second moments: as an SVD's, in a fraction of its time."""
    vectors: Tensor = torch.linalg.eigh(x.T @ x).eigenvectors
    return vectors.flip(1)[:, :3].T


def quantile(x: Float[Tensor, "n 3"], q: float) -> Float[Tensor, "3"]:
    """Of every column; torch.quantile takes 16 million numbers at most."""
    return torch.from_numpy(np.quantile(x.numpy(), q, axis=0))


def pca_rgb(tokens: Float[Tensor, "b l d"], grid: tuple[int, int]) -> Float[Tensor, "b rows columns 3"]:
    """The three main directions of the tokens as red, green and blue in 0..1, fp32 on the CPU.

    One PCA over all images, so that colours mean the same in every row; layer-normalised first, because a few tokens of some
    teachers are a hundred times longer than the rest.
    """
    x = layer_normalised(tokens)
    return palette_of(x).rgb(x).reshape(len(tokens), *grid, 3)


def content_rgb(tokens: Float[Tensor, "b l d"], grid: tuple[int, int]) -> Float[Tensor, "b rows columns 3"]:
    """The same of what is left without the mean over the images at each position: what one shows there and others do not."""
    x = layer_normalised(tokens)
    return palette_of(x, by_position=True).rgb(x).reshape(len(tokens), *grid, 3)


def colour_images(l: int) -> int:
    """How many images of l tokens colours are taken over."""
    return min(COLOUR_IMAGES, max(ENOUGH_IMAGES, COLOUR_TOKENS // l))


def layer_normalised(tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
    """Layer-normalised without affine parameters, fp64 on the CPU."""
    return torch.nn.functional.layer_norm(tokens.detach().double().cpu(), tokens.shape[-1:])


def heat(scores: Float[Tensor, "b l"], grid: tuple[int, int]) -> Pictures:
    """Scores as brightness, each image from its lowest to its highest, uint8 [b, *grid, 3]."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    gray = (scores - low) / (high - low).clamp_min(1e-12)
    return as_bytes(gray.reshape(-1, *grid, 1).expand(-1, -1, -1, 3))


def ranges(scores: Float[Tensor, "b l"]) -> list[str]:
    """What black and white mean in each picture of `heat`."""
    return [f"black {float(row.min()):.3g}, white {float(row.max()):.3g}" for row in scores]


def as_bytes(values: Tensor) -> Pictures:
    """Values in 0..1 as uint8."""
    return np.asarray((values * 255).round().to(torch.uint8).numpy(), np.uint8)


# --- bands


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Three bands of images as red, green and blue: every number from `low` (0) to `high` (255). bands: from 0."""

    bands: tuple[int, ...]
    low: Float[Tensor, "3"]
    high: Float[Tensor, "3"]

    def rgb(self, images: Shaped[Tensor, "b h w c"]) -> Pictures:
        """The images as pictures, uint8 [b, h, w, 3]; what lies beyond low and high is black or full."""
        chosen = images.detach().cpu().double()[..., list(self.bands)]
        return as_bytes(((chosen - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1))

    @property
    def note(self) -> str:
        """How the pictures are to be read."""
        ends = ", ".join(f"{low:.4g} to {high:.4g}" for low, high in zip(self.low.tolist(), self.high.tolist()))
        return f"bands {', '.join(str(band + 1) for band in self.bands)} as red, green, blue, stretched: {ends}"


def stretch_of(images: Shaped[Tensor, "b h w c"], bands: Sequence[int] | None = None) -> Stretch:
    """How bands of these images are shown: each from its 2nd to its 98th percentile over all of them.

    bands: three, or one as gray, from 1; None: the first three, or the only one. ValueError for bands that are not there.
    """
    there = images.shape[-1]
    asked = tuple(bands or range(1, min(there, 3) + 1))
    if not all(1 <= band <= there for band in asked) or len(asked) not in (1, 3) and bands:
        raise ValueError(f"bands {','.join(map(str, asked))}: the views have {counted(there, 'band')}, from 1; one of them, or three as red, "
                         "green and blue, were expected; choose these")  # fmt: skip
    chosen = tuple(band - 1 for band in (*asked, *asked[-1:] * 2)[:3])
    values = images.detach().cpu().double()[..., list(chosen)].flatten(0, -2)
    return Stretch(chosen, quantile(values, STRETCH), quantile(values, 1 - STRETCH))


# --- a sheet of pictures


@dataclasses.dataclass(frozen=True)
class Strip:
    """Pictures one below the other. heading: what they are; note: how to read them; warning: what must not be overlooked.

    captions: a line below each picture.
    """

    heading: str
    pictures: Pictures
    note: str = ""
    warning: str = ""
    captions: Sequence[str] = ()


def draw_sheet(columns: Sequence[Strip], *, title: str, notes: Sequence[str] = ()) -> Image.Image:
    """The columns side by side, a row per image, under a title and above the notes. Small maps are enlarged without smoothing."""
    rows, step = len(columns[0].pictures), CELL + GAP
    width = max(2 * MARGIN + len(columns) * step - GAP, 3 * step)
    heads = [heading_lines(column) for column in columns]
    top = MARGIN + TITLE + 12
    below_heads = top + max(sum(line_height(size) for _, size, _ in lines) for lines in heads) + 4
    row_height = CELL + GAP + (line_height(SMALL) if any(column.captions for column in columns) else 0)
    foot = [part for note in notes for part in broken(note, SMALL, width - 2 * MARGIN)]
    height = below_heads + rows * row_height + len(foot) * line_height(SMALL) + MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    write_lines(draw, [(fitted(title, TITLE, width - 2 * MARGIN), TITLE, INK)], (MARGIN, MARGIN))
    for i, (column, lines) in enumerate(zip(columns, heads)):
        x = MARGIN + i * step
        write_lines(draw, lines, (x, top))
        for row, picture in enumerate(column.pictures):
            y = below_heads + row * row_height
            page.paste(enlarged(picture), (x, y))
            if column.captions:
                write_lines(draw, [(fitted(column.captions[row], SMALL, CELL), SMALL, PALE_INK)], (x, y + CELL + 1))
    write_lines(draw, [(line, SMALL, PALE_INK) for line in foot], (MARGIN, below_heads + rows * row_height))
    return page


TextLine = tuple[str, int, tuple[int, int, int]]  # text, size, colour


def heading_lines(column: Strip) -> list[TextLine]:
    """A column's heading, warning and note, cut to its width."""
    parts = ((column.heading, HEADING, INK), (column.warning, HEADING, RED), (column.note, SMALL, PALE_INK))
    return [(line, size, colour) for text, size, colour in parts for line in broken(text, size, CELL)]


def write_lines(draw: ImageDraw.ImageDraw, lines: Sequence[TextLine], at: tuple[int, int]) -> None:
    """Write the lines one below the other."""
    x, y = at
    for text, size, colour in lines:
        draw.text((x, y), text, fill=colour, font=font(size, bold=size > SMALL))
        y += line_height(size)


def line_height(size: int) -> int:
    return round(1.3 * size)


@functools.cache
def font(size: int, *, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows more letters than Pillow's own font."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def broken(text: str, size: int, width: int) -> list[str]:
    """The text in lines that fit `width` pixels; lines that are in it stay lines."""
    face, lines = font(size, bold=size > SMALL), []
    for part in text.splitlines():
        line = ""
        for word in part.split():
            if line and face.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        lines.append(line)
    return [fitted(line, size, width) for line in lines]


def fitted(text: str, size: int, width: int) -> str:
    """The text, its middle left out where it does not fit `width` pixels."""
    face, cut = font(size, bold=size > SMALL), text
    keep = len(text)
    while face.getlength(cut) > width and keep > 2:
        keep -= 1
        cut = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
    return cut


def enlarged(picture: Pictures) -> Image.Image:
    """The picture as a cell of the sheet."""
    smooth = Image.Resampling.BICUBIC if picture.shape[0] >= CELL // 2 else Image.Resampling.NEAREST
    return Image.fromarray(picture).resize((CELL, CELL), smooth)


def marked(pictures: Pictures, patch: tuple[int, int], grid: tuple[int, int]) -> Pictures:
    """The pictures as large as cells, the patch at (column, row) of the grid framed in white and black."""
    (x, y), (rows, columns) = patch, grid
    left, top, right, bottom = (round(CELL * at) for at in (x / columns, y / rows, (x + 1) / columns, (y + 1) / rows))
    found = []
    for picture in map(enlarged, pictures):
        draw = ImageDraw.Draw(picture)
        draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=(0, 0, 0))
        draw.rectangle((left - 1, top - 1, right, bottom), outline=PAPER)
        found.append(np.asarray(picture, np.uint8))
    return np.stack(found)


# --- on disk


def publish_png(path: Path, page: Image.Image) -> Path:
    """Write the page to `path`, replacing what is there; returns the path."""
    out, about = io.BytesIO(), PngInfo()
    about.add_text("Software", DRAWN_BY)
    page.save(out, "PNG", pnginfo=about)
    publish(path, out.getvalue(), replace=True)
    return path


def refuse_to_replace(path: Path) -> None:
    """ValueError where `path` is there and is no PNG that `publish_png` wrote."""
    if not os.path.lexists(path):
        return
    if path.is_file():
        with contextlib.suppress(OSError), Image.open(path, formats=["PNG"]) as page:
            if page.info.get("Software") == DRAWN_BY:
                return
    raise ValueError(f"{path}: is there and is no PNG that was drawn here; a new name, or that of an older picture, was expected; "
                     "choose another with --out (nothing was changed)")  # fmt: skip
