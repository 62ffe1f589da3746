"""Who is visible: samplers from (sample hashes, seed, epoch) to grid indices.

A mask depends on nothing else, so it is the same for any batch size, worker count, rank count and after resume. Sampling runs
on the host, before the batch is copied to the device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mrmae.kernels import ids
from mrmae.shards.format import BlockRule
from mrmae.shards.order import view_of
from mrmae.train.method.recipe import MaskRecipe, Recipe
from mrmae.train.method.targets import ADD, Batch, CacheInfo

NEVER = 1e-300  # share of a patch without saliency: below any other, yet log is finite and the noise still orders them


@dataclass(frozen=True)
class Masks:
    """Grid indices, ascending, the same counts for every image. Several masks per image are rows `v * b + i`."""

    ids_keep: Int64[Tensor, "b n_keep"]
    ids_predict: Int64[Tensor, "b n_predict"]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Masks":
        """The same masks on `device`."""
        keep, predict = (x.to(device, non_blocking=non_blocking) for x in (self.ids_keep, self.ids_predict))
        return Masks(keep, predict)


class Draw(NamedTuple):
    """What decides a mask beside the sample and the patch; of blocks also how the cache cuts them, per view."""

    seed: int
    epoch: int
    blocks: BlockRule | None = None
    n_views: int = 1


Sampler = Callable[..., Masks]


def counts(recipe: MaskRecipe, l: int) -> tuple[int, int]:
    """(n_keep, n_predict) in a grid of `l` patches; `int(l * (1 - ratio))` are kept where no number is fixed, as in MAE.

    Raises ValueError when no patch would be visible, or more than l are asked for.
    """
    n_keep = int(l * (1 - recipe.ratio)) if recipe.n_keep is None else recipe.n_keep
    if not 1 <= n_keep <= l:
        said = f"mask.ratio = {recipe.ratio}" if recipe.n_keep is None else f"mask.n_keep = {n_keep}"
        raise ValueError(
            f"mask: {said} leaves {n_keep} of {l} patches visible; 1 to {l} were expected; change {said.split()[0]}"
        )
    n_predict = l - n_keep if recipe.n_predict is None else recipe.n_predict
    if n_keep + n_predict > l:
        raise ValueError(
            f"mask: n_predict = {n_predict} with {n_keep} of {l} patches visible; at most {l - n_keep} hidden patches can be "
            "predicted; change mask.n_predict"
        )
    return n_keep, n_predict


def draw_masks(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """The masks of a batch by the recipe's sampler. Only `batch.samples` and saliency maps are read."""
    return SAMPLERS[recipe.sampler](batch, draw, recipe=recipe, l=l)


def draw_of(recipe: Recipe, info: CacheInfo, epoch: int) -> Draw:
    """What decides the masks of a run on a cache in `epoch`."""
    return Draw(recipe.seed, epoch, info.blocks, info.n_views)


def random_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Keep `n_keep` patches of each image, uniformly without replacement. MAE section 3, "Masking" (arXiv 2111.06377)."""
    noise = ids.patch_noise(batch.samples, l, seed=draw.seed, epoch=draw.epoch)
    return split_order(noise.argsort(dim=1), recipe)


def attn_prob_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Keep `n_keep` patches drawn without replacement with probability proportional to the teachers' saliency.

    Gumbel top-k on log(saliency) with hashed noise has the law of `torch.multinomial(saliency, n_keep)`. draw: `prob` is that;
    `softmax_prob` takes the softmax of the map first (much flatter); `topk` takes the largest values, without noise.
    Focused mimicking of MR-MAE (arXiv 2303.05475); the rule is inferred, it is the one of MaskAlign, MILAN and UMT.
    """
    share = saliency(batch.targets, recipe.source, l)
    if recipe.draw != "topk":
        noise = ids.gumbel_noise(batch.samples, l, seed=draw.seed, epoch=draw.epoch)
        share = noise + (share.clamp_min(NEVER).log() if recipe.draw == "prob" else share)
    return split_order(share.argsort(dim=1, descending=True, stable=True), recipe)


def block_mask(batch: Batch, draw: Draw, *, recipe: MaskRecipe, l: int) -> Masks:
    """Keep one of the cache's token blocks of each image; of a cache, nothing else need be read.

    Every (image, view) has the same few blocks in every epoch, unlike `random`, whose masks never repeat. Ours.
    """
    assert draw.blocks is not None, "check_blocks comes first"
    samples = batch.samples.cpu().numpy()
    views = view_of(samples, draw.epoch, draw.n_views)
    keep = torch.from_numpy(draw.blocks.ids(samples, views, chosen_blocks(batch.samples, draw).cpu().numpy(), l))
    order = ids.patch_noise(batch.samples, l, seed=draw.seed, epoch=draw.epoch)
    return split_order(order.scatter(1, keep.to(order.device), torch.iinfo(torch.int64).min).argsort(dim=1), recipe)


def chosen_blocks(samples: Int64[Tensor, " b"], draw: Draw) -> Int64[Tensor, " b"]:
    """Which block of each image is visible."""
    assert draw.blocks is not None, "check_blocks comes first"
    return ids.drawn_block(samples, draw.blocks.blocks, seed=draw.seed, epoch=draw.epoch)


def check_blocks(recipe: Recipe, info: CacheInfo, *, cached: bool) -> None:
    """Raise ValueError where masks are blocks and the cache has none, or others, or a term needs more than one.

    cached: whether the teachers' tokens come from the cache.
    """
    if recipe.mask.sampler != "block":
        return
    otherwise = "or use --set mask.sampler=random"
    if info.blocks is None:
        raise ValueError(
            "mask.sampler = block: the cache stores tokens in raster order; token blocks were expected; extract one with "
            f"extract-features --token-layout blocks, {otherwise}"
        )
    rows, n_keep = info.blocks.rows(info.n_patches), counts(recipe.mask, info.n_patches)[0]
    if n_keep != rows:
        said = f"mask.ratio = {recipe.mask.ratio}" if recipe.mask.n_keep is None else f"mask.n_keep = {n_keep}"
        raise ValueError(
            f"mask.sampler = block: {said} shows {n_keep} of {info.n_patches} patches; the cache has {info.blocks.blocks} blocks"
            f" of {rows}; give --set mask.n_keep={rows}, extract with other --blocks, {otherwise}"
        )
    hidden = [name for name, t in recipe.terms.items() if t.target == "teachers" and t.positions == "predicted"]
    if hidden and cached:
        raise ValueError(
            f"mask.sampler = block: term {hidden[0]} predicts teachers at hidden patches, whose tokens lie in the blocks that are"
            f" not read; terms at visible patches were expected; drop it with --set terms.{hidden[0]}=null, {otherwise}"
        )


def split_order(order: Int64[Tensor, "b l"], recipe: MaskRecipe) -> Masks:
    """The first `n_keep` patches of each row of `order` are visible, the next `n_predict` predicted."""
    n_keep, n_predict = counts(recipe, order.shape[1])
    keep, predict = order[:, :n_keep], order[:, n_keep : n_keep + n_predict]
    return Masks(keep.sort(dim=1).values, predict.sort(dim=1).values)


def saliency_arrays(source: str, info: CacheInfo) -> dict[str, str]:
    """Teacher -> the array behind its saliency map.

    source: `mean`, the CLS attention of every teacher that has one; a teacher's name, its attention; `norm` or `norm:NAME`,
    the norms of the stored tokens, for teachers without a CLS token.
    Raises ValueError when the cache has no such map, saying what it has and how to add it.
    """
    attentive = [name for name, teacher in info.teachers.items() if teacher.has_attention]
    has = f"the cache has {', '.join(info.teachers) or 'no teacher'}, with attention: {', '.join(attentive) or 'none'}"
    if source == "mean":
        if not attentive:
            raise ValueError(f"mask.source = mean: {has}; {ADD} one with a CLS token, or use --set mask.source=norm")
        return dict.fromkeys(attentive, "attention")
    kind, _, name = source.partition(":")
    names = list(info.teachers) if source == "norm" else [name if kind == "norm" else source]
    array = "norm" if kind == "norm" else "attention"
    for name in names:
        if name not in (info.teachers if array == "norm" else attentive):
            raise ValueError(f"mask.source = {source}: {has}; {ADD} {name}=..., or choose another mask.source")
    if not names:
        raise ValueError(f"mask.source = {source}: {has}; {ADD} NAME=...")
    return dict.fromkeys(names, array)


def saliency(targets: Mapping[str, Mapping[str, Tensor]], source: str, l: int) -> Float64[Tensor, "b l"]:
    """The map that `source` names, each image's sum being 1; several teachers' normalised maps are averaged.

    Raises ValueError when the batch lacks it, and on the host when a value is negative or not a number.
    """
    array = "norm" if source.partition(":")[0] == "norm" else "attention"
    name = source.partition(":")[2] if array == "norm" else source
    wanted = sorted(targets) if name in ("", "mean") else [name]
    maps = [targets[t][array] for t in wanted if array in targets.get(t, {})]
    if not maps or any(m.shape[1:] != (l,) for m in maps):
        raise ValueError(
            f"mask.source = {source}: the batch has no {array} of {l} patches; ask needed_arrays what to read"
        )
    return torch.stack([normalised(m) for m in maps]).mean(dim=0)


def normalised(values: Float[Tensor, "b l"]) -> Float64[Tensor, "b l"]:
    """Each row divided by its sum, to the same bits in any batch and on any device.

    float16, the stored type, is a multiple of 2^-24, so the sum is taken exactly in integers.
    """
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((values >= 0).all()):
        raise ValueError(
            "saliency: a map holds negative or missing values; values of at least 0 were expected; "
            "check the cache's attention and norm arrays"
        )
    counted = (values.double() * 2.0**24).round().long()
    return counted.double() / counted.sum(dim=1, keepdim=True).clamp_min(1).double()


SAMPLERS: dict[str, Sampler] = {"random": random_mask, "attn_prob": attn_prob_mask, "block": block_mask}
