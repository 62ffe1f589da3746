"""Order, views and masks do not depend on ranks, batch size or threads; only what is needed is read, ahead of time."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrmae.shards.cache import Cache, open_cache
from mrmae.train import batches
from mrmae.train.batches import Loaded, Position, Share
from mrmae.train.feed import BATCHES_AHEAD, Feed
from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.targets import Batch
from mrmae.train.method.terms import needed_arrays


@pytest.fixture
def cache(tiny_cache: Path) -> Cache:
    return open_cache(tiny_cache)


def test_an_epoch_visits_every_image_once_and_what_is_dropped_rotates(cache: Cache) -> None:
    n, size = len(cache.numbers), 7
    dropped = []
    for epoch in range(6):
        order = batches.numbers_of_epoch(cache, cache.numbers, seed=3, epoch=epoch)
        assert sorted(order[:].tolist()) == cache.numbers.tolist()
        seen = [batches.micro_batch_of(order, u, 0, Share(size)) for u in range(batches.updates_per_epoch(n, size))]
        dropped.append(frozenset(cache.numbers.tolist()) - set(np.concatenate(seen).tolist()))
        assert len(dropped[-1]) == n % size
    assert len(set(dropped)) > 3


@pytest.mark.parametrize("ranks, accum", [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_ranks_and_micro_batches_share_out_exactly_the_global_batch(cache: Cache, ranks: int, accum: int) -> None:
    order = batches.numbers_of_epoch(cache, cache.numbers, seed=0, epoch=1)
    parts = [
        batches.micro_batch_of(order, 1, micro, Share(8, rank, ranks, accum))
        for rank in range(ranks)
        for micro in range(accum)
    ]
    assert np.concatenate(parts).tolist() == order[8:16].tolist()


def test_views_take_turns_by_epoch(cache: Cache) -> None:
    views = np.stack([batches.views_of(cache, cache.numbers, epoch=epoch) for epoch in range(cache.n_views + 1)])
    assert all(sorted(column) == list(range(cache.n_views)) for column in views[:-1].T.tolist())
    assert (views[-1] == views[0]).all()
    first = [(0 + (h % 2**64)) % cache.n_views for h in cache.hashes.tolist()]  # (epoch + hash) mod K, unsigned
    assert views[0].tolist() == [first[number] for number in cache.numbers]


def test_what_is_held_out_depends_on_the_key_alone_and_is_spread_over_the_shards(
    cache: Cache, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    numbers, held = batches.split_off(cache, 0.3)
    assert sorted([*numbers, *held]) == cache.numbers.tolist() and len({n // cache.shard_samples for n in held}) > 1
    assert batches.split_off(cache, 0.0)[1].size == 0
    more = set(batches.split_off(cache, 0.5)[1])
    assert set(held) < more
    fewer = open_cache(make_cache(tmp_path / "fewer", n=12, n_views=1))  # the same keys, half as many: other numbers
    aside = {fewer.keys[n] for n in batches.split_off(fewer, 0.3)[1]}
    assert aside == {cache.keys[n] for n in held} & set(fewer.keys)
    with pytest.raises(ValueError, match="--hold-out 1e-09: takes 0 of the 24"):
        batches.split_off(cache, 1e-9)


def test_an_epoch_leaves_out_what_is_held_out_and_keeps_the_order_of_the_rest(cache: Cache) -> None:
    numbers, held = batches.split_off(cache, 0.3)
    whole = batches.numbers_of_epoch(cache, cache.numbers, seed=3, epoch=2)[:].tolist()
    assert batches.numbers_of_epoch(cache, numbers, seed=3, epoch=2)[:].tolist() == [n for n in whole if n not in held]


def _load(cache: Cache, recipe: Recipe, numbers: Any, epoch: int) -> Loaded:
    info = batches.cache_info(cache)
    batch = batches.load_batch(cache, numbers, epoch=epoch, needed=needed_arrays(recipe, info))
    return batch, draw_masks(batch, Draw(recipe.seed, epoch), recipe=recipe.mask, l=info.n_patches)


@pytest.mark.parametrize("name", ["mr-mae", "mr-mae-focused"])
def test_an_image_gets_the_same_pixels_targets_and_mask_in_any_batch(
    cache: Cache, tiny_recipe: Callable[..., Recipe], name: str
) -> None:
    recipe = tiny_recipe(name)
    batch, masks = _load(cache, recipe, cache.numbers[:6], 5)
    alone, its = _load(cache, recipe, cache.numbers[4:5], 5)
    assert torch.equal(batch.pixels[4:5], alone.pixels)
    assert torch.equal(masks.ids_keep[4:5], its.ids_keep) and torch.equal(masks.ids_predict[4:5], its.ids_predict)
    for teacher, arrays in alone.targets.items():
        for array, values in arrays.items():
            assert torch.equal(batch.targets[teacher][array][4:5], values)


def test_only_needed_arrays_are_read(
    cache: Cache, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, tuple[str, ...]]] = []
    original = cache.read_column

    def spy(column: str, numbers: Any, views: Any, arrays: Any) -> Any:
        read.append((column, arrays))
        return original(column, numbers, views, arrays)

    monkeypatch.setattr(cache, "read_column", spy)
    _load(cache, tiny_recipe("mae"), cache.numbers[:2], 0)
    assert read == []
    only = f"terms.mimic.teachers=[{next(iter(cache.teachers))}]"
    _load(cache, tiny_recipe("mr-mae", only), cache.numbers[:2], 0)
    assert [set(arrays) for _, arrays in read] == [{"tokens", "scale"}]


def test_visible_rows_are_the_rows_at_ids_keep(cache: Cache, tiny_recipe: Callable[..., Recipe]) -> None:
    batch, masks = _load(cache, tiny_recipe("mr-mae"), cache.numbers[:3], 0)
    small = batches.visible_rows(batch, masks)
    assert small.rows == "visible"
    for teacher, arrays in small.targets.items():
        for b in range(3):
            for array in ("tokens", "scale"):
                assert torch.equal(arrays[array][b], batch.targets[teacher][array][b][masks.ids_keep[b]])


def test_tokens_leave_the_host_whole_only_where_hidden_ones_are_targets(tiny_recipe: Callable[..., Recipe]) -> None:
    assert batches.reads_only_visible(tiny_recipe("mr-mae"))
    assert batches.reads_only_visible(tiny_recipe("mae"))
    assert not batches.reads_only_visible(tiny_recipe("mimic-masked"))


def test_cache_info_tells_the_model_what_the_cache_holds(cache: Cache) -> None:
    info = batches.cache_info(cache)
    assert (info.size, info.grid) == (cache.size, cache.grid) and set(info.teachers) == set(cache.teachers)
    for name, teacher in info.teachers.items():
        column = cache.columns[cache.teachers[name]]
        assert teacher.width == column.spec.width and teacher.has_attention == column.spec.has_attention
        mean = column.quantiser.channel_mean
        assert teacher.channel_mean is None if mean is None else teacher.channel_mean.tolist() == mean.tolist()


def test_a_batch_that_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match="batch_size: is 25, more than the 24 valid images.*--batch-size 24"):
        batches.check_share(Share(25), 24)
    with pytest.raises(ValueError, match="is 6, .* 2 processes x 2 micro-batches; give a multiple of 4"):
        batches.check_share(Share(6, 0, 2, 2), 24)
    with pytest.raises(ValueError, match="is 2, .* over 4 processes x 1 micro-batches; give a multiple of 4"):
        batches.check_share(Share(2, 0, 4, 1), 24)  # fewer images than ranks
    batches.check_share(Share(24, 0, 2, 3), 24)


def test_jobs_continue_in_the_middle_of_an_epoch() -> None:
    todo = list(batches.jobs(Position(1, 2), epochs=3, updates=3, accum=2))
    assert todo == [(1, 2, 0), (1, 2, 1), *((2, u, m) for u in range(3) for m in range(2))]


def _tagged(number: int) -> Loaded:
    ids = torch.full((1, 1), number)
    return Batch(torch.tensor([number]), torch.zeros(1, 2, 2, 3, dtype=torch.uint8), {}), Masks(ids, ids)


def _todo(n: int) -> Iterator[tuple[int, int, int]]:
    return ((0, u, 0) for u in range(n))


def _drain(feed: Feed) -> list[int]:
    seen = []
    while True:
        try:
            seen.append(int(next(feed)[0].samples))
        except StopIteration:
            return seen


def test_feed_keeps_the_order_whatever_takes_longest() -> None:
    def load(epoch: int, update: int, micro: int) -> Loaded:
        time.sleep(0.02 if update % 2 == 0 else 0)
        return _tagged(update)

    with Feed(load, _todo(12), torch.device("cpu")) as feed:
        assert _drain(feed) == list(range(12))


def _until(holds: Callable[[], bool]) -> None:
    """Wait for another thread, however loaded the machine is."""
    end = time.monotonic() + 30
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)


def test_feed_prepares_ahead_but_not_without_bound() -> None:
    loaded: list[int] = []

    def load(epoch: int, update: int, micro: int) -> Loaded:
        loaded.append(update)
        return _tagged(update)

    with Feed(load, _todo(100), torch.device("cpu")) as feed:
        for ahead in (BATCHES_AHEAD, BATCHES_AHEAD + 1):
            _until(lambda ahead=ahead: len(loaded) >= ahead)
            time.sleep(0.02)  # one more would come at once
            assert len(loaded) == ahead
            next(feed)


def test_feed_measures_the_wait_for_a_slow_loader_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], threading.Event()

    def now() -> float:
        asked.set()
        return clock[0]

    def load(epoch: int, update: int, micro: int) -> Loaded:
        if update == 0:
            assert asked.wait(30)  # training waits for it already
            clock[0] += 3.0
        return _tagged(update)

    monkeypatch.setattr(time, "perf_counter", now)
    with Feed(load, _todo(3), torch.device("cpu")) as feed:
        next(feed)
        assert feed.waited_s == 3.0
        clock[0] += 5.0  # training works
        next(feed)
        assert feed.waited_s == 3.0


def test_feed_raises_what_loading_raised() -> None:
    def load(epoch: int, update: int, micro: int) -> Loaded:
        if update == 1:
            raise ValueError("shard 7 is damaged")
        return _tagged(update)

    with Feed(load, _todo(3), torch.device("cpu")) as feed:
        next(feed)
        with pytest.raises(ValueError, match="shard 7 is damaged"):
            next(feed)


def test_feed_leaves_no_thread_behind() -> None:
    with Feed(lambda e, u, m: _tagged(u), _todo(100), torch.device("cpu")) as feed:
        next(feed)
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_feed_to_a_gpu_gives_the_same_batches() -> None:
    def load(epoch: int, update: int, micro: int) -> Loaded:
        return _tagged(update)

    with Feed(load, _todo(50), torch.device("cuda")) as feed:
        assert _drain(feed) == list(range(50))
