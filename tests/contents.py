"""What lies in a folder, to be compared with what lies in another."""

from pathlib import Path


def contents(path: Path) -> dict[str, bytes]:
    """All files by their path in the folder."""
    files = (
        file for file in path.rglob("*") if file.is_file() and file.name != ".digests"
    )  # as its processes came to it
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def contents_without_records(path: Path) -> dict[str, bytes]:
    """All files but a cache's commit records, which tell the command and the time."""
    return {name: data for name, data in contents(path).items() if "commits" not in Path(name).parts}
