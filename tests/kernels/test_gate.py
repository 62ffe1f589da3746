"""What the compiler makes of the kernels, without a GPU, and the committed table of it."""

import csv
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from mrmae.kernels import gate

TABLE = Path(__file__).parents[2] / "benchmarks/results/kernels_gate.csv"
NARROW_LOADS = ("patch 14",)  # no multiple of a vector
WORDS = ("patch 8", "rows of 696 bytes")  # an RGB row of 24 bytes, rows at multiples of 8 bytes
NARROW_STORES = ("forward", "patch 14")  # one number per patch or token
# Multiplications of a row by a stride: ids, image, pred or student, codes, scale, grad, out (two factors, of tokens one).
ROWS = {
    "gather": 4,
    "embed": 4,
    "pixel forward": 3,
    "pixel backward": 6,
    "mimic forward": 3,
    "mimic backward": 5,
    "decode": 3,
}
# Nearly all cases for sm_90, one per kernel for the other two; the committed table holds all of them for all three.
SOME = ("gather u8 NHWC -> bf16", "embed bf16 -> fp32", "pixel backward u8 NHWC, bf16", "mimic backward int8, ln0 mse")
COMPILED = {90: [case for case in gate.CASES if "1280" not in case], 80: SOME, 100: SOME}


def assert_within_budget(case: str, row: dict[str, Any]) -> None:
    seen = {k: int(v) for k, v in row.items() if k not in ("case", "code", "loads", "stores")}
    assert seen["stack"] == seen["local"] == 0, f"{case} spills: {seen}"
    assert seen["registers"] <= 96, f"{case}: {seen}"
    assert seen["shared"] <= 8192, f"{case}: {seen}"
    alone = seen["warps"] == 1 or case.startswith(("gather", "pixel backward")) and "patch 14" not in case
    assert seen["barriers"] <= (0 if alone else 7), f"{case}: {seen}"  # only sums over warps wait
    assert "u8 NHWC" not in case or "patch 14" in case or not row["loads"].startswith(("8:", "16:")), (
        f"{case} reads bytes: {row}"
    )
    assert seen["load_bits"] >= 64 or any(word in case for word in NARROW_LOADS), f"{case}: {seen}"
    assert seen["store_bits"] >= 64 or any(word in case for word in NARROW_STORES), f"{case}: {seen}"
    if "u8 NHWC" in case and "patch 14" not in case:
        predictions = 0 if case.startswith("gather") else 4 if "4 channels" in case else 3  # 8 of each channel
        assert image_loads(row["loads"], predictions) == ((3, 0) if case.endswith(WORDS) else (0, 2)), f"{case}: {row}"
    least = next(n for kernel, n in ROWS.items() if case.startswith(kernel))
    assert seen["int64_rows"] >= least, f"{case} multiplies a row in 32 bits: {seen}"


def image_loads(loads: str, predictions: int) -> tuple[int, int]:
    """How many loads of 64 and of 128 bits are not `predictions`: those of a run of 8 pixels, in words or in pairs of them."""
    counts = {int(bits): int(n) for bits, n in (part.split(":") for part in loads.split())}
    return counts.get(64, 0), counts.get(128, 0) - predictions


@pytest.mark.parametrize("sm", COMPILED)
def test_compiled_kernels_stay_within_their_budgets(sm: int) -> None:
    rows = gate.resources_of([gate.CASES[case]() for case in COMPILED[sm]], sm)
    assert len(rows) == len(COMPILED[sm])
    for case, row in zip(COMPILED[sm], rows):
        assert_within_budget(case, row)


def test_the_committed_table_is_complete_and_within_budget() -> None:
    whole = list(csv.DictReader(TABLE.open()))
    rows = [row for row in whole if row["code"] == "now"]
    assert {row["code"] for row in whole} == {"before", "words", "now"} and {row["case"] for row in whole} == set(
        gate.CASES
    )
    assert [(r["case"], int(r["sm"])) for r in rows] == [(c, sm) for c in gate.CASES for sm in gate.ARCHITECTURES]
    for row in rows:
        assert_within_budget(row["case"], row)


def test_widths_are_read_from_machine_code() -> None:
    sass = "@P0 LDG.E.U8 R1, [R2] ; LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ; STG.E [R2], R1 ; LDG.E.64 R4, [R2]"
    assert gate.widest(sass, "LDG") == 128 and gate.widest(sass, "STG") == 32 and gate.widest("EXIT", "STG") == 0
