"""Links and special files have no place in a cache: what lies behind a link is not the cache's, and a FIFO never ends."""

import os
from pathlib import Path

from mrmae.common.backend import Url

FILES = ("plan.json", "samples.arrow", "manifest.json")
FOLDERS = ("tail", "codebooks", "stats", "views", "commits", "manifest")


def foreign_entries(path: Path) -> dict[str, str]:
    """What is wrong with every link and special file of the cache at `path`, by its name inside it.

    One pass over the folders, without following a link; `path` itself may be one. What else a person keeps beside a cache's
    files is left alone. Empty where there is no cache, and at a URL, whose objects are neither.
    """
    if isinstance(path, Url):
        return {}
    here = {entry.name: entry for entry in entries(path) if entry.name in FILES + FOLDERS}
    found = {name: what for name, entry in here.items() if (what := wrong_kind(entry, folder=name in FOLDERS))}
    todo = [here[name].path for name in FOLDERS if name in here and name not in found]
    while todo:
        for entry in entries(todo.pop()):
            if entry.is_dir(follow_symlinks=False):
                todo.append(entry.path)
            elif not entry.is_file(follow_symlinks=False) and (what := wrong_kind(entry)):
                found[Path(entry.path).relative_to(path).as_posix()] = what
    return found


def entries(folder: str | Path) -> list["os.DirEntry[str]"]:
    """What lies in a folder; nothing where it is not there (another process may have removed it) or may not be listed."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def wrong_kind(entry: "os.DirEntry[str]", *, folder: bool | None = None) -> str:
    """Why something in a cache is neither read nor written; empty where it may be. folder: which of both is expected."""
    if entry.is_symlink():
        return "is a symbolic link; links in a cache are not followed"
    is_folder, is_file = entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False)
    if not is_folder and not is_file and os.path.lexists(entry.path):  # not removed meanwhile
        return "is neither a file nor a folder"
    if folder is not None and is_folder != folder:
        return f"is a {'folder' if is_folder else 'file'} where a {'folder' if folder else 'file'} was expected"
    return ""


def refuse_foreign_entries(path: Path) -> None:
    """ValueError where something of the cache at `path` is a link or a special file."""
    if found := foreign_entries(path):
        name = min(found)
        more = f" ({len(found) - 1} more such)" if len(found) > 1 else ""
        raise ValueError(f"{path / name}: {found[name]}{more}; a cache holds files and folders of its own; put what it stands "
                         "for in its place, or remove it (nothing was changed)")  # fmt: skip
