"""What commit records tell of the commands that made a cache: its teachers, to be asked for again in the same words."""

import shlex
from pathlib import Path

from mrmae.extract.teachers import parse_teacher
from mrmae.shards.commit import read_record
from mrmae.shards.format import commit_path


def recorded_teachers(path: Path, column: str) -> list[str]:
    """The --teacher arguments of the command that wrote the first shard of a column; relative files made absolute."""
    record = read_record(commit_path(path, 0, column, 0)) or {}
    told = told_command(record.get("extracted", record))  # of a converted cache: how its source was made
    if told is None:
        return []
    words, folder = told
    return [with_folder(text, folder) for flag, text in zip(words, words[1:]) if flag == "--teacher"]


def told_command(record: object) -> tuple[list[str], Path] | None:
    """The words of the command that a commit record tells, and the folder it was given in.

    None where it tells none of ours. A record is data, nothing proves who wrote it: no other program is named to a person, and
    no text that a terminal would not show as it is.
    """
    command, folder = (record.get("command"), record.get("folder")) if isinstance(record, dict) else (None, None)
    if not isinstance(command, str) or not isinstance(folder, str) or not (command + folder).isprintable():
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    named = next(
        (i for i, word in enumerate(words) if word.startswith("--")), len(words)
    )  # program, what from, what to
    ours = (words[:1] == ["extract-features"] and named > 2) or (
        words[:2] == ["inspect-cache", "convert"] and named == 4
    )
    return (words, Path(folder)) if ours and Path(folder).is_absolute() else None


def with_folder(text: str, folder: Path) -> str:
    """A teacher's text with its weights file relative to where the command was given."""
    file = parse_teacher(text).file
    return text.replace(f"@{file}", f"@{folder / file}", 1) if file else text
