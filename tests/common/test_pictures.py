"""Colours say what tokens say, and a sheet says what it shows."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae.common import pictures
from mrmae.common.pictures import Strip, draw_sheet, marked, palette_of, pca_rgb, publish_png, refuse_to_replace

GRID = (4, 3)


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


@pytest.mark.parametrize("width", [5, 40], ids=["more tokens than channels", "fewer"])
def test_what_every_image_says_at_a_position_is_grey_and_half_of_the_rest_half_as_bright(width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    pattern, own = 50 * torch.randn(12, width, generator=draw), torch.randn(3, 12, width, generator=draw)
    own -= own.mean(0)
    palette = palette_of(pattern + own, by_position=True)
    assert torch.allclose(palette.rgb(pattern.expand(3, -1, -1)), torch.tensor(0.5), atol=1e-6)
    whole, half = (palette.rgb(pattern + share * own) - 0.5 for share in (1.0, 0.5))
    inside = whole.abs() < 0.499
    assert inside.float().mean() > 0.9 and torch.allclose(half[inside], whole[inside] / 2, atol=1e-6)
    ids = torch.tensor([[0, 7], [3, 11], [2, 5]])
    rows = torch.arange(3)[:, None]
    assert torch.equal(palette.rgb((pattern + own)[rows, ids], ids), palette.rgb(pattern + own)[rows, ids])


def test_a_sheet_shows_every_picture_under_its_heading_with_its_caption() -> None:
    shades = np.array([[40, 80], [120, 200], [60, 150]], np.uint8)
    strips = [
        Strip(
            f"column {i}", np.stack([np.full((2, 2, 3), shade, np.uint8) for shade in shades[i]]), captions=["a", "b"]
        )
        for i in range(3)
    ]
    page = np.asarray(draw_sheet(strips, title="a title", notes=["a note " * 40]))
    step, (height, width, _) = pictures.CELL + pictures.GAP, page.shape
    assert width == 2 * pictures.MARGIN + 3 * step - pictures.GAP and height > 2 * step
    for i in range(3):
        x = pictures.MARGIN + i * step + 100
        grays = [int(shade) for shade in page[:, x, 0]]
        for shade in shades[i]:
            assert grays.count(shade) >= pictures.CELL, "one picture of this shade, whole, below its heading"
    assert not (page == pictures.RED).all(-1).any()
    warned = np.asarray(draw_sheet([Strip("x", strips[0].pictures, warning="RANDOM")], title="t"))
    assert (warned == pictures.RED).all(-1).sum() > 30


def test_text_stays_within_its_width() -> None:
    long = "photographs/" * 20 + "the-end.jpg"
    for size in (pictures.SMALL, pictures.HEADING):
        face = pictures.font(size, bold=size > pictures.SMALL)
        lines = pictures.broken(f"several words that wrap {long} and go on", size, pictures.CELL)
        assert len(lines) > 2 and all(face.getlength(line) <= pictures.CELL for line in lines)
    cut = pictures.fitted(long, pictures.SMALL, pictures.CELL)
    assert cut.startswith("photo") and cut.endswith("end.jpg") and "…" in cut


def test_the_frame_is_around_the_patch_that_was_named() -> None:
    (framed,) = marked(np.full((1, 3, 4, 3), 90, np.uint8), (2, 1), (3, 4))
    rows, columns = np.nonzero((framed == 255).all(-1))
    middle = (columns.min() + columns.max()) / 2 / pictures.CELL, (rows.min() + rows.max()) / 2 / pictures.CELL
    assert middle == pytest.approx((2.5 / 4, 1.5 / 3), abs=0.01)
    assert (framed[int(0.5 * pictures.CELL), int(0.625 * pictures.CELL)] == 90).all(), "what is inside stays seen"


def test_only_a_picture_of_ours_is_replaced(tmp_path: Path) -> None:
    refuse_to_replace(tmp_path / "new.png")
    refuse_to_replace(publish_png(tmp_path / "ours.png", Image.new("RGB", (2, 2))))
    (tmp_path / "text.png").write_text("a letter")
    Image.new("RGB", (2, 2)).save(tmp_path / "photo.png")
    os.mkfifo(tmp_path / "fifo.png")
    for path in (tmp_path / "text.png", tmp_path / "photo.png", tmp_path / "fifo.png", tmp_path):
        with pytest.raises(ValueError, match="is there and is no PNG that was drawn here.*nothing was changed"):
            refuse_to_replace(path)
