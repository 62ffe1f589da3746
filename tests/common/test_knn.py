"""k-NN against a brute-force version, and what it must not depend on."""

import math

import numpy as np
import pytest
import torch

from mrmae.common import knn

draw = np.random.default_rng(3)


def brute_force(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int, t: float, centre: bool) -> list[int]:
    mean = train.mean(0) if centre else 0
    train, test, found = train - mean, test - mean, []
    for row in test:
        cosine = np.array([row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in train])
        votes = np.zeros(labels.max() + 1)
        for i in np.argsort(-cosine)[:k]:
            votes[labels[i]] += np.exp(cosine[i] / t)
        found.append(int(votes.argmax()))
    return found


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_it_agrees_with_brute_force_for_every_k(
    centre: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "TEST_CHUNK", 7)
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 11)
    labels = draw.integers(0, 4, 60)
    train, test = (
        draw.normal(0.7, 1, (n, 9)) + 0.4 * np.eye(9)[:4][rows] for n, rows in ((60, labels), (23, [0] * 23))
    )
    found = knn.knn_predict(torch.tensor(train), torch.tensor(labels), torch.tensor(test), ks=[1, 3, 10, 60],
                            temperature=temperature, n_classes=4, centre=centre)  # fmt: skip
    for k, predicted in found.items():
        assert predicted.tolist() == brute_force(train, labels, test, k, temperature, centre), k


def test_a_small_temperature_does_not_overflow() -> None:
    train, labels = torch.eye(4), torch.tensor([0, 1, 2, 3])
    found = knn.knn_predict(train, labels, train, ks=[4], temperature=1e-3, n_classes=4)
    assert found[4].tolist() == [0, 1, 2, 3]


def test_scale_does_not_matter_and_an_offset_only_without_centring() -> None:
    labels = torch.tensor([0, 1] * 20)
    train = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + 2.0 * labels[:, None] * torch.eye(5)[0]
    how = {"ks": [5], "temperature": 0.07, "n_classes": 2}
    plain = knn.knn_predict(train, labels, train[::3] * 1.01, **how, centre=True)[5]
    assert torch.equal(plain, knn.knn_predict(7 * train, labels, 7 * train[::3] * 1.01, **how, centre=True)[5])
    moved = knn.knn_predict(train + 100, labels, train[::3] + 100, **how, centre=True)[5]
    still = knn.knn_predict(train, labels, train[::3], **how, centre=True)[5]
    assert torch.equal(moved, still)


def test_more_neighbours_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="k = 5 of 4 train images"):
        knn.knn_predict(torch.eye(4), torch.arange(4), torch.eye(4), ks=[5], temperature=0.07, n_classes=4)


def test_one_very_near_neighbour_outvotes_two_near_ones_at_a_low_temperature() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.1, 5.0], [-1.0, 0.0]])
    labels, query = torch.tensor([0, 1, 1, 2]), torch.tensor([[9.0, 6.0]])
    near = [9 / math.hypot(9, 6), 6 / math.hypot(9, 6), (0.9 + 30) / math.hypot(9, 6) / math.hypot(0.1, 5)]
    assert math.exp(near[0] / 0.07) > sum(math.exp(x / 0.07) for x in near[1:])

    def told(temperature: float, k: int = 4) -> list[int]:
        found = knn.knn_predict(bank, labels, query, ks=[k], temperature=temperature, n_classes=3)
        return found[k].tolist()

    assert told(0.07) == [0] and told(10.0) == [1] and told(10.0, k=1) == [0]
