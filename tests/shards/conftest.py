"""Small finished caches, one of every kind of storage."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL: dict[str, Any] = {"n": 5, "size": 16, "grid": 2, "n_views": 2, "shard_samples": 3, "bad": (2,)}


@pytest.fixture(scope="session")
def make_small(make_cache: Callable[..., Path]) -> Callable[..., Path]:
    """The function that writes a cache of 5 images, one of them bad, in 2 views and shards of 3."""
    return functools.partial(make_cache, **SMALL)


@pytest.fixture(
    scope="session", params=[("zarr", "int8"), ("webdataset", "int8"), ("zarr", "fp8"), ("zarr", "pq4")], ids="-".join
)
def every_kind(
    make_small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """Such a cache of every kind in turn. Do not change it."""
    format, dtype = request.param
    return make_small(tmp_path_factory.mktemp("kinds") / "c", format=format, dtype=dtype)
