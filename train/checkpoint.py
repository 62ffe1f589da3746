"""Checkpoints that survive a kill at any moment: written aside, synced, renamed, checked by CRC when read back.

A checkpoint holds plain tensors and numbers only, so `torch.load(weights_only=True)` opens it. There is no random state in
it: views, masks and order are functions of (seed, epoch, sample).
"""

import contextlib
import errno
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mrmae.common.files import TEMPORARY, publish_by
from mrmae.extract.teachers import first_line, kind_of

STATE_FORMAT = 2
_PREFIX, _SUFFIX = "step-", ".pt"
WRITE_FAILURES = ("PytorchStreamWriter", "inline_container", "open file failed", "Parent directory")
COMMITTED = "committed images"  # of an unfinished cache
State = dict[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint taken after `step` updates lies."""
    return folder / f"{_PREFIX}{step:09d}{_SUFFIX}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save`, durable and whole or not at all. Raises OSError naming `path` where it cannot be written."""

    def write(aside: Path) -> None:
        try:
            torch.save(content, aside)
        except RuntimeError as error:  # how torch.save reports a full disk
            if not any(word in str(error) for word in WRITE_FAILURES):
                raise
            raise OSError(errno.EIO, str(error)) from error

    publish_by(path, write)


def save_checkpoint(folder: Path, state: State, *, step: int, keep: int) -> Path:
    """Write `state` as the checkpoint of `step` and delete all but the newest `keep`; returns its path."""
    path = checkpoint_path(folder, step)
    save_tensors(path, {"format": STATE_FORMAT, **state})
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> State:
    """The state in one file, on the CPU. Raises ValueError, in one line, when the file is damaged or of another format."""
    kind_of(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not verify the CRCs
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"CRC mismatch in {damaged}")
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text is a page, with the advice to load without this check
        raise ValueError(f"{path}: is no checkpoint of train-mrmae; one was expected; correct the path") from None
    except Exception as error:
        raise ValueError(f"{path}: cannot be read back ({type(error).__name__}: {first_line(error)})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: is no checkpoint of train-mrmae; one was expected; correct the path")
    if state["format"] != STATE_FORMAT:
        raise ValueError(f"{path}: has checkpoint format {state.get('format')}; this version reads {STATE_FORMAT}")
    return state


def latest_checkpoint(folder: Path, *, warn: Callable[[str], None]) -> State | None:
    """The newest state that can be read; None where no checkpoint was ever finished.

    A damaged file is reported through `warn`, the one before it is tried, and where that helps the damaged one is set aside as
    `<name>.damaged`.
    Raises ValueError when there are checkpoints and none can be read: a run never starts over silently.
    """
    for leftover in folder.glob(f".{_PREFIX}{TEMPORARY[1:]}"):
        leftover.unlink(missing_ok=True)
    paths, damaged = list_checkpoints(folder), []
    for path in reversed(paths):
        try:
            state = read_checkpoint(path)
        except ValueError as error:
            warn(f"{error}; trying the checkpoint before it, then this one is set aside as {path.name}.damaged")
            damaged.append(path)
            continue
        for other in damaged:
            other.rename(other.with_name(other.name + ".damaged"))
        return state
    if paths:
        raise ValueError(f"{folder}: none of {len(paths)} checkpoints can be read; delete the folder to start over")
    return None


def newest_readable(folder: Path) -> State | None:
    """The newest state that can be read, None where there is none; nothing in `folder` changes."""
    for path in reversed(list_checkpoints(folder)):
        with contextlib.suppress(ValueError):
            return read_checkpoint(path)
    return None


def check_same_cache(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Refuse to continue on another cache. Both map dataset, geometry and every column used to its id.

    Raises ValueError naming the first id that differs, and both values.
    """
    for field in dict.fromkeys([*saved, *now]):
        if saved.get(field) != now.get(field):
            if field == COMMITTED:
                raise ValueError(
                    f"{where}: the cache was unfinished when this run began, or is now: {saved.get(field) or 'all images'} then,"
                    f" {now.get(field) or 'all images'} now; the same images were expected; give a new OUT"
                )
            raise ValueError(
                f"{where}: this run was trained on another cache: {field} was {saved.get(field)} and is now"
                f" {now.get(field)}; give the cache it began with, or a new OUT"
            )


def check_same_recipe(
    differences: list[tuple[str, Any, Any]], *, where: str, may_change: Callable[[str, Any, Any], bool]
) -> list[tuple[str, Any, Any]]:
    """The allowed differences between the saved recipe and this one.

    Raises ValueError naming every other field that differs, and both values.
    """
    refused = [d for d in differences if not may_change(*d)]
    if refused:
        told = "; ".join(f"{field} was {old} and is now {new}" for field, old, new in refused)
        raise ValueError(f"{where}: holds a run with another recipe: {told}; use the old values, or a new OUT")
    return differences
