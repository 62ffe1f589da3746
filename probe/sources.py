"""What is probed: a student of train-mrmae, a model of timm or open_clip, a column of a cache, or what nobody trained; all behind one signature.

Students and models of libraries become a frozen `Teacher` (extract), so that pixels reach them exactly as they reach teachers.
Tokens are taken behind the final norm, which is what a classifier would read.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mrmae.common.backend import locate
from mrmae.extract.teachers import (
    Origin,
    Preprocessing,
    Teacher,
    TeacherRequest,
    Tower,
    build_teacher,
    make_spec,
    parse_teacher,
    without_text,
)
from mrmae.extract.teachers.timm import native_pixels
from mrmae.probe.students import FORMS, Student, locate_student, read_student, run_folder, student_tower
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import NOT_HASHED, TeacherSpec, has_norm
from mrmae.shards.near import NearFolder
from mrmae.train.method import initialise

PIXELS_ALONE, PIXELS_SIDE = "pixels", 16
UNTRAINED = "untrained:"
LIBRARY_FORMS = ("timm:", "open_clip:")


@dataclasses.dataclass(frozen=True)
class FeatureSource:
    """Something that gives patch tokens. about: plain values that decide the numbers (hashed); notes: said aloud.

    teacher: computes them from pixels; None for a column, which has them stored. home: its run's folder, if it has one.
    cache, cache_dataset: what a student was trained on, and the id of its images, if its run tells.
    column: (cache, name) of a stored or derived column.
    """

    name: str
    kind: str
    about: dict[str, Any]
    teacher: Teacher | None = None
    column: tuple[Cache, str] | None = None
    home: Path | None = None
    cache: Path | None = None
    cache_dataset: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> TeacherSpec:
        """How its tokens were, or will be, made."""
        if self.teacher:
            return self.teacher.spec
        assert self.column
        cache, name = self.column
        return cache.column(name).spec

    @property
    def size(self) -> int:
        """Pixels per side of its input."""
        return self.spec.input_size[0]


def open_source(
    text: str, *, size: int = 0, device: str = "cpu", precision: str = "fp32", allow_partial: bool = False,
    near: NearFolder | None = None,
) -> FeatureSource:  # fmt: skip
    """The source that `text` names. size: another input size in pixels, 0 for the model's own. allow_partial, near: of a cache.

    Raises ValueError for what is no source, naming the forms, and for one that does not load.
    """
    how: dict[str, Any] = {"size": size, "device": device, "precision": precision}
    if text == PIXELS_ALONE:
        return pixel_source(device=device)
    inner = text.removeprefix(UNTRAINED)
    if inner.startswith(LIBRARY_FORMS):
        return model_source(inner, untrained=inner != text, **how)
    if inner != text:
        return student_source(Path(inner), untrained=True, **how)
    path, _, teacher = text.rpartition("#")
    if path and not Path(text).exists():
        return column_source(path, teacher, size=size, allow_partial=allow_partial, near=near)
    if not Path(text).exists():
        raise ValueError(f"SOURCE {text}: there is no such file or folder; expected {FORMS}; correct the path")
    return student_source(Path(text), **how)


def hashed(spec: TeacherSpec) -> dict[str, Any]:
    """The fields of a spec that decide its numbers."""
    return {name: value for name, value in dataclasses.asdict(spec).items() if name not in NOT_HASHED}


# --- what nobody trained


def pixel_source(*, device: str) -> FeatureSource:
    """The view itself, 16 x 16 pixels of it, as one token: what colours and layout alone tell."""
    side = (PIXELS_SIDE, PIXELS_SIDE)
    seen = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")

    def features(x: Tensor) -> tuple[Tensor, None]:
        return x.flatten(1)[:, :, None, None], None

    tower = Tower(
        module=nn.Identity(), features=features, attention_row=None, patch=None, input_size=side,
        origin=Origin(PIXELS_ALONE, None, seen, "0" * 64), activation="none", prefix_tokens=0, tap="pixels", tail={},
        attention_backend="none",
    )  # fmt: skip
    request = TeacherRequest("probe", "view", f"{PIXELS_SIDE}x{PIXELS_SIDE}", "file")
    spec = make_spec(request, tower, features(torch.zeros(1, 3, *side))[0], False, 1, "fp32")
    return FeatureSource(PIXELS_ALONE, "pixels", hashed(spec), Teacher(spec, {}, tower, torch.device(device)))


# --- timm and open_clip


def model_source(text: str, *, size: int, device: str, precision: str, untrained: bool = False) -> FeatureSource:
    """A model of timm or an image tower of open_clip at its configured size: a ViT's tokens behind its norm, a CNN's map before
    pooling; `?tap=` chooses.

    untrained: with random weights instead of its own.
    """
    request = without_text(parse_teacher(f"probe={text}"))
    if untrained:
        request = dataclasses.replace(request, weights="random", file=None)
    own = request.input_size or own_size(request)
    request = dataclasses.replace(request, input_size=size or own)
    how: dict[str, Any] = {"grid": 1, "view_size": size or own, "device": device, "precision": precision}
    teacher = build_teacher(request, **how)
    if request.tap is None:
        plain = teacher.tower.patch is not None
        tap = (
            ("post_ln" if has_norm(teacher.tail) else None) if plain else "head" if request.library == "timm" else None
        )
        teacher = build_teacher(dataclasses.replace(request, tap=tap), **how)
    notes = ["RANDOM weights: these features know nothing"] if request.weights == "random" else []
    notes += resized_note(size, own, teacher.tower.patch)
    teacher, text = frozen(teacher), UNTRAINED * untrained + text
    return FeatureSource(text, request.library, hashed(teacher.spec), teacher, notes=tuple(notes))


def own_size(request: TeacherRequest) -> int:
    """Pixels per side that the model's weights are for, or that it is configured for."""
    if request.library == "timm":
        return native_pixels(request)
    from mrmae.extract.teachers.open_clip import clip_config  # takes seconds

    side = clip_config(request)["vision_cfg"].get("image_size", 224)
    return int(side if isinstance(side, int) else side[0])


def frozen(teacher: Teacher) -> Teacher:
    """The teacher on its own grid (no resampling), without the attention row, which no probe reads."""
    spec = dataclasses.replace(
        teacher.spec, grid=teacher.spec.native_grid, resample="none", has_attention=False, name="probe"
    )
    return dataclasses.replace(teacher, spec=spec, tower=dataclasses.replace(teacher.tower, attention_row=None))


def resized_note(size: int, own: int, patch: int | None) -> list[str]:
    if not size or size == own:
        return []
    sides = (own // patch, size // patch) if patch else (0, 0)
    grids = f", positions interpolated from {sides[0]} x {sides[0]} patches to {sides[1]} x {sides[1]}" if patch else ""
    return [f"the model was trained at {own} px and runs at {size} px{grids}"]


# --- students


def student_source(path: Path, *, size: int, device: str, precision: str, untrained: bool = False) -> FeatureSource:
    """A trained student: OUT (its export, or its newest checkpoint before there is one), OUT/student, or a checkpoint.

    untrained: with the initial weights that a run of seed 0 begins from.
    """
    place = locate_student(path)
    student, out = read_student(place), run_folder(place)
    if untrained:
        initialise(nn.ModuleDict({"student": student.model}), 0)
    facts = json.loads((out / "run.json").read_text()) if out and not untrained else {}
    how = {"device": device, "precision": precision}
    teacher = frozen(as_teacher(student, size or student.size, where=f"SOURCE {place}", **how))
    told = ["initial weights (seed 0): nothing was trained"] if untrained else notes_on_student(path, place)
    notes = [*told, *resized_note(size, student.size, student.patch)]
    trained_on = locate(facts["cache"]) if "cache" in facts else None
    dataset = facts.get("cache_ids", {}).get("dataset")
    return FeatureSource(
        UNTRAINED * untrained + str(path),
        "student",
        hashed(teacher.spec),
        teacher,
        None,
        out,
        trained_on,
        dataset,
        tuple(notes),
    )


def as_teacher(student: Student, size: int, *, where: str, device: str, precision: str) -> Teacher:
    """The student at `size` pixels as a frozen teacher on its own grid, with its attention where it has a CLS token."""
    if len(student.mean) != 3:
        raise ValueError(f"{where}: this student reads {len(student.mean)} bands; one that reads RGB was expected, which is what images are "
                         "shown as to it; open it with timm to use it on all its bands")  # fmt: skip
    tower = student_tower(student, size, where=where)
    with torch.no_grad():
        found, cls = tower.features(torch.zeros(1, len(student.mean), *tower.input_size))
    request = parse_teacher(f"student=timm:{student.architecture}@file")
    spec = make_spec(request, tower, found, cls is not None, int(found.shape[-1]), precision)
    tower.module.to(device)
    return Teacher(spec, tower.tail, tower, torch.device(device))


def notes_on_student(path: Path, place: Path) -> list[str]:
    """What must be said of the student at `place`, asked for as `path`: random teachers, an unfinished run."""
    out = run_folder(place)
    teachers = json.loads((out / "run.json").read_text()).get("teachers", {}) if out else {}
    random = [name for name, about in teachers.items() if about.get("weights") == "random"]
    notes = [f"the student's teachers have RANDOM weights: {', '.join(random)}"] if random else []
    return notes + [f"{place.name}: a checkpoint, the run is not finished"] * (place.is_file() and path.is_dir())


# --- columns of a cache


def column_source(
    path: str, name: str, *, size: int, allow_partial: bool = False, near: NearFolder | None = None
) -> FeatureSource:
    """The features of a cache's teacher, behind its final norm where they are, or of one column, stored or derived."""
    cache = open_cache(path, allow_partial=allow_partial, near=near)
    column = usual_column(cache, name) if name in cache.teachers else name
    if column not in cache.columns and column not in cache.derived:
        raise ValueError(f"SOURCE {path}#{name}: the cache has no teacher or column {name!r}; it has "
                         f"{', '.join([*sorted(cache.teachers), *cache.columns, *cache.derived]) or 'none'}; choose one")  # fmt: skip
    if size:
        raise ValueError(f"--size {size}: {path}#{name} holds features of {cache.size} px views; leave --size out")
    stored = cache.derived[column].source if column in cache.derived else column
    if cache.unfinished:
        cache = open_cache(path, allow_partial=True, columns=[stored], near=near)
    random = ("RANDOM weights: these features know nothing",) if cache.column(column).spec.weights == "random" else ()
    about = {"column": cache.ids[stored], **column_behind(cache, column)}
    return FeatureSource(f"{path}#{name}", "cache", about, column=(cache, column), notes=random)


def usual_column(cache: Cache, teacher: str) -> str:
    """A teacher's first column; where that is before a norm, the one behind it."""
    stored, normed = cache.teachers[teacher], f"{teacher}.post_ln"
    known = normed in cache.derived or normed in cache.columns
    return normed if cache.columns[stored].spec.tap == "pre_tail" and known else stored


def column_behind(cache: Cache, column: str) -> dict[str, Any]:
    """How a column follows from its stored tokens: by the final norm, and by the projection."""
    tap = cache.derived[column].spec.tap if column in cache.derived else None
    return {"behind_norm": tap is not None, **({} if tap in (None, "post_ln") else {"tap": tap})}


def column_features(source: FeatureSource, numbers: Any) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"] | None]:
    """Tokens and CLS of the first stored view of these samples."""
    assert source.column
    (cache, column), views = source.column, [0] * len(numbers)
    cls = cache.read_cls(column, numbers, views) if source.spec.has_cls else None
    return cache.read_tokens(column, numbers, views), cls
