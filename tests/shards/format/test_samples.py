"""samples.parquet: what would fill the memory is refused before, and no thread outlives the reading."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import ends, forked

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.format import SAMPLES, read_samples
from mrmae.shards.format.plan import load_plan


def rewritten(path: Path, change: Callable[[dict[str, list[Any]]], object], **options: Any) -> None:
    table = pq.read_table(path / "samples.parquet").to_pydict()
    change(table)
    pq.write_table(pa.table(table, SAMPLES), path / "samples.parquet", **options)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t["number"].__setitem__(-1, 10**9), "numbered 0 to 5"),
        (lambda t: t["number"].__setitem__(2, 2**63 - 1), "numbered 0 to 5"),
        (lambda t: t["number"].__setitem__(0, None), "'?number'? has rows without a value|column number"),
        (lambda t: t["key"].__setitem__(0, None), "column key has rows without a value"),
        (lambda t: t["key"].__setitem__(0, "x" * 10**7), "it says that it holds 6 rows"),
        (lambda t: [values.clear() for values in t.values()], "it says that it holds 0 rows"),
        (lambda t: [values.extend(values[:1] * 10**6) for values in t.values()], "it says that it holds"),
        (lambda t: [values.extend(values) for values in t.values()], "rows twice"),
    ],
    ids=["a number", "64 bits", "no number", "no key", "a bomb", "empty", "rows out of nothing", "twice"],
)
def test_samples_that_would_fill_the_memory_are_refused_before(copy: Path, change: Any, said: str) -> None:
    rewritten(copy, change, compression="zstd")
    parts = load_plan(copy).numbers
    with pytest.raises(ValueError, match=rf"samples\.parquet: cannot be read \(.*({said})"):
        read_samples(copy, parts)
    with pytest.raises(ValueError, match=r"samples\.parquet"):
        open_cache(copy, allow_partial=True)
    assert [problem.file for problem in check.find_problems(copy) if "samples" in problem.file] == ["samples.parquet"]


def test_samples_are_read_without_arrows_threads(tiny_cache: Path) -> None:
    """One that outlives the read by a moment holds Python's bytes, and a process that ends in that moment aborts."""

    def work() -> None:  # a fork begins with one thread
        read_samples(tiny_cache)
        assert len(os.listdir("/proc/self/task")) == 1

    assert ends([forked(work)]) == [0]
