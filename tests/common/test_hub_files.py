"""Caches and images at hf:// are read by ranges, through a file system object that stands in for the Hub's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from mrmae.common import backend, hub_files
from mrmae.common.backend import Unreachable, exists, locate
from mrmae.common.files import publish
from mrmae.common.hub_files import joined_ranges
from mrmae.extract.inspect.cli import main
from mrmae.shards.cache import open_cache


class StandIn(DirFileSystem):  # type: ignore[misc]
    """A folder as the Hub's file system shows it, which counts what it opens."""

    opened = 0

    def open(self, path: str, *arguments: Any, **named: Any) -> Any:
        assert named == {"cache_type": "none"}, "the Hub's own would read ahead"
        self.opened += 1
        return super().open(path, *arguments, **named)


@pytest.fixture
def hub(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """The Hub with the dataset me/photos, which holds the tiny cache as `c`."""
    (tmp_path / "datasets" / "me" / "photos@main").mkdir(parents=True)
    (tmp_path / "datasets" / "me" / "photos@main" / "c").symlink_to(tiny_cache)
    files = StandIn(path=str(tmp_path), fs=LocalFileSystem())
    monkeypatch.setattr(hub_files, "hub_file_system", lambda: files)
    backend.bucket_of.cache_clear()
    yield files
    backend.bucket_of.cache_clear()


def test_a_cache_on_the_hub_is_the_local_one(hub: StandIn, tiny_cache: Path) -> None:
    url = "hf://datasets/me/photos@main/c"
    near, far = open_cache(tiny_cache), open_cache(url)
    numbers = near.numbers
    raw = [cache.read_column("a.pre_tail", numbers, numbers % near.n_views) for cache in (near, far)]
    assert all(np.array_equal(raw[0][name].numpy(), raw[1][name].numpy(), equal_nan=name == "scale") for name in raw[0])
    assert np.array_equal(near.read_pixels(numbers, numbers * 0), far.read_pixels(numbers, numbers * 0))
    hub.opened = 0
    far.read_column("a.pre_tail", range(8), [0] * 8, ("tokens",))
    assert hub.opened == 1, "neighbours come in one request"
    told = CliRunner().invoke(main, ["verify", url, "--full"])
    assert told.exit_code == 0, told.output


def test_what_is_not_on_the_hub_or_cannot_be_had_is_named(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = locate("hf://datasets/me/photos@main/c/plan.json")
    assert exists(plan) and not exists(plan.with_name("x")) and not exists(plan.parent)
    with pytest.raises(ValueError, match="there is no cache here"):
        open_cache("hf://datasets/me/photos@main/d")
    for places in ([(10**9, 1)], [(0, 0)], [(-1, 5)]):
        with pytest.raises(OSError, match="hf://datasets/me/photos@main/c/plan.json"):
            plan.bucket.ranges(plan.key, places)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="hf:// is only read; write to a folder, then upload it with `hf upload`"):
        publish(plan, b"1", replace=True)
    told = CliRunner().invoke(main, ["drop", "hf://datasets/me/photos@main/c", "b", "--yes"])
    assert told.exit_code == 1 and "hf:// is only read" in told.output

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("401 Client Error. Cannot access gated repo for url https://hf/x?token=secret")

    monkeypatch.setattr(hub, "info", refused)
    with pytest.raises(Unreachable, match=r"plan.json: cannot be read: RuntimeError: 401 Client Error.*set HF_TOKEN"):
        exists(plan)


def test_ranges_with_little_between_them_are_one_request() -> None:
    mega = 1 << 20
    assert joined_ranges([0, 20, 3 * mega], [10, 40, 4 * mega], 10 * mega) == [(0, 40), (3 * mega, 4 * mega)]
    assert joined_ranges([50, 0], [200, 10], 100) == [(0, 100)]
