"""Telling an image's other view from the other images of a batch: InfoNCE between pooled tokens."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mrmae.kernels import reference
from mrmae.train.method.heads import SumOverRanks

VIEWS_TEMPERATURE = 0.2  # ours


def view_errors(z: Float[Tensor, "b d"], y: Float[Tensor, "b d"], *, over_ranks: bool) -> Float[Tensor, " b"]:
    """For image i the mean of `-log( exp(cos(z_i, y_i) / T) / sum_j exp(cos(z_i, y_j) / T) )` and the same with z and y exchanged.

    z, y: of each image's two views. over_ranks: j runs over the images of all ranks, which have equally many; else over these.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, y = (F.normalize(x.to(reference.wide(x)), dim=1) for x in (z, y))
        others, first = torch.stack([z, y]), 0
        if over_ranks and dist.is_available() and dist.is_initialized():
            every = others.new_zeros(dist.get_world_size(), *others.shape)
            every[dist.get_rank()] = others
            others, first = SumOverRanks.apply(every).transpose(0, 1).flatten(1, 2), dist.get_rank() * len(z)
        own = torch.arange(first, first + len(z), device=z.device)
        logits = (z @ others[1].T / VIEWS_TEMPERATURE, y @ others[0].T / VIEWS_TEMPERATURE)
        errors = torch.stack([F.cross_entropy(x, own, reduction="none") for x in logits]).mean(0)
    return errors
