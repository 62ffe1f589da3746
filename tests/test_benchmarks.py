"""Benchmarks are run by hand: here it is seen that what they import is there."""

import importlib
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


def test_every_benchmark_finds_what_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"bench_cache", "bench_extract", "bench_quantise", "soak_cache", "soak_exits", "soak_kills"} <= set(NAMES)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with mock.patch.dict(os.environ):  # what a benchmark sets is its own
        for name in NAMES:
            importlib.import_module(name)
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name)
