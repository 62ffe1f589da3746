"""Histograms of oriented gradients as a target: what DMJD predicts of a patch (arXiv 2301.00230)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

HOG_CELL, HOG_BINS = 8, 9  # pixels along a side of a cell; bins over 180 degrees
LN_EPS = 1e-5


def hog_width(patch: int, channels: int) -> int:
    """Numbers per patch. Raises ValueError where cells do not tile a patch."""
    if patch % HOG_CELL:
        raise ValueError(
            f"target hog: patches of {patch} px; a multiple of {HOG_CELL}, the side of a cell, was expected; extract with another "
            "--size or --grid"
        )
    return (patch // HOG_CELL) ** 2 * HOG_BINS * channels


def hog_targets(pixels: Shaped[Tensor, "b h w c"], patch: int, *, dtype: torch.dtype) -> Float[Tensor, "b l k"]:
    """Every patch's histograms, k = (cell row, cell column, bin, channel) flattened; 108 for RGB patches of 16 px.

    On values 0 to 255, per channel: differences of both neighbours (0 at the border), their magnitude, the angle modulo 180 in hard
    bins, the mean magnitude per cell and bin, then LayerNorm over the bins. No normalisation over blocks of cells.
    """
    value = pixels.to(dtype)
    rows, columns = torch.zeros_like(value), torch.zeros_like(value)
    rows[:, 1:-1] = value[:, 2:] - value[:, :-2]
    columns[:, :, 1:-1] = value[:, :, 2:] - value[:, :, :-2]
    magnitude = torch.hypot(rows, columns)
    angle = torch.rad2deg(torch.atan2(rows, columns)) % 180
    bin = (angle * (HOG_BINS / 180)).long().clamp(max=HOG_BINS - 1)
    spread = torch.zeros(*value.shape, HOG_BINS, dtype=dtype, device=value.device).scatter(
        4, bin[..., None], magnitude[..., None]
    )
    b, h, w, c = value.shape
    cells = spread.view(b, h // HOG_CELL, HOG_CELL, w // HOG_CELL, HOG_CELL, c, HOG_BINS).mean(dim=(2, 4))
    normed, across = F.layer_norm(cells, (HOG_BINS,), eps=LN_EPS), patch // HOG_CELL
    patches = normed.view(b, h // patch, across, w // patch, across, c, HOG_BINS).permute(0, 1, 3, 2, 4, 6, 5)
    return patches.reshape(b, (h // patch) * (w // patch), -1)
