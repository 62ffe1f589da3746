"""The schedule, the groups and the guarded step, each against its own restatement."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mrmae.train import optim


def test_peak_lr_scales_with_images_per_update() -> None:
    assert optim.base_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)  # MAE's own number
    assert optim.base_lr(1.5e-4, 4096, 1 / 3) == pytest.approx(8e-4)


def test_schedule_warms_up_from_zero_then_follows_half_a_cosine() -> None:
    def lr(epoch: float) -> float:
        return optim.lr_at(epoch, peak=2.0, warmup_epochs=4, epochs=20, min_lr=0.5)

    assert lr(0) == 0.0
    assert lr(1.5) == pytest.approx(0.75)
    assert lr(4) == pytest.approx(2.0)
    assert lr(12) == pytest.approx(0.5 + 1.5 / 2)
    assert lr(8) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr(20) == pytest.approx(0.5)


def test_schedule_without_warm_up_starts_at_its_peak() -> None:
    assert optim.lr_at(0, peak=1.0, warmup_epochs=0, epochs=3) == 1.0


def test_biases_and_norms_are_not_decayed_but_tokens_are() -> None:
    model = nn.Module()
    model.linear = nn.Linear(3, 2)
    model.norm = nn.LayerNorm(2)
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    decayed, kept = optim.parameter_groups(model, decay=0.05)
    assert [p.shape for p in decayed["params"]] == [(1, 1, 2), (2, 3)]  # type: ignore[attr-defined]
    assert [p.shape for p in kept["params"]] == [(2,), (2,), (2,)]  # type: ignore[attr-defined]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)


def _adamw(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """Decoupled-decay Adam (arXiv 1711.05101, algorithm 2), betas (0.9, 0.95), restated."""
    m = v = torch.zeros_like(weight)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        weight = weight * (1 - lr * decay)
        weight = weight - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    return weight


def test_steps_equal_adamw_restated_and_a_skipped_one_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    start = model.weight.detach().clone()
    optimizer = optim.build_optimizer(model, betas=(0.9, 0.95), decay=0.05)
    optim.set_lr(optimizer, 0.1)
    gradients = [torch.randn_like(model.weight) for _ in range(3)]
    seen = []
    poison = torch.full_like(model.weight, float("nan"))
    for gradient in [gradients[0], poison, gradients[1], gradients[2]]:
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros_like(model.bias)
        seen.append(optim.guarded_step(optimizer, optim.gradient_norm(model.parameters())).item())
    assert seen == [0.0, 1.0, 0.0, 0.0]
    torch.testing.assert_close(model.weight.detach(), _adamw(start, gradients, 0.1, 0.05), rtol=1e-12, atol=1e-12)


def _muon(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """Muon (arXiv 2502.16982, equations 2 and 4) with Nesterov momentum 0.95, its orthogonal matrix from an SVD."""
    m = torch.zeros_like(weight)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        u, _, v = torch.linalg.svd(0.05 * g + 0.95 * m, full_matrices=False)
        weight = weight * (1 - lr * decay) - lr * 0.2 * max(weight.shape) ** 0.5 * (u @ v)
    return weight


def test_muon_moves_matrices_of_blocks_adamw_the_rest_and_a_skipped_step_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(6, 4)])
    model.head = nn.Linear(4, 3, dtype=torch.float64)
    inner, head = model.blocks[0].weight, model.head.weight
    starts = inner.detach().clone(), head.detach().clone()
    optimizer = optim.build_optimizer(model, betas=(0.9, 0.95), decay=0.05, name="muon")
    optim.set_lr(optimizer, 0.01)
    gradients = [{p: torch.randn_like(p) for p in model.parameters()} for _ in range(3)]
    poison = {p: torch.full_like(p, float("nan")) for p in model.parameters()}
    for step in [poison, gradients[0], poison, gradients[1], gradients[2]]:
        for p in model.parameters():
            p.grad = step[p].clone()
        assert optim.guarded_step(optimizer, optim.gradient_norm(model.parameters())).item() == (step is poison)
    expected = _adamw(starts[1], [g[head] for g in gradients], 0.01, 0.05)
    torch.testing.assert_close(head.detach(), expected, rtol=1e-12, atol=1e-12)
    # Its five steps in bfloat16 leave singular values between 0.7 and 1.2: the direction is the SVD's, the size nearly so.
    moved, ideal = inner.detach() - starts[0], _muon(starts[0], [g[inner] for g in gradients], 0.01, 0.05) - starts[0]
    assert torch.cosine_similarity(moved.flatten(), ideal.flatten(), dim=0) > 0.95
    assert 0.7 < moved.norm() / ideal.norm() < 1.2


def _schedule_free(
    weight: torch.Tensor, gradient: Callable[[torch.Tensor], torch.Tensor], rates: list[float], decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, x) of schedule-free AdamW (arXiv 2405.15682, algorithm 1), betas (0.9, 0.95), after an update at each of `rates`."""
    z = x = weight
    v, total = torch.zeros_like(weight), 0.0
    for t, lr in enumerate(rates, 1):
        y = 0.1 * z + 0.9 * x
        g = gradient(y)
        v = 0.95 * v + 0.05 * g * g
        rate = lr * (1 - 0.95**t) ** 0.5
        z = z - rate * g / (v.sqrt() + 1e-8) - rate * decay * y
        total += rate**2
        c = rate**2 / total if total else 0.0
        x = (1 - c) * x + c * z
    return 0.1 * z + 0.9 * x, x


def test_schedule_free_steps_equal_the_paper_restated_and_a_skipped_one_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    starts = {p: p.detach().clone() for p in model.parameters()}
    slopes = {p: torch.randn_like(p) for p in model.parameters()}
    optimizer = optim.build_optimizer(model, betas=(0.9, 0.95), decay=0.5, name="schedule-free")
    rates = [0.0, 0.05, 0.1, 0.1, 0.1]  # the first update of a warm-up is at 0
    for lr, poison in [(0.0, True), (0.0, False), (0.05, False), (0.05, True), *((lr, False) for lr in rates[2:])]:
        optim.set_lr(optimizer, lr)
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan) if poison else slopes[p] * p.detach().exp()
        before = model.weight.detach().clone()
        assert optim.guarded_step(optimizer, optim.gradient_norm(model.parameters())).item() == poison
        assert not poison or torch.equal(model.weight, before)
    averaged = optimizer.averaged(model)  # type: ignore[union-attr]
    for name, p, decay in (("weight", model.weight, 0.5), ("bias", model.bias, 0.0)):
        y, x = _schedule_free(starts[p], lambda at, p=p: slopes[p] * at.exp(), rates, decay)  # type: ignore[misc]
        torch.testing.assert_close(p.detach(), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(averaged[name], x, rtol=1e-12, atol=1e-12)


def test_gradients_above_the_norm_are_scaled_to_it_and_others_left() -> None:
    for most, factor in ((3.0, 3.0 / 5), (6.0, 1.0), (None, 1.0)):
        model = nn.Linear(2, 1, bias=False)
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        optim.clip_gradients(model.parameters(), optim.gradient_norm(model.parameters()), most)
        assert model.weight.grad.tolist()[0] == pytest.approx([3 * factor, 4 * factor], rel=1e-5)


def test_clipping_does_not_hide_a_gradient_that_is_not_finite() -> None:
    model = nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    optimizer = optim.build_optimizer(model, betas=(0.9, 0.95), decay=0.05)
    optim.set_lr(optimizer, 0.1)
    model.weight.grad = torch.tensor([[math.inf, 4.0]])
    norm = optim.gradient_norm(model.parameters())
    optim.clip_gradients(model.parameters(), norm, 3.0)
    assert optim.guarded_step(optimizer, norm).item() == 1.0
    assert torch.equal(model.weight, start)


def test_gradient_norm_covers_every_parameter() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 2.0), torch.full((2,), 3.0)
    assert optim.gradient_norm(model.parameters()).item() == pytest.approx(math.sqrt(4 * 4 + 2 * 9))


def test_skips_are_counted_in_a_row_only() -> None:
    count, history = torch.zeros(()), []
    for skipped in (1, 1, 0, 1, 1, 1):
        count = optim.skipped_in_a_row(count, torch.tensor(float(skipped)))
        history.append(int(count))
    assert history == [1, 2, 0, 1, 2, 3]


def test_culprit_names_the_term_that_is_not_finite() -> None:
    assert optim.culprit({"pixels": 1.0, "mimic/clip": math.nan}) == "term mimic/clip"
    assert "gradient" in optim.culprit({"pixels": 1.0})
