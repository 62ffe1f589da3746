"""The quantiser of a column, chosen by what it costs the first samples."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.shards.format.quality import measure, summarise
from mrmae.shards.format.quantise import Quantiser, host_fp32, parts_of, quantise, refuse_nonfinite

CALIBRATION_SAMPLES = 256
TRIAL_SAMPLES = 64  # of these: enough to tell which of two quantisers loses less


def calibrate(*batches: Float[Tensor, "_ l d"], dtype: str = "int8") -> Quantiser:
    """The quantiser with these features' channel moments, or without any: which has the higher SNR on the first of them.

    batches: float32, the first samples in canonical order. Raises ValueError for NaN or infinities.
    """
    for features in batches:
        refuse_nonfinite(features, "calibration")
    if dtype == "float16":
        return Quantiser(dtype)
    parts = [part for features in batches for part in parts_of(features)]
    mean, std = channel_moments(parts)
    # A channel that is dead in the sample may live later: give it an average channel's step.
    average = std.square().mean().sqrt()
    std = torch.where(std > 1e-6 * std.max(), std, average if average > 0 else torch.ones_like(average))
    candidates = [
        Quantiser(dtype, host_fp32(mean), host_fp32(std), standardised=True),
        Quantiser(dtype),
    ]
    trial = first_rows(parts, TRIAL_SAMPLES)
    return max(candidates, key=lambda q: round_trip_snr(trial, q))


def first_rows(parts: Sequence[Float[Tensor, "_ l d"]], n: int) -> list[Float[Tensor, "_ l d"]]:
    """The first n samples of all, in as many parts as that takes."""
    found: list[Tensor] = []
    for part in parts:
        if n > 0:
            found.append(part[:n])
            n -= len(found[-1])
    return found


def channel_moments(parts: Sequence[Float[Tensor, "_ l d"]]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Float64 mean and (population) standard deviation of every channel."""
    n = sum(part.shape[0] * part.shape[1] for part in parts)
    middle = parts[0][0].mean(dim=0)  # near the mean: squares about it lose no digits
    total, squares = torch.zeros_like(middle).double(), torch.zeros_like(middle).double()
    for part in parts:
        apart = part - middle
        total += apart.sum(dim=(0, 1))  # of a few samples in float32, of all in float64
        squares += apart.square_().sum(dim=(0, 1))
    shift = total / n
    return middle + shift, (squares / n - shift.square()).clamp(min=0).sqrt()


def round_trip_snr(parts: Sequence[Float[Tensor, "_ l d"]], q: Quantiser) -> float:
    """SNR in dB of quantising and dequantising, -inf where the quantiser cannot hold the features."""
    try:
        measured = [measure(part, *quantise(part, q), q) for part in parts]
    except ValueError:
        return -math.inf
    return float(summarise(measured)["snr_db"])
