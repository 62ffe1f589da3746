"""The HOG target beside an explicit loop, and what DMJD makes of it."""

import math

import pytest
import torch

from mrmae.train.method.hog import hog_targets, hog_width


def loops(image: torch.Tensor, patch: int) -> list[list[float]]:
    """The histograms of one image [h, w, c], pixel by pixel."""
    h, w, c = image.shape
    v = image.double().tolist()
    cells = [[[[0.0] * 9 for _ in range(c)] for _ in range(w // 8)] for _ in range(h // 8)]
    for i in range(h):
        for j in range(w):
            for k in range(c):
                down = v[i + 1][j][k] - v[i - 1][j][k] if 0 < i < h - 1 else 0.0
                right = v[i][j + 1][k] - v[i][j - 1][k] if 0 < j < w - 1 else 0.0
                angle = math.degrees(math.atan2(down, right)) % 180
                cells[i // 8][j // 8][k][min(int(angle // 20), 8)] += math.hypot(down, right) / 64
    out = []
    for top in range(0, h // 8, patch // 8):
        for left in range(0, w // 8, patch // 8):
            row = []
            for i in range(patch // 8):
                for j in range(patch // 8):
                    bins = [cells[top + i][left + j][k] for k in range(c)]
                    mean = [sum(b) / 9 for b in bins]
                    var = [sum((x - m) ** 2 for x in b) / 9 for b, m in zip(bins, mean)]
                    row += [(bins[k][n] - mean[k]) / math.sqrt(var[k] + 1e-5) for n in range(9) for k in range(c)]
            out.append(row)
    return out


@pytest.mark.parametrize("patch", [8, 16])
def test_histograms_are_those_of_an_explicit_loop(patch: int) -> None:
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[1] = torch.arange(32, dtype=torch.uint8)[:, None, None] * 3  # one direction only
    found = hog_targets(pixels, patch, dtype=torch.float64)
    assert found.shape == (2, (32 // patch) ** 2, hog_width(patch, 3)) and hog_width(16, 3) == 108
    expected = torch.tensor([loops(image, patch) for image in pixels], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-10


def test_patches_that_cells_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="patches of 12 px; a multiple of 8"):
        hog_width(12, 3)
