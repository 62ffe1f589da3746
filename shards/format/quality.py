"""What quantising costs: SNR about the channel mean and the angle between a token and what is stored of it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.shards.format.quantise import Quantiser, parts_of, values_of

Lengths = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What quality follows from; parts of a shard are listed. sum: of every channel over the tokens, float64.

    wide, close, error: lengths of each token, of what is stored of it, and of their difference, float32.
    """

    sum: Float[Tensor, "d"]
    wide: Float[Tensor, "n"]
    close: Float[Tensor, "n"]
    error: Float[Tensor, "n"]


def quality(
    tokens: Float[Tensor, "b l d"], codes: Tensor, scale: Tensor | None, q: Quantiser
) -> dict[str, float | int]:
    """What quantisation cost these tokens: snr_db, p999_one_minus_cos, zero_tokens."""
    return summarise([measure(tokens, codes, scale, q)])


def measure(tokens: Float[Tensor, "b l d"], codes: Tensor, scale: Tensor | None, q: Quantiser) -> Measured:
    """What `quality` needs of one batch; on any device, brought to the host once."""
    parts = [measure_part(*part, q) for part in zip(parts_of(tokens), parts_of(codes), scale_parts(scale, tokens))]
    return Measured(
        sum=torch.stack([part.sum for part in parts]).sum(dim=0).cpu(),
        wide=torch.cat([part.wide for part in parts]).cpu(),
        close=torch.cat([part.close for part in parts]).cpu(),
        error=torch.cat([part.error for part in parts]).cpu(),
    )


def scale_parts(scale: Tensor | None, tokens: Float[Tensor, "b l d"]) -> Sequence[Tensor | None]:
    """A scale (or None) for every one of `parts_of(tokens)`."""
    parts = parts_of(tokens)
    return [None] * len(parts) if scale is None else torch.split(scale, max(len(parts[0]), 1))


def measure_part(tokens: Float[Tensor, "b l d"], codes: Tensor, scale: Tensor | None, q: Quantiser) -> Measured:
    """`measure` of a few samples. Only sums of a token's few hundred values are float32."""
    x, y = tokens.flatten(0, 1).float(), values_of(codes, scale, q).flatten(0, 1)
    return Measured(x.sum(dim=0).double(), lengths(x), lengths(y), lengths(y.sub_(x)))


def lengths(tokens: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
    """Euclidean norms."""
    norms: Tensor = torch.linalg.vector_norm(tokens, dim=-1)
    return norms


def summarise(parts: Sequence[Measured]) -> dict[str, float | int]:
    """snr_db about the channel mean, the 99.9th percentile of 1 - cos, and how many tokens were all zero.

    snr_db is 300 where nothing was lost (JSON has no infinity) and -300 where there was no signal to lose.
    """
    wide, close, error = (
        np.concatenate([getattr(part, name).numpy() for part in parts]).astype(np.float64)
        for name in ("wide", "close", "error")
    )
    total = torch.stack([part.sum for part in parts]).sum(dim=0)
    noise = float(np.square(error).sum())
    signal = max(float(np.square(wide).sum()) - float(total.square().sum()) / max(len(wide), 1), 0.0)
    snr = 300.0 if noise == 0 else -300.0 if signal == 0 else 10 * math.log10(signal / noise)
    worst = one_minus_cos(wide, close, error)
    return {
        "snr_db": round(min(max(snr, -300.0), 300.0), 4),
        "p999_one_minus_cos": float(np.quantile(worst, 0.999)) if len(worst) else 0.0,
        "zero_tokens": int((wide == 0).sum()),
    }


def one_minus_cos(wide: Lengths, close: Lengths, error: Lengths) -> Lengths:
    """Of every token x that is not zero and what is stored of it, y; 0.5 where nothing is stored.

    |x - y|^2 = (|x| - |y|)^2 + 2 |x| |y| (1 - cos): 1 - cos itself would drown in rounding.
    """
    wide, close, error = (values[wide > 0] for values in (wide, close, error))
    apart = np.maximum(np.square(error) - np.square(wide - close), 0)
    found: Lengths = np.full_like(apart, 0.5)
    np.divide(apart, 2 * wide * close, out=found, where=close > 0)
    return found


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
