"""The linear probe: separable data, heads that do not mix, and how the learning rate is chosen."""

from typing import Any

import pytest
import torch
from torch import nn

from mrmae.probe import linear

HOW: dict[str, Any] = {"n_classes": 3, "epochs": 30, "batch_size": 16, "momentum": 0.9, "seed": 1}


def separable(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return torch.randn(n, 8, generator=draw) * 0.1 + torch.eye(8)[labels] + 5, labels


def test_separable_data_is_learnt_completely() -> None:
    (train, labels), (test, truth) = separable(60, 0), separable(30, 1)
    train, test = linear.standardise(train, test)
    predicted = linear.predict_linear(*linear.train_heads(train, labels, lrs=[0.3, 1.0], **HOW), test)
    assert linear.accuracy(predicted, truth).tolist() == [1.0, 1.0]


def test_a_head_trained_with_others_is_the_head_trained_alone() -> None:
    train, labels = separable(50, 2)
    (train,) = linear.standardise(train)
    together = linear.train_heads(train, labels, lrs=[0.01, 0.1, 1.0], **HOW)
    for i, lr in enumerate([0.01, 0.1, 1.0]):
        weight, bias = linear.train_heads(train, labels, lrs=[lr], **HOW)
        assert torch.allclose(together[0][i], weight[0], atol=1e-6) and torch.allclose(
            together[1][i], bias[0], atol=1e-6
        )


def test_the_gradients_are_those_of_the_cross_entropy() -> None:
    x, labels = separable(10, 3)
    weight, bias = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    sum(nn.functional.cross_entropy(logits, labels) for logits in linear.scores(weight, bias, x)).backward()  # type: ignore[union-attr]
    with torch.no_grad():
        found = linear.gradients(weight, bias, x, labels)
    assert torch.allclose(found[0], weight.grad, atol=1e-5) and torch.allclose(found[1], bias.grad, atol=1e-6)


def test_standardising_is_a_batch_norm_in_evaluation_without_affine() -> None:
    train, test = torch.randn(40, 6) * 3 + 2, torch.randn(5, 6)
    train[:, 2] = 7.0
    norm = nn.BatchNorm1d(6, affine=False, eps=1e-6)
    norm.running_mean, norm.running_var = train.mean(0), train.var(0, correction=0)
    norm.eval()
    found = linear.standardise(train, test)
    keep = [0, 1, 3, 4, 5]
    assert torch.allclose(found[1][:, keep], norm(test)[:, keep], atol=1e-5)
    assert not found[0][:, 2].any() and not found[1][:, 2].any()  # a constant channel says nothing


def test_every_class_is_held_out_and_kept() -> None:
    labels = torch.tensor([0] * 2 + [1] * 30 + [2] * 9)
    held = linear.hold_out(labels, 0.1, seed=0)
    assert torch.bincount(labels[held]).tolist() == [1, 3, 1]
    assert torch.equal(held, linear.hold_out(labels, 0.1, seed=0))
    assert torch.bincount(torch.tensor([0, 1, 1])[linear.hold_out(torch.tensor([0, 1, 1]), 0.5, seed=0)]).tolist() == [
        0,
        1,
    ]
    assert not linear.hold_out(torch.tensor([0, 1, 2]), 0.5, seed=0).any()
    assert not linear.hold_out(labels, 0.0, seed=0).any()


def test_a_head_that_diverged_is_never_chosen() -> None:
    labels = torch.tensor([0, 1])
    predicted = torch.tensor([[0, 1], [0, 1], [0, 0]])
    assert linear.choose_head(predicted, torch.tensor([float("nan"), 0.2, 0.1]), labels) == 1
    assert linear.choose_head(predicted, torch.tensor([0.1, 0.2, 0.1]), labels) == 0


def test_images_without_a_pattern_stay_at_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(300, 4, generator=draw), torch.randint(0, 3, (300,), generator=draw)
    train, test = linear.standardise(x[:200], x[200:])
    predicted = linear.predict_linear(*linear.train_heads(train, labels[:200], lrs=[0.1], **HOW), test)
    assert float(linear.accuracy(predicted, labels[200:])[0]) == pytest.approx(1 / 3, abs=0.15)
