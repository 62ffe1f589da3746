# mypy: disable-error-code="no-untyped-call"
"""The mimic loss (K4): one opaque op that reads teacher rows as stored, normalises them and compares them with the student.

Product codes are first decoded: `code_components`, an op of its own, gathers their entries, and a product with the basis follows.

The CPU key is the reference, the CUDA key is Triton, imported at the first call. Backward reads the same rows again and recomputes:
nothing is saved but the inputs. No gradient reaches the teacher.
"""

from typing import Any

import torch
from torch import Tensor

from mrmae.kernels import reference

LIBRARY = torch.library.Library("mrmae", "FRAGMENT")
ARGUMENTS = (
    "Tensor student, Tensor codes, Tensor? ids, Tensor? scale, Tensor? channel_mean, Tensor? channel_std,"
    " Tensor? stat_mean, Tensor? stat_std, Tensor? positions, str target, str distance, float beta"
)
LIBRARY.define(f"mimic_loss({ARGUMENTS}) -> Tensor")
LIBRARY.define("code_components(Tensor codes, Tensor? ids, Tensor entries, Tensor group, int n_rows) -> Tensor")
LIBRARY.define(f"mimic_loss_backward(Tensor grad, {ARGUMENTS}) -> Tensor")


def mimic_loss(student: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    """Distance of each student token to its teacher token; arguments as `ARGUMENTS`, meaning as `dispatch.mimic_loss`."""
    loss: Tensor = torch.ops.mrmae.mimic_loss(student, codes, *rest)
    return loss


def mimic_loss_cpu(student: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    *stats, target, distance, beta = rest
    return reference.mimic_loss(student, codes, *stats, target=target, distance=distance, beta=beta)


def mimic_loss_cuda(student: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    from mrmae.kernels import triton_mimic

    loss = mimic_loss_fake(student, codes)
    triton_mimic.mimic_loss(loss, student, codes, *rest).run()
    return loss


def mimic_loss_fake(student: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape[:2], dtype=reference.wide(student, codes))


def mimic_loss_backward_cpu(grad: Tensor, student: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    *stats, target, distance, beta = rest
    out = reference.mimic_loss_backward(grad, student, codes, *stats, target=target, distance=distance, beta=beta)
    return out.contiguous()


def mimic_loss_backward_cuda(grad: Tensor, student: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    from mrmae.kernels import triton_mimic

    out = student.new_empty(student.shape)
    triton_mimic.mimic_loss_backward(grad, out, student, codes, *rest).run()
    return out


def mimic_loss_backward_fake(grad: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


def mimic_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.target, ctx.distance, ctx.beta = inputs
    ctx.save_for_backward(*tensors)


def mimic_loss_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out = torch.ops.mrmae.mimic_loss_backward(grad, *ctx.saved_tensors, ctx.target, ctx.distance, ctx.beta)
    return out, *(None for _ in range(11))


def code_components(codes: Tensor, ids: Tensor | None, entries: Tensor, group: Tensor, n_rows: int) -> Tensor:
    """The components of product codes, fp32 [v, n, r]; meaning as `reference.code_components`. No gradient."""
    components: Tensor = torch.ops.mrmae.code_components(codes, ids, entries, group, n_rows)
    return components


def code_components_cpu(codes: Tensor, ids: Tensor | None, entries: Tensor, group: Tensor, n_rows: int) -> Tensor:
    return reference.code_components(codes, ids, entries, group, n_rows=n_rows)


def code_components_cuda(codes: Tensor, ids: Tensor | None, entries: Tensor, group: Tensor, n_rows: int) -> Tensor:
    from mrmae.kernels import triton_mimic

    out = code_components_fake(codes, ids, entries, group, n_rows)
    triton_mimic.code_components(out, codes, ids, entries, group).run()
    return out


def code_components_fake(codes: Tensor, ids: Tensor | None, entries: Tensor, group: Tensor, n_rows: int) -> Tensor:
    return entries.new_empty(n_rows, codes.shape[1] if ids is None else ids.shape[1], group.shape[0])


for _name, _cpu, _cuda, _fake in (
    ("code_components", code_components_cpu, code_components_cuda, code_components_fake),
    ("mimic_loss", mimic_loss_cpu, mimic_loss_cuda, mimic_loss_fake),
    ("mimic_loss_backward", mimic_loss_backward_cpu, mimic_loss_backward_cuda, mimic_loss_backward_fake),
):
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"mrmae::{_name}", _fake, lib=LIBRARY)

torch.library.register_autograd("mrmae::mimic_loss", mimic_loss_vjp, setup_context=mimic_loss_setup, lib=LIBRARY)
