"""What extract-features can be told, and what it chooses where it is told nothing."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mrmae.extract.teachers import DEFAULT_TEACHERS
from mrmae.shards.spec import ViewRecipe
from mrmae.shards.views import MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class Options:
    """What extract-features can be told. 0, -1 and "auto" choose; see the command's --help.

    grid: patches per side of the student; recipe.size must be a multiple of it.
    """

    images: Sequence[str | os.PathLike[str]]
    cache: Path
    recipe: ViewRecipe = dataclasses.field(default_factory=lambda: ViewRecipe(224))
    teachers: Sequence[str] = DEFAULT_TEACHERS
    include: Sequence[str] = ()
    views: int = 1
    grid: int = 14
    dtype: str = "int8"
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 0
    workers: int = 0
    shard_samples: int = 0
    max_bad: int = -1
    max_pixels: int = MAX_PIXELS
    allow_torchscript: bool = False

    def resolved(self) -> "Options":
        """The same with device, precision, batch size and workers chosen. ValueError for what cannot be."""
        if self.recipe.size % self.grid:
            raise ValueError(f"--size {self.recipe.size}: is not a multiple of --grid {self.grid}; "
                             "the student's patches tile the view; change one of them")  # fmt: skip
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            kind = torch.device(device).type
        except RuntimeError:
            raise ValueError(f"--device {device}: is no torch device; expected auto, cpu, cuda or cuda:N") from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: torch sees no CUDA device; expected one; use --device cpu")
        return dataclasses.replace(
            self,
            cache=Path(self.cache),
            device=device,
            precision=("fp16" if kind == "cuda" else "fp32") if self.precision == "auto" else self.precision,
            batch_size=self.batch_size or (64 if kind == "cuda" else 8),
            workers=self.workers or len(os.sched_getaffinity(0)),
        )
