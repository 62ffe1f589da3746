"""Commands meet damaged and hostile caches: a short form of the soak, in a process of its own, as it forks and so has no threads."""

import csv
import subprocess
from pathlib import Path

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak_fuzz.py"


def test_commands_meet_damaged_and_hostile_caches(tmp_path: Path, warm: list[str]) -> None:
    command = [*warm, str(SOAK), "--cases", "14", "--seed", "1", "--folder", str(tmp_path)]
    done = subprocess.run([*command, "--out", str(tmp_path / "rows.csv")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-5000:]
    with open(tmp_path / "rows.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["cases"], row["failed"]) == ("14", "0")
    assert int(row["told"]) > 3 and int(row["succeeded"]) > 2, row
