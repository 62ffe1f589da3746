"""JSON of another shape than its writer's is a damaged file, never an error of Python."""

from typing import Any

import pytest

from mrmae.shards.commit import RecordFields
from mrmae.shards.format.shape import expect_kind, parsed


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, 5, True),
        (int, 2**64 - 1, 2**64),
        (int, 1, 1.0),
        (float, 1, "1"),
        (float, 0.5, float("nan")),
        (float, 0, 10**400),
        (bool, True, 1),
        (str, "é", "\ud800"),
        (str | None, None, 0),
        (list[int], [], {}),
        (tuple[int, int], [1, 2], [1, 2, 3]),
        (dict[str, int], {"a": 1}, {"a": [1]}),
        (Any, {"a": [1, None, "x"]}, {"a": ["\udfff"]}),
        (RecordFields, None, {"files": {}}),
    ],
)
def test_a_value_of_another_type_is_refused(kind: Any, good: Any, bad: Any) -> None:
    if kind is not RecordFields:
        expect_kind(good, kind)
    with pytest.raises(ValueError, match="expected|has no"):
        expect_kind(bad, kind)


@pytest.mark.parametrize("depth", [60, 100_000])
def test_lists_in_lists_are_refused_before_they_fill_the_stack(depth: int) -> None:
    with pytest.raises(ValueError, match="too deep"):
        parsed(b"[" * depth + b"]" * depth, Any)
