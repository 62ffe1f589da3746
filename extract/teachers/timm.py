"""Any timm model as an image tower: a plain ViT at grid x patch, or a feature map at the model's own size."""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import timm.models
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from mrmae.extract.teachers.address import INTERPOLATIONS, TeacherRequest
from mrmae.extract.teachers.attention import checked_attention
from mrmae.extract.teachers.hub import fetch_weights
from mrmae.extract.teachers.tower import (
    ImageSize,
    Origin,
    Preprocessing,
    StateDict,
    Tower,
    TowerOutput,
    activation_of,
    linear_tail,
    norm_tail,
    tap_index,
    with_tail,
)
from mrmae.extract.teachers.weights import first_line, fit_weights, hinted, load_weights, weights_sha256
from mrmae.shards.format import FACET_TAP, stored_tap

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# timm's own note on weights that its default GELU does not reproduce.
QUICKGELU_NOTE = "natively QuickGELU"


def build_timm(request: TeacherRequest, *, grid: int, allow_torchscript: bool) -> Tower:
    """The asked-for timm model, on the CPU, in evaluation mode.

    A plain ViT is built at grid x patch (or `input_size`) and timm's own loader resamples its position embeddings;
    other models keep their configured size. ValueError names what does not fit.
    """
    config = timm_settings(request)
    weights = timm_weights(request, config, allow_torchscript=allow_torchscript)
    native = build_loaded(request, config, weights, size_in_file(request, config, weights))
    sha256 = weights_sha256(native.state_dict(), classifier=classifier_names(config))
    check_activation(request, config, native)
    patch, native_size = patch_of(native), pixels_of_model(native, config)
    size = wanted_size(request, patch, native_size, grid)
    model = native
    if size != native_size and config.fixed_input_size:
        model = build_sized(request, config, native, size, native_size)
    tag = request.tag or (config.tag if request.weights == "hub" else None)
    origin = Origin(request.where, tag, timm_preprocessing(request, config), sha256)
    return as_tower(model, origin, request.tap, patch, size, norm_tail_of(model) if patch else {})


# --- configuration


def timm_settings(request: TeacherRequest) -> Any:
    """timm's configuration (a PretrainedCfg) of the model and tag. ValueError with the nearest names."""
    if not timm.is_model(request.model):
        raise ValueError(
            f"{request.where}: timm has no model {request.model!r}{hinted(request.model, timm.list_models())}; "
            "correct the name (tags follow a dot)"
        )
    tags = [name.partition(".")[2] for name in timm.models.get_arch_pretrained_cfgs(request.model)]
    if request.tag and request.tag not in tags:
        raise ValueError(
            f"{request.where}: {request.model} has no tag {request.tag!r}; it has {', '.join(filter(None, tags)) or 'none'}"
        )
    name = f"{request.model}.{request.tag}" if request.tag else request.model
    return timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()


def timm_preprocessing(request: TeacherRequest, config: Any) -> Preprocessing:
    chosen = request.interpolation or config.interpolation
    if chosen not in INTERPOLATIONS:
        raise ValueError(
            f"{request.where}: the configured interpolation {chosen!r} is not available; "
            f"expected {', '.join(INTERPOLATIONS)}; choose with ?interpolation="
        )
    return Preprocessing(request.mean or tuple(config.mean), request.std or tuple(config.std), chosen)


def classifier_names(config: Any) -> set[str]:
    heads = config.classifier or ()
    return {f"{head}.{part}" for head in ([heads] if isinstance(heads, str) else heads) for part in ("weight", "bias")}


def check_activation(request: TeacherRequest, config: Any, model: nn.Module) -> None:
    """ValueError where weights of a known tag were trained with QuickGELU and the model has GELU, or the reverse."""
    if request.weights == "random" or (request.weights == "file" and not request.tag):
        return
    trained = any(QUICKGELU_NOTE in note for note in config.notes or ()) or "quickgelu" in request.model
    built = activation_of(model)
    if trained != (built == "quickgelu"):
        other = request.model.replace("_clip_", "_clip_quickgelu_")
        better = f"ask for {other}.{config.tag}" if trained and timm.is_model(other) else "correct ?activation="
        raise ValueError(
            f"{request.where}: the weights were trained with {'QuickGELU' if trained else 'another activation'}, "
            f"the model has {built}; features would be wrong; {better}"
        )


def shape_of_timm(request: TeacherRequest, grid: int) -> dict[str, Any]:
    """patch, input (pixels per side), map (height, width), width and licence of the model for a student of grid x grid.

    Builds it without weights, on whatever device is the default.
    """
    config = timm_settings(request)
    model = create_timm(request, request.options)
    return map_of(request, model, pixels_of_model(model, config), grid) | {"licence": config.license or ""}


def map_of(request: TeacherRequest, model: nn.Module, native: ImageSize, grid: int) -> dict[str, Any]:
    """patch, input, map and width of a timm model, alone or as another tower's trunk."""
    patch = patch_of(model)
    size = wanted_size(request, patch, native, grid)
    last: dict[str, Any] = model.feature_info[-1]  # type: ignore[index, assignment]
    step = last["reduction"]
    return {"patch": patch, "input": size[0], "map": (size[0] // step, size[1] // step), "width": last["num_chs"]}


# --- weights and construction


def timm_weights(request: TeacherRequest, config: Any, *, allow_torchscript: bool) -> StateDict | None:
    """The tensors as timm's files name them; None for random weights."""
    if request.weights == "random":
        return None
    if request.file:
        return load_weights(request.file, allow_torchscript=allow_torchscript)
    if not config.has_weights:
        known = [name for name in timm.list_pretrained(f"{request.model}.*")]
        raise ValueError(
            f"{request.where}: timm knows no weights for it; expected one of {', '.join(known) or 'none'}, "
            f"a file ({request.where}@FILE), or {request.name}=timm:{request.model}/random"
        )
    names = (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES
    url = config.url if isinstance(config.url, str) and config.url else None
    hint = f"{request.name}=timm:{request.model}.{config.tag or ''}@FILE".replace(".@", "@")
    path = fetch_weights(request.where, repository=config.hf_hub_id or None, names=names, url=url, local_hint=hint)
    return load_weights(path)


def build_loaded(
    request: TeacherRequest, config: Any, weights: Mapping[str, Tensor] | None, size: Mapping[str, ImageSize]
) -> nn.Module:
    """The model in evaluation mode with `weights` (None: random, the same ones every time), at `size` if one is given."""
    options: dict[str, Any] = request.options | dict(size)
    if "img_size" in request.options:
        raise ValueError(f"{request.where}: ?img_size= follows from the grid; use ?input_size= to choose it yourself")
    if request.activation:
        options["act_layer"] = {"quickgelu": "quick_gelu"}.get(request.activation, request.activation)
    if weights is None:
        model = build_random(request, options)
    else:
        names = classifier_names(config)
        model, converted = build_converting(request, options, weights, names)
        fit_weights(model, converted, where=request.where, classifier=names)
    return model.eval().requires_grad_(False)


def build_random(request: TeacherRequest, options: Mapping[str, Any]) -> nn.Module:
    """The model with random weights, the same ones every time. ValueError where timm has no such options."""
    try:
        return create_timm(request, options)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{request.where}: timm cannot build it with {options or 'its defaults'} ({error}); correct the options"
        ) from None


def build_converting(
    request: TeacherRequest, options: Mapping[str, Any], weights: Mapping[str, Tensor], classifier: set[str]
) -> tuple[nn.Module, StateDict]:
    """The model, its own weights still random, and `weights` under its names and shapes, by timm's conversion for it.

    ValueError where timm cannot build it or convert them.
    """
    # With a classifier timm would cut its weights, or load them without asking whether the others fit.
    source = {"state_dict": dict(weights), "classifier": None}
    try:
        with loading_noted() as noted:
            model = create_timm(request, options, pretrained=True, pretrained_cfg_overlay=source)
        model.pretrained_cfg.pop("state_dict")  # type: ignore[operator, union-attr]  # a copy of all weights
        return model, noted
    except Exception as error:  # made for the right weights, timm's conversions fail anyhow on others
        plain = build_random(request, options)  # says whether the options are what is wrong
        fit_weights(plain, weights, where=request.where, classifier=classifier)  # says which tensor does not fit
        raise ValueError(f"{request.where}: timm cannot convert the weights ({first_line(error)}); choose the model they "
                         "were made for") from None  # fmt: skip


def create_timm(request: TeacherRequest, options: Mapping[str, Any], **how: Any) -> nn.Module:
    name = f"{request.model}.{request.tag}" if request.tag else request.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, **how, **options)


@contextlib.contextmanager
def loading_noted() -> Iterator[StateDict]:
    """Inside, a new model that loads weights keeps its own instead; what it would have loaded is in the dict afterwards.

    timm converts a checkpoint for a model (names, position embeddings) on the way to load_state_dict and gives the result
    away nowhere else; and not for every model does it then load strictly.
    """
    noted: StateDict = {}

    def note(module: nn.Module, weights: StateDict, prefix: str, *_: object) -> None:
        if not prefix:  # not a part of the model that loads
            noted.update(weights)
            weights.clear()
            weights.update(module.state_dict())

    with contextlib.ExitStack() as hooks:
        watched: set[nn.Module] = set()

        def watch(parent: nn.Module, _name: str, _child: nn.Module | None) -> None:
            if parent not in watched:
                watched.add(parent)
                hooks.callback(parent.register_load_state_dict_pre_hook(note).remove)  # type: ignore[no-untyped-call]

        hooks.callback(register_module_module_registration_hook(watch).remove)
        yield noted


def build_sized(
    request: TeacherRequest, config: Any, native: nn.Module, size: ImageSize, native_size: ImageSize
) -> nn.Module:
    """The model at another input size, with the weights of `native`. ValueError where timm cannot resize it."""
    try:
        return build_loaded(request, config, native.state_dict(), {"img_size": size})
    except ValueError as error:
        reason = str(error).removeprefix(f"{request.where}: ").partition(";")[0]
        raise ValueError(
            f"{request.where}: cannot run at {size[0]} px, which the grid asks for ({reason}); "
            f"run it at its own size with ?input_size={native_size[0]} (its map is then resampled to the grid)"
        ) from None


# --- geometry


def patch_of(model: nn.Module) -> int | None:
    """Pixels per token side of a plain ViT (one resolution throughout); None for any other model."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "stem", None)
    reductions = {stage["reduction"] for stage in getattr(model, "feature_info", None) or ()}
    if len(reductions) != 1 or not (hasattr(embed, "grid_size") or hasattr(model, "num_prefix_tokens")):
        return None
    if hasattr(embed, "grid_size"):
        return int(embed.img_size[0] // embed.grid_size[0])  # type: ignore[union-attr]
    return int(reductions.pop())


def pixels_of_model(model: nn.Module, config: Any) -> ImageSize:
    """(height, width) in pixels that the model was built for."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "stem", None)
    size = getattr(embed, "img_size", None) or config.input_size[1:]
    return int(size[0]), int(size[1])


def wanted_size(request: TeacherRequest, patch: int | None, native: ImageSize, grid: int) -> ImageSize:
    side = request.input_size or (grid * patch if patch else None)
    if patch and side and side % patch:
        raise ValueError(f"{request.where}: ?input_size={side} is no multiple of the model's patch of {patch} px")
    return (side, side) if side else native


def native_pixels(request: TeacherRequest, *, allow_torchscript: bool = False) -> int:
    """Pixels per side that the model's weights are for: those of a file's own position embeddings, else the configured ones."""
    config = timm_settings(request)
    weights = timm_weights(request, config, allow_torchscript=allow_torchscript) if request.file else None
    size = size_in_file(request, config, weights).get("img_size", config.input_size[-2:])
    return int(size[1])


def size_in_file(request: TeacherRequest, config: Any, weights: Mapping[str, Tensor] | None) -> dict[str, ImageSize]:
    """timm's `img_size` for a file's own square grid of position embeddings, so that they are taken as they are.

    Empty where the model as configured has as many, and where weights or model have none of this kind.
    """
    found = weights.get("pos_embed") if weights is not None and request.weights == "file" else None
    if weights is None or found is None or found.ndim != 3 or "patch_embed.proj.weight" not in weights:
        return {}
    patch, cls = int(weights["patch_embed.proj.weight"].shape[-1]), int("cls_token" in weights)
    registers = int(weights["reg_token"].shape[1]) if "reg_token" in weights else 0
    counts = [
        n for before in (cls + registers, cls, 0) if (n := found.shape[1] - before) > 0 and math.isqrt(n) ** 2 == n
    ]
    side = math.isqrt(counts[0]) * patch if counts else 0
    if not side or (side, side) == tuple(config.input_size[-2:]):
        return {}
    model = build_random(request, request.options)  # whether it is of this kind, its own class knows
    own: Any = getattr(model, "pos_embed", None)
    asked = patch_of(model) == patch and own is not None and own.shape[1] != found.shape[1]
    return {"img_size": (side, side)} if asked else {}


# --- features


def as_tower(
    model: nn.Module, origin: Origin, tap: str | None, patch: int | None, size: ImageSize, tail: StateDict
) -> Tower:
    """A timm model (alone, or as another tower's trunk) as a Tower."""
    tap = tap or ("pre_tail" if patch else "last")
    block = model.blocks[-1] if patch and has_cls(model) and hasattr(model, "blocks") else None  # type: ignore[index]
    source = stored_tap(tap) if FACET_TAP.fullmatch(tap) else tap
    features = features_at(model, source, patch, where=origin.where, whole=block is not None)
    if source.startswith("input_"):
        number = int(source.removeprefix("input_")) - 1
        tail = facet_tail(model.get_submodule(f"blocks.{number}"), where=f"{origin.where}?tap={tap}")
    row = checked_attention(getattr(block, "attn", None), features, size)
    features = with_tail(features, tail, tap, where=origin.where)
    return Tower(
        module=model,
        features=features,
        attention_row=row,
        patch=patch,
        input_size=size,
        origin=origin,
        activation=activation_of(model),
        prefix_tokens=prefix_tokens_of(model),
        tap=tap,
        tail=tail if source == tap else {},
        attention_backend=attention_backend(model),
    )


def features_at(model: nn.Module, tap: str, patch: int | None, *, where: str, whole: bool) -> TowerOutput:
    """Normalised image -> (map, CLS) at the tap. whole: always run every block (the last one's attention is wanted)."""
    stages = len(getattr(model, "feature_info", None) or ())
    if tap == "head" and not patch:
        return lambda x: (to_map(model, model.forward_features(x)), None)  # type: ignore[operator]
    if tap in (("pre_tail", "post_ln", "projected") if patch else ("last",)):
        index: int | list[int] = 1  # the last one
    elif tap.startswith("input_") and patch:
        index = [input_index(tap, stages, where=where)]
    else:
        kind = "block" if patch else "stage"
        others = ("pre_tail", "post_ln") if patch else ("last", "head")
        index = [tap_index(tap, prefix=kind, count=stages, where=where, others=others)]
    how: dict[str, Any] = {"indices": index, "norm": False, "stop_early": not whole, "intermediates_only": True}
    if has_cls(model) or prefix_tokens_of(model):
        how["return_prefix_tokens"] = True
    accepted = inspect.signature(model.forward_intermediates).parameters  # type: ignore[arg-type]
    how = {key: value for key, value in how.items() if key in accepted}

    def features(x: Tensor) -> tuple[Tensor, Tensor | None]:
        out = model.forward_intermediates(x, output_fmt="NCHW", **how)[0]  # type: ignore[operator]
        tokens, prefix = out if isinstance(out, tuple) else (out, None)
        return tokens, prefix[:, 0] if prefix is not None and has_cls(model) else None

    return features


def input_index(tap: str, blocks: int, *, where: str) -> int:
    """0-based index of the block whose output a block's input is. ValueError naming what there is."""
    number = int(tap.removeprefix("input_"))
    if not 2 <= number <= blocks:
        raise ValueError(f"{where}: there is no tap {tap!r}; this model has input_2 to input_{blocks}; correct ?tap=")
    return number - 2


def facet_tail(block: nn.Module, *, where: str) -> StateDict:
    """What a plain ViT's block makes of its input: its first norm, and queries, keys and values of `qkv.heads` heads by one projection.

    ValueError for any other block: its relations would be others.
    """
    norm = norm_tail(getattr(block, "norm1", None))
    attn = getattr(block, "attn", None)
    same = [getattr(attn, name, None) for name in ("q_norm", "k_norm")]
    plain = type(block) is Block and type(attn) is Attention and all(isinstance(each, nn.Identity) for each in same)
    if not norm or not plain:
        raise ValueError(f"{where}: this block is a {type(block).__name__} with {type(attn).__name__}; a plain ViT's was expected, whose queries, "
                         "keys and values are one projection of its normalised input; choose a plain ViT")  # fmt: skip
    qkv: Any = attn.qkv  # type: ignore[union-attr]
    made = linear_tail(qkv.weight, qkv.bias)
    heads = torch.tensor(float(attn.num_heads))  # type: ignore[union-attr]
    return norm | {name.replace("proj.", "qkv."): tensor for name, tensor in made.items()} | {"qkv.heads": heads}


def has_cls(model: nn.Module) -> bool:
    return getattr(model, "cls_token", None) is not None


def prefix_tokens_of(model: nn.Module) -> int:
    return int(getattr(model, "num_prefix_tokens", 0) or 0)


def to_map(model: nn.Module, out: Tensor) -> Tensor:
    """[b, d, h, w] from what forward_features gives: NCHW, or NHWC where the model says so."""
    return out.permute(0, 3, 1, 2) if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else out


def norm_tail_of(model: nn.Module) -> StateDict:
    """Final norm: `norm`, or `fc_norm` in models that pool before it."""
    return norm_tail(getattr(model, "norm", None)) or norm_tail(getattr(model, "fc_norm", None))


def attention_backend(model: nn.Module) -> str:
    """`sdpa` (PyTorch's fused attention), `explicit` (products and softmax) or `none` (no attention)."""
    fused = [bool(module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn")]
    return "sdpa" if any(fused) else "explicit" if any("attn" in name for name, _ in model.named_modules()) else "none"
