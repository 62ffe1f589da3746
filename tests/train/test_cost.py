"""What a step costs: the plan's operations beside arithmetic from the paper's formulas."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mrmae.train.cost import count_costs
from mrmae.train.method.masks import Draw, at_update, buckets, counts
from mrmae.train.method.recipe import Recipe
from mrmae.train.ranks import Ranks
from mrmae.train.report import plan_lines
from mrmae.train.run import Run, build_run
from mrmae.train.setup import Setup

PATCH, WIDTH, DEPTH, L = 3 * 8 * 8, 64, 6, 16  # of test_vit (MLP ratio 3) on a cache of 32 px, grid 4 x 4


def block(tokens: int, width: int, ratio: float) -> float:
    """Multiply-accumulates of a transformer block: qkv and projection, two products of attention, the MLP."""
    return (4 + 2 * ratio) * tokens * width**2 + 2 * tokens**2 * width


def step_of(run: Run, n_keep: int, n_predict: int) -> float:
    """Multiply-accumulates of a forward pass with linear heads."""
    decoder, n = run.recipe.student.decoder, n_keep + 1
    total = n_keep * PATCH * WIDTH + DEPTH * block(n, WIDTH, 3.0)
    total += sum(n_keep * WIDTH * run.info.target(t.teacher).width for t in run.model.terms if t.teacher)
    if decoder is None:
        return total
    width, ratio, m = decoder.width, decoder.mlp_ratio, n_predict
    total += m * width * PATCH
    embed, mlp = n * WIDTH * width, 2 * ratio * width**2
    if decoder.kind == "self":
        return total + embed + decoder.depth * block(n + m, width, ratio)
    if decoder.kind == "prompt":  # queries look at [CLS | visible | themselves]
        return total + embed + decoder.depth * (2 * (m + n + m) * width**2 + 2 * m * (n + m) * width + m * mlp)
    if decoder.kind == "regressor":  # queries look at [visible | themselves], without CLS
        seen = n_keep + m
        return total + embed + decoder.depth * (2 * (m + seen) * width**2 + 2 * m * seen * width + m * mlp)
    if decoder.kind == "taps":
        cross = 2 * (n + m) * width**2 + 2 * n * width**2 + 2 * (n + m) * n * width
        one = embed + block(n + m, width, ratio) + cross
        return total + embed + decoder.depth * block(n + m, width, ratio) + len(decoder.blocks) * one
    one = 2 * m * width**2 + 2 * n * WIDTH * width + 2 * m * n * width + 2 * ratio * m * width**2
    mix = (DEPTH + 1) * decoder.depth * n * WIDTH if decoder.weighted else 0
    return total + decoder.depth * one + mix


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("mae", "5 encoder, 17 decoder per image, of 17"),
        ("mr-mae", ""),
        ("mr-mae-light", ""),
        ("mimic-only", "5 encoder, no decoder per image, of 17"),
        ("crossmae", "which look at 5"),
        ("mae student.decoder.kind=cross", "5 encoder, 12 decoder, which look at 5, per image, of 17"),
        ("mae student.decoder.kind=regressor", "5 encoder, 12 decoder, which look at 16, per image, of 17"),
        ("mae student.decoder.kind=prompt", "5 encoder, 12 decoder, which look at 17, per image, of 17"),
        ("mae student.decoder.kind=taps student.decoder.blocks=[2,5]", "5 encoder, 17 decoder per image, of 17"),
        ("mae-harmon-ratio", ""),
        ("mae-meissonic-ratio", ""),
    ],
)
def test_the_plan_counts_the_operations_of_a_step(
    name: str, tokens: str, tiny_cache: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*name.split(), "optim.batch_size=4", "optim.epochs=1", "optim.warmup_epochs=0")
    run = build_run(tiny_cache, tmp_path, recipe, Ranks(), Setup(device="cpu"))
    kept = [counts(recipe.mask, L)] if recipe.mask.law == "fixed" else [(n, L - n) for n in buckets(recipe.mask, L)]
    assert counts(at_update(recipe.mask, Draw(0, 0), L), L) in kept
    macs = sum(step_of(run, *pair) for pair in kept) / len(kept)
    assert count_costs(run)["forward_flops"] == pytest.approx(2 * macs, rel=1e-9)
    assert tokens in next(line for line in plan_lines(run) if line.startswith("tokens"))
