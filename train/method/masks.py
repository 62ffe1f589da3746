"""Masks: who is visible and who is predicted, as grid indices, and the maps that samplers may follow.

A mask depends on (seed, epoch, sample) alone, so it is the same for any batch size, worker count, rank count and after resume; laws of
the ratio add the number of the update, and sampler `similarity` the tokens it compares. `samplers.py` draws them, on the host, before the
batch is copied to the device.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from mrmae.kernels import ids
from mrmae.shards.format import BlockRule
from mrmae.train.method.recipe import MaskRecipe, Recipe
from mrmae.train.method.targets import ADD, ADD_MAP, MAP, Batch, CacheInfo

BUCKETS = 4  # ratios of a law: few shapes, each compiled once
# FSFM's groups of face parts, in its order; `boundary` is where skin meets hair or background.
PARTS = {"eyebrows": (2, 3), "eyes": (4, 5), "nose": (6,), "mouth": (7, 8, 9), "boundary": (), "hair": (10,), "skin": (1,),
         "background": (0,)}  # fmt: skip
COVERED = 6  # the first six of them may be covered whole
LAST_PART = max(max(of, default=0) for of in PARTS.values())
NEVER = 1e-300  # share of a patch without saliency: below any other, yet log is finite and the noise still orders them


@dataclass(frozen=True)
class Masks:
    """Grid indices, ascending, the same counts for every row: mask v of image i is row `v * b + i`.

    weight: of each predicted patch, for terms that are `weighted`; None: 1 everywhere. ids_partner: who is visible of each image's
    partner; None where there are no partners.
    """

    ids_keep: Int64[Tensor, "v*b n_keep"]
    ids_predict: Int64[Tensor, "v*b n_predict"]
    weight: Float[Tensor, "v*b n_predict"] | None = None
    ids_partner: Int64[Tensor, "b n_partner"] | None = None

    def change(self, change: Callable[[Tensor], Tensor]) -> "Masks":
        """The same masks with every tensor replaced by `change(tensor)`."""
        weight, partner = (None if x is None else change(x) for x in (self.weight, self.ids_partner))
        return Masks(change(self.ids_keep), change(self.ids_predict), weight, partner)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Masks":
        """The same masks on `device`."""
        return self.change(lambda x: x.to(device, non_blocking=non_blocking))


class Draw(NamedTuple):
    """What decides a mask beside the sample and the patch.

    blocks, n_views: how the cache cuts token blocks, per view. epochs: of the whole run, for samplers that change on the way.
    update: of the epoch, for laws of the ratio. mask: its number among those of its image.
    """

    seed: int
    epoch: int
    blocks: BlockRule | None = None
    n_views: int = 1
    epochs: int = 1
    update: int = 0
    mask: int = 0


def counts(recipe: MaskRecipe, l: int) -> tuple[int, int]:
    """(n_keep, n_predict) in a grid of `l` patches; `int(l * (1 - ratio))` are kept where no number is fixed, as in MAE.

    Of a law of the ratio: the mean. Raises ValueError when no patch would be visible, or more than l are asked for.
    """
    n_keep = recipe.n_keep
    if recipe.law != "fixed":
        n_keep = round(sum(buckets(recipe, l)) / BUCKETS)
    elif recipe.sampler == "disjoint" or recipe.cell > 1:
        n_keep = kept_cells(recipe, l) * recipe.cell**2
    elif recipe.sampler == "mix":
        n_keep = part_of_group(recipe, l)
    elif n_keep is None:
        n_keep = int(l * (1 - recipe.ratio))
    if not 1 <= n_keep <= l:
        said = f"mask.ratio = {recipe.ratio}" if recipe.n_keep is None else f"mask.n_keep = {n_keep}"
        raise ValueError(
            f"mask: {said} leaves {n_keep} of {l} patches visible; 1 to {l} were expected; change {said.split()[0]}"
        )
    n = l - n_keep if recipe.n_predict is None else recipe.n_predict
    n_predict = max(1, round(n * (l - n_keep))) if 0 < n < 1 else int(n)
    if n_keep + n_predict > l:
        raise ValueError(
            f"mask: n_predict = {n_predict} with {n_keep} of {l} patches visible; at most {l - n_keep} hidden patches can be "
            "predicted; change mask.n_predict, or give it as a share of the hidden ones, like 0.3333"
        )
    return n_keep, n_predict


def part_of_group(recipe: MaskRecipe, l: int) -> int:
    """Patches of each image in a sequence of sampler mix. Raises ValueError for a grid that does not split, or too finely for contrast."""
    if l % recipe.group or l // recipe.group < 2:
        raise ValueError(
            f"mask.group = {recipe.group}: does not split {l} patches into equal parts of at least 2; a divisor of {l} was expected"
        )
    return l // recipe.group


def kept_cells(recipe: MaskRecipe, l: int) -> int:
    """Cells that a mask in cells keeps: `int(n * (1 - ratio))` of n. Raises ValueError where cells do not tile a square grid."""
    side = side_of(l, recipe.sampler)
    if side % recipe.cell:
        raise ValueError(
            f"mask.cell = {recipe.cell}: does not divide a grid of {side} x {side}; a divisor of {side} was expected"
        )
    return int(l // recipe.cell**2 * (1 - recipe.ratio))


def side_of(l: int, sampler: str) -> int:
    """The side of a square grid. Raises ValueError for another one."""
    side = math.isqrt(l)
    if side * side != l:
        raise ValueError(
            f"mask.sampler = {sampler}: {l} patches; a square grid was expected; extract with another --grid"
        )
    return side


def buckets(recipe: MaskRecipe, l: int) -> list[int]:
    """How many patches each of a law's BUCKETS ratios keeps: the law's quantiles in the middle of each quarter.

    `truncnormal`: a normal law of mean 1 and deviation 0.25, cut to [0.7, 1], ceil(ratio * l) hidden (Harmon, arXiv 2503.21979).
    `cosine`: max(cos(pi u / 2), least), max(1, round(ratio * l)) hidden (Meissonic, arXiv 2410.08261). One patch at least stays
    visible. Their code draws a number per batch or image; quarters instead are ours.
    """
    middles, normal = [(k + 0.5) / BUCKETS for k in range(BUCKETS)], NormalDist(1, 0.25)
    if recipe.law == "truncnormal":
        low, high = normal.cdf(0.7), normal.cdf(1)
        hidden = [math.ceil(normal.inv_cdf(low + u * (high - low)) * l) for u in middles]
    else:
        hidden = [max(1, round(max(math.cos(math.pi * u / 2), recipe.least) * l)) for u in middles]
    return [max(1, l - n) for n in hidden]


def at_update(recipe: MaskRecipe, draw: Draw, l: int) -> MaskRecipe:
    """The recipe of one update's masks: with the number that a law of the ratio keeps in it, the same on every rank."""
    if recipe.law == "fixed":
        return recipe
    update = torch.tensor([draw.update])
    return replace(
        recipe,
        law="fixed",
        n_keep=buckets(recipe, l)[int(ids.drawn_block(update, BUCKETS, seed=draw.seed, epoch=draw.epoch))],
    )


def reads_saliency(recipe: MaskRecipe) -> bool:
    """Whether masks follow the map that `mask.source` names."""
    return recipe.sampler in ("attn_prob", "score", "crfr_p") or recipe.predict == "score"


def map_columns(recipe: Recipe) -> list[str]:
    """The cache's columns of the maps that the run reads."""
    source = recipe.mask.source
    reads = reads_saliency(recipe.mask) or any(term.focus for term in recipe.terms.values())
    found = [source.removeprefix(MAP)] if reads and source.startswith(MAP) else []
    found += [term.map for term in recipe.terms.values() if term.map is not None]
    return [f"{name}.map" for name in dict.fromkeys(found)]


def draw_of(recipe: Recipe, info: CacheInfo, epoch: int, update: int = 0) -> Draw:
    """What decides the masks of a run on a cache in an update of `epoch`."""
    return Draw(recipe.seed, epoch, info.blocks, info.n_views, recipe.optim.epochs, update)


def own_hash(batch: Batch, draw: Draw) -> Int64[Tensor, " b"]:
    """Each image's hash for mask `draw.mask` of it; mask 0 is what an image's only mask would be."""
    return ids.mix(batch.samples ^ ids.signed(ids.mix_int(draw.mask))) if draw.mask else batch.samples


def check_blocks(recipe: Recipe, info: CacheInfo, *, cached: bool) -> None:
    """Raise ValueError where masks are blocks and the cache has none, or others, or a term needs more than one.

    cached: whether the teachers' tokens come from the cache.
    """
    if recipe.mask.sampler != "stored_block":
        return
    otherwise = "or use --set mask.sampler=random"
    if info.blocks is None:
        raise ValueError(
            "mask.sampler = stored_block: the cache stores tokens in raster order; token blocks were expected; extract one with "
            f"extract-features --token-layout blocks, {otherwise}"
        )
    rows, n_keep = info.blocks.rows(info.n_patches), counts(recipe.mask, info.n_patches)[0]
    if n_keep != rows:
        said = f"mask.ratio = {recipe.mask.ratio}" if recipe.mask.n_keep is None else f"mask.n_keep = {n_keep}"
        raise ValueError(
            f"mask.sampler = stored_block: {said} shows {n_keep} of {info.n_patches} patches; the cache has {info.blocks.blocks} blocks"
            f" of {rows}; give --set mask.n_keep={rows}, extract with other --blocks, {otherwise}"
        )
    hidden = [name for name, t in recipe.terms.items() if t.target == "teachers" and t.positions == "predicted"]
    if hidden and cached:
        raise ValueError(
            f"mask.sampler = stored_block: term {hidden[0]} predicts teachers at hidden patches, whose tokens lie in the blocks that are"
            f" not read; terms at visible patches were expected; drop it with --set terms.{hidden[0]}=null, {otherwise}"
        )


def fit_values(recipe: Recipe) -> tuple[float, float, str]:
    """(lowest, highest, in words) of the values that the recipe can use of a map."""
    mask = recipe.mask
    if mask.sampler == "crfr_p":
        known = f"the parts 0 to {LAST_PART}"
        if mask.parts == "ids":
            return 0, LAST_PART, f"ids of {known} were expected (mask.parts=ids); correct the map"
        told = f"bits of {known}, 1 << part, one at least per patch, were expected (mask.parts=bits); correct the map, or use mask.parts=ids"
        return 1, (2 << LAST_PART) - 1, told
    drawn = mask.draw == "prob" and (
        mask.sampler == "attn_prob" or (mask.sampler, mask.mode) == ("score", "multinomial")
    )
    if drawn or mask.predict == "score" or any(term.focus for term in recipe.terms.values()):
        return (
            0,
            math.inf,
            "shares, of at least 0, were expected; shift the map, or choose mask.mode=mask_top or keep_top",
        )
    return -math.inf, math.inf, "any number was expected"


def saliency_arrays(source: str, info: CacheInfo) -> dict[str, str]:
    """Target -> the array behind its saliency map.

    source: `mean`, the CLS attention of every teacher that has one; a teacher's name, its attention; `norm` or `norm:NAME`,
    the norms of the stored tokens, for teachers without a CLS token; `map:NAME`, a map of the cache.
    Raises ValueError when the cache has no such map, saying what it has and how to add it.
    """
    if source.startswith(MAP):
        if (name := source.removeprefix(MAP)) in info.vectors:
            raise ValueError(
                f"mask.source = {source}: holds {info.vectors[name]} numbers per patch; a map of one was expected; choose another mask.source"
            )
        if name not in info.maps:
            raise ValueError(
                f"mask.source = {source}: the cache has no map {name!r}, it has {', '.join(info.maps) or 'none'}; {ADD_MAP} {name}=FILE, or "
                "choose another mask.source"
            )
        return {source: "map"}
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
    if source.startswith(MAP):
        return normalised(stored_map(targets, source, l))
    array = "norm" if source.partition(":")[0] == "norm" else "attention"
    name = source.partition(":")[2] if array == "norm" else source
    wanted = sorted(targets) if name in ("", "mean") else [name]
    maps = [targets[t][array] for t in wanted if array in targets.get(t, {})]
    if not maps or any(m.shape[1:] != (l,) for m in maps):
        raise ValueError(
            f"mask.source = {source}: the batch has no {array} of {l} patches; ask needed_arrays what to read"
        )
    return torch.stack([normalised(m) for m in maps]).mean(dim=0)


def ranking(targets: Mapping[str, Mapping[str, Tensor]], source: str, l: int) -> Float64[Tensor, "b l"]:
    """What patches are ordered by: a map's values as they are, also below 0; of teachers their `saliency`."""
    return stored_map(targets, source, l).double() if source.startswith(MAP) else saliency(targets, source, l)


def stored_map(targets: Mapping[str, Mapping[str, Tensor]], source: str, l: int) -> Shaped[Tensor, "b l"]:
    """The values of the map `map:NAME`. Raises ValueError when the batch lacks it."""
    values = targets.get(source, {}).get("map")
    if values is None or values.shape[1:] != (l,):
        raise ValueError(f"mask.source = {source}: the batch has no map of {l} patches; ask needed_arrays what to read")
    return values


def normalised(values: Float[Tensor, "b l"]) -> Float64[Tensor, "b l"]:
    """Each row divided by its sum, to the same bits in any batch and on any device.

    float16, the stored type, is a multiple of 2^-24, so the sum is taken exactly in integers.
    """
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((values >= 0).all()):
        raise ValueError(
            "saliency: a map holds negative or missing values; values of at least 0 were expected; "
            "check the cache's map, attention and norm arrays"
        )
    counted = (values.double() * 2.0**24).round().long()
    return counted.double() / counted.sum(dim=1, keepdim=True).clamp_min(1).double()
