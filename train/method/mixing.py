"""Mixing: several images in one sequence, a part of the grid of each, and telling the sources apart (MixedAE, arXiv 2303.17152)."""

import torch
from jaxtyping import Float
from torch import Tensor

CONTRAST_TEMPERATURE = 0.25  # a guess: MixedAE's abstract names none


def mixed(
    x: Float[Tensor, "b n d"], group: int, prefix: int, sources: Float[Tensor, "1 g d"] | None
) -> Float[Tensor, "r m d"]:
    """Sequences of `group` images each, one after another: CLS of the first, then the patches of all, each with its source's embedding.

    Where images are left over, the last sequence takes the batch's first ones again.
    """
    rows = -(-len(x) // group)
    each = x[torch.arange(rows * group, device=x.device) % len(x)].reshape(rows, group, *x.shape[1:])
    patches = each[:, :, prefix:]
    if sources is not None:
        patches = patches + sources[:, :, None]
    return torch.cat([each[:, 0, :prefix], patches.flatten(1, 2)], dim=1)


def unmixed(x: Float[Tensor, "r m d"], group: int, prefix: int, b: int) -> Float[Tensor, "b n d"]:
    """Every image's own tokens again, behind the CLS of its sequence."""
    patches = x[:, prefix:].reshape(len(x) * group, -1, x.shape[2])
    return torch.cat([x[:, :prefix].repeat_interleave(group, dim=0), patches], dim=1)[:b]


def source_errors(z: Float[Tensor, "b n d"], group: int) -> Float[Tensor, "b n"]:
    """Supervised contrast over the tokens of a sequence: for token i the mean over the others of its image, p, of
    `-log( exp(cos(i, p) / T) / sum_{a != i} exp(cos(i, a) / T) )`.

    z: of every image's own patches. Homologous recognition (MixedAE, section 3); the form and T are inferred.
    """
    b, n, _ = z.shape
    with torch.autocast(z.device.type, enabled=False):
        unit = torch.nn.functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        unit = mixed(unit, group, 0, None)
        cosines = unit @ unit.transpose(1, 2) / CONTRAST_TEMPERATURE
        itself = torch.eye(group * n, dtype=torch.bool, device=z.device)
        own = torch.arange(group, device=z.device).repeat_interleave(n)
        same = (own[:, None] == own) & ~itself
        logs = cosines.masked_fill(itself, -torch.inf).log_softmax(dim=-1).masked_fill(~same, 0)
        errors: Tensor = -logs.sum(dim=-1) / (n - 1)
    return errors.reshape(-1, n)[:b]
