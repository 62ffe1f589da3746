"""What a term can predict: a batch with its cached targets as stored, and what the cache knows about each teacher."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from mrmae.train.recipe import TermRecipe

# How to get what a cache lacks, for the ends of error messages.
ADD = "add the teacher to the cache with extract-features IMAGES CACHE --teacher"


@dataclass(frozen=True)
class TeacherInfo:
    """One cached column: `value = channel_mean + channel_std * (scale[token] * code)`, missing parts being 0 and 1.

    has_scale: False for float columns. stat_mean, stat_std: exact statistics of the values, for the transform `channel`.
    """

    width: int
    channel_mean: Any = None
    channel_std: Any = None
    has_cls: bool = False
    has_attention: bool = False
    column: str = ""
    has_scale: bool = True
    stat_mean: Any = None
    stat_std: Any = None


@dataclass(frozen=True)
class CacheInfo:
    """The part of a cache that decides a model: `size` pixels a side, a grid of patches (rows, columns), the teachers."""

    size: int
    grid: tuple[int, int]
    teachers: Mapping[str, TeacherInfo] = field(default_factory=dict)
    channels: int = 3

    @property
    def n_patches(self) -> int:
        """Patches in the grid, l."""
        return self.grid[0] * self.grid[1]

    @property
    def patch(self) -> int:
        """Pixels along one side of a patch. Raises ValueError where the grid does not cut the view into whole squares."""
        rows, columns = self.grid
        if rows != columns or rows < 1 or self.size % rows:
            raise ValueError(
                f"cache: a grid of {rows} x {columns} does not cut {self.size} pixels into whole square patches; "
                "a square grid whose side divides the size was expected; extract again with another --size or --grid"
            )
        return self.size // rows


@dataclass(frozen=True)
class Batch:
    """b views and what the teachers said about them, as stored: nothing is dequantised before the loss.

    samples: hash of each sample's key. targets: per teacher the arrays a recipe needs: tokens [b, l, d] (int8 or float) with
    scale [b, l], cls [b, d], attention [b, l], norm [b, l].
    rows: `visible` where tokens and scale hold only the rows at `ids_keep`, [b, n_keep, ...], gathered before the copy.
    """

    samples: Int64[Tensor, " b"]
    pixels: UInt8[Tensor, "b h w c"]
    targets: dict[str, dict[str, Tensor]]
    rows: Literal["grid", "visible"] = "grid"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        targets = {
            teacher: {name: x.to(device, non_blocking=non_blocking) for name, x in arrays.items()}
            for teacher, arrays in self.targets.items()
        }
        samples, pixels = (x.to(device, non_blocking=non_blocking) for x in (self.samples, self.pixels))
        return replace(self, samples=samples, pixels=pixels, targets=targets)


class TeacherStatistics(nn.Module):
    """Per-channel constants of one teacher, as buffers that follow the model to its device; None where the cache has none.

    Not saved with the weights: they belong to the cache, whose ids a checkpoint records.
    """

    channel_mean: Tensor | None
    channel_std: Tensor | None
    stat_mean: Tensor | None
    stat_std: Tensor | None

    def __init__(self, info: TeacherInfo, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("channel_mean", "channel_std", "stat_mean", "stat_std"):
            value = getattr(info, name)
            tensor = None if value is None else torch.as_tensor(value).detach().to(dtype).clone()
            if tensor is not None and tensor.shape != (info.width,):
                raise ValueError(
                    f"column {info.column}: {name} has shape {list(tensor.shape)}; [{info.width}] was expected, "
                    "one value per channel; check the cache"
                )
            self.register_buffer(name, tensor, persistent=False)


def teachers_of(name: str, term: TermRecipe, info: CacheInfo) -> tuple[str, ...]:
    """The teachers a term predicts: those it names, else all of the cache.

    Raises ValueError when the cache lacks one, or what the term needs of it, saying what it has and how to add it.
    """
    has = ", ".join(info.teachers) or "no teacher"
    teachers = term.teachers or tuple(info.teachers)
    if not teachers:
        raise ValueError(
            f"term {name}: mimics teachers and the cache has none; at least one was expected; {ADD} NAME=..."
        )
    for teacher in teachers:
        if teacher not in info.teachers:
            raise ValueError(f"term {name}: wants teacher {teacher!r}; the cache has {has}; {ADD} {teacher}=...")
        column = info.teachers[teacher]
        if term.positions == "cls" and not column.has_cls:
            raise ValueError(
                f"term {name}: wants the CLS token of teacher {teacher!r}, which the cache does not hold; a teacher with a "
                f"CLS token was expected; name others with --set terms.{name}.teachers=[...]"
            )
        if term.transform == "channel" and (column.stat_mean is None or column.stat_std is None):
            raise ValueError(
                f"term {name}: transform channel wants channel statistics of teacher {teacher!r}; the cache has none; "
                f"compute them with inspect-cache stats, or use --set terms.{name}.transform=ln0"
            )
    return teachers
