# mypy: disable-error-code="no-untyped-call"
"""The pixel ops: gather_patches (K1), embed_tokens (K1b) and pixel_loss (K2), opaque to the compiler.

One schema per op; the CPU key is the reference, the CUDA key is Triton, imported at the first call. Ops own no parameters, fix all
output shapes by their input shapes and never stall the device. `pixel_loss` saves the statistics of each patch and recomputes its
normalised pixels in backward: exact for any upstream gradient and any number of backwards, with no saved fp32 patches.
"""

from typing import Any

import torch
from torch import Tensor

from mrmae.kernels import reference

LIBRARY = torch.library.Library("mrmae", "FRAGMENT")
LIBRARY.define(
    "gather_patches(Tensor image, Tensor ids, Tensor scale, Tensor shift, int patch, ScalarType dtype) -> Tensor"
)
LIBRARY.define("embed_tokens(Tensor tokens, Tensor position, Tensor cls_row, Tensor ids) -> Tensor")
LIBRARY.define(
    "pixel_loss(Tensor image, Tensor pred, Tensor ids, Tensor scale, Tensor shift, int patch, bool norm_pix)"
    " -> (Tensor loss, Tensor stats)"
)
LIBRARY.define(
    "pixel_loss_backward(Tensor grad, Tensor image, Tensor pred, Tensor ids, Tensor scale, Tensor shift, Tensor stats,"
    " int patch, bool norm_pix) -> Tensor"
)


# K1: gather_patches


def gather_patches(image: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Normalised pixels of the patches at ids, (c, p, q) order; see `dispatch.gather_patches`."""
    out: Tensor = torch.ops.mrmae.gather_patches(image, ids, scale, shift, patch, dtype)
    return out


def gather_patches_cpu(
    image: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, patch: int, dtype: torch.dtype
) -> Tensor:
    return reference.gather_patches(image, ids, scale, shift, patch=patch, dtype=dtype)


def gather_patches_cuda(
    image: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, patch: int, dtype: torch.dtype
) -> Tensor:
    from mrmae.kernels import triton_patches

    out = image.new_empty(*ids.shape, image.shape[1] * patch * patch, dtype=dtype)
    triton_patches.gather_patches(image, ids, scale, shift, out, patch=patch).run()
    return out


def gather_patches_fake(
    image: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, patch: int, dtype: torch.dtype
) -> Tensor:
    return image.new_empty(*ids.shape, image.shape[1] * patch * patch, dtype=dtype)


# K1b: embed_tokens. Its backward is a slice and two sums: plain PyTorch, visible to the compiler.


def embed_tokens(tokens: Tensor, position: Tensor, cls_row: Tensor, ids: Tensor) -> Tensor:
    """[cls_row | tokens + position[ids]]; see `dispatch.embed_tokens`."""
    out: Tensor = torch.ops.mrmae.embed_tokens(tokens, position, cls_row, ids)
    return out


def embed_tokens_fake(tokens: Tensor, position: Tensor, cls_row: Tensor, ids: Tensor) -> Tensor:
    v, k, d = tokens.shape
    return tokens.new_empty(v, k + 1, d, dtype=torch.promote_types(tokens.dtype, position.dtype))


def embed_tokens_cuda(tokens: Tensor, position: Tensor, cls_row: Tensor, ids: Tensor) -> Tensor:
    from mrmae.kernels import triton_patches

    out = embed_tokens_fake(tokens, position, cls_row, ids)
    triton_patches.embed_tokens(tokens, position, cls_row, ids, out).run()
    return out


def embed_tokens_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    tokens, position, cls_row, ids = inputs
    ctx.save_for_backward(ids)
    ctx.dtypes = tokens.dtype, position.dtype, cls_row.dtype
    ctx.l = position.shape[0]


def embed_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    tokens = position = cls_row = None
    if ctx.needs_input_grad[0]:
        tokens = grad[:, 1:].to(ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        # index_put_ with accumulate sorts first: the same sum every run, where index_add_ on CUDA adds in any order.
        rows = grad[:, 1:].flatten(0, 1).float() if grad.dtype != torch.float64 else grad[:, 1:].flatten(0, 1)
        position = rows.new_zeros(ctx.l, rows.shape[1]).index_put((ids.flatten(),), rows, accumulate=True)
        position = position.to(ctx.dtypes[1])
    if ctx.needs_input_grad[2]:
        cls_row = grad[:, 0].sum(dim=0, dtype=reference.wide(grad)).to(ctx.dtypes[2])
    return tokens, position, cls_row, None


# K2: pixel_loss


def pixel_loss(
    image: Tensor, pred: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, patch: int, norm_pix: bool
) -> Tensor:
    """Mean squared error of each predicted patch; see `dispatch.pixel_loss`."""
    loss: Tensor = torch.ops.mrmae.pixel_loss(image, pred, ids, scale, shift, patch, norm_pix)[0]
    return loss


def pixel_loss_fake(
    image: Tensor, pred: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, patch: int, norm_pix: bool
) -> tuple[Tensor, Tensor]:
    work = reference.wide(image, pred, scale)
    return pred.new_empty(ids.shape, dtype=work), pred.new_empty(2, *ids.shape, dtype=work)


def pixel_loss_cpu(
    image: Tensor, pred: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, patch: int, norm_pix: bool
) -> tuple[Tensor, Tensor]:
    work = reference.wide(image, pred, scale)
    loss = reference.pixel_loss(image, pred, ids, scale, shift, patch=patch, norm_pix=norm_pix)
    _, stats = reference.pixel_target(image, ids, scale, shift, patch=patch, norm_pix=norm_pix, work=work)
    return loss, stats


def pixel_loss_cuda(
    image: Tensor, pred: Tensor, ids: Tensor, scale: Tensor, shift: Tensor, patch: int, norm_pix: bool
) -> tuple[Tensor, Tensor]:
    from mrmae.kernels import triton_pixels

    loss, stats = pixel_loss_fake(image, pred, ids, scale, shift, patch, norm_pix)
    triton_pixels.pixel_loss(image, pred, ids, scale, shift, loss, stats, patch=patch, norm_pix=norm_pix).run()
    return loss, stats


def pixel_loss_backward_fake(
    grad: Tensor,
    image: Tensor,
    pred: Tensor,
    ids: Tensor,
    scale: Tensor,
    shift: Tensor,
    stats: Tensor,
    patch: int,
    norm_pix: bool,
) -> Tensor:
    return pred.new_empty(pred.shape)


def pixel_loss_backward_cpu(
    grad: Tensor,
    image: Tensor,
    pred: Tensor,
    ids: Tensor,
    scale: Tensor,
    shift: Tensor,
    stats: Tensor,
    patch: int,
    norm_pix: bool,
) -> Tensor:
    out = reference.pixel_loss_backward(grad, image, pred, ids, scale, shift, patch=patch, norm_pix=norm_pix)
    return out.contiguous()


def pixel_loss_backward_cuda(
    grad: Tensor,
    image: Tensor,
    pred: Tensor,
    ids: Tensor,
    scale: Tensor,
    shift: Tensor,
    stats: Tensor,
    patch: int,
    norm_pix: bool,
) -> Tensor:
    from mrmae.kernels import triton_pixels

    out = pred.new_empty(pred.shape)
    triton_pixels.pixel_loss_backward(grad, image, pred, ids, scale, shift, stats, out, patch=patch).run()
    return out


def pixel_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.patch, ctx.norm_pix = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def pixel_loss_vjp(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    out = torch.ops.mrmae.pixel_loss_backward(grad, *ctx.saved_tensors, ctx.patch, ctx.norm_pix)
    return None, out, None, None, None, None, None


for _name, _cpu, _cuda, _fake in (
    ("gather_patches", gather_patches_cpu, gather_patches_cuda, gather_patches_fake),
    ("embed_tokens", reference.embed_tokens, embed_tokens_cuda, embed_tokens_fake),
    ("pixel_loss", pixel_loss_cpu, pixel_loss_cuda, pixel_loss_fake),
    ("pixel_loss_backward", pixel_loss_backward_cpu, pixel_loss_backward_cuda, pixel_loss_backward_fake),
):
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"mrmae::{_name}", _fake, lib=LIBRARY)

torch.library.register_autograd(
    "mrmae::embed_tokens", embed_tokens_backward, setup_context=embed_tokens_setup, lib=LIBRARY
)
torch.library.register_autograd("mrmae::pixel_loss", pixel_loss_vjp, setup_context=pixel_loss_setup, lib=LIBRARY)
