"""Changes of images, and what they do to tokens of models whose answer is known."""

import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mrmae.probe.stability import changed_images, moved, moved_along, relative_shift

GREY = np.full((3, 32, 32, 3), 128, np.uint8)


def photos(n: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)


def test_noise_has_its_standard_deviation_and_depends_on_seed_and_place_alone() -> None:
    noisy = changed_images(GREY, "noise", 0.05, seed=0)
    assert (noisy.astype(float) - 128).std() == pytest.approx(0.05 * 255, rel=0.03)
    assert np.array_equal(noisy[:2], changed_images(GREY[:2], "noise", 0.05, seed=0))
    assert not np.array_equal(noisy[0], noisy[1]) and not np.array_equal(
        noisy, changed_images(GREY, "noise", 0.05, seed=1)
    )
    before, after = (torch.from_numpy(x.reshape(3, 1, -1) / 255) for x in (GREY, noisy))
    assert float(relative_shift(before, after).mean()) == pytest.approx(0.05 * 255 / 128, rel=0.03)


def test_blur_and_jpeg_keep_a_plain_picture_and_coarser_ones_change_more() -> None:
    for kind, mild, strong in (("blur", 0.5, 2.0), ("jpeg", 95, 10)):
        assert np.abs(changed_images(GREY, kind, strong, seed=0).astype(int) - 128).max() <= 1
        far = [
            np.abs(changed_images(photos(), kind, s, seed=0) - photos().astype(float)).mean() for s in (mild, strong)
        ]
        assert 0 < far[0] < far[1]


def test_a_shift_moves_right_and_down_and_repeats_the_edges() -> None:
    found = changed_images(photos(), "shift", 3, seed=0)
    assert np.array_equal(found[:, 3:, 3:], photos()[:, :-3, :-3])
    assert np.array_equal(found[:, :3, 3:], np.repeat(photos()[:, :1, :-3], 3, 1))


def test_unrelated_images_are_a_root_of_two_apart_against_content() -> None:
    x = torch.randn(400, 3, 16, generator=torch.Generator().manual_seed(0)) + 50
    found = moved(x, x.roll(1, 0))
    assert found["against content"] == pytest.approx(2**0.5, rel=0.03) and found["tokens"] < 0.05
    assert moved(x, x) == {"tokens": 0, "against content": 0, "pooled": 0}
    assert moved(x[:1], x[1:2])["against content"] is None
    larger = moved(x, 1.1 * x)
    assert (larger["tokens"], larger["pooled"]) == pytest.approx((0.1, 0.1), rel=1e-4)


@pytest.mark.parametrize("positions, wanted", [(0.0, 0.0), (1.0, None)])
def test_tokens_without_positions_follow_a_shift_of_one_patch_exactly(positions: float, wanted: float | None) -> None:
    place = positions * torch.arange(16.0)[:, None]

    def forward(pixels: torch.Tensor) -> Any:
        return types.SimpleNamespace(
            tokens=F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 8).flatten(2).transpose(1, 2) + place
        )

    teacher: Any = types.SimpleNamespace(forward=forward)
    job: Any = types.SimpleNamespace(
        test=types.SimpleNamespace(grid=(4, 4)), options=types.SimpleNamespace(batch_size=2)
    )
    pixels = torch.from_numpy(photos())
    (row,) = moved_along(teacher, pixels, forward(pixels).tokens, job)
    assert row["tokens"] == wanted if wanted is not None else row["tokens"] > 0.01
    job.test.grid = (5, 5)
    assert moved_along(teacher, pixels, forward(pixels).tokens, job) == []
