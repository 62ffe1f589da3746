"""Stored dtypes: quantisation, dequantisation (the definition kernels are tested against), what it costs, and calibration.

int8, fp8: value = channel_mean + channel_std * (scale[token] * code). Without standardisation mean and std are 0 and 1. fp8 codes
are E4M3 numbers (finite, no infinities), kept as their bytes. pq: a byte for several channels, decoded by a codebook (product.py).
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16, Shaped
from torch import Tensor

from mrmae.common.backend import read_bytes
from mrmae.shards.format.product import (
    UNWRITTEN,
    ProductCodebook,
    fit_product,
    product_codes,
    product_values,
    read_product,
)

SENTINEL = -128  # int8 code of a token that was never written; float arrays use NaN
FP16_MAX = 65504.0
SAMPLES_AT_ONCE = 32  # in conversion: bounds its float32 copies
CACHED_VALUES = 2**18  # a CPU works on so many features at a time: temporaries stay in its cache, and memory bounded
Channels = np.ndarray[Any, np.dtype[np.float32]]
Lengths = np.ndarray[Any, np.dtype[np.float64]]
CALIBRATION_SAMPLES = 256
TRIAL_SAMPLES = 64  # of these: enough to tell which of two quantisers loses less


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a dtype lies in an array of numpy's dtype `array`. scaled: one float16 scale per token brings the largest code to `top`.

    unwritten: what an element that was never written reads as; refused: codes that are no value. least_snr: dB below which a shard
    is not worth keeping, unless somebody says so. channels: for how many of a token's a code stands, more than one by a codebook.
    """

    array: str
    bytes: int
    scaled: bool
    top: float
    unwritten: float
    refused: tuple[int, ...] = ()
    least_snr: float = 20.0
    channels: int = 1

    def codes(self, width: int) -> int:
        """Codes of a token of so many channels."""
        return -(-width // self.channels)

    def token_bytes(self, width: int) -> int:
        """Bytes of a token's codes."""
        return self.codes(width) * self.bytes

    @property
    def product(self) -> bool:
        """Whether a codebook decodes them."""
        return self.channels > 1


DTYPES = {
    "int8": Stored("int8", 1, True, 127.0, SENTINEL, (SENTINEL,)),
    "fp8": Stored("uint8", 1, True, 448.0, 0xFF, (0x7F, 0xFF)),  # both are NaN in E4M3
    "float16": Stored("float16", 2, False, FP16_MAX, math.nan, least_snr=-math.inf),
    "pq4": Stored("uint8", 1, False, FP16_MAX, UNWRITTEN, (UNWRITTEN,), 2.0, channels=4),
    "pq": Stored("uint8", 1, False, FP16_MAX, UNWRITTEN, (UNWRITTEN,), 2.0, channels=8),
    "pq16": Stored("uint8", 1, False, FP16_MAX, UNWRITTEN, (UNWRITTEN,), 2.0, channels=16),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Quantiser:
    """How a column's tokens are stored. channel_mean, channel_std: float32 [d], None without standardisation.

    source: id of the column whose stored values were quantised again; None where the teacher's own were.
    codebook: of a computed map, `sha256` of its codebook's file and `of`, the id of the column it is computed from; of product codes
    `sha256` and `bytes` of theirs. fitted: that codebook, where it was just made; file: else where it lies.
    """

    dtype: str
    channel_mean: Channels | None = None
    channel_std: Channels | None = None
    standardised: bool = False
    source: str | None = None
    codebook: Mapping[str, Any] | None = None
    fitted: ProductCodebook | None = None
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"quantiser: dtype {self.dtype!r} is not known; expected {' or '.join(DTYPES)}; choose one"
            )

        parts = [part for part in (self.channel_mean, self.channel_std) if part is not None]
        if (
            any(part.ndim != 1 or part.shape != parts[0].shape or not np.isfinite(part).all() for part in parts)
            or len(parts) == 1
        ):
            raise ValueError("quantiser: expected finite means and deviations of all channels, or neither")
        if self.stored.product and set(self.codebook or ()) != {"sha256", "bytes"}:
            raise ValueError(
                f"quantiser: {self.dtype} with codebook {self.codebook}; expected sha256 and bytes of its file"
            )

    @property
    def product(self) -> ProductCodebook:
        """The codebook of product codes, read where it was not just made. ValueError where its file is missing or damaged."""
        if self.fitted is not None:
            return self.fitted
        assert self.file is not None and self.codebook is not None, "load_plan says where it lies"
        return read_product(self.file, self.codebook["sha256"])

    def codebook_bytes(self) -> bytes:
        """The file of the codebook of product codes, as it is where it lies: another version might write the same in other bytes."""
        product = self.product
        return product.to_bytes() if self.fitted is not None or self.file is None else read_bytes(self.file)

    @property
    def width(self) -> int | None:
        """How many channels it is for; None where it would do for any."""
        return None if self.channel_mean is None else len(self.channel_mean)

    @property
    def stored(self) -> Stored:
        """How its codes lie in an array."""
        return DTYPES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """The quantiser as JSON; nine significant digits carry a float32 exactly."""
        parts = {"channel_mean": self.channel_mean, "channel_std": self.channel_std}
        lists = {k: None if v is None else [float(f"{x:.9g}") for x in v.tolist()] for k, v in parts.items()}
        source: dict[str, Any] = {} if self.source is None else {"source": self.source}
        source |= {} if self.codebook is None else {"codebook": dict(self.codebook)}
        return {"dtype": self.dtype, "standardised": self.standardised, **lists, **source}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Quantiser":
        """The quantiser that `to_json` described."""
        mean, std = (
            fields[k] if fields[k] is None else np.array(fields[k], np.float32) for k in ("channel_mean", "channel_std")
        )
        return Quantiser(
            fields["dtype"], mean, std, fields["standardised"], fields.get("source"), fields.get("codebook")
        )


NOT_QUANTISED = Quantiser("float16")  # what a map has in a quantiser's place: its values are stored as they are


def parts_of(features: Float[Tensor, "n l d"]) -> Sequence[Float[Tensor, "_ l d"]]:
    """The samples a few at a time on a CPU, all at once elsewhere."""
    if features.device.type != "cpu" or not len(features):
        return (features,)
    return torch.split(features, max(1, CACHED_VALUES // max(features[0].numel(), 1)))


def quantise(
    tokens: Float[Tensor, "b l d"], q: Quantiser
) -> tuple[Shaped[Tensor, "b l d"], Float16[Tensor, "b l"] | None]:
    """Codes (int8 within ±127, uint8 bytes of E4M3 within ±448, float16, or uint8 product codes) and per-token scale (float16; None without).

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
    if q.dtype == "float16" or q.stored.product:
        refuse_overflow(largest(tokens), tokens, "a token value")
        return (product_codes(tokens, q.product) if q.stored.product else tokens.to(torch.float16)), None
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
    if q.stored.product:
        return product_values(codes, q.product)
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
    rows = max(len(parts_of(tokens)[0]), 1)
    scales = itertools.repeat(None) if scale is None else torch.split(scale, rows)
    parts = [measure_part(*part, q) for part in zip(parts_of(tokens), torch.split(codes, rows), scales)]
    return Measured(
        sum=torch.stack([part.sum for part in parts]).sum(dim=0).cpu(),
        wide=torch.cat([part.wide for part in parts]).cpu(),
        close=torch.cat([part.close for part in parts]).cpu(),
        error=torch.cat([part.error for part in parts]).cpu(),
    )


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


def calibrate(*batches: Float[Tensor, "_ l d"], dtype: str = "int8") -> Quantiser:
    """The quantiser with these features' channel moments, or without any: which has the higher SNR on the first of them. Of product codes, their codebook.

    batches: float32, the first samples in canonical order. Raises ValueError for NaN or infinities.
    """
    for features in batches:
        refuse_nonfinite(features, "calibration")
    if dtype == "float16":
        return Quantiser(dtype)
    if DTYPES[dtype].product:
        made = fit_product(batches, DTYPES[dtype].codes(batches[0].shape[-1]))
        return Quantiser(dtype, codebook=made.told(), fitted=made)
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
