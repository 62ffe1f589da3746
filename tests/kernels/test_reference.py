"""The reference against float64 restatements of the papers' formulas, written with loops and stock operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae.kernels import dispatch, reference

B, C, P, H, W = 2, 3, 4, 12, 16
L = (H // P) * (W // P)
SCALE, SHIFT = torch.rand(C, dtype=torch.float64) + 0.5, torch.randn(C, dtype=torch.float64)


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(B, C, H, W, dtype=torch.float64)


def some_ids(n: int) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(B, L).argsort(1)[:, :n].sort(1).values


def mae_patches(image: Tensor) -> Tensor:
    """MAE's patchify: [b, l, p*p*c], channel innermost."""
    rows = [
        torch.stack([image[b, c, i + p, j + q] for p in range(P) for q in range(P) for c in range(C)])
        for b in range(B)
        for i in range(0, H, P)
        for j in range(0, W, P)
    ]
    return torch.stack(rows).reshape(B, L, P * P * C)


def pqc_to_cpq(x: Tensor) -> Tensor:
    return x.unflatten(-1, (P, P, C)).movedim(-1, -3).flatten(-3)


def mae_loss(image: Tensor, pred: Tensor, masked: Tensor) -> Tensor:
    """Loss of MAE on the whole grid, predictions in (p, q, c) order, masked mean at the end."""
    target = mae_patches(image)
    mean = target.mean(-1, keepdim=True)
    target = (target - mean) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    per_patch = ((pred - target) ** 2).mean(-1)
    return (per_patch * masked).sum() / masked.sum()


def test_pixel_loss_and_its_gradient_equal_maes_masked_mean() -> None:
    image, ids = images(), some_ids(7)
    normalised = image * SCALE[:, None, None] + SHIFT[:, None, None]
    whole = torch.randn(B, L, P * P * C, dtype=torch.float64, requires_grad=True)
    masked = torch.zeros(B, L, dtype=torch.float64).scatter_(1, ids, 1.0)
    stock = mae_loss(normalised, whole, masked)
    picked = pqc_to_cpq(whole)[torch.arange(B)[:, None], ids]
    ours = reference.pixel_loss(image, picked, ids, SCALE, SHIFT, patch=P, norm_pix=True).mean()
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, whole)[0] for x in (ours, stock)), rtol=1e-12, atol=1e-18)


def test_decoded_rows_are_a_sum_over_components_of_the_rows_asked_for() -> None:
    draw, (b, l, m, r, d) = torch.Generator().manual_seed(0), (2, 6, 3, 7, 5)
    codes = torch.randint(0, 255, (b, l, m), generator=draw).to(torch.uint8)
    entries, basis = torch.randn(256, r, dtype=torch.float64), torch.randn(r, d, dtype=torch.float64)
    mean, group = torch.randn(d, dtype=torch.float64), torch.tensor([0, 1, 1, 2, 2, 2, 2])
    ids, how = torch.tensor([[0, 5], [1, 2], [3, 4], [0, 1]]), {"work": torch.float64}
    found = reference.decoded_rows(codes, ids, entries, group, basis, mean, n_rows=4, **how)
    for row, slot in ((0, 1), (3, 0), (2, 1)):
        code = codes[row % b, ids[row, slot]].long()
        truth = mean + sum(entries[code[group[k]], k] * basis[k] for k in range(r))
        torch.testing.assert_close(found[row, slot], truth, rtol=1e-12, atol=1e-12)
    rows = (torch.arange(4) % b)[:, None]
    gathered = reference.decoded_rows(codes[rows, ids], None, entries, group, basis, mean, n_rows=4, **how)
    torch.testing.assert_close(gathered, found, rtol=0, atol=0)


def test_a_permuted_prediction_layer_gives_the_same_loss() -> None:
    """Rows of MAE's prediction head permuted from (p, q, c) to (c, p, q): weight and bias."""
    image, ids = images(), some_ids(7)
    head = torch.nn.Linear(8, P * P * C, dtype=torch.float64)
    hidden = torch.randn(B, L, 8, dtype=torch.float64)
    rows = pqc_to_cpq(torch.arange(P * P * C)[None])[0]
    ours = F.linear(hidden, head.weight[rows], head.bias[rows])
    one, zero = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    picked = ours[torch.arange(B)[:, None], ids]
    loss = reference.pixel_loss(image, picked, ids, one, zero, patch=P, norm_pix=True).mean()
    masked = torch.zeros(B, L, dtype=torch.float64).scatter_(1, ids, 1.0)
    torch.testing.assert_close(loss, mae_loss(image, head(hidden), masked), rtol=1e-12, atol=0)


def test_zero_prediction_costs_n_minus_one_over_n_and_a_constant_patch_nothing() -> None:
    image = images()
    image[0, :, :P, :P] = 0.5
    one, zero = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    ids = torch.arange(L).expand(B, L)
    pred = torch.zeros(B, L, P * P * C, dtype=torch.float64)
    loss = reference.pixel_loss(image, pred, ids, one, zero, patch=P, norm_pix=True)
    assert loss[0, 0] == 0
    n = P * P * C
    torch.testing.assert_close(loss[1], torch.full((L,), (n - 1) / n, dtype=torch.float64), rtol=1e-4, atol=0)


def test_gathered_patches_times_a_flattened_convolution_weight_are_the_convolutions_tokens() -> None:
    image, ids = images(), some_ids(5)
    conv = torch.nn.Conv2d(C, 8, P, P, dtype=torch.float64)
    normalised = image * SCALE[:, None, None] + SHIFT[:, None, None]
    stock = conv(normalised).flatten(2).transpose(1, 2)[torch.arange(B)[:, None], ids]
    patches = reference.gather_patches(image, ids, SCALE, SHIFT, patch=P, dtype=torch.float64)
    torch.testing.assert_close(F.linear(patches, conv.weight.flatten(1), conv.bias), stock, rtol=1e-12, atol=1e-14)


def test_ascending_and_shuffled_order_agree_patch_by_patch() -> None:
    image, ids = images(), some_ids(6)
    order = torch.randperm(6)
    pred = torch.randn(B, 6, P * P * C, dtype=torch.float64)
    loss = [
        reference.pixel_loss(image, p, i, SCALE, SHIFT, patch=P, norm_pix=True)
        for p, i in ((pred, ids), (pred[:, order], ids[:, order]))
    ]
    torch.testing.assert_close(loss[0][:, order], loss[1], rtol=0, atol=0)


def test_embedded_tokens_are_the_unmasked_sequence_at_the_kept_patches() -> None:
    ids = some_ids(5)
    tokens, position, cls_row = torch.randn(B, L, 8), torch.randn(L, 8), torch.randn(8)
    whole = torch.cat([cls_row.expand(B, 1, 8), tokens + position], dim=1)
    rows = torch.arange(B)[:, None]
    ours = reference.embed_tokens(tokens[rows, ids], position, cls_row, ids)
    assert torch.equal(ours, whole[rows, torch.cat([torch.zeros(B, 1, dtype=torch.int64), ids + 1], 1)])
    assert reference.embed_tokens(tokens[rows, ids].bfloat16(), position, cls_row, ids).dtype == torch.float32


def teacher(d: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {
        "codes": torch.randint(-127, 128, (B, L, d), dtype=torch.int8),
        "scale": torch.rand(B, L).half() + 0.1,
        "channel_mean": torch.randn(d, dtype=torch.float64),
        "channel_std": torch.rand(d, dtype=torch.float64) + 0.5,
        "stat_mean": torch.randn(d, dtype=torch.float64),
        "stat_std": torch.rand(d, dtype=torch.float64) + 0.5,
        "position_mean": torch.randn(L, d, dtype=torch.float64),
    }


def stock_target(data: dict[str, Tensor], target: str) -> Tensor:
    value = data["channel_mean"] + data["channel_std"] * (data["scale"].double()[..., None] * data["codes"].double())
    return {
        "none": lambda: value,
        "ln0": lambda: F.layer_norm(value, value.shape[-1:], eps=1e-5),
        "l2": lambda: F.normalize(value, dim=-1),
        "channel": lambda: (value - data["stat_mean"]) / data["stat_std"],
        "position": lambda: (value - data["position_mean"]) / data["stat_std"],
        "position+ln0": lambda: F.layer_norm(value - data["position_mean"], value.shape[-1:], eps=1e-5),
    }[target]()


@pytest.mark.parametrize("target", ["none", "ln0", "l2", "channel", "position", "position+ln0"])
@pytest.mark.parametrize("distance", ["mse", "sl1", "cosd"])
def test_mimic_loss_equals_stock_operations_and_its_written_gradient_equals_autograd(
    target: str, distance: str
) -> None:
    data, ids = teacher(), some_ids(5)
    student = torch.randn(B, 5, 8, dtype=torch.float64, requires_grad=True)
    y = stock_target(data, target)[torch.arange(B)[:, None], ids]
    if distance == "cosd":
        stock = 1 - F.cosine_similarity(student, y, dim=-1)
    elif distance == "mse":
        stock = F.mse_loss(student, y, reduction="none").mean(-1)
    else:
        e = (student - y).abs()
        stock = torch.where(e < 0.7, e**2 / 1.4, e - 0.35).mean(-1)
    centre = "position_mean" if target.startswith("position") else "stat_mean"
    rest = (
        [data[k] for k in ("codes",)],
        [*(data[k] for k in ("scale", "channel_mean", "channel_std", centre, "stat_std")), ids],
    )
    arguments = {"target": target, "distance": distance, "beta": 0.7}
    ours = reference.mimic_loss(student, *rest[0], ids, *rest[1], **arguments)
    torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(ours)
    auto, stock_grad = (torch.autograd.grad(x, student, upstream)[0] for x in (ours, stock))
    torch.testing.assert_close(auto, stock_grad, rtol=1e-9, atol=1e-12)
    written = reference.mimic_loss_backward(upstream, student, *rest[0], ids, *rest[1], **arguments).detach()
    torch.testing.assert_close(written, auto, rtol=1e-10, atol=1e-13)


def test_the_written_pixel_gradient_equals_autograd() -> None:
    image, ids = images(), some_ids(7)
    pred = torch.randn(B, 7, P * P * C, dtype=torch.float64, requires_grad=True)
    for norm_pix in (True, False):
        loss = reference.pixel_loss(image, pred, ids, SCALE, SHIFT, patch=P, norm_pix=norm_pix)
        upstream = torch.randn_like(loss)
        (auto,) = torch.autograd.grad(loss, pred, upstream)
        arguments = (upstream, image, pred.detach(), ids, SCALE, SHIFT)
        written = reference.pixel_loss_backward(*arguments, patch=P, norm_pix=norm_pix)
        torch.testing.assert_close(written, auto, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(("beta", "e", "cost"), [(1.0, 1.0, 0.5), (1.0, 4.0, 3.5), (2.0, 1.0, 0.25), (2.0, 4.0, 3.0)])
def test_smooth_l1_has_the_table_of_scales(beta: float, e: float, cost: float) -> None:
    codes = torch.zeros(1, 1, 4)
    at = torch.zeros(1, 1, dtype=torch.int64)
    loss = reference.mimic_loss(torch.full((1, 1, 4), e), codes, at, target="none", distance="sl1", beta=beta)
    assert loss.item() == pytest.approx(cost)


def test_several_masks_per_image_read_the_image_modulo_the_batch() -> None:
    image, data = images(), teacher()
    ids = torch.cat([some_ids(5), some_ids(5).flip(0)])
    pred = torch.randn(2 * B, 5, P * P * C, dtype=torch.float64)
    doubled = reference.pixel_loss(image.repeat(2, 1, 1, 1), pred, ids, SCALE, SHIFT, patch=P, norm_pix=True)
    assert torch.equal(reference.pixel_loss(image, pred, ids, SCALE, SHIFT, patch=P, norm_pix=True), doubled)
    student, twice = torch.randn(2 * B, 5, 8), {k: v.repeat(2, 1) if k == "scale" else v for k, v in data.items()}
    how = {"target": "ln0", "distance": "mse", "beta": 1.0}
    names = ("scale", "channel_mean", "channel_std")
    few = reference.mimic_loss(student, data["codes"], ids, *(data[k] for k in names), **how)
    many = reference.mimic_loss(student, data["codes"].repeat(2, 1, 1), ids, *(twice[k] for k in names), **how)
    assert torch.equal(few, many)


def test_a_zero_student_or_teacher_token_has_a_finite_cosine_and_gradient() -> None:
    student = torch.zeros(1, 1, 8, requires_grad=True)
    loss = reference.mimic_loss(student, torch.zeros(1, 1, 8), None, target="l2", distance="cosd", beta=1.0)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.item() == 1 and grad.isfinite().all()


def test_the_biased_variance_makes_a_zero_prediction_cost_one() -> None:
    image, ids = torch.rand(1, 3, 8, 8, dtype=torch.float64) * 255, torch.tensor([[0, 3]])
    told = {"patch": 4, "scale": torch.ones(3).double(), "shift": torch.zeros(3).double(), "channels_last": False}
    pred = torch.randn(1, 2, 48, dtype=torch.float64, requires_grad=True)
    loss = dispatch.pixel_loss(image, pred, ids, biased=True, **told)  # type: ignore[arg-type]
    for at, (row, column) in enumerate([(0, 0), (4, 4)]):
        x = image[0, :, row : row + 4, column : column + 4].flatten()
        t = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-6).sqrt()
        assert abs(loss[0, at] - (pred[0, at] - t).square().mean()) < 1e-10
        (gradient,) = torch.autograd.grad(loss[0, at], pred, retain_graph=True)
        assert (gradient[0, at] - 2 * (pred[0, at] - t) / 48).abs().max() < 1e-10
    nothing = dispatch.pixel_loss(image, torch.zeros_like(pred), ids, biased=True, **told)  # type: ignore[arg-type]
    assert (nothing - 1).abs().max() < 1e-6
