"""One step of MR-MAE, loss and every gradient, against an independent float64 restatement of the formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.student import sincos_positions
from mrmae.train.method.targets import Batch, CacheInfo

MakeRecipe = Callable[..., Recipe]
MakeInfo = Callable[..., CacheInfo]
MakeBatch = Callable[..., Batch]

# Stock MAE order, plain loops, nothing of ours but the parameter names and the positions (tested in test_student.py).


def layer_norm(x: Tensor, weight: Tensor | float, bias: Tensor | float, eps: float) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    var = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (var + eps) ** 0.5 * weight + bias


def block(x: Tensor, w: dict[str, Tensor], at: str, heads: int) -> Tensor:
    """Pre-norm transformer block with explicit softmax attention on one image, x [n, d]."""
    n, d = x.shape
    y = layer_norm(x, w[at + "norm1.weight"], w[at + "norm1.bias"], 1e-6)
    qkv = y @ w[at + "attn.qkv.weight"].T + w[at + "attn.qkv.bias"]
    mixed = []
    for head in range(heads):
        lanes = slice(head * (d // heads), (head + 1) * (d // heads))
        q, k, v = (part[:, lanes] for part in qkv.split(d, dim=1))
        scores = torch.exp(q @ k.T / math.sqrt(d // heads))
        mixed.append(scores / scores.sum(1, keepdim=True) @ v)
    x = x + torch.cat(mixed, 1) @ w[at + "attn.proj.weight"].T + w[at + "attn.proj.bias"]
    y = layer_norm(x, w[at + "norm2.weight"], w[at + "norm2.bias"], 1e-6)
    y = y @ w[at + "mlp.fc1.weight"].T + w[at + "mlp.fc1.bias"]
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ w[at + "mlp.fc2.weight"].T + w[at + "mlp.fc2.bias"]


def patchify(image: Tensor, p: int) -> Tensor:
    """[h, w, c] -> [l, p*p*c] in MAE's (p, q, c) order."""
    h, w, _ = image.shape
    return torch.stack([image[r : r + p, c : c + p].reshape(-1) for r in range(0, h, p) for c in range(0, w, p)])


def to_pqc(rows: Tensor, p: int) -> Tensor:
    """Rows of a (c, p, q) prediction layer in (p, q, c) order."""
    channels = rows.shape[0] // p**2
    order = [(c * p + i) * p + j for i in range(p) for j in range(p) for c in range(channels)]
    return rows[order]


def restated_loss(w: dict[str, Tensor], model: Pretrainer, batch: Batch, masks: Masks) -> dict[str, Tensor]:
    """MAE's published order: embed everything, shuffle, keep, un-shuffle behind the encoder, predict everything, mask the loss."""
    p, l, grid = model.info.patch, model.info.n_patches, model.info.grid
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (model.recipe.prepare.mean, model.recipe.prepare.std))
    d, d_dec = w["student.cls_token"].shape[-1], w["decoder.mask_token"].shape[-1]
    losses: dict[str, list[Tensor]] = {term.name: [] for term in model.terms}
    for i in range(len(batch.samples)):
        image = (batch.pixels[i].double() / 255 - mean) / std
        patches = patchify(image, p)
        kernel = w["student.patch_embed.proj.weight"].permute(0, 2, 3, 1).reshape(d, -1)  # (c, p, q) -> (p, q, c)
        everything = patches @ kernel.T + w["student.patch_embed.proj.bias"] + sincos_positions(grid, d)[1:]
        keep, hidden = masks.ids_keep[i].tolist(), masks.ids_predict[i].tolist()
        shuffle = keep[::-1] + hidden[::-1]  # MAE keeps them in noise order: any order will do
        restore = [shuffle.index(j) for j in range(l)]
        x = torch.cat([w["student.cls_token"][0], everything[shuffle[: len(keep)]]])
        for layer in range(len(model.student.blocks)):
            x = block(x, w, f"student.blocks.{layer}.", model.student.blocks[0].attn.num_heads)
        x = layer_norm(x, w["student.norm.weight"], w["student.norm.bias"], 1e-6)

        y = x @ w["decoder.embed.weight"].T + w["decoder.embed.bias"]
        whole = torch.cat([y[1:], w["decoder.mask_token"][0].expand(len(hidden), d_dec)])[restore]
        y = torch.cat([y[:1], whole + sincos_positions(grid, d_dec)[1:]])
        for layer in range(len(model.decoder.blocks)):  # type: ignore[union-attr]
            y = block(y, w, f"decoder.blocks.{layer}.", model.recipe.student.decoder.heads)  # type: ignore[union-attr]
        y = layer_norm(y, w["decoder.norm.weight"], w["decoder.norm.bias"], 1e-6)[1:]
        prediction = y @ to_pqc(w["heads.pixels.weight"], p).T + to_pqc(w["heads.pixels.bias"], p)
        target = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, unbiased=True, keepdim=True) + 1e-6) ** 0.5
        masked = torch.tensor([float(j in hidden) for j in range(l)], dtype=torch.float64)
        losses["pixels"].append((((prediction - target) ** 2).mean(1) * masked).sum() / masked.sum())

        for teacher, info in model.info.teachers.items():
            raw = batch.targets[teacher]
            value = raw["tokens"][i].double()
            if "scale" in raw:
                value = (
                    value * raw["scale"][i].double()[:, None] * info.channel_std.double() + info.channel_mean.double()
                )
            goal = layer_norm(value, 1.0, 0.0, 1e-5)
            head = f"heads.mimic/{teacher}."
            per_patch = torch.zeros(l, dtype=torch.float64)
            for place, patch in enumerate(shuffle[: len(keep)], start=1):
                told = w[head + "weight"] @ x[place] + w[head + "bias"]
                per_patch[patch] = ((told - goal[patch]) ** 2).mean()
            losses[f"mimic/{teacher}"].append((per_patch * (1 - masked)).sum() / len(keep))
    return {name: sum(parts) / len(parts) for name, parts in losses.items()}  # type: ignore[misc]


@pytest.mark.parametrize(("recipe", "grid", "patch", "n_keep"), [("mr-mae", 14, 2, 49), ("mr-mae-focused", 4, 3, 4)])
def test_one_step_equals_the_float64_restatement(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch, recipe: str, grid: int, patch: int, n_keep: int
) -> None:
    info = tiny_info(grid, patch)
    model = build_model(tiny_recipe(recipe), info, dtype=torch.float64)
    for parameter in model.parameters():  # biases, norms and tokens away from their initial 0 and 1
        parameter.data += (
            0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * parameter.requires_grad
        )
    batch = tiny_batch(info)
    masks = draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=grid**2)
    assert masks.ids_keep.shape[1] == n_keep and masks.ids_predict.shape[1] == grid**2 - n_keep

    loss, parts = model(batch, masks)
    loss.backward()
    weights = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in model.named_parameters()}
    expected = restated_loss(weights, model, batch, masks)
    total = expected["pixels"] + (expected["mimic/clip"] + expected["mimic/dino"]) / 2
    total.backward()

    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(total.item(), rel=1e-12)
    for name, part in parts.items():
        assert part.item() == pytest.approx(expected[name].item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found, wanted = parameter.grad, weights[name].grad
        assert found is not None and wanted is not None and wanted.abs().max() > 0, name
        assert (found - wanted).norm() <= 1e-10 * wanted.norm() + 1e-13, name
