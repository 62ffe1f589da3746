"""A term binds tap, positions, head, target and distance into one weighted loss.

Predictions and targets are gathered with the same ids by construction: no recipe indexes targets by hand. Losses are fp32
whatever autocast does, and neither a normalised image nor a dequantised grid is ever made.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mrmae.kernels import dispatch, reference
from mrmae.shards.format import stored_tap
from mrmae.train.method.boxes import box_targets
from mrmae.train.method.contrast import view_errors
from mrmae.train.method.distances import DISTANCES, LABEL_DISTANCES
from mrmae.train.method.hog import hog_targets
from mrmae.train.method.masks import Masks, reads_saliency, saliency, saliency_arrays
from mrmae.train.method.mixing import source_errors
from mrmae.train.method.recipe import PARTNER, BoxRecipe, Recipe, TermRecipe, Transform
from mrmae.train.method.relations import relation_divergence
from mrmae.train.method.taps import Tokens, blocks_behind, tokens_at
from mrmae.train.method.targets import ADD, ADD_MAP, MAP, Batch, CacheInfo, TeacherStatistics, teachers_of


@dataclass(frozen=True)
class Term:
    """One weighted loss, bound to one target: pixels, their HOG or labels (teacher None) or one cached column of a teacher, by target name.

    name: as in the recipe, `mimic`, with `/teacher` where it predicts one: the key of its head and of its logged value.
    weight: the recipe's, divided by the number of teachers that share it.
    """

    name: str
    recipe: TermRecipe
    teacher: str | None
    weight: float

    def __str__(self) -> str:
        r, target = self.recipe, self.teacher or self.recipe.target
        focus = " * saliency" * r.focus + " * mask's weights" * r.weighted + f", head of {r.head_of}" * bool(r.head_of)
        target = f"{target} of the other view" if r.of == "other" else target
        both = " on both views" if r.views == "both" else ""
        return f"{r.tap} @ {r.positions}{both} > {r.head} ~ {target} | {r.transform} : {r.distance} * {self.weight:g}{focus}"


class PixelScale(NamedTuple):
    """How the student reads an image: `pixel * scale + shift` per channel, in square patches."""

    patch: int
    scale: Float[Tensor, " c"]
    shift: Float[Tensor, " c"]


def bind_terms(recipe: Recipe, info: CacheInfo) -> tuple[Term, ...]:
    """The recipe's terms on this cache, one per teacher where they predict teachers.

    Raises ValueError when the cache lacks a teacher or an array they need.
    """
    terms: list[Term] = []
    for name, term in recipe.terms.items():
        if hasattr(nn.ModuleDict, name):
            raise ValueError(f"term {name}: torch uses this name itself; another one was expected; rename terms.{name}")
        if term.focus:
            saliency_arrays(recipe.mask.source, info)
        if term.map is not None:
            check_map(name, term.map, term.classes is not None, info)
        if term.target != "teachers":
            terms.append(Term(name, term, None, term.weight))
            continue
        teachers = teachers_of(name, term, info)
        terms += [Term(f"{name}/{teacher}", term, teacher, term.weight / len(teachers)) for teacher in teachers]
    return tuple(terms)


def check_map(name: str, map: str, ids: bool, info: CacheInfo) -> None:
    """Raise ValueError unless the cache has a map of this name, of ids or of several numbers per patch."""
    if (info.maps.get(map) == "uint16") if ids else map in info.vectors:
        return
    one = f"map {map!r} of {info.maps[map]}" if map in info.maps else f"no map {map!r}"
    has = f"map {map!r} of {info.vectors[map]} numbers per patch" if map in info.vectors else one
    told, expected = ("ids", "ids (uint16)") if ids else ("numbers", "several numbers per patch")
    other = f", or leave out terms.{name}.classes" if ids else f", or for ids give terms.{name}.classes and distance ce"
    raise ValueError(
        f"term {name}: predicts {told} and the cache has {has}; a map of {expected} was expected; {ADD_MAP} {map}=FILE, "
        f"name another with --set terms.{name}.map=...{other}"
    )


def needed_arrays(recipe: Recipe, info: CacheInfo) -> dict[str, set[str]]:
    """Target -> the cached arrays that training reads: tokens (with scale where stored), cls, attention, norm; of a map its map.

    Raises ValueError when the cache lacks one, saying what it has and how to add it.
    """
    needed: dict[str, set[str]] = {}
    for term in bind_terms(recipe, info):
        if term.teacher is not None:
            target = info.target(term.teacher)
            arrays = needed.setdefault(target.source or term.teacher, set())
            if term.recipe.at("cls"):
                arrays.add("cls")
            if term.recipe.positions != "cls":
                arrays |= {"tokens", "scale"} if target.has_scale else {"tokens"}
        elif term.recipe.map is not None:
            needed[f"{MAP}{term.recipe.map}"] = {"map"}
    if reads_saliency(recipe.mask) or any(term.focus for term in recipe.terms.values()):
        for teacher, array in saliency_arrays(recipe.mask.source, info).items():
            needed.setdefault(teacher, set()).add(array)
    if recipe.mask.sampler == "crfr_p" and info.maps[recipe.mask.source.removeprefix(MAP)] != "uint16":
        raise ValueError(
            f"mask.source = {recipe.mask.source}: holds scores; with mask.sampler crfr_p ids or bits of parts, integers, were expected; give "
            "another map, or use --set mask.sampler=score"
        )
    return needed


def check_taps(
    terms: Iterable[Term],
    fused_blocks: Iterable[int],
    *,
    depth: int,
    hidden: tuple[int, int],
    has_cls: bool,
    fuses: bool = False,
) -> frozenset[int]:
    """The blocks whose raw outputs the taps need, counted from 1.

    hidden: how many patches are predicted, and hidden. has_cls: whether the student has a CLS token; fuses: whether its `final` already fuses its stages. Raises ValueError for a block or a token the
    student does not have, and for terms on predicted patches when none is predicted.
    """
    wanted: set[int] = set()
    for term in terms:
        tap, key = term.recipe.tap, term.name.partition("/")[0]
        behind = [blocks_behind(one, fused_blocks, depth) for one in term.recipe.taps]
        blocks = set[int]().union(*behind)
        if ("mean_ln" in term.recipe.taps and not fused_blocks) or not all(1 <= i <= depth for i in blocks):
            raise ValueError(
                f"term {term.name}: tap {tap} reads the blocks {sorted(blocks)}; numbers from 1 to {depth} were expected, the "
                f"student has {depth}; change terms.{key}.tap or student.fused_blocks"
            )
        if not has_cls and term.recipe.at("cls"):
            raise ValueError(
                f"term {term.name}: wants a CLS token and the student has no CLS; visible positions were expected; change "
                f"terms.{key}.positions"
            )
        if fuses and any(one == "learned" or one.startswith(("placed", "qkv")) for one in term.recipe.taps):
            raise ValueError(
                f"term {term.name}: reads tap {tap}, made for a plain ViT, and the student fuses its stages itself; tap final was "
                f"expected; change terms.{key}.tap"
            )
        n_predict, n_hidden = hidden
        if n_predict == 0 and tap != "boxes" and (term.recipe.at("predicted") or (term.recipe.at("all") and n_hidden)):
            raise ValueError(
                f"term {term.name}: predicts hidden patches and the mask has none to predict; at least 1 was expected; change "
                "mask.n_predict or mask.n_keep"
            )
        wanted |= blocks
    return frozenset(wanted)


def check_heads(term: Term, info: CacheInfo, width: int) -> None:
    """Raise ValueError where a student's q, k and v cannot be split into the heads of the teacher whose relations they learn."""
    if not term.recipe.relation or term.teacher is None:
        return
    tail = info.target(term.teacher).tail or {}
    if "qkv.heads" not in tail:
        tap = term.recipe.teacher_tap or ""
        raise ValueError(
            f"term {term.name}: the cache stores {tap} of teacher {term.teacher!r} itself, without its heads; the block's input was expected; "
            f"{ADD} {term.teacher.partition(':')[0]}=...?tap={stored_tap(tap)}"
        )
    heads = int(tail["qkv.heads"])
    if width % heads:
        raise ValueError(
            f"term {term.name}: compares relations in the teacher's {heads} heads and the student is {width} channels wide; a multiple of "
            f"{heads} was expected; use another student, or another teacher"
        )


def score(
    terms: Sequence[Term],
    heads: nn.ModuleDict,
    statistics: nn.ModuleDict,
    taps: Mapping[str, Tokens],
    batch: Batch,
    masks: Masks,
    *,
    pixels: PixelScale,
    source: str,
    kernels: dispatch.Kernels,
    boxes: BoxRecipe | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The weighted sum of all terms, and each term's own value, unweighted and detached.

    source: the saliency map behind `focus`. boxes: how terms with target `boxes` cut and weigh them.
    """
    parts = {}
    for term in terms:
        each = []
        if term.recipe.target == "views":
            parts[term.name] = view_loss(term, heads[term.name], taps)
            continue
        for side in term.recipe.sides:
            tokens = tokens_at(taps, [f"{side}{tap}" for tap in term.recipe.taps], term.recipe.positions)
            prediction, view = tokens._replace(x=heads[term.name](tokens.x)), view_of_side(batch, side)
            if term.recipe.target == "boxes":
                assert boxes is not None
                each.append(box_loss(prediction, batch, boxes))
                continue
            told = view if term.recipe.of == "same" else view_of_side(batch, "" if side else PARTNER)
            latent = taps.get(f"{side}target/{term.name}")
            errors = errors_of(term, prediction, statistics, view, told, latent, pixels, kernels)
            if term.recipe.focus:
                errors = errors * focus_weights(view, prediction.ids, pixels, source).to(errors.dtype)
            each.append(weighted_mean(errors, masks.weight) if term.recipe.weighted else errors.mean())
        parts[term.name] = each[0] if len(each) == 1 else torch.stack(each).mean()
    loss = torch.stack([term.weight * parts[term.name] for term in terms]).sum()
    return loss, {name: part.detach() for name, part in parts.items()}


def errors_of(
    term: Term,
    prediction: Tokens,
    statistics: nn.ModuleDict,
    view: Batch,
    told: Batch,
    latent: Tokens | None,
    pixels: PixelScale,
    kernels: dispatch.Kernels,
) -> Float[Tensor, "v m"]:
    """The error of each prediction about `view`. told: the view whose target it is; latent: what an encoder in the step says."""
    target = term.recipe.target
    if target == "hog":
        return hog_errors(prediction, term, view, pixels, kernels)
    if target in ("self", "ema"):
        assert latent is not None
        return latent_errors(prediction, term, latent, kernels)
    if target == "none":
        return prediction.x[..., 0]
    if target == "sources":
        return source_errors(prediction.x, n_patches(view, pixels) // prediction.ids.shape[1])
    if target == "map":
        return map_errors(prediction, term, view, pixels, kernels)
    if target == "labels":
        return label_errors(prediction, term, view)
    if term.recipe.relation:
        return relation_errors(prediction, term, statistics[term.name], view)
    if term.teacher is None:
        return pixel_errors(prediction, term, view, pixels, kernels)
    return mimic_errors(prediction, term, statistics[term.name], told, pixels, kernels)


def view_of_side(batch: Batch, side: str) -> Batch:
    """The first views, or where the side is PARTNER their partners."""
    view = batch.partner if side else batch
    assert view is not None, "the taps come first"
    return view


def weighted_mean(errors: Float[Tensor, "v m"], weight: Float[Tensor, "v m"] | None) -> Float[Tensor, ""]:
    """The mean over images of `sum(w * D) / sum(w)`; an image without weight counts as 0.

    Each image by itself, so that ranks and micro-batches need not know of each other: where methods divide by the weights of a
    whole batch, this differs.
    """
    if weight is None:
        raise ValueError(
            "terms: a term is weighted and the masks have no weights; a sampler that gives some was expected"
        )
    weight = weight.to(errors.dtype)
    return ((weight * errors).sum(dim=1) / weight.sum(dim=1).clamp_min(torch.finfo(errors.dtype).tiny)).mean()


def pixel_errors(
    prediction: Tokens, term: Term, batch: Batch, pixels: PixelScale, kernels: dispatch.Kernels
) -> Float[Tensor, "b m"]:
    """Mean squared or absolute error of every predicted patch against its (normalised) pixels."""
    if term.recipe.distance == "l1":
        view, work = batch.pixels.permute(0, 3, 1, 2), reference.wide(prediction.x, pixels.scale)
        how = {"norm_pix": term.recipe.transform != "none", "biased": term.recipe.transform == "norm_pix_biased"}
        target, _ = reference.pixel_target(
            view, prediction.ids, pixels.scale, pixels.shift, patch=pixels.patch, work=work, **how
        )
        return (prediction.x.to(work) - target).abs().mean(dim=-1)
    return dispatch.pixel_loss(
        batch.pixels,
        prediction.x,
        prediction.ids,
        patch=pixels.patch,
        scale=pixels.scale,
        shift=pixels.shift,
        channels_last=True,
        norm_pix=term.recipe.transform != "none",
        biased=term.recipe.transform == "norm_pix_biased",
        kernels=kernels,
    )


def hog_errors(
    prediction: Tokens, term: Term, batch: Batch, pixels: PixelScale, kernels: dispatch.Kernels
) -> Float[Tensor, "b m"]:
    """Distance of every prediction to the histograms of oriented gradients of its patch."""
    with torch.no_grad(), torch.autocast(prediction.x.device.type, enabled=False):
        whole = hog_targets(batch.pixels, pixels.patch, dtype=pixels.scale.dtype)
    return whole_errors(prediction, term, whole, kernels)


def whole_errors(
    prediction: Tokens, term: Term, whole: Float[Tensor, "b l d"], kernels: dispatch.Kernels
) -> Float[Tensor, "v n"]:
    """Distance of every prediction to the row of its patch among those of the whole grid."""
    distance = DISTANCES[term.recipe.distance]
    errors = dispatch.mimic_loss(
        prediction.x,
        whole,
        prediction.ids,
        target=term.recipe.transform,
        distance=distance.kernel,
        beta=distance.beta,
        l=whole.shape[1],
        kernels=kernels,
    )
    return errors * distance.factor


def latent_errors(prediction: Tokens, term: Term, target: Tokens, kernels: dispatch.Kernels) -> Float[Tensor, "v n"]:
    """Distance of every prediction to the token of an encoder in the step, gathered at the same places."""
    distance, x = DISTANCES[term.recipe.distance], prediction.x
    return distance.factor * dispatch.mimic_loss(
        x,
        target.x.detach(),
        None,
        target=term.recipe.transform,
        distance=distance.kernel,
        beta=distance.beta,
        gathered=True,
        kernels=kernels,
    )


def label_errors(prediction: Tokens, term: Term, batch: Batch) -> Float[Tensor, "v n"]:
    """Distance of every prediction's logits to the image's classes."""
    assert batch.labels is not None
    z = prediction.x.to(reference.wide(prediction.x))
    y = batch.labels.to(z.dtype).repeat(len(z) // len(batch.labels), 1)
    return LABEL_DISTANCES[term.recipe.distance](z, y[:, None])


def map_errors(
    prediction: Tokens, term: Term, batch: Batch, pixels: PixelScale, kernels: dispatch.Kernels
) -> Float[Tensor, "v n"]:
    """Distance of every prediction to what a map says of its patch: to its numbers, or the cross-entropy of logits with its id."""
    if term.recipe.classes is None:
        return whole_errors(prediction, term, batch.targets[f"{MAP}{term.recipe.map}"]["map"], kernels)
    values, z = batch.targets[f"{MAP}{term.recipe.map}"]["map"], prediction.x.to(reference.wide(prediction.x))
    rows = torch.arange(len(z), device=z.device)[:, None] % len(values)
    return -z.log_softmax(dim=-1).gather(2, values[rows, prediction.ids].long()[..., None])[..., 0]


def view_loss(term: Term, head: nn.Module, taps: Mapping[str, Tokens]) -> Float[Tensor, ""]:
    """How well each image's two views are told from those of the other images; in training, of those on all ranks."""
    sides = ([f"{side}{tap}" for tap in term.recipe.taps] for side in term.recipe.sides)
    z, y = (head(tokens_at(taps, names, term.recipe.positions).x)[:, 0] for names in sides)
    return view_errors(z, y, over_ranks=head.training).mean()


def box_loss(prediction: Tokens, batch: Batch, recipe: BoxRecipe) -> Float[Tensor, ""]:
    """The mean over images of the weighted mean square error of the hidden cells of their boxes; an image without a box counts as 0."""
    assert batch.boxes is not None
    x = prediction.x.to(reference.wide(prediction.x))
    targets, weight = box_targets(batch.pixels, batch.boxes, recipe, x.dtype)
    return weighted_mean((x - targets).square().mean(dim=-1), weight)


def mimic_errors(
    prediction: Tokens, term: Term, statistics: nn.Module, batch: Batch, pixels: PixelScale, kernels: dispatch.Kernels
) -> Float[Tensor, "b n"]:
    """Distance of every prediction to its teacher token, one token each: CLS and pooled, where it holds them, then patches."""
    assert isinstance(statistics, TeacherStatistics) and term.teacher is not None
    arrays, distance = batch.targets[statistics.source or term.teacher], DISTANCES[term.recipe.distance]
    told = {"distance": distance.kernel, "beta": distance.beta, "kernels": kernels}
    prefix, patches, transform = prediction.at("cls").x, prediction.at("alive"), term.recipe.transform
    parts = []
    if term.recipe.at("cls"):
        assert statistics.cls is not None
        first, stored = unplaced(prefix[:, :1]), {"tokens": arrays["cls"][:, None]}
        parts.append(token_errors(first, stored, transform, statistics.cls, told, gathered=False, l=1))
    if term.recipe.at("pooled"):
        parts.append(pooled_errors(unplaced(prefix[:, -1:]), arrays, transform, statistics, told))
    if patches.ids.shape[1]:
        gathered, l = batch.rows == "visible", n_patches(batch, pixels)
        parts.append(token_errors(patches, arrays, transform, statistics, told, gathered=gathered, l=l))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)) * distance.factor


def relation_errors(prediction: Tokens, term: Term, statistics: nn.Module, batch: Batch) -> Float[Tensor, "b n"]:
    """How far each token's relations to the others of this term are from the teacher's among the same tokens."""
    assert isinstance(statistics, TeacherStatistics) and term.teacher is not None
    arrays, patches = batch.targets[statistics.source or term.teacher], prediction.at("alive")
    codes, ids = statistics.codes(arrays["tokens"]), None if batch.rows == "visible" else patches.ids
    mean, std, scale = statistics.channel_mean, statistics.channel_std, arrays.get("scale")
    parts = [statistics.values(codes, ids, scale, mean, std, patches.ids, like=patches.x)]
    if term.recipe.at("cls"):
        assert statistics.cls is not None
        first = unplaced(prediction.x[:, :1])
        cls = statistics.cls.values(arrays["cls"][:, None], first.ids, None, None, None, first.ids, like=first.x)
        parts.insert(0, cls)
    teacher = torch.cat(parts, dim=1)
    return relation_divergence(prediction.x, teacher, term.recipe.relation, heads=statistics.heads)


def unplaced(x: Float[Tensor, "v 1 d"]) -> Tokens:
    """Tokens without a place in the grid, as those of a grid of one position."""
    return Tokens(x, torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))


def pooled_errors(
    prediction: Tokens,
    arrays: Mapping[str, Tensor],
    transform: Transform,
    statistics: TeacherStatistics,
    told: Mapping[str, Any],
) -> Float[Tensor, "v 1"]:
    """The distance to the mean of the teacher's tokens over its whole grid."""
    pooled, mean = statistics.pooled(arrays, work=reference.wide(prediction.x))
    return dispatch.mimic_loss(
        prediction.x,
        pooled.repeat(len(prediction.x) // len(pooled), 1, 1),
        prediction.ids,
        target="none" if statistics.phi is not None else transform,
        stat_mean=mean,
        stat_std=statistics.stat_std,
        gathered=True,
        **told,
    )


def token_errors(
    prediction: Tokens,
    arrays: Mapping[str, Tensor],
    transform: Transform,
    statistics: TeacherStatistics,
    told: Mapping[str, Any],
    *,
    gathered: bool,
    l: int,
) -> Float[Tensor, "v n"]:
    """The distance to the teacher's tokens, read from the stored codes at the prediction's own ids.

    gathered: the codes are the rows at these ids already; a loader does that for recipes that read visible patches only.
    l: patches in the grid.
    """
    codes, scale, ids = statistics.codes(arrays["tokens"]), arrays.get("scale"), prediction.ids
    mean, std = statistics.channel_mean, statistics.channel_std
    if statistics.decodes:
        at, kernels = None if gathered else ids, told["kernels"]
        codes = statistics.values(codes, at, scale, mean, std, ids, like=prediction.x, kernels=kernels)
        scale, mean, std, gathered = None, None, None, True
    return dispatch.mimic_loss(
        prediction.x,
        codes,
        ids,
        scale=scale,
        channel_mean=mean,
        channel_std=std,
        target="none" if statistics.phi is not None else transform,
        stat_mean=statistics.stat_mean,
        stat_std=statistics.stat_std,
        gathered=gathered,
        l=None if gathered else l,
        **told,
    )


@torch.no_grad()
def patch_targets(term: Term, statistics: nn.Module, batch: Batch) -> Float[Tensor, "b l d"]:
    """What the term's loss compares predictions with, at every patch of a batch of whole grids; unit vectors where it asks for directions."""
    assert isinstance(statistics, TeacherStatistics) and term.teacher is not None
    arrays = batch.targets[statistics.source or term.teacher]
    return as_compared(term, statistics.targets(arrays, term.recipe.transform))


def as_compared(term: Term, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Predictions or targets with what the term's distance does not see taken out: their lengths, where it compares directions."""
    return reference.unit(tokens) if DISTANCES[term.recipe.distance].kernel == "cosd" else tokens


def n_patches(batch: Batch, pixels: PixelScale) -> int:
    """Patches of the student's grid."""
    return (batch.pixels.shape[1] // pixels.patch) * (batch.pixels.shape[2] // pixels.patch)


def focus_weights(batch: Batch, ids: Int64[Tensor, "v n"], pixels: PixelScale, source: str) -> Float[Tensor, "v n"]:
    """Saliency of the patches at `ids` divided by its mean over them: mean 1 per image, so the loss keeps its scale.

    `focus = weight`, ours, beside focused mimicking by the sampler (MR-MAE, arXiv 2303.05475).
    """
    share = saliency(batch.targets, source, n_patches(batch, pixels))
    rows = torch.arange(ids.shape[0], device=share.device) % share.shape[0]
    chosen = share[rows[:, None], ids]
    return chosen / chosen.mean(dim=1, keepdim=True).clamp_min(1e-12)
