"""The teachers and maps of a command: built where something of theirs may have to be computed, else as the cache has them recorded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mrmae.common.backend import exists
from mrmae.extract.made_maps import MadeMap, is_made, parse_made, source_for
from mrmae.extract.maps import GivenMap, read_map
from mrmae.extract.options import Options
from mrmae.extract.recorded import recorded_teachers, with_folder
from mrmae.extract.teachers import Teacher, TeacherRequest, build_teacher, parse_teacher, prompt_vectors
from mrmae.shards.commit import valid_record
from mrmae.shards.format import (
    BEHIND,
    Plan,
    TeacherSpec,
    keep_tail,
    read_codebook,
    read_tail,
    tail_path,
    taps_behind,
    units,
)
from mrmae.shards.manifest import read_manifest


@dataclasses.dataclass(frozen=True)
class Teachers:
    """The teachers asked for. built: by column; the cache is complete where one is missing, and its spec recorded.

    maps: likewise, as they were given. texts: by column of a computed map, what the text tower makes of its prompts, where the cache has
    not that already.
    """

    specs: Sequence[TeacherSpec]
    built: Mapping[str, Teacher]
    maps: Mapping[str, GivenMap]
    texts: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def map_sha256(self) -> dict[str, str]:
        """By column, what the values of the maps are."""
        return {column: given.sha256 for column, given in self.maps.items()}


def asked_maps(options: Options, there: Plan | None, keys: Sequence[str]) -> dict[str, tuple[TeacherSpec, GivenMap]]:
    """The maps that are given, by column, with the spec that a cache has or will have of them. keys: of the images.

    ValueError where a file is no map for this grid, or other values were given before; without --append also where it lacks one
    of the images and something of it has to be written.
    """
    found = {}
    for text in options.maps:
        if is_made(text):
            continue
        given = read_map(text, grid=options.grid, views=options.views)
        spec = recorded_map(options, there, given)
        if not options.append and not (there and spec in there.columns and all_committed(options, there, spec)):
            given.refuse_lacking(keys)
        found[spec.column] = spec, given
    return found


def asked_made(options: Options, requests: Sequence[TeacherRequest], images: int) -> list[MadeMap]:
    """The maps that are computed, checked as far as the words and the file of prompts go. ValueError for names that are taken, too."""
    made = [parse_made(text, images=images, grid=options.grid) for text in options.maps if is_made(text)]
    teachers, names = {request.name: request for request in requests}, [text.partition("=")[0] for text in options.maps]
    for text, name in zip(options.maps, names):
        if names.count(name) > 1 or name in teachers:
            other = "a teacher has that name" if name in teachers else f"{name} is given twice"
            raise ValueError(f"--map {text}: {other}; expected one name per map and teacher; rename one")
    for asked in made:
        if (request := teachers.get(asked.teacher_name)) is None:
            raise ValueError(f"{asked.where}: {asked.teacher_name} is not asked for; expected a teacher of this command, "
                             f"{', '.join(teachers) or 'of which there is none'}; add --teacher {asked.teacher_name}=...")  # fmt: skip
        if asked.made == "text" and request.library != "open_clip":
            raise ValueError(
                f"{asked.where}: {request.where} has no text tower; expected a CLIP of open_clip; choose another teacher"
            )
    return made


def made_specs(
    options: Options, made: Sequence[MadeMap], specs: Sequence[TeacherSpec], built: Mapping[str, Teacher]
) -> list[TeacherSpec]:
    """Of every computed map, its column. specs: of the teachers asked for; built: of them, by column."""
    tails = {teacher.spec.name: teacher.tail for teacher in built.values()}
    found = []
    for asked in made:
        of, source = source_for(
            asked, specs, lambda name: tails[name] if name in tails else read_tail(options.cache, name)
        )
        found.append(asked.spec(of, source))
    return found


def asked_texts(
    options: Options, there: Plan | None, requests: Sequence[TeacherRequest], made: Sequence[MadeMap], specs: Sequence[TeacherSpec]
) -> dict[str, Tensor]:  # fmt: skip
    """What a text tower makes of the prompts of maps whose codebook the cache lacks, by column."""
    found = {}
    for asked, spec in zip(made, specs):
        if asked.made == "text" and not has_codebook(options.cache, there, spec.column):
            request = next(request for request in requests if request.name == asked.teacher_name)
            found[spec.column] = prompt_vectors(request, asked.prompts, allow_torchscript=options.allow_torchscript)
    return found


def has_codebook(path: Path, there: Plan | None, column: str) -> bool:
    """Whether a cache holds the codebook of a computed map, whole."""
    quantiser = there.quantisers.get(column) if there else None
    if quantiser is None or quantiser.codebook is None:
        return False
    try:
        return bool(len(read_codebook(path, column.partition(".")[0], quantiser.codebook["sha256"])))
    except ValueError:
        return False


def recorded_map(options: Options, there: Plan | None, given: GivenMap) -> TeacherSpec:
    """The spec of a map: the cache's own where these values were given before, or come with images to append."""
    spec = given.spec((options.grid, options.grid))
    old = next((t for t in there.columns if t.column == spec.column and t.is_map), None) if there else None
    if there is None or old is None:
        return spec
    known = {old.weights_sha256, *(more.maps.get(old.column) for more in there.appended)}
    if given.sha256 not in known and not options.append:
        raise ValueError(f"{given.where}: its values are {given.sha256[:15]}...; those of {old.column} in {options.cache} are "
                         f"{old.weights_sha256[:15]}...; give the file of then, or another name, or drop the old one with inspect-cache "
                         "drop (nothing was changed)")  # fmt: skip
    return replace(spec, weights_sha256=old.weights_sha256)


def all_committed(options: Options, there: Plan, spec: TeacherSpec) -> bool:
    """Whether a cache has every shard of a map in all views that are asked for."""
    return options.views <= there.n_views and all(
        valid_record(options.cache, there, *unit) for unit in units(there) if unit[1] == spec.column
    )


def asked_teachers(options: Options, there: Plan | None, keys: Sequence[str], say: Callable[[str], None]) -> Teachers:
    """The teachers and maps of the options, built where something of theirs may have to be computed.

    there: the plan of the cache, if there is one. keys: of the images. What follows from another column and its tail is left out, aloud.
    """
    requests = [parse_teacher(text) for text in options.teachers]
    made, maps = asked_made(options, requests, len(keys)), asked_maps(options, there, keys)
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
                                    precision=options.precision, allow_torchscript=options.allow_torchscript,
                                    allow_code=options.allow_code, views=options.recipe.stored)  # fmt: skip
            spec = teacher.spec
            built[spec.column] = teacher
        specs[i] = spec
    teachers = [specs[i] for i in sorted(specs)]
    computed = made_specs(options, made, teachers, built)
    texts = asked_texts(options, there, requests, made, computed)
    every = [*teachers, *(spec for spec, _ in maps.values()), *computed]
    return Teachers(every, built, {column: given for column, (_, given) in maps.items()}, texts)


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
    return (no_tail or exists(tail_path(path, teacher.tail_name))) and all(valid_record(path, plan, *u) for u in mine)


def write_tails(path: Path, teachers: Teachers) -> None:
    """Write what follows each built teacher's tokens, where it has such a tail and it is not there yet."""
    for teacher in teachers.built.values():
        if teacher.tail:
            keep_tail(path, teacher.spec.tail_name, teacher.tail)
