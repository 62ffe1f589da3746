"""Intervals, tables, and the pictures' arithmetic."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae.probe import dense, report


def test_the_interval_is_that_of_resampled_test_images() -> None:
    right = torch.arange(200) % 4 != 0
    low, high = report.interval(right, seed=0, resamples=20_000)
    draw = np.random.default_rng(1)
    means = right.numpy()[draw.integers(0, 200, (20_000, 200))].mean(1)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.006)
    assert report.interval(right, seed=3) == report.interval(right, seed=3)
    assert report.interval(torch.ones(5, dtype=torch.bool)) == (1.0, 1.0)


def test_about_95_percent_of_the_intervals_hold_the_truth() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for i in range(400):
        low, high = report.interval(torch.from_numpy(draw.random(300) < 0.7), seed=i, resamples=500)
        hits += low <= 0.7 <= high
    assert 0.91 < hits / 400 < 0.98


def test_the_paired_interval_is_that_of_images_drawn_for_both() -> None:
    draw = np.random.default_rng(0)
    a = torch.from_numpy(draw.random(200) < 0.7)
    b = a.logical_xor(torch.from_numpy(draw.random(200) < 0.1))
    low, high = report.paired_interval(a, b, seed=0, resamples=20_000)
    at = np.random.default_rng(1).integers(0, 200, (20_000, 200))
    differences = a.numpy()[at].mean(1) - b.numpy()[at].mean(1)
    assert (low, high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=0.006)
    assert report.paired_interval(a, a) == (0.0, 0.0)
    alone = [np.subtract(*report.interval(x)[::-1]) for x in (a, b)]
    assert high - low < min(alone), "paired is narrower than either alone"


def test_tables_survive_odd_names_and_hold_no_absolute_paths() -> None:
    assert report.cell("a|b\nc") == "a\\|b c"
    assert report.cell("timm:x@/data/w/file.safetensors?std=0.5") == "timm:x@file.safetensors?std=0.5"
    assert report.title("timm:x@/data/w/file.safetensors?std=0.5") == "timm:x@file.safetensors"
    assert len(report.title("x" * 99)) == 48
    assert report.cell("/data/runs/mr-mae") == "mr-mae" and report.cell("runs/mr-mae#a/b") == "runs/mr-mae#a/b"


def test_a_result_with_another_id_or_a_damaged_file_is_none(tmp_path: Path) -> None:
    assert report.load_result(tmp_path, "knn", "sha256:" + "0" * 64) is None
    path = report.result_path(tmp_path, "knn", "sha256:" + "0" * 64)
    path.parent.mkdir(parents=True)
    for content in ('{"id": "sha256:1"}', "not json"):
        path.write_text(content)
        assert report.load_result(tmp_path, "knn", "sha256:" + "0" * 64) is None


def test_kmeans_finds_separate_clusters_and_numbers_them_by_size() -> None:
    draw = torch.Generator().manual_seed(0)
    at = torch.tensor([0] * 10 + [1] * 30 + [2] * 20)
    x = torch.randn(60, 3, generator=draw) * 0.1 + 5 * torch.eye(3)[at]
    assert dense.kmeans(x, 3, seed=0).tolist() == torch.tensor([2, 0, 1])[at].tolist()
    assert torch.equal(dense.kmeans(x, 4, seed=5), dense.kmeans(x, 4, seed=5))
    with pytest.raises(ValueError, match="dense.clusters=61: more clusters than 60 tokens"):
        dense.kmeans(x, 61, seed=0)


def test_identical_tokens_are_one_cluster() -> None:
    assert not dense.kmeans(torch.ones(8, 3), 3, seed=0).any()


def test_pictures_are_written(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 16, 16, 3), generator=draw, dtype=torch.uint8)
    attention = torch.randn(2, 8, 16, generator=draw).softmax(-1)
    dense.draw_attention(tmp_path / "a.png", pictures, attention, (4, 4), title="t")
    dense.draw_dense(
        tmp_path / "d.png",
        pictures,
        torch.randn(2, 16, 5, generator=draw),
        (4, 4),
        clusters=3,
        parts=2,
        seed=0,
        title="t",
    )
    assert all(np.asarray(Image.open(tmp_path / name)).std() > 20 for name in ("a.png", "d.png"))
    heat = dense.attention_heat(torch.tensor([[0.2, 0.21, 0.22, 0.24]]), (2, 2))
    assert heat.shape == (1, 2, 2, 3) and heat[0, 1, 1, 0] > 230 > 77 > heat[0, 0, 0, 0]  # viridis: yellow, violet
