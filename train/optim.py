"""Learning rate, parameter groups, and one step of AdamW, of Muon beside it or of schedule-free AdamW, that skips itself when a gradient is not finite.

MAE's optimiser (arXiv 2111.06377, appendix A.1) with the guard of a long bf16 run: whether a step is finite is decided and
acted upon on the device, so nothing waits for the host.
"""

import math
from collections.abc import Callable, Iterable, Sequence
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


class ScheduleFreeAdamW:
    """AdamW whose learning rate need not fall (arXiv 2405.15682, algorithm 1), so that a run may end after any update.

    The model's own parameters are y, at which gradients are taken. z makes AdamW's steps without momentum, and x, the mean of all z by their squared
    rates, is what is evaluated, exported and saved as the weights. y is made anew from x and z in every step: these two suffice to go on to the same bits.
    """

    def __init__(self, model: nn.Module, *, betas: tuple[float, float], decay: float) -> None:
        self.betas = betas
        self.param_groups: list[dict[str, Any]] = [{**g, "lr": 0.0} for g in parameter_groups(model, decay=decay)]
        self.y: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self.slots: list[dict[str, Tensor]] = []
        zero = torch.zeros((), dtype=torch.float64, device=self.y[0].device)
        self.sums = {"steps": zero, "squared_rates": zero.clone()}

    def state(self) -> dict[int, dict[str, Tensor]]:
        """Every tensor beside y: x, z and the second moment of each parameter, then two sums; they begin where the model's weights are by now."""
        if not self.slots:
            start = [p.detach() for p in self.y]
            self.slots = [{"x": p.clone(), "z": p.clone(), "exp_avg_sq": torch.zeros_like(p)} for p in start]
        return dict(enumerate([*self.slots, self.sums]))

    @torch.no_grad()
    def step(self) -> None:
        slots, beta = dict(zip(map(id, self.y), self.state().values())), self.betas[1]
        self.sums["steps"] += 1
        rate = self.param_groups[0]["lr"] * (1 - beta ** self.sums["steps"]).sqrt()
        self.sums["squared_rates"] += rate**2
        share = rate**2 / self.sums["squared_rates"].clamp_min(1e-300)  # both are 0 at the beginning of a warm-up
        for group in self.param_groups:
            if not (y := [p for p in group["params"] if p.grad is not None]):
                continue
            x, z, v = ([slots[id(p)][name] for p in y] for name in ("x", "z", "exp_avg_sq"))
            gradients = [p.grad for p in y]
            torch._foreach_mul_(v, beta)
            torch._foreach_addcmul_(v, gradients, gradients, 1 - beta)
            root = torch._foreach_sqrt(v)
            torch._foreach_add_(root, 1e-8)
            move = torch._foreach_div(gradients, root)
            torch._foreach_add_(move, y, alpha=group["weight_decay"])
            torch._foreach_mul_(move, -rate.to(y[0].dtype))
            torch._foreach_add_(z, move)
            move = torch._foreach_sub(z, x)
            torch._foreach_mul_(move, share.to(y[0].dtype))
            torch._foreach_add_(x, move)
        self.place()

    @torch.no_grad()
    def place(self) -> None:
        """Bring the model's parameters to y, between x and z."""
        torch._foreach_copy_(self.y, [slot["x"] for slot in self.slots])
        torch._foreach_lerp_(self.y, [slot["z"] for slot in self.slots], 1 - self.betas[0])

    def averaged(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict of `model` with x instead of y."""
        x = {id(p): slot["x"] for p, slot in zip(self.y, self.state().values())}
        return {name: x.get(id(t), t.detach()) for name, t in model.state_dict(keep_vars=True).items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.y:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.state().values(), state["state"].values(), strict=True):
            for name, tensor in mine.items():
                tensor.copy_(saved[name])
        self.place()


Optimizer = torch.optim.AdamW | MuonAndAdamW | ScheduleFreeAdamW


def build_optimizer(model: nn.Module, *, betas: tuple[float, float], decay: float, name: str = "adamw") -> Optimizer:
    """`adamw` over `parameter_groups`, fused: it is the variant that can skip a step without asking the host; or `muon` beside it, or `schedule-free`."""
    if name == "muon":
        return MuonAndAdamW(model, betas=betas, decay=decay)
    if name == "schedule-free":
        return ScheduleFreeAdamW(model, betas=betas, decay=decay)
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
    reduced gradients, hence the same norm, and decide alike. What Muon or schedule-free AdamW changes is copied for as long as the step takes
    (of a ViT-B 0.7 GB and 1 GB).
    """
    skipped = (~torch.isfinite(norm)).to(torch.float32)
    if isinstance(optimizer, ScheduleFreeAdamW):
        step_unless(skipped, optimizer.step, [x for slot in optimizer.state().values() for x in slot.values()])
        optimizer.place()
        return skipped
    adamw = optimizer.adamw if isinstance(optimizer, MuonAndAdamW) else optimizer
    # The fused step reads this attribute on the device; torch.amp.GradScaler uses the same road.
    adamw.found_inf = skipped  # type: ignore[attr-defined]
    adamw.step()
    if isinstance(optimizer, MuonAndAdamW):  # it has no such road
        touched = [x for matrix, slot in optimizer.muon.state.items() for x in (matrix, slot["momentum_buffer"])]
        step_unless(skipped, optimizer.muon.step, touched)
    return skipped


def step_unless(skipped: Tensor, step: Callable[[], Any], touched: Sequence[Tensor]) -> None:
    """`step`, undone on the device where it was to be skipped. touched: all that it changes."""
    before = [x.clone() for x in touched]
    step()
    keep_where(skipped, touched, before)


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
