# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Triton twins of gather_patches and embed_tokens. Imported only where triton is installed.

Load, widen to fp32, compute, narrow at the store; explicit strides; int64 only for the offset of a sample; every output element is
written by the kernel that owns it; tails are masked; no atomics. The line-for-line definitions are in `reference.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from mrmae.kernels.launch import Launch, power_of_two, strides, warps_for
from mrmae.kernels.triton_runs import gather_runs_kernel, runs_launch, words_of


@triton.jit
def gather_patches_kernel(
    image,
    ids,
    scale,
    shift,
    out,
    n_images,
    n_patches,
    n_groups,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    ids_stride_v,
    ids_stride_n,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """GROUP patches of one row of ids per program, CHANNELS channels at a time."""
    row = tl.program_id(0) // n_groups
    slot = (tl.program_id(0) % n_groups) * GROUP + tl.arange(0, GROUP)
    alive = slot < n_patches
    id = tl.load(ids + row.to(tl.int64) * ids_stride_v + slot * ids_stride_n, mask=alive, other=0).to(tl.int32)
    c = tl.arange(0, CHANNELS)[None, :, None, None]
    r = tl.arange(0, SIDE)[None, None, :, None]
    q = tl.arange(0, SIDE)[None, None, None, :]
    inside = alive[:, None, None, None]
    if SIDE != PATCH:
        inside = inside & (r < PATCH) & (q < PATCH)
    corner = ((id // grid_w) * PATCH * stride_h + (id % grid_w) * PATCH * stride_w)[:, None, None, None]
    source = image + (row % n_images).to(tl.int64) * stride_b + (corner + c * stride_c + r * stride_h + q * stride_w)
    values: tl.constexpr = C * PATCH * PATCH
    within = slot[:, None, None, None] * values + c * (PATCH * PATCH) + r * PATCH + q
    target = out + row.to(tl.int64) * n_patches * values + within
    for first in range(0, C, CHANNELS):
        real = first + c < C
        mask = inside
        if C % CHANNELS != 0:
            mask = mask & real
        x = tl.load(source + first * stride_c, mask=mask, other=0).to(tl.float32)
        x = x * tl.load(scale + first + c, mask=real, other=0) + tl.load(shift + first + c, mask=real, other=0)
        tl.store(target + first * PATCH * PATCH, x.to(out.dtype.element_ty), mask=mask)


def gather_patches(image: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, patch: int) -> Launch:
    """image [b, c, h, w] of any strides; out [v, k, c*p*p], contiguous.

    Interleaved channels are read together: one by one, each byte load of a warp would touch 16 cache lines for 32 bytes.
    """
    factors = {"scale": scale.float().contiguous(), "shift": shift.float().contiguous(), "out": out}
    if (words := words_of(image, patch)) is not None:
        return runs_launch(gather_runs_kernel, words, image, ids, patch, factors)
    v, k = ids.shape
    c, side = image.shape[1], power_of_two(patch)
    together = min(power_of_two(c), 16) if image.stride(1) == 1 else 1
    group = max(1, 1024 // side**2)
    n_groups = -(-k // group)
    return Launch(
        gather_patches_kernel,
        v * n_groups,
        {
            "image": image,
            "ids": ids,
            **factors,
            "n_images": image.shape[0],
            "n_patches": k,
            "n_groups": n_groups,
            "grid_w": image.shape[3] // patch,
            **strides("stride", image, "bchw"),
            **strides("ids_stride", ids, "vn"),
        },
        {"C": c, "CHANNELS": together, "PATCH": patch, "SIDE": side, "GROUP": group},
        warps=min(16, 4 * max(1, together // 4)),
        rows=group,
    )


@triton.jit
def embed_tokens_kernel(
    tokens,
    position,
    cls_row,
    ids,
    out,
    n_tokens,
    tokens_stride_v,
    tokens_stride_k,
    tokens_stride_d,
    position_stride_l,
    position_stride_d,
    cls_stride_d,
    ids_stride_v,
    ids_stride_n,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One output row per program: the class row, or a token plus the position of its patch."""
    row = tl.program_id(0) // (n_tokens + 1)
    slot = tl.program_id(0) % (n_tokens + 1)
    d = tl.arange(0, WIDTH)
    mask = d < D
    target = out + row.to(tl.int64) * (n_tokens + 1) * D + slot * D + d
    if slot == 0:
        x = tl.load(cls_row + d * cls_stride_d, mask=mask, other=0).to(tl.float32)
        tl.store(target, x.to(out.dtype.element_ty), mask=mask)
    else:
        id = tl.load(ids + row.to(tl.int64) * ids_stride_v + (slot - 1) * ids_stride_n).to(tl.int32)
        source = tokens + row.to(tl.int64) * tokens_stride_v + ((slot - 1) * tokens_stride_k + d * tokens_stride_d)
        x = tl.load(source, mask=mask, other=0).to(tl.float32)
        x += tl.load(position + id * position_stride_l + d * position_stride_d, mask=mask, other=0).to(tl.float32)
        tl.store(target, x.to(out.dtype.element_ty), mask=mask)


def embed_tokens(tokens: Tensor, position: Tensor, cls_row: Tensor, ids: Tensor, out: Tensor) -> Launch:
    """tokens [v, k, d], position [l, d], cls_row [d] of any strides; out [v, 1 + k, d], contiguous."""
    v, k, d = tokens.shape
    width = power_of_two(d)
    return Launch(
        embed_tokens_kernel,
        v * (k + 1),
        {
            "tokens": tokens,
            "position": position,
            "cls_row": cls_row,
            "ids": ids,
            "out": out,
            "n_tokens": k,
            **strides("tokens_stride", tokens, "vkd"),
            **strides("position_stride", position, "ld"),
            **strides("cls_stride", cls_row, "d"),
            **strides("ids_stride", ids, "vn"),
        },
        {"D": d, "WIDTH": width},
        warps=warps_for(width),
    )
