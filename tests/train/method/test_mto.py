"""The regulariser of mask tokens, restated plainly, in both places where mask tokens may stand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mrmae.train.method import Draw, Recipe, build_model, draw_masks, load_recipe
from mrmae.train.method.targets import Batch, CacheInfo

TERM = "terms.mto={tap: mto, positions: alive, head: none, target: none, weight: 0.01}"


def restated(states: list[Tensor], blocks: Any, token: Tensor, prefix: int, visible: int) -> Tensor:
    """The formula, row by row, query by query."""
    costs = []
    for row in range(len(states[0])):
        p = torch.softmax(token.flatten(), 0)
        cost = -(p * p.log()).sum()
        x = states[0][row]
        mean = torch.softmax(x[prefix : prefix + visible].mean(0), 0)
        hidden = [torch.softmax(u, 0) for u in x[prefix + visible :]]
        apart = sum((u * (u / mean).log()).sum() for u in hidden) / len(hidden)
        cost = cost + torch.relu(1 - apart)
        for weight, x, block in zip((1, 0.5), (s[row] for s in states), blocks):
            heads, d = block.attn.num_heads, x.shape[1]
            h = torch.nn.functional.layer_norm(x, (d,), block.norm1.weight, block.norm1.bias, 1e-6)
            q, k, _ = (h @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=1)
            mass = []
            for at in range(heads):
                part = slice(at * d // heads, (at + 1) * d // heads)
                for i in range(prefix, prefix + visible):
                    pays = torch.softmax(k[:, part] @ q[i, part] / math.sqrt(d // heads), 0)
                    mass.append(pays[prefix + visible :].sum())
            cost = cost + weight * torch.stack(mass).mean()
        costs.append(cost)
    return torch.stack(costs).mean()


@pytest.mark.parametrize("host", ["decoder", "encoder"])
def test_it_is_its_formula_with_gradients(
    host: str, tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]
) -> None:
    replaced = ["student.hidden=replace", "terms.pixels.tap=final", "student.decoder=null"] if host == "encoder" else []
    recipe, info = tiny_recipe("mae-mto", "student.decoder.depth=2", "mask.n_predict=9", *replaced), tiny_info()
    model, batch = build_model(recipe, info, dtype=torch.float64), tiny_batch(info)
    masks = draw_masks(batch, Draw(0, 0), recipe=recipe.mask, l=16)
    torch.manual_seed(0)
    token = model.mask_token if host == "encoder" else model.decoder.mask_token  # type: ignore[union-attr]
    token.data.normal_()  # type: ignore[union-attr]
    found = model(batch, masks)[1]["mto"]
    terms = model.taps(batch, masks)["mto"].x.mean()
    weights = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("heads")]
    one = torch.autograd.grad(terms, weights, allow_unused=True)

    caught: list[Tensor] = []
    blocks = (model.student if host == "encoder" else model.decoder).blocks[:2]  # type: ignore[union-attr, index]
    handles = [block.register_forward_pre_hook(lambda _, x: caught.append(x[0])) for block in blocks]
    model.taps(batch, masks)
    for handle in handles:
        handle.remove()
    again = restated(caught[:2], blocks, token, 1, 4)  # type: ignore[arg-type]
    assert abs(float((found - again).detach())) < 1e-10
    two = torch.autograd.grad(again, weights, allow_unused=True)
    assert [x is None for x in one] == [x is None for x in two] and any(x is not None for x in one)
    for left, right in zip(one, two):
        assert left is None or torch.allclose(left, right, atol=1e-10, rtol=1e-8)
    assert caught[0].shape[1] == 1 + 4 + (
        12 if host == "encoder" else 9
    )  # the encoder's mask token stands for every hidden patch


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("terms.mto.head=linear", "tap mto, positions alive, head none and target none were expected together"),
        ("student.decoder.kind=cross", "a decoder of kind self, or student.hidden replace, was expected with tap mto"),
    ],
)
def test_it_wants_a_host(override: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("mae-mto", [override])
    assert told in str(error.value)


def test_a_decoder_that_no_term_reads_is_no_host(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo]
) -> None:
    recipe = tiny_recipe("mr-mae", TERM, "terms.pixels=null")
    with pytest.raises(ValueError, match="no term reads the decoder; one with tap decoder was expected"):
        build_model(recipe, tiny_info())
