"""What quantising costs: SNR about the channel mean and the angle between a token and what is stored of it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.shards.quantize import Quantiser, parts_of, values_of


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sums over tokens from which quality follows; parts of a shard add up. sum: of every channel, float64.

    sum_sq, noise: squared values and squared errors over all channels.
    """

    tokens: int
    zero_tokens: int
    sum: Float[Tensor, "d"]
    sum_sq: float
    noise: float
    one_minus_cos: Float[Tensor, "n"]


def quality(
    tokens: Float[Tensor, "b l d"], codes: Tensor, scale: Tensor | None, q: Quantiser
) -> dict[str, float | int]:
    """What quantisation cost these tokens: snr_db, p999_one_minus_cos, zero_tokens."""
    return summarise([measure(tokens, codes, scale, q)])


def measure(tokens: Float[Tensor, "b l d"], codes: Tensor, scale: Tensor | None, q: Quantiser) -> Measured:
    """The sums behind `quality` for one batch; on any device, brought to the host once."""
    parts = [measure_part(*part, q) for part in zip(parts_of(tokens), parts_of(codes), scale_parts(scale, tokens))]
    return Measured(
        tokens=sum(part.tokens for part in parts),
        zero_tokens=sum(part.zero_tokens for part in parts),
        sum=torch.stack([part.sum for part in parts]).sum(dim=0),
        sum_sq=sum(part.sum_sq for part in parts),
        noise=sum(part.noise for part in parts),
        one_minus_cos=torch.cat([part.one_minus_cos for part in parts]),
    )


def scale_parts(scale: Tensor | None, tokens: Float[Tensor, "b l d"]) -> Sequence[Tensor | None]:
    """A scale (or None) for every one of `parts_of(tokens)`."""
    parts = parts_of(tokens)
    return [None] * len(parts) if scale is None else torch.split(scale, max(len(parts[0]), 1))


def measure_part(tokens: Float[Tensor, "b l d"], codes: Tensor, scale: Tensor | None, q: Quantiser) -> Measured:
    """`measure` of a few samples. Only sums of a token's few hundred values are float32."""
    x, y = tokens.flatten(0, 1).float(), values_of(codes, scale, q).flatten(0, 1)
    wide, close = lengths(x), lengths(y)
    error = lengths(y.sub_(x))
    zero = wide == 0
    # |x - y|^2 = (|x| - |y|)^2 + 2 |x| |y| (1 - cos): 1 - cos itself would drown in rounding
    apart = (error.square() - (wide - close).square()).clamp(min=0) / (2 * wide * close)
    return Measured(
        tokens=len(x),
        zero_tokens=int(zero.sum()),
        sum=x.sum(dim=0).double().cpu(),
        sum_sq=float(wide.square().sum()),
        noise=float(error.square().sum()),
        one_minus_cos=torch.where(close > 0, apart, 0.5)[~zero].float().cpu(),
    )


def lengths(tokens: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
    """Euclidean norms, as float64."""
    norms: Tensor = torch.linalg.vector_norm(tokens, dim=-1)
    return norms.double()


def summarise(parts: Sequence[Measured]) -> dict[str, float | int]:
    """snr_db about the channel mean, the 99.9th percentile of 1 - cos, and how many tokens were all zero.

    snr_db is 300 where nothing was lost (JSON has no infinity) and -300 where there was no signal to lose.
    """
    n = sum(part.tokens for part in parts)
    total, squares = sum(part.sum for part in parts), sum(part.sum_sq for part in parts)
    noise = sum(part.noise for part in parts)
    assert isinstance(total, Tensor), "at least one part"
    signal = max(squares - float(total.square().sum()) / max(n, 1), 0.0)
    snr = 300.0 if noise == 0 else -300.0 if signal == 0 else 10 * math.log10(signal / noise)
    worst = np.concatenate([part.one_minus_cos.numpy() for part in parts])
    return {
        "snr_db": round(min(max(snr, -300.0), 300.0), 4),
        "p999_one_minus_cos": float(np.quantile(worst, 0.999)) if len(worst) else 0.0,
        "zero_tokens": sum(part.zero_tokens for part in parts),
    }


def added_quality(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float | int]:
    """Bounds on the quality of values that were quantised twice, each step with its own: never better than what is true.

    Noise amplitudes add (triangle inequality), and so do angles; of these the percentile becomes the 99.8th.
    """
    noise = sum(10 ** (-q["snr_db"] / 20) for q in (first, second))
    angle = sum(math.acos(max(-1.0, 1 - q["p999_one_minus_cos"])) for q in (first, second))
    return {
        "snr_db": round(max(-20 * math.log10(noise), -300.0), 4),
        "p999_one_minus_cos": 1 - math.cos(min(angle, math.pi)),
        "zero_tokens": int(first["zero_tokens"]),
    }
