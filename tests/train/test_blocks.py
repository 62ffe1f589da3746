"""Masks that are a cache's token blocks: the same loss as whole grids under the same masks, from a quarter of the bytes."""

import dataclasses
import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from training import train_quietly

from mrmae.shards.format.blocks import BlockRule
from mrmae.train import batches, loop
from mrmae.train import run as runs
from mrmae.train.feed import load_masked
from mrmae.train.log import read_rows
from mrmae.train.method import masks, samplers
from mrmae.train.method.recipe import MaskRecipe, Recipe
from mrmae.train.method.targets import Batch
from mrmae.train.ranks import Ranks
from mrmae.train.report import feature_bytes, plan_lines
from mrmae.train.run import Run
from mrmae.train.setup import Setup

Make = Callable[..., Path]
BLOCK = "mask.sampler=stored_block"
SHORT = ("optim.epochs=2", "optim.warmup_epochs=0", "optim.batch_size=8")
ALONE = Ranks()


@pytest.fixture(scope="module")
def blocked(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images and features of `tiny_cache` (4 x 4 patches, 2 views), in 4 blocks of 4."""
    return make_cache(tmp_path_factory.mktemp("blocks") / "cache", blocks=4)


@pytest.fixture
def build(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Run]:
    """build(cache, recipe, *overrides): a run at its beginning."""

    def build(cache: Path, name: str, *overrides: str) -> Run:
        return runs.build_run(
            cache, tmp_path / "out", tiny_recipe(name, *SHORT, *overrides), ALONE, Setup(device="cpu")
        )

    return build


@pytest.mark.parametrize(
    "name, more",
    [
        ("mr-mae", ()),
        ("mr-mae-fused", ("terms.mimic.transform=l2", "terms.mimic.distance=2-2cos")),
        ("mimic-only", ("terms.mimic.positions=cls+visible", "terms.mimic.teachers=[a]")),
    ],
)
def test_the_loss_is_the_rasters_under_the_same_masks_bit_for_bit(
    build: Callable[..., Run], blocked: Path, tiny_cache: Path, name: str, more: tuple[str, ...]
) -> None:
    one, whole = build(blocked, name, BLOCK, *more), build(tiny_cache, name, *more)
    for epoch in (0, 3):
        numbers = one.numbers[[3, 9, 1, 20]]
        batch, drawn = load_masked(one, numbers, epoch=epoch)
        assert drawn is not None and batch.rows == "visible"
        raster = batches.load_batch(whole.cache, numbers, epoch=epoch, needed=whole.needed)
        for other in (raster, batches.visible_rows(raster, drawn)):
            losses = []
            for run, given in ((one, batch), (whole, other)):
                run.model.zero_grad()
                loss, terms = run.model(given, drawn)
                loss.backward()
                losses.append([loss, *terms.values(), *(p.grad for p in run.model.parameters() if p.grad is not None)])
            assert len(losses[0]) > 5 and all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_random_masks_on_blocks_give_the_rasters_batches(
    build: Callable[..., Run], blocked: Path, tiny_cache: Path
) -> None:
    for name in ("mr-mae", "mimic-masked", "mr-mae-focused"):
        teachers = ["mask.source=a"] if name == "mr-mae-focused" else []
        got, expected = (
            load_masked(build(cache, name, *teachers), np.array([2, 17, 5]), epoch=1) for cache in (blocked, tiny_cache)
        )
        assert got[0].rows == expected[0].rows
        assert got[1] is not None and expected[1] is not None
        assert torch.equal(got[1].ids_keep, expected[1].ids_keep)
        for teacher, arrays in expected[0].targets.items():
            assert all(torch.equal(got[0].targets[teacher][array], tensor) for array, tensor in arrays.items())


def test_only_the_visible_block_leaves_the_disk(
    build: Callable[..., Run], blocked: Path, read_sizes: list[int]
) -> None:
    read = {}
    for sampler in ("stored_block", "random"):
        run = build(blocked, "mr-mae", f"mask.sampler={sampler}")
        read_sizes.clear()
        load_masked(run, run.numbers[:6], epoch=0)
        crcs = 4 * len(read_sizes)
        assert sum(read_sizes) - crcs == 6 * feature_bytes(run), "what the plan tells"
        read[sampler] = sum(read_sizes)
    assert read["random"] == 4 * read["stored_block"]


def test_block_masks_are_blocks_drawn_evenly_and_by_the_hash_alone() -> None:
    draw, recipe, l = masks.Draw(3, 5, BlockRule(0, 4), 2), MaskRecipe("stored_block"), 16
    samples = torch.randint(-(2**62), 2**62, (400,), generator=torch.Generator().manual_seed(0))
    whole = samplers.draw_masks(Batch(samples, torch.empty(0), {}), draw, recipe=recipe, l=l)
    both = torch.cat([whole.ids_keep, whole.ids_predict], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(l).expand(400, l))
    part = samplers.draw_masks(Batch(samples[7:9], torch.empty(0), {}), draw, recipe=recipe, l=l)
    assert torch.equal(part.ids_keep, whole.ids_keep[7:9]) and torch.equal(part.ids_predict, whole.ids_predict[7:9])
    chosen = [samplers.chosen_blocks(samples, draw._replace(epoch=epoch)) for epoch in range(30)]
    counts = torch.stack(chosen).flatten().bincount(minlength=4)
    assert (counts - 3000).abs().max() < 6 * (12000 * 3 / 16) ** 0.5
    assert len({tuple(column) for column in torch.stack(chosen).T.tolist()}) > 390, "samples take turns apart"
    few = samplers.draw_masks(
        Batch(samples, torch.empty(0), {}), draw, recipe=dataclasses.replace(recipe, n_predict=5), l=l
    )
    assert torch.equal(few.ids_keep, whole.ids_keep) and few.ids_predict.shape == (400, 5)
    assert all(set(a) <= set(b) for a, b in zip(few.ids_predict.tolist(), whole.ids_predict.tolist()))


@pytest.mark.parametrize(
    "raster, name, overrides, message",
    [
        (True, "mr-mae", (), "the cache stores tokens in raster order; .* --token-layout blocks, or use --set mask.sampler=random"),
        (False, "mr-mae", ("mask.ratio=0.5",), "mask.ratio = 0.5 shows 8 of 16 patches; the cache has 4 blocks of 4; .*n_keep=4"),
        (False, "mr-mae", ("mask.n_keep=5",), "mask.n_keep = 5 shows 5 of 16 patches"),
        (False, "mimic-masked", (), "term mimic predicts teachers at hidden patches.*terms.mimic=null, or use --set mask.sampler"),
    ],
)  # fmt: skip
def test_what_needs_more_than_one_block_is_refused(
    build: Callable[..., Run],
    blocked: Path,
    tiny_cache: Path,
    raster: bool,
    name: str,
    overrides: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(ValueError, match="mask.sampler = stored_block: " + message):
        build(tiny_cache if raster else blocked, name, BLOCK, *overrides)


def test_teachers_in_the_step_know_every_patch(build: Callable[..., Run], blocked: Path) -> None:
    run = build(blocked, "mimic-masked")
    recipe = dataclasses.replace(run.recipe, mask=MaskRecipe("stored_block"))
    masks.check_blocks(recipe, run.info, cached=False)
    with pytest.raises(ValueError, match="hidden patches"):
        masks.check_blocks(recipe, run.info, cached=True)


def test_the_plan_tells_what_is_read(build: Callable[..., Run], blocked: Path, tiny_cache: Path) -> None:
    def line(*args: Any) -> str:
        return next(line for line in plan_lines(build(*args)) if line.startswith("features read"))

    assert "(one of 4 token blocks)" in line(blocked, "mr-mae", BLOCK)
    assert "(all 4 token blocks, put in order: 4 x the tokens that mask.sampler=stored_block reads)" in line(
        blocked, "mr-mae"
    )
    assert "block" not in line(tiny_cache, "mr-mae") and "block" not in line(blocked, "mae")


def test_a_run_on_blocks_is_the_same_in_micro_batches_and_after_a_stop(
    blocked: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(out: Path, epochs: int = 2, **options: Any) -> list[tuple[float, ...]]:
        recipe = tiny_recipe("mr-mae", BLOCK, *SHORT, f"optim.epochs={epochs}")
        quiet: dict[str, Any] = {"panels_every": 2, "log_every": 1, "hold_out": 0.2}
        train_quietly(blocked, out, recipe, Console(file=io.StringIO()), **quiet | options)
        return [(row["loss"], *row["terms"].values()) for row in read_rows(out / "log.jsonl", "step")]

    whole = train(tmp_path / "whole", panels_every=2)
    assert len(whole) == 4 and whole[-1][0] < whole[0][0]
    assert np.allclose(train(tmp_path / "micro", accum=4), whole, rtol=1e-5)
    assert (tmp_path / "whole/panels/epoch-0002.png").exists()
    original = loop.step

    def stopping(run: Run, live: Any, forward: Any) -> torch.Tensor:
        if run.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(run, live, forward)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", stopping)
        assert len(train(tmp_path / "stopped")) == 2
    assert train(tmp_path / "stopped") == whole
