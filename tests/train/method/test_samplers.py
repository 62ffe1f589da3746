"""Samplers and the laws of who is predicted: counts, coverage, and what each mask depends on."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mrmae.kernels import ids
from mrmae.train.method.masks import BUCKETS, Draw, Masks, at_update, buckets, counts
from mrmae.train.method.recipe import MaskRecipe
from mrmae.train.method.samplers import draw_masks, grow_by_similarity, joining, rectangles
from mrmae.train.method.targets import Batch

B, L = 6, 196
BEIT = MaskRecipe("beit", n_keep=98)
DISJOINT = MaskRecipe("disjoint", ratio=0.6, cell=2, masks_per_image=2)
QUARTERS = MaskRecipe("quarters", masks_per_image=4)
SIMILAR = MaskRecipe("similarity", n_keep=29, n_predict=49)
FACES = MaskRecipe("crfr_p", source="map:parts")
LAWS = [MaskRecipe(law="truncnormal"), MaskRecipe(law="cosine", least=0.05)]
ALL = [BEIT, DISJOINT, QUARTERS, SIMILAR, *LAWS, MaskRecipe("score"), MaskRecipe("score", mode="keep_top"),
       MaskRecipe("score", mode="multinomial"), MaskRecipe(masks_per_image=3), MaskRecipe(n_predict=16),
       MaskRecipe(n_predict=16, predict="score"), FACES, dataclasses.replace(FACES, n_predict=16),
       MaskRecipe("score", source="map:text"), MaskRecipe("attn_prob", source="map:text", draw="softmax_prob")]  # fmt: skip


def batch_of(rows: slice = slice(None), l: int = L) -> Batch:
    attention = torch.rand(B, l, generator=torch.Generator().manual_seed(0)).half().float()
    samples = (torch.arange(B) * 7919 - 3)[rows]
    draw = torch.Generator().manual_seed(3)
    parts = (1 << torch.randint(0, 11, (B, l), generator=draw)) | (1 << torch.randint(0, 11, (B, l), generator=draw))
    text = torch.randn(B, l, generator=draw).half()
    targets = {"t": {"attention": attention}, "map:parts": {"map": parts.int()}, "map:text": {"map": text}}
    here = {name: {array: x[rows] for array, x in arrays.items()} for name, arrays in targets.items()}
    return Batch(samples, torch.zeros(len(samples), 1, 1, 3, dtype=torch.uint8), here)


def embedded(rows: slice = slice(None), l: int = L) -> Tensor:
    return torch.randn(B, l, 8, generator=torch.Generator().manual_seed(1))[rows]


HERE = Draw(1, 2, epochs=800)


def drawn(recipe: MaskRecipe, draw: Draw = HERE, rows: slice = slice(None), l: int = L) -> Masks:
    told = {"embedded": embedded(rows, l)} if recipe.sampler == "similarity" else {}
    return draw_masks(batch_of(rows, l), draw, recipe=recipe, l=l, **told)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ALL)
def test_masks_are_sorted_disjoint_and_of_the_stated_counts(recipe: MaskRecipe) -> None:
    masks, draw = drawn(recipe), Draw(1, 2, epochs=800)
    n_keep, n_predict = counts(at_update(recipe, draw, L), L)
    v = recipe.masks_per_image
    assert masks.ids_keep.shape == (v * B, n_keep) and masks.ids_predict.shape == (v * B, n_predict)
    for keep, predict in zip(masks.ids_keep.tolist(), masks.ids_predict.tolist()):
        assert keep == sorted(set(keep)) and predict == sorted(set(predict)) and not set(keep) & set(predict)
        assert set(keep) | set(predict) <= set(range(L))


@pytest.mark.parametrize("recipe", ALL)
def test_a_row_depends_on_seed_epoch_and_sample_alone(recipe: MaskRecipe) -> None:
    whole, part = drawn(recipe), drawn(recipe, rows=slice(2, 4))
    rows = [v * B + i for v in range(recipe.masks_per_image) for i in (2, 3)]
    assert torch.equal(whole.ids_keep[rows], part.ids_keep) and torch.equal(whole.ids_predict[rows], part.ids_predict)
    if (recipe.sampler, recipe.mode) in (("score", "mask_top"), ("score", "keep_top")):
        return  # the map alone decides
    for other in (Draw(9, 2, epochs=800), Draw(1, 3, epochs=800)):
        moved = drawn(recipe, other)
        assert moved.ids_keep.shape != whole.ids_keep.shape or not torch.equal(moved.ids_keep, whole.ids_keep)


def test_predicted_patches_come_from_a_stream_of_their_own() -> None:
    whole, few = drawn(MaskRecipe("score", mode="keep_top")), drawn(MaskRecipe("score", mode="keep_top", n_predict=40))
    assert torch.equal(whole.ids_keep, few.ids_keep)
    attention = batch_of().targets["t"]["attention"]
    nearly = attention.argsort(dim=1, descending=True)[:, 49:89].sort(dim=1).values  # the next most salient
    assert all(40 * 40 / 147 * 2 > len(set(a) & set(b)) for a, b in zip(few.ids_predict.tolist(), nearly.tolist()))
    again = drawn(MaskRecipe("score", mode="keep_top", n_predict=40), Draw(1, 3))
    assert torch.equal(again.ids_keep, few.ids_keep) and not torch.equal(again.ids_predict, few.ids_predict)


def test_predicted_patches_follow_a_score_where_asked() -> None:
    l, n = 16, 4000
    share = torch.arange(1, l + 1).float()
    batch = Batch(torch.arange(n), torch.zeros(n, 1, 1, 3, dtype=torch.uint8), {"t": {"attention": share.expand(n, l)}})
    masks = draw_masks(batch, Draw(0, 0), recipe=MaskRecipe(n_keep=1, n_predict=1, predict="score"), l=l)
    often = masks.ids_predict.flatten().bincount(minlength=l) / n
    assert torch.allclose(often, share / share.sum(), atol=0.03)


def test_blocks_hide_exactly_as_many_and_more_together_than_at_random() -> None:
    def pairs(ids: Tensor) -> float:
        hidden = torch.zeros(len(ids), L).scatter(1, ids, 1).view(-1, 14, 14)
        return (hidden[:, 1:] * hidden[:, :-1]).sum((1, 2)).mean().item()

    assert counts(BEIT, L) == (98, 98)
    assert pairs(drawn(BEIT).ids_predict) > 1.3 * pairs(drawn(MaskRecipe(n_keep=98)).ids_predict)
    rng = np.random.default_rng(0)
    assert [rectangles(rng, 14, n).sum() for n in (1, 30, 78, 98, 147)] == [1, 30, 78, 98, 147]
    assert rectangles(rng, 4, 8).sum() == 8
    with pytest.raises(ValueError, match="no rectangles hide exactly 1 of 1 x 1"):
        rectangles(rng, 1, 1)


@pytest.mark.parametrize(("ratio", "cell", "kept", "both"), [(0.6, 2, 76, 44), (0.75, 1, 49, 98), (0.4, 1, 117, 1)])
def test_two_disjoint_masks_hide_every_patch(ratio: float, cell: int, kept: int, both: int) -> None:
    masks = drawn(MaskRecipe("disjoint", ratio=ratio, cell=cell, masks_per_image=2))
    assert masks.ids_keep.shape == (2 * B, kept)
    for one, two in zip(masks.ids_predict[:B].tolist(), masks.ids_predict[B:].tolist()):
        assert len(set(one) & set(two)) == both
        assert len(set(one) | set(two)) == (L if ratio >= 0.5 else 2 * (L - kept) - both)
    if cell == 2:
        cells = torch.zeros(2 * B, L).scatter(1, masks.ids_keep, 1).view(-1, 7, 2, 7, 2).sum((2, 4))
        assert set(cells.unique().tolist()) == {0, 4}


def test_quarters_partition_the_grid() -> None:
    keep = drawn(QUARTERS).ids_keep.view(4, B, 49)
    assert torch.equal(keep.transpose(0, 1).reshape(B, L).sort(dim=1).values, torch.arange(L).expand(B, L))
    with pytest.raises(ValueError, match="a quarter of the grid was expected"):
        drawn(dataclasses.replace(QUARTERS, ratio=0.6))


def test_a_top_score_is_hidden_or_kept() -> None:
    attention = batch_of().targets["t"]["attention"]
    hidden, kept = drawn(MaskRecipe("score")).ids_predict, drawn(MaskRecipe("score", mode="keep_top")).ids_keep
    assert (
        attention.gather(1, hidden).amin(1) >= attention.gather(1, drawn(MaskRecipe("score")).ids_keep).amax(1)
    ).all()
    assert torch.equal(kept, attention.argsort(dim=1, descending=True)[:, :49].sort(dim=1).values)


SOURCES = ["mean", "t", "norm", "norm:u", "map:text"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", ["mask_top", "keep_top", "multinomial"])
def test_a_score_of_any_source_keeps_whom_numpy_keeps(mode: Any, source: str) -> None:
    rng, n, l = np.random.default_rng(7), 3, 36
    given = {name: rng.random((n, l)).astype(np.float16) for name in ("t", "u", "norm t", "norm u", "map:text")}
    if mode != "multinomial":
        given["map:text"] -= np.float16(0.5)
    for values in given.values():
        values[:, 5] = values[:, 9]  # a tie
    tensors = {name: torch.from_numpy(values) for name, values in given.items()}
    targets = {name: {"attention": tensors[name], "norm": tensors[f"norm {name}"]} for name in ("t", "u")}
    batch = Batch(torch.arange(n) * 31, torch.zeros(0), targets | {"map:text": {"map": tensors["map:text"]}})
    recipe = MaskRecipe("score", n_keep=11, n_predict=7, predict="score", mode=mode, source=source)
    if mode != "multinomial" and source == "map:text":
        recipe = dataclasses.replace(recipe, predict="uniform")
    masks = draw_masks(batch, Draw(3, 4), recipe=recipe, l=l)
    used = {
        "mean": ["t", "u"],
        "t": ["t"],
        "norm": ["norm t", "norm u"],
        "norm:u": ["norm u"],
        "map:text": ["map:text"],
    }[source]
    wide = [given[name].astype(np.float64) for name in used]
    share = np.mean([values / values.sum(1, keepdims=True) for values in wide], axis=0)
    order = wide[0] if source == "map:text" else share
    for i in range(n):
        by = [order[i, j] for j in range(l)]
        if mode == "multinomial":
            noise = ids.gumbel_noise(batch.samples, l, seed=3, epoch=4)[i].numpy()
            by = [math.log(share[i, j]) + noise[j] for j in range(l)]
        ascending = sorted(range(l), key=lambda j: (by[j], j))
        kept = ascending[:11] if mode == "mask_top" else ascending[-11:]
        assert masks.ids_keep[i].tolist() == sorted(kept)
        if recipe.predict == "score":
            noise = ids.gumbel_noise(batch.samples, l, seed=3, epoch=4, stream="predict")[i].numpy()
            likely = sorted(set(range(l)) - set(kept), key=lambda j: -(math.log(share[i, j]) + noise[j]))
            assert masks.ids_predict[i].tolist() == sorted(likely[:7])


GROUPS = [{2, 3}, {4, 5}, {6}, {7, 8, 9}, "boundary", {10}, {1}, {0}]


def crfr_p(
    touched: list[set[int]], picked: int, noise: list[int], fill: list[int], n_hidden: int
) -> tuple[set[int], set[int]]:
    """(hidden, covered) patches, step by step; of several patches at random those of the smallest noise."""
    l = len(touched)

    def members(group: Any) -> set[int]:
        if group == "boundary":
            return {p for p in range(l) if touched[p] & {0, 10} and 1 in touched[p]}
        return {p for p in range(l) if touched[p] & group}

    covered = members(GROUPS[picked])
    n = n_hidden - len(covered)
    if n <= 0:
        covered = set(sorted(covered, key=lambda p: fill[p])[:n_hidden])
        return covered, covered
    share = np.float32(n) / np.float32(l - len(covered))
    hidden, claimed = set(covered), set(covered)
    for group in [group for at, group in enumerate(GROUPS) if at != picked]:
        free = members(group) - claimed
        hidden |= set(sorted(free, key=lambda p: noise[p])[: int(np.round(np.float32(len(free)) * share))])
        claimed |= free
    if len(hidden) < n_hidden:
        hidden |= set(sorted(set(range(l)) - hidden, key=lambda p: fill[p])[: n_hidden - len(hidden)])
    shown = sorted(hidden - covered, key=lambda p: -fill[p])[: len(hidden) - n_hidden]
    return hidden - set(shown), covered


@pytest.mark.parametrize("l", [16, 196])
@pytest.mark.parametrize("kind", ["any", "one", "no eyes", "all mouth", "none"])
def test_a_part_is_covered_whole_and_the_others_by_the_like_share(kind: str, l: int) -> None:
    rng, n = np.random.default_rng(l), 24
    one = rng.choice([0, 1, 10, 6], (n, l)) if kind == "no eyes" else rng.integers(0, 11, (n, l))
    bits = 1 << one
    if kind == "any":
        bits |= 1 << rng.integers(0, 11, (n, l))
    bits = {"all mouth": bits | 1 << 8, "none": 0 * bits}.get(kind, bits)
    batch = Batch(torch.arange(n) * 977 - 5, torch.zeros(0), {"map:parts": {"map": torch.from_numpy(bits).int()}})
    masks = draw_masks(batch, Draw(5, 6), recipe=FACES, l=l)
    here = {"seed": 5, "epoch": 6}
    noise, fill = (ids.patch_noise(batch.samples, l, stream=name, **here).tolist() for name in ("order", "fill"))
    picked, full = ids.drawn_block(batch.samples, 6, **here).tolist(), False
    assert masks.weight is not None and set(picked) == set(range(6))
    for i in range(n):
        touched = [{part for part in range(11) if bits[i, p] >> part & 1} for p in range(l)]
        hidden, covered = crfr_p(touched, picked[i], noise[i], fill[i], l - l // 4)
        assert len(hidden) == l - l // 4 and masks.ids_predict[i].tolist() == sorted(hidden)
        assert masks.weight[i].tolist() == [float(p in covered) for p in sorted(hidden)]
        full |= covered == hidden
    assert full or kind != "all mouth"
    if kind == "one":
        same = Batch(batch.samples, batch.pixels, {"map:parts": {"map": torch.from_numpy(one).int()}})
        named = draw_masks(same, Draw(5, 6), recipe=dataclasses.replace(FACES, parts="ids"), l=l)
        assert torch.equal(named.ids_predict, masks.ids_predict) and torch.equal(named.weight, masks.weight)  # type: ignore[arg-type]


def test_a_growing_set_takes_who_brute_force_takes() -> None:
    tokens, seeds = embedded(slice(0, 1), 30), torch.tensor([[3, 17]])
    noise = torch.randperm(30, generator=torch.Generator().manual_seed(5))[None]
    found = grow_by_similarity(tokens, seeds, [(2, 1, 0), (0, 2, 1)], noise)[0].tolist()

    def likeness(u: int, kept: list[int]) -> float:
        return max(torch.cosine_similarity(tokens[0, u].double(), tokens[0, s].double(), dim=0).item() for s in kept)

    kept = [3, 17]
    for near, far, lucky in [(2, 1, 0), (0, 2, 1)]:
        base, rest = list(kept), [u for u in range(30) if u not in kept]
        rest.sort(key=lambda u: -likeness(u, base))
        taken = rest[:near] + (rest[len(rest) - far :][::-1] if far else [])
        left = sorted((u for u in rest if u not in taken), key=lambda u: -noise[0, u].item())
        kept += taken + left[:lucky]
    assert found == kept


def test_who_joins_follows_the_schedule() -> None:
    at = {
        0: (8, 0, 0),
        280: (8, 0, 0),
        290: (4, 4, 0),
        300: (0, 8, 0),
        580: (0, 8, 0),
        595: (0, 2, 6),
        600: (0, 0, 8),
        799: (0, 0, 8),
    }
    assert {epoch: joining(8, epoch, 800) for epoch in at} == at
    assert joining(7, 35, 100) == (7, 0, 0) and joining(7, 99, 100) == (0, 0, 7)


@pytest.mark.parametrize("recipe", LAWS)
def test_a_law_of_the_ratio_has_four_counts_and_each_update_draws_one(recipe: MaskRecipe) -> None:
    kept = buckets(recipe, L)
    assert len(set(kept)) == BUCKETS and all(1 <= n < L for n in kept)
    often = {n: 0 for n in kept}
    for update in range(400):
        one, two = (drawn(recipe, Draw(0, 1, update=update), rows=rows) for rows in (slice(0, 2), slice(2, 6)))
        assert one.ids_keep.shape[1] == two.ids_keep.shape[1]  # every rank the same
        often[one.ids_keep.shape[1]] += 1
    assert all(60 < n < 140 for n in often.values())


def test_laws_of_the_ratio_are_the_published_ones() -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosine = torch.cos(math.pi / 2 * uniform)
    normal = torch.distributions.Normal(1.0, 0.25)
    low, high = (normal.cdf(torch.tensor(x, dtype=torch.float64)) for x in (0.7, 1.0))
    cut = normal.icdf(low + uniform * (high - low))
    for law, ratios in (("cosine", cosine), ("truncnormal", cut)):
        middle = ratios.view(-1).sort().values[[25_000, 75_000, 125_000, 175_000]]
        hidden = sorted(L - n for n in buckets(MaskRecipe(law=law), L))  # type: ignore[arg-type]
        assert [n / L for n in hidden] == pytest.approx(middle.tolist(), abs=0.006)
