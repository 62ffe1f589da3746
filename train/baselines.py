"""What a prediction that never sees an image costs, per term: the yardstick of its losses.

Per term the mean cost of `zero`, of one `constant` token, and of one per `position` of the grid (CLS is a position of its own),
over every image and view, each position alike; for pixels of every patch's own mean, `patch_mean`. The constants are the best
there are for `mse` and the cosine distances, and the targets' means for smooth-L1, whose best ones have no closed form.

They are computed in one pass over the cache (two for smooth-L1) and kept in `stats/baselines.json` beside its moments, by an id of
what they are of; in OUT/baselines.json where the cache cannot be written.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from rich.console import Console
from torch import Tensor

from mrmae.common.backend import Url
from mrmae.common.files import publish
from mrmae.common.progress import Progress
from mrmae.kernels import reference
from mrmae.shards.format import FORMAT_VERSION, content_id, read_json
from mrmae.train import batches
from mrmae.train.batches import Loaded
from mrmae.train.feed import Feed
from mrmae.train.method import (
    DISTANCES,
    LABEL_DISTANCES,
    MAP,
    Batch,
    Distance,
    PixelScale,
    TeacherStatistics,
    Term,
    TermRecipe,
    draw_of,
    hog_targets,
)
from mrmae.train.online import online_ids, teach
from mrmae.train.ranks import agree_on, gather
from mrmae.train.run import Run

Costs = dict[str, float]
KINDS_OF_COST = ("zero", "constant", "position")
BEST = ("position", "patch_mean", "constant")  # the first that a term has
IMAGES_AT_ONCE = 64
MOST_BYTES = 16 << 20  # of a file of baselines, of a few hundred bytes per term
REMOTE_IMAGES = 2_000  # of a cache at a URL: the first in canonical order, a random sample
LIVE_VIEWS = 256  # shown to teachers that run in the step, likewise of the first images


@dataclass(frozen=True)
class Yardstick:
    """Targets that share their baselines: patch tokens, their mean, CLS or pixels of one source, or a map, under one transform and distance.

    source: whose stored arrays are read; None for what is made of pixels. array: which, or `pixels`, `hog`, `pooled`. statistics: of the patch tokens or of CLS.
    classes: of a map of ids how many there are, else 0.
    """

    source: str | None
    array: str
    transform: str
    distance: Distance
    statistics: TeacherStatistics | None
    of: dict[str, Any]
    classes: int = 0

    @property
    def id(self) -> str:
        """Of all that the costs depend on."""
        return content_id(self.of)


@dataclass
class TargetSums:
    """Float64 sums over n images: `first` of the targets (unit ones for a cosine) at every position, `second` of their squares (absolutes for
    `l1`). Of ids `first` counts each, [1, classes].

    costs: where a distance is no function of these, the sums of what each kind of prediction costs.
    """

    n: int
    first: Float64[Tensor, "l d"]
    second: Float64[Tensor, ""]
    costs: Float64[Tensor, "3"]

    def plus(self, other: "TargetSums") -> "TargetSums":
        """The sums over both sets of images."""
        return TargetSums(
            self.n + other.n, self.first + other.first, self.second + other.second, self.costs + other.costs
        )


def baselines_of(
    run: Run, *, limit: int | None = None, keep: bool = True, console: Console | None = None
) -> dict[str, Costs]:
    """Term -> `zero`, `constant` and `position`, `patch_mean`, or `zero` and `constant`; and `images`, how many they are over.

    They are read where they are kept, else measured by all ranks together. limit: images to measure on instead of all. keep:
    store what was measured. Teachers that run in the step are asked about LIVE_VIEWS views. Which terms have none, says `no_baseline`.
    """
    wanted = {term.name: yardsticks(run, term) for term in run.model.terms}
    every = {yardstick.id: yardstick for parts in wanted.values() for yardstick, _ in parts}
    known: dict[str, Costs] = agree_on({id: costs for id, costs in kept_costs(run).items() if id in every}, run.ranks)
    if missing := {id: yardstick for id, yardstick in every.items() if id not in known}:
        limit = limit or (REMOTE_IMAGES if isinstance(run.cache.path, Url) else None)
        live = {id: yardstick for id, yardstick in missing.items() if yardstick.source in run.online}
        stored = {id: yardstick for id, yardstick in missing.items() if id not in live}
        measured = blind_costs(run, stored, limit, console) if stored else {}
        measured |= blind_costs(run, live, math.ceil(LIVE_VIEWS / run.cache.n_views), console) if live else {}
        if keep and run.ranks.rank == 0:
            keep_costs(run, {id: {**costs, "of": missing[id].of} for id, costs in measured.items()})
        known |= measured
    told = {
        name: weighed([(known[y.id], n * y.distance.factor) for y, n in parts])
        for name, parts in wanted.items()
        if parts
    }
    return told | {term.name: costs for term in run.model.terms if (costs := costs_from_counts(run, term))}


def no_baseline(recipe: TermRecipe) -> str:
    """Why a term has no baselines; empty where it has."""
    if recipe.relation:
        return "relations are among an image's own tokens"
    return {
        "self": "its target changes with the student",
        "ema": "its target changes with the student",
        "boxes": "what boxes frame is not measured",
        "none": "a regulariser has no target",
    }.get(recipe.target, "")


def costs_from_counts(run: Run, term: Term) -> Costs:
    """The baselines of a term that follow from counts: of labels, and of telling tokens or views apart; else none."""
    recipe, images = term.recipe, float(len(run.cache.numbers))
    if recipe.target == "labels" and run.labels is not None:
        shares = np.bincount(run.labels.members, minlength=len(run.labels.classes)) / images
        return label_costs(torch.from_numpy(shares), recipe.distance) | {"images": images}
    alike = {"views": run.share.micro_size * run.ranks.size, "sources": run.info.n_patches - 1}.get(recipe.target)
    return {} if alike is None else {"constant": math.log(alike), "images": images}


def label_costs(shares: Float64[Tensor, " k"], distance: str) -> Costs:
    """What logits that are the same for every image cost: all zero, or the best there are. shares: of the images, with each class.

    The best of `bce` and `asl` are looked for in steps of 0.01, class by class.
    """
    if distance == "ce":
        return {"zero": math.log(len(shares)), "constant": float(torch.special.entr(shares).sum())}
    z = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    has, lacks = (LABEL_DISTANCES[distance](z[:, None, None], torch.full((1, 1, 1), float(y)))[:, 0] for y in (1, 0))
    costs = shares[:, None] * has + (1 - shares[:, None]) * lacks
    return {"zero": float(costs[:, len(z) // 2].mean()), "constant": float(costs.amin(1).mean())}


def yardsticks(run: Run, term: Term) -> list[tuple[Yardstick, float]]:
    """What a term predicts, and its share of the term's tokens: CLS and the mean over the grid are one token each."""
    if no_baseline(term.recipe) or term.recipe.target in ("labels", "sources", "views"):
        return []
    cache, recipe = run.cache, term.recipe
    distance = Distance("ce") if recipe.classes else DISTANCES[recipe.distance]
    of: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "dataset": cache.ids["dataset"], "n_views": cache.n_views, "n_valid": len(cache.numbers),
        "unfinished": cache.unfinished, "transform": recipe.transform, "distance": distance.kernel, "beta": distance.beta,
    }  # fmt: skip
    if recipe.map is not None:
        of |= {"column": cache.maps[f"{recipe.map}.map"].id, "classes": recipe.classes}
        return [
            (Yardstick(f"{MAP}{recipe.map}", "map", recipe.transform, distance, None, of, recipe.classes or 0), 1.0)
        ]
    if term.teacher is None:
        of |= {
            "target": recipe.target,
            "geometry": cache.ids["geometry"],
            "patch": run.model.pixels.patch,
            "prepare": asdict(run.recipe.prepare),
        }
        return [(Yardstick(None, recipe.target, recipe.transform, distance, None, of), 1.0)]
    return token_yardsticks(run, term, distance, of)


def token_yardsticks(run: Run, term: Term, distance: Distance, of: dict[str, Any]) -> list[tuple[Yardstick, float]]:
    """Those of a teacher's tokens. of: what all yardsticks of the term are of."""
    assert term.teacher is not None
    recipe, cache = term.recipe, run.cache
    target, statistics = run.info.target(term.teacher), run.model.statistics[term.name]
    assert isinstance(statistics, TeacherStatistics)
    source = target.source or term.teacher
    if run.online:
        of |= {"column": online_ids(cache, run.online)[f"online teacher {source}"], "target": term.teacher}
        of |= {"statistics": target.stats.id} if target.stats else {}
    else:
        of["column"] = cache.column(target.column).id
    shown = recipe.at("visible", "all") or (recipe.at("alive") and recipe.taps != ("decoder",))
    hidden = recipe.at("predicted", "all") or (recipe.at("alive") and "decoder" in recipe.taps)
    shares = {
        "tokens": shown * run.model.n_keep + hidden * run.model.n_predict,
        "cls": int(recipe.at("cls")),
        "pooled": int(recipe.at("pooled")),
    }
    return [
        (
            Yardstick(
                source,
                array,
                recipe.transform,
                distance,
                statistics.cls if array == "cls" else statistics,
                of | {"array": array},
            ),
            share / sum(shares.values()),
        )
        for array, share in shares.items()
        if share
    ]


def weighed(parts: Iterable[tuple[Costs, float]]) -> Costs:
    """The costs of a term whose targets are of several kinds, each with its weight."""
    parts = list(parts)
    first = parts[0][0]
    total = {kind: sum(weight * costs[kind] for costs, weight in parts) for kind in first if kind != "images"}
    return total | {"images": first["images"]}


def kept_costs(run: Run) -> dict[str, Costs]:
    """What is kept beside the cache's moments or in OUT, by id; what is damaged there is as if it were not."""
    found: dict[str, Costs] = {}
    for path in places_kept(run):
        for id, costs in stored_costs(path).items():
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                found[id] = {kind: float(cost) for kind, cost in costs.items() if kind != "of"}
    whole = ({"images", *KINDS_OF_COST}, {"images", "patch_mean"}, {"images", "zero", "constant"})
    return {id: costs for id, costs in found.items() if set(costs) in whole and all(map(math.isfinite, costs.values()))}


def stored_costs(path: Path) -> dict[str, dict[str, Any]]:
    """What a file of baselines holds by id, each with what it is `of`; nothing where there is none or it is damaged."""
    try:
        stored: dict[str, dict[str, Any]] = read_json(path, dict[str, dict[str, Any]], MOST_BYTES)
    except (OSError, ValueError):
        return {}
    return stored


def places_kept(run: Run) -> list[Path]:
    """Where baselines may be kept, the preferred place last."""
    return [run.out / "baselines.json", run.cache.path / "stats" / "baselines.json"]


def keep_costs(run: Run, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep baselines beside the moments of a finished cache on this machine's disks, else in OUT."""
    beside = not isinstance(run.cache.path, Url) and run.cache.unfinished is None
    for path in reversed(places_kept(run)[: 1 + beside]):
        every = {**stored_costs(path), **measured}
        try:
            publish(path, (json.dumps(every, indent=1) + "\n").encode(), replace=True)
        except OSError:  # a cache that can only be read
            continue
        return


def blind_costs(
    run: Run, wanted: Mapping[str, Yardstick], limit: int | None, console: Console | None
) -> dict[str, Costs]:
    """The costs of every yardstick, in one pass over the first `limit` images (None: all), and one more for smooth-L1."""
    means: dict[str, Tensor] = {}
    sums = total_sums(run, wanted, means, limit, console)
    curved = {id: yardstick for id, yardstick in wanted.items() if yardstick.distance.kernel == "sl1"}
    if curved:
        means = {id: (sums[id].first / sums[id].n).float() for id in curved}
        sums |= total_sums(run, curved, means, limit, console)
    return {
        id: {**costs_of(sums[id], yardstick), "images": sums[id].n / run.cache.n_views}
        for id, yardstick in wanted.items()
    }


def total_sums(
    run: Run, wanted: Mapping[str, Yardstick], means: Mapping[str, Tensor], limit: int | None, console: Console | None
) -> dict[str, TargetSums]:
    """The sums of all ranks. means: of the targets of these, where they are known, for costs that are no moments."""
    mine: dict[str, TargetSums] = {}
    numbers = run.cache.numbers[:limit]
    with Progress("baselines", len(numbers) * run.cache.n_views, "views", console=console) as progress:
        for batch in batches_in_turn(run, wanted.values(), numbers):
            for id, yardstick in wanted.items():
                new = sums_of(whole_targets(batch, yardstick, run.model.pixels), yardstick, means.get(id))
                mine[id] = mine[id].plus(new) if id in mine else new
            progress.add(len(batch.samples) * run.ranks.size)
    everyone = gather(mine, run.ranks)
    total: dict[str, TargetSums] = {}
    for share in everyone:
        for id, sums in share.items():
            total[id] = total[id].plus(sums) if id in total else sums
    return total


def batches_in_turn(run: Run, wanted: Iterable[Yardstick], numbers: Any) -> Iterator[Batch]:
    """This rank's share of these samples in all their views, on the device, read ahead."""
    needed: dict[str, set[str]] = {}
    for yardstick in wanted:
        if yardstick.source is not None:
            arrays = {"tokens"} if run.online else {"tokens", "scale"}
            arrays = {yardstick.array} if yardstick.array in ("cls", "map") else arrays
            needed.setdefault(yardstick.source, set()).update(arrays)
    stored = {name: arrays for name, arrays in needed.items() if not run.online or name.startswith(MAP)}
    live = {name: arrays for name, arrays in needed.items() if name not in stored}
    chunks = [numbers[at : at + IMAGES_AT_ONCE] for at in range(0, len(numbers), IMAGES_AT_ONCE)]
    chunks = chunks[run.ranks.rank :: run.ranks.size]

    def load(view: int, at: int, _: int) -> Loaded:  # epochs 0 to K - 1 show an image's K views
        batch = batches.load_batch(run.cache, chunks[at], epoch=view, needed=stored)
        batches.refuse_unfit_map(run.cache, chunks[at], batch, run.recipe)
        return batch, draw_of(run.recipe, run.info, view)

    todo = ((view, at, 0) for view in range(run.cache.n_views) for at in range(len(chunks)))
    with Feed(load, todo, run.device) as feed:
        for batch, _ in feed:
            yield teach(batch, {name: run.online[name] for name in live}, live) if live else batch


@torch.no_grad()
def whole_targets(batch: Batch, yardstick: Yardstick, pixels: PixelScale) -> Float[Tensor, "b l d"]:
    """What a term is compared with, at every position, in fp32: for pixels what is left of each patch without its mean."""
    if yardstick.array == "hog":
        return hog_targets(batch.pixels, pixels.patch, dtype=torch.float32)
    if yardstick.array == "pixels":
        image = batch.pixels.permute(0, 3, 1, 2)
        l = (image.shape[2] // pixels.patch) * (image.shape[3] // pixels.patch)
        ids = torch.arange(l, device=image.device).expand(len(image), -1)
        norm_pix, biased = yardstick.transform != "none", yardstick.transform == "norm_pix_biased"
        how = {"patch": pixels.patch, "norm_pix": norm_pix, "biased": biased, "work": torch.float32}
        target, _ = reference.pixel_target(image, ids, pixels.scale, pixels.shift, **how)  # type: ignore[arg-type]
        return target - target.mean(-1, keepdim=True)
    assert yardstick.source is not None
    arrays = batch.targets[yardstick.source]
    if yardstick.array == "map":
        values, nothing = arrays["map"], (None,) * 6
        if yardstick.classes:
            return values[..., None]
        return reference.mimic_target(
            values, *nothing, target=yardstick.transform, n_rows=len(values), work=torch.float32
        )
    assert yardstick.statistics is not None
    stored = {"tokens": arrays["cls"][:, None]} if yardstick.array == "cls" else arrays
    return yardstick.statistics.targets(stored, yardstick.transform, pooled=yardstick.array == "pooled")


def sums_of(targets: Float[Tensor, "b l d"], yardstick: Yardstick, means: Float[Tensor, "l d"] | None) -> TargetSums:
    """The sums of one batch, on the CPU."""
    distance = yardstick.distance
    if yardstick.classes:
        counted = torch.bincount(targets.flatten().long(), minlength=yardstick.classes).double().cpu()[None]
        return TargetSums(len(targets), counted, counted.sum(), torch.zeros(3, dtype=torch.float64))
    x = (reference.unit(targets) if distance.kernel == "cosd" else targets).double()
    costs = torch.zeros(3, dtype=torch.float64)
    if means is not None:
        guesses = (torch.zeros_like(means), means.mean(0, keepdim=True).expand_as(means), means)
        errors = (F.smooth_l1_loss(x, guess.to(x).expand_as(x), beta=distance.beta) for guess in guesses)
        costs = len(x) * torch.stack(list(errors)).cpu()
    second = x.abs() if distance.kernel == "l1" else x.square()
    return TargetSums(len(x), x.sum(0).cpu(), second.sum().cpu(), costs)


def costs_of(sums: TargetSums, yardstick: Yardstick) -> Costs:
    """What each kind of prediction costs on average, before the distance's factor."""
    if yardstick.classes:
        return label_costs(sums.first[0] / sums.second, "ce")
    mean = sums.first / sums.n
    l, d = mean.shape
    energy = float(sums.second) / (sums.n * l * d)
    if yardstick.array == "pixels":
        return {"patch_mean": energy}
    if yardstick.distance.kernel == "sl1":
        return dict(zip(KINDS_OF_COST, (sums.costs / sums.n).tolist()))
    length = {"constant": mean.mean(0).norm(), "position": mean.norm(dim=1)}
    if yardstick.distance.kernel == "cosd":
        return {"zero": 1.0, **{kind: 1 - float(x.mean()) for kind, x in length.items()}}
    return {"zero": energy, **{kind: energy - float(x.square().mean()) / d for kind, x in length.items()}}


def explained_shares(terms: Mapping[str, float], baselines: Mapping[str, Costs]) -> dict[str, dict[str, float]]:
    """What a loss explains beyond the best prediction that never sees an image, of BEST: kind -> term -> share.

    1 at best; below 0 where the loss is higher than that prediction's.
    """
    shares: dict[str, dict[str, float]] = {}
    for name, costs in baselines.items():
        kind = next(kind for kind in BEST if kind in costs)
        if name in terms and costs[kind] > 0:
            shares.setdefault(kind, {})[name] = 1 - terms[name] / costs[kind]
    return shares
