"""Exact moments of a column: numpy's, in float64, and of this cache only."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mrmae.shards.cache import open_cache
from mrmae.shards.stats import Stats, compute_stats, read_stats, write_stats

Make = Callable[..., Path]


def test_moments_are_numpys_in_float64(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    seen: list[int] = []
    found = compute_stats(cache, "a.pre_tail", progress=seen.append)
    parts = [cache.read_tokens("a.pre_tail", cache.numbers, cache.numbers * 0 + v).flatten(0, 1) for v in range(2)]
    x = torch.cat(parts).double().numpy()
    assert found.n == len(x) == 2 * 24 * 16 and sum(seen) == 2 * 24
    assert np.allclose(found.mean.numpy(), x.mean(0), rtol=0, atol=1e-12)
    assert np.allclose(found.covariance.numpy(), np.cov(x.T, bias=True), rtol=1e-9, atol=1e-12)


def test_moments_of_another_cache_are_refused(make_cache: Make, tmp_path: Path) -> None:
    a, b = make_cache(tmp_path / "a", n=6, n_views=1), make_cache(tmp_path / "b", n=6, n_views=1, dtype="float16")
    opened = open_cache(a)
    write_stats(opened, "a.pre_tail", compute_stats(opened, "a.pre_tail"))
    assert read_stats(opened, "a.pre_tail").n == 6 * 16
    shutil.copytree(a / "stats", b / "stats")
    with pytest.raises(ValueError, match="these moments are of"):
        read_stats(open_cache(b), "a.pre_tail")


def test_a_channel_that_does_not_vary_normalises_to_0() -> None:
    variance = torch.tensor([4.0, 0.0, 1e-18, 9.0]).double()
    assert Stats("", 1, torch.zeros(4), variance, torch.diag(variance)).std.tolist() == [2, 1, 1, 3]
