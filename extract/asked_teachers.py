"""The teachers of a command: built where something of theirs may have to be computed, else as the cache has them recorded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mrmae.common.backend import exists
from mrmae.extract.options import Options
from mrmae.extract.recorded import recorded_teachers, with_folder
from mrmae.extract.teachers import Teacher, TeacherRequest, build_teacher, parse_teacher
from mrmae.shards.commit import valid_record
from mrmae.shards.format import (
    BEHIND,
    Plan,
    TeacherSpec,
    keep_tail,
    read_tail,
    tail_path,
    taps_behind,
    units,
)
from mrmae.shards.manifest import read_manifest


@dataclasses.dataclass(frozen=True)
class Teachers:
    """The teachers asked for. built: by column; the cache is complete where one is missing, and its spec recorded."""

    specs: Sequence[TeacherSpec]
    built: Mapping[str, Teacher]


def asked_teachers(options: Options, there: Plan | None, say: Callable[[str], None]) -> Teachers:
    """The teachers of the options, built where something of theirs may have to be computed.

    there: the plan of the cache, if there is one. What follows from another column and its tail is left out, aloud.
    """
    requests = [parse_teacher(text) for text in options.teachers]
    specs: dict[int, TeacherSpec] = {}
    built: dict[str, Teacher] = {}
    for i in sorted(range(len(requests)), key=lambda i: requests[i].tap in BEHIND):
        name, tap = requests[i].name, requests[i].tap
        if tap in BEHIND and follows(options, there, requests[i], list(specs.values()), built):
            say(f"{name}.{tap}: is not stored twice, it follows from {name}.pre_tail and the tail: readers know it as a column, "
                f"recipes as terms.NAME.teacher_tap={tap}, probes as CACHE#{name}.{tap}")  # fmt: skip
            continue
        spec = complete_teacher(options, there, options.teachers[i])
        if spec is None:
            teacher = build_teacher(requests[i], grid=options.grid, view_size=options.recipe.size, device=options.device,
                                    precision=options.precision, allow_torchscript=options.allow_torchscript)  # fmt: skip
            spec = teacher.spec
            built[spec.column] = teacher
        specs[i] = spec
    return Teachers([specs[i] for i in sorted(specs)], built)


def follows(
    options: Options,
    there: Plan | None,
    request: TeacherRequest,
    specs: Sequence[TeacherSpec],
    built: Mapping[str, Teacher],
) -> bool:
    """Whether the asked-for tap follows from a column of `specs`; not where the cache stores it already."""
    source, column = f"{request.name}.pre_tail", f"{request.name}.{request.tap}"
    if source not in [spec.column for spec in specs]:
        return False
    if there is not None and column in {teacher.column for teacher in there.columns}:
        return False
    tail = built[source].tail if source in built else read_tail(options.cache, request.name)
    return request.tap in taps_behind(tail)


def complete_teacher(options: Options, there: Plan | None, text: str) -> TeacherSpec | None:
    """The spec of the asked-for teacher where the cache has every shard of it and the same text made them; else None.

    Such a teacher need not be built: nothing of it will be computed.
    """
    if there is None or options.append:  # new images need every teacher
        return None
    request = parse_teacher(text)
    found = [t for t in there.columns if t.name == request.name and request.tap in (None, t.tap)]
    if len(found) != 1 or options.views > there.n_views or found[0].precision != options.precision:
        return None
    here = with_folder(text, Path.cwd())
    same = here in recorded_teachers(options.cache, found[0].column)
    return found[0] if same and complete(options.cache, there, found[0]) else None


def complete(path: Path, plan: Plan, teacher: TeacherSpec) -> bool:
    """Whether every shard of a teacher's column is committed and its tail, if it has one, is there."""
    try:
        columns = read_manifest(path)["columns"]
        no_tail = any(c["name"] == teacher.column and c["tail"] is None for c in columns)
    except (OSError, ValueError):
        no_tail = False
    mine = (unit for unit in units(plan) if unit[1] == teacher.column)
    return (no_tail or exists(tail_path(path, teacher.name))) and all(valid_record(path, plan, *u) for u in mine)


def write_tails(path: Path, teachers: Teachers) -> None:
    """Write what follows each built teacher's tokens, where it has such a tail and it is not there yet."""
    for teacher in teachers.built.values():
        if teacher.tail:
            keep_tail(path, teacher.spec.name, teacher.tail)
