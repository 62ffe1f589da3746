"""Learning rate, parameter groups, and one AdamW step that skips itself when a gradient is not finite.

MAE's optimiser (arXiv 2111.06377, appendix A.1) with the guard of a long bf16 run: whether a step is finite is decided and
acted upon on the device, so nothing waits for the host.
"""

import math
from collections.abc import Iterable, Sequence

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


def build_optimizer(model: nn.Module, *, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused: it is the variant that can skip a step without asking the host."""
    return torch.optim.AdamW(parameter_groups(model, decay=decay), lr=0.0, betas=betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
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


def guarded_step(optimizer: torch.optim.AdamW, norm: Tensor) -> Tensor:
    """Update, unless `norm` is not finite: then weights, moments and step counts stay as they are.

    Returns 1.0 on the device where the update was skipped, else 0.0. All ranks of a data-parallel run hold the same
    reduced gradients, hence the same norm, and decide alike.
    """
    skipped = (~torch.isfinite(norm)).to(torch.float32)
    # The fused step reads this attribute on the device; torch.amp.GradScaler uses the same road.
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
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
