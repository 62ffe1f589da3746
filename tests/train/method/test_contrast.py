"""InfoNCE between pooled views is its formula, and is asked for as what it is."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mrmae.train.method.masks import Masks
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import Recipe, load_recipe
from mrmae.train.method.targets import Batch, CacheInfo

TERM = "terms={told: {tap: final, positions: pooled, head: mlp, target: views, views: both, distance: infonce}}"


@pytest.mark.parametrize("positions", ["pooled", "cls"])
def test_the_loss_is_its_formula_with_gradients(
    positions: str, tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]
) -> None:  # fmt: skip
    recipe = tiny_recipe("mimic-only", TERM, f"terms.told.positions={positions}", "prepare.pair=true")
    model = build_model(recipe, tiny_info(), dtype=torch.float64)
    batch = tiny_batch(tiny_info(), 5)
    ids = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    keep, other = ids[:, :4].sort().values, ids[:, 4:9].sort().values
    loss, _ = model(batch, Masks(keep, keep[:, :0], ids_partner=other))
    loss.backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in weights if p.grad is not None]
    pooled = []
    for view, shown in ((batch, keep), (batch.partner, other)):
        assert view is not None
        x = model.encode(view.pixels, shown).final
        head = model.heads["told"](x[:, 0] if positions == "cls" else x[:, 1:].sum(1) / shown.shape[1])
        pooled.append(head / head.norm(dim=1, keepdim=True))
    cosines = pooled[0] @ pooled[1].T / 0.2
    costs = [torch.logsumexp(row, 0) - row[i] for matrix in (cosines, cosines.T) for i, row in enumerate(matrix)]
    again = torch.stack(costs).mean()
    assert abs(float((loss - again).detach())) < 1e-10
    for one, two in zip(found, torch.autograd.grad(again, weights, allow_unused=True)):
        assert torch.allclose(one, torch.zeros_like(one) if two is None else two, atol=1e-10, rtol=1e-9)


def test_views_that_are_the_same_are_told_and_any_others_are_not(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]
) -> None:
    model = build_model(tiny_recipe("mimic-only", TERM, "prepare.pair=true"), tiny_info(), dtype=torch.float64)
    batch, everything = tiny_batch(tiny_info(), 4), torch.arange(16).expand(4, -1)
    masks = Masks(everything, everything[:, :0], ids_partner=everything)
    same, _ = model(replace(batch, partner=batch), masks)
    rolled = replace(batch, pixels=batch.pixels.roll(1, 0))
    other, _ = model(replace(batch, partner=rolled), masks)
    assert same < F.cross_entropy(torch.zeros(4, 4), torch.arange(4)) < other


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("terms.contrast.views=first", "views both, of same and positions cls or pooled were expected with target views"),
        ("terms.contrast.positions=visible", "views both, of same and positions cls or pooled"),
        ("terms.contrast.distance=mse", "target views and distance infonce were expected together"),
        ("prepare.pair=false", "prepare.pair is False; true was expected"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(override: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("heuristic", [override])
    assert told in str(error.value)
