"""Tokens and scores as pictures, and pictures as a sheet with headings."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

CELL, GAP, HEADER = 160, 6, 34  # pixels
INK, PAPER = (40, 40, 40), (255, 255, 255)
Pictures = np.ndarray[Any, np.dtype[np.uint8]]


def pca_rgb(tokens: Float[Tensor, "b l d"], grid: tuple[int, int]) -> Float[Tensor, "b rows columns 3"]:
    """The three main directions of the tokens as red, green and blue in 0..1, fp32 on the CPU.

    One PCA over all images, so that colours mean the same in every row; layer-normalised first, because a few channels
    of some teachers are a hundred times larger than the rest. Each direction's sign is fixed by its largest entry.
    """
    x = torch.nn.functional.layer_norm(tokens.detach().double().cpu(), tokens.shape[-1:]).flatten(0, 1)
    x = x - x.mean(0)
    directions = torch.linalg.svd(x, full_matrices=False)[2][:3]
    directions *= directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    found = torch.nn.functional.pad(x @ directions.T, (0, 3 - len(directions)))
    low, high = (torch.quantile(found, q, dim=0) for q in (0.01, 0.99))
    found = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return found.reshape(len(tokens), *grid, 3).float()


def heat(scores: Float[Tensor, "b l"], grid: tuple[int, int]) -> Pictures:
    """Scores as brightness, each image from its lowest to its highest, uint8 [b, *grid, 3]."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    gray = (scores - low) / (high - low).clamp_min(1e-12)
    return as_bytes(gray.reshape(-1, *grid, 1).expand(-1, -1, -1, 3))


def as_bytes(values: Tensor) -> Pictures:
    """Values in 0..1 as uint8."""
    return np.asarray((values * 255).round().to(torch.uint8).numpy(), np.uint8)


def tiled(columns: Mapping[str, Pictures]) -> Image.Image:
    """The pictures under their headings, a row per image; small maps are enlarged without smoothing."""
    rows, step = len(next(iter(columns.values()))), CELL + GAP
    sheet = Image.new("RGB", (len(columns) * step + GAP, HEADER + rows * step), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (heading, pictures) in enumerate(columns.items()):
        draw.multiline_text((GAP + i * step, 4), heading, fill=INK, font_size=12)
        for row, picture in enumerate(pictures):
            smooth = Image.Resampling.BICUBIC if picture.shape[0] >= CELL // 2 else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(picture).resize((CELL, CELL), smooth), (GAP + i * step, HEADER + row * step))
    return sheet
