"""From the student's width to a target's: one head per term, dropped after training.

Which head MR-MAE uses is not published; one Linear is what its sibling code uses.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from mrmae.kernels import reference
from mrmae.train.method.student import LN_EPS


def none(width: int, out: int) -> nn.Module:
    """The tokens as they are. Raises ValueError where the target has another width."""
    if width != out:
        raise ValueError(
            f"head none: tokens of width {width} and a target of {out}; equal widths were expected; use head linear"
        )
    return nn.Identity()


def linear(width: int, out: int) -> nn.Module:
    """One Linear."""
    return nn.Linear(width, out)


def ln_linear(width: int, out: int) -> nn.Module:
    """LayerNorm, Linear."""
    return nn.Sequential(nn.LayerNorm(width, eps=LN_EPS), nn.Linear(width, out))


def linear_ln(width: int, out: int) -> nn.Module:
    """Linear, LayerNorm."""
    return nn.Sequential(nn.Linear(width, out), nn.LayerNorm(out, eps=LN_EPS))


def mlp(width: int, out: int) -> nn.Module:
    """Linear, GELU, Linear; as wide inside as the student."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))


def mlp3_ln(width: int, out: int) -> nn.Module:
    """[Linear, LayerNorm, GELU] twice, Linear, LayerNorm without affine, all 512 wide; then Linear: DMJD's visible branch."""
    wide = 512
    first = (nn.Linear(width, wide), nn.LayerNorm(wide, eps=LN_EPS), nn.GELU())
    second = (nn.Linear(wide, wide), nn.LayerNorm(wide, eps=LN_EPS), nn.GELU())
    last = (nn.Linear(wide, wide), nn.LayerNorm(wide, eps=LN_EPS, elementwise_affine=False), nn.Linear(wide, out))
    return nn.Sequential(*first, *second, *last)


class PredictorHead(nn.Module):
    """LUT's projector and predictor (arXiv 2310.13593), each Linear, BatchNorm, ReLU, Linear, 4096 wide, without biases.

    A copy of the projector alone makes the targets of a term with target `ema`.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        wide = 4096
        self.projector, self.predictor = (
            nn.Sequential(nn.Linear(n, wide, bias=False), BatchNorm(wide), nn.ReLU(), nn.Linear(wide, out, bias=False))
            for n in (width, out)
        )

    def forward(self, x: Float[Tensor, "v n d"]) -> Float[Tensor, "v n out"]:
        """The prediction."""
        out: Tensor = self.predictor(self.projector(x))
        return out


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over all tokens of a batch; in training over those of all ranks together. In fp32 at least."""

    def forward(self, x: Float[Tensor, "v n d"]) -> Float[Tensor, "v n d"]:
        """Raises ValueError for a single token, which has no variance."""
        rows = x.flatten(0, 1).to(reference.wide(x))
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.training and len(rows) * ranks == 1:
            raise ValueError(
                "head predictor: its batch norm has 1 token; 2 were expected; give a larger batch, or fewer micro-batches"
            )
        if not self.training or ranks == 1:
            return super().forward(rows).view(x.shape)
        n = torch.as_tensor(len(rows) * ranks)
        mean = SumOverRanks.apply(rows.sum(0)) / n
        var = SumOverRanks.apply((rows - mean).square().sum(0)) / n
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        out: Tensor = (rows - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias
        return out.view(x.shape)


class SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor; its gradient is the sum of every rank's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """All ranks have tensors of one shape."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Likewise."""
        total = grad.clone()
        dist.all_reduce(total)
        return total


HEADS = {
    "none": none,
    "linear": linear,
    "ln_linear": ln_linear,
    "linear_ln": linear_ln,
    "mlp": mlp,
    "mlp3_ln": mlp3_ln,
    "predictor": PredictorHead,
}
