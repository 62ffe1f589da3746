"""What the panels show is what the tensors say."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mrmae.common.pictures import pca_rgb
from mrmae.train import pictures

GRID = (4, 3)
SIZE = (32, 24)


def _pixels(b: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (b, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_masked_view_hides_exactly_the_patches_not_kept() -> None:
    view = pictures.masked_view(_pixels(), torch.tensor([[0, 5], [1, 11]]), GRID)
    for b, keep in enumerate([(0, 5), (1, 11)]):
        for patch in range(12):
            i, j = divmod(patch, 3)
            cell = view[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            true = _pixels()[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy()
            assert (cell == (true if patch in keep else 128)).all()


def test_pca_colours_separate_two_kinds_of_token() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 16, generator=generator)
    which = torch.randint(0, 2, (3, 12), generator=generator)
    tokens = kinds[which] + 0.01 * torch.randn(3, 12, 16, generator=generator)
    colours = pca_rgb(tokens, GRID).numpy()
    assert colours.shape == (3, 4, 3, 3) and colours.min() >= 0 and colours.max() <= 1
    red = colours[..., 0].reshape(3, 12)
    assert (np.abs(red[which.numpy() == 0] - red[which.numpy() == 1].mean()) > 0.9).all()
    assert np.array_equal(colours, pca_rgb(tokens, GRID).numpy())


def test_pca_takes_constant_and_narrow_tokens() -> None:
    assert np.isfinite(pca_rgb(torch.ones(2, 12, 8), GRID).numpy()).all()
    assert pca_rgb(torch.randn(2, 12, 2), GRID).shape == (2, 4, 3, 3)


def test_panels_and_curves_are_written(tmp_path: Path) -> None:
    columns = {"original": _pixels(3).numpy(), "teacher clip": np.random.default_rng(0).random((3, 4, 3, 3))}
    pictures.draw_panels(tmp_path / "panels" / "epoch-0001.png", columns, title="epoch 1", note="random weights")
    rows = [{"epoch": e, "terms": {"pixels": 1 / e, "mimic/clip": None}, "lr": 1e-4} for e in (1, 2, 3)]
    pictures.draw_curves(tmp_path / "curves.png", rows, title="mr-mae")
    for path in (tmp_path / "panels" / "epoch-0001.png", tmp_path / "curves.png"):
        with Image.open(path) as image:
            assert image.width > 400 and len(image.convert("RGB").getcolors(10**7) or []) > 50
