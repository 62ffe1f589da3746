"""How many directions a set of vectors uses: singular values, and RankMe, the exponential of their entropy."""

import torch
from jaxtyping import Float
from torch import Tensor

RESOLVED = torch.finfo(torch.float32).eps


def singular_values(x: Float[Tensor, "n d"], *, floor: float = 0.0) -> Float[Tensor, "k"]:
    """In falling order, fp64; 0 where they are below `floor`, or below what fp32 features resolve of the largest."""
    found: Tensor = torch.linalg.svdvals(torch.linalg.qr(x.double(), mode="r").R)
    return torch.where(found > max(floor, RESOLVED * float(found[0])), found, 0.0)


def entropy_rank(spectrum: Float[Tensor, "k"]) -> float:
    """exp of the entropy of the singular values divided by their sum; 0 where all are 0.

    The effective rank of Roy and Vetterli (EUSIPCO 2007), which is RankMe (arXiv 2210.02885, equation 1) of features as they are;
    there 1e-7 is added to every share, here 0 log 0 = 0.
    """
    shares = spectrum[spectrum > 0] / spectrum.sum()
    return float(torch.special.entr(shares).sum().exp()) if len(shares) else 0.0
