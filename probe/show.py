"""One image in, one picture out: what teachers, and a student beside them, make of a few images. No cache is made.

Above `extract/inspect/`, because a student is read as probes read it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mrmae.common.backend import expect_utf8
from mrmae.common.device import resolve_device
from mrmae.common.pictures import (
    COLOUR_NOTE,
    ENOUGH_IMAGES,
    STRIPES_NOTE,
    Strip,
    as_bytes,
    content_rgb,
    draw_sheet,
    heat,
    marked,
    pca_rgb,
    publish_png,
    ranges,
    refuse_to_replace,
)
from mrmae.common.progress import counted
from mrmae.extract.images import MAX_PIXELS, decoded
from mrmae.extract.options import one_per_tap, refuse_untiled
from mrmae.extract.teachers import Features, Teacher, build_teacher, parse_teacher
from mrmae.probe.sources import as_teacher, notes_on_student
from mrmae.probe.students import STUDENT_FORMS, locate_student, read_student
from mrmae.shards.format import BadImage, View, ViewRecipe, render

MOST_IMAGES = 64  # rows that one still looks at
VIEWS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class ShowOptions:
    """What show-features can be told. size, grid: None for the student's own, without one 224 and 14. patch: (column, row) of the
    grid from 0 at the top left, None for the middle. teachers: as in parse_teacher. student: as in locate_student.
    """

    images: Sequence[Path]
    out: Path
    teachers: Sequence[str] = ()
    student: Path | None = None
    patch: tuple[int, int] | None = None
    size: int | None = None
    grid: int | None = None
    device: str = "auto"
    precision: str = "auto"
    max_pixels: int = MAX_PIXELS
    allow_torchscript: bool = False


def show_features(options: ShowOptions, *, say: Callable[[str], None] = print) -> Path:
    """The PNG at `options.out`: a row per image, and per model tokens as colours, attention or norms, similarity to a patch.

    ValueError for images that cannot be shown, no model, and a patch outside the grid.
    """
    check_request(options)
    student = student_of(options, say)
    size, grid = geometry_of(options, student)
    patch = compared_patch(options, grid)
    views = torch.from_numpy(np.stack([whole_view(path, size, options.max_pixels) for path in options.images]))
    framed, names = marked(views.numpy(), patch, (grid, grid)), [path.name for path in options.images]
    strips = [Strip("view", framed, f"{size} px, patch {patch[0]},{patch[1]} framed", captions=names)]
    models = [*teachers_of_command(options, size, grid), *([] if student is None else [student])]
    for model in models:
        of = f"{options.student}: " if model is student else ""
        strips += model_strips(model, view_features(model, views), patch, grid, of=of)
    title = f"{counted(len(views), 'image')} as seen by {' and '.join(model.spec.name for model in models)}"
    return publish_png(options.out, draw_sheet(strips, title=title, notes=(COLOUR_NOTE, STRIPES_NOTE, SCORES_NOTE)))


def geometry_of(options: ShowOptions, student: Teacher | None) -> tuple[int, int]:
    """Pixels per side of a view, and patches."""
    own = (224, 14) if student is None else (student.spec.input_size[0], student.spec.grid[0])
    size, grid = options.size or own[0], options.grid or own[1]
    refuse_untiled(size, grid)
    return size, grid


def compared_patch(options: ShowOptions, grid: int) -> tuple[int, int]:
    """(column, row) of the patch that the others are compared with. ValueError where it is outside the grid."""
    patch = options.patch or (grid // 2, grid // 2)
    if not all(0 <= at < grid for at in patch):
        raise ValueError(f"--patch {patch[0]},{patch[1]}: is outside the grid of {grid} x {grid} patches; 0,0 (top left) to "
                         f"{grid - 1},{grid - 1} were expected; give another, or another --grid")  # fmt: skip
    return patch


SCORES_NOTE = ("Attention: of CLS to each patch in the last block, mean over heads; where there is none, the length of each token. "
               "Similarity: cosine of each patch's token with that of the framed patch. Each map from its lowest (black) to its "
               "highest value (white).")  # fmt: skip


def check_request(options: ShowOptions) -> None:
    """ValueError, before any model is built, for what cannot be shown."""
    if not options.teachers and options.student is None:
        raise ValueError("show-features: no model is named; at least one was expected; give --teacher NAME=LIBRARY:MODEL, "
                         "--student RUN, or both")  # fmt: skip
    if len(options.images) > MOST_IMAGES:
        raise ValueError(f"IMAGES: {len(options.images)} were given; at most {MOST_IMAGES} fit a picture; give fewer, or make a "
                         "cache of them and draw that: extract-features, then inspect-cache pictures")  # fmt: skip
    expect_utf8(options.out, "--out")
    for path in options.images:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; image files were expected; give {path}/*.jpg or the like")
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise ValueError(f"{path}: {what}; an image file was expected; check IMAGES")
        if options.out.exists() and options.out.samefile(path):
            raise ValueError(f"--out {options.out}: is one of the IMAGES; a new name was expected; choose another")
    refuse_to_replace(options.out)


def whole_view(path: Path, size: int, max_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    """The largest centred square of an image at `size` pixels, as a viewer shows it. ValueError where it does not decode."""
    try:
        with decoded(path.read_bytes(), max_pixels=max_pixels) as image:
            height, width, _ = image.shape
            side = min(height, width)
            box = View((height - side) // 2, (width - side) // 2, side, side, False, height, width)
            return render(image, box, ViewRecipe(size))
    except BadImage as error:
        raise ValueError(f"{path}: {error.reason}; an image was expected; repair it or leave it out") from None


# --- models


def teachers_of_command(options: ShowOptions, size: int, grid: int) -> list[Teacher]:
    """The teachers, as extract-features would run them on such views."""
    device, precision = device_and_precision(options)
    requests = [parse_teacher(one) for text in options.teachers for one in one_per_tap(text)]
    return [build_teacher(request, grid=grid, view_size=size, device=device, precision=precision,
                          allow_torchscript=options.allow_torchscript) for request in requests]  # fmt: skip


def student_of(options: ShowOptions, say: Callable[[str], None]) -> Teacher | None:
    """The student at its own size, on its own grid; None where none is asked for."""
    if options.student is None:
        return None
    place = locate_student(options.student, where="--student", forms=STUDENT_FORMS)
    for note in notes_on_student(options.student, place):
        say(note)
    student, (device, precision) = read_student(place, where="--student"), device_and_precision(options)
    return as_teacher(student, student.size, where=f"--student {place}", device=device, precision=precision)


def device_and_precision(options: ShowOptions) -> tuple[str, str]:
    """As extract-features chooses them."""
    device = resolve_device(options.device)
    usual = "fp16" if device.type == "cuda" else "fp32"
    return str(device), usual if options.precision == "auto" else options.precision


def view_features(model: Teacher, views: UInt8[Tensor, "b h w 3"]) -> Features:
    """The model's features of all views, on the CPU."""
    parts = [model.forward(part) for part in torch.split(views, VIEWS_AT_ONCE)]
    row = (
        None if parts[0].attention is None else torch.cat([p.attention.cpu() for p in parts if p.attention is not None])
    )
    return Features(torch.cat([p.tokens.cpu() for p in parts]), None, row, torch.cat([p.norm.cpu() for p in parts]))


# --- pictures


def model_strips(model: Teacher, found: Features, patch: tuple[int, int], grid: int, *, of: str = "") -> list[Strip]:
    """What one model makes of the views. of: what is said before its architecture."""
    spec, name = model.spec, model.spec.column
    random = "RANDOM WEIGHTS" if spec.weights == "random" else ""
    scores, what = (found.norm, "norm") if found.attention is None else (found.attention, "attention")
    at = (place_on(spec.grid[1], patch[0], grid), place_on(spec.grid[0], patch[1], grid))
    near = similarity(found.tokens, at[1] * spec.grid[1] + at[0])
    strips = [
        Strip(name, as_bytes(pca_rgb(found.tokens, spec.grid)), f"{of}{spec.model}, {spec.input_size[0]} px", random)
    ]
    if len(found.tokens) >= ENOUGH_IMAGES:
        strips.append(
            Strip(f"{name}, content", as_bytes(content_rgb(found.tokens, spec.grid)), "without the position's mean")
        )
    return [
        *strips,
        Strip(f"{name}, {what}", heat(scores, spec.grid), captions=ranges(scores)),
        Strip(f"{name}, similarity", marked(heat(near, spec.grid), at, spec.grid), captions=ranges(near)),
    ]


def place_on(side: int, at: int, grid: int) -> int:
    """The patch of a grid with `side` patches per side in which the middle of patch `at` of another grid lies."""
    return int((at + 0.5) * side / grid)


def similarity(tokens: Float[Tensor, "b l d"], patch: int) -> Float[Tensor, "b l"]:
    """Cosine of every token with that of one patch of the same image."""
    unit_tokens = F.normalize(tokens.double(), dim=-1)
    return (unit_tokens @ unit_tokens[:, patch, :, None])[..., 0].float()
