# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Triton twin of mimic_loss: several tokens per program, forward and backward; and of code_components. Imported only where triton is installed.

Both directions read the student token and the teacher's stored token once, in any dtype, and keep them in registers. Offsets, masks
and stores as in `triton_patches.py`; the definition is in `reference.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrmae.kernels.launch import VALUES_PER_WARP, WARPS, Launch, power_of_two, strides, warps_for

LN_EPS = tl.constexpr(1e-5)
UNIT_EPS = tl.constexpr(1e-12)


@triton.jit
def channels_of(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Channels as a [ROWS, WIDTH] tile: all rows, so that what is read per channel comes to the lanes that hold the tokens, and moves no more."""
    return tl.arange(0, WIDTH)[None, :] + tl.zeros((ROWS, 1), tl.int32)


@triton.jit
def values_of_e4m3(byte):
    """The numbers that bytes hold as E4M3, which not every device knows: as float16 they have the same bits, at an exponent of 8 less."""
    bits = byte.to(tl.int16)
    value = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def over_channels(x):
    """The sum over all channels of every token, as a tile that broadcasts."""
    return tl.sum(x, axis=1)[:, None]


@triton.jit
def load_pair(
    student,
    codes,
    ids,
    scale,
    channel_mean,
    channel_std,
    stat_mean,
    stat_std,
    positions,
    n_images,
    n_rows,
    n_tokens,
    student_stride_v,
    student_stride_n,
    student_stride_d,
    codes_stride_b,
    codes_stride_l,
    codes_stride_d,
    ids_stride_v,
    ids_stride_n,
    scale_stride_b,
    scale_stride_l,
    positions_stride_v,
    positions_stride_n,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGET: tl.constexpr,
    GATHERED: tl.constexpr,
    SCALE: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    ROWS: tl.constexpr,
    E4M3: tl.constexpr,
):
    """ROWS student tokens, their normalised teacher tokens (both fp32, 0 outside), which they are, who is there, and the mask of real channels."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = token < n_rows * n_tokens
    row = (token // n_tokens).to(tl.int64)
    slot = token % n_tokens
    d = channels_of(ROWS, WIDTH)
    inside = d < D
    mask = alive[:, None] & inside
    at = slot
    if not GATHERED:
        at = tl.load(ids + row * ids_stride_v + slot * ids_stride_n, mask=alive, other=0).to(tl.int32)
    image = (token // n_tokens % n_images).to(tl.int64)
    source = (student + (row * student_stride_v + slot * student_stride_n)[:, None]) + d * student_stride_d
    x = tl.load(source, mask=mask, other=0).to(tl.float32)
    stored = (codes + (image * codes_stride_b + at * codes_stride_l)[:, None]) + d * codes_stride_d
    y = tl.load(stored, mask=mask, other=0)
    if E4M3:
        y = values_of_e4m3(y)
    y = y.to(tl.float32)
    if SCALE:
        factor = tl.load(scale + image * scale_stride_b + at * scale_stride_l, mask=alive, other=0)
        y = y * factor.to(tl.float32)[:, None]
    if STD:
        y = y * tl.load(channel_std + d, mask=inside, other=0)
    if MEAN:
        y = y + tl.load(channel_mean + d, mask=inside, other=0)
    if TARGET == "channel":
        y = y - tl.load(stat_mean + d, mask=inside, other=0)
    if TARGET == "position" or TARGET == "position+ln0":
        position = tl.load(positions + row * positions_stride_v + slot * positions_stride_n, mask=alive, other=0)
        y = y - tl.load((stat_mean + (position.to(tl.int32) * D)[:, None]) + d, mask=mask, other=0)
    if TARGET == "ln0" or TARGET == "position+ln0":
        centred = tl.where(inside, y - over_channels(y) / D, 0.0)
        y = centred * tl.rsqrt(over_channels(centred * centred) / D + LN_EPS)
    if TARGET == "l2":
        y = y * tl.rsqrt(over_channels(y * y) + UNIT_EPS)
    if TARGET == "channel" or TARGET == "position":
        y = y / tl.load(stat_std + d, mask=inside, other=1)
    return x, y, token, alive, mask


@triton.jit
def mimic_loss_kernel(
    loss,
    student,
    codes,
    ids,
    scale,
    channel_mean,
    channel_std,
    stat_mean,
    stat_std,
    positions,
    beta,
    n_images,
    n_rows,
    n_tokens,
    student_stride_v,
    student_stride_n,
    student_stride_d,
    codes_stride_b,
    codes_stride_l,
    codes_stride_d,
    ids_stride_v,
    ids_stride_n,
    scale_stride_b,
    scale_stride_l,
    positions_stride_v,
    positions_stride_n,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGET: tl.constexpr,
    DISTANCE: tl.constexpr,
    GATHERED: tl.constexpr,
    SCALE: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    ROWS: tl.constexpr,
    E4M3: tl.constexpr,
):
    """The distances of ROWS token pairs."""
    x, y, token, alive, mask = load_pair(
        student,
        codes,
        ids,
        scale,
        channel_mean,
        channel_std,
        stat_mean,
        stat_std,
        positions,
        n_images,
        n_rows,
        n_tokens,
        student_stride_v,
        student_stride_n,
        student_stride_d,
        codes_stride_b,
        codes_stride_l,
        codes_stride_d,
        ids_stride_v,
        ids_stride_n,
        scale_stride_b,
        scale_stride_l,
        positions_stride_v,
        positions_stride_n,
        D,
        WIDTH,
        TARGET,
        GATHERED,
        SCALE,
        MEAN,
        STD,
        ROWS,
        E4M3,
    )
    if DISTANCE == "cosd":
        lengths = tl.rsqrt(over_channels(x * x) + UNIT_EPS) * tl.rsqrt(over_channels(y * y) + UNIT_EPS)
        found = 1.0 - over_channels(x * y) * lengths
    else:
        e = tl.where(mask, x - y, 0.0)
        cost = e * e
        if DISTANCE == "sl1":
            size = tl.abs(e)
            cost = tl.where(size < beta, 0.5 * cost / beta, size - 0.5 * beta)
            cost = tl.where(mask, cost, 0.0)
        found = over_channels(cost) / D
    tl.store(loss + token[:, None], found, mask=alive[:, None])


@triton.jit
def mimic_loss_backward_kernel(
    grad,
    out,
    student,
    codes,
    ids,
    scale,
    channel_mean,
    channel_std,
    stat_mean,
    stat_std,
    positions,
    beta,
    n_images,
    n_rows,
    n_tokens,
    grad_stride_v,
    grad_stride_n,
    student_stride_v,
    student_stride_n,
    student_stride_d,
    codes_stride_b,
    codes_stride_l,
    codes_stride_d,
    ids_stride_v,
    ids_stride_n,
    scale_stride_b,
    scale_stride_l,
    positions_stride_v,
    positions_stride_n,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGET: tl.constexpr,
    DISTANCE: tl.constexpr,
    GATHERED: tl.constexpr,
    SCALE: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    ROWS: tl.constexpr,
    E4M3: tl.constexpr,
):
    """The gradients of ROWS student tokens, the pairs read and normalised again."""
    x, y, token, alive, mask = load_pair(
        student,
        codes,
        ids,
        scale,
        channel_mean,
        channel_std,
        stat_mean,
        stat_std,
        positions,
        n_images,
        n_rows,
        n_tokens,
        student_stride_v,
        student_stride_n,
        student_stride_d,
        codes_stride_b,
        codes_stride_l,
        codes_stride_d,
        ids_stride_v,
        ids_stride_n,
        scale_stride_b,
        scale_stride_l,
        positions_stride_v,
        positions_stride_n,
        D,
        WIDTH,
        TARGET,
        GATHERED,
        SCALE,
        MEAN,
        STD,
        ROWS,
        E4M3,
    )
    row = (token // n_tokens).to(tl.int64)
    slot = token % n_tokens
    g = tl.load(grad + row * grad_stride_v + slot * grad_stride_n, mask=alive, other=0).to(tl.float32)
    if DISTANCE == "cosd":
        length = tl.rsqrt(over_channels(x * x) + UNIT_EPS)
        y = y * tl.rsqrt(over_channels(y * y) + UNIT_EPS)
        slope = over_channels(x * y) * length * length * length * x - length * y
    elif DISTANCE == "mse":
        slope = (x - y) * (2.0 / D)
    else:
        slope = tl.maximum((x - y) / beta, -1.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN must reach the gradient
        slope = tl.minimum(slope, 1.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / D)
    target = (out + (token.to(tl.int64) * D)[:, None]) + channels_of(ROWS, WIDTH)
    tl.store(target, (g[:, None] * slope).to(out.dtype.element_ty), mask=mask)


@triton.jit
def code_components_kernel(
    out,
    codes,
    ids,
    entries,
    group,
    n_images,
    n_tokens,
    codes_stride_b,
    codes_stride_l,
    codes_stride_m,
    ids_stride_v,
    ids_stride_n,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """The components of one token's product codes: a gather from entries [256, R], which stay in the L2 cache."""
    row = tl.program_id(0) // n_tokens
    slot = tl.program_id(0) % n_tokens
    k = tl.arange(0, WIDTH)
    mask = k < R
    at = slot
    if not GATHERED:
        at = tl.load(ids + row.to(tl.int64) * ids_stride_v + slot * ids_stride_n).to(tl.int32)
    image = (row % n_images).to(tl.int64)
    of = tl.load(group + k, mask=mask, other=0).to(tl.int32)
    code = tl.load(codes + image * codes_stride_b + (at * codes_stride_l + of * codes_stride_m), mask=mask, other=0)
    y = tl.load(entries + (code.to(tl.int32) * R + k), mask=mask, other=0)
    tl.store(out + row.to(tl.int64) * n_tokens * R + (slot * R + k), y, mask=mask)


def pair_arguments(
    student: Tensor,
    codes: Tensor,
    ids: Tensor | None,
    scale: Tensor | None,
    channel_mean: Tensor | None,
    channel_std: Tensor | None,
    stat_mean: Tensor | None,
    stat_std: Tensor | None,
    positions: Tensor | None,
    beta: float,
) -> dict[str, Any]:
    """Tensors, sizes and strides; an absent tensor becomes `student`, which the kernel never reads in its place."""
    vectors = {"channel_mean": channel_mean, "channel_std": channel_std, "stat_mean": stat_mean, "stat_std": stat_std}
    return {
        "student": student,
        "codes": codes,
        "ids": student if ids is None else ids,
        "scale": student if scale is None else scale,
        **{name: student if x is None else x.float().contiguous() for name, x in vectors.items()},
        "positions": student if positions is None else positions,
        "beta": float(beta),
        "n_images": codes.shape[0],
        "n_rows": student.shape[0],
        "n_tokens": student.shape[1],
        **strides("student_stride", student, "vnd"),
        **strides("codes_stride", codes, "bld"),
        **optional_strides("ids_stride", ids, "vn"),
        **optional_strides("scale_stride", scale, "bl"),
        **optional_strides("positions_stride", positions, "vn"),
    }


def optional_strides(prefix: str, x: Tensor | None, names: str) -> dict[str, int]:
    """Strides as named launch arguments; 0 for a tensor that is absent."""
    return strides(prefix, x, names) if x is not None else {f"{prefix}_{name}": 0 for name in names}


def rows_and_warps(width: int) -> tuple[int, int]:
    """Tokens and warps of a program: 16 values of a tile for each thread, which is two warps for a token of up to 1,024 channels."""
    per_program = WARPS * VALUES_PER_WARP // 2
    return max(1, per_program // width), min(16, max(WARPS, WARPS * width // per_program))


def build(kernel: Any, first: dict[str, Any], student: Tensor, codes: Tensor, *rest: Any) -> Launch:
    """A launch of either kernel; `first` are the arguments only one of them has."""
    ids, scale, channel_mean, channel_std, stat_mean, stat_std, positions, target, distance, beta = rest
    d = student.shape[2]
    rows, warps = rows_and_warps(power_of_two(d))
    e4m3 = codes.dtype == torch.float8_e4m3fn
    codes = codes.view(torch.uint8) if e4m3 else codes
    constants = {
        "D": d,
        "WIDTH": power_of_two(d),
        "TARGET": target,
        "DISTANCE": distance,
        "GATHERED": ids is None,
        "SCALE": scale is not None,
        "MEAN": channel_mean is not None,
        "STD": channel_std is not None,
        "ROWS": rows,
        "E4M3": e4m3,
    }
    tensors = (ids, scale, channel_mean, channel_std, stat_mean, stat_std, positions)
    arguments = pair_arguments(student, codes, *tensors, beta)
    programs = -(-student.shape[0] * student.shape[1] // rows)
    return Launch(kernel, programs, first | arguments, constants, warps, rows)


def mimic_loss(loss: Tensor, student: Tensor, codes: Tensor, *rest: Any) -> Launch:
    """student and codes of any strides; loss [v, n] fp32, contiguous; rest as `mimic.ARGUMENTS`."""
    return build(mimic_loss_kernel, {"loss": loss}, student, codes, *rest)


def mimic_loss_backward(grad: Tensor, out: Tensor, student: Tensor, codes: Tensor, *rest: Any) -> Launch:
    """grad [v, n] of any strides; out [v, n, d] in the student's dtype, contiguous."""
    first = {"grad": grad, "out": out, **strides("grad_stride", grad, "vn")}
    return build(mimic_loss_backward_kernel, first, student, codes, *rest)


def code_components(out: Tensor, codes: Tensor, ids: Tensor | None, entries: Tensor, group: Tensor) -> Launch:
    """codes [b, l, m] uint8 and ids of any strides; entries [256, r] and group [r] contiguous; out [v, n, r] like entries, contiguous."""
    rows, n, r = out.shape
    arguments = {
        "out": out,
        "codes": codes,
        "ids": group if ids is None else ids,
        "entries": entries.contiguous(),
        "group": group.contiguous(),
        "n_images": codes.shape[0],
        "n_tokens": n,
        **strides("codes_stride", codes, "blm"),
        **optional_strides("ids_stride", ids, "vn"),
    }
    constants = {"R": r, "WIDTH": power_of_two(r), "GATHERED": ids is None}
    return Launch(code_components_kernel, rows * n, arguments, constants, warps_for(power_of_two(r)))
