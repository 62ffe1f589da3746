"""The only door to the kernels: checks the arguments and picks Triton or plain PyTorch.

`kernels` is "triton" or "torch", which force one; what `choose.py` found on this device, a choice by kernel's name, where what Triton
cannot take goes to plain PyTorch; or "auto": nothing was measured, plain PyTorch. `debug=True` also checks the range of ids on CUDA,
which stalls the device.
"""

import functools
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import ParamSpec

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from mrmae.kernels import check, mimic, pixels, reference
from mrmae.kernels.calls import Calls, call_as_plain

TARGETS = ("none", "ln0", "l2", "channel", "position", "position+ln0")
KINDS_OF_DISTANCE = ("mse", "sl1", "cosd")
TRITON_INSTALLED = find_spec("triton") is not None
Kernels = str | Mapping[str, str] | Calls
P = ParamSpec("P")


def noted(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The function; given `Calls` as its `kernels` it describes the call there and computes in plain PyTorch."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if isinstance(calls := kwargs.get("kernels"), Calls):
            calls.append(call_as_plain(function.__name__, args, kwargs))
            kwargs["kernels"] = "torch"
        return function(*args, **kwargs)

    return call


def use_triton(where: str, kernels: Kernels, *tensors: Tensor | None) -> bool:
    """True when the call goes to Triton; ValueError when Triton was forced and cannot take these tensors."""
    assert not isinstance(kernels, Calls)  # `noted` has taken them
    wanted = kernels if isinstance(kernels, str) else kernels.get(where, "torch")
    if wanted not in ("auto", "triton", "torch"):
        check.refuse(where, f"kernels = {wanted!r}", "'auto', 'triton' or 'torch'", "check the spelling")
    given = [x for x in tensors if x is not None]
    on_cuda = given[0].device.type == "cuda"
    float64 = any(x.dtype == torch.float64 for x in given)
    able = on_cuda and TRITON_INSTALLED and not float64
    if kernels == "triton" and not able:
        wrong = "the tensors are float64" if float64 else f"the tensors are on {given[0].device}"
        wrong = wrong if TRITON_INSTALLED else "triton is not installed"
        check.refuse(where, f"kernels = 'triton' but {wrong}", "CUDA tensors of at most 32 bits", "use kernels='auto'")
    return wanted == "triton" and able


@noted
def gather_patches(
    image: Shaped[Tensor, "b ..."],
    ids_keep: Int64[Tensor, "v k"],
    *,
    patch: int,
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    channels_last: bool,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "auto",
    debug: bool = False,
) -> Float[Tensor, "v k P"]:
    """`image * scale + shift` of the patches at `ids_keep`, each flattened (c, p, q), in `dtype`.

    image: [b, h, w, c] if channels_last else [b, c, h, w]; any strides; uint8, uint16, bf16, fp16, fp32 or fp64. `ids_keep` may have v = r*b
    rows for r masks per image, row i reading image i mod b. With `proj.weight.flatten(1)` of any ViT the result gives its patch tokens.
    Raises ValueError for a wrong dtype, shape or device, ids outside the grid and an empty mask.
    """
    where = "gather_patches"
    view = check.image_view(where, image, patch, channels_last)
    check.affine(where, view, scale, shift)
    check.dtype_in(where, "dtype", torch.empty(0, dtype=dtype), check.FLOATS)
    check.ids_of(where, "ids_keep", ids_keep, images=view.shape[0], l=check.grid_size(view, patch), debug=debug)
    check.same_device(where, view.device, {"ids_keep": ids_keep, "scale": scale, "shift": shift}, "image")
    if use_triton(where, kernels, view, scale, shift, torch.empty(0, dtype=dtype, device=view.device)):
        return pixels.gather_patches(view, ids_keep, scale, shift, patch, dtype)
    return reference.gather_patches(view, ids_keep, scale, shift, patch=patch, dtype=dtype)


@noted
def embed_tokens(
    tokens: Float[Tensor, "v k d"],
    position: Float[Tensor, "l d"],
    cls_row: Float[Tensor, " d"],
    ids_keep: Int64[Tensor, "v k"],
    *,
    kernels: Kernels = "auto",
    debug: bool = False,
) -> Float[Tensor, "v k+1 d"]:
    """[cls_row | tokens + position[ids_keep]], in the wider dtype of tokens and position.

    cls_row: the class token plus its position. Differentiable in tokens, position and cls_row.
    Raises ValueError for a wrong dtype, shape or device, ids outside the grid and an empty mask.
    """
    where = "embed_tokens"
    check.shape_is(where, "tokens", tokens, (None, None, None), "pass [b, k, d]")
    d = tokens.shape[2]
    for name, x in (("tokens", tokens), ("position", position), ("cls_row", cls_row)):
        check.dtype_in(where, name, x, check.FLOATS)
    check.shape_is(where, "position", position, (None, d), "one row per patch of the grid, as wide as tokens")
    check.shape_is(where, "cls_row", cls_row, (d,), "class token plus its position")
    check.ids_of(where, "ids_keep", ids_keep, images=1, l=position.shape[0], debug=debug)
    check.shape_is(where, "tokens", tokens, (*ids_keep.shape, d), "one token per kept patch")
    check.same_device(where, tokens.device, {"position": position, "cls_row": cls_row, "ids_keep": ids_keep}, "tokens")
    if use_triton(where, kernels, tokens, position, cls_row):
        return pixels.embed_tokens(tokens, position, cls_row, ids_keep)
    return reference.embed_tokens(tokens, position, cls_row, ids_keep)


@noted
def pixel_loss(
    image: Shaped[Tensor, "b ..."],
    pred: Float[Tensor, "v m P"],
    ids_predict: Int64[Tensor, "v m"],
    *,
    patch: int,
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    channels_last: bool,
    norm_pix: bool = True,
    biased: bool = False,
    kernels: Kernels = "auto",
    debug: bool = False,
) -> Float[Tensor, "v m"]:
    """Mean squared error of each predicted patch, fp32; MAE's loss is its mean.

    pred: (c, p, q) values per patch, any strides. Target: `(x - mean) / sqrt(var + 1e-6)` with the unbiased variance over the
    whole patch, x = image * scale + shift; x itself without norm_pix. biased: the biased variance, in plain PyTorch only. Differentiable in pred only, any number of times.
    Raises ValueError for a wrong dtype, shape or device, ids outside the grid and an empty mask.
    MAE section 3, "Reconstruction target" (arXiv 2111.06377).
    """
    where = "pixel_loss"
    view = check.image_view(where, image, patch, channels_last)
    check.affine(where, view, scale, shift)
    check.dtype_in(where, "pred", pred, check.FLOATS)
    check.ids_of(where, "ids_predict", ids_predict, images=view.shape[0], l=check.grid_size(view, patch), debug=debug)
    values = view.shape[1] * patch * patch
    check.shape_is(where, "pred", pred, (*ids_predict.shape, values), "one (c, p, q) row per predicted patch")
    given = {"pred": pred, "ids_predict": ids_predict, "scale": scale, "shift": shift}
    check.same_device(where, view.device, given, "image")
    if norm_pix and values < 2:
        check.refuse(where, "a patch has 1 value", "at least 2 for a variance", "use norm_pix=False")
    if use_triton(where, kernels, view, pred, scale, shift) and not biased:
        return pixels.pixel_loss(view, pred, ids_predict, scale, shift, patch, norm_pix)
    return reference.pixel_loss(view, pred, ids_predict, scale, shift, patch=patch, norm_pix=norm_pix, biased=biased)


@noted
def mimic_loss(
    student: Float[Tensor, "v n d"],
    codes: Shaped[Tensor, "b l d"],
    ids: Int64[Tensor, "v n"] | None,
    *,
    scale: Float[Tensor, "b l"] | None = None,
    channel_mean: Float[Tensor, " d"] | None = None,
    channel_std: Float[Tensor, " d"] | None = None,
    target: str = "ln0",
    stat_mean: Float[Tensor, "*l d"] | None = None,
    stat_std: Float[Tensor, " d"] | None = None,
    distance: str = "mse",
    beta: float = 1.0,
    gathered: bool = False,
    l: int | None = None,
    kernels: Kernels = "auto",
    debug: bool = False,
) -> Float[Tensor, "v n"]:
    """Distance of every student token to the teacher token of its patch, fp32, mean over channels.

    codes: int8, E4M3 or float tokens of the whole grid, read at `ids`; with gathered=True the n rows themselves, and ids, where
    they stand in the grid, may be None but for targets of a position. Their value is `channel_mean + channel_std * (scale[token] * code)`, a missing mean being 0 and a missing factor 1.
    target: "none"; "ln0" LayerNorm without affine, eps 1e-5; "l2" unit length; "channel" (value - stat_mean) / stat_std; "position"
    (value - stat_mean[id]) / stat_std and "position+ln0" LayerNorm of value - stat_mean[id], with a row of stat_mean per position.
    distance: "mse"; "sl1" smooth-L1 with `beta`; "cosd" 1 - cosine. Differentiable in student only, any number of times.
    l: patches in the student's grid, to refuse codes of another one. Codes may have fewer rows than student (several masks per image): row i reads codes i mod b.
    Raises ValueError for a wrong dtype, shape, device or name, ids outside the grid and an empty mask.
    """
    where = "mimic_loss"
    if l is not None and not gathered:
        check.shape_is(
            where, "codes", codes, (None, l, None), "the teacher's grid is not the student's; pick another column"
        )
    check_mimic(
        where, student, codes, ids, scale, target=target, distance=distance, beta=beta, gathered=gathered, debug=debug
    )
    centred = target.startswith("position")
    stat_mean = stat_mean if centred or target == "channel" else None
    stat_std = stat_std if target in ("channel", "position") else None
    positions = ids if centred else None
    check_statistics(where, target, stat_mean, stat_std, positions, d=student.shape[2], debug=debug)
    vectors = {"channel_mean": channel_mean, "channel_std": channel_std, "stat_mean": stat_mean, "stat_std": stat_std}
    for name, x in vectors.items():
        if x is not None:
            check.dtype_in(where, name, x, check.FLOATS)
            if not (centred and name == "stat_mean"):
                check.shape_is(where, name, x, (student.shape[2],), "one value per teacher channel")
        check.no_grad(where, name, x)
    check.same_device(where, student.device, {"codes": codes, "ids": ids, "scale": scale, **vectors}, "student")
    at = None if gathered else ids
    if use_triton(where, kernels, student, codes):
        return mimic.mimic_loss(
            student, codes, at, scale, channel_mean, channel_std, stat_mean, stat_std, positions, target, distance, beta
        )
    return reference.mimic_loss(
        student,
        codes,
        at,
        scale,
        channel_mean,
        channel_std,
        stat_mean,
        stat_std,
        positions,
        target=target,
        distance=distance,
        beta=beta,
    )


@noted
def decode_codes(
    codes: UInt8[Tensor, "b l m"],
    ids: Int64[Tensor, "v n"] | None,
    entries: Float[Tensor, "256 r"],
    group: Int64[Tensor, " r"],
    basis: Float[Tensor, "r d"],
    mean: Float[Tensor, " d"],
    *,
    n_rows: int,
    kernels: Kernels = "auto",
    debug: bool = False,
) -> Float[Tensor, "v n d"]:
    """What product codes stand for at `ids`: `mean + entries[codes[group[k]], k] @ basis`, in the dtype of entries.

    Without ids the codes are the rows themselves. n_rows: v, of whose rows row i reads codes i mod b. Triton gathers the components; the
    product with the basis is torch's. No gradient. Raises ValueError for a wrong dtype, shape or device, ids outside the grid and an empty mask.
    """
    where = "decode_codes"
    check.dtype_in(where, "codes", codes, (torch.uint8,))
    check.shape_is(where, "codes", codes, (None, None, None), "pass [b, l, m]")
    check.shape_is(where, "entries", entries, (256, None), "a row per code")
    check.shape_is(where, "group", group, (entries.shape[1],), "which code decides on each component")
    check.shape_is(where, "basis", basis, (entries.shape[1], None), "a row per component")
    check.shape_is(where, "mean", mean, (basis.shape[1],), "one value per channel")
    for name, x in (("entries", entries), ("basis", basis), ("mean", mean)):
        check.dtype_in(where, name, x, check.FLOATS)
        check.no_grad(where, name, x)
    if ids is not None:
        check.ids_of(where, "ids", ids, images=1, l=codes.shape[1], debug=debug)
        check.shape_is(where, "ids", ids, (n_rows, None), "one row of ids per row of values")
    if not codes.shape[0] or n_rows % codes.shape[0]:
        wrong = f"{n_rows} rows of codes of {codes.shape[0]} images"
        check.refuse(where, wrong, "as many rows as images, or a multiple", "check the batch")
    tensors = {"ids": ids, "entries": entries, "group": group, "basis": basis, "mean": mean}
    check.same_device(where, codes.device, tensors, "codes")
    if use_triton(where, kernels, codes, entries, basis):
        return mimic.code_components(codes, ids, entries, group, n_rows) @ basis + mean
    return reference.decoded_rows(codes, ids, entries, group, basis, mean, n_rows=n_rows, work=entries.dtype)


def check_statistics(
    where: str,
    target: str,
    stat_mean: Tensor | None,
    stat_std: Tensor | None,
    positions: Tensor | None,
    *,
    d: int,
    debug: bool,
) -> None:
    """ValueError where a target lacks the data set's statistics, or they have no row for a position."""
    lacks_std = stat_std is None and target in ("channel", "position")
    centred = target.startswith("position")
    if (stat_mean is None and (centred or target == "channel")) or lacks_std:
        check.refuse(
            where, f"target = {target!r} without stat_mean or stat_std", "both", "pass the data set's statistics"
        )
    if not centred or stat_mean is None:
        return
    if positions is None:
        check.refuse(where, f"target = {target!r} without ids", "grid indices", "pass the ids of the gathered rows")
    check.shape_is(where, "stat_mean", stat_mean, (None, d), "one row per position of the grid")
    check.ids_of(where, "ids", positions, images=1, l=stat_mean.shape[0], debug=debug)


def check_mimic(
    where: str,
    student: Tensor,
    codes: Tensor,
    ids: Tensor | None,
    scale: Tensor | None,
    *,
    target: str,
    distance: str,
    beta: float,
    gathered: bool,
    debug: bool,
) -> None:
    """ValueError unless student, codes, ids and scale belong to one batch and one grid, and the names are known."""
    for name, value, known in (("target", target, TARGETS), ("distance", distance, KINDS_OF_DISTANCE)):
        if value not in known:
            check.refuse(where, f"{name} = {value!r}", f"one of {', '.join(known)}", "check the spelling")
    if not beta > 0:
        check.refuse(where, f"beta = {beta}", "beta > 0", "give the width of the quadratic part")
    check.dtype_in(where, "student", student, check.FLOATS)
    check.dtype_in(where, "codes", codes, check.CODES)
    check.shape_is(where, "student", student, (None, None, None), "pass [b, n, d]")
    rows, n, d = student.shape
    advice = "the teacher's grid or width differs from the student's; check the cache's column"
    check.shape_is(where, "codes", codes, (None, n if gathered else None, d), advice)
    if not gathered and ids is None:
        check.refuse(
            where, "ids is None", "grid indices, or gathered=True", "pass the ids the student tokens belong to"
        )
    if ids is not None:
        check.ids_of(where, "ids", ids, images=1, l=2**62 if gathered else codes.shape[1], debug=debug)
        check.shape_is(where, "ids", ids, (rows, n), "one id per student token")
    if n == 0 or not rows or codes.shape[0] == 0 or rows % codes.shape[0]:
        wrong = f"student has shape {list(student.shape)} and codes {list(codes.shape)}"
        check.refuse(where, wrong, "at least 1 token, and as many rows as codes or a multiple", "check the batch")
    for name, x in (("codes", codes), ("scale", scale)):
        check.no_grad(where, name, x)
    if scale is not None:
        check.dtype_in(where, "scale", scale, check.FLOATS)
        check.shape_is(where, "scale", scale, codes.shape[:2], "one scale per stored token")
