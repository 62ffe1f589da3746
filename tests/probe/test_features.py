"""Features on disk: computed once, exactly, in chunks that survive damage; never those of other weights, images or views."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mrmae.probe import features as features_module
from mrmae.probe.data import open_data
from mrmae.probe.features import PooledFeatures, refuse_foreign_column
from mrmae.probe.sources import FeatureSource, open_source


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "FILE_IMAGES", 5)


def make(source: FeatureSource, images: Path, home: Path, **how: object) -> PooledFeatures:
    return PooledFeatures(source, open_data([str(images)], home).test, home, batch_size=3, workers=2, **how)  # type: ignore[arg-type]


def count_forwards(source: FeatureSource, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes of every forward pass from now on."""
    assert source.teacher
    calls: list[int] = []
    features, tower = source.teacher.tower.features, source.teacher.tower

    def counted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        calls.append(len(x))
        return features(x)

    object.__setattr__(tower, "features", counted)
    return calls


def test_they_are_those_of_the_model_in_the_order_of_the_keys(trained: Path, images: Path, tmp_path: Path) -> None:
    source = open_source(str(trained))
    found = make(source, images, tmp_path)
    assert source.teacher
    pixels = np.stack([found.part.pixels(i, 32, "bicubic") for i in range(12)])
    wanted = source.teacher.forward(torch.from_numpy(pixels))
    pooled, tokens = found.pooled(), found.tokens()
    assert wanted.cls is not None
    assert torch.allclose(pooled["cls"], wanted.cls, atol=1e-5)
    assert torch.allclose(pooled["mean"], wanted.tokens.mean(1), atol=1e-5)
    assert tokens.dtype == torch.float16 and (tokens.float() - wanted.tokens).abs().max() < 5e-3


def test_a_second_time_nothing_is_computed_and_tokens_bring_the_pooled(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(trained))
    calls = count_forwards(source, monkeypatch)
    first = make(source, images, tmp_path).tokens()
    assert calls == [3, 2, 3, 2, 2]
    again = make(source, images, tmp_path)
    assert torch.equal(again.tokens(), first) and again.pooled()["mean"].shape[0] == 12 and len(calls) == 5


def test_a_damaged_chunk_is_said_and_only_that_one_is_computed_again(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, said = open_source(str(trained)), []
    first = make(source, images, tmp_path)
    whole = first.pooled()
    path = first.path("pooled", 5)
    path.write_bytes(path.read_bytes()[:-7])
    calls = count_forwards(source, monkeypatch)
    again = make(source, images, tmp_path, say=said.append).pooled()
    assert calls == [3, 2] and all(torch.equal(again[name], whole[name]) for name in whole)
    assert len(said) == 1 and "pooled-000001.safetensors: is damaged" in said[0]


def test_other_weights_images_and_sizes_have_other_ids(
    trained: Path, images: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    first = make(open_source(str(trained)), images, tmp_path)
    others = make_images(tmp_path / "others", {"train": 2, "test": 4}, seed=1)
    ids = {
        first.id,
        make(open_source(str(trained)), others, tmp_path).id,
        make(open_source(str(trained), size=48), images, tmp_path).id,
        make(open_source("timm:test_vit/random?input_size=32"), images, tmp_path).id,
        PooledFeatures(first.source, open_data([str(images)], tmp_path).train, tmp_path).id,
    }
    assert len(ids) == 5
    assert make(open_source(str(trained / "student")), images, tmp_path / "elsewhere").id == first.id


def test_a_column_is_read_from_its_own_cache_only(tiny_cache: Path, images: Path, tmp_path: Path) -> None:
    source = open_source(f"{tiny_cache}#b")
    part = open_data([str(tiny_cache)], tmp_path, train_include=["*bild 00*"], test_include=["*bild 01*"]).test
    found = PooledFeatures(source, part, tmp_path)
    refuse_foreign_column(source, part)
    tokens = found.tokens()
    assert tokens.shape == (10, 16, 6) and "cls" not in found.pooled()
    assert part.cache and (tokens[3].float() - part.cache[part.rows[3].key].views[0]["b"]["tokens"]).abs().max() < 2e-3
    assert not list(found.folder.glob("tokens*"))  # the cache has them
    with pytest.raises(ValueError, match="a column has features of its own cache's views only"):
        refuse_foreign_column(source, open_data([str(images)], tmp_path).test)


def test_tokens_that_do_not_fit_in_memory_are_refused(trained: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test part: its patch tokens take 24.6 kB of memory, 1 kB are free"):
        make(open_source(str(trained)), images, tmp_path).tokens(limit_bytes=1000)


def test_features_that_are_no_numbers_name_the_image(trained: Path, images: Path, tmp_path: Path) -> None:
    source = open_source(str(trained))
    assert source.teacher
    with torch.no_grad():
        next(iter(source.teacher.tower.module.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="features of 'test/azure/test-0.png' are not finite"):
        make(source, images, tmp_path).pooled()
