"""Calls of the kernels as plain values: what a run asks of them, and the same again with random numbers, in another process."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; what decides how wide a kernel may load
MOST_POSITIONS = 1 << 14  # of a grid
UNSIGNED = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)


class Calls(list[dict[str, Any]]):
    """Given as `kernels` to the functions of `dispatch.py`: plain PyTorch computes, and every call is described here."""


class Remade(NamedTuple):
    """A call to make: `function` of dispatch.py, its tensors in order, the rest by name."""

    function: str
    tensors: list[Any]
    how: dict[str, Any]


def call_as_plain(function: str, tensors: Sequence[Any], how: Mapping[str, Any]) -> dict[str, Any]:
    """A call in values that JSON knows: shapes, strides, dtypes, and the highest of each tensor of whole numbers."""
    rest = {name: as_plain(x) for name, x in how.items() if name not in ("kernels", "debug")}
    return {"function": function, "tensors": [as_plain(x) for x in tensors], "how": rest}


def as_plain(x: Any) -> Any:
    """A tensor's looks, a dtype's name, anything else as it is."""
    if isinstance(x, torch.dtype):
        return {"is": "dtype", "dtype": str(x).removeprefix("torch.")}
    if not isinstance(x, Tensor):
        return x
    found: dict[str, Any] = {"is": "tensor", "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
    found |= {"stride": list(x.stride()), "offset": x.storage_offset() % max(1, ALIGNMENT // x.element_size())}
    found |= {"most": int(x.long().max())} if x.dtype in UNSIGNED else {}
    return found | {"grad": x.requires_grad}


def remade(call: Mapping[str, Any], device: torch.device, seed: int) -> Remade:
    """The call on `device` with random numbers: strides, alignment and gradients as described, grid indices distinct and ascending."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [remade_value(x, "", device, draw) for x in call["tensors"]]
    return Remade(
        call["function"], tensors, {name: remade_value(x, name, device, draw) for name, x in call["how"].items()}
    )


def remade_value(x: Any, name: str, device: torch.device, draw: torch.Generator) -> Any:
    """What `as_plain` described; a factor (`scale`, `.._std`) is positive."""
    if not isinstance(x, Mapping) or "is" not in x:
        return x
    dtype: torch.dtype = getattr(torch, x["dtype"])
    if x["is"] == "dtype":
        return dtype
    shape, stride = x["shape"], x["stride"]
    own = [1 if step == 0 else n for n, step in zip(shape, stride)]
    span = 1 + sum((n - 1) * step for n, step in zip(own, stride))
    buffer = torch.zeros(x["offset"] + span, dtype=dtype, device=device)
    view = buffer.as_strided(own, stride, x["offset"])
    values = random_values(own, dtype, x.get("most"), draw)
    view.copy_((values.abs() + 0.5 if name == "scale" or name.endswith("std") else values).to(dtype))
    return view.expand(shape).detach().requires_grad_(x["grad"])


def random_values(shape: Sequence[int], dtype: torch.dtype, most: int | None, draw: torch.Generator) -> Tensor:
    """Normal floats, codes of -127..127, bytes up to `most`; int64 in ascending rows without repetition, where there are enough."""
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
    if most is None:
        return torch.randn(shape, generator=draw)
    if dtype == torch.int64 and shape and shape[-1] <= most + 1 <= MOST_POSITIONS:
        return torch.rand(*shape[:-1], most + 1, generator=draw).argsort(-1)[..., : shape[-1]].sort(-1).values
    return torch.randint(0, most + 1, shape, generator=draw)
