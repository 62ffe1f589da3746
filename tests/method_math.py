"""The methods' formulas written down plainly in float64, nothing of ours but parameter names and positions, and ours held against them."""

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import Pretrainer
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.student import POSITION_TABLES
from mrmae.train.method.targets import Batch

Weights = Mapping[str, Tensor]

# ---- the formulas, nothing of ours but the parameter names and the positions (tested in test_student.py)


def line(x: Tensor, w: Weights, at: str) -> Tensor:
    return x @ w[f"{at}.weight"].T + w.get(f"{at}.bias", torch.zeros(()).double())


def norm(x: Tensor, w: Weights, at: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], 1e-6)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def mlp(x: Tensor, w: Weights, at: str) -> Tensor:
    return line(F.gelu(line(x, w, f"{at}.fc1")), w, f"{at}.fc2")


def block(x: Tensor, w: Weights, at: str, heads: int) -> Tensor:
    """MAE's, with a layer scale where there is one."""
    one = torch.ones(()).double()
    found = attend(*line(norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv").chunk(3, -1), heads)  # type: ignore[arg-type]
    x = x + w.get(f"{at}.ls1.gamma", one) * line(found, w, f"{at}.attn.proj")
    return x + w.get(f"{at}.ls2.gamma", one) * mlp(norm(x, w, f"{at}.norm2"), w, f"{at}.mlp")


def patches_of(model: Pretrainer, pixels: Tensor) -> Tensor:
    """[b, l, c*p*p] as the student reads them."""
    p = model.info.patch
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (model.recipe.prepare.mean, model.recipe.prepare.std))
    return F.unfold(((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2), p, stride=p).mT


def rows(x: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([one[i] for one, i in zip(x, ids)])


def encoder(model: Pretrainer, w: Weights, pixels: Tensor, ids: Tensor, at: str = "student") -> Tensor:
    """`final` of [CLS | patches at ids], every token embedded first."""
    table = POSITION_TABLES[model.recipe.student.positions](model.info.grid, model.student.embed_dim)
    x = line(patches_of(model, pixels), {**w, "p.weight": w[f"{at}.patch_embed.proj.weight"].flatten(1), "p.bias": w[f"{at}.patch_embed.proj.bias"]}, "p")  # fmt: skip
    x = rows(x + table[1:], ids)
    if f"{at}.cls_token" in w:
        x = torch.cat([w[f"{at}.cls_token"].expand(len(x), -1, -1), x], 1)
    for i in range(len(model.student.blocks)):
        x = block(x, w, f"{at}.blocks.{i}", model.student.blocks[0].attn.num_heads)
    return norm(x, w, f"{at}.norm")


def regressor(model: Pretrainer, w: Weights, final: Tensor, masks: Masks) -> Tensor:
    """CAE's, behind its last norm, from [CLS | visible]."""
    decoder = model.recipe.student.decoder
    assert decoder is not None
    table = POSITION_TABLES[model.recipe.student.positions](model.info.grid, decoder.width)[1:]
    seen, place = table[masks.ids_keep], table[masks.ids_predict]
    t, latent = w["decoder.mask_token"].expand(place.shape), final[:, 1:]
    for i in range(decoder.depth):
        at = f"decoder.blocks.{i}"
        both = torch.cat([latent, t], 1)
        k = line(norm(both + torch.cat([seen, place], 1), w, f"{at}.norm_k"), w, f"{at}.k")
        q, v = (
            line(norm(t + place, w, f"{at}.norm_q"), w, f"{at}.q"),
            line(norm(both, w, f"{at}.norm_v"), w, f"{at}.v"),
        )
        t = norm(t + w[f"{at}.gamma1"] * line(attend(q, k, v, decoder.heads), w, f"{at}.proj"), w, f"{at}.norm_c")
        t = t + w[f"{at}.gamma2"] * mlp(t, w, f"{at}.mlp")
    return norm(t, w, "decoder.norm")


def normalised_pixels(model: Pretrainer, pixels: Tensor, ids: Tensor) -> Tensor:
    x = rows(patches_of(model, pixels), ids)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def batch_norm(x: Tensor, w: Weights, at: str, held: Weights | None = None) -> Tensor:
    """Over rows, by their own statistics or by those `held`."""
    mean, var = (
        (x.mean(0), x.var(0, unbiased=False))
        if held is None
        else (held[f"{at}.running_mean"], held[f"{at}.running_var"])
    )
    return (x - mean) / (var + 1e-5).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]


def two_linears(x: Tensor, w: Weights, at: str, held: Weights | None = None) -> Tensor:
    return line(batch_norm(line(x, w, f"{at}.0"), w, f"{at}.1", held).relu(), w, f"{at}.3")


def cosine(q: Tensor, k: Tensor) -> Tensor:
    return (q * k).sum(-1) / (q.norm(dim=-1) * k.norm(dim=-1))


def leave_start(model: Pretrainer) -> None:
    """The copy and its statistics away from the student's."""
    draw = torch.Generator().manual_seed(8)
    assert model.follower is not None
    for name, x in [*model.follower.named_parameters(), *model.follower.named_buffers()]:
        if x.is_floating_point() and not name.endswith("pos_embed"):
            x.data += 0.1 * torch.rand(x.shape, generator=draw)


# ---- ours against them


def moved(model: Pretrainer) -> dict[str, Tensor]:
    """Every trained parameter away from its start; a copy of all, and of the buffers, to restate with."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw) * parameter.requires_grad
    held = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in model.named_parameters()}
    return held | {name: x.clone() for name, x in model.named_buffers()}


def assert_same(model: Pretrainer, w: Weights, found: Tensor, expected: Tensor) -> None:
    """Losses and all gradients, to 1e-10."""
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    found.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours, theirs = parameter.grad, w[name].grad
            assert ours is not None and theirs is not None and theirs.abs().max() > 0, name
            if (
                name.endswith("qkv.bias") and model.recipe.student.qkv_bias == "qv"
            ):  # the softmax does not see the keys'
                ours, theirs = (torch.cat(g.chunk(3)[::2]) for g in (ours, theirs))
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm() + 1e-13, name


def masks_for(model: Pretrainer, batch: Batch) -> Masks:
    return draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=model.info.n_patches)
