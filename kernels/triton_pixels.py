# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Triton twin of pixel_loss, forward and backward. Imported only where triton is installed; rules as in `triton_patches.py`."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mrmae.kernels.launch import Launch, power_of_two, strides, warps_for
from mrmae.kernels.triton_runs import pixel_runs_backward_kernel, pixel_runs_kernel, runs_launch, words_of

NORM_PIX_EPS = tl.constexpr(1e-6)


@triton.jit
def load_patch(
    image,
    scale,
    shift,
    id,
    source_row,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Normalised pixels of one patch as a [CHANNELS, SIDE, SIDE] tile, their (c, p, q) index and the mask of real ones."""
    c = tl.arange(0, CHANNELS)[:, None, None]
    r = tl.arange(0, SIDE)[None, :, None]
    q = tl.arange(0, SIDE)[None, None, :]
    mask = (c < C) & (r < PATCH) & (q < PATCH)
    corner = (id // grid_w) * PATCH * stride_h + (id % grid_w) * PATCH * stride_w
    source = image + source_row.to(tl.int64) * stride_b + (corner + c * stride_c + r * stride_h + q * stride_w)
    x = tl.load(source, mask=mask, other=0).to(tl.float32)
    x = x * tl.load(scale + c, mask=c < C, other=0) + tl.load(shift + c, mask=c < C, other=0)
    return x, c * (PATCH * PATCH) + r * PATCH + q, mask


@triton.jit
def pixel_loss_kernel(
    image,
    pred,
    ids,
    scale,
    shift,
    loss,
    stats,
    n_images,
    n_patches,
    n_total,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    pred_stride_v,
    pred_stride_m,
    pred_stride_d,
    ids_stride_v,
    ids_stride_n,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    SIDE: tl.constexpr,
    NORM_PIX: tl.constexpr,
):
    """One patch per program: its loss, its mean and 1 / sqrt(var + eps)."""
    row = tl.program_id(0) // n_patches
    slot = tl.program_id(0) % n_patches
    id = tl.load(ids + row.to(tl.int64) * ids_stride_v + slot * ids_stride_n).to(tl.int32)
    x, k, mask = load_patch(
        image,
        scale,
        shift,
        id,
        row % n_images,
        grid_w,
        stride_b,
        stride_c,
        stride_h,
        stride_w,
        C,
        CHANNELS,
        PATCH,
        SIDE,
    )
    y = tl.load(
        pred + row.to(tl.int64) * pred_stride_v + (slot * pred_stride_m + k * pred_stride_d), mask=mask, other=0
    )
    values: tl.constexpr = C * PATCH * PATCH
    mean = 0.0
    rstd = 1.0
    if NORM_PIX:
        mean = tl.sum(tl.where(mask, x, 0.0)) / values
        centred = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred) / (values - 1) + NORM_PIX_EPS)
    e = tl.where(mask, y.to(tl.float32) - (x - mean) * rstd, 0.0)
    tl.store(loss + tl.program_id(0), tl.sum(e * e) / values)
    tl.store(stats + tl.program_id(0), mean)
    tl.store(stats + n_total + tl.program_id(0), rstd)


@triton.jit
def pixel_loss_backward_kernel(
    grad,
    image,
    pred,
    ids,
    scale,
    shift,
    stats,
    out,
    n_images,
    n_patches,
    n_total,
    grid_w,
    grad_stride_v,
    grad_stride_m,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    pred_stride_v,
    pred_stride_m,
    pred_stride_d,
    ids_stride_v,
    ids_stride_n,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    SIDE: tl.constexpr,
):
    """One patch per program: 2 g (pred - t) / P from the saved statistics; nothing is reduced."""
    row = tl.program_id(0) // n_patches
    slot = tl.program_id(0) % n_patches
    id = tl.load(ids + row.to(tl.int64) * ids_stride_v + slot * ids_stride_n).to(tl.int32)
    x, k, mask = load_patch(
        image,
        scale,
        shift,
        id,
        row % n_images,
        grid_w,
        stride_b,
        stride_c,
        stride_h,
        stride_w,
        C,
        CHANNELS,
        PATCH,
        SIDE,
    )
    y = tl.load(
        pred + row.to(tl.int64) * pred_stride_v + (slot * pred_stride_m + k * pred_stride_d), mask=mask, other=0
    )
    values: tl.constexpr = C * PATCH * PATCH
    mean = tl.load(stats + tl.program_id(0))
    rstd = tl.load(stats + n_total + tl.program_id(0))
    g = tl.load(grad + row.to(tl.int64) * grad_stride_v + slot * grad_stride_m).to(tl.float32) * (2.0 / values)
    e = (y.to(tl.float32) - (x - mean) * rstd) * g
    target = out + row.to(tl.int64) * n_patches * values + slot * values + k
    tl.store(target, e.to(out.dtype.element_ty), mask=mask)


def pixel_tile(image: Tensor, patch: int) -> dict[str, int]:
    """Compile-time shape of one patch."""
    channels = image.shape[1]
    return {"C": channels, "CHANNELS": power_of_two(channels), "PATCH": patch, "SIDE": power_of_two(patch)}


def pixel_loss(
    image: Tensor,
    pred: Tensor,
    ids: Tensor,
    scale: Tensor,
    shift: Tensor,
    loss: Tensor,
    stats: Tensor,
    *,
    patch: int,
    norm_pix: bool,
) -> Launch:
    """image and pred of any strides; loss [v, m] and stats [2, v, m] (mean, 1 / std) fp32, contiguous."""
    if (words := words_of(image, patch)) is not None:
        about: dict[str, Any] = {"pred": pred, "scale": scale.float().contiguous(), "shift": shift.float().contiguous()}
        about |= {"loss": loss, "stats": stats, "n_total": ids.numel(), **strides("pred_stride", pred, "vmd")}
        return runs_launch(pixel_runs_kernel, words, image, ids, patch, about, NORM_PIX=norm_pix)
    tile = pixel_tile(image, patch)
    return Launch(
        pixel_loss_kernel,
        ids.numel(),
        {
            "image": image,
            "pred": pred,
            "ids": ids,
            "scale": scale.float().contiguous(),
            "shift": shift.float().contiguous(),
            "loss": loss,
            "stats": stats,
            "n_images": image.shape[0],
            "n_patches": ids.shape[1],
            "n_total": ids.numel(),
            "grid_w": image.shape[3] // patch,
            **strides("stride", image, "bchw"),
            **strides("pred_stride", pred, "vmd"),
            **strides("ids_stride", ids, "vn"),
        },
        {**tile, "NORM_PIX": norm_pix},
        warps=warps_for(tile["CHANNELS"] * tile["SIDE"] ** 2),
    )


def pixel_loss_backward(
    grad: Tensor,
    image: Tensor,
    pred: Tensor,
    ids: Tensor,
    scale: Tensor,
    shift: Tensor,
    stats: Tensor,
    out: Tensor,
    *,
    patch: int,
) -> Launch:
    """grad [v, m] of any strides (a sum's gradient is expanded: stride 0); out [v, m, P], contiguous."""
    if (words := words_of(image, patch)) is not None:
        about: dict[str, Any] = {
            "grad": grad,
            "pred": pred,
            "scale": scale.float().contiguous(),
            "shift": shift.float().contiguous(),
        }
        about |= {"stats": stats, "out": out, "n_total": ids.numel(), **strides("grad_stride", grad, "vm")}
        about |= strides("pred_stride", pred, "vmd")
        return runs_launch(pixel_runs_backward_kernel, words, image, ids, patch, about)
    tile = pixel_tile(image, patch)
    return Launch(
        pixel_loss_backward_kernel,
        ids.numel(),
        {
            "grad": grad,
            "image": image,
            "pred": pred,
            "ids": ids,
            "scale": scale.float().contiguous(),
            "shift": shift.float().contiguous(),
            "stats": stats,
            "out": out,
            "n_images": image.shape[0],
            "n_patches": ids.shape[1],
            "n_total": ids.numel(),
            "grid_w": image.shape[3] // patch,
            **strides("grad_stride", grad, "vm"),
            **strides("stride", image, "bchw"),
            **strides("pred_stride", pred, "vmd"),
            **strides("ids_stride", ids, "vn"),
        },
        tile,
        warps=warps_for(tile["CHANNELS"] * tile["SIDE"] ** 2),
    )
