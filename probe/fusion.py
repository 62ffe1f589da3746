"""Two sources together: does one add what the other lacks. Cross-attention as X-Former writes it, and concatenation as the baseline."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrmae.extract.teachers import to_grid
from mrmae.probe import report
from mrmae.probe.features import PooledFeatures, refuse_foreign_column
from mrmae.probe.heads import probe_head
from mrmae.probe.job import Outcome, Probing, headline, refuse_shared
from mrmae.probe.linear import probe_linear
from mrmae.probe.sources import open_source

Grid = tuple[int, int]


class FusionAttention(nn.Module):
    """`CA(q, kv)`: LayerNorm of both, multi-head attention of q over kv, added to q."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_q, self.norm_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, q: Float[Tensor, "b m d"], kv: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """q with what it found in kv."""
        kv = self.norm_kv(kv)
        out: Tensor = q + self.attention(self.norm_q(q), kv, kv, need_weights=False)[0]
        return out


class FusionHead(nn.Module):
    """Learned queries over tokens X give Z = CA(queries, X); M' = CA(M, Z); Z' = CA(Z, M'); a linear classifier on the mean of Z'.

    X-Former (arXiv 2407.13851) as a probe [secondary: no code was released]; the projections of both sources to one width, the norms
    and the residuals are ours.
    """

    def __init__(self, d: int, d_other: int, n_classes: int, *, queries: int, width: int, heads: int) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(d, width), nn.Linear(d_other, width)
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
        self.first, self.second, self.third = (FusionAttention(width, heads) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_classes)

    def forward(self, x: Float[Tensor, "b n d"], m: Float[Tensor, "b k e"]) -> Float[Tensor, "b c"]:
        """Logits of X's and M's tokens."""
        z = self.first(self.queries.expand(len(x), -1, -1), self.own(F.layer_norm(x, x.shape[-1:])))
        seen = self.second(self.other(F.layer_norm(m, m.shape[-1:])), z)
        logits: Tensor = self.head(self.norm(self.third(z, seen)).mean(1))
        return logits


def run_fusion(job: Probing, name: str) -> Outcome:
    """Linear on each source alone and on both joined, and the cross-attention head; that one is the headline."""
    settings, (labels, truth), seed = job.options.settings.fusion, job.labels, job.options.seed
    others, notes = other_parts(job)
    grids, n_classes = (job.test.grid, others[1].grid), len(job.data.classes)
    free = 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    own = [part.tokens(limit_bytes=free / 4) for part in (job.train, job.test)]
    other = [tokens_on_grid(part.tokens(limit_bytes=free / 4), grids[1], grids[0]) for part in others]
    if grids[0] != grids[1]:
        notes.append(
            f"{settings.other}: its {grids[1][0]} x {grids[1][1]} tokens are resampled (bilinear) to the {grids[0][0]} x {grids[0][1]} of {job.source.name}"
        )
    means = {job.source.name: [x.float().mean(1) for x in own], settings.other: [x.float().mean(1) for x in other]}
    pairs = {f"linear, {report.title(source)} alone": parts for source, parts in means.items()}
    pairs["linear, both joined"] = [torch.cat([*both], 1) for both in zip(*means.values())]
    rows = []
    for what, (train, test) in pairs.items():
        heads, best, told = probe_linear(train, labels, test, settings.linear, n_classes=n_classes, seed=seed)
        rows.append(report.row(what, heads[best], truth, seed=seed))
    how: dict[str, Any] = {"queries": settings.queries, "width": settings.width, "heads": settings.heads}
    if settings.width % settings.heads:
        raise ValueError(
            f"--set fusion.heads={settings.heads}: do not share a width of {settings.width}; expected a divisor; change fusion.width or fusion.heads"
        )
    predicted, lr, more = probe_head(
        lambda: FusionHead(own[0].shape[-1], other[0].shape[-1], n_classes, **how), [own[0], other[0]], labels, [own[1], other[1]],
        settings.head, seed=seed, device=job.options.device,
    )  # fmt: skip
    rows.append(report.row(f"cross-attention, {settings.queries} queries, lr {lr:g}", predicted, truth, seed=seed))
    return {"rows": rows, "notes": [*notes, *dict.fromkeys([*told, *more])], **headline(rows[-1])}, predicted


def other_parts(job: Probing) -> tuple[list[PooledFeatures], list[str]]:
    """The other source's features of both parts, and what to say about it. ValueError where none is named, or it is the first."""
    options, text = job.options, job.options.settings.fusion.other
    if not text:
        raise ValueError("--probe fusion: needs a second source; name it by --set fusion.other=SOURCE")
    if text == options.source:
        raise ValueError(f"--set fusion.other={text}: is the first source too; two different ones were expected")
    source = open_source(
        text, device=options.device, precision=options.precision, allow_partial=options.allow_partial, near=options.near
    )
    notes = [*source.notes, *refuse_shared(source, job.data, allowed=options.allow_shared)]
    parts = []
    for part in (job.data.train, job.data.test):
        refuse_foreign_column(source, part)
        parts.append(PooledFeatures(source, part, job.home, options.batch_size, options.workers, job.say))
    return parts, [f"{text}: {note}" for note in notes]


def other_read(job: Probing) -> list[str]:
    """Ids of the other source's features, as part of what the result is of."""
    return [part.id for part in other_parts(job)[0]]


def tokens_on_grid(tokens: Float[Tensor, "n l d"], grid: Grid, wanted: Grid) -> Float[Tensor, "n k d"]:
    """The tokens resampled from one grid to another, as teachers' are; as they are where they fit."""
    if grid == wanted:
        return tokens
    maps = (rows.float().transpose(1, 2).reshape(len(rows), -1, *grid) for rows in torch.split(tokens, 64))
    return torch.cat([to_grid(x, wanted).flatten(2).transpose(1, 2).to(tokens.dtype) for x in maps])
