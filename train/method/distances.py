"""How far a prediction is from its target, per patch: the names recipes use, in the kernels' terms.

Their scales differ (zero prediction of an N(0, 1) target: mse 1, sl1(1) .425, sl1(2) .247, 2*sl1(1) .849), so a term's weight
means nothing without its distance.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ASL_POSITIVE, ASL_NEGATIVE, ASL_MARGIN = 0.0, 4.0, 0.05  # its exponents and probability margin on MS-COCO


class Distance(NamedTuple):
    """`factor * kernel(beta)`; `l1` is of pixels only, in plain PyTorch; beta matters to smooth-L1 only: `e^2 / (2 beta)` inside |e| < beta, `|e| - beta / 2` outside."""

    kernel: str
    beta: float = 1.0
    factor: float = 1.0


DISTANCES = {
    "mse": Distance("mse"),
    "l1": Distance("l1"),
    "sl1(1)": Distance("sl1", beta=1.0),
    "sl1(2)": Distance("sl1", beta=2.0),
    "2*sl1(1)": Distance("sl1", beta=1.0, factor=2.0),
    "cosd": Distance("cosd"),
    "2-2cos": Distance("cosd", factor=2.0),
    "kl(qk)": Distance("relation"),  # relations.py
    "kl(vv)": Distance("relation"),
}


def bce(z: Float[Tensor, "v n k"], y: Float[Tensor, "v 1 k"]) -> Float[Tensor, "v n"]:
    """Binary cross-entropy of every class, the mean over classes. y: 1 for the classes an image has, else 0."""
    return F.binary_cross_entropy_with_logits(z, y.expand_as(z), reduction="none").mean(dim=-1)


def asl(z: Float[Tensor, "v n k"], y: Float[Tensor, "v 1 k"]) -> Float[Tensor, "v n"]:
    """Asymmetric loss (arXiv 2009.14119): `-(1 - p)^g+ log p` for classes an image has, `-q^g- log(1 - q)`, q = max(p - m, 0), for others.

    The mean over classes, where its paper sums, so that its scale is that of `bce`; gradients also pass its factors.
    """
    p = z.sigmoid()
    q = (p - ASL_MARGIN).clamp_min(0)
    has, lacks = (1 - p) ** ASL_POSITIVE * F.logsigmoid(z), q**ASL_NEGATIVE * torch.log1p(-q)
    return -(y * has + (1 - y) * lacks).mean(dim=-1)


def ce(z: Float[Tensor, "v n k"], y: Float[Tensor, "v 1 k"]) -> Float[Tensor, "v n"]:
    """Cross-entropy with an image's one class."""
    return -(y * z.log_softmax(dim=-1)).sum(dim=-1)


LABEL_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bce": bce, "asl": asl, "ce": ce}
