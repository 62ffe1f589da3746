"""Benchmarks are run by hand: here it is seen that what they import is there."""

import csv
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
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


@pytest.fixture
def gpu_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/gpu.py, imported like a script's neighbour; what it imports is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in NAMES:
        sys.modules.pop(name, None)


def test_a_piece_that_fails_hangs_or_leaves_a_helper_ends_within_its_time(
    gpu_script: ModuleType, tmp_path: Path
) -> None:
    def run(text: str, seconds: float = 20.0) -> str:
        (script := tmp_path / "piece.py").write_text(text)
        piece = gpu_script.Piece("x", seconds, str(script), ["full"], ["small"], "x.csv")
        how: str = gpu_script.run_piece(piece, small=True, out=tmp_path / "out.csv")
        return how

    told = f"import sys; sys.exit(sys.argv[1:] != ['small', '--out', {str(tmp_path / 'out.csv')!r}])"
    assert run(told).startswith("ok, ")
    assert run("import sys; sys.exit(3)").startswith("FAILED with status 3")
    kept = f"import time; open({str(tmp_path / 'out.csv')!r}, 'w').write('a\\n1\\n'); time.sleep(60)"
    assert run(kept, 0.7).startswith("CUT SHORT at its limit, 1 of 1 s")
    assert gpu_script.read_csv(tmp_path / "out.csv") == [{"a": "1"}] and not gpu_script.read_csv(tmp_path / "none")
    helper = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    assert run(f"{helper} open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))").startswith("ok, ")
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.02)
    else:
        pytest.fail("the helper still runs")


def test_targets_are_met_missed_or_not_measured(gpu_script: ModuleType) -> None:
    def rows() -> dict[str, list[dict[str, str]]]:
        common = {"recipe": "mr-mae", "mode": "compiled", "loader_share": "0.9"}
        train = {"arm": "MR-MAE cached", "ratio_to": "MR-MAE online", "mode": "compiled", "ratio": "0.47"}
        kernel = {"kernel": "pixel_loss", "mode": "forward", "shape": "n1"}
        return {
            "throughput": [common | {"images_per_s": "5600"}, common | {"mode": "eager", "images_per_s": "9999"}],
            "extraction": [{"ratio": "1.06"}],
            "steps": [train, train | {"mode": "eager", "ratio": "0.6"}],
            "kernels": [
                kernel | {"provider": "triton", "p50_ms": "2"},
                kernel | {"provider": "reference compiled", "p50_ms": "1.6"},
            ],
        }

    table = gpu_script.targets_table(rows(), "a GPU", small=False)
    assert table[0].endswith("here: a GPU")
    assert [line.split()[-2:] for line in table[1:]] == [
        ["5600", "met"], ["not", "measured"], ["0.9", "missed"], ["not", "measured"], ["1.06", "missed"], ["0.47", "met"],
        ["not", "measured"], ["1.25", "missed"],
    ]  # fmt: skip
    assert all(line.endswith("-  not measured") for line in gpu_script.targets_table(rows(), "CPU", small=True)[1:])
    assert sum(piece.seconds for piece in gpu_script.PIECES) <= 600


@pytest.mark.soak
def test_everything_wanted_from_a_gpu_runs_with_small_shapes_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--small", "--results", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("\n--- ") == 2 * 7 and done.stdout.count("not measured") == 8
    counts = {path.name: len(list(csv.DictReader(path.open()))) for path in tmp_path.glob("*.csv")}
    assert counts == {"throughput.csv": 5, "two_teachers.csv": 1, "kernels.csv": 16, "train.csv": counts["train.csv"]}
    assert counts["train.csv"] >= 20
