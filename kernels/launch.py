"""One Triton launch as data, so that the ahead-of-time gate compiles exactly what the device would run.

Launch parameters come from a fixed table, never from `@autotune`: a choice made by the clock could change the order of a sum between
two runs. `num_stages` 1 keeps the loops out of shared memory; without fused multiply-adds the arithmetic is the reference's.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
WARPS = 4  # of a program that holds several patches or tokens
VALUES_PER_WARP = 1024  # 32 values per thread and tile: no spills up to two tiles


def power_of_two(n: int) -> int:
    """The smallest power of two >= n: the width of a tile."""
    return 1 << (n - 1).bit_length()


def warps_for(values: int) -> int:
    """Warps for a program that holds `values` numbers of one tile."""
    return min(16, max(1, power_of_two(values) // VALUES_PER_WARP))


def strides(prefix: str, x: Tensor, names: str) -> dict[str, int]:
    """Strides as named launch arguments."""
    return {f"{prefix}_{name}": stride for name, stride in zip(names, x.stride())}


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments in order, its compile-time constants and its size. rows: patches or tokens of one program."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    rows: int = 1

    def run(self) -> None:
        """Start the kernel on the device of its tensors."""
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.warps, **OPTIONS)
