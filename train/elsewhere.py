"""The student for other libraries, beside OUT/student: MAE's and ConvMAE's scripts, transformers' ViT, ONNX.

    transformers.ViTModel.from_pretrained("OUT/transformers", add_pooling_layer=False)
    onnxruntime.InferenceSession("OUT/student.onnx").run(["tokens"], {"images": images})

Both give the tokens of timm's `forward_features`, CLS first, of images normalised with the student's mean and std.
"""

import copy
import importlib.util
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrmae.common.files import publish
from mrmae.train.export import CROP_SHARE, WEIGHTS, student_weights
from mrmae.train.foreign import check_plain, export_published
from mrmae.train.method import MaskedConvViT, Pretrainer

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_AGREES = 1e-3  # largest difference of a token from the student's own, of the largest value; measured: 1e-6
BICUBIC = 3  # Pillow's number
THEIR_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm": "layernorm",
}


def check_exports(model: Pretrainer, names: Collection[str]) -> None:
    """Raise ValueError for what is not among EXPORTS, cannot be made of this student, or lacks its library: before the first update."""
    if unknown := [name for name in names if name not in EXPORTS]:
        raise ValueError(
            f"export: {unknown[0]!r} is unknown; one of {', '.join(EXPORTS)} was expected; correct it or leave it out"
        )
    if "mae" in names and not isinstance(model.student, MaskedConvViT):
        check_plain(model, "--export mae")
    if "transformers" in names:
        check_plain(model, "--export transformers")
    missing = [name for name in ONNX_PACKAGES if "onnx" in names and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--export onnx: {', '.join(missing)} not installed; {', '.join(ONNX_PACKAGES)} were expected; pip install 'mrmae[onnx]'"
        )


# ---- transformers


def export_transformers(model: Pretrainer, folder: Path) -> None:
    """Write the folder that `ViTModel.from_pretrained` reads, and `AutoImageProcessor` for RGB: shortest edge, then a centre crop."""
    config, prepare, info = transformers_config(model), model.recipe.prepare, model.info
    processor = {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": BICUBIC,
        "size": {"shortest_edge": int(info.size / CROP_SHARE)}, "do_center_crop": True,
        "crop_size": {"height": info.size, "width": info.size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(prepare.mean), "image_std": list(prepare.std),
    }  # fmt: skip
    files = {"config.json": config} | ({"preprocessor_config.json": processor} if info.channels == 3 else {})
    publish(folder / WEIGHTS, safetensors.torch.save(transformers_weights(model), {"format": "pt"}), replace=True)
    for name, content in files.items():
        publish(folder / name, (json.dumps(content, indent=2) + "\n").encode(), replace=True)


def transformers_config(model: Pretrainer) -> dict[str, Any]:
    """What `ViTConfig` says of this encoder."""
    block: Any = model.student.blocks[0]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": model.info.size,
        "patch_size": model.info.patch,
        "num_channels": model.info.channels,
        "hidden_size": model.student.embed_dim,
        "num_hidden_layers": len(model.student.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": True,
    }


def transformers_weights(model: Pretrainer) -> dict[str, Tensor]:
    """The state dict under the names of transformers' ViT: its files have query, key and value apart."""
    found = {}
    for name, x in student_weights(model).items():
        at, part = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)", name).groups()  # type: ignore[union-attr]
        layer, dot, kind = part.rpartition(".") if part.endswith((".weight", ".bias")) else (part, "", "")
        place = "" if at is None else f"encoder.layer.{at}."
        if layer == "attn.qkv":
            for which, rows in zip(("query", "key", "value"), x.chunk(3)):
                found[f"{place}attention.attention.{which}.{kind}"] = rows.contiguous()
        else:
            found[f"{place}{THEIR_NAMES[layer]}{dot}{kind}"] = x
    return found


# ---- ONNX


class ForwardFeatures(nn.Module):
    """Normalised images to tokens: `forward_features`, as a module."""

    def __init__(self, student: VisionTransformer | MaskedConvViT) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.student.forward_features(images)
        return tokens


def export_onnx(model: Pretrainer, path: Path) -> None:
    """Write one file, of any number of images; onnxruntime must give the student's own tokens.

    Raises ValueError where it does not, and for a student of more than 2 GB, which is more than one ONNX file holds.
    """
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    info = model.info
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(2, info.channels, info.size, info.size, generator=draw)
    if (size := sum(x.nbytes for x in student_weights(model).values())) > 2**31:
        raise ValueError(
            f"--export onnx: the student has {size:,} bytes; at most 2 GB fit into one file; use OUT/student, which timm loads"
        )
    student = ForwardFeatures(copy.deepcopy(model.student)).cpu().eval()
    batch = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.onnx.export(
            student, (images,), dynamo=True, input_names=["images"], output_names=["tokens"], dynamic_shapes=batch, verbose=False
        )  # fmt: skip
        wanted = student(images)
    assert program is not None
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["tokens"], {"images": images.numpy()})[0])
    if not (off := float((found - wanted).abs().max() / wanted.abs().max())) < ONNX_AGREES:
        raise ValueError(
            f"{path}: its tokens differ from the student's by {off:.2g} of their largest value; less than {ONNX_AGREES:g} was"
            " expected; nothing was written; use OUT/student, which timm loads"
        )
    publish(path, data, replace=True)


EXPORTS: dict[str, tuple[str, Callable[[Pretrainer, Path], Any]]] = {  # what is written in OUT, and how
    "mae": ("published.pth", export_published),
    "transformers": ("transformers", export_transformers),
    "onnx": ("student.onnx", export_onnx),
}
