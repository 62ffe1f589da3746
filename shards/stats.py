"""Exact moments of a column's tokens, as stored: what channel normalisation and whitening of targets use.

`stats/<teacher>.<tap>.safetensors` beside the shards: float64 mean [d], variance [d], covariance [d, d] (population,
divided by n) over every patch of every readable sample and view, and in its metadata what they are of.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float64
from torch import Tensor

from mrmae.common.backend import read_bytes
from mrmae.common.files import publish
from mrmae.shards.cache import Cache
from mrmae.shards.format import FORMAT_VERSION, Numbers, content_id, parsed, shown

DEAD = 1e-6  # of the largest standard deviation: below it is rounding
TOKENS_AT_ONCE = 1 << 16  # bounds the float64 copy: 0.4 GB at 768 channels


@dataclasses.dataclass(frozen=True)
class Stats:
    """Moments of one column. id: of what they were computed from; n: tokens."""

    id: str
    n: int
    mean: Float64[Tensor, "d"]
    variance: Float64[Tensor, "d"]
    covariance: Float64[Tensor, "d d"]

    @property
    def std(self) -> Float64[Tensor, "d"]:
        """Standard deviation of every channel; 1 for those that do not vary, whose normalised value is then 0, not noise."""
        std = self.variance.clamp_min(0).sqrt()
        return torch.where(std > DEAD * std.max(), std, 1.0)


def stats_path(path: Path, column: str) -> Path:
    """Where a column's moments lie."""
    return path / "stats" / f"{column}.safetensors"


def stats_fields(cache: Cache, column: str) -> dict[str, Any]:
    """What moments depend on: column id, data set, views, and how many samples are readable."""
    return {
        "format_version": FORMAT_VERSION,
        "column": cache.column(column).id,
        "dataset": cache.ids["dataset"],
        "n_views": cache.n_views,
        "n_valid": len(cache.numbers),
    }


def compute_stats(cache: Cache, column: str, *, progress: Callable[[int], object] = lambda samples: None) -> Stats:
    """Mean, variance and covariance over all patches of all readable samples and views, in float64.

    One pass: sums about the first batch's mean, so that a large common offset costs no digits. progress: called with the
    number of samples and views read.
    """
    spec = cache.column(column).spec
    at_once = max(1, TOKENS_AT_ONCE // (spec.grid[0] * spec.grid[1]))
    centre: Tensor | None = None
    total, products, n = torch.zeros(spec.width).double(), torch.zeros(spec.width, spec.width).double(), 0
    for view in range(cache.n_views):
        for start in range(0, len(cache.numbers), at_once):
            numbers: Numbers = cache.numbers[start : start + at_once]
            tokens = cache.read_tokens(column, numbers, numbers * 0 + view).flatten(0, 1).double()
            centre = tokens.mean(0) if centre is None else centre
            tokens -= centre
            total, products, n = total + tokens.sum(0), products + tokens.T @ tokens, n + len(tokens)
            progress(len(numbers))
    if centre is None:
        raise ValueError(f"{cache.path}: no sample can be read; moments need at least one; see inspect-cache verify")
    offset = total / n
    covariance = products / n - torch.outer(offset, offset)
    id = content_id(stats_fields(cache, column))
    return Stats(id, n, centre + offset, covariance.diagonal().clone(), covariance)


def write_stats(cache: Cache, column: str, stats: Stats) -> Path:
    """Where the moments were stored; older ones are replaced."""
    tensors = {name: getattr(stats, name).contiguous() for name in ("mean", "variance", "covariance")}
    about = {"stats_id": stats.id, "tokens": str(stats.n), "of": json.dumps(stats_fields(cache, column))}
    path = stats_path(cache.path, column)
    publish(path, safetensors.torch.save(tensors, about), replace=True)
    return path


def read_stats(cache: Cache, column: str) -> Stats:
    """The stored moments of a column. ValueError where there are none, or where they are of other data than the cache's."""
    path = stats_path(cache.path, column)
    todo = f"run inspect-cache stats {cache.path}"
    try:
        data = read_bytes(path)
        about = parsed(data[8 : 8 + int.from_bytes(data[:8], "little")], dict[str, dict[str, Any]])["__metadata__"]
        tensors = moments_in(safetensors.torch.load(data), cache.column(column).spec.width)
        id, n, of = about["stats_id"], int(about["tokens"]), about["of"]
    except (OSError, ValueError, safetensors.SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: there are no moments of this column ({error}); {todo}") from None
    if id != content_id(stats_fields(cache, column)):
        raise ValueError(f"{path}: these moments are of {shown(of)}; this cache is "
                         f"{json.dumps(stats_fields(cache, column))}; {todo} again")  # fmt: skip
    return Stats(id, n, **tensors)


def moments_in(stored: Mapping[str, Tensor], d: int) -> dict[str, Tensor]:
    """The moments of d channels among these tensors. ValueError where one is missing, or not finite float64 of its shape."""
    for name, shape in (("mean", (d,)), ("variance", (d,)), ("covariance", (d, d))):
        tensor = stored.get(name)
        if (
            tensor is None
            or (tensor.dtype, tuple(tensor.shape)) != (torch.float64, shape)
            or not tensor.isfinite().all()
        ):
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} is {found}; expected finite torch.float64 {list(shape)}")
    return {name: stored[name] for name in ("mean", "variance", "covariance")}
