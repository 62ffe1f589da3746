"""The vectors of an image that a probe may classify by: of its patch tokens, its CLS token, or both."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def pools(pooled: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n d"]]:
    """The vectors of an image by name: `mean` of patch tokens, `cls`, and `both` (each as a unit vector, joined)."""
    if "cls" not in pooled:
        return {"mean": pooled["mean"]}
    return {"mean": pooled["mean"], "cls": pooled["cls"],
            "both": torch.cat([F.normalize(pooled[name], dim=1) for name in ("cls", "mean")], 1)}  # fmt: skip


def choose_pool(pooled: Mapping[str, Tensor], pool: str) -> Float[Tensor, "n d"]:
    """The vectors named `pool`. ValueError where the source has no CLS."""
    found = pools(pooled)
    if pool not in found:
        raise ValueError(f"pool={pool}: this source has no CLS token; expected mean; change pool with --set")
    return found[pool]
