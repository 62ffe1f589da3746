"""Few labels: which are drawn, and what is the mean of what."""

import types
from typing import Any

import pytest
import torch

from mrmae.common.knn import knn_predict
from mrmae.probe import report
from mrmae.probe.low_shot import few_labels, run_low_shot
from mrmae.probe.settings import settings_from


def test_a_share_of_every_class_is_drawn_and_smaller_shares_are_in_larger_ones() -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor([40, 20, 3]))
    few, more = (few_labels(labels, share, seed=0, draw=1) for share in (0.05, 0.5))
    assert torch.bincount(labels[few]).tolist() == [2, 1, 1] and torch.bincount(labels[more]).tolist() == [20, 10, 2]
    assert set(few.tolist()) < set(more.tolist())
    assert few.tolist() != few_labels(labels, 0.05, seed=0, draw=2).tolist()


def job_of(train: torch.Tensor, test: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor, *sets: str) -> Any:
    settings = settings_from(["low-shot.linear.epochs=3", *sets])
    return types.SimpleNamespace(
        options=types.SimpleNamespace(settings=settings, seed=0, device="cpu"), labels=(labels, truth),
        train=types.SimpleNamespace(pooled=lambda: {"mean": train}), test=types.SimpleNamespace(pooled=lambda: {"mean": test}),
        data=types.SimpleNamespace(classes=["a", "b"]),
    )  # fmt: skip


def test_every_row_is_the_mean_of_its_draws() -> None:
    draw = torch.Generator().manual_seed(0)
    labels, truth = torch.arange(40) % 2, torch.arange(30) % 2
    train, test = (torch.randn(len(y), 6, generator=draw) + 0.7 * y[:, None] for y in (labels, truth))
    outcome, predicted = run_low_shot(
        job_of(train, test, labels, truth, "low_shot.shares=[0.1, 0.05]", "low_shot.k=3"), ""
    )
    assert [row["name"].partition(" of")[0] for row in outcome["rows"]] == [
        "2-NN, mean, 5 %", "linear, mean, 5 %", "3-NN, mean, 10 %", "linear, mean, 10 %"
    ]  # fmt: skip
    alone = []
    for at in range(3):
        few = few_labels(labels, 0.1, seed=0, draw=at)
        alone.append(
            float(
                (knn_predict(train[few], labels[few], test, ks=[3], temperature=0.07, n_classes=2)[3] == truth)
                .double()
                .mean()
            )
        )
    assert outcome["rows"][2]["draws"] == pytest.approx(alone) and outcome["rows"][2]["accuracy"] == pytest.approx(
        sum(alone) / 3
    )
    assert outcome["headline"] == outcome["rows"][1]["name"] and predicted is not None and predicted.shape == (3, 30)
    assert float((predicted == truth).double().mean()) == pytest.approx(outcome["accuracy"])
    assert outcome["interval"][0] < outcome["accuracy"] < outcome["interval"][1]


def test_classes_far_apart_need_one_label_each() -> None:
    labels, truth = torch.arange(40) % 2, torch.arange(30) % 2
    train, test = (
        torch.randn(len(y), 6, generator=torch.Generator().manual_seed(0)) * 0.1 + 5 * (2 * y[:, None] - 1)
        for y in (labels, truth)
    )
    outcome, _ = run_low_shot(
        job_of(train, test, labels, truth, "low_shot.shares=[0.01]", "low_shot.linear.epochs=20"), ""
    )
    assert [row["accuracy"] for row in outcome["rows"]] == [1, 1]
    assert outcome["notes"] == [
        "0.01 of the labels: one train image per class: none can be held out: lr 0.1 is the headline unseen"
    ]


def test_the_interval_of_a_mean_is_that_of_resampled_images() -> None:
    values = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]).double().repeat(50)
    low, high = report.mean_interval(values, resamples=20_000)
    at = torch.randint(200, (20_000, 200), generator=torch.Generator().manual_seed(0))
    wanted = values[at].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    assert (low, high) == pytest.approx(tuple(wanted.tolist()), abs=0.004)
