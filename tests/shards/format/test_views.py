"""Views: every kind of image decodes to what a viewer shows; draws are golden; replays are bit-identical."""

import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image

from mrmae.shards.format import views
from mrmae.shards.format.spec import ViewRecipe, key_hash
from mrmae.shards.format.views import BadImage, Pixels, View, draw_view, render

RECIPE = ViewRecipe(size=32)


def picture(height: int = 20, width: int = 30) -> Pixels:
    """A smooth gradient whose four corners differ."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.cos(x / 9)], -1).astype(np.uint8)


def test_drawn_views_are_golden() -> None:
    """These may never change silently: caches replay them."""
    hash = key_hash("train/pants/0.jpg")
    assert draw_view(hash, 0, 400, 533, RECIPE) == View(1, 5, 351, 382, True, 400, 533)
    assert draw_view(hash, 1, 400, 533, RECIPE) == View(7, 20, 387, 469, True, 400, 533)
    assert draw_view(hash - 2**64, 0, 400, 533, RECIPE) == draw_view(hash, 0, 400, 533, RECIPE)


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """One block of Philox4x64-10 in plain integers (Salmon et al. 2011, section 3.3)."""
    (k0, k1), x = key, counter
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        low = 2**64 - 1
        x = [(b >> 64) ^ x[1] ^ k0, b & low, (a >> 64) ^ x[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & low, (k1 + 0xBB67AE8584CAA73B) & low
    return x


def test_the_words_behind_a_view_are_plain_philox() -> None:
    """numpy steps the counter before its first block, so words 0 to 3 are block (1, 0, 0, view)."""
    recipe, hash = ViewRecipe(size=32, seed=9), key_hash("a.jpg")
    flip, area, ratio, top = philox((9, hash), [1, 0, 0, 2])
    left = philox((9, hash), [2, 0, 0, 2])[0]
    pixels = 400 * 533 * (0.4 + 0.6 * (area >> 11) / 2**53)
    aspect = (3 / 4) * (16 / 9) ** ((ratio >> 11) / 2**53)
    h, w = round((pixels / aspect) ** 0.5), round((pixels * aspect) ** 0.5)
    assert h <= 400 and w <= 533
    expected = View(top * (401 - h) >> 64, left * (534 - w) >> 64, h, w, flip >> 63 == 0, 400, 533)
    assert draw_view(hash, 2, 400, 533, recipe) == expected


def test_views_stay_inside_and_follow_the_recipe() -> None:
    scale, ratio = RECIPE.crop_scale, RECIPE.crop_ratio
    drawn = [draw_view(key_hash(str(i)), 0, 300, 500, RECIPE) for i in range(2000)]
    for v in drawn:
        assert 0 <= v.top <= v.top + v.height <= 300 and 0 <= v.left <= v.left + v.width <= 500
        assert scale[0] - 0.01 <= v.height * v.width / 150000 <= scale[1] + 0.01
        assert ratio[0] - 0.02 <= v.width / v.height <= ratio[1] + 0.02
    assert abs(np.mean([v.flip for v in drawn]) - 0.5) < 4 * 0.5 / math.sqrt(2000)
    tops = [v.top / (300 - v.height) for v in drawn if v.height < 300]
    assert abs(np.mean(tops) - 0.5) < 0.05 and min(tops) < 0.01 and max(tops) > 0.99


def test_views_differ_by_seed_key_and_number_only() -> None:
    draws = {draw_view(key_hash(key), view, 300, 500, ViewRecipe(size=32, seed=seed))
             for key, view, seed in itertools.product("ab", (0, 1, 2), (0, 1))}  # fmt: skip
    assert len(draws) == 12


@pytest.mark.parametrize("height,width", [(1, 1), (1, 500), (500, 1), (3, 1000)])
def test_extreme_shapes_have_views(height: int, width: int) -> None:
    image = np.full((height, width, 3), 7, np.uint8)
    for view in range(20):
        drawn = draw_view(key_hash("x"), view, height, width, RECIPE)
        assert (render(image, drawn, RECIPE) == 7).all()


def test_render_is_crop_then_resize_then_mirror() -> None:
    image = picture(60, 80)
    view = View(10, 20, 30, 40, False, 60, 80)
    expected = np.asarray(Image.fromarray(image).crop((20, 10, 60, 40)).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(render(image, view, RECIPE), expected)
    mirrored = View(10, 20, 30, 40, True, 60, 80)
    assert np.array_equal(render(image, mirrored, RECIPE), expected[:, ::-1])
    with pytest.raises(ValueError, match="is this the same file"):
        render(image[1:], view, RECIPE)


def test_stored_views_come_back_close_and_repeatably() -> None:
    pixels = picture(32, 32)
    data = views.encode_view(pixels, RECIPE.stored)
    assert data == views.encode_view(pixels, RECIPE.stored)
    assert abs(views.decode_view(data, RECIPE.stored, 32).astype(int) - pixels).max() <= 12
    with Image.open(io.BytesIO(data)) as image:
        assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1), "4:4:4"  # type: ignore[attr-defined]
    with pytest.raises(BadImage):
        views.decode_view(data[:100], RECIPE.stored, 32)
