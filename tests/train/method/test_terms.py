"""Terms: targets and predictions meet at the same patches, distances have their scales, and gaps in a cache are named."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from mrmae.shards.stats import Stats
from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import MaskRecipe, Recipe, TermRecipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.taps import Tokens
from mrmae.train.method.targets import Batch, CacheInfo, TeacherInfo, TeacherStatistics
from mrmae.train.method.terms import (
    PixelScale,
    Term,
    bind_terms,
    focus_weights,
    mimic_errors,
    needed_arrays,
    patch_targets,
    score,
)

D = 8
SCALE, SHIFT = torch.ones(3), torch.zeros(3)


def loss_of(
    recipe: TermRecipe,
    prediction: torch.Tensor,
    codes: torch.Tensor,
    masks: Masks,
    *,
    patch: int = 4,
    **arrays: torch.Tensor,
) -> float:
    """One term on given predictions (they enter as the tap, through an identity head)."""
    b, l = codes.shape[:2]
    side = int(l**0.5) * patch
    pixels = arrays.pop("pixels", torch.zeros(b, side, side, 3, dtype=torch.uint8))
    batch = Batch(torch.arange(b), pixels, {"t": {"tokens": codes, **arrays}})
    teacher = None if recipe.target == "pixels" else "t"
    heads, statistics = (
        nn.ModuleDict({"x": nn.Identity()}),
        nn.ModuleDict({"x": TeacherStatistics(TeacherInfo(D), torch.float32)}),
    )
    cls = torch.full((prediction.shape[0], 1, prediction.shape[2]), 1e9)
    final = Tokens(torch.cat([cls, prediction], dim=1), masks.ids_keep, 1, prediction.shape[1])
    loss, parts = score(
        (Term("x", recipe, teacher, recipe.weight),),
        heads,
        statistics,
        {"final": final, "decoder": Tokens(prediction, masks.ids_predict)},
        batch,
        masks,
        pixels=PixelScale(patch, SCALE, SHIFT),
        source="mean",
        kernels="auto",
    )
    assert loss.item() == pytest.approx(recipe.weight * parts["x"].item())
    return parts["x"].item()


def of_index(b: int, l: int) -> torch.Tensor:
    """A token for every (image, patch) that no other shares."""
    index = torch.arange(b * l).reshape(b, l, 1).float()
    return torch.cat([index / 8, torch.sin(index * torch.arange(1, D))], dim=2)


def at(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[i] for row, i in zip(tokens, ids)])


VISIBLE = TermRecipe("final", "visible", "teachers")
PREDICTED = TermRecipe("decoder", "predicted", "teachers")


@pytest.mark.parametrize(
    "recipe", [MaskRecipe(), *(MaskRecipe(sampler="attn_prob", draw=d) for d in ("prob", "softmax_prob", "topk"))]
)
@pytest.mark.parametrize("positions", ["visible", "predicted", "pixels"])
@pytest.mark.parametrize("n_predict", [None, 5])
def test_gather_identity(recipe: MaskRecipe, positions: str, n_predict: int | None) -> None:
    """Target = function of the grid index, prediction = the same function at the ids: the loss is exactly 0, shuffled it is not."""
    b, l, patch = 3, 16, 4
    tokens, attention = of_index(b, l), torch.rand(b, l)
    masks = draw_masks(
        Batch(torch.arange(b) * 7, torch.empty(0), {"t": {"attention": attention}}),
        Draw(0, 1),
        recipe=replace(recipe, n_predict=n_predict),
        l=l,
    )
    shuffled = tokens.roll(1, dims=1)
    if positions == "pixels":
        pixels = torch.randint(0, 256, (b, 16, 16, 3), dtype=torch.uint8)
        cells = (
            pixels.reshape(b, 4, patch, 4, patch, 3).permute(0, 1, 3, 5, 2, 4).reshape(b, l, -1).float()
        )  # (c, p, q)
        term = TermRecipe("decoder", "predicted", "pixels")
        assert loss_of(term, at(cells, masks.ids_predict), tokens, masks, pixels=pixels) == 0.0
        assert loss_of(term, at(cells.roll(1, dims=1), masks.ids_predict), tokens, masks, pixels=pixels) > 100
        return
    term, ids = (VISIBLE, masks.ids_keep) if positions == "visible" else (PREDICTED, masks.ids_predict)
    assert loss_of(term, at(tokens, ids), tokens, masks) == 0.0
    assert loss_of(term, at(tokens, ids), shuffled, masks) > 1e-3
    assert loss_of(term, at(tokens, ids.flip(1)), tokens, masks) > 1e-3


def test_gather_identity_for_cls_and_for_rows_gathered_before_the_copy() -> None:
    b, l = 2, 16
    tokens = of_index(b, l)
    masks = draw_masks(Batch(torch.arange(b), torch.empty(0), {}), Draw(0, 0), recipe=MaskRecipe(), l=l)
    heads, statistics = (
        nn.ModuleDict({"x": nn.Identity()}),
        nn.ModuleDict({"x": TeacherStatistics(TeacherInfo(D), torch.float32, cls=True)}),
    )
    batch = Batch(torch.arange(b), torch.zeros(b, 16, 16, 3, dtype=torch.uint8), {"t": {"cls": tokens[:, 3]}})

    def run(recipe: TermRecipe, tap: torch.Tensor, batch: Batch) -> float:
        common = {"pixels": PixelScale(4, SCALE, SHIFT), "source": "mean", "kernels": "auto"}
        taps = {"final": Tokens(tap, masks.ids_keep, 1, tap.shape[1] - 1)}
        loss, _ = score((Term("x", recipe, "t", 1.0),), heads, statistics, taps, batch, masks, **common)  # type: ignore[arg-type]
        return loss.item()

    tap = torch.cat([tokens[:, 3:4], at(tokens, masks.ids_keep)], dim=1)
    cls = TermRecipe("final", "cls", "teachers")
    assert run(cls, tap, batch) == 0.0
    assert run(cls, tap.flip(1), batch) > 1e-3
    both = replace(batch, targets={"t": {"cls": tokens[:, 3], "tokens": tokens}})
    cls_visible = TermRecipe("final", "cls+visible", "teachers")
    assert run(cls_visible, tap, both) == 0.0
    assert run(cls_visible, tap.roll(1, dims=1), both) > 1e-3
    without_cls = torch.cat([tap[:, 1:2] + 1, tap[:, 1:]], dim=1)  # CLS is one token among n_keep + 1
    alone = run(cls, without_cls, both)
    assert run(cls_visible, without_cls, both) == pytest.approx(alone / 5)
    gathered = replace(batch, targets={"t": {"tokens": at(tokens, masks.ids_keep)}}, rows="visible")
    assert run(VISIBLE, tap, gathered) == 0.0
    assert run(VISIBLE, tap.roll(1, dims=0), gathered) > 1e-3


@pytest.mark.parametrize(
    ("distance", "at_1", "at_4", "of_zero"),
    [("mse", 1, 16, 1.0), ("sl1(1)", 0.5, 3.5, 0.425), ("sl1(2)", 0.25, 3, 0.247), ("2*sl1(1)", 1, 7, 0.849)],
)
def test_distances_have_the_scales_of_the_table(distance: str, at_1: float, at_4: float, of_zero: float) -> None:
    masks = Masks(torch.arange(4)[None], torch.empty(1, 0, dtype=torch.int64))
    recipe = replace(VISIBLE, distance=distance)  # type: ignore[arg-type]
    codes = torch.zeros(1, 4, D)
    assert loss_of(recipe, codes + 1, codes, masks) == pytest.approx(at_1)
    assert loss_of(recipe, codes - 4, codes, masks) == pytest.approx(at_4)
    many = Masks(torch.arange(2500)[None], torch.empty(1, 0, dtype=torch.int64))
    noise = torch.randn(1, 2500, D, generator=torch.Generator().manual_seed(0))
    assert loss_of(recipe, torch.zeros_like(noise), noise, many, patch=1) == pytest.approx(of_zero, rel=0.03)


@pytest.mark.parametrize(
    ("distance", "beta", "tail"), [("sl1(1)", 1.0, 1.0), ("sl1(2)", 2.0, 1.0), ("2*sl1(1)", 1.0, 2.0)]
)
def test_smooth_l1_has_no_kink_and_the_tables_slope_in_its_tail(distance: str, beta: float, tail: float) -> None:
    recipe = replace(VISIBLE, distance=distance)  # type: ignore[arg-type]
    masks, codes, step = Masks(torch.arange(4)[None], torch.empty(1, 0, dtype=torch.int64)), torch.zeros(1, 4, D), 2**-9

    def slope(e: float) -> float:
        ahead, behind = (loss_of(recipe, codes + e + d, codes, masks) for d in (step, -step))
        return (ahead - behind) / (2 * step)

    assert slope(beta - step) == pytest.approx(slope(beta + step), rel=0.01)
    assert slope(2 * beta) == pytest.approx(tail, rel=1e-3)
    assert slope(beta / 2) == pytest.approx(tail / 2, rel=1e-3)


@pytest.mark.parametrize(("distance", "factor"), [("cosd", 1), ("2-2cos", 2)])
def test_cosine_distances(distance: str, factor: float) -> None:
    masks = Masks(torch.arange(4)[None], torch.empty(1, 0, dtype=torch.int64))
    recipe = replace(VISIBLE, distance=distance)  # type: ignore[arg-type]
    x = torch.eye(D)[:4][None]
    assert loss_of(recipe, 3 * x, x, masks) == pytest.approx(0, abs=1e-6)
    assert loss_of(recipe, x.roll(1, dims=1), x, masks) == pytest.approx(factor)
    assert loss_of(recipe, -x, x, masks) == pytest.approx(2 * factor)


@pytest.mark.parametrize(
    "transform", ["none", "ln0", "l2", "channel", "phi_s", "position", "position+ln0", "position+phi_s"]
)
@pytest.mark.parametrize("distance", ["mse", "2-2cos"])
def test_who_predicts_the_targets_that_pictures_show_has_no_loss(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch],
    transform: str, distance: str,
) -> None:  # fmt: skip
    info = tiny_info()
    known = {name: replace(about, stats=Stats("", 1, torch.randn(16, about.width), torch.eye(about.width) + 0.1))
             for name, about in info.teachers.items()}  # fmt: skip
    info = replace(info, teachers=known)
    recipe = tiny_recipe("mimic-only", f"terms.mimic.transform={transform}", f"terms.mimic.distance={distance}")
    model, batch = build_model(recipe, info), tiny_batch(info)
    for term in model.terms:
        shown = patch_targets(term, model.statistics[term.name], batch)
        ids = torch.tensor([[1, 5, 9], [0, 2, 15]])
        errors = [mimic_errors(Tokens(at(x, ids), ids), term, model.statistics[term.name], batch, model.pixels, "auto")
                  for x in (shown, shown.flip(1))]  # fmt: skip
        assert errors[0].abs().max() < 1e-5 and errors[1].mean() > 0.01


def test_an_ln0_target_has_variance_1_and_ignores_a_scale_per_token() -> None:
    masks = Masks(torch.arange(4)[None], torch.empty(1, 0, dtype=torch.int64))
    recipe, tokens = replace(VISIBLE, transform="ln0"), 100 * torch.randn(1, 4, D)
    zero = torch.zeros_like(tokens)
    assert loss_of(recipe, zero, tokens, masks) == pytest.approx(1.0, abs=1e-5)
    assert loss_of(recipe, zero + 3, tokens, masks) == pytest.approx(10.0, abs=1e-3)  # mean 0: 1 + 3^2
    assert loss_of(recipe, tokens / 100, tokens * torch.rand(1, 4, 1).add(0.5), masks) == pytest.approx(
        loss_of(recipe, tokens / 100, tokens, masks), rel=1e-4
    )


def test_a_zero_prediction_of_normalised_pixels_costs_767_of_768() -> None:
    recipe = TermRecipe("decoder", "predicted", "pixels", transform="norm_pix")
    masks = Masks(torch.tensor([[0]]), torch.tensor([[1, 2, 3]]))
    codes = torch.zeros(1, 4, D)
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    zero = torch.zeros(1, 3, 768)
    assert loss_of(recipe, zero, codes, masks, patch=16, pixels=pixels) == pytest.approx(767 / 768, abs=1e-6)
    flat = torch.full_like(pixels, 77)
    assert loss_of(recipe, zero, codes, masks, patch=16, pixels=flat) == 0.0
    assert loss_of(recipe, zero + 2, codes, masks, patch=16, pixels=flat) == pytest.approx(4.0)


def test_teachers_share_a_terms_weight_or_carry_their_own(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo]
) -> None:
    bound = {term.name: term.weight for term in bind_terms(tiny_recipe("mr-mae"), tiny_info())}
    assert bound == {"mimic/clip": 0.5, "mimic/dino": 0.5, "pixels": 1.0}
    one = {
        term.name: term.weight for term in bind_terms(tiny_recipe("mr-mae", "terms.mimic.teachers=[dino]"), tiny_info())
    }
    assert one == {"mimic/dino": 1.0, "pixels": 1.0}
    own = tiny_recipe(
        "mr-mae",
        "terms.mimic.teachers=[clip]",
        "terms.second={tap: final, positions: visible, target: teachers, teachers: [dino], transform: ln0, weight: 0.25}",
    )
    assert {term.name: term.weight for term in bind_terms(own, tiny_info())} == {
        "mimic/clip": 1.0,
        "pixels": 1.0,
        "second/dino": 0.25,
    }


def test_focus_weighs_visible_tokens_by_saliency_with_mean_1() -> None:
    attention = torch.rand(2, 16)
    batch = Batch(torch.arange(2), torch.zeros(2, 16, 16, 3, dtype=torch.uint8), {"t": {"attention": attention}})
    keep = torch.tensor([[0, 3, 9], [1, 2, 15]])
    weights = focus_weights(batch, keep, PixelScale(4, SCALE, SHIFT), "mean")
    picked = at(attention.double(), keep)
    assert torch.allclose(weights, picked / picked.mean(dim=1, keepdim=True), atol=1e-5)
    codes = torch.zeros(2, 16, D)
    errors = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]).expand(2, 3, D)
    found = loss_of(replace(VISIBLE, focus=True), errors, codes, Masks(keep, keep), attention=attention)
    assert found == pytest.approx((weights * errors[..., 0].double() ** 2).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides", "needed"),
    [
        ("mae", [], {}),
        ("mr-mae", [], {"clip": {"tokens", "scale"}, "dino": {"tokens"}}),
        ("mr-mae-focused", [], {"clip": {"tokens", "scale", "attention"}, "dino": {"tokens", "attention"}}),
        ("mr-mae-focused", ["mask.source=norm:clip"], {"clip": {"tokens", "scale", "norm"}, "dino": {"tokens"}}),
        ("mae", ["mask.sampler=attn_prob", "mask.source=dino"], {"dino": {"attention"}}),
        (
            "mr-mae",
            ["terms.mimic.focus=true", "mask.source=clip"],
            {"clip": {"tokens", "scale", "attention"}, "dino": {"tokens"}},
        ),
        ("mr-mae", ["terms.mimic.positions=cls", "terms.mimic.teachers=[clip]"], {"clip": {"cls"}}),
    ],
)
def test_only_the_arrays_a_recipe_needs_are_asked_for(
    tiny_recipe: Callable[..., Recipe],
    tiny_info: Callable[..., CacheInfo],
    name: str,
    overrides: list[str],
    needed: dict[str, set[str]],
) -> None:
    assert needed_arrays(tiny_recipe(name, *overrides), tiny_info()) == needed


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["terms.mimic.teachers=[swin]"],
            "wants teacher 'swin'; the cache has cnn.last; .*extract-features.*--teacher swin=",
        ),
        (["terms.mimic.positions=cls"], "wants the CLS token of teacher 'cnn'"),
        (["terms.mimic.transform=channel"], "transform channel wants statistics of teacher 'cnn'"),
        (["terms.mimic.transform=phi_s"], "transform phi_s wants statistics of teacher 'cnn'"),
        (
            ["terms.mimic.teacher_tap=block_8"],
            r"wants tap block_8 of a teacher; the cache has cnn.last; .*--teacher NAME=LIBRARY:MODEL\?tap=block_8",
        ),
        (["terms.mimic.teacher_tap=block_8", "terms.mimic.teachers=[cnn]"], "wants tap block_8 of teacher 'cnn'"),
        (["mask.sampler=attn_prob"], "mask.source = mean: the cache has cnn, with attention: none"),
        (["terms.mimic.focus=true"], "with attention: none"),
    ],
)
def test_what_a_cache_lacks_is_named_with_how_to_add_it(
    tiny_recipe: Callable[..., Recipe], overrides: list[str], told: str
) -> None:
    cnn = CacheInfo(16, (4, 4), {"cnn": TeacherInfo(8, column="cnn.last")})
    with pytest.raises(ValueError, match=told):
        needed_arrays(tiny_recipe("mr-mae", *overrides), cnn)


def test_a_cache_without_teachers_serves_mae_only(tiny_recipe: Callable[..., Recipe]) -> None:
    empty = CacheInfo(16, (4, 4))
    assert needed_arrays(tiny_recipe("mae"), empty) == {}
    with pytest.raises(ValueError, match="the cache has none.*extract-features"):
        needed_arrays(tiny_recipe("mr-mae"), empty)


def test_names_that_torch_uses_are_refused_for_terms_and_harmless_for_teachers(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo]
) -> None:
    pixels = "terms.keys={tap: decoder, positions: predicted, target: pixels}"
    with pytest.raises(ValueError, match="term keys: torch uses this name itself"):
        bind_terms(tiny_recipe("mae", pixels), tiny_info())
    odd = CacheInfo(16, (4, 4), {"values": TeacherInfo(8), "train": TeacherInfo(8)})
    assert set(build_model(tiny_recipe("mr-mae"), odd).heads) == {"mimic/values", "mimic/train", "pixels"}


def test_statistics_of_the_wrong_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"column x: channel_std has shape \[7\]; \[8\] was expected"):
        TeacherStatistics(TeacherInfo(8, channel_std=torch.ones(7), column="x"), torch.float32)


def test_a_batch_moves_whole(tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]) -> None:
    moved = tiny_batch(tiny_info()).to("meta")
    tensors = [moved.samples, moved.pixels, *(x for arrays in moved.targets.values() for x in arrays.values())]
    assert {x.device.type for x in tensors} == {"meta"}
