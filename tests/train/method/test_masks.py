"""Masks: their counts, their law, and that they depend on (seed, epoch, sample, patch) alone."""

import itertools
from collections.abc import Callable

import pytest
import torch

from mrmae.train.method.masks import Draw, Masks, normalised, saliency, saliency_arrays
from mrmae.train.method.recipe import MaskRecipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.targets import Batch, CacheInfo

FOCUSED = [MaskRecipe(sampler="attn_prob", draw=draw) for draw in ("prob", "softmax_prob", "topk")]
RECIPES = [MaskRecipe(), *FOCUSED, MaskRecipe(sampler="attn_prob", source="norm:dino")]


def saliency_batch(attention: torch.Tensor, samples: torch.Tensor | None = None) -> Batch:
    b = attention.shape[0]
    hashes = torch.arange(b) if samples is None else samples
    return Batch(hashes, torch.zeros(b, 1, 1, 3, dtype=torch.uint8), {"clip": {"attention": attention}})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("grid", "n_keep", "n_predict"), [(14, 49, 147), (14, 58, 0), (14, 29, 49), (14, 196, 0), (5, 1, 24)]
)
def test_ids_are_sorted_disjoint_in_range_and_of_the_stated_counts(
    tiny_info: Callable[..., CacheInfo],
    tiny_batch: Callable[..., Batch],
    recipe: MaskRecipe,
    grid: int,
    n_keep: int,
    n_predict: int,
) -> None:
    fixed = MaskRecipe(recipe.sampler, 0.75, n_keep, n_predict, recipe.source, recipe.draw)
    l = grid * grid
    masks = draw_masks(tiny_batch(tiny_info(grid), 3), Draw(1, 2), recipe=fixed, l=l)
    assert masks.ids_keep.shape == (3, n_keep) and masks.ids_predict.shape == (3, n_predict)
    assert masks.ids_keep.dtype == masks.ids_predict.dtype == torch.int64
    for keep, predict in zip(masks.ids_keep.tolist(), masks.ids_predict.tolist()):
        assert keep == sorted(set(keep)) and predict == sorted(set(predict))
        assert not set(keep) & set(predict) and set(keep) | set(predict) <= set(range(l))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mask_does_not_depend_on_the_batch_around_it(
    tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch], recipe: MaskRecipe
) -> None:
    batch = tiny_batch(tiny_info(6), 7)
    whole = draw_masks(batch, Draw(3, 4), recipe=recipe, l=36)
    for rows in ([4], [6, 0, 3], [1, 1]):
        part = Batch(
            batch.samples[rows],
            batch.pixels[rows],
            {teacher: {name: x[rows] for name, x in arrays.items()} for teacher, arrays in batch.targets.items()},
        )
        masks = draw_masks(part, Draw(3, 4), recipe=recipe, l=36)
        assert torch.equal(masks.ids_keep, whole.ids_keep[rows]) and torch.equal(
            masks.ids_predict, whole.ids_predict[rows]
        )


@pytest.mark.parametrize("recipe", [MaskRecipe(), FOCUSED[0], FOCUSED[1]])
def test_masks_change_with_seed_epoch_and_sample(
    tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch], recipe: MaskRecipe
) -> None:
    batch = tiny_batch(tiny_info(14), 4)
    other = Batch(batch.samples + 1, batch.pixels, batch.targets)
    drawn = [
        draw_masks(of, draw, recipe=recipe, l=196).ids_keep
        for of, draw in [(batch, Draw(0, 0)), (batch, Draw(1, 0)), (batch, Draw(0, 1)), (other, Draw(0, 0))]
    ]
    for one, two in itertools.combinations(drawn, 2):
        assert not any(torch.equal(a, b) for a, b in zip(one, two))


def test_random_masks_keep_every_patch_equally_often() -> None:
    n, l, n_keep = 4000, 16, 4
    masks = draw_masks(saliency_batch(torch.zeros(n, l)), Draw(0, 0), recipe=MaskRecipe(), l=l)
    often = masks.ids_keep.flatten().bincount(minlength=l) / n
    p = n_keep / l
    assert (often - p).abs().max() < 4.5 * (p * (1 - p) / n) ** 0.5


def test_attn_prob_has_the_law_of_drawing_without_replacement() -> None:
    """Inclusion probabilities of every pair, from the definition: p_i * p_j / (1 - p_i), summed over both orders."""
    n, weights = 20000, torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]) / 16
    recipe = MaskRecipe(sampler="attn_prob", n_keep=2)
    kept = draw_masks(saliency_batch(weights.expand(n, 5)), Draw(0, 0), recipe=recipe, l=5).ids_keep
    found = (kept[:, 0] * 5 + kept[:, 1]).bincount(minlength=25) / n
    p = weights.double().tolist()
    for i, j in itertools.combinations(range(5), 2):
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert abs(found[i * 5 + j].item() - expected) < 4.5 * (expected * (1 - expected) / n) ** 0.5


def test_attn_prob_keeps_patches_more_often_the_more_attention_they_get() -> None:
    attention = torch.arange(1.0, 17.0).expand(4000, 16) / 200
    for draw in FOCUSED[:1]:
        kept = draw_masks(saliency_batch(attention), Draw(0, 0), recipe=draw, l=16).ids_keep
        often = kept.flatten().bincount(minlength=16)
        assert (often[2:] > often[:-2]).all()
    steep, flat = (
        draw_masks(saliency_batch(attention), Draw(0, 0), recipe=draw, l=16).ids_keep.flatten().bincount(minlength=16)
        for draw in FOCUSED[:2]
    )
    assert flat.float().std() < steep.float().std() / 3  # the softmax of a normalised map is much flatter


def test_patches_without_attention_are_kept_only_when_there_are_no_others() -> None:
    attention = torch.zeros(500, 16)
    attention[:, 3:7] = 0.1
    enough = draw_masks(saliency_batch(attention), Draw(0, 0), recipe=MaskRecipe(sampler="attn_prob"), l=16)
    assert (enough.ids_keep == torch.arange(3, 7)).all()
    more = draw_masks(saliency_batch(attention), Draw(0, 0), recipe=MaskRecipe(sampler="attn_prob", n_keep=6), l=16)
    often = more.ids_keep.flatten().bincount(minlength=16)
    assert (often[3:7] == 500).all() and (often[[0, 1, 2, *range(7, 16)]] > 40).all()  # the rest by noise, 83 each


def test_topk_is_argsort() -> None:
    attention = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)).half()
    kept = draw_masks(saliency_batch(attention), Draw(0, 0), recipe=FOCUSED[2], l=16).ids_keep
    assert torch.equal(kept, attention.argsort(dim=1, descending=True)[:, :4].sort(dim=1).values)


def test_predicted_patches_can_be_a_random_part_of_the_hidden_ones() -> None:
    recipe = MaskRecipe(n_keep=4, n_predict=6)
    masks = draw_masks(saliency_batch(torch.zeros(2000, 16)), Draw(0, 0), recipe=recipe, l=16)
    often = masks.ids_predict.flatten().bincount(minlength=16) / 2000
    assert (often - 6 / 16).abs().max() < 0.05


def test_saliency_averages_normalised_maps() -> None:
    a, b = torch.tensor([[0.1, 0.3, 0.0, 0.1]]), torch.tensor([[2.0, 2.0, 3.0, 1.0]])
    targets = {"clip": {"attention": a}, "dino": {"attention": b, "norm": b}}
    mean = (a.double() / 0.5 + b.double() / 8) / 2
    assert saliency(targets, "mean", 4) == pytest.approx(mean, abs=1e-6)
    assert saliency(targets, "dino", 4) == pytest.approx(b.double() / 8)
    assert saliency(targets, "norm", 4) == pytest.approx(b.double() / 8)
    assert saliency(targets, "norm:dino", 4) == pytest.approx(b.double() / 8)


def test_normalising_gives_the_same_bits_alone_and_in_a_batch() -> None:
    values = torch.rand(64, 196, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(normalised(values), torch.cat([normalised(row[None]) for row in values]))


@pytest.mark.parametrize("wrong", [float("nan"), -0.1])
def test_a_map_with_impossible_values_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="negative or missing"):
        draw_masks(saliency_batch(torch.full((1, 16), wrong)), Draw(0, 0), recipe=FOCUSED[0], l=16)


def test_a_batch_without_the_map_is_refused() -> None:
    for source in ("dino", "norm", "norm:clip"):
        with pytest.raises(ValueError, match="the batch has no"):
            saliency({"clip": {"attention": torch.ones(1, 16)}}, source, 16)
    with pytest.raises(ValueError, match="of 25 patches"):
        saliency({"clip": {"attention": torch.ones(1, 16)}}, "mean", 25)


def test_saliency_sources_name_what_to_read_and_what_is_missing(tiny_info: Callable[..., CacheInfo]) -> None:
    info = tiny_info()
    assert saliency_arrays("mean", info) == {"clip": "attention", "dino": "attention"}
    assert saliency_arrays("dino", info) == {"dino": "attention"}
    assert saliency_arrays("norm", info) == {"clip": "norm", "dino": "norm"}
    assert saliency_arrays("norm:clip", info) == {"clip": "norm"}
    for source in ("swin", "norm:swin"):
        with pytest.raises(ValueError, match="the cache has clip, dino.*extract-features"):
            saliency_arrays(source, info)
    cnn = CacheInfo(16, (4, 4), {"cnn": type(info.teachers["clip"])(8)})
    for source in ("mean", "cnn"):
        with pytest.raises(ValueError, match="with attention: none"):
            saliency_arrays(source, cnn)
    with pytest.raises(ValueError, match="no teacher"):
        saliency_arrays("norm", CacheInfo(16, (4, 4)))


def test_masks_move_with_the_batch() -> None:
    masks = Masks(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)).to("meta")
    assert masks.ids_keep.device.type == masks.ids_predict.device.type == "meta"
