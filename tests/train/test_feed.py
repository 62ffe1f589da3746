"""What a run has fetched ahead: the shards of the window that comes next in its order, if two windows may be kept."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mrmae.shards.format import PIXELS, Unit
from mrmae.shards.order import WINDOW, EpochOrder
from mrmae.train.feed import fetching_ahead


def order(epoch: int) -> EpochOrder:
    """Of 20 shards of 4 images: windows of 8, 8 and 4 shards."""
    return EpochOrder(80, 4, seed=0, epoch=epoch)


def run_of(expected: list[list[Unit]], most_bytes: int) -> Any:
    """As much of a run of two epochs as counts here; a window is 100 bytes, an update 8 images."""
    local = SimpleNamespace(
        near=SimpleNamespace(most_bytes=most_bytes),
        window_bytes=lambda columns, window: 100 if (set(columns), window) == ({PIXELS, "a.pre_tail"}, WINDOW) else 0,
        expect=lambda units: expected.append(list(units)),
    )
    needed: dict[str, set[str]] = {"a": {"tokens"}, "b": set()}
    return SimpleNamespace(
        cache=SimpleNamespace(local=local, manifest={"some": 1}, n_views=2),
        recipe=SimpleNamespace(optim=SimpleNamespace(epochs=2)),
        info=SimpleNamespace(column=lambda target: f"{target}.pre_tail"), needed=needed,
        setup=SimpleNamespace(online=False), share=SimpleNamespace(batch_size=8),
    )  # fmt: skip


def test_the_next_window_is_expected_once_and_the_next_epochs_first_after_the_last() -> None:
    expected: list[list[Unit]] = []
    fetch_next = fetching_ahead(run_of(expected, 200), order)
    for epoch in range(2):
        for update in range(10):
            for _ in range(2):
                fetch_next(epoch, update)
    shards = [list(dict.fromkeys(shard for _, _, shard in units)) for units in expected]
    first, second = order(0), order(1)
    assert shards == [
        first.shards_of(1),
        first.shards_of(2),
        second.shards_of(0),
        second.shards_of(1),
        second.shards_of(2),
        [],
    ]
    assert set(expected[0]) == {(v, c, s) for v in range(2) for c in (PIXELS, "a.pre_tail") for s in first.shards_of(1)}
    numbers = np.concatenate([first[:32], first[32:64], first[64:]]) // 4
    assert [set(numbers[at : at + 32].tolist()) for at in (0, 32, 64)] == [set(first.shards_of(w)) for w in range(3)]


@pytest.mark.parametrize("most_bytes, told", [(199, 0), (200, 1)])
def test_nothing_is_fetched_ahead_where_two_windows_are_too_much(most_bytes: int, told: int) -> None:
    expected: list[list[Unit]] = []
    fetching_ahead(run_of(expected, most_bytes), order)(0, 0)
    assert len(expected) == told
