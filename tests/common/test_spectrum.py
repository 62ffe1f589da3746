"""RankMe and effective rank of features whose spectrum is known."""

import math

import pytest
import torch

from mrmae.common.spectrum import entropy_rank, singular_values


def features_of(spectrum: list[float], n: int = 30, d: int = 12) -> torch.Tensor:
    """Features [n, d] with these singular values whose mean is 0."""
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(n, d, generator=draw, dtype=torch.float64)
    left, _ = torch.linalg.qr(left - left.mean(0))
    right, _ = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))
    return (left[:, : len(spectrum)] * torch.tensor(spectrum, dtype=torch.float64)) @ right[:, : len(spectrum)].T


def test_the_rank_is_the_entropy_of_the_spectrum() -> None:
    assert entropy_rank(singular_values(features_of([3.0] * 5))) == pytest.approx(5, abs=1e-9)
    spectrum = [5.0, 2.0, 1.0, 0.25]
    shares = [value / sum(spectrum) for value in spectrum]
    wanted = math.exp(-sum(p * math.log(p) for p in shares))
    assert entropy_rank(singular_values(features_of(spectrum))) == pytest.approx(wanted, abs=1e-9)
    assert entropy_rank(singular_values(features_of(spectrum).T)) == pytest.approx(wanted, abs=1e-9)


def test_what_all_images_share_is_not_in_the_centred_rank_and_collapsed_features_have_none() -> None:
    x = features_of([1.0] * 4) + 100
    assert entropy_rank(singular_values(x)) < 1.5
    assert entropy_rank(singular_values(x - x.mean(0))) == pytest.approx(4, abs=1e-6)
    same = torch.rand(1, 8).repeat(20, 1).double() + 1e-9 * torch.rand(20, 8).double()
    largest = float(singular_values(same)[0])
    assert entropy_rank(singular_values(same - same.mean(0), floor=1e-7 * largest)) == 0
