"""How far a prediction is from its target, per patch: the names recipes use, in the kernels' terms.

Their scales differ (zero prediction of an N(0, 1) target: mse 1, sl1(1) .425, sl1(2) .247, 2*sl1(1) .849), so a term's weight
means nothing without its distance.
"""

from typing import NamedTuple


class Distance(NamedTuple):
    """`factor * kernel(beta)`; beta matters to smooth-L1 only: `e^2 / (2 beta)` inside |e| < beta, `|e| - beta / 2` outside."""

    kernel: str
    beta: float = 1.0
    factor: float = 1.0


DISTANCES = {
    "mse": Distance("mse"),
    "sl1(1)": Distance("sl1", beta=1.0),
    "sl1(2)": Distance("sl1", beta=2.0),
    "2*sl1(1)": Distance("sl1", beta=1.0, factor=2.0),
    "cosd": Distance("cosd"),
    "2-2cos": Distance("cosd", factor=2.0),
}
