"""Commands killed and given again end with what they would have made uninterrupted: a short form of the soak."""

import csv
import subprocess
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_killed_commands_continue_to_the_same_bytes_also_where_two_write_one_shard(
    tmp_path: Path, warm: list[str]
) -> None:
    kinds = ("append", "convert to fp8", "train", "two on one shard, clocks apart")
    command = [*warm, str(BENCHMARKS / "soak_kills.py"), "--kills", str(len(kinds)), "--disks", "0"]
    command += [word for kind in kinds for word in ("--only", kind)]
    command += ["--out", str(tmp_path / "kills.csv"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "kills.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == set(kinds)
    for row in rows:
        assert int(row["events"]) >= 1 and row["invalid"] == row["refused"] == "0", row
        assert row["caches"] == row["finished"] == row["equal"], row
