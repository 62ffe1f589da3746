"""What the libraries' adapters hand over, and what is common to every image tower: taps, tail, activation."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mrmae.shards.format import BEHIND, FACET_TAP, apply_tail, taps_behind

StateDict = dict[str, Tensor]
ImageSize = tuple[int, int]  # height, width
TowerOutput = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # image -> (map [b, d, gh, gw], CLS [b, d] or None)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How pixels reach a tower. mean, std: of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a tower's weights and settings come from. where: how messages name it. tag: None for random and bare files."""

    where: str
    tag: str | None
    preprocessing: Preprocessing
    weights_sha256: str


@dataclasses.dataclass(frozen=True)
class Tower:
    """An image tower with its weights, at its final input size, in evaluation mode.

    features: normalised image [b, 3, h, w] -> (map, CLS) at the tap. attention_row: after `features`, the last block's
    CLS row [b, prefix + patches]; None where there is no CLS or no exact row. patch: pixels per token side of a plain
    ViT; None for convolutional and hierarchical towers. tail: final norm and projection.
    """

    module: nn.Module
    features: TowerOutput
    attention_row: Callable[[], Tensor] | None
    patch: int | None
    input_size: ImageSize
    origin: Origin
    activation: str
    prefix_tokens: int
    tap: str
    tail: StateDict
    attention_backend: str


# --- taps


def tap_index(tap: str, *, prefix: str, count: int, where: str, others: tuple[str, ...]) -> int:
    """0-based index of `block_3` or `stage_3` (1-based); ValueError naming what there is."""
    match = re.fullmatch(prefix + r"_(\d+)", tap)
    if match and 1 <= int(match[1]) <= count:
        return int(match[1]) - 1
    known = ", ".join((*others, f"{prefix}_1 to {prefix}_{count}"))
    raise ValueError(f"{where}: there is no tap {tap!r}; this model has {known}; correct ?tap=")


# --- tail: final norm and projection


def norm_tail(norm: nn.Module | None) -> StateDict:
    """Tensors of a final norm: `layer_norm.{weight,bias,eps}` or `rms_norm.{weight,eps}`; empty where there is none."""
    kind = type(norm).__name__.lower()
    name = "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm" if "rms" in kind else None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if name is None or not isinstance(weight, Tensor):
        return {}
    tail = {f"{name}.weight": weight, f"{name}.eps": torch.tensor(float(getattr(norm, "eps", 0) or 1e-6))}
    if isinstance(bias, Tensor):
        tail[f"{name}.bias"] = bias
    return {key: value.detach().float().cpu().clone() for key, value in tail.items()}


def linear_tail(weight: Tensor, bias: Tensor | None) -> StateDict:
    """Tensors of a projection: `proj.weight` [out, in] and, where there is one, `proj.bias`."""
    tail = {"proj.weight": weight} | ({"proj.bias": bias} if bias is not None else {})
    return {key: value.detach().float().cpu().clone().contiguous() for key, value in tail.items()}


def with_tail(features: TowerOutput, tail: Mapping[str, Tensor], tap: str, *, where: str) -> TowerOutput:
    """`features` followed by the tail in fp32 where `tap` is behind it; ValueError where the tail does not lead there."""
    if tap not in BEHIND and (not FACET_TAP.fullmatch(tap) or tap.startswith("input_")):
        return features
    if tap in BEHIND and tap not in taps_behind(tail):
        raise ValueError(f"{where}: this tower has no tap {tap!r} for patch tokens (its tail: {', '.join(tail) or 'none'}); "
                         "expected pre_tail or block_i; correct ?tap=")  # fmt: skip

    def after(x: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens, cls = features(x)
        with torch.autocast(x.device.type, enabled=False):
            tokens = apply_tail(tokens.float().movedim(1, -1), tail, tap).movedim(-1, 1)
            return tokens, None if cls is None else apply_tail(cls.float(), tail, tap)

    return after


# --- activation


def activation_of(module: nn.Module) -> str:
    """`gelu`, `quickgelu`, `silu`, `relu6`, ...: of the last transformer block, or the most frequent one in the model."""
    blocks = getattr(module, "blocks", None) or getattr(getattr(module, "transformer", None), "resblocks", None)
    last = activations(blocks[-1]) if isinstance(blocks, nn.ModuleList | nn.Sequential) else []
    names = last or activations(module)
    return max(sorted(set(names)), key=names.count) if names else "none"


def activations(module: nn.Module) -> list[str]:
    names = [type(m).__name__ for m in module.modules() if "activation" in type(m).__module__ or is_gelu(m)]
    return [name.lower() for name in names if name not in ("MultiheadAttention", "Identity", "Sigmoid")]


def is_gelu(module: nn.Module) -> bool:
    return "gelu" in type(module).__name__.lower()
