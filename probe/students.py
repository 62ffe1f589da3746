"""Students of train-mrmae from disk: an export or a training checkpoint, plain ViT or MCMAE, as an image tower."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrmae.extract.teachers import Origin, Preprocessing, Tower, activation_of, fit_weights, weights_sha256
from mrmae.extract.teachers.timm import as_tower, attention_backend, norm_tail_of
from mrmae.train.checkpoint import list_checkpoints, read_checkpoint
from mrmae.train.export import CONFIG, WEIGHTS, load_mcmae, load_student
from mrmae.train.method import PATCH, SIZES, MaskedConvViT, build_mcmae, build_vit, from_dict

STUDENT_FORMS = "OUT of train-mrmae, OUT/student, or a checkpoint OUT/checkpoints/step-N.pt"
FORMS = "OUT of train-mrmae, OUT/student, a checkpoint OUT/checkpoints/step-N.pt, timm:NAME[@FILE][?key=value], open_clip:NAME[/TAG][@FILE][?key=value], CACHE#TEACHER[.TAP], pixels, or untrained:SOURCE"


@dataclasses.dataclass(frozen=True)
class Student:
    """An encoder as it was trained: architecture, pixels per side of its images and patches, how it reads them."""

    model: nn.Module
    architecture: str
    size: int
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


def locate_student(path: Path, *, where: str = "SOURCE", forms: str = FORMS) -> Path:
    """The exported folder or the checkpoint file behind a path. ValueError where there is none, saying which forms there are."""
    if path.is_file() and path.suffix == ".pt":
        return path
    for folder in (path, path / "student"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    saved = list_checkpoints(path / "checkpoints") if path.is_dir() else []
    if saved:
        return saved[-1]
    what = "holds no student and no checkpoint" if path.exists() else "does not exist"
    raise ValueError(f"{where} {path}: {what}; expected {forms}; train first, or correct it")


def run_folder(place: Path) -> Path | None:
    """OUT of the run that a student belongs to; None where it was moved elsewhere."""
    return next((folder for folder in list(place.parents)[:2] if (folder / "run.json").is_file()), None)


def read_student(place: Path, *, where: str = "SOURCE") -> Student:
    """The encoder of an exported folder or a checkpoint. ValueError where it does not load."""
    if place.is_file():
        return from_checkpoint(place)
    try:
        config = json.loads((place / CONFIG).read_bytes())
        if config["architecture"] in SIZES:
            how, size = config, config["input_size"][-1]
            return Student(
                load_mcmae(place), config["architecture"], size, PATCH, tuple(how["mean"]), tuple(how["std"])
            )
        model: Any = load_student(place)
    except (RuntimeError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{where} {place}: does not load ({str(error).splitlines()[0]}); export it again") from None
    how = model.pretrained_cfg
    size, patch = int(model.patch_embed.img_size[0]), int(model.patch_embed.patch_size[0])
    return Student(
        model, config["architecture"], size, patch, tuple(how["mean"]), tuple(how["std"]), how["interpolation"]
    )


def from_checkpoint(path: Path) -> Student:
    """The encoder inside a training checkpoint; its geometry follows from its tensors."""
    state = read_checkpoint(path)
    recipe = from_dict(state["recipe"], where=str(path))
    weights = {name.removeprefix("student."): x for name, x in state["model"].items() if name.startswith("student.")}
    name, channels = recipe.student.model, len(recipe.prepare.mean)
    model: nn.Module
    if name in SIZES:
        patch, side = PATCH, round(weights["pos_embed"].shape[1] ** 0.5)
        model = build_mcmae(name, patch=patch, grid=(side, side), channels=channels, depth=depth_of(weights, "blocks3"))
    else:
        asked, patch = recipe.student, weights["patch_embed.proj.weight"].shape[-1]
        side = round((weights["pos_embed"].shape[1] - asked.cls) ** 0.5)
        model = build_vit(name, size=side * patch, patch=patch, grid=(side, side), channels=channels, cls=asked.cls,
                          init_values=asked.init_values, depth=depth_of(weights, "blocks"))  # fmt: skip
    fit_weights(model, weights, where=str(path))
    return Student(model.float(), name, side * patch, patch, recipe.prepare.mean, recipe.prepare.std)


def depth_of(weights: Mapping[str, Tensor], blocks: str) -> int:
    """How many transformer blocks these weights have: a run leaves out those that nothing reads."""
    return len({name.split(".")[1] for name in weights if name.startswith(f"{blocks}.")})


def student_tower(student: Student, size: int, *, where: str) -> Tower:
    """The student at `size` pixels as an image tower: a ViT behind its final norm, MCMAE's student with its stage fusion.

    Positions are interpolated where the size is another. Raises ValueError for one that is no multiple of the patch.
    """
    model, patch = student.model, student.patch
    if size % patch:
        raise ValueError(f"--size {size}: is no multiple of the student's patch of {patch} px; "
                         f"try {size // patch * patch or patch} or {(size // patch + 1) * patch}")  # fmt: skip
    origin = Origin(where, None, Preprocessing(student.mean, student.std, student.interpolation),
                    weights_sha256(model.state_dict()))  # fmt: skip
    model.requires_grad_(False).eval()
    if isinstance(model, MaskedConvViT):
        return mcmae_tower(model, origin, size)
    assert isinstance(model, VisionTransformer)
    if size != student.size:
        model.set_input_size(img_size=(size, size))
    return as_tower(model, origin, "post_ln", patch, (size, size), norm_tail_of(model))


def mcmae_tower(model: MaskedConvViT, origin: Origin, size: int) -> Tower:
    """MCMAE's encoder as it was trained: no CLS, with the stage fusion, behind its norm."""
    if model.grid != (size // PATCH, size // PATCH):
        model.resize((size // PATCH, size // PATCH))

    def features(x: Tensor) -> tuple[Tensor, None]:
        tokens = model.forward_fused(x)
        return tokens.transpose(1, 2).reshape(len(x), -1, *model.grid), None

    return Tower(
        module=model, features=features, attention_row=None, patch=PATCH, input_size=(size, size), origin=origin,
        activation=activation_of(model), prefix_tokens=0, tap="fused", tail={}, attention_backend=attention_backend(model),
    )  # fmt: skip
