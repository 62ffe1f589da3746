"""The Triton kernels against float64: under the interpreter on CPU, and the same cases on a device with `-m gpu`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PARITY = Path(__file__).parent / "parity.py"


def run_parity(device: str, **environment: str) -> list[dict[str, Any]]:
    """One subprocess for all cases: triton reads TRITON_INTERPRET once, at import."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, PARITY, device], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_close_to_float64(rows: list[dict[str, Any]]) -> None:
    failures = [r for r in rows if "failure" in r or not r["error"] <= r["limit"]]
    assert not failures, "\n".join(map(str, failures))
    kinds = {r["case"].split()[0] for r in rows}
    assert kinds == {"gather", "pixel", "embed", "mimic", "decode"} and len(rows) > 150


def test_interpreted_kernels_equal_the_float64_reference() -> None:
    pytest.importorskip("triton")
    assert_close_to_float64(run_parity("cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.gpu
def test_kernels_on_the_device_equal_the_float64_reference() -> None:
    assert_close_to_float64(run_parity("cuda"))
