"""Targets that an encoder in the step gives: each restated plainly in float64, loss and gradients."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from method_math import (
    assert_same,
    block,
    cosine,
    encoder,
    leave_start,
    line,
    masks_for,
    moved,
    norm,
    regressor,
    two_linears,
)
from torch import Tensor

from mrmae.train.method.masks import Masks
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.student import POSITION_TABLES
from mrmae.train.method.targets import Batch, CacheInfo
from mrmae.train.optim import momentum_at

MakeRecipe = Callable[..., Recipe]
MakeInfo = Callable[..., CacheInfo]
MakeBatch = Callable[..., Batch]
ALIGN = "terms.align={tap: decoder, positions: predicted, head: none, target: self, weight: 2.0}"
IDS = "terms.ids={tap: decoded, positions: predicted, target: map, map: ids, classes: 11, distance: ce}"
DEEP = "terms.deep={tap: decoded, positions: predicted, target: pixels, transform: norm_pix}"


@pytest.mark.parametrize("width", [64, 16])
def test_the_student_as_its_own_target_is_caes(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch, width: int
) -> None:
    """ce(ids) of blocks over t and positions + 2 mse(t, sg encoder([CLS; hidden])[1:]); of another width behind a Linear and LN."""
    told = (
        f"student.decoder.width={width}",
        "student.decoder.behind=2",
        "terms.ids.classes=1025",
        "student.drop_path=0",
    )
    info = replace(tiny_info(), maps={"ids": "uint16"})
    model = build_model(tiny_recipe("cae", *told), info, dtype=torch.float64)
    w, batch = moved(model), tiny_batch(model.info)
    masks = masks_for(model, batch)
    loss, parts = model(batch, masks)

    def seen(ids: Tensor) -> Tensor:
        final = encoder(model, w, batch.pixels, ids)
        return final if width == 64 else norm(line(final, w, "decoder.embed.0"), w, "decoder.embed.1")

    t = regressor(model, w, seen(masks.ids_keep), masks)
    align = (t - seen(masks.ids_predict)[:, 1:].detach()).square().mean()
    z = t + POSITION_TABLES["sincos_cae"]((4, 4), width)[1:][masks.ids_predict]
    for i in range(2):
        z = block(z, w, f"decoder.behind.{i}", 2)
    logits = line(norm(z, w, "decoder.behind.2"), w, "heads.ids")
    truth = batch.targets["map:ids"]["map"].long().gather(1, masks.ids_predict)
    ids = -(logits.exp() / logits.exp().sum(-1, keepdim=True)).gather(2, truth[..., None]).log().mean()
    assert parts["align"].item() == pytest.approx(align.item(), rel=1e-10)
    assert parts["ids"].item() == pytest.approx(ids.item(), rel=1e-10)
    assert_same(model, w, loss, 2 * align + ids)
    assert torch.equal(model.decoder.behind[0].attn.qkv.bias.grad[width : 2 * width], torch.zeros(width).double())  # type: ignore


def test_the_students_own_target_drops_no_branch_and_gives_no_gradient(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    model = build_model(tiny_recipe("cae-v2", ALIGN, "student.drop_path=0.9"), tiny_info())
    batch = tiny_batch(model.info)
    masks = masks_for(model, batch)
    train, still = (m.own_targets(batch, masks)["target/align"].x for m in (model.train(), model.eval()))
    assert torch.equal(train, still) and not train.requires_grad


# ---- a copy that follows

FOLLOWED = "terms.ctx={tap: final, positions: pooled, head: predictor, target: ema, distance: 2-2cos, weight: 0.25}"


def test_a_followers_target_is_luts(tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch) -> None:
    """2 - 2 cos of the predictor on the mean of visible patches, batch statistics, and of the copy's projector on the whole view, running ones."""
    model = build_model(tiny_recipe("mae", FOLLOWED), tiny_info(), dtype=torch.float64)
    leave_start(model)
    w, batch = moved(model), tiny_batch(model.info, 3)
    masks = masks_for(model, batch)
    loss, parts = model(batch, masks)
    seen = encoder(model, w, batch.pixels, masks.ids_keep)[:, 1:].mean(1)
    q = two_linears(two_linears(seen, w, "heads.ctx.projector"), w, "heads.ctx.predictor")
    whole = encoder(model, w, batch.pixels, torch.arange(16).expand(3, -1), "follower.student")[:, 1:].mean(1)
    k = two_linears(whole, w, "follower.projectors.ctx", w).detach()
    ctx = (2 - 2 * cosine(q, k)).mean()
    assert parts["ctx"].item() == pytest.approx(ctx.item(), rel=1e-10)
    heads = {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(("heads.ctx", "student.blocks.0")) and p.requires_grad
    }
    found = torch.autograd.grad(loss - model_without(model, batch, masks), list(heads.values()))
    for name, ours, theirs in zip(heads, found, torch.autograd.grad(0.25 * ctx, [w[name] for name in heads])):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm() + 1e-13, name
    norm1 = model.get_submodule("heads.ctx.projector.1")
    x = line(seen, w, "heads.ctx.projector.0")
    assert torch.allclose(norm1.running_mean, 0.1 * x.mean(0), atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(norm1.running_var, 0.9 + 0.1 * x.var(0), atol=1e-12)  # type: ignore[arg-type]


def model_without(model: Pretrainer, batch: Batch, masks: Masks) -> Tensor:
    """The loss of all other terms."""
    terms, model.terms = model.terms, tuple(term for term in model.terms if term.name != "ctx")
    loss, _ = model(batch, masks)
    model.terms = terms
    return loss


def test_the_copy_follows_weights_and_statistics_but_no_counters_and_never_trains(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    model = build_model(tiny_recipe("mae", FOLLOWED), tiny_info(), dtype=torch.float64)
    copied, own = model.follower, dict(model.named_parameters()) | dict(model.named_buffers())
    assert copied is not None
    names = {
        name: name.replace("projectors.ctx", "heads.ctx.projector")
        for name, _ in [*copied.named_parameters(), *copied.named_buffers()]
    }
    state = copied.state_dict(keep_vars=True)
    assert all(torch.equal(state[name], own[names[name]]) for name in names)  # begins as the student
    before = {name: x.clone() for name, x in state.items()}
    moved(model)
    batch = tiny_batch(model.info)
    model.train()(batch, masks_for(model, batch))
    model.follow(0.75)
    for name, x in state.items():
        wanted = 0.75 * before[name] + 0.25 * own[names[name]] if x.is_floating_point() else before[name]
        assert torch.allclose(x, wanted, rtol=0, atol=1e-14), name
    assert state["projectors.ctx.1.running_mean"].any() and not state["projectors.ctx.1.num_batches_tracked"]
    assert not any(p.requires_grad for p in copied.parameters()) and not any(m.training for m in copied.modules())


def test_its_momentum_rises_along_half_a_cosine() -> None:
    rises = [momentum_at(step, 1000, 0.996, 1.0) for step in (0, 250, 500, 1000)]
    assert rises == pytest.approx([0.996, 1 - 0.004 * (1 + math.sqrt(0.5)) / 2, 0.998, 1.0], abs=1e-15)


def test_one_token_has_no_variance(tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch) -> None:
    model = build_model(tiny_recipe("mae", FOLLOWED), tiny_info())
    batch = tiny_batch(model.info, 1)
    with pytest.raises(ValueError, match="batch norm has 1 token; 2 were expected"):
        model(batch, masks_for(model, batch))


# ---- what does not fit


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([ALIGN.replace("predicted", "visible")], "predicted was expected with target self"),
        ([ALIGN.replace("none", "linear, transform: channel")], "self, ema and numbers of a map: none, ln0 or l2"),
        (["terms.align={tap: final, positions: visible, head: none, target: teachers}"], "head none: tokens of width 64 and a target of 8"),
        ([FOLLOWED.replace("pooled", "alive")], "cls, pooled, visible, predicted or all was expected with target ema"),
        (["optim.ema=[0.9, 1.1]"], "two numbers in .0, 1. were expected"),
        ([DEEP], "decoded is behind student.decoder.behind blocks"),
        (["terms.align=null", IDS.replace("decoded", "decoder")], "no map 'ids'; a map of ids .uint16. was expected; add it to the cache .* --map ids=FILE"),
        ([IDS.replace("decoded", "decoder").replace("ce}", "mse}")], "ce was expected with classes, of ids"),
        ([IDS.replace("decoded", "decoder").replace("11", "1")], "2 to 65536 was expected of a map of ids, else null"),
        (["terms.align.map=ids"], "the name of a map was expected with target map, else null"),
        (["student.decoder.behind=-1"], "0 was expected, or with decoder regressor"),
        (["student.decoder.kind=self", "student.decoder.behind=1"], "0 was expected, or with decoder regressor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, overrides: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        build_model(tiny_recipe("cae-v2", *overrides), tiny_info())
