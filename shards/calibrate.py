"""The quantiser of a column, chosen by what it costs the first samples."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.shards.quality import measure, summarise
from mrmae.shards.quantize import Quantiser, host_fp32, parts_of, quantise, refuse_nonfinite

CALIBRATION_SAMPLES = 1024


def calibrate(features: Float[Tensor, "n l d"], *, dtype: str = "int8") -> Quantiser:
    """The quantiser, with or without channel standardisation, that has the higher SNR on these features.

    features: float32, the first samples in canonical order. Raises ValueError for NaN or infinities.
    """
    refuse_nonfinite(features, "calibration")
    if dtype == "float16":
        return Quantiser(dtype)
    mean, std = channel_moments(features)
    # A channel that is dead in the sample may live later: give it an average channel's step.
    average = std.square().mean().sqrt()
    std = torch.where(std > 1e-6 * std.max(), std, average if average > 0 else torch.ones_like(average))
    candidates = [
        Quantiser(dtype, host_fp32(mean), host_fp32(std), standardised=True),
        Quantiser(dtype),
    ]
    return max(candidates, key=lambda q: round_trip_snr(features, q))


def channel_moments(features: Float[Tensor, "n l d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Float64 mean and (population) standard deviation of every channel."""
    n = features.shape[0] * features.shape[1]
    middle = features[0].mean(dim=0)  # near the mean: squares about it lose no digits
    total, squares = torch.zeros_like(middle).double(), torch.zeros_like(middle).double()
    for part in parts_of(features):
        apart = part - middle
        total += apart.sum(dim=(0, 1))  # of a few samples in float32, of all in float64
        squares += apart.square_().sum(dim=(0, 1))
    shift = total / n
    return middle + shift, (squares / n - shift.square()).clamp(min=0).sqrt()


def round_trip_snr(features: Float[Tensor, "n l d"], q: Quantiser) -> float:
    """SNR in dB of quantising and dequantising, -inf where the quantiser cannot hold the features."""
    try:
        measured = [measure(part, *quantise(part, q), q) for part in parts_of(features)]
    except ValueError:
        return -math.inf
    return float(summarise(measured)["snr_db"])
