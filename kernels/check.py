"""Argument checks of the kernels: every refusal names the argument, its value and what was expected.

Shapes, dtypes and devices cost nothing and are always checked. The range of ids is data: on CUDA reading it would stall the
device, so it is checked on CPU tensors, and everywhere with `debug=True`.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMAGES = (torch.uint8, torch.uint16, *FLOATS)
CODES = (torch.int8, torch.float8_e4m3fn, *FLOATS)


def refuse(where: str, wrong: str, expected: str, advice: str) -> NoReturn:
    """ValueError in the form of the house: where, what is wrong, what was expected, what to do."""
    raise ValueError(f"{where}: {wrong}; {expected} was expected; {advice}")


def dtype_in(where: str, name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if x.dtype not in allowed:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        refuse(where, f"{name} is {str(x.dtype).removeprefix('torch.')}", f"one of {wanted}", f"convert {name}")


def shape_is(where: str, name: str, x: Tensor, expected: Sequence[int | None], advice: str) -> None:
    """`None` in expected allows any size there."""
    if x.ndim != len(expected) or any(want is not None and got != want for got, want in zip(x.shape, expected)):
        wanted = "[" + ", ".join("any" if n is None else str(n) for n in expected) + "]"
        refuse(where, f"{name} has shape {list(x.shape)}", f"shape {wanted}", advice)


def same_device(where: str, device: torch.device, tensors: Mapping[str, Tensor | None], first: str) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != device:
            refuse(where, f"{name} is on {x.device}, {first} on {device}", "one device", f"move {name} to {device}")


def no_grad(where: str, name: str, x: Tensor | None) -> None:
    """The kernels compute no gradient for data and frozen statistics: silence would be a wrong answer."""
    if x is not None and x.requires_grad:
        refuse(where, f"{name} requires a gradient", f"{name} without one", f"pass {name}.detach()")


def image_view(where: str, image: Tensor, patch: int, channels_last: bool) -> Tensor:
    """The image as a [b, c, h, w] view, after checking dtype, shape and that patches tile it."""
    dtype_in(where, "image", image, IMAGES)
    no_grad(where, "image", image)
    shape_is(where, "image", image, (None,) * 4, "pass [b, h, w, c] or [b, c, h, w] and say which by channels_last")
    view = image.permute(0, 3, 1, 2) if channels_last else image
    order = "[b, h, w, c]" if channels_last else "[b, c, h, w]"
    h, w = view.shape[2:]
    if patch < 1 or h % patch or w % patch or not view.numel():
        refuse(
            where,
            f"image {order} has shape {list(image.shape)} and patch is {patch}",
            "a non-empty image whose height and width are multiples of patch",
            "resize the images, or check patch and channels_last",
        )
    return view


def grid_size(view: Tensor, patch: int) -> int:
    """Patches of a [b, c, h, w] view."""
    return (view.shape[2] // patch) * (view.shape[3] // patch)


def affine(where: str, view: Tensor, scale: Tensor, shift: Tensor) -> None:
    for name, x in (("scale", scale), ("shift", shift)):
        dtype_in(where, name, x, FLOATS)
        shape_is(where, name, x, (view.shape[1],), "one value per image channel; check channels_last")
        no_grad(where, name, x)


def ids_of(where: str, name: str, ids: Tensor, *, images: int, l: int, debug: bool) -> None:
    """int64 [v, n] with n >= 1, v a multiple of `images`, values within the grid of `l` patches."""
    dtype_in(where, name, ids, (torch.int64,))
    shape_is(where, name, ids, (None, None), "one row of grid indices per image")
    if ids.shape[1] == 0:
        refuse(where, f"{name} has shape {list(ids.shape)}: 0 patches per image", "at least 1", "change the mask ratio")
    if ids.shape[0] == 0 or ids.shape[0] % images:
        refuse(
            where, f"{name} has {ids.shape[0]} rows for {images} images", "one row per image and mask", f"check {name}"
        )
    if debug or (ids.device.type == "cpu" and not torch.compiler.is_compiling()):
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= l:
            refuse(where, f"{name} holds {low if low < 0 else high}", f"0 <= id < {l} (the grid)", f"check {name}")
