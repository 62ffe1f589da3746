"""A regulariser of mask tokens inspired by MTO (arXiv 2404.08330), whose losses are not public: named as ours, no reproduction.

With q the softmax over channels, u the hidden and v the visible states that enter the first layer in which both meet:
`entropy(q(mask token)) + relu(1 - mean_u KL( q(u) || q(mean v) )) + sum_i w_i * attention from visible queries to hidden keys`, i the first
two layers, w 1 and 1/2: the mask token says one thing, unlike data, and visible tokens look away from it early.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_KL, LAYER_WEIGHTS = 1.0, (1.0, 0.5)


def mask_token_loss(
    blocks: Sequence[Any],
    entering: Sequence[Float[Tensor, "v n d"]],
    mask_token: Float[Tensor, "1 1 d"],
    *,
    prefix: int,
    visible: int,
) -> Float[Tensor, "v 1 1"]:
    """The regulariser of every row, in fp32 at least.

    blocks: timm's. entering: what enters each of the first blocks, [CLS | visible | hidden]: prefix tokens, so many visible ones, the rest hidden.
    """
    work = torch.promote_types(entering[0].dtype, torch.float32)
    attending = [
        weight * attention_to_hidden(block, x, prefix, visible, work)
        for weight, block, x in zip(LAYER_WEIGHTS, blocks, entering)
    ]
    with torch.autocast(mask_token.device.type, enabled=False):
        logs = mask_token.to(work).log_softmax(dim=-1)
        entropy = -(logs.exp() * logs).sum()
        x = entering[0].to(work)
        hidden = x[:, prefix + visible :].log_softmax(dim=-1)
        mean = x[:, prefix : prefix + visible].mean(dim=1, keepdim=True).log_softmax(dim=-1)
        apart = (hidden.exp() * (hidden - mean)).sum(dim=-1).mean(dim=1)
        total: Tensor = entropy + (LEAST_KL - apart).relu() + torch.stack(attending).sum(dim=0)
    return total[:, None, None]


def attention_to_hidden(
    block: Any, x: Float[Tensor, "v n d"], prefix: int, visible: int, work: torch.dtype
) -> Float[Tensor, " v"]:
    """The share of attention that visible patches pay to hidden ones, the mean over heads and queries; written out: no fused kernel returns it."""
    attn: Any = block.attn
    q, k, _ = attn.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    with torch.autocast(x.device.type, enabled=False):
        rows = q[:, :, prefix : prefix + visible].to(work) @ k.to(work).transpose(-2, -1) * attn.scale
        share: Tensor = rows.softmax(dim=-1)[..., prefix + visible :].sum(dim=-1).mean(dim=(1, 2))
    return share
