"""A source's model with a new classifier, ready to be fine-tuned."""

import copy
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mrmae.extract.request import parse_teacher
from mrmae.probe.sources import Source
from mrmae.train.mcmae import MaskedConvViT


def trainable(source: Source, n_classes: int, *, drop_path: float) -> tuple[nn.Module, list[str]]:
    """The source's model with a new classifier for n_classes, and what to say about it.

    Students: mean of patch tokens, a new norm and classifier, as MAE fine-tunes. timm models: their own pooling.
    Raises ValueError for a column, for MCMAE's student, and for a timm model whose weights do not fit once it has another classifier.
    """
    if source.teacher is None:
        raise ValueError(
            f"SOURCE {source.name}: a cache column has no model to fine-tune; expected a student or timm:NAME; give the model itself"
        )
    frozen: Any = source.teacher.tower.module
    if isinstance(frozen, MaskedConvViT):
        raise ValueError(
            f"SOURCE {source.name}: fine-tuning MCMAE's student is not implemented; expected a plain ViT or timm:NAME; use --probe "
            "knn, linear or attentive"
        )
    if source.kind == "student":
        return student_classifier(frozen, n_classes, drop_path=drop_path), []
    return timm_classifier(source, frozen, n_classes, drop_path=drop_path)


def student_classifier(student: VisionTransformer, n_classes: int, *, drop_path: float) -> nn.Module:
    """The student as MAE fine-tunes it: final norm dropped, mean of patch tokens, new norm, classifier N(0, 2e-5).

    drop_path: of the last block, rising linearly from 0 at the first. Positions stay fixed, as they were trained.
    """
    model = timm_copy(student)
    model.norm, model.fc_norm = nn.Identity(), nn.LayerNorm(model.num_features, eps=1e-6)
    model.global_pool, model.num_classes = "avg", n_classes
    model.head = nn.Linear(model.num_features, n_classes)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    blocks: Any = model.blocks
    for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist()):
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return model


def timm_copy(student: VisionTransformer) -> VisionTransformer:
    """A trainable copy: the frozen one still gives features to other probes."""
    model = copy.deepcopy(student).requires_grad_(True)
    assert model.pos_embed is not None
    model.pos_embed.requires_grad_(False)
    return model


def timm_classifier(source: Source, frozen: Any, n_classes: int, *, drop_path: float) -> tuple[nn.Module, list[str]]:
    """A timm model built anew with n_classes and drop path, with the frozen one's weights but for its classifier."""
    assert source.teacher
    request = parse_teacher(f"probe={source.name}")
    options: dict[str, Any] = {**request.options, "num_classes": n_classes, "drop_path_rate": drop_path}
    if source.teacher.tower.patch:
        options["img_size"] = source.spec.input_size
    model: nn.Module = timm.create_model(f"{request.model}.{request.tag}" if request.tag else request.model, **options)
    heads = frozen.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    weights = {name: x for name, x in frozen.state_dict().items() if not name.startswith(heads)}
    missing, extra = model.load_state_dict(weights, strict=False)
    if wrong := [*extra, *(name for name in missing if not name.startswith(heads))]:
        raise ValueError(
            f"SOURCE {source.name}: {wrong[0]} does not fit the model with {n_classes} classes; expected the same encoder; "
            "fine-tune without ?options, or another model"
        )
    had = int(getattr(frozen, "num_classes", 0) or 0)
    return model, [f"the model's classifier of {had} classes is replaced by a new one of {n_classes}"] if had else []
