"""Small trained heads on frozen tokens: AdamW, half-cosine, the learning rate chosen on a held-out part of train."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mrmae.common.progress import Progress
from mrmae.probe.linear import choose_head, hold_out
from mrmae.probe.settings import Head
from mrmae.train.optim import lr_at, set_lr

SCORED_ROWS = 256
Inputs = Sequence[Tensor]  # each [n, ...], in any dtype


def probe_head(
    build: Callable[[], nn.Module],
    train: Inputs,
    labels: Int64[Tensor, "n"],
    test: Inputs,
    settings: Head,
    *,
    seed: int,
    device: str,
) -> tuple[Int64[Tensor, "m"], float, list[str]]:
    """Predicted classes of the test rows, the learning rate that a held-out part of train chose, and what to say about it.

    build: a new head, whose start follows from torch's generator. Its forward takes one tensor for each of the inputs.
    """
    held, notes, best = hold_out(labels, settings.held_out, seed=seed), [], len(settings.lrs) // 2
    if len(settings.lrs) > 1 and bool(held.any()):
        fit, choose = [x[~held] for x in train], [x[held] for x in train]
        logits = [
            head_scores(
                train_head(build, fit, labels[~held], settings, lr=lr, seed=seed, device=device), choose, device
            )
            for lr in settings.lrs
        ]
        loss = torch.stack([nn.functional.cross_entropy(x, labels[held]) for x in logits])
        best = choose_head(torch.stack([x.argmax(1) for x in logits]), loss, labels[held])
    elif len(settings.lrs) > 1:
        notes = [f"one train example per class: none can be held out: lr {settings.lrs[best]:g} is used"]
    head = train_head(build, train, labels, settings, lr=settings.lrs[best], seed=seed, device=device)
    return head_scores(head, test, device).argmax(1), settings.lrs[best], notes


def train_head(
    build: Callable[[], nn.Module],
    inputs: Inputs,
    labels: Int64[Tensor, "n"],
    settings: Head,
    *,
    lr: float,
    seed: int,
    device: str,
) -> nn.Module:
    """A trained head. Deterministic by seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build().to(device).train()
    n, generator = len(labels), torch.Generator().manual_seed(seed)
    size = min(settings.batch_size, n)
    steps = max(1, n // size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=settings.weight_decay)
    warmup = min(settings.warmup_epochs, settings.epochs / 2)
    with Progress(f"head, lr {lr:g}", settings.epochs, "epochs") as progress:
        for epoch in range(settings.epochs):
            order = torch.randperm(n, generator=generator)
            for step in range(steps):
                ids = order[step * size : (step + 1) * size]
                set_lr(
                    optimizer,
                    lr_at(epoch + (step + 0.5) / steps, peak=lr, warmup_epochs=warmup, epochs=settings.epochs),
                )
                loss = nn.functional.cross_entropy(
                    head(*(x[ids].to(device).float() for x in inputs)), labels[ids].to(device)
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            progress.add()
    return head.eval()


@torch.no_grad()
def head_scores(head: nn.Module, inputs: Inputs, device: str) -> Float[Tensor, "n c"]:
    """Logits of all rows, on the CPU."""
    return torch.cat(
        [
            head(*(x.to(device).float() for x in rows)).cpu()
            for rows in zip(*(torch.split(x, SCORED_ROWS) for x in inputs))
        ]
    )
