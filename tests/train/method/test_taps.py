"""Positions: which tokens a term reads, and that several masks per image are several batches."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from mrmae.train.batches import visible_rows
from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import MaskRecipe, Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.taps import Tokens, tokens_at
from mrmae.train.method.targets import Batch, CacheInfo

MakeRecipe, MakeInfo, MakeBatch = Callable[..., Recipe], Callable[..., CacheInfo], Callable[..., Batch]


def taps_of_numbers() -> dict[str, Tokens]:
    """An encoder's [CLS 100 | visible 1, 4], a decoder's predicted 2, 7, and one that holds all of them."""
    keep, predict = torch.tensor([[1, 4]]), torch.tensor([[2, 7]])
    final = Tokens(torch.tensor([[[100.0], [1.0], [4.0]]]), keep, 1, 2)
    decoder = Tokens(torch.tensor([[[2.0], [7.0]]]), predict)
    whole = Tokens(torch.tensor([[[100.0], [1.0], [4.0], [2.0], [7.0]]]), torch.cat([keep, predict], 1), 1, 2)
    return {"final": final, "decoder": decoder, "whole": whole}


@pytest.mark.parametrize(
    ("taps", "positions", "values", "prefix", "visible"),
    [
        (("final",), "visible", [1, 4], 0, 2),
        (("final",), "cls", [100], 1, 0),
        (("final",), "cls+visible", [100, 1, 4], 1, 2),
        (("final",), "visible+cls", [100, 1, 4], 1, 2),
        (("final",), "pooled", [2.5], 1, 0),
        (("final",), "cls+pooled+visible", [100, 2.5, 1, 4], 2, 2),
        (("decoder",), "predicted", [2, 7], 0, 0),
        (("final", "decoder"), "cls+visible+predicted", [100, 1, 4, 2, 7], 1, 2),
        (("final", "decoder"), "all", [1, 4, 2, 7], 0, 2),
        (("whole",), "cls+all", [100, 1, 4, 2, 7], 1, 2),
        (("whole",), "predicted", [2, 7], 0, 0),
        (("whole",), "alive", [1, 4, 2, 7], 0, 2),
    ],
)
def test_positions_name_tokens_and_their_places(
    taps: tuple[str, ...], positions: str, values: list[float], prefix: int, visible: int
) -> None:
    found = tokens_at(taps_of_numbers(), taps, positions)
    assert found.x[0, :, 0].tolist() == values and (found.prefix, found.visible) == (prefix, visible)
    assert found.ids[0].tolist() == values[prefix:]


UNION = "terms.mimic={tap: final+decoder, positions: cls+visible+predicted, target: teachers, transform: ln0, distance: cosd, head: ln_linear}"


def test_one_head_over_encoder_and_decoder_is_the_mean_over_all_tokens(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    wide = "student.decoder.width=64"
    model = build_model(tiny_recipe("mr-mae", wide, UNION), info, dtype=torch.float64)
    batch = tiny_batch(info)
    masks = draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=16)
    _, parts = model(batch, masks)
    taps = model.taps(batch, masks)
    for teacher in ("clip", "dino"):
        about, arrays = info.teachers[teacher], batch.targets[teacher]
        values = arrays["tokens"].double()
        if about.has_scale:
            values = (
                values * arrays["scale"].double()[..., None] * about.channel_std.double() + about.channel_mean.double()
            )
        ids = torch.cat([masks.ids_keep, masks.ids_predict], 1)
        target = torch.cat(
            [arrays["cls"].double()[:, None], values.gather(1, ids[..., None].expand(-1, -1, about.width))], 1
        )
        target = torch.nn.functional.layer_norm(target, (about.width,), eps=1e-5)
        prediction = model.heads[f"mimic/{teacher}"](torch.cat([taps["final"].x, taps["decoder"].x], 1))
        expected = (1 - torch.cosine_similarity(prediction, target, dim=2)).mean()
        assert parts[f"mimic/{teacher}"].item() == pytest.approx(expected.item(), abs=1e-7)


def test_pooled_tokens_predict_the_mean_over_the_teachers_grid(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    term = (
        "terms.pool={tap: final, positions: pooled, target: teachers, teachers: [dino], transform: ln0, distance: mse}"
    )
    model = build_model(tiny_recipe("mae", term, "mask.masks_per_image=2"), info, dtype=torch.float64)
    batch = tiny_batch(info)
    masks = draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=16)
    found = model(batch, masks)[1]["pool/dino"]
    target = batch.targets["dino"]["tokens"].double().mean(1, keepdim=True).repeat(2, 1, 1)
    target = torch.nn.functional.layer_norm(target, (12,), eps=1e-5)
    pooled = model.taps(batch, masks)["final"].x[:, 1:].mean(1, keepdim=True)
    expected = (model.heads["pool/dino"](pooled) - target).square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("mask", ["mask={sampler: quarters, masks_per_image: 4}", "mask={masks_per_image: 3}",
                                  "mask={sampler: disjoint, ratio: 0.6, cell: 2, masks_per_image: 2}"])  # fmt: skip
@pytest.mark.parametrize("name", ["mr-mae", "mr-mcmae"])
@pytest.mark.parametrize("gathered", [False, True])
def test_several_masks_per_image_are_the_mean_over_batches_with_one(
    tiny_recipe: MakeRecipe,
    info_of_recipe: Callable[[str], CacheInfo],
    tiny_batch: MakeBatch,
    name: str,
    mask: str,
    gathered: bool,
) -> None:
    info = info_of_recipe(name)
    model = build_model(tiny_recipe(name, mask), info, dtype=torch.float64)
    batch = tiny_batch(info, 3)
    masks = draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=info.n_patches)
    rows = model.recipe.mask.masks_per_image
    whole = model((visible_rows(batch, masks) if gathered else batch), masks)[0]
    ones = [model(batch, Masks(k, p))[0] for k, p in zip(masks.ids_keep.chunk(rows), masks.ids_predict.chunk(rows))]
    assert whole.item() == pytest.approx(torch.stack(ones).mean().item(), abs=1e-12)
    grads = [torch.autograd.grad(loss, model.heads["pixels"].weight)[0] for loss in (whole, torch.stack(ones).mean())]
    assert torch.allclose(*grads, atol=1e-12)


def test_weights_of_a_mask_weigh_predicted_patches_in_each_image(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    model = build_model(tiny_recipe("mae", "terms.pixels.weighted=true"), info, dtype=torch.float64)
    batch = tiny_batch(info)
    masks = draw_masks(batch, Draw(0, 0), recipe=MaskRecipe(), l=16)
    with pytest.raises(ValueError, match="weighted and the masks have no weights"):
        model(batch, masks)
    weight = torch.zeros(2, 12, dtype=torch.float64)
    weight[0, 3], weight[0, 5] = 1, 3  # the second image has none
    found = model(batch, dataclasses.replace(masks, weight=weight))[0]
    patches = model.patches(batch, masks.ids_predict)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    errors = (model.heads["pixels"](model.taps(batch, masks)["decoder"].x) - target).square().mean(2)
    expected = (errors[0, 3] + 3 * errors[0, 5]) / 4 / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_covered_part_counts_again_through_the_same_head(
    tiny_recipe: MakeRecipe, info_of_recipe: Callable[[str], CacheInfo], tiny_batch: MakeBatch
) -> None:
    """FSFM: the mean over hidden patches, and 0.007 times the mean over those of the covered part."""
    info = info_of_recipe("fsfm")
    model = build_model(tiny_recipe("fsfm", "terms.mimic=null"), info, dtype=torch.float64)
    batch = tiny_batch(info, 6)
    masks = draw_masks(batch, Draw(0, 1), recipe=model.recipe.mask, l=16)
    assert model.heads["covered"] is model.heads["pixels"] and masks.weight is not None
    patches = model.patches(batch, masks.ids_predict)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    errors = (model.heads["pixels"](model.taps(batch, masks)["decoder"].x) - target).square().mean(2)
    again = [e[w > 0].mean() if w.any() else e.sum() * 0 for e, w in zip(errors, masks.weight)]
    expected, found = errors.mean() + 0.007 * torch.stack(again).mean(), model(batch, masks)[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-10) and found.item() != errors.mean().item()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, two in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected))):
        assert torch.allclose(one, two, atol=1e-10)


def test_a_placed_block_is_its_formulas_in_loss_and_gradients(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    """UMT: the encoder's final norm of a block, the positions again, Linear, LayerNorm; 2 - 2 cos of visible patches."""
    term = "terms.mimic={tap: placed2, positions: visible, head: linear_ln, target: teachers, teachers: [dino], distance: 2-2cos}"
    student = ["student.cls=false", "student.positions=sinusoid", "student.qkv_bias=qv"]
    info = tiny_info()
    model = build_model(tiny_recipe("mimic-only", term, *student), info, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (
                0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * parameter.requires_grad
            )
    batch = tiny_batch(info)
    masks = draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=16)
    loss, _ = model(batch, masks)

    def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-6).sqrt() * weight + bias

    assert len(model.student.blocks) == 2 and model.student.pos_embed is not None
    _, blocks, *_ = model.encode(batch.pixels, masks.ids_keep)
    own, (linear, last) = model.student.norm, model.heads["mimic/dino"].children()
    each = []
    for i, row in enumerate(masks.ids_keep):
        for j, patch in enumerate(row):
            waves = [(math.cos if c % 2 else math.sin)(int(patch) / 10000 ** (2 * (c // 2) / 64)) for c in range(64)]
            u = norm(blocks[2][i, j], own.weight, own.bias) + torch.tensor(waves, dtype=torch.float64)
            u = norm(linear.weight @ u + linear.bias, last.weight, last.bias)
            y = batch.targets["dino"]["tokens"][i, patch].double()
            each.append(2 - 2 * (u @ y) / (u.norm() * y.norm()))
    expected = torch.stack(each).mean()
    assert abs(loss - expected) < 1e-10
    trained = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)):
        assert (ours - theirs).abs().max() < 1e-10
