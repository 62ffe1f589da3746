"""SatVision's SimMIM: the loss as its code writes it, at pixel resolution, and masks in cells."""

import pytest
import torch

from mrmae.train.method.masks import Draw, Masks, counts
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import MaskRecipe, load_recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.targets import Batch, CacheInfo

BANDS, SIDE, PATCH = 5, 32, 8


def test_the_loss_is_satvisions_at_pixel_resolution() -> None:
    """sum(|x - pred| m) / sum m / channels, m one per pixel and x not normalised; predictions are rows of a pixel shuffle (c, p, q)."""
    mean, std = [0.1 * i for i in range(BANDS)], [0.2 + 0.1 * i for i in range(BANDS)]
    recipe = load_recipe(
        "satvision", ["student.model=test_vit", "student.drop_path=0", f"prepare.mean={mean}", f"prepare.std={std}"]
    )
    model = build_model(recipe, CacheInfo(SIDE, (4, 4), channels=BANDS, unit=65535), dtype=torch.float64)
    pixels = (torch.rand(2, SIDE, SIDE, BANDS, generator=torch.Generator().manual_seed(0)) * 65535).to(torch.uint16)
    masks = draw_masks(Batch(torch.tensor([3, 8]), pixels, {}), Draw(0, 0), recipe=recipe.mask, l=16)
    loss, _ = model(Batch(torch.tensor([3, 8]), pixels, {}), masks)
    head = model.heads["pixels"]
    found = torch.autograd.grad(loss, list(head.parameters()))

    assert counts(recipe.mask, 16) == (6, 10)
    tokens = model.taps(Batch(torch.tensor([3, 8]), pixels, {}), masks)["final"]
    weight, bias = (x.detach().clone().requires_grad_() for x in head.parameters())
    x = ((pixels.double() / 65535 - torch.tensor(mean).double()) / torch.tensor(std).double()).permute(0, 3, 1, 2)
    total, hidden = torch.zeros(()).double(), torch.zeros(2, 1, SIDE, SIDE).double()
    for row in range(2):
        for patch in masks.ids_predict[row].tolist():
            at = tokens.ids[row].tolist().index(patch) + tokens.prefix
            drawn = (tokens.x[row, at].detach() @ weight.T + bias).view(BANDS, PATCH, PATCH)
            top, left = patch // 4 * PATCH, patch % 4 * PATCH
            hidden[row, 0, top : top + PATCH, left : left + PATCH] = 1
            total = total + (x[row, :, top : top + PATCH, left : left + PATCH] - drawn).abs().sum()
    expected = total / hidden.sum() / BANDS
    assert torch.allclose(loss.double(), expected, rtol=1e-6)  # the loss itself is fp32
    for ours, theirs in zip(found, torch.autograd.grad(expected, [weight, bias])):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_random_cells_are_hidden_whole_and_as_many_as_the_ratio_says() -> None:
    recipe = MaskRecipe(ratio=0.6, cell=2)
    batch = Batch(torch.arange(200), torch.empty(0, dtype=torch.uint8), {})
    masks = draw_masks(batch, Draw(0, 0), recipe=recipe, l=64)
    assert isinstance(masks, Masks) and counts(recipe, 64) == (24, 40)  # int(16 * 0.4) of 16 cells
    kept = torch.zeros(200, 64).scatter(1, masks.ids_keep, 1.0).view(200, 4, 2, 4, 2)
    cells = kept.mean(dim=(2, 4))
    assert set(cells.unique().tolist()) == {0.0, 1.0} and (cells.sum(dim=(1, 2)) == 6).all()
    assert (cells.mean(0) - 6 / 16).abs().max() < 0.12  # each as often as any other
    whole = torch.cat([masks.ids_keep, masks.ids_predict], 1).sort(1).values
    assert torch.equal(whole, torch.arange(64).expand(200, -1))
    finer = load_recipe("satvision", ["mask.cell=2"])
    assert counts(finer.mask, 1024) == (408, 616)  # the published 154 of 256 units on 32 x 32 tokens
    with pytest.raises(ValueError, match="mask.n_keep is 7; null was expected"):
        load_recipe("satvision", ["mask.cell=2", "mask.n_keep=7"])
    with pytest.raises(ValueError, match="mask.cell is 2; at least 1 was expected, and 1 but for"):
        load_recipe("mr-mae-focused", ["mask.cell=2"])
    with pytest.raises(ValueError, match="mse or l1 was expected with target pixels"):
        load_recipe("mr-mae", ["terms.mimic.distance=l1"])
