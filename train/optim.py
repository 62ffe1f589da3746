"""Learning rate, parameter groups, and one step of AdamW, or of Muon beside it, that skips itself when a gradient is not finite.

MAE's optimiser (arXiv 2111.06377, appendix A.1) with the guard of a long bf16 run: whether a step is finite is decided and
acted upon on the device, so nothing waits for the host.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def base_lr(lr_per_256: float, images_per_update: int, scale: float = 1.0, rule: str = "linear") -> float:
    """The peak learning rate: `lr_per_256 * images_per_update / 256` (linear scaling rule), times a method's own factor.

    rule: `sqrt` takes the root of `images_per_update / 256`.
    """
    batches = images_per_update / 256
    return lr_per_256 * (math.sqrt(batches) if rule == "sqrt" else batches) * scale


def momentum_at(step: int, total: int, start: float, end: float) -> float:
    """The momentum of a copy that follows the student, after update number `step` (from 0) of `total`: half a cosine from `start` to `end`."""
    return end - (end - start) * 0.5 * (1.0 + math.cos(math.pi * step / total))


def keep_where(skipped: Tensor, tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Give tensors back what they were `before` an update that was skipped; on the device, nothing waits for the host."""
    for tensor, old in zip(tensors, before):
        tensor.copy_(torch.where(skipped > 0, old, tensor))


def lr_at(epoch: float, *, peak: float, warmup_epochs: float, epochs: float, min_lr: float = 0.0) -> float:
    """The learning rate at a fractional `epoch`: linear warm-up from 0 to `peak`, then half a cosine down to `min_lr`.

    epoch: updates done / updates per epoch, so the very first update runs at 0, as in MAE.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    share = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


def parameter_groups(model: nn.Module, *, decay: float) -> list[dict[str, object]]:
    """Two groups of the trainable parameters, in the model's order: decayed, and not.

    Biases and every other 1-D parameter (norms, layer weights) are not decayed; CLS and mask tokens are 3-D and are (MAE).
    """
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": kept, "weight_decay": 0.0}]


class MuonAndAdamW:
    """torch's Muon for the matrices of blocks, AdamW for every other parameter, as one optimiser.

    Both take the same learning rate and decay: Muon's updates are scaled to the size that AdamW's have (arXiv 2502.16982, section 2.2). Heads
    and embeddings are AdamW's, as the method's author advises.
    """

    def __init__(self, model: nn.Module, *, betas: tuple[float, float], decay: float) -> None:
        wide = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name}
        groups: list[dict[str, Any]] = parameter_groups(model, decay=decay)
        matrices = [p for p in groups[0]["params"] if id(p) in wide]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in wide]
        self.muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        for matrix in matrices:  # else made by the first step, which may be skipped
            self.muon.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


Optimizer = torch.optim.AdamW | MuonAndAdamW


def build_optimizer(model: nn.Module, *, betas: tuple[float, float], decay: float, name: str = "adamw") -> Optimizer:
    """`adamw` over `parameter_groups`, fused: it is the variant that can skip a step without asking the host; or `muon` beside it."""
    if name == "muon":
        return MuonAndAdamW(model, betas=betas, decay=decay)
    return torch.optim.AdamW(parameter_groups(model, decay=decay), lr=0.0, betas=betas, fused=True)


def set_lr(optimizer: Optimizer | torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients as one scalar on the device; not finite if any gradient is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, most: float | None) -> None:
    """Scale all gradients by `most / norm` where their norm is above `most`; on the device, nothing waits for the host."""
    if most is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm, foreach=True)


@torch.no_grad()
def guarded_step(optimizer: Optimizer, norm: Tensor) -> Tensor:
    """Update, unless `norm` is not finite: then weights, moments and step counts stay as they are.

    Returns 1.0 on the device where the update was skipped, else 0.0. All ranks of a data-parallel run hold the same
    reduced gradients, hence the same norm, and decide alike. Muon's matrices and momenta are copied for as long as the step takes (0.7 GB of
    a ViT-B).
    """
    skipped = (~torch.isfinite(norm)).to(torch.float32)
    adamw = optimizer.adamw if isinstance(optimizer, MuonAndAdamW) else optimizer
    # The fused step reads this attribute on the device; torch.amp.GradScaler uses the same road.
    adamw.found_inf = skipped  # type: ignore[attr-defined]
    adamw.step()
    if isinstance(optimizer, MuonAndAdamW):  # it has no such road
        touched = [x for matrix, slot in optimizer.muon.state.items() for x in (matrix, slot["momentum_buffer"])]
        before = [x.clone() for x in touched]
        optimizer.muon.step()  # type: ignore[no-untyped-call]
        keep_where(skipped, touched, before)
    return skipped


def skipped_in_a_row(before: Tensor, skipped: Tensor) -> Tensor:
    """How many updates up to this one were skipped without a good one between them, on the device."""
    return (before + skipped) * skipped


def culprit(terms: dict[str, float]) -> str:
    """The name of the loss term that is not finite, or what to suspect when all of them are."""
    names = [name for name, value in terms.items() if not math.isfinite(value)]
    return "term " + " and ".join(names) if names else "the gradient (every term's value is finite)"


def usual_warmup(epochs: int) -> int:
    """Warm-up epochs for a run whose length was chosen by hand: MAE's 40, or a tenth of a shorter run, rounded up.

    None for a single epoch.
    """
    return min(40, math.ceil(epochs / 10), epochs - 1)
