"""Taps: the student's named outputs, and those that join several blocks. Blocks are counted from 1."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mrmae.train.method.masks import Masks
from mrmae.train.method.recipe import POSITIONS
from mrmae.train.method.student import LN_EPS

Outputs = Mapping[int, Tensor]  # raw block outputs [v, prefix + n, d]


class Tokens(NamedTuple):
    """What a tap holds: `prefix` tokens without a place (CLS, pooled), then the patches at the grid indices `ids`.

    visible: how many of the patches are visible ones; they come first, then those that are predicted.
    """

    x: Float[Tensor, "v prefix+n d"]
    ids: Int64[Tensor, "v n"]
    prefix: int = 0
    visible: int = 0

    def at(self, place: str) -> "Tokens":
        """Those at one of the recipes' positions; none where the tap holds none there."""
        patches, shown = self.x[:, self.prefix :], self.visible
        match place:
            case "cls":
                return Tokens(self.x[:, : self.prefix], self.ids[:, :0], self.prefix)
            case "pooled":
                pooled = patches[:, :shown].mean(dim=1, keepdim=True)
                return Tokens(pooled[:, : min(shown, 1)], self.ids[:, :0], min(shown, 1))
            case "visible":
                return Tokens(patches[:, :shown], self.ids[:, :shown], visible=shown)
            case "predicted":
                return Tokens(patches[:, shown:], self.ids[:, shown:])
        return Tokens(patches, self.ids, visible=shown)


def tokens_at(taps: Mapping[str, Tokens], names: Sequence[str], positions: str) -> Tokens:
    """The tokens at `positions`, in the order of POSITIONS, each from the first of the taps `names` that holds some there."""
    asked, parts = positions.replace("all", "visible+predicted").split("+"), []
    for place in POSITIONS:
        for name in names if place in asked else ():
            part = taps[name].at(place)
            if part.x.shape[1]:
                parts.append(part)
                break
    if len(parts) == 1:
        return parts[0]
    prefix, visible = sum(part.prefix for part in parts), sum(part.visible for part in parts)
    return Tokens(torch.cat([p.x for p in parts], dim=1), torch.cat([p.ids for p in parts], dim=1), prefix, visible)


def whole_at(whole: Tokens, positions: str, masks: Masks) -> Float[Tensor, "v n d"]:
    """The tokens of whole images [b, ..] at the `positions` of masked ones, in the order of POSITIONS; `pooled`: the mean of all patches."""
    rows = torch.arange(len(masks.ids_keep), device=whole.x.device) % len(whole.x)
    asked, patches = positions.replace("all", "visible+predicted").split("+"), whole.x[:, whole.prefix :]
    parts = [whole.at(place).x[rows] for place in ("cls", "pooled") if place in asked]
    ids = {"visible": masks.ids_keep, "predicted": masks.ids_predict}
    parts += [patches[rows[:, None], at] for place, at in ids.items() if place in asked]
    return torch.cat(parts, dim=1)


def placed(tokens: Tokens, position: Float[Tensor, "l d"]) -> Tokens:
    """The tokens with their patches' positions added; CLS has none."""
    x, prefix = tokens.x, tokens.prefix
    return tokens._replace(x=torch.cat([x[:, :prefix], x[:, prefix:] + position[tokens.ids]], dim=1))


class MeanOfNorms(nn.Module):
    """Tap `mean_ln`: the mean over chosen blocks of their outputs, each through a LayerNorm of its own.

    The form of MR-MAE's multi-layer fusion is not published: inferred.
    """

    def __init__(self, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(width, eps=LN_EPS) for i in blocks})

    def forward(self, outputs: Outputs, norm: nn.Module) -> Tensor:
        """Fuse raw block outputs; `norm`, the encoder's final one, is not used."""
        return torch.stack([layer(outputs[int(i)]) for i, layer in self.norms.items()]).mean(dim=0)


class LearnedSum(nn.Module):
    """Tap `learned`: the encoder's final norm of a weighted sum of all block outputs; it starts at the last block (MaskAlign)."""

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(first_weights(len(blocks), len(blocks)))

    def forward(self, outputs: Outputs, norm: nn.Module) -> Tensor:
        """Fuse the raw outputs of all blocks, in order."""
        out: Tensor = norm(weighted_sum(self.weight, outputs))
        return out


class Mix(nn.Module):
    """Tap `mix<i>`: row i of MaskAlign's dynamic alignment, `s_i = sum_j W[i, j] * block_j`, no norm (arXiv 2211.08887).

    W starts as the identity + 0.01; a row beyond the student's depth as 1 / depth (the variant for unequal depths). Rows are
    parameters of their own: only those a term reads exist, and as vectors they are not decayed.
    """

    def __init__(self, row: int, depth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(first_weights(row, depth))

    def forward(self, outputs: Outputs, norm: nn.Module) -> Tensor:
        """Mix the raw outputs of all blocks; `norm` is not used."""
        return weighted_sum(self.weight, outputs)


class NormedBlock(nn.Module):
    """Tap `placed<i>`: a block's output through the encoder's own final norm; the model adds the positions again (UMT, arXiv 2303.16058)."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, outputs: Outputs, norm: nn.Module) -> Tensor:
        """The final norm of one raw block output."""
        out: Tensor = norm(outputs[self.block])
        return out


def first_weights(row: int, depth: int) -> Tensor:
    """0.01 for every block and 1.01 for number `row`; without such a block 1 / depth for all."""
    if row > depth:
        return torch.full((depth,), 1 / depth)
    weight = torch.full((depth,), 0.01)
    weight[row - 1] += 1
    return weight


def weighted_sum(weight: Tensor, outputs: Outputs) -> Tensor:
    """`sum_j weight[j] * block_j` over all blocks."""
    total = weight[0] * outputs[1]
    for i, w in enumerate(weight[1:].unbind(), start=2):
        total = total + w * outputs[i]
    return total


def build_fusions(taps: Iterable[str], fused_blocks: Sequence[int], *, width: int, depth: int) -> nn.ModuleDict:
    """The fusions that these taps need, by the tap's name."""
    fusions = nn.ModuleDict()
    for tap in dict.fromkeys(taps):
        if tap == "mean_ln":
            fusions[tap] = MeanOfNorms(width, fused_blocks)
        elif tap == "learned":
            fusions[tap] = LearnedSum(range(1, depth + 1))
        elif tap.startswith("mix"):
            fusions[tap] = Mix(int(tap.removeprefix("mix")), depth)
        elif tap.startswith("placed"):
            fusions[tap] = NormedBlock(int(tap.removeprefix("placed")))
    return fusions


def blocks_behind(tap: str, fused_blocks: Iterable[int], depth: int) -> set[int]:
    """The blocks whose raw outputs a tap reads, counted from 1, or whose q, k and v; none for `final` and `decoder`."""
    if tap.startswith(("block", "placed", "qkv")):
        return {int(tap.lstrip("abcdeklopqv"))}
    if tap == "learned" or tap.startswith("mix"):
        return set(range(1, depth + 1))
    return set(fused_blocks) if tap == "mean_ln" else set()
