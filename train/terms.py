"""A term binds tap, positions, head, target and distance into one weighted loss.

Predictions and targets are gathered with the same ids by construction: no recipe indexes targets by hand. Losses are fp32
whatever autocast does, and neither a normalised image nor a dequantised grid is ever made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mrmae.kernels import dispatch
from mrmae.train.distances import DISTANCES
from mrmae.train.masks import Masks, saliency, saliency_arrays
from mrmae.train.recipe import Recipe, TermRecipe
from mrmae.train.targets import Batch, CacheInfo, TeacherStatistics, codes_of, teachers_of


@dataclass(frozen=True)
class Term:
    """One weighted loss, bound to one target: the pixels (teacher None) or one cached column of a teacher, by target name.

    name: as in the recipe, `mimic`, with `/teacher` where it predicts one: the key of its head and of its logged value.
    weight: the recipe's, divided by the number of teachers that share it.
    """

    name: str
    recipe: TermRecipe
    teacher: str | None
    weight: float

    def __str__(self) -> str:
        r, target = self.recipe, self.teacher or "pixels"
        focus = " * saliency" if r.focus else ""
        return f"{r.tap} @ {r.positions} > {r.head} ~ {target} | {r.transform} : {r.distance} * {self.weight:g}{focus}"


class Pixels(NamedTuple):
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
        if term.target == "pixels":
            terms.append(Term(name, term, None, term.weight))
            continue
        teachers = teachers_of(name, term, info)
        terms += [Term(f"{name}/{teacher}", term, teacher, term.weight / len(teachers)) for teacher in teachers]
    return tuple(terms)


def needed_arrays(recipe: Recipe, info: CacheInfo) -> dict[str, set[str]]:
    """Teacher -> the cached arrays that training reads: tokens (with scale where stored), cls, attention, norm.

    Raises ValueError when the cache lacks one, saying what it has and how to add it.
    """
    needed: dict[str, set[str]] = {}
    for term in bind_terms(recipe, info):
        if term.teacher is not None:
            target = info.target(term.teacher)
            arrays = needed.setdefault(target.source or term.teacher, set())
            if "cls" in term.recipe.positions:
                arrays.add("cls")
            if term.recipe.positions != "cls":
                arrays |= {"tokens", "scale"} if target.has_scale else {"tokens"}
    if recipe.mask.sampler == "attn_prob" or any(term.focus for term in recipe.terms.values()):
        for teacher, array in saliency_arrays(recipe.mask.source, info).items():
            needed.setdefault(teacher, set()).add(array)
    return needed


def score(
    terms: Sequence[Term],
    heads: nn.ModuleDict,
    statistics: nn.ModuleDict,
    taps: Mapping[str, Tensor],
    batch: Batch,
    masks: Masks,
    *,
    pixels: Pixels,
    source: str,
    kernels: str,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The weighted sum of all terms, and each term's own value, unweighted and detached.

    taps: the encoder's are [CLS | visible] (visible alone where the student has no CLS), the decoder's holds the predicted
    patches. source: the saliency map behind `focus`.
    """
    parts = {}
    for term in terms:
        prediction = heads[term.name](at_positions(taps[term.recipe.tap], term.recipe, masks))
        if term.teacher is None:
            errors = pixel_errors(prediction, term, batch, masks, pixels, kernels)
        else:
            errors = mimic_errors(prediction, term, statistics[term.name], batch, masks, pixels, kernels)
        if term.recipe.focus:
            errors = errors * focus_weights(batch, masks, pixels, source).to(errors.dtype)
        parts[term.name] = errors.mean()
    loss = torch.stack([term.weight * parts[term.name] for term in terms]).sum()
    return loss, {name: part.detach() for name, part in parts.items()}


def at_positions(tap: Float[Tensor, "b n d"], term: TermRecipe, masks: Masks) -> Float[Tensor, "b m d"]:
    """The tokens a term predicts from."""
    if term.positions in ("predicted", "cls+visible"):
        return tap
    return tap[:, :1] if term.positions == "cls" else tap[:, tap.shape[1] - masks.ids_keep.shape[1] :]


def pixel_errors(
    prediction: Float[Tensor, "b m P"], term: Term, batch: Batch, masks: Masks, pixels: Pixels, kernels: str
) -> Float[Tensor, "b m"]:
    """Mean squared error of every predicted patch against its (normalised) pixels."""
    return dispatch.pixel_loss(
        batch.pixels,
        prediction,
        masks.ids_predict,
        patch=pixels.patch,
        scale=pixels.scale,
        shift=pixels.shift,
        channels_last=True,
        norm_pix=term.recipe.transform == "norm_pix",
        kernels=kernels,
    )


def mimic_errors(
    prediction: Float[Tensor, "b n d"],
    term: Term,
    statistics: nn.Module,
    batch: Batch,
    masks: Masks,
    pixels: Pixels,
    kernels: str,
) -> Float[Tensor, "b n"]:
    """Distance of every prediction to its teacher token, read from the stored codes at the prediction's own ids.

    At `cls+visible` CLS is one token among n_keep + 1.
    """
    assert isinstance(statistics, TeacherStatistics) and term.teacher is not None
    arrays, transform = batch.targets[statistics.source or term.teacher], term.recipe.transform
    if term.recipe.positions == "cls+visible":
        parts = (replace(term, recipe=replace(term.recipe, positions=at)) for at in ("cls", "visible"))
        pieces = (prediction[:, :1], prediction[:, 1:])
        return torch.cat(
            [mimic_errors(x, part, statistics, batch, masks, pixels, kernels) for x, part in zip(pieces, parts)], dim=1
        )
    ids: Tensor | None
    if term.recipe.positions == "cls":  # stored as plain float16: the quantiser describes patch tokens only
        codes, scale, mean, std, ids, gathered = arrays["cls"][:, None], None, None, None, None, True
    else:
        codes, scale = codes_of(arrays["tokens"]), arrays.get("scale")
        mean, std = statistics.channel_mean, statistics.channel_std
        visible = term.recipe.positions == "visible"
        ids, gathered = (masks.ids_keep if visible else masks.ids_predict), visible and batch.rows == "visible"
    if transform == "phi_s" or statistics.tail_names:
        codes = statistics.values(codes, None if gathered else ids, scale, mean, std, like=prediction)
        scale, mean, std, gathered, transform = None, None, None, True, "none" if transform == "phi_s" else transform
    distance = DISTANCES[term.recipe.distance]
    errors = dispatch.mimic_loss(
        prediction,
        codes,
        ids,
        scale=scale,
        channel_mean=mean,
        channel_std=std,
        target=transform,
        stat_mean=statistics.stat_mean,
        stat_std=statistics.stat_std,
        distance=distance.kernel,
        beta=distance.beta,
        gathered=gathered,
        l=None if gathered else n_patches(batch, pixels),
        kernels=kernels,
    )
    return errors * distance.factor


def n_patches(batch: Batch, pixels: Pixels) -> int:
    """Patches of the student's grid."""
    return (batch.pixels.shape[1] // pixels.patch) * (batch.pixels.shape[2] // pixels.patch)


def focus_weights(batch: Batch, masks: Masks, pixels: Pixels, source: str) -> Float[Tensor, "b n_keep"]:
    """Saliency of the visible patches divided by its mean over them: mean 1 per image, so the loss keeps its scale.

    `focus = weight`, ours, beside focused mimicking by the sampler (MR-MAE, arXiv 2303.05475).
    """
    share = saliency(batch.targets, source, n_patches(batch, pixels))
    rows = torch.arange(masks.ids_keep.shape[0], device=share.device) % share.shape[0]
    visible = share[rows[:, None], masks.ids_keep]
    return visible / visible.mean(dim=1, keepdim=True).clamp_min(1e-12)
