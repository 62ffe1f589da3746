"""Efficient Probing: a classifier on patch tokens through learned queries, without key projection (arXiv 2506.10178).

`A = softmax_n(Q X^T / sqrt(d))`, values `V = X W_v` cut into one slice per query, `out_m = A_m V[:, slice m]`, joined;
BatchNorm without affine; Linear. 32 queries at d = 768 and 1000 classes: 24,576 + 589,824 + 769,000 parameters.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mrmae.common.progress import Progress
from mrmae.train.optim import lr_at, set_lr

QUERY_EPS = 1e-6
TRUST = 1e-3


class EfficientProbe(nn.Module):
    """The head: queries [m, d], values [d / d_out, d], BatchNorm, classifier. ValueError where m does not divide d / d_out."""

    def __init__(self, d: int, n_classes: int, *, queries: int = 32, d_out: int = 1) -> None:
        super().__init__()
        width = d // d_out
        if d % d_out or width % queries:
            raise ValueError(f"attentive: {queries} queries cannot share {d} / {d_out} channels; expected a divisor; "
                             "change attentive.queries or attentive.d_out with --set")  # fmt: skip
        self.queries = nn.Parameter(0.02 * torch.randn(queries, d))
        self.values = nn.Linear(d, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=QUERY_EPS)
        self.head = nn.Linear(width, n_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def attention(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m n"]:
        """Where each query looks; rows sum to 1."""
        return (self.queries @ x.transpose(1, 2) * x.shape[-1] ** -0.5).softmax(-1)  # type: ignore[no-any-return]

    def pool(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b width"]:
        """`out_m = A_m V[:, slice m]`, joined over m.

        Computed as (A_m X) W_v[:, slice m]: the same by linearity, and n times fewer products for the values.
        """
        m = len(self.queries)
        looked = self.attention(x) @ x  # [b, m, d]
        slices = self.values.weight.view(m, -1, x.shape[-1])
        return torch.einsum("bmd,msd->bms", looked, slices).flatten(1)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """Logits."""
        logits: Tensor = self.head(self.norm(self.pool(x)))
        return logits


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step on matrices is scaled by trust * |w| / |gradient|; no decay (arXiv 1708.03888).

    1-D parameters (biases) are not scaled.
    """

    def __init__(
        self, parameters: list[nn.Parameter], *, lr: float, momentum: float = 0.9, trust: float = TRUST
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    size, slope = p.norm(), update.norm()
                    update = update * torch.where((size > 0) & (slope > 0), group["trust"] * size / slope, 1.0)
                state = self.state[p]
                state["mu"] = update if "mu" not in state else group["momentum"] * state["mu"] + update
                p.sub_(group["lr"] * state["mu"])


def train_probe(
    x: Float[Tensor, "n l d"], labels: Tensor, *, n_classes: int, blr: float, epochs: int, warmup_epochs: float,
    batch_size: int, queries: int, d_out: int, seed: int, device: str = "cpu",
) -> EfficientProbe:  # fmt: skip
    """A trained head on tokens of any dtype; lr = blr * batch / 256, linear warm-up, cosine to 0. Deterministic by seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = EfficientProbe(x.shape[-1], n_classes, queries=queries, d_out=d_out).to(device)
    n, generator = len(x), torch.Generator().manual_seed(seed)
    size = min(batch_size, n)
    steps, peak = max(1, n // size), blr * size / 256
    optimizer = Lars(list(probe.parameters()), lr=0.0)
    probe.train()
    with Progress(f"attentive probe, blr {blr:g}", epochs, "epochs") as progress:
        for epoch in range(epochs):
            order = torch.randperm(n, generator=generator)
            for step in range(steps):
                ids = order[step * size : (step + 1) * size]
                at = (
                    epoch + (step + 0.5) / steps
                )  # in its middle: neither the first nor the last update has a rate of 0
                set_lr(optimizer, lr_at(at, peak=peak, warmup_epochs=min(warmup_epochs, epochs / 2), epochs=epochs))
                loss = nn.functional.cross_entropy(probe(x[ids].to(device).float()), labels[ids].to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            progress.add()
    return probe.eval()


@torch.no_grad()
def probe_scores(probe: EfficientProbe, x: Float[Tensor, "n l d"], device: str = "cpu") -> Float[Tensor, "n c"]:
    """Logits of all rows, on the CPU."""
    return torch.cat([probe(rows.to(device).float()).cpu() for rows in torch.split(x, 256)])
