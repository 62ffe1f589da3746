"""The model of every recipe: it builds, learns, repeats itself, compiles, draws, and refuses what does not fit."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mrmae.shards.stats import Stats
from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import Pretrainer, build_model, unpatchify
from mrmae.train.method.recipe import Recipe, recipe_names
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.targets import Batch, CacheInfo
from mrmae.train.method.terms import Term

MakeRecipe = Callable[..., Recipe]
MakeInfo = Callable[..., CacheInfo]
MakeBatch = Callable[..., Batch]
RECIPES = recipe_names()


def masks_of(model: Pretrainer, batch: Batch, epoch: int = 0) -> Masks:
    embedded = model.embedded(batch.pixels) if model.recipe.mask.sampler == "similarity" else None
    return draw_masks(batch, Draw(0, epoch), recipe=model.recipe.mask, l=model.info.n_patches, embedded=embedded)


def test_fp32_agrees_with_float64(tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch) -> None:
    info = tiny_info()
    exact, plain = (build_model(tiny_recipe("mr-mae"), info, dtype=dtype) for dtype in (torch.float64, torch.float32))
    batch = tiny_batch(info)
    masks = masks_of(plain, batch)
    assert plain(batch, masks)[0].item() == pytest.approx(exact(batch, masks)[0].item(), rel=1e-5)


# ---- every recipe


def cost_of_zero(term: Term, patch: int) -> float:
    """What a head that predicts nothing costs: mean squared error of a normalised target, or twice smooth-L1 of N(0, 1)."""
    if term.recipe.target == "pixels":
        return 1 - 1 / (3 * patch**2)
    if term.recipe.classes is not None:
        return math.log(term.recipe.classes)
    if term.recipe.target == "boxes":
        return 0.25
    if term.recipe.target == "none":
        return math.log(16) + 1.5  # of a mask token that says nothing, all attention on hidden patches
    if term.recipe.target == "sources":
        return math.log(15)  # all others alike
    if term.recipe.target in ("views", "labels"):
        return math.log(4 if term.recipe.target == "views" else 2)
    return {"mse": 1.0, "2*sl1(1)": 0.849, "sl1(1)": 0.425, "sl1(2)": 0.247, "cosd": 1.0, "2-2cos": 2.0}[
        term.recipe.distance
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_each_of_its_terms_learns_what_predicting_zero_does_not(
    tiny_recipe: MakeRecipe, info_of_recipe: Callable[[str], CacheInfo], tiny_batch: MakeBatch, name: str
) -> None:
    info = info_of_recipe(name)
    model = build_model(tiny_recipe(name, blocks=3), info)
    batch = tiny_batch(info, 4)
    masks = masks_of(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = model(batch, masks)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert all(part.dtype == torch.float32 and not part.requires_grad for part in parts.values())
    assert set(parts) == {term.name for term in model.terms}
    lr = 5e-4 if any(term.recipe.head == "mlp3_ln" for term in model.terms) else 5e-3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    losses, first = [loss.item()], parts
    for _ in range(16):
        loss, parts = model(batch, masks)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert losses[0] == pytest.approx(losses[1], rel=0.01)  # bf16 and fp32 at the same weights
    absolute = any(term.recipe.distance == "l1" for term in model.terms)  # its gradients are of one size, near or far
    if (
        absolute or model.recipe.mask.masks_per_image > 1
    ):  # nor are several masks of four noise images learnt by heart so soon
        assert losses[-1] < losses[0] and all(parts[name] < first[name] for name in parts), (losses, first, parts)
        return
    decoder = model.recipe.student.decoder
    pruned, pair = model.recipe.student.prune is not None, decoder is not None and decoder.kind == "pair"
    start = 2 if pruned or pair else 1  # a first step of this size overshoots there
    assert all(after < before for before, after in itertools.pairwise(losses[start:6])), losses
    for term in model.terms:  # features of visible patches are told by the patch itself; of hidden ones only guessed
        few = model.n_keep <= info.n_patches // 2 and term.recipe.views == "first"  # a partner is seen whole
        if term.recipe.relation:  # no prediction without an image to compare with
            assert parts[term.name] < 0.9 * first[term.name], term.name
            continue
        share = 0.5 if few and term.recipe.positions in ("visible", "cls+visible") else 1.0
        assert parts[term.name] < share * cost_of_zero(term, info.patch), term.name


@pytest.mark.parametrize(
    "overrides",
    [
        ["terms.mimic.tap=learned", "terms.mimic.head=mlp", "terms.mimic.distance=sl1(2)"],
        [
            "terms.mimic.tap=block3",
            "terms.mimic.head=ln_linear",
            "terms.mimic.transform=l2",
            "terms.mimic.distance=2-2cos",
        ],
        ["terms.cls={tap: final, positions: cls, target: teachers, transform: ln0, distance: cosd}"],
        ["terms.mimic.focus=true", "mask.n_predict=3", "terms.pixels.transform=none"],
        ["terms.mimic.tap=mix2", "terms.mimic.positions=cls+visible", "student.drop_path=0.2"],
        ["terms.mimic.teachers=[clip]", "mask.n_keep=7", "prepare={mean: [0.5], std: [0.25]}"],
    ],
)
def test_options_build_and_learn(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch, overrides: list[str]
) -> None:
    info = tiny_info(channels=1 if "prepare" in overrides[-1] else 3)
    model = build_model(tiny_recipe("mr-mae", *overrides), info)
    batch = tiny_batch(info, 4)
    masks = masks_of(model, batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before, _ = model(batch, masks)
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = model(batch, masks)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert model(batch, masks)[0] < before


def test_channel_statistics_normalise_the_target(
    tiny_recipe: MakeRecipe, tiny_batch: MakeBatch, tiny_info: MakeInfo
) -> None:
    info = tiny_info()
    clip = info.teachers["clip"].__class__(
        **{**vars(info.teachers["clip"]), "stats": Stats("", 1, torch.ones(16, 8), torch.eye(8) * 4)}
    )
    info = CacheInfo(info.size, info.grid, {"clip": clip})
    model = build_model(tiny_recipe("mr-mae", "terms.mimic.transform=channel"), info, dtype=torch.float64)
    model.heads["mimic/clip"].weight.data.zero_()
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    raw = batch.targets["clip"]
    value = (
        raw["tokens"].double() * raw["scale"].double()[..., None] * clip.channel_std.double()
        + clip.channel_mean.double()
    )
    kept = torch.stack([v[i] for v, i in zip(value, masks.ids_keep)])
    assert model(batch, masks)[1]["mimic/clip"].item() == pytest.approx(
        (((kept - 1) / 2) ** 2).mean().item(), rel=1e-12
    )


def test_equal_seeds_give_equal_models_and_shared_parts_start_equal_across_recipes(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo
) -> None:
    info = tiny_info()
    one, two, other, mae = (
        build_model(tiny_recipe(*r), info).state_dict()
        for r in [("mr-mae",), ("mr-mae",), ("mr-mae", "seed=1"), ("mae",)]
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(mae[name], one[name]) for name in mae) and len(mae) < len(one)
    for name in (
        "student.cls_token",
        "student.blocks.3.attn.qkv.weight",
        "decoder.mask_token",
        "heads.mimic/clip.weight",
    ):
        assert not torch.equal(one[name], other[name])


def test_mask_and_loss_of_an_image_do_not_depend_on_its_batch(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    model = build_model(tiny_recipe("mr-mae-focused"), info, dtype=torch.float64)
    batch = tiny_batch(info, 4)
    alone = []
    for i in range(4):
        rows = slice(i, i + 1)
        targets = {t: {name: x[rows] for name, x in arrays.items()} for t, arrays in batch.targets.items()}
        part = Batch(batch.samples[rows], batch.pixels[rows], targets)
        alone.append(model(part, masks_of(model, part))[0].item())
    together = model(batch, masks_of(model, batch))[0].item()
    assert together == pytest.approx(sum(alone) / 4, rel=1e-12)


def test_several_masks_per_image_are_rows_of_one_batch(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    model = build_model(tiny_recipe("mr-mae"), info, dtype=torch.float64)
    batch = tiny_batch(info)
    one, two = masks_of(model, batch, 0), masks_of(model, batch, 1)
    both = Masks(torch.cat([one.ids_keep, two.ids_keep]), torch.cat([one.ids_predict, two.ids_predict]))
    mean = (model(batch, one)[0] + model(batch, two)[0]) / 2
    assert model(batch, both)[0].item() == pytest.approx(mean.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mr-mae", ["terms.mimic.focus=true"]),
        ("mr-mcmae", ["terms.pixels=null"]),
        ("mr-mcmae", ["student.decoder.kind=cross", "student.decoder.weighted=true"]),
        ("mr-mae", ["student.decoder.kind=taps", "student.decoder.blocks=[1]"]),
        ("mr-mae", ["student.decoder.kind=regressor"]),
        ("milan", []),
        ("maskalign", ["terms.layer9=null", "terms.layer10=null", "terms.layer11=null", "student.drop_path=0.5"]),
    ],
)
def test_the_forward_compiles_to_one_graph(
    tiny_recipe: MakeRecipe,
    info_of_recipe: Callable[[str], CacheInfo],
    tiny_batch: MakeBatch,
    name: str,
    overrides: list[str],
) -> None:
    info = info_of_recipe(name)
    model = build_model(tiny_recipe(name, *overrides, blocks=3), info)
    if name == "mr-mae":
        model.student.blocks = model.student.blocks[:1]
    if name == "mr-mcmae":
        model.student.blocks2 = model.student.blocks2[:1]
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss, parts = compiled(batch, masks)
    plain, plain_parts = model(batch, masks)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert {n: p.item() for n, p in parts.items()} == pytest.approx(
        {n: p.item() for n, p in plain_parts.items()}, rel=1e-6
    )


# ---- pictures and features


def test_a_perfect_prediction_reconstructs_the_image(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    model = build_model(tiny_recipe("mr-mae"), info, dtype=torch.float64)
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    truth = model.patches(batch, masks.ids_predict)
    target = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    guess = model.reconstruct(batch, masks)
    assert guess.shape == batch.pixels.shape and 0 <= guess.min() and guess.max() <= 1
    assert (guess - batch.pixels / 255).abs().max() > 0.05

    class Oracle(torch.nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return target

    model.heads["pixels"] = Oracle()
    assert (model.reconstruct(batch, masks) - batch.pixels.double() / 255).abs().max() < 1e-9


def test_a_reconstruction_alone_takes_nothing_from_hidden_patches(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    model = build_model(tiny_recipe("mr-mae"), info)
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    hidden = torch.ones(2, 16).scatter(1, masks.ids_keep, 0.0).reshape(2, 4, 4)
    hidden = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].bool()
    other = replace(batch, pixels=torch.where(hidden, batch.pixels // 2, batch.pixels))
    for alone in (False, True):
        same = torch.equal(*(model.reconstruct(b, masks, alone=alone) for b in (batch, other)))
        assert same == alone


def test_an_encoders_head_speaks_of_every_patch_and_a_decoders_of_the_hidden_ones(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    model = build_model(tiny_recipe("mr-mae"), info).eval()
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    mimic, pixels = model.terms[0], model.terms[-1]
    found = model.predicted(mimic, batch, masks)
    assert torch.equal(found.ids, torch.arange(16).expand(2, -1)) and found.prefix == 0
    assert torch.allclose(found.x, model.heads[mimic.name](model.tokens(batch.pixels)), atol=1e-6)
    assert torch.equal(model.predicted(pixels, batch, masks).ids, masks.ids_predict)


@pytest.mark.parametrize("name", RECIPES)
def test_heads_of_every_recipe_can_be_drawn(
    tiny_recipe: MakeRecipe, info_of_recipe: Callable[[str], CacheInfo], tiny_batch: MakeBatch, name: str
) -> None:
    model = build_model(tiny_recipe(name), info_of_recipe(name)).eval()
    batch = tiny_batch(model.info)
    masks = masks_of(model, batch)
    for term in model.terms:
        if term.recipe.target not in ("boxes", "none") and term.recipe.at("visible", "predicted", "all", "alive"):
            found = model.predicted(term, batch, masks)
            assert found.x.shape[:2] == found.ids.shape
            assert term.recipe.at("alive") or found.ids.shape[1] in (16, masks.ids_predict.shape[1])
            assert all(len(set(row)) == len(row) for row in found.ids.tolist()) and found.x.isfinite().all()


def test_visible_patches_stay_and_unknown_ones_are_grey(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info(4, 4)
    model = build_model(tiny_recipe("mr-mae", "mask.n_predict=5"), info)
    batch = tiny_batch(info, 1)
    masks = masks_of(model, batch)
    drawn, truth = model.reconstruct(batch, masks)[0], batch.pixels[0] / 255
    for patch in range(16):
        cell = (slice(patch // 4 * 4, patch // 4 * 4 + 4), slice(patch % 4 * 4, patch % 4 * 4 + 4))
        if patch in masks.ids_keep[0]:
            assert torch.allclose(drawn[cell], truth[cell], atol=1e-6)
        elif patch not in masks.ids_predict[0]:
            assert torch.allclose(drawn[cell], torch.tensor(0.5), atol=1e-6)


def test_a_recipe_without_pixels_draws_none(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    model = build_model(tiny_recipe("mimic-only"), tiny_info())
    batch = tiny_batch(model.info)
    assert model.decoder is None
    with pytest.raises(ValueError, match="predicts no pixels"):
        model.reconstruct(batch, masks_of(model, batch))


def test_tokens_of_the_whole_image_are_timms(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    model = build_model(tiny_recipe("mr-mae"), tiny_info())
    batch = tiny_batch(model.info)
    mean, std = torch.tensor(model.recipe.prepare.mean), torch.tensor(model.recipe.prepare.std)
    theirs = model.student.forward_features(((batch.pixels / 255 - mean) / std).permute(0, 3, 1, 2))[:, 1:]
    assert (model.tokens(batch.pixels) - theirs).abs().max() < 1e-5


# ---- what does not fit


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["terms.mimic.tap=block7"], r"reads the blocks \[7\]; numbers from 1 to 6"),
        (["terms.mimic.tap=mean_ln", "student.fused_blocks=[3, 12]"], "numbers from 1 to 6"),
        (["terms.mimic.tap=mean_ln", "student.fused_blocks=[]"], "numbers from 1 to 6"),
        (["mask.n_predict=0"], "the mask has none to predict"),
        (["mask.ratio=0.99"], "leaves 0 of 16 patches visible"),
        (["prepare={mean: [0.5], std: [0.5]}"], "prepare.mean has 1 numbers; the cache's images have 3 channels"),
        (["terms.mimic.teachers=[swin]"], "wants teacher 'swin'"),
        (["student.model=vit_bas_patch16_224"], "did you mean"),
        (["mask.sampler=attn_prob", "mask.source=swin"], "mask.source = swin"),
    ],
)
def test_recipe_and_cache_that_do_not_fit_are_refused(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, overrides: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        build_model(tiny_recipe("mr-mae", *overrides), tiny_info())


@pytest.mark.parametrize(("size", "grid"), [(16, (4, 2)), (18, (4, 4)), (16, (0, 0))])
def test_a_grid_that_does_not_fit_the_view_is_refused(
    tiny_recipe: MakeRecipe, size: int, grid: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="whole square patches"):
        build_model(tiny_recipe("mae", "mask.n_keep=1"), CacheInfo(size, grid))


def test_the_plan_tells_what_was_built(tiny_recipe: MakeRecipe, tiny_info: MakeInfo) -> None:
    told = build_model(tiny_recipe("mr-mae"), tiny_info(14, 2)).describe()
    assert "patch 2 at 28 px, grid 14 x 14" in told["student"]
    assert told["mask"] == "random: 49 of 196 patches visible, 147 predicted"
    assert told["term mimic/clip"] == "final @ visible > linear ~ clip | ln0 : mse * 0.5"
    assert told["term pixels"] == "decoder @ predicted > linear ~ pixels | norm_pix : mse * 1"


def test_unpatchify_puts_every_value_back() -> None:
    image = torch.arange(2 * 6 * 9 * 2).reshape(2, 6, 9, 2).float()
    patches = torch.stack(
        [image[:, r : r + 3, c : c + 3].permute(0, 3, 1, 2).flatten(1) for r in (0, 3) for c in (0, 3, 6)], dim=1
    )
    assert torch.equal(unpatchify(patches, (2, 3), 3), image)
