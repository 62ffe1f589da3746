"""A source's model with a classifier for the classes of DATA, ready to be fine-tuned."""

import copy
from collections.abc import Sequence
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrmae.extract.teachers import TeacherRequest, fit_weights, parse_teacher
from mrmae.extract.teachers.timm import classifier_names, timm_settings, timm_weights
from mrmae.probe.sources import UNTRAINED, FeatureSource
from mrmae.train.export import CROP_SHARE
from mrmae.train.method import LN_EPS, MaskedConvViT


def trainable(
    source: FeatureSource, n_classes: int, *, drop_path: float, new_head: bool = False
) -> tuple[nn.Module, list[str]]:
    """The source's model with a classifier for n_classes, and what to say about it.

    Students: mean of patch tokens, a new norm and classifier, as MAE and MCMAE fine-tune. timm models: their own pooling, and
    the classifier that their weights hold, unless there is none or `new_head` asks for another.
    Raises ValueError for a column, for a classifier with another number of classes, and for a timm model whose weights do not fit.
    """
    if source.teacher is None or source.kind == "pixels":
        raise ValueError(
            f"SOURCE {source.name}: a cache column has no model to fine-tune, and bare pixels have none; expected a student or timm:NAME; give the model itself"
        )
    if source.kind == "open_clip":
        raise ValueError(f"SOURCE {source.name}: image towers of open_clip are not fine-tuned here; expected a student or timm:NAME; timm has "
                         "most of them under names with _clip_")  # fmt: skip
    frozen: Any = source.teacher.tower.module
    if source.kind == "timm":
        return timm_classifier(source, frozen, n_classes, drop_path=drop_path, new_head=new_head)
    if isinstance(frozen, MaskedConvViT):
        return MaskedConvClassifier(frozen, n_classes, drop_path=drop_path), []
    return student_classifier(frozen, n_classes, drop_path=drop_path), []


def student_classifier(student: VisionTransformer, n_classes: int, *, drop_path: float) -> nn.Module:
    """The student as MAE fine-tunes it: final norm dropped, mean of patch tokens, new norm, classifier N(0, 2e-5).

    drop_path: of the last block, rising linearly from 0 at the first. Everything is trained, positions too.
    """
    model = copy.deepcopy(student).requires_grad_(True)  # the frozen one still gives features to other probes
    model.norm, model.fc_norm = nn.Identity(), nn.LayerNorm(model.num_features, eps=LN_EPS)
    model.global_pool, model.num_classes = "avg", n_classes
    model.head = new_classifier(model.num_features, n_classes)
    blocks: Any = model.blocks
    for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist()):
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return model


class MaskedConvClassifier(nn.Module):
    """MCMAE's student as its code fine-tunes it: no stage fusion, mean of all tokens, new norm, classifier.

    drop_path: of the last block, rising linearly from 0 at the first convolution block. For the layer-wise rates the
    convolution stages count as part of the embedding (Alpha-VL/ConvMAE).
    """

    def __init__(self, student: MaskedConvViT, n_classes: int, *, drop_path: float) -> None:
        super().__init__()
        self.student = copy.deepcopy(student).requires_grad_(True)
        del self.student.stage1_output_decode, self.student.stage2_output_decode, self.student.norm
        blocks: list[Any] = [*self.student.blocks1, *self.student.blocks2, *self.student.blocks3]
        for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist()):
            for path in ("drop_path1", "drop_path2"):
                setattr(block, path, DropPath(rate))
        self.num_classes = n_classes
        self.fc_norm = nn.LayerNorm(student.num_features, eps=LN_EPS)
        self.head = new_classifier(student.num_features, n_classes)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Logits of normalised images."""
        out: Tensor = self.head(self.fc_norm(self.student.forward_features(image).mean(dim=1)))
        return out

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for timm's layer-wise rates."""
        return {
            "stem": r"^student\.(?:pos_embed|patch_embed|blocks[12])",
            "blocks": [(r"^student\.blocks3\.(\d+)", None)],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed, beside vectors."""
        return {"student.pos_embed"}


def classifier_config(source: FeatureSource, model: nn.Module, classes: Sequence[str]) -> dict[str, Any] | None:
    """config.json that makes a folder with the fine-tuned weights a model of timm's (`local-dir:`); None for MCMAE, which timm lacks."""
    if not isinstance(model, VisionTransformer) or source.kind != "student":
        return None
    spec = source.spec
    args = {"img_size": spec.input_size[0], "patch_size": model.patch_embed.patch_size[0], "in_chans": len(spec.mean),
            "global_pool": "avg", "fc_norm": True}  # fmt: skip
    about = {"num_classes": len(classes), "input_size": [len(spec.mean), *spec.input_size],
             "fixed_input_size": True, "interpolation": spec.interpolation, "crop_pct": CROP_SHARE, "crop_mode": "center", "mean": list(spec.mean),
             "std": list(spec.std), "first_conv": "patch_embed.proj", "classifier": "head", "pool_size": None, "custom_load": False}  # fmt: skip
    return {"architecture": spec.model, "num_classes": len(classes), "label_names": list(classes), "num_features": model.num_features, "global_pool": "avg",
            "model_args": args, "pretrained_cfg": about}  # fmt: skip


def new_classifier(width: int, n_classes: int) -> nn.Linear:
    """One Linear that begins near zero, as in MAE's fine-tuning."""
    head = nn.Linear(width, n_classes)
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    return head


def timm_classifier(
    source: FeatureSource, frozen: Any, n_classes: int, *, drop_path: float, new_head: bool
) -> tuple[nn.Module, list[str]]:
    """A timm model built anew with n_classes and drop path, with the frozen one's weights and the classifier that fits."""
    assert source.teacher
    request = parse_teacher(f"probe={source.name.removeprefix(UNTRAINED)}")
    head = stored_classifier(request, timm_settings(request))
    had = len(next(iter(head.values()))) if head else 0
    if had not in (0, n_classes) and not new_head:
        raise ValueError(
            f"SOURCE {source.name}: the classifier in its weights has {had} classes, DATA has {n_classes}; the same number was "
            "expected; fine-tune with a new classifier by --set finetune.new_head=true, or give the DATA it was made for"
        )
    options: dict[str, Any] = {**request.options, "num_classes": n_classes, "drop_path_rate": drop_path}
    if source.teacher.tower.patch:
        options["img_size"] = source.spec.input_size
    model: nn.Module = timm.create_model(f"{request.model}.{request.tag}" if request.tag else request.model, **options)
    names = classifier_names(timm_settings(request))
    weights = {name: x for name, x in frozen.state_dict().items() if name not in names}
    began = {} if new_head else head
    fit_weights(model, weights | began, where=f"SOURCE {source.name}", classifier=names - set(began))
    kept = f"fine-tuning begins with the classifier of {had} classes that the weights hold"
    replaced = f"the classifier of {had} classes that the weights hold is replaced by a new one of {n_classes}"
    return model, [replaced if new_head else kept] if had else []


def stored_classifier(request: TeacherRequest, config: Any) -> dict[str, Tensor]:
    """The tensors of the classifier in the weights a source names; none where they are random or hold no classifier."""
    weights = timm_weights(request, config, allow_torchscript=False) or {}
    return {name: weights[name] for name in sorted(classifier_names(config)) if name in weights}
