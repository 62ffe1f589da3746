# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""gather_patches and pixel_loss of interleaved bytes: [b, h, w, c] images, as views are decoded. Imported only where triton is installed.

A run of 8 pixels is C words of 64 bits: one lane loads them, takes its bytes apart in registers and has 8 neighbouring values of every
channel, which is how the (c, p, q) rows of predictions and patches lie. Nothing passes through shared memory. A patch of 16 is
one warp, and a program holds a patch per warp. Where images and rows begin at multiples of 16 bytes, words are loaded in pairs, 128 bits at once:
the three words of an RGB run lie in two pairs, whose fourth word is a neighbour's. Rules and definitions as in `triton_patches.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrmae.kernels.launch import WARPS, Launch, strides

NORM_PIX_EPS = tl.constexpr(1e-6)


@triton.jit
def words_at(words, image, place, mask, C: tl.constexpr, PAIRS: tl.constexpr):
    """The C words of every run at `place` of its image, others in the place of those that are not there: read once, before anything is stored."""
    if PAIRS:
        # Shifted out and in again, both offsets are even for the compiler too, whatever it knows of the strides.
        pair = words + (image >> 1 << 1) + (place >> 1 << 1)[:, :, None] + tl.arange(0, 2)[None, None, :]
        w0, w1 = tl.split(tl.load(pair, mask=mask[:, :, None], other=0))
        w2, w3 = w0, w1
        if C > 2:
            w2, w3 = tl.split(tl.load(pair + 2, mask=mask[:, :, None], other=0))
        if C == 3:  # every second run of a row begins in the middle of a pair, behind a word of its neighbour
            odd = tl.arange(0, place.shape[1])[None, :] & 1 == 1
            w0, w1, w2 = tl.where(odd, w1, w0), tl.where(odd, w2, w1), tl.where(odd, w3, w2)
        return w0, w1, w2, w3
    else:
        words += image
        w0 = tl.load(words + place, mask=mask, other=0)
        w1, w2, w3 = w0, w0, w0
        if C > 1:
            w1 = tl.load(words + (place + 1), mask=mask, other=0)
        if C > 2:
            w2 = tl.load(words + (place + 2), mask=mask, other=0)
        if C > 3:
            w3 = tl.load(words + (place + 3), mask=mask, other=0)
        return w0, w1, w2, w3


@triton.jit
def byte_of(w0, w1, w2, w3, B: tl.constexpr):
    """Byte B of every run, as a 32-bit number."""
    word = w0
    if B // 8 == 1:
        word = w1
    if B // 8 == 2:
        word = w2
    if B // 8 == 3:
        word = w3
    return ((word >> (8 * (B % 8))) & 255).to(tl.int32)


@triton.jit
def channel_of(w0, w1, w2, w3, scale, shift, C: tl.constexpr, AT: tl.constexpr):
    """Normalised values of one channel, [..., 8]: the 8 pixels of every run in order."""
    a = tl.join(byte_of(w0, w1, w2, w3, AT), byte_of(w0, w1, w2, w3, 4 * C + AT))
    b = tl.join(byte_of(w0, w1, w2, w3, 2 * C + AT), byte_of(w0, w1, w2, w3, 6 * C + AT))
    c = tl.join(byte_of(w0, w1, w2, w3, C + AT), byte_of(w0, w1, w2, w3, 5 * C + AT))
    d = tl.join(byte_of(w0, w1, w2, w3, 3 * C + AT), byte_of(w0, w1, w2, w3, 7 * C + AT))
    x = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (w0.shape[0], w0.shape[1], 8))
    return x.to(tl.float32) * tl.load(scale + AT) + tl.load(shift + AT)


@triton.jit
def runs_of_patches(
    ids, n_images, n_patches, n_groups, grid_w, stride_b, stride_h, ids_stride_v, ids_stride_n,
    C: tl.constexpr, PATCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For ROWS patches of one row of ids: that row, its patches' numbers, who of them is there, the image's offset, each run's word."""
    row = tl.program_id(0) // n_groups
    slot = (tl.program_id(0) % n_groups) * ROWS + tl.arange(0, ROWS)
    alive = slot < n_patches
    id = tl.load(ids + row.to(tl.int64) * ids_stride_v + slot * ids_stride_n, mask=alive, other=0).to(tl.int32)
    across: tl.constexpr = PATCH // 8
    run = tl.arange(0, PATCH * across)[None, :]
    corner = ((id // grid_w) * PATCH * stride_h + (id % grid_w) * (across * C))[:, None]
    place = corner + (run // across) * stride_h + (run % across) * C
    return row, slot, alive, (row % n_images).to(tl.int64) * stride_b, place


@triton.jit
def gather_runs_kernel(
    words, ids, scale, shift, out, n_images, n_patches, n_groups, grid_w, stride_b, stride_h, ids_stride_v, ids_stride_n,
    C: tl.constexpr, PATCH: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """ROWS patches of one row of ids per program."""
    row, slot, alive, image, place = runs_of_patches(
        ids, n_images, n_patches, n_groups, grid_w, stride_b, stride_h, ids_stride_v, ids_stride_n, C, PATCH, ROWS
    )
    values: tl.constexpr = C * PATCH * PATCH
    within = tl.arange(0, PATCH * PATCH // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    target = out + row.to(tl.int64) * n_patches * values + (slot[:, None, None] * values + within)
    w0, w1, w2, w3 = words_at(words, image, place, alive[:, None] & (place >= 0), C, PAIRS)
    for c in tl.static_range(C):
        x = channel_of(w0, w1, w2, w3, scale, shift, C, c)
        tl.store(target + c * PATCH * PATCH, x.to(out.dtype.element_ty), mask=alive[:, None, None])


@triton.jit
def pixel_runs_kernel(
    words, pred, ids, scale, shift, loss, stats, n_images, n_patches, n_groups, n_total, grid_w, stride_b, stride_h,
    pred_stride_v, pred_stride_m, pred_stride_d, ids_stride_v, ids_stride_n,
    C: tl.constexpr, PATCH: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, NORM_PIX: tl.constexpr,
):  # fmt: skip
    """Loss, mean and 1 / sqrt(var + eps) of ROWS patches."""
    row, slot, alive, image, place = runs_of_patches(
        ids, n_images, n_patches, n_groups, grid_w, stride_b, stride_h, ids_stride_v, ids_stride_n, C, PATCH, ROWS
    )
    values: tl.constexpr = C * PATCH * PATCH
    within = tl.arange(0, PATCH * PATCH // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    source = pred + row.to(tl.int64) * pred_stride_v + (slot[:, None, None] * pred_stride_m + within * pred_stride_d)
    w0, w1, w2, w3 = words_at(words, image, place, alive[:, None] & (place >= 0), C, PAIRS)
    mean = tl.zeros((ROWS,), tl.float32)
    rstd = mean + 1.0
    if NORM_PIX:
        for c in tl.static_range(C):
            mean += over_patch(channel_of(w0, w1, w2, w3, scale, shift, C, c))
        mean = mean / values
        square = tl.zeros((ROWS,), tl.float32)
        for c in tl.static_range(C):
            centred = channel_of(w0, w1, w2, w3, scale, shift, C, c) - mean[:, None, None]
            square += over_patch(centred * centred)
        rstd = tl.rsqrt(square / (values - 1) + NORM_PIX_EPS)
    total = tl.zeros((ROWS,), tl.float32)
    for c in tl.static_range(C):
        x = channel_of(w0, w1, w2, w3, scale, shift, C, c)
        y = tl.load(source + c * PATCH * PATCH * pred_stride_d, mask=alive[:, None, None], other=0).to(tl.float32)
        e = y - (x - mean[:, None, None]) * rstd[:, None, None]
        total += over_patch(e * e)
    at = row * n_patches + slot
    tl.store(loss + at, total / values, mask=alive)
    tl.store(stats + at, mean, mask=alive)
    tl.store(stats + n_total + at, rstd, mask=alive)


@triton.jit
def over_patch(x):
    """The sum of each patch's values of one channel."""
    return tl.sum(tl.sum(x, axis=2), axis=1)


@triton.jit
def pixel_runs_backward_kernel(
    grad, words, pred, ids, scale, shift, stats, out, n_images, n_patches, n_groups, n_total, grid_w, grad_stride_v, grad_stride_m,
    stride_b, stride_h, pred_stride_v, pred_stride_m, pred_stride_d, ids_stride_v, ids_stride_n,
    C: tl.constexpr, PATCH: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """2 g (pred - t) / P of ROWS patches from the saved statistics; nothing is reduced."""
    row, slot, alive, image, place = runs_of_patches(
        ids, n_images, n_patches, n_groups, grid_w, stride_b, stride_h, ids_stride_v, ids_stride_n, C, PATCH, ROWS
    )
    values: tl.constexpr = C * PATCH * PATCH
    within = tl.arange(0, PATCH * PATCH // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    source = pred + row.to(tl.int64) * pred_stride_v + (slot[:, None, None] * pred_stride_m + within * pred_stride_d)
    target = out + row.to(tl.int64) * n_patches * values + (slot[:, None, None] * values + within)
    w0, w1, w2, w3 = words_at(words, image, place, alive[:, None] & (place >= 0), C, PAIRS)
    at = row * n_patches + slot
    mean = tl.load(stats + at, mask=alive, other=0)[:, None, None]
    rstd = tl.load(stats + n_total + at, mask=alive, other=0)[:, None, None]
    g = tl.load(grad + row.to(tl.int64) * grad_stride_v + slot * grad_stride_m, mask=alive, other=0).to(tl.float32)
    g = (g * (2.0 / values))[:, None, None]
    for c in tl.static_range(C):
        x = channel_of(w0, w1, w2, w3, scale, shift, C, c)
        y = tl.load(source + c * PATCH * PATCH * pred_stride_d, mask=alive[:, None, None], other=0).to(tl.float32)
        e = (y - (x - mean) * rstd) * g
        tl.store(target + c * PATCH * PATCH, e.to(out.dtype.element_ty), mask=alive[:, None, None])


def words_of(image: Tensor, patch: int) -> Tensor | None:
    """The rows [b, h, w*c/8] of a [b, c, h, w] view as 64-bit words; None where it is no image of whole and aligned runs."""
    c, w = image.shape[1], image.shape[3]
    b_stride, c_stride, h_stride, w_stride = image.stride()
    if image.dtype != torch.uint8 or patch not in (8, 16, 32) or c > 4 or (c > 1 and c_stride != 1) or w_stride != c:
        return None
    if h_stride % 8 or b_stride % 8 or image.data_ptr() % 8 or image.storage_offset() % 8:
        return None
    rows = image.as_strided((image.shape[0], image.shape[2], w * c), (b_stride, h_stride, 1))
    return rows.view(torch.int64)


def in_pairs(words: Tensor, channels: int, patch: int) -> bool:
    """Whether `words_at` may read two words at once: runs, or two neighbours of a patch, are whole pairs, and images and rows begin at multiples of 16 bytes."""
    whole = channels in (2, 4) or (channels == 3 and patch > 8)
    return whole and not any(x % 2 for x in (words.data_ptr() // 8, *words.stride()[:2]))


def runs_launch(
    kernel: Any, words: Tensor, image: Tensor, ids: Tensor, patch: int, arguments: dict[str, Any], **constants: Any
) -> Launch:
    """A launch of one of these kernels; `arguments` beside those that all of them have."""
    rows = max(1, WARPS * 32 * 8 // patch**2)
    n_groups = -(-ids.shape[1] // rows)
    common = {
        "words": words, "ids": ids, "n_images": image.shape[0], "n_patches": ids.shape[1], "n_groups": n_groups, "grid_w": image.shape[3] // patch,
        "stride_b": words.stride(0), "stride_h": words.stride(1), **strides("ids_stride", ids, "vn"),
    }  # fmt: skip
    c = image.shape[1]
    constants = {"C": c, "PATCH": patch, "ROWS": rows, "PAIRS": in_pairs(words, c, patch), **constants}
    return Launch(kernel, ids.shape[0] * n_groups, common | arguments, constants, WARPS, rows)
