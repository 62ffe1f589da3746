"""Exact moments of a column's tokens, as stored: what normalisation of targets by the data set's statistics uses.

`stats/<teacher>.<tap>.safetensors` beside the shards: the float64 mean at each grid position [l, d] and the covariance [d, d]
(population, divided by n) of what is left without it, over every readable sample and view; for CLS, a position of its own,
the same under `cls.`; and in its metadata what they are of. Mean and covariance of the tokens as they are follow.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from mrmae.common.backend import exists, read_bytes
from mrmae.common.files import publish
from mrmae.shards.cache import Cache
from mrmae.shards.format import (
    FORMAT_VERSION,
    Numbers,
    content_id,
    load_plan,
    opened_moments,
    parsed,
    sealed_moments,
    shown,
    stats_path,
)

DEAD = 1e-6  # of the largest standard deviation: below it is rounding
TOKENS_AT_ONCE = 1 << 16  # bounds the float64 copy: 0.4 GB at 768 channels
SHARED_AT_ONCE = 64
SHARED_IMAGES = 1_000  # enough to tell what images share: it is biased by one part in so many
TENSORS = ("position_mean", "residual_covariance")


@dataclasses.dataclass(frozen=True)
class Stats:
    """Moments of one column. id: of what they were computed from; n: tokens.

    position_mean: at each grid position of the view, in raster order. residual_covariance: of the tokens without it.
    cls: the moments of CLS, whose grid has one position; None where the column has no CLS.
    """

    id: str
    n: int
    position_mean: Float64[Tensor, "l d"]
    residual_covariance: Float64[Tensor, "d d"]
    cls: "Stats | None" = None

    @property
    def mean(self) -> Float64[Tensor, "d"]:
        """Mean of every channel: every position is seen equally often."""
        return self.position_mean.mean(0)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """Covariance of the tokens as they are: what varies at a position, and what varies between positions."""
        between = self.position_mean - self.mean
        return self.residual_covariance + between.T @ between / len(between)

    @property
    def variance(self) -> Float64[Tensor, "d"]:
        """Variance of every channel."""
        return self.covariance.diagonal()

    @property
    def position_share(self) -> float:
        """Share of the tokens' variance that their position alone explains."""
        return 1 - float(self.residual_covariance.trace() / self.covariance.trace())

    @property
    def std(self) -> Float64[Tensor, "d"]:
        """Standard deviation of every channel; 1 for those that do not vary, whose normalised value is then 0, not noise."""
        return deviation(self.covariance)

    @property
    def residual_std(self) -> Float64[Tensor, "d"]:
        """The same of what is left without the mean at each position."""
        return deviation(self.residual_covariance)


def deviation(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d"]:
    """Standard deviations; 1 where nothing varies but rounding."""
    std = covariance.diagonal().clamp_min(0).sqrt()
    return torch.where(std > DEAD * std.max(), std, 1.0)


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
    """Exact moments over all patches of all readable samples and views, in float64, and those of CLS where there is one.

    progress: called with the number of samples and views read.
    """
    spec, id = cache.column(column).spec, content_id(stats_fields(cache, column))
    at_once = max(1, TOKENS_AT_ONCE // (spec.grid[0] * spec.grid[1]))

    def tokens() -> Iterator[Tensor]:
        for numbers, views in every_view(cache, at_once):
            yield cache.read_tokens(column, numbers, views)
            progress(len(numbers))

    def cls() -> Iterator[Tensor]:
        yield from (cache.read_cls(column, *piece)[:, None] for piece in every_view(cache, TOKENS_AT_ONCE))

    if not len(cache.numbers):
        raise ValueError(f"{cache.path}: no sample can be read; moments need at least one; see inspect-cache verify")
    return Stats(id, *moments(tokens()), cls=Stats(id, *moments(cls())) if spec.has_cls else None)


def every_view(cache: Cache, at_once: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Every readable sample in every view, so many at once: numbers, and the view of each."""
    for view in range(cache.n_views):
        for start in range(0, len(cache.numbers), at_once):
            numbers = cache.numbers[start : start + at_once]
            yield numbers, numbers * 0 + view


def moments(batches: Iterable[Float[Tensor, "b l d"]]) -> tuple[int, Float64[Tensor, "l d"], Float64[Tensor, "d d"]]:
    """How many tokens, their mean at each position, and the covariance of what is left without it: in one pass.

    Sums about the first batch's means, so that a large common offset costs no digits.
    """
    centre: Tensor | None = None
    total, products, n = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        tokens = batch.to(torch.float64, copy=True)
        centre = tokens.mean(0) if centre is None else centre
        tokens -= centre
        flat = tokens.flatten(0, 1)
        total, products, n = total + tokens.sum(0), products + flat.T @ flat, n + len(tokens)
    assert centre is not None
    offset = total / n
    return n * len(centre), centre + offset, products / (n * len(centre)) - offset.T @ offset / len(centre)


def shared_energy(cache: Cache, column: str) -> tuple[float, float]:
    """Shares of a column's layer-normalised energy that one constant token explains, and one per position.

    Estimated without bias from the first images in canonical order, a random sample, in their first view.
    """
    numbers = cache.numbers[:SHARED_IMAGES]
    sums, energy, n = torch.zeros(()).double(), 0.0, len(numbers)
    for start in range(0, n, SHARED_AT_ONCE):
        some = numbers[start : start + SHARED_AT_ONCE]
        tokens = cache.read_tokens(column, some, some * 0)
        tokens = F.layer_norm(tokens, tokens.shape[-1:]).double()
        sums, energy = sums + tokens.sum(0), energy + float(tokens.square().sum()) / n
    mean, l = sums / n, len(sums)
    left = (energy - float(mean.square().sum())) * n / (n - 1)  # a mean of n images explains 1 / n of what is left, too
    constant = float(l * mean.mean(0).square().sum()) - left / n / l
    return constant / energy, 1 - left / energy


def write_stats(cache: Cache, column: str, stats: Stats) -> Path:
    """Where the moments were stored; those of other data, as a cache had before it grew, are kept beside them for its runs."""
    tensors = {name: getattr(stats, name).contiguous() for name in TENSORS}
    if stats.cls is not None:
        tensors |= {f"cls.{name}": getattr(stats.cls, name).contiguous() for name in TENSORS}
    about = {"stats_id": stats.id, "tokens": str(stats.n), "of": json.dumps(stats_fields(cache, column))}
    path = stats_path(cache.path, column)
    keep_other_stats(path, stats.id)
    publish(path, sealed_moments(tensors, about), replace=True)
    return path


def older_stats_path(path: Path, id: str) -> Path:
    """Where moments of these data lie when newer ones have taken their place, `path`."""
    return path.with_name(f"{path.stem}.{id.partition(':')[2][:16]}.safetensors")


def keep_other_stats(path: Path, id: str) -> None:
    """Set moments of other data than `id` aside, where there are any and they are whole."""
    try:
        data = read_bytes(path)
        told = opened_moments(data)[1]["stats_id"]
    except (OSError, ValueError, KeyError):
        return
    if isinstance(told, str) and told != id and re.fullmatch("sha256:[0-9a-f]{64}", told):
        publish(older_stats_path(path, told), data, replace=True)


def read_stats(cache: Cache, column: str) -> Stats:
    """The stored moments of a column. ValueError where there are none, or where they are of other data than the cache's."""
    path, spec, wanted = (
        stats_path(cache.path, column),
        cache.column(column).spec,
        content_id(stats_fields(cache, column)),
    )
    path = kept if exists(kept := older_stats_path(path, wanted)) else path
    todo = f"run inspect-cache stats {cache.path}" + ("" if column in cache.columns else f" --column {column}")
    shapes = {"position_mean": (spec.grid[0] * spec.grid[1], spec.width), "residual_covariance": 2 * (spec.width,)}
    if spec.has_cls:
        shapes |= {"cls.position_mean": (1, spec.width), "cls.residual_covariance": 2 * (spec.width,)}
    try:
        stored, about = opened_moments(read_bytes(path))
        tensors = moments_in(stored, shapes)
        id, n, of = about["stats_id"], int(about["tokens"]), about["of"]
    except FileNotFoundError:
        raise ValueError(f"{path}: there are no moments of this column; {todo}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: there are no moments of this column ({error}); {todo}") from None
    if id != wanted:
        whole = load_plan(cache.path)  # a run may be pinned to what the cache held before it grew
        sizes = {"--views": (cache.n_views, whole.n_views), "--images": (cache.plan.n_images, whole.n_images)}
        todo += "".join(f" {name} {mine}" for name, (mine, now) in sizes.items() if mine != now)
        raise ValueError(
            f"{path}: these moments are of other data ({differing(of, stats_fields(cache, column))}); {todo}"
        )
    cls = None
    if spec.has_cls:
        n_images = n // len(tensors["position_mean"])
        cls = Stats(id, n_images, tensors["cls.position_mean"], tensors["cls.residual_covariance"])
    return Stats(id, n, tensors["position_mean"], tensors["residual_covariance"], cls)


def differing(told: object, wanted: Mapping[str, object]) -> str:
    """Which fields a file of moments tells otherwise than wanted: `n_views is 2 there and 1 here`."""
    try:
        there = parsed(str(told).encode(), dict[str, Any])
    except ValueError:
        there = {}
    found = [f"{name} is {shown(there.get(name))} there and {shown(value)} here" for name, value in wanted.items()
             if there.get(name) != value]  # fmt: skip
    return ", ".join(found) or shown(told)


def moments_in(stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The moments of these shapes among these tensors. ValueError where one is missing, or not finite float64 of its shape."""
    for name, shape in shapes.items():
        tensor = stored.get(name)
        if (
            tensor is None
            or (tensor.dtype, tuple(tensor.shape)) != (torch.float64, shape)
            or not tensor.isfinite().all()
        ):
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} is {found}; expected finite torch.float64 {list(shape)}")
    return {name: stored[name] for name in shapes}
