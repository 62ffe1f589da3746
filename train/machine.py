"""What a run computes on: device, precision, memory, and the versions its numbers may depend on."""

import contextlib
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from mrmae.train.ranks import Ranks


def resolve_device(name: str, ranks: Ranks) -> torch.device:
    """The device to train on; under torchrun each rank takes the GPU of its number. Raises ValueError for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", ranks.local)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used ({reason}); expected auto, cpu, cuda or cuda:N") from error
    return device


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
