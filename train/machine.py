"""What a run computes on: device, precision, memory, and the versions its numbers may depend on."""

import contextlib
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the GPU where it trains on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def versions() -> dict[str, str]:
    """What the numbers may depend on: Python and the packages that compute."""
    found = {"python": platform.python_version()}
    for name in ("mrmae", "torch", "timm", "numpy", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
