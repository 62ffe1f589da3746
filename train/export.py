"""The trained student as a folder that timm and the Hugging Face hub read: weights, config.json and a model card.

    timm.create_model('local-dir:OUT/student', pretrained=True)

gives the encoder with its size, patch, mean and std; the state dict loads strictly, and its features are those of training.
timm has no MCMAE: that student's folder holds the same files under the parameter names of Alpha-VL/ConvMAE, for `load_mcmae`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import yaml
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mrmae.common.files import publish
from mrmae.common.progress import counted
from mrmae.extract.teachers import fit_weights, load_weights
from mrmae.train.method import SIZES, CacheInfo, MaskedConvViT, Pretrainer, build_mcmae, vit_arguments

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
CROP_SHARE = 0.875  # of the resized image when evaluating, as MAE's probes take 224 of 256
TIMM_USAGE = """A Vision Transformer encoder pre-trained without labels. It has no classifier.

```python
import timm
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)   # from the hub: "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
tokens = model.forward_features(transform(image)[None])                       # [1, {cls}{l}, {d}]{first}
```"""
MCMAE_USAGE = """An encoder with two convolution stages before its transformer (MCMAE, arXiv 2205.03892), pre-trained without labels. timm
has no such model. It has no CLS token and no classifier.

```python
from mrmae.train.export import load_mcmae
model = load_mcmae("PATH_OF_THIS_FOLDER")
tokens = model.forward_features(images)     # normalised [b, c, h, w] -> [b, {l}, {d}]; fine-tuning takes their mean, then a new norm
```

`model.safetensors` has the parameter names of Alpha-VL/ConvMAE: `patch_embed1..4`, `blocks1..3`, `pos_embed`, `norm`, and
`stage1_output_decode`, `stage2_output_decode`, which join the stages in pre-training and are not used in fine-tuning."""


def export_student(model: Pretrainer, path: Path | str, *, source: Mapping[str, Any]) -> Path:
    """Write the student of `model` to the folder `path`, replacing an earlier export file by file; returns the folder.

    A plain ViT becomes a folder that timm loads, MCMAE's student one that `load_mcmae` loads (timm has no such model).

    source: what the card tells about the run (plain values): command, epochs, cache ids, teachers and whether they were random.
    Raises OSError naming the file when the disk is full or not writable.
    """
    folder = Path(path)
    weights = safetensors.torch.save(student_weights(model), metadata={"format": "pt"})
    files = {
        WEIGHTS: weights,
        CONFIG: (json.dumps(student_config(model), indent=2) + "\n").encode(),
        CARD: model_card(model, source).encode(),
    }
    for name, data in files.items():
        publish(folder / name, data, replace=True)
    return folder


def load_student(path: Path | str) -> VisionTransformer:
    """The timm model of an exported folder, with its weights, in evaluation mode.

    Raises ValueError when the folder is not an export, or of MCMAE's student, or its weights cannot be read or do not fit.
    """
    folder = check_export(path)
    if json.loads((folder / CONFIG).read_bytes())["architecture"] in SIZES:
        raise ValueError(f"{folder}: holds MCMAE's student; a timm model was expected; open it with export.load_mcmae")
    student = timm.create_model(f"local-dir:{folder}", pretrained=False)
    assert isinstance(student, VisionTransformer)
    fit_weights(student, load_weights(folder / WEIGHTS), where=str(folder))
    return student.eval()


def load_mcmae(path: Path | str) -> MaskedConvViT:
    """MCMAE's student from an exported folder, with its weights, in evaluation mode.

    Raises ValueError when the folder is not an export, or of a timm model, or its weights cannot be read or do not fit.
    """
    folder = check_export(path)
    config = json.loads((folder / CONFIG).read_bytes())
    if config["architecture"] not in SIZES:
        raise ValueError(f"{folder}: holds {config['architecture']}; MCMAE's student was expected; timm opens this one")
    student = build_mcmae(config["architecture"], **config["model_args"])
    fit_weights(student, load_weights(folder / WEIGHTS), where=str(folder))
    return student.eval()


def check_export(path: Path | str) -> Path:
    """The folder of an export. Raises ValueError where its files are missing."""
    folder = Path(path)
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: has no {' and no '.join(missing)}; an exported student was expected; give OUT/student"
        )
    return folder


def student_weights(model: Pretrainer) -> dict[str, Tensor]:
    """The encoder's state dict under timm's names (ConvMAE's for MCMAE's student), fp32 on the CPU, positions included."""
    return {name: x.detach().cpu().float().contiguous() for name, x in model.student.state_dict().items()}


def bands_words(info: CacheInfo) -> str:
    """What a student's channels are where they are not RGB of 8 bits."""
    return (
        ""
        if (info.channels, info.unit) == (3, 255)
        else f" of {info.channels} bands, whose numbers are divided by {info.unit}"
    )


def student_config(model: Pretrainer) -> dict[str, Any]:
    """config.json: what builds this encoder again, and how its images are prepared."""
    if not isinstance(model.student, MaskedConvViT):
        return timm_config(model)
    info, prepare = model.info, model.recipe.prepare
    return {
        "architecture": model.recipe.student.model,
        "library": "mrmae",
        "num_features": model.student.num_features,
        "model_args": {
            "patch": info.patch,
            "grid": list(info.grid),
            "channels": info.channels,
            "depth": depth_left(model),
        },
        "input_size": [info.channels, info.size, info.size],
        "mean": list(prepare.mean),
        "std": list(prepare.std),
        "interpolation": "bicubic",
    }


def depth_left(model: Pretrainer) -> int | None:
    """Blocks of a student of which some were left out; None where it has all that its name says."""
    return len(model.student.blocks) if model.blocks_cut else None


def timm_config(model: Pretrainer) -> dict[str, Any]:
    """What timm needs to build this encoder and to prepare its images. `pretrained_cfg` describes these weights."""
    info, recipe = model.info, model.recipe
    told = vit_arguments(
        size=info.size,
        patch=info.patch,
        channels=info.channels,
        cls=recipe.student.cls,
        init_values=recipe.student.init_values,
        depth=depth_left(model),
    )
    return {
        "architecture": recipe.student.model,
        "num_classes": 0,
        "num_features": model.student.num_features,
        "global_pool": told["global_pool"],
        "model_args": told,
        "pretrained_cfg": {
            "tag": recipe.name,
            "custom_load": False,
            "input_size": [info.channels, info.size, info.size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": list(recipe.prepare.mean),
            "std": list(recipe.prepare.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def model_card(model: Pretrainer, source: Mapping[str, Any]) -> str:
    """The card: what this is, how to load it, how its images are prepared, how it was made."""
    info, recipe = model.info, model.recipe
    terms = "\n".join(f"- `{term}`" for term in model.terms)
    made = yaml.safe_dump(dict(source), sort_keys=False, allow_unicode=True, width=100).rstrip()
    library, usage = ("mrmae", MCMAE_USAGE) if isinstance(model.student, MaskedConvViT) else ("timm", TIMM_USAGE)
    cls = {"cls": "1 + ", "first": ", CLS first"} if model.student.num_prefix_tokens else {"cls": "", "first": ""}
    return f"""---
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- {library}
- masked-autoencoder
- mr-mae
---
# {recipe.student.model}, {info.size} px, patch {info.patch}, pre-trained with `{recipe.name}`

{usage.format(l=info.n_patches, d=model.student.embed_dim, **cls)}

| | |
| --- | --- |
| image | {info.size} x {info.size}{bands_words(info)}, mean {list(recipe.prepare.mean)}, std {list(recipe.prepare.std)}, bicubic |
| patches | {info.grid[0]} x {info.grid[1]} of {info.patch} px, fixed {recipe.student.positions} positions |
| encoder | {counted(len(model.student.blocks), "block")}{model.left_words()} |
| visible in training | {model.n_keep} of {info.n_patches} ({recipe.mask.sampler}) |

Terms of the loss (`tap @ positions > head ~ target | transform : distance * weight`):

{terms}

## How it was made

```yaml
{made}
```
"""
