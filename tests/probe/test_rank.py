"""Uniformity is that of all pairs."""

import math

import pytest
import torch

from mrmae.probe.rank import uniformity


def test_uniformity_is_that_of_all_pairs() -> None:
    assert uniformity(3 * torch.eye(6)) == pytest.approx(-4, abs=1e-9)  # |u - v|^2 = 2 for every pair
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    u = [row / row.norm() for row in x]
    terms = [math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(7) for j in range(7) if i != j]
    assert uniformity(x) == pytest.approx(math.log(sum(terms) / len(terms)), abs=1e-9)
    assert uniformity(torch.rand(1, 8).repeat(20, 1)) == pytest.approx(0, abs=1e-6)
