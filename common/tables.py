"""Tables that come beside images (.csv, .tsv, .parquet): their rows, their columns, and which image a row is of."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet

IMAGE_COLUMNS = (
    "filepath",
    "image",
    "file_name",
    "filename",
    "image_path",
    "path",
    "key",
)  # usual names, open_clip's first


def read_beside(path: Path, where: str) -> list[dict[str, Any]]:
    """The rows of a table as dicts; what parts the columns of a text is what its first line has most of.

    Raises ValueError, which begins with `where`, for a file that is missing, cannot be read or has no row.
    """
    if not path.is_file():
        raise ValueError(f"{where}: there is no such file; expected a .csv, .tsv or .parquet; correct the path")
    try:
        rows = table_rows(path)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{where}: cannot be read ({' '.join(str(error).split())[:200]}); expected a .csv, .tsv or .parquet; write it again"
        ) from None
    if not rows:
        raise ValueError(
            f"{where}: holds no row; expected one per caption or box, with the image's name; write it again"
        )
    return rows


def table_rows(path: Path) -> list[dict[str, Any]]:
    """The same, without words: OSError, ValueError or csv.Error for what cannot be read."""
    if path.suffix.lower() not in (".parquet", ".csv", ".tsv"):
        raise ValueError(f"the name ends in {path.suffix!r}; .parquet, .csv or .tsv was expected")
    if path.suffix.lower() == ".parquet":
        found: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return found
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        return [dict(row) for row in csv.DictReader(file, delimiter=max("\t,;|", key=first.count))]


def column_of(row: Mapping[str, object], asked: str, usual: Sequence[str], where: str, what: str) -> str:
    """The column that is asked for, else the first usual name that the table has. ValueError where it has none."""
    found = [name for name in ([asked] if asked else usual) if name in row]
    if not found:
        wanted = f"no column {asked!r}" if asked else f"none of the columns {', '.join(usual)}"
        raise ValueError(
            f"{where}: has {wanted} for {what}; it has {', '.join(map(str, row))}; rename one, or name it with --set"
        )
    return found[0]


def keys_by_name(names: Sequence[str], keys: Sequence[str], where: str) -> list[str]:
    """The image's key for every name: as it is, with folders in front, without its suffix, or the file's name alone.

    ValueError for a name that is no image's, or that of several.
    """
    whole = {name: key for key in keys for name in (str(PurePosixPath(key).with_suffix("")), key)}
    short: dict[str, set[str]] = {}
    for key in keys:
        for name in {PurePosixPath(key).name, PurePosixPath(key).stem}:
            short.setdefault(name, set()).add(key)
    found = []
    for name in names:
        parts = name.replace("\\", "/").split("/")
        exact = next((whole[tail] for tail in ("/".join(parts[i:]) for i in range(len(parts))) if tail in whole), None)
        alike = short.get(name, set())
        if exact is None and len(alike) != 1:
            why = (
                f"is the name of {len(alike)} images, such as {min(alike)!r}"
                if alike
                else f"is no image of DATA, whose keys look like {keys[0]!r}"
            )
            raise ValueError(
                f"{where}: {name!r} {why}; expected the image that each row is of; correct the table, or give all its images as DATA"
            )
        found.append(exact or min(alike))
    return found
