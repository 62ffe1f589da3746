"""Mosaics: pictures whose labels are known at every place, put together from labelled images."""

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mrmae.probe.data import Split, eval_view


def mosaic_labels(
    labels: Int64[Tensor, "n"], tiles: int, most: int, *, seed: int
) -> tuple[Int64[Tensor, "m t2"], Int64[Tensor, "m t2"]]:
    """Which images make each mosaic of tiles x tiles, row by row, and their classes: every image once, in an order drawn by seed.

    most: mosaics at most. Raises ValueError where there are too few images for one.
    """
    each = tiles * tiles
    count = min(most, len(labels) // each)
    if not count:
        raise ValueError(f"DATA: {len(labels)} images make no mosaic of {tiles} x {tiles}; expected at least {each} in the train and in the test part; "
                         "give more, or fewer tiles")  # fmt: skip
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: count * each].view(count, each)
    return order, labels[order]


def mosaic(part: Split, ids: Int64[Tensor, "t2"], side: int, interpolation: str) -> UInt8[Tensor, "side side 3"]:
    """One mosaic: evaluation views of the images, each in its cell of the square."""
    tiles = round(len(ids) ** 0.5)
    edges = [round(at * side / tiles) for at in range(tiles + 1)]
    out = np.zeros((side, side, 3), np.uint8)
    for place, i in enumerate(ids.tolist()):
        (top, bottom), (left, right) = (edges[at : at + 2] for at in divmod(place, tiles))
        with part.image(i) as image:
            out[top:bottom, left:right] = eval_view(image, max(bottom - top, right - left), interpolation)[
                : bottom - top, : right - left
            ]
    return torch.from_numpy(out)


def mosaic_mask(classes: Int64[Tensor, "t2"], side: int) -> Int64[Tensor, "side side"]:
    """The class of every pixel of a mosaic."""
    tiles = round(len(classes) ** 0.5)
    cell = torch.tensor([sum(at >= round(edge * side / tiles) for edge in range(1, tiles)) for at in range(side)])
    return classes.view(tiles, tiles)[cell][:, cell]


def mosaic_boxes(tiles: int, side: int) -> Tensor:
    """(x1, y1, x2, y2) in pixels of the cells of a mosaic, row by row, fp32 [tiles * tiles, 4]."""
    edges = [float(round(at * side / tiles)) for at in range(tiles + 1)]
    return torch.tensor([[edges[x], edges[y], edges[x + 1], edges[y + 1]] for y in range(tiles) for x in range(tiles)])
