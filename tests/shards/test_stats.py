"""Exact moments of a column: numpy's, in float64, and of this cache only."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mrmae.shards.cache import open_cache
from mrmae.shards.check import find_problems
from mrmae.shards.drop import files_of_column
from mrmae.shards.repair import files_to_remove
from mrmae.shards.stats import Stats, compute_stats, moments, read_stats, write_stats

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
    with pytest.raises(
        ValueError,
        match=r"moments are of other data \(column is 'sha256.* there and 'sha256.* here.*inspect-cache stats [^ ]*$",
    ):
        read_stats(open_cache(b), "a.pre_tail")


def test_a_bit_of_stored_moments_is_missed_nowhere(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", n=6, n_views=1)
    cache = open_cache(path)
    file = write_stats(cache, "a.pre_tail", compute_stats(cache, "a.pre_tail"))
    assert find_problems(path, full=True) == []
    whole = file.read_bytes()
    for at in (*range(9, len(whole), 997), len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="no moments of this column.*run inspect-cache stats"):
            read_stats(cache, "a.pre_tail")
        problems = find_problems(path, full=True)
        assert [problem.file for problem in problems] == ["stats/a.pre_tail.safetensors"]
        assert files_to_remove(path, problems) == [file], "the cache stays finished"
    file.write_bytes(whole)
    assert read_stats(cache, "a.pre_tail").n == 6 * 16


def test_a_channel_that_does_not_vary_normalises_to_0() -> None:
    covariance = torch.diag(torch.tensor([4.0, 0.0, 1e-18, 9.0]).double())
    found = Stats("", 1, torch.zeros(1, 4).double(), covariance)
    assert found.std.tolist() == found.residual_std.tolist() == [2, 1, 1, 3]


def test_moments_are_of_each_position_and_of_what_is_left_without_it(make_cache: Make, tmp_path: Path) -> None:
    cache = open_cache(make_cache(tmp_path / "cache"))
    for column in cache.columns:
        write_stats(cache, column, compute_stats(cache, column))
    found = read_stats(cache, "a.pre_tail")
    x = torch.cat([cache.read_tokens("a.pre_tail", cache.numbers, cache.numbers * 0 + v).double() for v in range(2)])
    left = (x - x.mean(0)).flatten(0, 1)
    assert torch.allclose(found.position_mean, x.mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(found.residual_covariance, torch.cov(left.T, correction=0), rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.residual_std, left.std(0, correction=0), rtol=1e-9)
    share = 1 - left.square().sum() / (x - x.mean((0, 1))).square().sum()
    assert found.position_share == pytest.approx(share.item(), rel=1e-9)
    assert found.cls is not None and found.cls.n == 48 and found.n == 16 * 48
    cls = torch.cat([cache.read_cls("a.pre_tail", cache.numbers, cache.numbers * 0 + v).double() for v in range(2)])
    assert torch.allclose(found.cls.position_mean, cls.mean(0)[None], rtol=0, atol=1e-12)
    assert torch.allclose(found.cls.residual_covariance, torch.cov(cls.T, correction=0), rtol=1e-9, atol=1e-12)
    assert read_stats(cache, "b.pre_tail").cls is None, "b has no CLS"


def test_a_large_common_offset_costs_no_digits() -> None:
    x = torch.randn(64, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e7
    _, mean, covariance = moments(x.split(5))
    left = (x - x.mean(0)).flatten(0, 1)
    assert torch.allclose(mean, x.mean(0), rtol=1e-15)
    assert torch.allclose(covariance, left.T @ left / len(left), rtol=1e-8, atol=1e-9)


def test_moments_of_a_cache_before_it_grew_stay_for_its_runs(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    cache, column = open_cache(make_cache(tmp_path / "c")), "a.pre_tail"
    before, among = cache.narrowed(None, 1), cache.narrowed(None, None, 16)
    told = {}
    for each in (before, among, cache, cache):
        write_stats(each, column, compute_stats(each, column))
        told[each.n_views, len(each.numbers)] = compute_stats(each, column)
    for each in (before, among, cache):
        found = read_stats(each, column)
        assert found.id == told[each.n_views, len(each.numbers)].id
        assert torch.equal(found.mean, told[each.n_views, len(each.numbers)].mean)
    assert len(list((cache.path / "stats").iterdir())) == 3
    assert len([file for file in files_of_column(cache.path, column) if file.parent.name == "stats"]) == 3
