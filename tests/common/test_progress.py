"""How long a run will still take: by kind of work, from the recent past."""

import math

import pytest

from mrmae.common.progress import Pace, Progress


def test_the_first_of_a_kind_counts_only_while_it_is_alone() -> None:
    pace = Pace()
    assert pace.seconds_left({"forward": 3}) == math.inf
    pace.add("forward", 2, 20.0)
    assert pace.seconds_left({"forward": 3}) == 30.0
    pace.add("forward", 2, 4.0)
    assert pace.seconds_left({"forward": 3}) == 6.0


def test_time_left_adds_up_over_kinds_of_work() -> None:
    pace = Pace()
    for kind, seconds in (("decode", 1.0), ("forward", 2.0)):
        pace.add(kind, 1, 9.0)
        pace.add(kind, 1, seconds)
    assert pace.seconds_left({"decode": 10, "forward": 5, "store": 7, "calibrate": -1}) == 20.0


def test_a_disk_that_slows_down_is_followed() -> None:
    pace = Pace()
    for _ in range(100):
        pace.add("write", 1, 1.0)
    for _ in range(150):
        pace.add("write", 1, 3.0)
    assert pace.seconds_each("write") == pytest.approx(3.0)


def test_work_of_later_stages_is_part_of_the_time_left() -> None:
    pace = Pace()
    with Progress("calibrating", 2, left={"decode": 2, "store": 2}, pace=pace) as progress:
        for seconds in (5.0, 2.0):
            progress.spent("decode", 1, seconds)
            progress.add()
        pace.add("store", 1, 3.0)
        assert pace.seconds_left(progress.left) == 6.0
