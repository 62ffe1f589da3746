"""Any open_clip image tower: its own ViT, a timm trunk (MobileCLIP, SigLIP, ...) or CLIP's ResNet; its text tower is in clip_texts.py."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import CLIP, CLIPVisionCfg, resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mrmae.extract.teachers.address import INTERPOLATIONS, TeacherRequest
from mrmae.extract.teachers.attention import checked_attention
from mrmae.extract.teachers.hub import fetch_weights
from mrmae.extract.teachers.timm import as_tower, map_of, norm_tail_of, patch_of, pixels_of_model, wanted_size
from mrmae.extract.teachers.tower import (
    ImageSize,
    Origin,
    Preprocessing,
    StateDict,
    Tower,
    activation_of,
    linear_tail,
    norm_tail,
    tap_index,
    with_tail,
)
from mrmae.extract.teachers.weights import first_line, fit_weights, hinted, load_weights, weights_sha256

DEFAULT_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# The text tower of a CLIP that is built for its image tower.
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
Pretrained = dict[str, Any]  # open_clip's record of a tag: hub, mean, std, interpolation, quick_gelu


def build_open_clip(request: TeacherRequest, *, grid: int, allow_torchscript: bool) -> Tower:
    """The asked-for image tower, on the CPU, in evaluation mode.

    ViTs run at grid x patch (or `input_size`) with resampled position embeddings, other towers at their configured
    size. ValueError names what does not fit; also for weights trained with another activation than the model has.
    """
    config = clip_config(request)
    tag = find_tag(request)
    quick_gelu = chosen_activation(request, config, tag)
    weights = clip_weights(request, tag, allow_torchscript=allow_torchscript)
    module = build_visual(request, config, quick_gelu=quick_gelu)
    check_trunk_activation(request, module)
    if weights is not None:
        fit_weights(module, visual_part(weights, module, where=request.where), where=request.where)
    sha256 = weights_sha256(module.state_dict())
    origin = Origin(request.where, request.tag, clip_preprocessing(request, tag), sha256)
    if isinstance(module, TimmModel):
        return trunk_tower(module, request, origin, grid)
    if isinstance(module, ModifiedResNet):
        return resnet_tower(module, request, origin)
    patch = int(module.patch_size[0])
    size = wanted_size(request, patch, module.image_size, grid)
    if size != module.image_size:
        module = resized(module, build_visual(request, config, quick_gelu=quick_gelu, size=size))
    return vit_tower(module, request, origin, patch, size)


# --- configuration


def clip_config(request: TeacherRequest) -> dict[str, Any]:
    config = open_clip.get_model_config(request.model)
    if config is None:
        raise ValueError(
            f"{request.where}: open_clip has no model {request.model!r}{hinted(request.model, open_clip.list_models())}; "
            "correct the name (tags follow a slash)"
        )
    known = {field.name for field in dataclasses.fields(CLIPVisionCfg)} | {"embed_dim"}
    for key in request.options:
        if key == "image_size":
            raise ValueError(
                f"{request.where}: ?image_size= follows from the grid; use ?input_size= to choose it yourself"
            )
        if key not in known:
            raise ValueError(f"{request.where}: open_clip's image towers have no option {key!r}{hinted(key, known)}")
    return dict(config)


def shape_of_open_clip(request: TeacherRequest, grid: int) -> dict[str, Any]:
    """patch, input (pixels per side), map (height, width), width and licence of the tower for a student of grid x grid.

    Builds it without weights, on whatever device is the default; open_clip records no licences.
    """
    module = build_visual(request, clip_config(request), quick_gelu=False)
    if isinstance(module, TimmModel):
        native = pixels_of_model(module.trunk, types.SimpleNamespace(input_size=(3, *module.image_size)))
        return map_of(request, module.trunk, native, grid) | {"licence": ""}
    if isinstance(module, ModifiedResNet):
        side = request.input_size or int(module.image_size)
        last = module.layer4[-1].bn3.num_features
        return {"patch": None, "input": side, "map": (side // 32, side // 32), "width": last, "licence": ""}
    patch = int(module.patch_size[0])
    size = wanted_size(request, patch, module.image_size, grid)
    cells = (size[0] // patch, size[1] // patch)
    return {"patch": patch, "input": size[0], "map": cells, "width": module.transformer.width, "licence": ""}


def find_tag(request: TeacherRequest) -> Pretrained:
    """open_clip's record of the tag. Without one (file, random): an empty record, or what all of the model's tags share."""
    tags = {tag: open_clip.get_pretrained_cfg(request.model, tag) for tag in known_tags(request.model)}
    if request.tag:
        found = open_clip.get_pretrained_cfg(request.model, request.tag)
        if not found:
            raise ValueError(
                f"{request.where}: {request.model} has no tag {request.tag!r}; {tag_advice(request, list(tags))}"
            )
        return dict(found)
    if request.weights == "hub":
        raise ValueError(
            f"{request.where}: names no weights; add /TAG ({', '.join(tags)}), /random or @FILE?activation="
        )
    shared = list(tags.values())[:1]
    alike = all(cfg.get(key) == shared[0].get(key) for cfg in tags.values() for key in ("mean", "std", "interpolation"))
    if request.weights == "file" and not alike and not (request.mean and request.std and request.interpolation):
        raise ValueError(
            f"{request.where}: the tags of {request.model} differ in mean, std or interpolation; name the tag "
            f"({', '.join(tags)}) before @FILE, or give ?mean= ?std= ?interpolation="
        )
    return {key: shared[0].get(key) for key in ("mean", "std", "interpolation")} if shared else {}


def known_tags(model: str) -> list[str]:
    return list(open_clip.list_pretrained_tags_by_model(model))


def tag_advice(request: TeacherRequest, tags: list[str]) -> str:
    """What to ask for instead of an unknown tag: the same tag with the other activation, or a similar one."""
    other = (
        request.model.removesuffix("-quickgelu")
        if request.model.endswith("-quickgelu")
        else f"{request.model}-quickgelu"
    )
    if open_clip.get_pretrained_cfg(other, request.tag):
        return f"its weights have another activation: ask for {other}/{request.tag}"
    return f"it has {', '.join(tags) or 'none'}{hinted(request.tag or '', tags)}"


def clip_preprocessing(request: TeacherRequest, tag: Pretrained) -> Preprocessing:
    default = PreprocessCfg()
    chosen = request.interpolation or tag.get("interpolation") or default.interpolation
    if chosen not in INTERPOLATIONS:
        raise ValueError(f"{request.where}: interpolation {chosen!r} is not available; choose with ?interpolation=")
    mean, std = request.mean or tag.get("mean") or default.mean, request.std or tag.get("std") or default.std
    return Preprocessing(tuple(mean), tuple(std), chosen)


# --- activation


def chosen_activation(request: TeacherRequest, config: Mapping[str, Any], tag: Pretrained) -> bool:
    """Whether to build QuickGELU. ValueError where model, tag and `?activation=` disagree, or a bare file says nothing."""
    built = bool(config.get("quick_gelu", False))
    if request.activation not in (None, "gelu", "quickgelu"):
        raise ValueError(f"{request.where}: ?activation={request.activation}: open_clip has gelu and quickgelu")
    if request.weights == "file" and not request.tag:
        if request.activation is None:
            raise ValueError(
                f"{request.where}: a file does not say which activation its weights were trained with; "
                "add ?activation=gelu or ?activation=quickgelu (OpenAI's weights: quickgelu), or name the tag"
            )
        if built and request.activation == "gelu":
            raise ValueError(f"{request.where}: the model is the QuickGELU one; ?activation=gelu contradicts it")
        return request.activation == "quickgelu"
    wanted = built if request.activation is None else request.activation == "quickgelu"
    if not request.tag:
        return wanted
    trained = bool(tag.get("quick_gelu", False))  # open_clip's record says so only where it is QuickGELU
    if built and not trained and request.activation is None:
        raise ValueError(
            f"{request.where}: the model has QuickGELU, and open_clip does not record that the tag's weights were trained "
            "with it; say which with ?activation=quickgelu or ?activation=gelu"
        )
    if wanted != trained and (trained or not built):
        other = f"{request.model}-quickgelu"
        better = (
            f"ask for open_clip:{other}/{request.tag}"
            if trained and open_clip.get_model_config(other)
            else "correct it"
        )
        raise ValueError(
            f"{request.where}: the weights were trained with {spelled(trained)}, the model would have "
            f"{spelled(wanted)}; features would be wrong; {better}"
        )
    return wanted


def spelled(quick_gelu: bool) -> str:
    return "QuickGELU" if quick_gelu else "GELU"


def check_trunk_activation(request: TeacherRequest, module: nn.Module) -> None:
    """timm trunks have their own activation whatever open_clip is told: `?activation=` must not claim another."""
    if isinstance(module, TimmModel) and request.activation:
        built = activation_of(module.trunk)
        if (request.activation == "quickgelu") != (built == "quickgelu"):
            raise ValueError(f"{request.where}: ?activation={request.activation}: this tower's timm trunk has {built}")


# --- weights and construction


def clip_weights(request: TeacherRequest, tag: Pretrained, *, allow_torchscript: bool) -> StateDict | None:
    if request.weights == "random":
        return None
    if request.file:
        return load_weights(request.file, allow_torchscript=allow_torchscript)
    repository, _, name = str(tag.get("hf_hub") or "").rpartition("/")
    names = DEFAULT_HUB_FILES if not name else (name.rpartition(".")[0] + ".safetensors", name)
    hint = f"{request.where}@FILE"
    url = tag.get("url") or None
    path = fetch_weights(request.where, repository=repository or None, names=names, url=url, local_hint=hint)
    return load_weights(path, allow_torchscript=allow_torchscript)


def visual_part(weights: StateDict, module: nn.Module, *, where: str) -> StateDict:
    """The image tower's tensors, from a whole CLIP's state dict (`visual.`) or the tower's alone."""
    try:
        weights = convert_state_dict(types.SimpleNamespace(visual=module), weights)  # Apple's own MobileCLIP files
    except Exception as error:  # made for the right weights, it fails anyhow on others
        raise ValueError(
            f"{where}: open_clip cannot convert the weights ({first_line(error)}); choose the model they were made for"
        ) from None
    visual = {k.removeprefix("visual."): v for k, v in weights.items() if k.startswith("visual.")}
    return visual or weights


def build_visual(
    request: TeacherRequest, config: Mapping[str, Any], *, quick_gelu: bool, size: ImageSize | None = None
) -> Any:
    """The image tower with random weights, the same ones every time, in evaluation mode."""
    options = {key: value for key, value in request.options.items() if key != "embed_dim"}
    vision = dict(config["vision_cfg"]) | options | ({"image_size": size} if size else {})
    vision["timm_model_pretrained"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            width = request.options.get("embed_dim", config["embed_dim"])
            module = CLIP(width, vision, NO_TEXT, quick_gelu).visual  # the same tower in a CoCa and beside other texts
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{request.where}: open_clip cannot build it with {request.options or 'its defaults'} ({error})"
            ) from None
    return module.eval().requires_grad_(False)


def resized(native: nn.Module, module: nn.Module) -> nn.Module:
    """`module`, of another input size, with the weights of `native` and resampled position embeddings."""
    weights = {f"visual.{key}": value for key, value in native.state_dict().items()}
    resize_pos_embed(weights, types.SimpleNamespace(visual=module))
    module.load_state_dict({key.removeprefix("visual."): value for key, value in weights.items()})
    return module


# --- the three kinds of tower


def vit_tower(module: VisionTransformer, request: TeacherRequest, origin: Origin, patch: int, size: ImageSize) -> Tower:
    tap = request.tap or "pre_tail"
    tail = {} if module.attn_pool is not None else norm_tail(module.ln_post) | linear_tail(module.proj.T, None)
    index: Any = 1  # the last one
    if tap not in ("pre_tail", "post_ln", "projected"):
        blocks, others = len(module.transformer.resblocks), ("pre_tail", "post_ln", "projected")
        index = [tap_index(tap, prefix="block", count=blocks, where=origin.where, others=others)]

    def features(x: Tensor) -> tuple[Tensor, Tensor | None]:
        out = module.forward_intermediates(x, indices=index, intermediates_only=True, output_extra_tokens=True)
        return out["image_intermediates"][0], out["image_intermediates_prefix"][0][:, 0]

    attention = module.transformer.resblocks[-1].attn
    return Tower(
        module=module,
        features=with_tail(features, tail, tap, where=origin.where),
        attention_row=checked_attention(attention, features, size),
        patch=patch,
        input_size=size,
        origin=origin,
        activation=activation_of(module),
        prefix_tokens=1,
        tap=tap,
        tail=tail,
        attention_backend="mha" if isinstance(attention, nn.MultiheadAttention) else "sdpa",
    )


def trunk_tower(module: TimmModel, request: TeacherRequest, origin: Origin, grid: int) -> Tower:
    trunk = module.trunk
    patch = patch_of(trunk)
    native = pixels_of_model(trunk, types.SimpleNamespace(input_size=(3, *module.image_size)))
    size = wanted_size(request, patch, native, grid)
    if size != native and hasattr(trunk, "set_input_size"):
        trunk.set_input_size(size)
    return as_tower(trunk, origin, request.tap, patch, size, trunk_tail(module) if patch else {})


def trunk_tail(module: TimmModel) -> StateDict:
    """Norm and projection; no projection where attention pools the tokens before it."""
    tail = norm_tail_of(module.trunk)
    pooled = getattr(module.trunk, "attn_pool", None) is not None
    heads = (getattr(module.head, "proj", None), getattr(module.trunk, "head", None))
    projection = next((head for head in heads if isinstance(head, nn.Linear)), None)
    return tail if pooled or projection is None else tail | linear_tail(projection.weight, projection.bias)


def resnet_tower(module: ModifiedResNet, request: TeacherRequest, origin: Origin) -> Tower:
    """CLIP's ResNet up to its last stage; the attention pooling behind it, bound to one input size, is never run."""
    tap = request.tap or "last"
    stages = (module.stem, module.layer1, module.layer2, module.layer3, module.layer4)
    last = len(stages) - 1
    if tap != "last":
        last = tap_index(tap, prefix="stage", count=len(stages), where=origin.where, others=("last",))

    def features(x: Tensor) -> tuple[Tensor, Tensor | None]:
        for stage in stages[: last + 1]:
            x = stage(x)
        return x, None

    side = request.input_size or int(module.image_size)
    return Tower(
        module=module,
        features=features,
        attention_row=None,
        patch=None,
        input_size=(side, side),
        origin=origin,
        activation=activation_of(module),
        prefix_tokens=0,
        tap=tap,
        tail={},
        attention_backend="none",
    )
