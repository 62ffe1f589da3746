"""Exact statistics of a cached column: mean and covariance of its tokens, for the targets `channel` and `phi_s`."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mrmae.shards.cache import Cache
from mrmae.shards.spec import content_id
from mrmae.train.recipe import Recipe
from mrmae.train.targets import NEEDS_STATISTICS, CacheInfo, chosen

SAMPLES_AT_ONCE = 16
DEAD = 1e-6  # of the largest standard deviation: below it is rounding


@dataclass(frozen=True)
class ColumnStatistics:
    """Population statistics of a column's dequantised patch tokens over `n_samples` images, all views and patches.

    id: of their definition (column, images, views), not of rounded bits: the same wherever they are computed.
    """

    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]
    n_samples: int
    id: str

    @property
    def std(self) -> Float64[Tensor, " d"]:
        """Standard deviation of every channel; 1 for those that do not vary, whose normalised value is then 0, not noise."""
        std = self.covariance.diagonal().clamp_min(0).sqrt()
        return torch.where(std > DEAD * std.max(), std, 1.0)


def column_statistics(
    cache: Cache, column: str, *, samples: int | None = None, device: torch.device | str = "cpu"
) -> ColumnStatistics:
    """Mean and covariance of a column in one pass, accumulated in float64 about the mean of the first images.

    samples: only the first so many valid images, a random sample of the data set (canonical order is by hash); None: all.
    Costs l * d^2 multiply-accumulates per view. Raises ValueError where the cache has no such column or image.
    """
    numbers = cache.numbers[:samples]
    if column not in cache.columns or not len(numbers):
        raise ValueError(
            f"{cache.path}: statistics of {column!r} over {len(numbers)} images; one of {sorted(cache.columns)} and at least "
            "one image were expected; choose another column"
        )
    shift = sums = outer = torch.zeros(())
    count = 0
    for start in range(0, len(numbers), SAMPLES_AT_ONCE):
        for view in range(cache.n_views):
            part = numbers[start : start + SAMPLES_AT_ONCE]
            x = cache.read_tokens(column, part, np.full(len(part), view)).flatten(0, 1).to(device, torch.float64)
            if not count:
                shift = x.mean(0)
            x -= shift
            sums, outer, count = sums + x.sum(0), outer + x.T @ x, count + len(x)
    offset = sums / count
    covariance = (outer / count - offset[:, None] * offset).cpu()
    definition = {"column": cache.columns[column].id, "samples": len(numbers), "views": cache.n_views}
    return ColumnStatistics((shift + offset).cpu(), covariance, len(numbers), content_id({"statistics": definition}))


def with_statistics(
    info: CacheInfo, cache: Cache, recipe: Recipe, *, samples: int | None = None, device: torch.device | str = "cpu"
) -> CacheInfo:
    """`info` with the statistics that the recipe's terms need, computed from `cache`; nothing is read where none are."""
    terms = [(name, term) for name, term in recipe.terms.items() if term.transform in NEEDS_STATISTICS]
    teachers = dict(info.teachers)
    for teacher in sorted({teacher for name, term in terms for teacher in chosen(name, term, info)}):
        found = column_statistics(cache, teachers[teacher].column, samples=samples, device=device)
        teachers[teacher] = replace(
            teachers[teacher],
            stat_mean=found.mean,
            stat_std=found.std,
            stat_covariance=found.covariance,
            stat_id=found.id,
        )
    return replace(info, teachers=teachers)
