"""Efficient Probing against its slice-wise definition, its parameter count, and LARS against its formula."""

import pytest
import torch
from torch import nn

from mrmae.probe import attentive
from mrmae.probe.attentive import EfficientProbe, Lars, probe_scores, train_probe
from mrmae.train.optim import set_lr


def test_pooling_equals_the_slice_wise_definition_as_an_explicit_loop() -> None:
    torch.manual_seed(0)
    probe, x = EfficientProbe(12, 5, queries=3, d_out=2).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        probe.queries.mul_(50)  # away from uniform attention
    found = probe.pool(x)
    width = 12 // 2 // 3
    for image in range(2):
        values = x[image] @ probe.values.weight.T
        joined = []
        for m in range(3):
            scores = torch.stack([probe.queries[m] @ x[image, n] / 12**0.5 for n in range(7)])
            attention = scores.exp() / scores.exp().sum()
            joined.append(sum(attention[n] * values[n, m * width : (m + 1) * width] for n in range(7)))
        assert torch.allclose(found[image], torch.cat(joined), atol=1e-12)  # type: ignore[arg-type]


def test_rows_of_the_attention_sum_to_one_and_the_count_is_the_papers() -> None:
    probe = EfficientProbe(768, 1000, queries=32)
    assert sum(p.numel() for p in probe.parameters()) == 1_383_400
    assert torch.allclose(probe.attention(torch.randn(2, 9, 768)).sum(-1), torch.ones(2, 32), atol=1e-5)


def test_one_query_is_single_query_pooling() -> None:
    probe, x = EfficientProbe(8, 3, queries=1), torch.randn(2, 5, 8)
    weights = ((probe.queries[0] * x).sum(-1) / 8**0.5).softmax(-1)
    assert torch.allclose(probe.pool(x), (weights[..., None] * probe.values(x)).sum(1), atol=1e-6)


@pytest.mark.parametrize("d, queries, d_out", [(8, 3, 1), (8, 4, 4), (9, 1, 2)])
def test_queries_that_do_not_divide_the_channels_are_refused(d: int, queries: int, d_out: int) -> None:
    with pytest.raises(ValueError, match=f"{queries} queries cannot share {d} / {d_out} channels"):
        EfficientProbe(d, 2, queries=queries, d_out=d_out)


def test_lars_scales_matrices_by_trust_and_leaves_vectors() -> None:
    matrix, vector = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.ones(2))
    optimizer = Lars([matrix, vector], lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        (matrix.sum() * 4 + vector.sum() * 4).backward()
        before = matrix.norm().item()
        if step == 0:
            optimizer.step()
            moved = 0.5 * 1e-3 * before / 8 * 4  # lr * trust * |w| / |g| * g
            assert torch.allclose(matrix, torch.full((2, 2), 3.0 - moved)) and torch.allclose(
                vector, torch.full((2,), -1.0)
            )
    first = 1e-3 * 6.0 / 8 * 4
    was = matrix.detach().clone()
    second = 1e-3 * was.norm() / 8 * 4
    optimizer.step()
    assert torch.allclose(matrix, was - 0.5 * (0.9 * first + second)) and torch.allclose(
        vector, torch.tensor(-1.0 - 0.5 * 7.6)
    )


def test_it_finds_the_one_token_that_tells_the_class() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    x = torch.randn(60, 6, 8, generator=draw)
    place = torch.randint(0, 6, (60,), generator=draw)
    x[torch.arange(60), place] = 0.0
    x[torch.arange(60), place, 0] = 6.0
    x[torch.arange(60), place, 1] = torch.where(labels == 0, 4.0, -4.0)
    how = {
        "n_classes": 2,
        "blr": 100.0,
        "epochs": 60,
        "warmup_epochs": 5,
        "batch_size": 20,
        "queries": 2,
        "d_out": 1,
        "seed": 0,
    }
    probe = train_probe(x.half(), labels, **how)  # type: ignore[arg-type]
    assert (probe_scores(probe, x).argmax(1) == labels).double().mean() > 0.95
    again = train_probe(x.half(), labels, **how)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), again.parameters()))


def test_every_update_has_a_rate_also_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(attentive, "set_lr", lambda optimizer, lr: (rates.append(lr), set_lr(optimizer, lr)))
    x, labels = torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    how = {"n_classes": 3, "blr": 1.0, "warmup_epochs": 1, "queries": 2, "d_out": 1, "seed": 0}
    for batch_size, epochs, updates in ((12, 1, 1), (4, 3, 9)):
        rates.clear()
        train_probe(x, labels, **how, batch_size=batch_size, epochs=epochs)  # type: ignore[arg-type]
        assert len(rates) == updates and all(0 < rate <= batch_size / 256 for rate in rates)
