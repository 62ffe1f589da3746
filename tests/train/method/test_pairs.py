"""Two views in one batch: what is said of both is what is said of each, and CroCo's and LUT's losses restated in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from method_math import (
    Weights,
    assert_same,
    attend,
    block,
    cosine,
    encoder,
    leave_start,
    line,
    masks_for,
    mlp,
    moved,
    norm,
    normalised_pixels,
    two_linears,
)
from torch import Tensor

from mrmae.train.batches import visible_rows
from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import MaskRecipe, Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.student import sincos_positions
from mrmae.train.method.targets import Batch, CacheInfo

MakeRecipe = Callable[..., Recipe]
MakeInfo = Callable[..., CacheInfo]
MakeBatch = Callable[..., Batch]


def partner(batch: Batch) -> Batch:
    assert batch.partner is not None
    return batch.partner


def one_view(batch: Batch, ids: Tensor, model: Pretrainer, name: str) -> Tensor:
    """A term's value on one view alone, of which `ids` are visible."""
    terms = model.terms
    model.terms = tuple(replace(t, recipe=replace(t.recipe, views="first", of="same")) for t in terms if t.name == name)
    reads, model.reads_partner, decoder, model.decoder = model.reads_partner, False, model.decoder, None
    try:
        return model(replace(batch, partner=None), Masks(ids, ids[:, :0]))[1][name]
    finally:
        model.terms, model.reads_partner, model.decoder = terms, reads, decoder


@pytest.mark.parametrize("gathered", [False, True])
def test_mimicking_on_both_views_is_the_mean_of_two_one_view_batches(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch, gathered: bool
) -> None:
    model = build_model(tiny_recipe("mr-croco"), tiny_info(), dtype=torch.float64)
    batch = tiny_batch(model.info, 3)
    masks = masks_for(model, batch)
    assert masks.ids_partner is not None and masks.ids_partner.shape == (3, 16)
    _, parts = model(visible_rows(batch, masks) if gathered else batch, masks)
    for name in ("mimic/clip", "mimic/dino"):
        views = ((batch, masks.ids_keep), (partner(batch), masks.ids_partner))
        mean = torch.stack([one_view(view, ids, model, name) for view, ids in views]).mean()
        assert parts[name].item() == pytest.approx(mean.item(), rel=1e-12)


def test_the_other_views_pooled_token_is_what_each_view_tells(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    model = build_model(tiny_recipe("lut-cached"), tiny_info(), dtype=torch.float64)
    batch = tiny_batch(model.info, 3)
    other, masks = partner(batch), masks_for(model, batch)
    assert masks.ids_partner is not None
    _, parts = model(batch, masks)
    for name in ("context/clip", "context/dino"):
        swapped = ((batch, other, masks.ids_keep), (other, batch, masks.ids_partner))
        each = [one_view(replace(v, targets=t.targets), ids, model, name) for v, t, ids in swapped]
        assert parts[name].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-12)


def test_disjoint_pairs_share_a_permutation(tiny_info: MakeInfo, tiny_batch: MakeBatch) -> None:
    recipe = MaskRecipe(sampler="pair_disjoint")
    batch = replace(tiny_batch(tiny_info(), 1), samples=torch.arange(50))
    masks = draw_masks(batch, Draw(3, 1), recipe=recipe, l=196)
    alone = draw_masks(batch, Draw(3, 1), recipe=MaskRecipe(), l=196)
    assert torch.equal(masks.ids_keep, alone.ids_keep) and torch.equal(masks.ids_predict, alone.ids_predict)
    assert masks.ids_partner is not None and masks.ids_partner.shape == (50, 49)
    assert all(not set(one) & set(two) for one, two in zip(masks.ids_keep.tolist(), masks.ids_partner.tolist()))
    assert all(row == sorted(set(row)) for row in masks.ids_partner.tolist())
    few = draw_masks(batch, Draw(3, 1), recipe=replace(recipe, n_predict=5), l=196)
    assert torch.equal(few.ids_partner, masks.ids_partner) and few.ids_predict.shape == (50, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 98 were expected; raise mask.ratio"):
        draw_masks(batch, Draw(3, 1), recipe=replace(recipe, ratio=0.4), l=196)


def test_croco_is_its_formulas(tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch) -> None:
    """x += SA(LN x); x += CA(LN x, LN_y y); x += MLP(LN x), y never updated, over the whole first image in raster order."""
    model = build_model(tiny_recipe("croco", "student.decoder.depth=2"), tiny_info(), dtype=torch.float64)
    w, batch = moved(model), tiny_batch(model.info)
    masks = masks_for(model, batch)
    assert masks.ids_partner is not None
    loss, _ = model(batch, masks)
    place = sincos_positions((4, 4), 16)[1:]
    seen = line(encoder(model, w, batch.pixels, masks.ids_keep), w, "decoder.embed")
    y = line(encoder(model, w, partner(batch).pixels, masks.ids_partner), w, "decoder.embed") + place
    x = torch.stack(
        [
            torch.stack([s[ids.tolist().index(j)] if j in ids else w["decoder.mask_token"][0, 0] for j in range(16)])
            for s, ids in zip(seen, masks.ids_keep)
        ]
    )
    x = x + place
    for i in range(2):
        at = f"decoder.blocks.{i}"
        x = x + line(
            attend(*line(norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv").chunk(3, -1), 2), w, f"{at}.attn.proj"
        )  # type: ignore[call-arg]
        k, v = line(norm(y, w, f"decoder.norms.{i}"), w, f"{at}.cross.kv").chunk(2, -1)
        q = line(norm(x, w, f"{at}.norm2"), w, f"{at}.cross.q")
        x = x + line(attend(q, k, v, 2), w, f"{at}.cross.proj")
        x = x + mlp(norm(x, w, f"{at}.norm3"), w, f"{at}.mlp")
    told = line(norm(x, w, "decoder.norm"), w, "heads.pixels")
    hidden = torch.stack([row[ids] for row, ids in zip(told, masks.ids_predict)])
    expected = (hidden - normalised_pixels(model, batch.pixels, masks.ids_predict)).square().mean()
    assert_same(model, w, loss, expected)


def test_lut_is_its_formulas(tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch) -> None:
    """L_pix of view 1 + 0.25 * the mean of 2 - 2 cos(q1, sg k2) and 2 - 2 cos(q2, sg k1), batch norms by view."""
    model = build_model(tiny_recipe("lut"), tiny_info(), dtype=torch.float64)
    leave_start(model)
    w, batch = moved(model), tiny_batch(model.info, 4)
    masks = masks_for(model, batch)
    assert masks.ids_partner is not None
    loss, parts = model(batch, masks)

    final = encoder(model, w, batch.pixels, masks.ids_keep)
    place = sincos_positions((4, 4), 16)
    keep = torch.cat([torch.zeros(4, 1, dtype=torch.int64), masks.ids_keep + 1], 1)
    z = torch.cat(
        [line(final, w, "decoder.embed") + place[keep], w["decoder.mask_token"] + place[masks.ids_predict + 1]], 1
    )
    z = norm(block(z, w, "decoder.blocks.0", 2), w, "decoder.norm")[:, keep.shape[1] :]
    truth = normalised_pixels(model, batch.pixels, masks.ids_predict)
    pixels = (line(z, w, "heads.pixels") - truth).square().mean()

    def told(tokens: Tensor, of: Weights) -> Tensor:
        return two_linears(
            two_linears(tokens[:, 1:].mean(1), of, "heads.context.projector"), of, "heads.context.predictor"
        )

    def target(view: Batch) -> Tensor:
        whole = encoder(model, w, view.pixels, torch.arange(16).expand(4, -1), "follower.student")[:, 1:].mean(1)
        return two_linears(whole, w, "follower.projectors.context", w).detach()

    q1, q2 = told(final, w), told(encoder(model, w, partner(batch).pixels, masks.ids_partner), w)
    k1, k2 = target(batch), target(partner(batch))
    context = ((2 - 2 * cosine(q1, k2)).mean() + (2 - 2 * cosine(q2, k1)).mean()) / 2
    assert parts["context"].item() == pytest.approx(context.item(), rel=1e-10)
    assert_same(model, w, loss, pixels + 0.25 * context)


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("mr-croco", ["prepare.pair=false"], "prepare.pair is False; true was expected, for student.decoder pair"),
        ("lut", ["prepare.pair=false"], "true was expected, for mask.sampler pair_disjoint"),
        ("mr-mae", ["terms.mimic.of=other"], "true was expected, for terms.mimic.views and .of"),
        ("mr-croco", ["terms.mimic.of=other"], "cls or pooled was expected with of other"),
        ("croco", ["terms.pixels.views=both"], "first was expected with a decoder's tap"),
        ("croco", ["mask.masks_per_image=2"], "1 was expected with prepare.pair"),
        ("lut", ["terms.pixels.of=other"], "same was expected with target pixels"),
    ],
)
def test_what_does_not_pair_is_refused(tiny_recipe: MakeRecipe, name: str, overrides: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tiny_recipe(name, *overrides)


def test_a_batch_without_partners_is_refused(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    model = build_model(tiny_recipe("croco"), tiny_info())
    batch = replace(tiny_batch(model.info), partner=None)
    with pytest.raises(ValueError, match="the batch has no partners"):
        model(batch, masks_for(model, batch))
