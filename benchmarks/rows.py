"""CSV rows of results that may grow columns."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure


def append(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to the results; columns that are new go to the end of the header."""
    old: list[str] = []
    if out.exists():
        with open(out, newline="") as file:
            old = next(csv.reader(file), [])
    columns = list(dict.fromkeys([*old, *(name for row in rows for name in row)]))
    measure.append(out, [dict(row) for row in rows], columns)
