"""A small unfinished cache, to be altered."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def unfinished(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache without a manifest. Do not change it."""
    return make_cache(tmp_path_factory.mktemp("bounds") / "c", n=6, size=16, grid=2, n_views=1, finalise=False)


@pytest.fixture
def copy(unfinished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(unfinished, tmp_path / "c")
