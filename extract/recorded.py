"""What earlier commands wrote down about a cache's teachers: enough to leave alone those with nothing left to do."""

import shlex
from pathlib import Path

from mrmae.common.backend import exists
from mrmae.extract.options import Options
from mrmae.extract.teachers import parse_teacher
from mrmae.shards.commit import read_record, valid_record
from mrmae.shards.format import Plan, TeacherSpec, commit_path, load_plan, tail_path, units
from mrmae.shards.manifest import read_manifest


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


def complete_teacher(options: Options, text: str) -> TeacherSpec | None:
    """The spec of the asked-for teacher where the cache has every shard of it and the same text made them; else None.

    Such a teacher need not be built: nothing of it will be computed.
    """
    if options.append:
        return None  # new images need every teacher
    try:
        plan = load_plan(options.cache)
    except (ValueError, OSError):
        return None  # no cache yet, or one that is refused later, with its reason
    request = parse_teacher(text)
    found = [t for t in plan.columns if t.name == request.name and request.tap in (None, t.tap)]
    if len(found) != 1 or options.views > plan.n_views or found[0].precision != options.precision:
        return None
    here = with_folder(text, Path.cwd())
    same = here in recorded_teachers(options.cache, found[0].column)
    return found[0] if same and complete(options.cache, plan, found[0]) else None


def complete(path: Path, plan: Plan, teacher: TeacherSpec) -> bool:
    """Whether every shard of a teacher's column is committed and its tail, if it has one, is there."""
    try:
        columns = read_manifest(path)["columns"]
        no_tail = any(c["name"] == teacher.column and c["tail"] is None for c in columns)
    except (OSError, ValueError):
        no_tail = False
    mine = (unit for unit in units(plan) if unit[1] == teacher.column)
    return (no_tail or exists(tail_path(path, teacher.name))) and all(valid_record(path, plan, *u) for u in mine)
