"""Benchmarks are run by hand: here it is seen that what they import is there."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IMPORTS = (
    "import importlib, sys; sys.path.insert(0, sys.argv[1]); [importlib.import_module(name) for name in sys.argv[2:]]"
)


def test_every_benchmark_finds_what_it_imports() -> None:
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    assert {"bench_cache", "bench_extract", "bench_quantise", "soak_cache", "soak_exits", "soak_kills"} <= set(names)
    command = [sys.executable, "-c", IMPORTS, str(BENCHMARKS), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
