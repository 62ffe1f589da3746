"""The order of an epoch: everyone once, near neighbours in time come from few shards, golden."""

import numpy as np

from mrmae.shards.format.spec import key_hash, signed_hashes
from mrmae.shards.order import EpochOrder, epoch_order, view_of, views_for, words


def test_every_sample_comes_once() -> None:
    for n in (1, 7, 100, 1003):
        assert sorted(epoch_order(n, 10, seed=1, epoch=2)) == list(range(n))
    assert len(epoch_order(np.array([], np.int64), 10, seed=0, epoch=0)) == 0


def test_orders_are_golden_and_differ_by_seed_and_epoch() -> None:
    assert epoch_order(12, 3, seed=0, epoch=0, window=2).tolist() == [8, 7, 2, 6, 0, 1, 4, 10, 5, 9, 11, 3]
    orders = {tuple(epoch_order(50, 5, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_a_window_holds_few_shards() -> None:
    order = epoch_order(1000, 10, seed=3, epoch=0, window=4)
    for start in range(0, 1000, 40):
        assert len(set(order[start : start + 40] // 10)) == 4
    firsts = [epoch_order(1000, 10, seed=3, epoch=e, window=4)[:40] // 10 for e in range(2)]
    assert set(firsts[0]) != set(firsts[1])


def test_samples_within_a_window_are_mixed() -> None:
    order = epoch_order(4000, 100, seed=0, epoch=0, window=8)
    first_shard = order[:800] // 100
    assert len(set(first_shard[:32])) >= 6, "a batch of 32 sees most of the eight shards"


def test_leaving_a_sample_out_moves_no_other() -> None:
    whole = epoch_order(100, 10, seed=0, epoch=5)
    without = epoch_order(np.array([n for n in range(100) if n not in (3, 57)]), 10, seed=0, epoch=5)
    assert without.tolist() == [n for n in whole.tolist() if n not in (3, 57)]


def test_a_part_of_an_order_is_computed_alone() -> None:
    numbers = np.array([n for n in range(1003) if n % 7 and not 120 <= n < 150])
    order = EpochOrder(numbers, 10, seed=2, epoch=1, window=3)
    whole = order[:]
    assert len(order) == len(whole) and sorted(whole) == numbers.tolist()
    for start in range(0, len(whole), 13):
        assert np.array_equal(
            EpochOrder(numbers, 10, seed=2, epoch=1, window=3)[start : start + 40], whole[start : start + 40]
        )
    assert order[40:3:-7].tolist() == whole[40:3:-7].tolist() and order[3:40:7].tolist() == whole[3:40:7].tolist()
    assert len(order[5:5]) == 0 and np.array_equal(words(50, 1, 2, 1)[9:], words(41, 1, 2, 1, 9))


def test_window_0_reads_in_order() -> None:
    assert epoch_order(30, 4, seed=9, epoch=9, window=0).tolist() == list(range(30))


def test_views_cycle_by_the_unsigned_hash() -> None:
    keys = [f"{i}.jpg" for i in range(20)]
    for n_views in (1, 2, 3, 5):
        for epoch in (0, 1, 7):
            expected = [(epoch + key_hash(key)) % n_views for key in keys]
            assert view_of(signed_hashes(keys), epoch, n_views).tolist() == expected


def test_longer_runs_are_recommended_more_views() -> None:
    assert [views_for(epochs) for epochs in (1, 25, 26, 100, 101, 1600)] == [1, 1, 2, 2, 4, 4]
