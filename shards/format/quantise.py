"""Stored dtypes: calibration, quantisation and, the definition kernels are tested against, dequantisation.

int8, fp8: value = channel_mean + channel_std * (scale[token] * code). Without standardisation mean and std are 0 and 1. fp8 codes
are E4M3 numbers (finite, no infinities), kept as their bytes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16, Shaped
from torch import Tensor

SENTINEL = -128  # int8 code of a token that was never written; float arrays use NaN
FP16_MAX = 65504.0
SAMPLES_AT_ONCE = 32  # in conversion: bounds its float32 copies
CACHED_VALUES = 2**18  # a CPU works on so many features at a time: temporaries stay in its cache, and memory bounded
Channels = np.ndarray[Any, np.dtype[np.float32]]


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a dtype lies in an array of numpy's dtype `array`. scaled: one float16 scale per token brings the largest code to `top`.

    unwritten: what an element that was never written reads as; refused: codes that are no value.
    """

    array: str
    bytes: int
    scaled: bool
    top: float
    unwritten: float
    refused: tuple[int, ...] = ()


DTYPES = {
    "int8": Stored("int8", 1, True, 127.0, SENTINEL, (SENTINEL,)),
    "fp8": Stored("uint8", 1, True, 448.0, 0xFF, (0x7F, 0xFF)),  # both are NaN in E4M3
    "float16": Stored("float16", 2, False, FP16_MAX, math.nan),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Quantiser:
    """How a column's tokens are stored. channel_mean, channel_std: float32 [d], None without standardisation.

    source: id of the column whose stored values were quantised again; None where the teacher's own were.
    """

    dtype: str
    channel_mean: Channels | None = None
    channel_std: Channels | None = None
    standardised: bool = False
    source: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"quantiser: dtype {self.dtype!r} is not known; expected {' or '.join(DTYPES)}; choose one"
            )

    @property
    def stored(self) -> Stored:
        """How its codes lie in an array."""
        return DTYPES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """The quantiser as JSON; nine significant digits carry a float32 exactly."""
        parts = {"channel_mean": self.channel_mean, "channel_std": self.channel_std}
        lists = {k: None if v is None else [float(f"{x:.9g}") for x in v.tolist()] for k, v in parts.items()}
        source = {} if self.source is None else {"source": self.source}
        return {"dtype": self.dtype, "standardised": self.standardised, **lists, **source}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Quantiser":
        """The quantiser that `to_json` described."""
        arrays = {k: fields[k] if fields[k] is None else np.array(fields[k], np.float32)
                  for k in ("channel_mean", "channel_std")}  # fmt: skip
        return Quantiser(
            fields["dtype"], standardised=bool(fields["standardised"]), source=fields.get("source"), **arrays
        )


def parts_of(features: Float[Tensor, "n l d"]) -> Sequence[Float[Tensor, "_ l d"]]:
    """The samples a few at a time on a CPU, all at once elsewhere."""
    if features.device.type != "cpu" or not len(features):
        return (features,)
    return torch.split(features, max(1, CACHED_VALUES // max(features[0].numel(), 1)))


def quantise(
    tokens: Float[Tensor, "b l d"], q: Quantiser
) -> tuple[Shaped[Tensor, "b l d"], Float16[Tensor, "b l"] | None]:
    """Codes (int8 within ±127, uint8 bytes of E4M3 within ±448, or float16) and per-token scale (float16; None for float16 codes).

    The codes are computed from the scale as stored, so that its rounding costs nothing.
    Raises ValueError for NaN, infinities, and values that float16 cannot hold.
    """
    parts = [quantise_part(part, q) for part in parts_of(tokens)]
    if len(parts) == 1:
        return parts[0]
    scales = [scale for _, scale in parts if scale is not None]
    return torch.cat([codes for codes, _ in parts]), torch.cat(scales) if scales else None


def quantise_part(
    tokens: Float[Tensor, "b l d"], q: Quantiser
) -> tuple[Shaped[Tensor, "b l d"], Float16[Tensor, "b l"] | None]:
    """`quantise` of a few samples."""
    if q.dtype == "float16":
        refuse_overflow(largest(tokens), tokens, "a token value")
        return tokens.to(torch.float16), None
    centred = tokens.float()
    if q.channel_mean is not None and q.channel_std is not None:
        centred = (centred - on(q.channel_mean, tokens)).div_(on(q.channel_std, tokens))
    top = q.stored.top
    step = largest(centred) / top
    refuse_overflow(step, tokens, "a token's scale")
    scale = step.to(torch.float16)
    nothing = scale == 0  # nothing float16 can tell from zero
    codes = (centred / torch.where(nothing, 1.0, scale.float())[..., None]).clamp_(-top, top)
    if bool(nothing.any()):
        codes.masked_fill_(nothing[..., None], 0.0)
    return codes.to(torch.float8_e4m3fn).view(torch.uint8) if q.dtype == "fp8" else codes.round_().to(torch.int8), scale


def largest(tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
    """Every token's largest magnitude; NaN where it holds one."""
    return torch.maximum(tokens.amax(dim=-1), -tokens.amin(dim=-1))  # aminmax takes seven times as long on a CPU


def dequantise(
    codes: Shaped[Tensor, "b l d"], scale: Float16[Tensor, "b l"] | None, q: Quantiser
) -> Float[Tensor, "b l d"]:
    """Float32 tokens; NaN where codes hold the sentinel, so that nothing unwritten is ever used silently."""
    if q.dtype == "float16":
        return codes.float()
    values = values_of(codes, scale, q)
    return values.masked_fill_(codes == SENTINEL, torch.nan) if q.dtype == "int8" else values


def values_of(
    codes: Shaped[Tensor, "b l d"], scale: Float16[Tensor, "b l"] | None, q: Quantiser
) -> Float[Tensor, "b l d"]:
    """`dequantise` of codes among which there is no sentinel."""
    if q.dtype == "float16":
        return codes.float()
    assert scale is not None, "these codes need their scale"
    values = (codes.view(torch.float8_e4m3fn) if q.dtype == "fp8" else codes).float().mul_(scale.float()[..., None])
    if q.channel_mean is not None and q.channel_std is not None:
        values.mul_(on(q.channel_std, codes)).add_(on(q.channel_mean, codes))
    return values


def refuse_nonfinite(tokens: Tensor, where: str) -> None:
    """ValueError that counts NaN and infinite values and names the first, unless all are finite."""
    if bool(torch.isfinite(tokens.sum())):
        return
    wrong = ~torch.isfinite(tokens)
    count = int(wrong.sum())
    if count:
        first = wrong.nonzero()[0].tolist()
        raise ValueError(f"{where}: {count} of {tokens.numel()} features are NaN or infinite, the first at {first} "
                         f"(sample, token, channel); expected finite values; try --precision fp32")  # fmt: skip


def refuse_overflow(values: Tensor, tokens: Tensor, what: str) -> None:
    """ValueError when one of `values`, computed from `tokens`, does not fit float16, or `tokens` are not finite."""
    top = float(values.amax()) if values.numel() else 0.0
    if not top <= FP16_MAX:
        refuse_nonfinite(tokens, "quantise")
        raise ValueError(f"quantise: {what} is {top:.4g}; float16 holds at most {FP16_MAX:.0f}; "
                         "is this the right tap of the teacher?")  # fmt: skip


def host_fp32(values: Tensor) -> Channels:
    """The values as a float32 array on the host."""
    return np.asarray(values.float().cpu().numpy(), np.float32)


def on(channels: Channels, like: Tensor) -> Tensor:
    """Per-channel constants as a float32 tensor on the device of `like`."""
    return torch.from_numpy(channels).to(like.device)
