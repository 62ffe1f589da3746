"""CSV rows of results that grow columns."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def append(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to the results; floats with four significant digits. A new column is added to the header."""
    old: list[dict[str, Any]] = []
    if out.exists():
        with open(out, newline="") as file:
            old = list(csv.DictReader(file))
    every = [*old, *({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)]
    columns = list(dict.fromkeys(name for row in every for name in row))
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)
