"""The public functions on CPU: layouts, autocast, errors, forced choices."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mrmae.kernels import dispatch

B, C, P, H, W, D = 2, 3, 8, 16, 24, 8
L, VALUES = 6, C * P * P
SCALE, SHIFT = torch.rand(C) + 0.5, torch.randn(C)
IDS = torch.tensor([[0, 2, 5], [1, 3, 4]])


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (B, H, W, C), dtype=torch.uint8)


def gather(image: Tensor, ids: Tensor = IDS, **other: Any) -> Tensor:
    arguments: dict[str, Any] = {"patch": P, "scale": SCALE, "shift": SHIFT, "channels_last": True}
    return dispatch.gather_patches(image, ids, **(arguments | other))


def score_pixels(image: Tensor, pred: Tensor, ids: Tensor = IDS, **other: Any) -> Tensor:
    arguments: dict[str, Any] = {"patch": P, "scale": SCALE, "shift": SHIFT, "channels_last": True}
    return dispatch.pixel_loss(image, pred, ids, **(arguments | other))


def test_layouts_and_crops_give_the_same_patches() -> None:
    image = images()
    expected = gather(image)
    assert expected.shape == (B, 3, VALUES) and expected.dtype == torch.float32
    assert torch.equal(gather(image.permute(0, 3, 1, 2).contiguous(), channels_last=False), expected)
    wide = torch.zeros(B, H + 5, W + 7, C, dtype=torch.uint8)
    wide[:, 2 : 2 + H, 3 : 3 + W] = image
    assert torch.equal(gather(wide[:, 2 : 2 + H, 3 : 3 + W]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_patches_are_normalised_in_fp32_and_cast_once(dtype: torch.dtype) -> None:
    image = images()
    assert torch.equal(gather(image, dtype=dtype), gather(image).to(dtype))
    assert torch.equal(gather(image.to(dtype)), gather(image))


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_any_channel_count(channels: int) -> None:
    image = torch.rand(B, channels, H, W)
    scale = torch.ones(channels)
    patches = gather(image, channels_last=False, scale=scale, shift=scale - 1)
    assert torch.equal(patches[1, 1], image[1, :, P : 2 * P, 0:P].flatten())


def test_losses_are_fp32_under_autocast_and_the_residual_stream_too() -> None:
    image, head = images(), torch.nn.Linear(D, VALUES)
    with torch.autocast("cpu", torch.bfloat16):
        pred = head(torch.randn(B, 3, D))
        assert pred.dtype == torch.bfloat16
        assert score_pixels(image, pred).dtype == torch.float32
        assert dispatch.mimic_loss(pred, torch.randn(B, L, VALUES).half(), IDS).dtype == torch.float32
        stream = dispatch.embed_tokens(pred, torch.randn(L, VALUES), torch.randn(VALUES), IDS)
        assert stream.dtype == torch.float32


@pytest.mark.parametrize("target", ["ln0", "position", "position+ln0"])
def test_gathered_rows_give_the_same_mimic_loss(target: str) -> None:
    codes, scale = torch.randint(-127, 128, (B, L, D), dtype=torch.int8), torch.rand(B, L)
    student, rows = torch.randn(B, 3, D), torch.arange(B)[:, None]
    how = {"target": target, "stat_mean": torch.randn(L, D), "stat_std": torch.rand(D) + 0.5}
    whole = dispatch.mimic_loss(student, codes, IDS, scale=scale, l=L, **how)
    ids = IDS if target != "ln0" else None
    picked = dispatch.mimic_loss(student, codes[rows, IDS], ids, scale=scale[rows, IDS], gathered=True, **how)
    assert torch.equal(whole, picked)


def test_e4m3_codes_are_read_as_the_numbers_they_are() -> None:
    numbers = (torch.randn(B, L, D) * 50).to(torch.float8_e4m3fn)
    student, scale = torch.randn(B, 3, D, requires_grad=True), torch.rand(B, L).half()
    losses = [dispatch.mimic_loss(student, codes, IDS, scale=scale, l=L) for codes in (numbers, numbers.float())]
    assert torch.equal(*losses) and torch.equal(numbers.half().float(), numbers.float()), "float16 holds each exactly"
    grads = [torch.autograd.grad(loss.sum(), student)[0] for loss in losses]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


IMAGE, PRED, CODES, STUDENT = images(), torch.zeros(B, 3, VALUES), torch.zeros(B, L, D), torch.zeros(B, 3, D)
META = torch.device("meta")
BAD = {
    "image of int32": (lambda: gather(IMAGE.int()), r"gather_patches: image is int32; one of uint8, uint16, float32"),
    "image of 3 dims": (lambda: gather(IMAGE[0]), r"image has shape \[16, 24, 3\]; shape \[any, any, any, any\]"),
    "image not tiled": (lambda: gather(IMAGE[:, :15]), r"shape \[2, 15, 24, 3\] and patch is 8; .*multiples of patch"),
    "swapped layout": (lambda: gather(IMAGE, channels_last=False), r"image \[b, c, h, w\].*multiples of patch"),
    "image with gradient": (lambda: gather(IMAGE.float().requires_grad_()), r"image requires a gradient"),
    "scale too long": (lambda: gather(IMAGE, scale=torch.ones(4)), r"scale has shape \[4\]; shape \[3\]"),
    "int32 ids": (lambda: gather(IMAGE, IDS.int()), r"ids_keep is int32; one of int64"),
    "K = 0": (lambda: gather(IMAGE, IDS[:, :0]), r"ids_keep has shape \[2, 0\]: 0 patches per image; at least 1"),
    "M = 0": (lambda: score_pixels(IMAGE, PRED[:, :0], IDS[:, :0]), r"ids_predict has shape \[2, 0\]: 0 patches"),
    "id too large": (lambda: gather(IMAGE, IDS + 1), r"ids_keep holds 6; 0 <= id < 6"),
    "id negative": (lambda: score_pixels(IMAGE, PRED, IDS - 1), r"ids_predict holds -1; 0 <= id < 6"),
    "ids of three images": (lambda: gather(IMAGE, IDS[[0, 1, 0]]), r"ids_keep has 3 rows for 2 images"),
    "mixed devices": (
        lambda: gather(IMAGE, IDS.to(META), debug=False),
        r"ids_keep is on meta, image on cpu; one device",
    ),
    "int output": (lambda: gather(IMAGE, dtype=torch.int32), r"dtype is int32"),
    "pred too narrow": (
        lambda: score_pixels(IMAGE, PRED[..., 1:]),
        r"pred has shape \[2, 3, 191\]; shape \[2, 3, 192\]",
    ),
    "pred of int64": (lambda: score_pixels(IMAGE, PRED.long()), r"pred is int64"),
    "one value": (
        lambda: score_pixels(torch.rand(B, 2, 3, 1), PRED[..., :1], patch=1, scale=torch.ones(1), shift=torch.ones(1)),
        r"a patch has 1 value; at least 2",
    ),
    "another grid": (
        lambda: dispatch.mimic_loss(STUDENT, CODES[:, :5], IDS, l=L),
        r"codes has shape \[2, 5, 8\]; shape \[any, 6, any\] was expected; the teacher's grid",
    ),
    "ids outside the codes": (lambda: dispatch.mimic_loss(STUDENT, CODES[:, :5], IDS), r"ids holds 5; 0 <= id < 5"),
    "another width": (lambda: dispatch.mimic_loss(STUDENT, CODES[..., 1:], IDS), r"codes has shape \[2, 6, 7\]"),
    "codes of uint8": (lambda: dispatch.mimic_loss(STUDENT, CODES.byte(), IDS), r"codes is uint8; one of int8"),
    "codes with gradient": (
        lambda: dispatch.mimic_loss(STUDENT, CODES.clone().requires_grad_(), IDS),
        r"codes requires a gradient",
    ),
    "no ids": (lambda: dispatch.mimic_loss(STUDENT, CODES, None), r"ids is None; grid indices, or gathered=True"),
    "no tokens": (lambda: dispatch.mimic_loss(STUDENT[:, :0], CODES, IDS[:, :0]), r"ids has shape \[2, 0\]"),
    "unknown target": (
        lambda: dispatch.mimic_loss(STUDENT, CODES, IDS, target="ln"),
        r"target = 'ln'; one of none, ln0",
    ),
    "unknown distance": (lambda: dispatch.mimic_loss(STUDENT, CODES, IDS, distance="l1"), r"distance = 'l1'"),
    "beta": (lambda: dispatch.mimic_loss(STUDENT, CODES, IDS, distance="sl1", beta=0.0), r"beta = 0.0; beta > 0"),
    "no statistics": (
        lambda: dispatch.mimic_loss(STUDENT, CODES, IDS, target="channel"),
        r"without stat_mean or stat_std",
    ),
    "no row per position": (
        lambda: dispatch.mimic_loss(
            STUDENT, CODES, IDS, target="position", stat_mean=torch.ones(D), stat_std=torch.ones(D)
        ),
        r"stat_mean has shape \[8\]; shape \[any, 8\]",
    ),
    "a position without a row": (
        lambda: dispatch.mimic_loss(STUDENT, CODES, IDS, target="position+ln0", stat_mean=torch.ones(5, D)),
        r"ids holds 5; 0 <= id < 5",
    ),
    "gathered rows that stand nowhere": (
        lambda: dispatch.mimic_loss(
            STUDENT, CODES[:, :3], None, target="position+ln0", stat_mean=torch.ones(L, D), gathered=True
        ),
        r"target = 'position\+ln0' without ids; grid indices",
    ),
    "scale of another grid": (
        lambda: dispatch.mimic_loss(STUDENT, CODES, IDS, scale=torch.ones(B, 5)),
        r"scale has shape \[2, 5\]; shape \[2, 6\]",
    ),
    "short mean": (
        lambda: dispatch.mimic_loss(STUDENT, CODES, IDS, channel_mean=torch.ones(7)),
        r"channel_mean has shape \[7\]; shape \[8\]",
    ),
    "position too narrow": (
        lambda: dispatch.embed_tokens(STUDENT, torch.zeros(L, 7), torch.zeros(D), IDS),
        r"position has shape \[6, 7\]; shape \[any, 8\]",
    ),
    "id outside the positions": (
        lambda: dispatch.embed_tokens(STUDENT, torch.zeros(4, D), torch.zeros(D), IDS),
        r"ids_keep holds 5; 0 <= id < 4",
    ),
    "triton on cpu": (lambda: gather(IMAGE, kernels="triton"), r"kernels = 'triton' but the tensors are on cpu"),
    "unknown kernels": (lambda: gather(IMAGE, kernels="cuda"), r"kernels = 'cuda'; 'auto', 'triton' or 'torch'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_with_argument_value_and_expectation(what: str) -> None:
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert " was expected; " in str(error.value)


def test_the_package_works_without_triton_and_never_imports_it_on_cpu() -> None:
    code = """
import sys
sys.modules["triton"] = None  # any import of triton raises
import torch
from mrmae.kernels import dispatch
assert not any(name.startswith("mrmae.kernels.triton") for name in sys.modules)
image, ids = torch.zeros(1, 3, 16, 16), torch.tensor([[0, 3]])
one = torch.ones(3)
patches = dispatch.gather_patches(image, ids, patch=8, scale=one, shift=one, channels_last=False)
dispatch.pixel_loss(image, patches, ids, patch=8, scale=one, shift=one, channels_last=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_choice_takes_triton_for_cuda_tensors_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors: no device is needed to decide."""
    with FakeTensorMode():
        cuda, double = torch.empty(1, device="cuda"), torch.empty(1, device="cuda", dtype=torch.float64)
        cpu = torch.empty(1)
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    chosen = {"pixel_loss": "triton", "mimic_loss": "torch"}
    assert dispatch.use_triton("pixel_loss", chosen, cuda) and dispatch.use_triton("pixel_loss", "triton", cuda)
    assert not dispatch.use_triton("pixel_loss", "torch", cuda)
    assert not dispatch.use_triton("pixel_loss", "auto", cuda), "nothing was measured"
    assert not dispatch.use_triton("pixel_loss", chosen, cpu)
    assert not dispatch.use_triton("pixel_loss", chosen, cuda, double)
    assert not dispatch.use_triton("mimic_loss", chosen, cuda) and dispatch.use_triton("mimic_loss", "triton", cuda)
    assert not dispatch.use_triton("embed_tokens", chosen, cuda), "nothing is said of it"
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    assert not dispatch.use_triton("pixel_loss", chosen, cuda)
    with pytest.raises(ValueError, match="kernels = 'triton' but triton is not installed; CUDA tensors"):
        dispatch.use_triton("pixel_loss", "triton", cuda)


def test_product_codes_are_decoded_at_their_ids_or_refused_by_name() -> None:
    codes, group = torch.randint(0, 255, (B, L, 2)).to(torch.uint8), torch.tensor([0, 1, 1, 1])
    entries, basis, mean = torch.randn(256, 4), torch.randn(4, D), torch.randn(D)
    book = (entries, group, basis, mean)
    found = dispatch.decode_codes(codes, IDS, *book, n_rows=B)
    code = codes[1, 3].long()
    torch.testing.assert_close(
        found[1, 1], mean + torch.stack([entries[code[g], k] for k, g in enumerate(group)]) @ basis
    )
    rows = dispatch.decode_codes(codes[:, :3], None, *book, n_rows=2 * B)
    assert found.shape == (B, 3, D) and rows.shape == (2 * B, 3, D) and torch.equal(rows[:B], rows[B:])
    with pytest.raises(
        ValueError, match=r"decode_codes: entries has shape \[255, 4\]; shape \[256, any\] was expected"
    ):
        dispatch.decode_codes(codes, IDS, entries[:255], *book[1:], n_rows=B)
    with pytest.raises(ValueError, match="decode_codes: codes is int8; one of uint8 was expected"):
        dispatch.decode_codes(codes.to(torch.int8), IDS, *book, n_rows=B)
    with pytest.raises(ValueError, match="3 rows of codes of 2 images; as many rows as images, or a multiple"):
        dispatch.decode_codes(codes[:, :3], None, *book, n_rows=3)
    with pytest.raises(ValueError, match="ids holds 6; 0 <= id < 6"):
        dispatch.decode_codes(codes, IDS + 1, *book, n_rows=B)


@pytest.mark.gpu
def test_ids_outside_the_grid_are_found_on_a_device_in_debug_mode() -> None:
    how = {"scale": SCALE.cuda(), "shift": SHIFT.cuda(), "debug": True}
    with pytest.raises(ValueError, match="ids_keep holds 6; 0 <= id < 6"):
        gather(IMAGE.cuda(), IDS.cuda() + 1, **how)
