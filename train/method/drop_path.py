"""Stochastic depth whose every decision is hashed: the same for any batch size, rank count and after resume."""

import torch
from jaxtyping import Float, Float64, Int64
from timm.models.vision_transformer import Block
from torch import Tensor

from mrmae.kernels import ids


def scaled_block(block: Block, x: Float[Tensor, "v n d"], factors: Float[Tensor, "v 2"]) -> Float[Tensor, "v n d"]:
    """timm's Block with its two residual branches times `factors`."""
    first, second = factors.to(x.dtype)[:, :, None, None].unbind(1)
    x = x + first * block.ls1(block.attn(block.norm1(x)))
    out: Tensor = x + second * block.ls2(block.mlp(block.norm2(x)))
    return out


def path_keys(depth: int, seed: int) -> Int64[Tensor, " 2*depth"]:
    """One hash per residual branch of `depth` blocks, for `path_factors`."""
    words = (ids.mix_int((seed + (branch + 1) * ids.GOLDEN) & ids.WORD) for branch in range(2 * depth))
    return torch.tensor([ids.signed(word) for word in words])


def path_factors(
    samples: Int64[Tensor, " b"],
    epoch: Int64[Tensor, ""],
    keys: Int64[Tensor, " 2*depth"],
    *,
    rows: int,
    rate: float,
    law: str = "rising",
) -> Float64[Tensor, "v depth 2"]:
    """Stochastic depth (drop-path): 0 where a residual branch is dropped, else 1 / (1 - p).

    p rises linearly from 0 at the first block to `rate` at the last, or is `rate` everywhere (law `constant`). A function of (seed, epoch, sample, branch, which mask of
    the image), not of the mask itself: masks may repeat. keys: from `path_keys`. rows: v = masks per image * b.
    """
    row = torch.arange(rows, device=samples.device)
    images = ids.mix(samples[row % samples.shape[0]] ^ ids.mix((epoch << 16) + row // samples.shape[0] + 1))
    bits = ids.shift_right(ids.mix(images[:, None] + keys), 12)
    uniform = (bits.double() * 2.0**-52).view(images.shape[0], -1, 2)
    first = 0.0 if law == "rising" else rate
    p = torch.linspace(first, rate, keys.shape[0] // 2, dtype=torch.float64, device=samples.device)[:, None]
    return (uniform >= p) / (1 - p)
