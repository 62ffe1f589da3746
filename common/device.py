"""Which device and precision a name means on this machine, and how a process behaves there, for extraction, training and probes alike."""

import contextlib
import ctypes
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES, LARGEST_KEPT_BYTES = 1 << 30, 1 << 25  # the second is as large as glibc takes


def resolve_device(name: str, local: int = 0) -> torch.device:
    """The device; `auto` is a GPU where there is one, and `cuda` without a number the GPU number `local`.

    local: this process's number on its machine. Raises ValueError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
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


def keep_memory(device: str) -> None:
    """Where the work is a CPU's, have glibc's malloc keep what tensors leave behind, up to 1 GiB per arena.

    By default it gives larger ones back to the system, page by page, and asks for them again at the next step: a forward then
    takes 20 to 30 % more CPU time (benchmarks/results/malloc.csv). device: as in resolve_device.
    """
    if device != "cpu" and (device != "auto" or torch.cuda.is_available()):
        return
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Inside, models are built without memory: their tensors have shapes and no numbers."""
    with torch.device("meta"), Unfilled():
        yield


class Unfilled(TorchFunctionMode):
    """Tensors without memory are not filled: FILLING operations, which on them are two thirds of building a model, do nothing."""

    FILLING = frozenset(
        "zero_ fill_ copy_ uniform_ normal_ trunc_normal_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_ erfinv_ add_ sub_ mul_ "
        "div_ clamp_".split()
    )

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:  # fmt: skip
        if (
            getattr(func, "__name__", "") in self.FILLING
            and args
            and isinstance(args[0], torch.Tensor)
            and args[0].is_meta
        ):
            return args[0]
        return func(*args, **(kwargs or {}))
