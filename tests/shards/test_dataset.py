"""A cache as torch data sets: the values of the cache, the order of an epoch, for any number of workers and ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mrmae.shards.cache import open_cache
from mrmae.shards.dataset import CacheEpoch, CacheImages
from mrmae.shards.order import epoch_order, view_of


def batches(workers: int, *args: Any, **how: Any) -> list[dict[str, Any]]:
    return list(DataLoader(CacheEpoch(*args, **how), batch_size=None, num_workers=workers))


def test_items_are_the_samples_of_the_cache(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    images = CacheImages(cache, columns=["a", "b.pre_tail"], epoch=3)
    assert len(images) == 24 and images.classes == ["class 0", "class 1", "class 2"]
    item, sample = images[5], cache[5]
    view = sample.views[int(view_of(cache.hashes.numpy()[[5]], 3, 2)[0])]
    assert item["key"] == sample.key and images.classes[item["label"]] == sample.label
    assert torch.equal(item["pixels"], view["pixels"])
    assert torch.equal(item["a"], view["a"]["tokens"]) and torch.equal(item["b.pre_tail"], view["b"]["tokens"])
    assert "attention" not in item and set(item) == {"number", "key", "label", "pixels", "a", "b.pre_tail"}
    with pytest.raises(ValueError, match="there is no column 'c'"):
        CacheImages(cache, columns=["c"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_of_the_epochs_order(tiny_cache: Path, workers: int) -> None:
    cache = open_cache(tiny_cache)
    order = epoch_order(cache.numbers, cache.shard_samples, seed=1, epoch=2)
    found = batches(workers, cache, 5, seed=1, epoch=2, columns=["b"])
    assert [batch["number"].tolist() for batch in found] == [order[i : i + 5].tolist() for i in range(0, 20, 5)]
    views = view_of(cache.hashes.numpy()[order[:5]], 2, 2)
    assert torch.equal(found[0]["b"], cache.read_tokens("b.pre_tail", order[:5], views))
    shuffled = DataLoader(CacheImages(cache), batch_size=8, shuffle=True, num_workers=workers)
    numbers = [number for batch in shuffled for number in batch["number"].tolist()]
    assert sorted(numbers) == list(range(24))


def test_ranks_share_an_epoch_without_overlap(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    alone = [batch["number"].tolist() for batch in batches(0, cache, 8)]
    parts = [batches(0, cache, 4, rank=rank, ranks=2) for rank in range(2)]
    assert [a["number"].tolist() + b["number"].tolist() for a, b in zip(*parts)] == alone
    with pytest.raises(ValueError, match="24 images are less than a batch of 13 for each of 2 ranks"):
        CacheEpoch(cache, 13, ranks=2)


def test_images_that_cannot_be_read_are_left_out_and_a_missing_label_is_minus_one(
    make_cache: Any, tmp_path: Path
) -> None:
    cache = open_cache(make_cache(tmp_path / "c", n=9, labels=False, bad=[2], n_views=1, shard_samples=4))
    images = CacheImages(cache)
    assert len(images) == 8 and {int(images[i]["label"]) for i in range(8)} == {-1}
    assert np.array_equal([images[i]["number"] for i in range(8)], cache.numbers)
