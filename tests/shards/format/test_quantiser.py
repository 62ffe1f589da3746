"""Quantisation: the definition of a stored value, its error, and what is refused."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from mrmae.shards.format.quantiser import (
    Quantiser,
    calibrate,
    dequantise,
    first_rows,
    measure,
    quality,
    quantise,
    summarise,
)


def vit_like(n: int = 8, l: int = 16, d: int = 32, *, massive: float = 0.0) -> Tensor:
    """Random features; with `massive`, one channel is as large as in ViTs with massive activations."""
    features = torch.randn(n, l, d, generator=torch.Generator().manual_seed(0))
    features[..., 3] = features[..., 3] * (1 + massive / 4) + massive
    return features


def test_massive_channels_choose_standardisation_and_keep_40_db() -> None:
    features = vit_like(massive=100.0)
    q = calibrate(features)
    assert q.standardised and q.channel_mean is not None and q.channel_std is not None
    assert snr(features, q) > 40 > snr(features, Quantiser("int8"))


def test_sparse_maps_choose_no_standardisation() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(32, 64, 32, generator=generator).relu()
    features *= torch.rand(32, 64, 32, generator=generator) < 0.02
    q = calibrate(features)
    assert not q.standardised and q.channel_mean is None
    std = Quantiser("int8", features.mean((0, 1)).numpy(), features.std((0, 1)).numpy(), standardised=True)
    assert snr(features, q) > snr(features, std)


def snr(features: Tensor, q: Quantiser) -> float:
    return float(quality(features, *quantise(features, q), q)["snr_db"])


@pytest.mark.parametrize("standardised", [True, False])
def test_every_value_is_within_half_a_step(standardised: bool) -> None:
    features = vit_like(massive=50.0)
    q = calibrate(features) if standardised else Quantiser("int8")
    assert q.standardised == standardised
    codes, scale = quantise(features, q)
    assert scale is not None and codes.dtype == torch.int8 and scale.dtype == torch.float16
    assert codes.min() >= -127 and codes.abs().amax(-1).min() >= 126
    step = scale.float()[..., None] * (torch.from_numpy(q.channel_std) if q.channel_std is not None else 1)
    error = (dequantise(codes, scale, q) - features).abs()
    # float16 scales round by at most 2**-11, so that the largest value may be clipped by 127 * 2**-11 of a step
    assert (error <= step * (0.5 + 127 / 2048) + 1e-5).all()


def test_dequantisation_is_the_written_formula() -> None:
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    q = Quantiser("int8", mean.numpy(), std.numpy(), standardised=True)
    codes = torch.tensor([[[127, -127], [0, 3], [-128, -128]]], dtype=torch.int8)
    scale = torch.tensor([[0.25, 2.0, 1.0]], dtype=torch.float16)
    got = dequantise(codes, scale, q)
    assert got[0, :2].tolist() == [[1 + 0.5 * 0.25 * 127, -2 - 4 * 0.25 * 127], [1.0, -2 + 4 * 2 * 3]]
    assert got[0, 2].isnan().all(), "the sentinel never becomes a number"


def test_all_zero_tokens_come_back_as_zero_and_are_counted_apart() -> None:
    features = vit_like()
    features[0, :3] = 0
    q = Quantiser("int8")
    codes, scale = quantise(features, q)
    assert scale is not None and (scale[0, :3] == 0).all() and (codes[0, :3] == 0).all()
    assert (dequantise(codes, scale, q)[0, :3] == 0).all()
    assert quality(features, codes, scale, q)["zero_tokens"] == 3


def test_a_constant_channel_and_a_constant_image_do_no_harm() -> None:
    features = vit_like()
    features[..., 5] = 7.0
    q = calibrate(features)
    assert torch.isfinite(dequantise(*quantise(features, q), q)).all()
    nothing = torch.zeros(2, 4, 8)
    q = calibrate(nothing)
    assert (dequantise(*quantise(nothing, q), q) == 0).all()


def test_tiny_features_survive() -> None:
    features = vit_like() * 1e-9
    assert snr(features, calibrate(features)) > 40


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_nonfinite_features_are_refused_with_their_place(value: float, dtype: str) -> None:
    features = vit_like()
    features[2, 3, 4] = value
    with pytest.raises(ValueError, match=r"1 of 4096 features are NaN or infinite, the first at \[2, 3, 4\]"):
        quantise(features, Quantiser(dtype))
    with pytest.raises(ValueError, match="calibration: 1 of 4096"):
        calibrate(features, dtype=dtype)


def test_values_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="a token value is 7e.04"):
        quantise(torch.full((1, 1, 2), 7e4), Quantiser("float16"))
    with pytest.raises(ValueError, match="a token's scale"):
        quantise(torch.full((1, 1, 2), 1e8), Quantiser("int8"))


def test_the_first_rows_of_uneven_batches() -> None:
    parts = [torch.full((n, 1, 1), float(i)) for i, n in enumerate((1, 5, 9))]
    assert [len(part) for part in first_rows(parts, 8)] == [1, 5, 2] and [len(p) for p in first_rows(parts, 99)] == [
        1,
        5,
        9,
    ]
    assert [len(part) for part in first_rows(parts, 6)] == [1, 5]


def test_float16_is_exact_for_float16_values() -> None:
    features = vit_like().half().float()
    q = calibrate(features, dtype="float16")
    codes, scale = quantise(features, q)
    assert scale is None and torch.equal(dequantise(codes, scale, q), features)
    assert quality(features, codes, scale, q)["snr_db"] == 300.0


def test_measured_batches_add_up_to_the_whole() -> None:
    features = vit_like(massive=30.0)
    q = calibrate(features)
    parts = [measure(batch, *quantise(batch, q), q) for batch in features.split(3)]
    whole = quality(features, *quantise(features, q), q)
    assert summarise(parts) == pytest.approx(whole, rel=1e-6)


def test_quality_is_the_textbook_formula() -> None:
    features = vit_like(massive=10.0)
    q = Quantiser("int8")
    codes, scale = quantise(features, q)
    x, y = features.double(), dequantise(codes, scale, q).double()
    signal = (x - x.mean((0, 1))).square().sum()
    cosine = torch.nn.functional.cosine_similarity(x.reshape(-1, 32), y.reshape(-1, 32))
    got = quality(features, codes, scale, q)
    assert got["snr_db"] == pytest.approx(float(10 * torch.log10(signal / (x - y).square().sum())), abs=1e-3)
    assert got["p999_one_minus_cos"] == pytest.approx(float((1 - cosine).quantile(0.999)), rel=1e-3)


def test_a_quantiser_survives_json_bit_for_bit() -> None:
    q = calibrate(vit_like(massive=77.7) * 0.1234567)
    again = Quantiser.from_json(q.to_json())
    assert q.channel_mean is not None and q.channel_std is not None
    assert again.channel_mean is not None and again.channel_std is not None
    assert (again.channel_mean == q.channel_mean).all() and (again.channel_std == q.channel_std).all()
    assert again.to_json() == q.to_json() and Quantiser.from_json(Quantiser("float16").to_json()).channel_std is None
    with pytest.raises(ValueError, match="int4"):
        Quantiser("int4")


def test_fp8_codes_are_torchs_e4m3_and_come_back_as_written() -> None:
    features = vit_like(massive=100.0)
    q = dataclasses.replace(calibrate(features), dtype="fp8")
    assert q.standardised and q.channel_mean is not None and q.channel_std is not None
    codes, scale = quantise(features, q)
    assert codes.dtype == torch.uint8 and scale is not None and scale.dtype == torch.float16
    numbers = codes.view(torch.float8_e4m3fn).float()
    assert numbers.isfinite().all() and 400 < numbers.abs().amax(-1).min() <= numbers.abs().max() == 448
    values = torch.from_numpy(q.channel_mean) + torch.from_numpy(q.channel_std) * (scale.float()[..., None] * numbers)
    assert torch.allclose(dequantise(codes, scale, q), values, rtol=1e-6, atol=1e-6)
    centred = (features - torch.from_numpy(q.channel_mean)) / torch.from_numpy(q.channel_std)
    error = (numbers * scale[..., None] - centred).abs()
    # three bits of mantissa: half a unit is 1/16 of a number, of the smallest normal one below it
    assert (error <= centred.abs() / 16 + scale.float()[..., None] * 2**-10 + 1e-6).all()
    assert 29 < snr(features, q) < 34


def test_the_scale_per_token_keeps_fp8_within_its_range() -> None:
    """One token a million times the others: with one scale for all, either it or the others would be lost."""
    features = vit_like()
    features[0, 0] *= 1e6
    q = Quantiser("fp8")
    got = dequantise(*quantise(features, q), q)
    for at in ((0, 0), (1, 1)):
        assert (got[at] - features[at]).norm() < 0.05 * features[at].norm()


def test_fp8_sentinels_never_become_numbers_and_zeros_stay_zero() -> None:
    q = Quantiser("fp8")
    codes, scale = quantise(torch.zeros(1, 2, 3), q)
    assert (codes == 0).all() and (dequantise(codes, scale, q) == 0).all()
    assert (
        dequantise(torch.tensor([[[255, 127, 0]]], dtype=torch.uint8), torch.ones(1, 1).half(), q)[0, 0, :2]
        .isnan()
        .all()
    )
    assert q.stored.unwritten == 255 and set(q.stored.refused) == {127, 255}


def test_fp8_calibration_keeps_what_has_the_higher_snr() -> None:
    for features in (vit_like(massive=100.0), vit_like() * torch.logspace(-3, 0, 32)):
        int8 = calibrate(features)
        both = [dataclasses.replace(int8, dtype="fp8"), Quantiser("fp8")]
        assert int8.standardised, "so the two differ"
        assert snr(features, calibrate(features, dtype="fp8")) == max(snr(features, q) for q in both) > 29
