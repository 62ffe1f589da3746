"""Mixing: four images share the grid once, the loss is its formula, and nothing depends on how a batch is split."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import train_quietly

from mrmae.shards.cache import open_cache
from mrmae.train import cost
from mrmae.train.method import Draw, Recipe, build_model, draw_masks
from mrmae.train.method.masks import Masks
from mrmae.train.method.recipe import load_recipe
from mrmae.train.method.targets import Batch, CacheInfo
from mrmae.train.ranks import Ranks
from mrmae.train.run import build_run
from mrmae.train.setup import Setup


def restated_loss(model: torch.nn.Module, batch: Batch, masks: Masks) -> Tensor:
    """MixedAE's loss, sequence by sequence, from embeddings to both terms (timm's blocks and the decoder are taken as they are)."""
    vit, decoder, patch = model.student, model.decoder, 4
    image = batch.pixels.double() * model.scale + model.shift
    cells = image.unfold(1, patch, patch).unfold(2, patch, patch).flatten(1, 2)  # b l c p q
    pixel_costs, token_costs = [], []
    for first in range(0, len(image), 4):
        tokens, owner = [], []
        for k in range(4):
            for at in masks.ids_keep[first + k].tolist():
                embedded = (
                    vit.patch_embed.proj.weight.flatten(1) @ cells[first + k, at].flatten() + vit.patch_embed.proj.bias
                )
                tokens.append(embedded + vit.pos_embed[0, 1 + at] + model.source_tokens[0, k])
                owner.append(k)
        x = torch.stack([vit.cls_token[0, 0] + vit.pos_embed[0, 0], *tokens])[None]
        for block in vit.blocks:
            x = block(x)
        x = vit.norm(x)[0]
        z = F.normalize(x[1:] @ model.heads["homologous"].weight.T + model.heads["homologous"].bias, dim=1)
        for i in range(16):
            others = [a for a in range(16) if a != i]
            total = sum(torch.exp(z[i] @ z[a] / 0.25) for a in others)
            same = [p for p in others if owner[p] == owner[i]]
            token_costs.append(-sum(torch.log(torch.exp(z[i] @ z[p] / 0.25) / total) for p in same) / len(same))
        for k in range(4):
            own, absent = masks.ids_keep[first + k].tolist(), masks.ids_predict[first + k].tolist()
            seen = (
                torch.stack([x[0], *(x[1 + 4 * k + i] for i in range(4))]) @ decoder.embed.weight.T + decoder.embed.bias
            )
            places = torch.cat([torch.zeros_like(decoder.position[:1]), decoder.position[own]])
            hidden = decoder.mask_token[0] + decoder.position[absent]
            y = decoder.norm(decoder.blocks(torch.cat([seen + places, hidden])[None]))[0, 5:]
            told = y @ model.heads["pixels"].weight.T + model.heads["pixels"].bias
            for row, at in enumerate(absent):
                goal = cells[first + k, at].flatten()
                goal = (goal - goal.mean()) / (goal.var() + 1e-6).sqrt()
                pixel_costs.append(((told[row] - goal) ** 2).mean())
    return torch.stack(pixel_costs).mean() + 0.1 * torch.stack(token_costs).mean()


@pytest.fixture
def made(tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]):  # type: ignore[no-untyped-def]
    """(model in float64, a batch of eight, its masks)."""
    info, recipe = tiny_info(), tiny_recipe("mixedae")
    batch = tiny_batch(info, 8)
    model = build_model(recipe, info, dtype=torch.float64)
    return model, batch, draw_masks(batch, Draw(0, 2), recipe=recipe.mask, l=16)


def test_the_loss_is_its_formula_with_gradients(made) -> None:  # type: ignore[no-untyped-def]
    model, batch, masks = made
    loss, _ = model(batch, masks)
    loss.backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in weights]
    again = restated_loss(model, batch, masks)
    assert abs(float((loss - again).detach())) < 1e-10
    for one, two in zip(found, torch.autograd.grad(again, weights)):
        assert torch.allclose(one, two, atol=1e-10, rtol=1e-8)


def test_a_group_shows_every_patch_of_the_grid_once_and_is_a_function_of_its_first_image(made) -> None:  # type: ignore[no-untyped-def]
    model, batch, masks = made
    for first in (0, 4):
        assert sorted(masks.ids_keep[first : first + 4].flatten().tolist()) == list(range(16))
    assert not torch.equal(masks.ids_keep[:4], masks.ids_keep[4:])
    half = replace(batch, samples=batch.samples[4:])
    alone = draw_masks(half, Draw(0, 2), recipe=model.recipe.mask, l=16)
    assert torch.equal(alone.ids_keep, masks.ids_keep[4:]) and torch.equal(alone.ids_predict, masks.ids_predict[4:])
    assert not torch.equal(draw_masks(half, Draw(0, 3), recipe=model.recipe.mask, l=16).ids_keep, alone.ids_keep)


def test_images_of_a_group_see_each_other_and_no_others(made) -> None:  # type: ignore[no-untyped-def]
    model, batch, masks = made
    before = model.taps(batch, masks)["final"].x
    changed = replace(batch, pixels=batch.pixels.clone())
    changed.pixels[1] = 255 - changed.pixels[1]
    after = model.taps(changed, masks)["final"].x
    moved = (before != after).flatten(1).any(dim=1)
    assert moved.tolist() == [True] * 4 + [False] * 4
    whole = model.tokens(batch.pixels)  # an image by itself is not mixed
    assert torch.allclose(whole[2], model.tokens(batch.pixels[2:3])[0], atol=1e-12)


def test_a_sequence_that_is_not_full_takes_images_again(made) -> None:  # type: ignore[no-untyped-def]
    model, batch, masks = made
    five = replace(batch, samples=batch.samples[:5], pixels=batch.pixels[:5], targets={}, boxes=None)
    drawn = draw_masks(five, Draw(0, 2), recipe=model.recipe.mask, l=16)
    some, all_of_it = model.taps(five, drawn)["final"].x, model.taps(batch, masks)["final"].x
    assert some.shape[0] == 5 and torch.allclose(some[:4], all_of_it[:4], atol=1e-12)
    assert model(five, drawn)[0].isfinite()


def test_drop_path_is_one_for_a_sequence(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]
) -> None:
    recipe, info = tiny_recipe("mixedae", "student.drop_path=0.5"), tiny_info()
    model, batch = build_model(recipe, info), tiny_batch(info, 8)
    assert model(batch, draw_masks(batch, Draw(0, 0), recipe=recipe.mask, l=16))[0].isfinite()


def test_a_batch_that_is_no_multiple_is_refused_and_held_out_images_need_not_be(
    make_cache: Callable[..., Path], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "cache", n=24, n_views=1, teachers={})
    short = ("optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=8")
    with pytest.raises(
        ValueError, match="leaves micro-batches of 2 images .* mix joins 4 images to a sequence; give a multiple of 16"
    ):
        train_quietly(cache, tmp_path / "out", tiny_recipe("mixedae", *short), accum=4)
    assert train_quietly(cache, tmp_path / "out", tiny_recipe("mixedae", *short), hold_out=0.3)["finished"]
    assert open_cache(cache).numbers.size % 4 == 0


def test_the_encoder_costs_a_quarter_of_a_whole_image(
    make_cache: Callable[..., Path], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "cache", n=8, n_views=1, teachers={})
    recipe = tiny_recipe("mixedae", "optim.batch_size=4", "terms.pixels=null", "student.decoder=null")
    counted = cost.count_costs(build_run(cache, tmp_path / "out", recipe, Ranks(), Setup(device="cpu")))
    d, l = 64, 16  # the head on every token, and the contrast of each with each, beside a quarter of the encoder
    head = 2 * l * d * d / 4 + 2 * l * l * d / 4
    assert counted["forward_flops"] == pytest.approx(counted["encoder_flops"] / 4 + head, rel=1e-6)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("mask.masks_per_image=2", "one mask per image, law fixed and hidden drop"),
        ("mask.n_keep=4", "mask.group says how many"),
        ("mask.group=1", "at least 2 was expected"),
        ("mask.sampler=random", "false was expected with sampler random"),
        ("terms.homologous.distance=mse", "target sources and distance supcon were expected together"),
    ],
)
def test_what_does_not_fit_is_refused(override: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("mixedae", [override])
    assert told in str(error.value)


def test_a_grid_that_does_not_split_and_a_student_of_stages_are_refused(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo]
) -> None:
    with pytest.raises(ValueError, match="mask.group = 4: does not split 9 patches"):
        build_model(tiny_recipe("mixedae"), tiny_info(3, 4))
    with pytest.raises(ValueError, match="mix joins images behind the patch embedding; a plain ViT was expected"):
        build_model(tiny_recipe("mixedae", "student.model=test_mcmae"), tiny_info(4, 16))
