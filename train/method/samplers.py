"""Who is visible: samplers from (sample hashes, seed, epoch, and for some a map or tokens) to grid indices.

A sampler says who is kept and calls all other patches hidden; `masks.py` chooses who of them is predicted. Every random choice is a
hash of (seed, epoch, sample, patch), or an index so hashed into a bank that was drawn ahead.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mrmae.kernels import ids
from mrmae.shards.order import view_of
from mrmae.train.method.masks import (
    COVERED,
    NEVER,
    PARTS,
    Draw,
    Masks,
    at_update,
    counts,
    kept_cells,
    own_hash,
    ranking,
    saliency,
    side_of,
    stored_map,
)
from mrmae.train.method.recipe import MaskRecipe
from mrmae.train.method.targets import Batch

Sampler = Callable[..., Masks]  # ids_predict: all hidden patches
BLOCK_MASKS = 4096  # block masks drawn ahead
TRIES = 100_000  # rectangles in a row that may fail before a bank is given up


def random_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Keep `n_keep` patches of each image, uniformly without replacement. MAE section 3, "Masking" (arXiv 2111.06377).

    With `mask.cell` above 1, whole cells of so many patches a side (SimMIM's mask unit, arXiv 2111.09886).
    """
    noise = ids.patch_noise(own_hash(batch, draw), l // recipe.cell**2, seed=draw.seed, epoch=draw.epoch)
    if recipe.cell == 1:
        return split_order(noise.argsort(dim=1), recipe)
    return split_kept(patches_of_cells(noise.argsort(dim=1)[:, : kept_cells(recipe, l)], recipe.cell, l), l)


def attn_prob_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Keep `n_keep` patches drawn without replacement with probability proportional to their saliency.

    Gumbel top-k on log(saliency) with hashed noise has the law of `torch.multinomial(saliency, n_keep)`. draw: `prob` is that;
    `softmax_prob` takes the softmax of the map first (much flatter); `topk` takes the largest values, without noise.
    Focused mimicking of MR-MAE (arXiv 2303.05475); the rule is inferred, it is the one of MaskAlign, MILAN and UMT.
    """
    share = (saliency if recipe.draw == "prob" else ranking)(batch.targets, recipe.source, l)
    if recipe.draw != "topk":
        noise = ids.gumbel_noise(own_hash(batch, draw), l, seed=draw.seed, epoch=draw.epoch)
        share = noise + (share.clamp_min(NEVER).log() if recipe.draw == "prob" else share)
    return split_order(share.argsort(dim=1, descending=True, stable=True), recipe)


def stored_block_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Keep one of the cache's token blocks of each image; of a cache, nothing else need be read.

    Every (image, view) has the same few blocks in every epoch, unlike `random`, whose masks never repeat. Ours.
    """
    assert draw.blocks is not None, "check_blocks comes first"
    samples = batch.samples.cpu().numpy()
    views = view_of(samples, draw.epoch, draw.n_views)
    keep = torch.from_numpy(draw.blocks.ids(samples, views, chosen_blocks(batch.samples, draw).cpu().numpy(), l))
    return split_kept(keep.to(batch.samples.device), l)


def chosen_blocks(samples: Int64[Tensor, " b"], draw: Draw) -> Int64[Tensor, " b"]:
    """Which block of each image is visible."""
    assert draw.blocks is not None, "check_blocks comes first"
    return ids.drawn_block(samples, draw.blocks.blocks, seed=draw.seed, epoch=draw.epoch)


def beit_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Hide rectangles, as BEiT does (arXiv 2106.08254): one of a bank of masks that hide exactly l - n_keep patches."""
    side, n_keep = side_of(l, "beit"), counts(recipe, l)[0]
    bank = block_bank(draw.seed, side, n_keep)
    chosen = ids.drawn_block(own_hash(batch, draw), len(bank), seed=draw.seed, epoch=draw.epoch)
    return split_kept(bank[chosen.cpu()].to(batch.samples.device), l)


@functools.lru_cache(maxsize=8)
def block_bank(seed: int, side: int, n_keep: int) -> Int64[Tensor, "bank n_keep"]:
    """The patches that BLOCK_MASKS block masks of a side x side grid leave visible, ascending; a function of these numbers alone.

    Raises ValueError where rectangles cannot hide exactly that many.
    """
    rng = np.random.Generator(np.random.PCG64([seed & ids.WORD, side, n_keep]))
    kept = [np.flatnonzero(~rectangles(rng, side, side * side - n_keep)) for _ in range(BLOCK_MASKS)]
    return torch.from_numpy(np.stack(kept)).long()


def rectangles(rng: np.random.Generator, side: int, n_hidden: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """A mask of exactly n_hidden patches of side x side, True = hidden, flattened.

    Until so many are hidden: area ~ U(16, remaining), log of the aspect ratio ~ U(log 0.3, log 3.33), a rectangle at random, taken
    where it hides 1 to `remaining` new patches. On other grids than 14 x 14 the smallest area is the same share of them (ours).
    """
    hidden, smallest = np.zeros((side, side), bool), 16 * side * side / 196
    remaining, tries = n_hidden, 0
    while remaining:
        if (tries := tries + 1) > TRIES:
            raise ValueError(
                f"mask.sampler = beit: no rectangles hide exactly {n_hidden} of {side} x {side} patches; a count in reach of "
                "blocks was expected; change mask.n_keep, or use --set mask.sampler=random"
            )
        area = smallest + (remaining - smallest) * rng.random()
        aspect = math.exp(math.log(0.3) + (math.log(3.33) - math.log(0.3)) * rng.random())
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < side and 0 < w < side):
            continue
        top, left = rng.integers(side - h + 1), rng.integers(side - w + 1)
        window = hidden[top : top + h, left : left + w]
        if 0 < (new := int((~window).sum())) <= remaining:
            window[...] = True
            remaining, tries = remaining - new, 0
    return hidden.ravel()


def disjoint_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Two masks per image that hide every patch once at least, in cells of `mask.cell` x `mask.cell` patches (DMJD, 2301.00230).

    Of n cells mask 0 keeps K = int(n (1 - m)). Mask 1 hides e = int(min(1 - m, m) n) of those, and (n - K) - e of the others. The
    exchange is drawn per image; the released code draws it once per batch.
    """
    cells, kept = l // recipe.cell**2, kept_cells(recipe, l)
    first = ids.patch_noise(batch.samples, cells, seed=draw.seed, epoch=draw.epoch).argsort(dim=1)
    if draw.mask == 0:
        return split_kept(patches_of_cells(first[:, :kept], recipe.cell, l), l)
    exchanged = min(int(min(1 - recipe.ratio, recipe.ratio) * cells), kept, cells - kept)
    noise = ids.patch_noise(batch.samples, cells, seed=draw.seed, epoch=draw.epoch, stream="exchange")
    seen, unseen = (noise.gather(1, part).argsort(dim=1) for part in (first[:, :kept], first[:, kept:]))
    seen, unseen = first[:, :kept].gather(1, seen), first[:, kept:].gather(1, unseen)
    still = cells - kept - exchanged  # cells that both masks hide
    return split_kept(patches_of_cells(torch.cat([seen[:, exchanged:], unseen[:, still:]], dim=1), recipe.cell, l), l)


def patches_of_cells(chosen: Int64[Tensor, "b k"], cell: int, l: int) -> Int64[Tensor, "b k*cell*cell"]:
    """The patches of these cells."""
    across = math.isqrt(l) // cell
    row, column = chosen // across * cell, chosen % across * cell
    inside = torch.arange(cell, device=chosen.device)
    patches = (row[..., None, None] + inside[:, None]) * (across * cell) + column[..., None, None] + inside
    return patches.flatten(1)


def quarters_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Four complementary masks per image: mask v keeps the v-th quarter of one permutation (FastConvMAE)."""
    n_keep = counts(recipe, l)[0]
    if 4 * n_keep != l:
        raise ValueError(
            f"mask.sampler = quarters: {n_keep} of {l} patches visible; a quarter of the grid was expected, and a grid whose patches "
            "can be quartered; use --set mask.ratio=0.75, or another --grid"
        )
    order = ids.patch_noise(batch.samples, l, seed=draw.seed, epoch=draw.epoch).argsort(dim=1)
    return split_order(order.roll(-n_keep * draw.mask, dims=1), recipe)


def pair_disjoint_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Keep the first n_keep patches of one permutation, and of the partner's view the next n_keep (LUT, arXiv 2310.13593)."""
    n_keep = counts(recipe, l)[0]
    if 2 * n_keep > l:
        raise ValueError(
            f"mask.sampler = pair_disjoint: {n_keep} of {l} patches visible in each of two views; at most {l // 2} were expected; "
            "raise mask.ratio"
        )
    order = ids.patch_noise(own_hash(batch, draw), l, seed=draw.seed, epoch=draw.epoch).argsort(dim=1)
    return replace(split_order(order, recipe), ids_partner=order[:, n_keep : 2 * n_keep].sort(dim=1).values)


def mix_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Images g * j + k, of a batch in order, are joined: image k keeps the k-th part of a permutation that the first of them decides.

    Together they show every patch of the grid once (MixedAE, arXiv 2303.17152; its reading is inferred). Which images are joined is the
    epoch's order, the same on any number of ranks where each micro-batch is a multiple of `mask.group`.
    """
    n_keep, row = counts(recipe, l)[0], torch.arange(len(batch.samples), device=batch.samples.device)
    leaders = batch.samples[row - row % recipe.group]
    order = ids.patch_noise(leaders, l, seed=draw.seed, epoch=draw.epoch).argsort(dim=1)
    return split_kept(order.view(len(row), recipe.group, n_keep)[row, row % recipe.group], l)


def score_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Keep patches by a map: hide those of the highest score (`mask_top`), keep them (`keep_top`), or draw whom to keep (`multinomial`).

    SyCoCa (arXiv 2401.02137) hides the patches nearest to a text. Ties: the lower grid index counts as less.
    """
    if recipe.mode == "multinomial":
        return attn_prob_mask(batch, draw, recipe=recipe, l=l)
    order = ranking(batch.targets, recipe.source, l).argsort(dim=1, stable=True)
    return split_order(order if recipe.mode == "mask_top" else order.flip(1), recipe)


def crfr_p_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Hide one part of a face whole and a like share of each other part: FSFM's CRFR-P (arXiv 2412.12032).

    Of T = l - n_keep hidden patches |F| are those of one of the first COVERED groups of PARTS; of every other group, in order and of
    patches that no group before it has, round(count (T - |F|) / (l - |F|)) are hidden, in float32, half to even. Then patches outside
    F are hidden or shown until T are hidden; where |F| >= T only T patches of F. weight: 1 on what is hidden of F. The covered part is
    drawn per image; the released code draws it once per batch.
    """
    noise = functools.partial(ids.patch_noise, own_hash(batch, draw), l, seed=draw.seed, epoch=draw.epoch)
    chosen = ids.drawn_block(own_hash(batch, draw), COVERED, seed=draw.seed, epoch=draw.epoch)
    n_hidden = l - counts(recipe, l)[0]
    members = part_members(stored_map(batch.targets, recipe.source, l).long(), recipe.parts)
    covered = members.gather(1, chosen[:, None, None].expand(-1, 1, l))[:, 0]
    owner = torch.cat([covered[:, None], members, torch.ones_like(covered)[:, None]], dim=1).int().argmax(dim=1)
    sizes = torch.nn.functional.one_hot(owner, len(PARTS) + 2).sum(dim=1)
    n_covered = sizes[:, :1]
    share = (n_hidden - n_covered).clamp_min(0).float() / (l - n_covered).clamp_min(1).float()
    quota = (sizes * share).round().long()
    quota[:, 0], quota[:, -1] = sizes[:, 0], 0
    rank = in_order(owner, noise()).argsort(dim=1) - (sizes.cumsum(dim=1) - sizes).gather(1, owner)
    hidden = rank < quota.gather(1, owner)
    first = in_order(torch.where(covered, 0, torch.where(hidden, 1, 2)), noise(stream="fill"))
    masks = split_kept(first[:, n_hidden:], l)
    return Masks(masks.ids_keep, masks.ids_predict, covered.gather(1, masks.ids_predict).float())


def part_members(parts: Int64[Tensor, "b l"], kind: str) -> Bool[Tensor, "b groups l"]:
    """Which patches touch each group of PARTS. kind: whether `parts` are `bits` or `ids`."""
    bits = 1 << parts if kind == "ids" else parts

    def touched(*of: int) -> Bool[Tensor, "b l"]:
        return bits & sum(1 << part for part in of) != 0

    boundary = touched(*PARTS["skin"]) & touched(*PARTS["hair"], *PARTS["background"])
    return torch.stack([touched(*of) if of else boundary for of in PARTS.values()], dim=1)


def in_order(group: Int64[Tensor, "b l"], noise: Int64[Tensor, "b l"]) -> Int64[Tensor, "b l"]:
    """Patches by ascending group, at random within one."""
    order = noise.argsort(dim=1)
    return order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))


def similarity_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int, embedded: Float[Tensor, "b l d"]) -> Masks:
    """SelectiveMAE's growing set (arXiv 2406.11933): half of n_keep are seeds, the rest joins in two rounds by similarity to them.

    embedded: every patch's tokens whose cosines decide. Who joins follows the run's progress: `near`, then `far`, then random ones.
    """
    n_keep, hashes = counts(recipe, l)[0], own_hash(batch, draw)
    seeds = int(n_keep / 2)
    if not 1 <= seeds:
        raise ValueError(
            f"mask.sampler = similarity: {n_keep} of {l} patches visible leave {seeds} seeds; at least 1 was expected; raise mask.n_keep"
        )
    if recipe.predict == "score":
        noise = ids.gumbel_noise(hashes, l, seed=draw.seed, epoch=draw.epoch)
        order = (noise + saliency(batch.targets, recipe.source, l).clamp_min(NEVER).log()).argsort(
            dim=1, descending=True, stable=True
        )
    else:
        order = ids.patch_noise(hashes, l, seed=draw.seed, epoch=draw.epoch).argsort(dim=1)
    added = n_keep - seeds
    rounds = [joining(m, draw.epoch, draw.epochs) for m in (added // 2, added - added // 2)]
    fresh = ids.patch_noise(hashes, l, seed=draw.seed, epoch=draw.epoch, stream="join")
    return split_kept(grow_by_similarity(embedded, order[:, :seeds], rounds, fresh), l)


def joining(m: int, epoch: int, epochs: int) -> tuple[int, int, int]:
    """How many of m patches that join in `epoch` of `epochs` are (near, far, random).

    Of 800 epochs SelectiveMAE takes near ones to 280, a blend of near and far to 300, far ones to 580, a blend of far and random to
    600, then random ones. Other lengths: the same fractions (ours).
    """
    start, width = (280, 580), 20
    at = epoch * 800 / epochs
    if at < start[0]:
        return m, 0, 0
    if at < start[0] + width:
        near = int((1 - (at - start[0]) / width) * m)
        return near, m - near, 0
    if at < start[1]:
        return 0, m, 0
    far = max(0, int((1 - (at - start[1]) / width) * m))
    return 0, far, m - far


def grow_by_similarity(
    embedded: Float[Tensor, "b l d"],
    seeds: Int64[Tensor, "b s"],
    rounds: Sequence[tuple[int, int, int]],
    noise: Int64[Tensor, "b l"],
) -> Int64[Tensor, "b k"]:
    """The seeds and who joins them, round by round: `near` unselected patches of the largest similarity, `far` of the smallest, random.

    A patch's similarity is its largest cosine to any selected one; who joins in a round is selected in the next.
    """
    unit = torch.nn.functional.normalize(embedded.double(), dim=2)
    cosines = unit @ unit.transpose(1, 2)
    kept, taken = seeds, torch.zeros(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
    for counted in rounds:
        taken = taken.scatter(1, kept, True)
        nearest = cosines.masked_fill(~taken[:, None], -math.inf).amax(dim=2)
        scores = (nearest, -nearest, noise.double())
        for m, score in zip(counted, scores):
            chosen = score.masked_fill(taken, -math.inf).argsort(dim=1, descending=True, stable=True)[:, :m]
            kept, taken = torch.cat([kept, chosen], dim=1), taken.scatter(1, chosen, True)
    return kept


def split_order(order: Int64[Tensor, "b l"], recipe: MaskRecipe) -> Masks:
    """The first `n_keep` patches of each row of `order` are visible, all others hidden."""
    n_keep, _ = counts(recipe, order.shape[1])
    return Masks(order[:, :n_keep].sort(dim=1).values, order[:, n_keep:].sort(dim=1).values)


def split_kept(keep: Int64[Tensor, "b k"], l: int) -> Masks:
    """These patches are visible, all others hidden."""
    hidden = torch.ones(len(keep), l, dtype=torch.bool, device=keep.device).scatter(1, keep, False)
    return Masks(keep.sort(dim=1).values, hidden.nonzero()[:, 1].view(len(keep), -1))


SAMPLERS: dict[str, Sampler] = {
    "random": random_mask,
    "attn_prob": attn_prob_mask,
    "stored_block": stored_block_mask,
    "beit": beit_mask,
    "disjoint": disjoint_mask,
    "quarters": quarters_mask,
    "score": score_mask,
    "similarity": similarity_mask,
    "crfr_p": crfr_p_mask,
    "pair_disjoint": pair_disjoint_mask,
    "mix": mix_mask,
}


def draw_masks(
    batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int, embedded: Float[Tensor, "b l d"] | None = None
) -> Masks:
    """The masks of a batch: who is visible by the recipe's sampler, who is predicted by its law; of partners everything is visible.

    Only `batch.samples` and saliency maps are read, and by sampler `similarity` the tokens `embedded` of every patch.
    """
    at, drawn = at_update(recipe, draw, l), []
    told = {} if embedded is None else {"embedded": embedded}
    for mask in range(recipe.masks_per_image):
        here = draw._replace(mask=mask)
        drawn.append(
            predicted(SAMPLERS[recipe.sampler](batch, here, recipe=at, l=l, **told), batch, here, recipe=at, l=l)
        )
    masks = stacked_masks(drawn)
    if batch.partner is not None and masks.ids_partner is None:
        masks = replace(masks, ids_partner=torch.arange(l, device=batch.samples.device).repeat(len(batch.samples), 1))
    return masks


def stacked_masks(masks: Sequence[Masks]) -> Masks:
    """Masks 0, 1, ... of the same images as rows `v * b + i`."""
    if len(masks) == 1:
        return masks[0]
    weights = [m.weight for m in masks if m.weight is not None]
    return Masks(
        torch.cat([m.ids_keep for m in masks]),
        torch.cat([m.ids_predict for m in masks]),
        torch.cat(weights) if weights else None,
    )


def predicted(masks: Masks, batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """The same masks with `n_predict` of the hidden patches predicted, by the recipe's law; ids_predict holds all of them here.

    `uniform` draws from a hash stream of its own: what is predicted says nothing about who was nearly visible. `score` draws
    without replacement with probability proportional to the map that `mask.source` names.
    """
    n = counts(recipe, l)[1]
    if n == masks.ids_predict.shape[1]:
        return masks
    hidden, hashes = masks.ids_predict, own_hash(batch, draw)
    if recipe.predict == "uniform":
        noise = ids.patch_noise(hashes, l, seed=draw.seed, epoch=draw.epoch, stream="predict")
        order = noise.gather(1, hidden).argsort(dim=1)
    else:
        share = saliency(batch.targets, recipe.source, l).clamp_min(NEVER).log()
        share = share + ids.gumbel_noise(hashes, l, seed=draw.seed, epoch=draw.epoch, stream="predict")
        order = share.gather(1, hidden).argsort(dim=1, descending=True, stable=True)
    chosen = order[:, :n].sort(dim=1).values
    weight = None if masks.weight is None else masks.weight.gather(1, chosen)
    return replace(masks, ids_predict=hidden.gather(1, chosen), weight=weight)
