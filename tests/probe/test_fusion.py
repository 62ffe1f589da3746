"""Fusion of two sources: the head restated in loops, and two halves of a truth that only both together tell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae.probe.fusion import FusionAttention, FusionHead
from mrmae.probe.job import ProbeOptions
from mrmae.probe.run import probe_features
from mrmae.probe.settings import settings_from

QUICK = (
    "fusion.queries=2",
    "fusion.width=8",
    "fusion.heads=2",
    "fusion.head.epochs=60",
    "fusion.head.lrs=[0.01]",
    "fusion.linear.epochs=20",
)


def normed(x: torch.Tensor, weight: torch.Tensor | float = 1.0, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def attended(block: FusionAttention, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """CA(q, kv) of one image, head by head and query by query."""
    a, heads = block.attention, block.attention.num_heads
    d = q.shape[-1]
    wq, wk, wv = (a.in_proj_weight[i * d : (i + 1) * d] for i in range(3))
    bq, bk, bv = (a.in_proj_bias[i * d : (i + 1) * d] for i in range(3))
    asked, seen = (
        normed(q, block.norm_q.weight, block.norm_q.bias),
        normed(kv, block.norm_kv.weight, block.norm_kv.bias),
    )
    out = []
    for row in asked:
        parts = []
        for h in range(heads):
            at = slice(h * d // heads, (h + 1) * d // heads)
            logits = (
                torch.stack([(wq[at] @ row + bq[at]) @ (wk[at] @ other + bk[at]) for other in seen])
                / (d // heads) ** 0.5
            )
            weights = logits.exp() / logits.exp().sum()
            parts.append(sum(w * (wv[at] @ other + bv[at]) for w, other in zip(weights, seen)))
        out.append(a.out_proj.weight @ torch.cat(parts) + a.out_proj.bias)
    return q + torch.stack(out)


def test_the_head_is_cross_attention_three_times_and_a_mean() -> None:
    torch.manual_seed(0)
    head = FusionHead(5, 3, 4, queries=2, width=8, heads=2).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, m, labels = torch.randn(2, 4, 5).double(), torch.randn(2, 3, 3).double(), torch.tensor([1, 3])
    loss = torch.nn.functional.cross_entropy(head(x, m), labels)
    found = torch.autograd.grad(loss, list(head.parameters()))

    logits = []
    for own, other in zip(x, m):
        z = attended(head.first, head.queries, normed(own) @ head.own.weight.T + head.own.bias)
        seen = attended(head.second, normed(other) @ head.other.weight.T + head.other.bias, z)
        z = normed(attended(head.third, z, seen), head.norm.weight, head.norm.bias).mean(0)
        logits.append(head.head.weight @ z + head.head.bias)
    plain = sum(row.exp().sum().log() - row[y] for row, y in zip(logits, labels)) / 2
    assert float(abs(plain - loss)) < 1e-10
    for ours, theirs in zip(found, torch.autograd.grad(plain, list(head.parameters()))):
        assert (ours - theirs).abs().max() < 1e-10


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes by red and by green, each high or low."""
    root, draw = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 6)):
        for red, green in ((0, 0), (0, 1), (1, 0), (1, 1)):
            for i in range(n):
                path = root / part / f"{red}{green}" / f"{part}-{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(
                    (np.array([40 + 170 * red, 40 + 170 * green, 0]) + draw.integers(0, 30, (36, 36, 3))).astype(
                        np.uint8
                    )
                ).save(path)
    return root


def options(data: Path, out: Path, other: str) -> ProbeOptions:
    return ProbeOptions(
        "colours:4:0",
        [str(data)],
        ("fusion",),
        settings_from([*QUICK, f"fusion.other={other}"]),
        out=out,
        workers=2,
        batch_size=8,
    )


def test_what_each_source_half_tells_both_together_tell(colours: None, squares: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (found,) = probe_features(options(squares, tmp_path, "colours:2:1"), say=said.append)
    accuracy: dict[str, Any] = {row["name"]: row["accuracy"] for row in found["rows"]}
    assert accuracy["linear, colours:4:0 alone"] == accuracy["linear, colours:2:1 alone"] == 0.5
    assert (
        accuracy["linear, both joined"] == 1
        and found["accuracy"] == 1
        and found["headline"].startswith("cross-attention, 2 queries")
    )
    assert any("2 x 2 tokens are resampled (bilinear) to the 4 x 4" in line for line in said)


def test_a_second_source_that_is_none_or_the_first_is_refused(colours: None, squares: Path, tmp_path: Path) -> None:
    for other, told in (
        ("''", "needs a second source; name it by --set fusion.other=SOURCE"),
        ("colours:4:0", "is the first source too"),
    ):
        with pytest.raises(ValueError, match=told):
            probe_features(options(squares, tmp_path, other), say=lambda _: None)
