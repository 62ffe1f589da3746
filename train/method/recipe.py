"""A whole run as data: yaml -> frozen dataclasses, strictly, and back.

A recipe says everything that changes the result: how pixels are prepared, who is visible, the student, the terms and the
optimiser. Where and how it runs (paths, device, workers) are options of the command. Unknown keys and wrong values are refused.
"""

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from mrmae.common import strict_yaml
from mrmae.common.suggest import did_you_mean

RECIPES = Path(__file__).with_name("recipes")

SamplerName = Literal[
    "random",
    "attn_prob",
    "stored_block",
    "beit",
    "disjoint",
    "quarters",
    "score",
    "similarity",
    "crfr_p",
    "pair_disjoint",
    "mix",
]
PositionKind = Literal["sincos", "sincos_cae", "sinusoid"]
HiddenKind = Literal["drop", "replace", "none"]
DecoderKind = Literal["self", "cross", "prompt", "regressor", "taps", "pair"]
HeadKind = Literal["none", "linear", "ln_linear", "linear_ln", "mlp", "mlp3_ln", "predictor"]
Transform = Literal[
    "none", "ln0", "l2", "channel", "phi_s", "position", "position+ln0", "position+phi_s", "norm_pix", "norm_pix_biased"
]
DistanceName = Literal[
    "mse",
    "l1",
    "sl1(1)",
    "sl1(2)",
    "2*sl1(1)",
    "cosd",
    "2-2cos",
    "kl(qk)",
    "kl(vv)",
    "bce",
    "asl",
    "ce",
    "supcon",
    "infonce",
]
OF_LABELS = ("bce", "asl", "ce")  # distances of a head's logits to classes
OPEN = ("prepare.images", "prepare.views", "prepare.columns")  # where null: decided when a run begins
FIT = ("optim.batch_size", "optim.warmup_epochs", "student.decoder", "prepare.mean", "prepare.std")
ENCODER_TAP = re.compile(r"final|mean_ln|learned|(block|mix|placed|qkv)[1-9][0-9]*")
PARTNER = "partner/"  # begins the names of taps of a partner
POSITIONS = ("cls", "pooled", "visible", "predicted", "all", "alive")


@dataclass(frozen=True)
class Prepare:
    """What is read of the cache, and how the student sees pixels: `(value / unit - mean) / std` per channel (ImageNet's).

    unit: 255 of 8-bit views, 65535 of 16-bit ones, 1 of floats. Where a recipe lets go of mean and std (`fit`), those of views that are
    not RGB are measured when a run begins.

    images, views: how many of the cache's images, and of each image's stored views: the first ones. columns: the cache's columns
    that there are for this run. None: all that the cache holds when the run begins; the run keeps to them, whatever it gets later.
    pair: whether each image comes with a partner: another of its stored views, or the other image of its pair (`--pairs`).
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    images: int | None = None
    views: int | None = None
    columns: tuple[str, ...] | None = None
    pair: bool = False


@dataclass(frozen=True)
class MaskRecipe:
    """Who is visible and what is predicted: `n_keep` of l patches, by default `int(l * (1 - ratio))` as in MAE.

    n_keep, n_predict: fixed numbers of patches; without them the ratio decides, and every hidden patch is predicted. n_predict may also be a
    share of the hidden ones, between 0 and 1, which is rounded.
    predict: the law that chooses n_predict of the hidden patches where they are fewer: `uniform`, or by the `score` of a map.
    masks_per_image: masks of each image, as rows of the batch.
    law: `fixed`, or a law of the ratio that is drawn anew for every update (`masks.py`); least: its smallest ratio, for `cosine`.
    Of a partner (`prepare.pair`) everything is visible; with sampler `pair_disjoint` the next n_keep patches of the same permutation.
    group: how many images sampler mix joins to one sequence, each with its own part of the grid.
    source, draw, mode: for samplers and laws that follow a saliency map. cell: patches along a side of the cells that samplers disjoint and random hide.
    parts: what the map of sampler crfr_p holds: `bits`, 1 << part for every part that a patch touches, or `ids`, one part per patch.
    """

    sampler: SamplerName = "random"
    ratio: float = 0.75
    n_keep: int | None = None
    n_predict: int | float | None = None
    source: str = "mean"
    draw: Literal["prob", "softmax_prob", "topk"] = "prob"
    predict: Literal["uniform", "score"] = "uniform"
    masks_per_image: int = 1
    law: Literal["fixed", "truncnormal", "cosine"] = "fixed"
    least: float = 0.0
    cell: int = 1
    mode: Literal["mask_top", "keep_top", "multinomial"] = "mask_top"
    parts: Literal["bits", "ids"] = "bits"
    group: int = 4

    @property
    def joined(self) -> int:
        """Images per sequence of the encoder."""
        return self.group if self.sampler == "mix" else 1


@dataclass(frozen=True)
class DecoderRecipe:
    """What turns visible tokens into predictions at hidden patches.

    kind: `self` (MAE's, over [CLS | visible | mask tokens]), `cross` (mask tokens look at the encoder's output; SelectiveMAE),
    `prompt` (MILAN's), `regressor` (CAE's), `taps` (Hi-End-MAE's), or `pair` (CroCo's, which reads the partner). `prompt` and `regressor` also hold CLS and visible patches.
    weighted: kind cross reads weighted sums of all block outputs (CrossMAE). blocks: whose outputs kind taps reads, in this order.
    init_values: layer scale of kind regressor. norm: whether a LayerNorm ends it.
    behind: blocks of self-attention over the predicted tokens behind kind regressor, whose output is the tap `decoded` (CAE's own decoder).
    """

    depth: int = 8
    width: int = 512
    heads: int = 16
    mlp_ratio: float = 4.0
    kind: DecoderKind = "self"
    weighted: bool = False
    blocks: tuple[int, ...] = (10, 7, 4)
    init_values: float = 0.1
    norm: bool = True
    behind: int = 0


@dataclass(frozen=True)
class PruneRecipe:
    """Before each of the blocks `before`, counted from 1, only `int(keep * n)` of the n patches stay: those least like their mean (student.py)."""

    before: tuple[int, ...]
    keep: float

    def alive(self, n: int) -> list[int]:
        """How many of n patches are left behind each pruning."""
        counts = []
        for _ in self.before:
            n = int(self.keep * n)
            counts.append(n)
        return counts


@dataclass(frozen=True)
class BoxRecipe:
    """What reads boxes (`train-mrmae --boxes`) in the student's grid: MoM's head, `boxes.py`; the student must see every patch.

    most: boxes per image; of more, as many are drawn in each epoch. cells: tokens along a side of a box, of which `hide` are hidden. crop: (height, width) of
    a box's target, in pixels. depth, behind: blocks on the shown cells, and on all. dark, least: boxes that count for nothing: the mean of the
    brightest channel (0 to 1), and a side in pixels of the view.
    """

    most: int = 8
    cells: int = 8
    hide: int = 32
    crop: tuple[int, int] = (120, 120)
    depth: int = 6
    behind: int = 2
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    dark: float = 0.0
    least: float = 0.0


@dataclass(frozen=True)
class StudentRecipe:
    """A plain timm VisionTransformer by name, or `mcmae_base`; the cache's size and grid set its image and patch size.

    fused_blocks: the block outputs behind the tap `mean_ln`, counted from 1. drop_path: stochastic depth, with drop_path_law
    `rising` linearly from 0 at the first block to it at the last, or `constant`.
    init_values: where the layer scale of a ViT's residual branches starts; null: none. qkv_bias: `qv` holds the keys' at zero.
    cls: whether there is a CLS token. positions: the fixed table of the encoder's and the decoder's positions (student.py).
    hidden: what the encoder sees of hidden patches: nothing (`drop`), or one learned mask token and their positions (`replace`: a tap of
    the encoder then holds predicted patches, too; a decoder still reads the visible ones). `none`: nothing is hidden, with mask.ratio 0.
    prune: redundant patches leave the encoder on the way, in training; its taps hold what is `alive` there. The exported student has all.
    boxes: what reads boxes, behind the tap `boxes`. source_embedding: whether patches are told apart by their image's place in a sequence of sampler mix.
    """

    model: str = "vit_base_patch16_224"
    decoder: DecoderRecipe | None = field(default_factory=DecoderRecipe)
    fused_blocks: tuple[int, ...] = (3, 6, 9, 12)
    drop_path: float = 0.0
    drop_path_law: Literal["rising", "constant"] = "rising"
    init_values: float | None = None
    qkv_bias: Literal["all", "qv"] = "all"
    cls: bool = True
    positions: PositionKind = "sincos"
    hidden: HiddenKind = "drop"
    prune: PruneRecipe | None = None
    boxes: BoxRecipe | None = None
    source_embedding: bool = False


@dataclass(frozen=True)
class TermRecipe:
    """One line of a method: `tap @ positions > head ~ target | transform : distance * weight`.

    tap: `final`, `block<i>`, `placed<i>`, `mean_ln`, `learned`, `mix<i>`, `qkv<i>` (encoder), `decoder`, `decoded`, `boxes` or `mto` (a regulariser, mto.py,
    with target `none`); `final+decoder` where one head serves both.
    positions: one of POSITIONS or several joined by `+`: `cls+visible+predicted`. `pooled` is the mean of the visible patches,
    and its target the mean over the teacher's whole grid; `all` is `visible+predicted`; `alive`, what a tap still holds.
    target: `pixels`, their `hog` (targets.py), `self` (the student's own encoder on the predicted patches, without a gradient), `ema` (a copy of the student
    that follows it, on the whole view), the image's `labels` (of CLS or pooled tokens; distances `bce`, `asl` or `ce`), raw pixels of hidden cells of `boxes`,
    which patches of a mixed sequence are of one image (`sources`, distance `supcon`), which of the batch's images another view is of (`views`, distance
    `infonce`), or `teachers`: one term for each of `teachers` (none named: all of the cache), which share `weight` equally.
    With target `map`, what the cache's map of the name `map` says of each patch: an id of so many `classes` (distance `ce`), or without classes several numbers.
    teacher_tap: only columns taken there in the teacher, like `block_8`.
    distance: `kl(qk)` and `kl(vv)` compare relations among the term's tokens (relations.py): tap `qkv<i>`, teacher_tap `qkv_<i>`, head none.
    focus: weigh visible positions by the saliency map that `mask.source` names.
    weighted: weigh predicted positions by the mask's own weights, `sum(w * D) / sum(w)` in each image.
    head_of: the term, at the same taps and with the same target, whose head it shares; null: it has its own.
    views: `both` predicts on the partner's view, too, and takes the mean of the two. of: `other` takes the target from the other view.
    """

    tap: str
    positions: str
    target: Literal["pixels", "teachers", "hog", "self", "ema", "labels", "map", "boxes", "sources", "views", "none"]
    head: HeadKind = "linear"
    teachers: tuple[str, ...] = ()
    teacher_tap: str | None = None
    transform: Transform = "none"
    distance: DistanceName = "mse"
    weight: float = 1.0
    focus: bool = False
    weighted: bool = False
    head_of: str | None = None
    views: Literal["first", "both"] = "first"
    of: Literal["same", "other"] = "same"
    map: str | None = None
    classes: int | None = None

    @property
    def decoded(self) -> bool:
        """Whether it reads a decoder."""
        return not {"decoder", "decoded"}.isdisjoint(self.taps)

    @property
    def sides(self) -> tuple[str, ...]:
        """What the names of its taps begin with: nothing for the first view, `partner/` for the partner's."""
        return ("", PARTNER) if self.views == "both" else ("",)

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps it reads, in order."""
        return tuple(self.tap.split("+"))

    @property
    def relation(self) -> str:
        """`qk` or `vv` where it compares relations among tokens; empty where it compares tokens."""
        return self.distance[3:-1] if self.distance.startswith("kl(") else ""

    def at(self, *positions: str) -> bool:
        """Whether it predicts at any of these positions."""
        return not set(positions).isdisjoint(self.positions.split("+"))


@dataclass(frozen=True)
class Optim:
    """The peak learning rate is `lr_per_256 * batch_size / 256 * lr_scale`. batch_size: images per update, over all ranks.

    name: AdamW, or Muon (arXiv 2502.16982) for the matrices of blocks beside AdamW for the rest, or schedule-free AdamW (arXiv 2405.15682), whose
    rate stays at its peak.
    lr_rule: `sqrt` takes the root of `batch_size / 256` instead. ema: the momentum of the copy that terms with target `ema` predict, at the first update
    and at the end, along half a cosine.
    clip_norm: gradients of a larger norm, all of them together, are scaled to it; null: none are.
    """

    lr_per_256: float = 1.5e-4
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_epochs: float = 40.0
    epochs: int = 200
    batch_size: int = 2048
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    lr_scale: float = 1.0
    clip_norm: float | None = None
    lr_rule: Literal["linear", "sqrt"] = "linear"
    ema: tuple[float, float] = (0.996, 1.0)
    name: Literal["adamw", "muon", "schedule-free"] = "adamw"


@dataclass(frozen=True)
class Recipe:
    """Everything that changes the result of a run.

    fit: keys whose values give way to what fits a small cache or student, or a cache's bands, when a run begins: of a shipped recipe those of `FIT` that
    nobody has set.
    """

    name: str
    terms: dict[str, TermRecipe]
    seed: int = 0
    prepare: Prepare = field(default_factory=Prepare)
    mask: MaskRecipe = field(default_factory=MaskRecipe)
    student: StudentRecipe = field(default_factory=StudentRecipe)
    optim: Optim = field(default_factory=Optim)
    fit: tuple[str, ...] = field(default=(), compare=False)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name (`mr-mae`) or of a yaml file, with overrides like `optim.epochs=100` applied in order.

    A term set to null is dropped: `terms.pixels=null`. Raises ValueError naming the key, the value and what was expected.
    """
    path, text = recipe_path(name_or_path), recipe_text(name_or_path)
    try:
        values = yaml.load(text, Loader=strict_yaml.UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path}: is not valid yaml ({error}); correct the file") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"recipe {path}: holds {strict_yaml.shown_value(values)}; a mapping of recipe keys was expected"
        )
    for override in overrides:
        strict_yaml.override(values, override)
    if name_or_path in recipe_names():
        values.setdefault("fit", [key for key in FIT if not any(touches(override, key) for override in overrides)])
    return from_dict(values, where=f"recipe {name_or_path}")


def touches(override: str, key: str) -> bool:
    """Whether an override like `optim.epochs=100` sets a key, a part of it, or what it is a part of."""
    given = override.partition("=")[0].strip()
    return f"{given}.".startswith(f"{key}.") or f"{key}.".startswith(f"{given}.")


def recipe_text(name_or_path: str) -> str:
    """The yaml of a shipped name or a file as it stands there; of a shipped one a comment says of each line where it comes from.

    `published` (abstract or code), `inferred` (from related code, or a guess) or `ours`.
    """
    path = recipe_path(name_or_path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: cannot be read ({error}); expected a yaml file") from error


def recipe_summaries() -> dict[str, str]:
    """What each shipped recipe is, by name: the first line of its yaml."""
    return {name: recipe_text(name).partition("\n")[0].removeprefix("# ") for name in recipe_names()}


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name_or_path: str) -> Path:
    """The yaml file behind a shipped name or a path."""
    if name_or_path in recipe_names():
        return RECIPES / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(
                f"recipe {path}: there is no such file; give an existing yaml, or {strict_yaml.one_of(recipe_names())}"
            )
        return path
    raise ValueError(
        f"recipe {name_or_path!r}: is neither a shipped recipe nor a .yaml file; {did_you_mean(name_or_path, recipe_names())}"
    )


def from_dict(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe that plain values describe. Raises ValueError at the first unknown key, wrong type or impossible value."""
    recipe: Recipe = strict_yaml.from_values(Recipe, values, where)
    _check(recipe, where)
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings, without `fit`; `from_dict` gives an equal recipe back."""
    plain: dict[str, Any] = strict_yaml.plain_values(asdict(recipe))
    return {key: value for key, value in plain.items() if key != "fit"}


def partner_targets(recipe: Recipe) -> bool:
    """Whether a term reads what teachers say of the partner's view."""
    return any(t.target == "teachers" and (t.views, t.of) != ("first", "same") for t in recipe.terms.values())


def open_keys(recipe: Recipe) -> list[str]:
    """The keys that a recipe leaves to the cache: decided when a run begins, and kept."""
    return [*(key for key in OPEN if operator.attrgetter(key)(recipe) is None), *recipe.fit]


def replaced(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """`recipe` with other values of these dotted keys, like `prepare.views`."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{name: value})})
    return recipe


def as_begun(recipe: Recipe, begun: Recipe) -> Recipe:
    """`recipe` with what it leaves open as it was decided for the run of `begun`."""
    kept = {key: operator.attrgetter(key)(begun) for key in open_keys(recipe)}
    return replace(replaced(recipe, kept), fit=())


def difference(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """The fields that differ, as (dotted name, old value, new value); a missing term is None."""
    before, after = strict_yaml.dotted_values(to_dict(old)), strict_yaml.dotted_values(to_dict(new))
    names = [*before, *(name for name in after if name not in before)]
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


Rule = tuple[str, bool, str]  # field, whether it holds, what was expected


def _check(recipe: Recipe, where: str) -> None:
    for at, good, expected in _rules(recipe):
        if not good:
            value = recipe
            for key in at.split("."):
                value = value[key] if isinstance(value, dict) else getattr(value, key)
            raise ValueError(f"{where}: {at} is {strict_yaml.shown_value(value)}; {expected}")


def _rules(recipe: Recipe) -> Iterable[Rule]:
    """Everything that must hold of a recipe, section by section."""
    yield "terms", bool(recipe.terms), "at least one term was expected"
    yield "fit", set(recipe.fit) <= set(FIT), f"some of {', '.join(FIT)} were expected"
    yield "seed", -(2**63) <= recipe.seed < 2**63, "a 64-bit integer was expected"
    yield from _prepare_rules(recipe.prepare)
    yield from _nothing_hidden(recipe.mask) if recipe.student.hidden == "none" else _some_hidden(recipe.mask)
    yield from _pair_rules(recipe)
    yield from _mask_rules(recipe.mask)
    yield from _mix_rules(recipe)
    yield from _student_rules(recipe.student)
    yield from _prune_rules(recipe)
    yield from _decoder_rules(recipe.student.decoder) if recipe.student.decoder is not None else ()
    yield from _box_rules(recipe.student.boxes, recipe.student) if recipe.student.boxes is not None else ()
    yield from _optim_rules(recipe.optim)
    averaged = recipe.optim.name == "schedule-free"
    told = "adamw or muon was expected with head predictor, whose batch norms' statistics would not be those of averaged weights"
    yield "optim.name", not averaged or all(term.head != "predictor" for term in recipe.terms.values()), told
    for name, term in recipe.terms.items():
        for rules in (_tap_rules, _position_rules, _target_rules, _distance_rules, _special_rules, _weight_rules):
            yield from rules(recipe, f"terms.{name}", term)
        yield from _relation_rules(f"terms.{name}", term) if term.relation else ()


def _prepare_rules(prepare: Prepare) -> Iterable[Rule]:
    yield "prepare.mean", len(prepare.mean) == len(prepare.std) > 0, "as many numbers as in prepare.std"
    for name in ("images", "views"):
        n = getattr(prepare, name)
        yield f"prepare.{name}", n is None or n >= 1, "at least 1, or null, was expected"
    columns = prepare.columns or ()
    yield "prepare.columns", len(set(columns)) == len(columns), "no column twice"
    yield "prepare.std", all(s > 0 for s in prepare.std), "numbers above 0 were expected"


def _mask_rules(mask: MaskRecipe) -> Iterable[Rule]:
    yield "mask.n_keep", mask.n_keep is None or mask.n_keep >= 1, "at least 1, or null, was expected"
    n = mask.n_predict
    counted = n is None or n >= 0 and (n < 1 or n == int(n))
    yield (
        "mask.n_predict",
        counted,
        "a number of patches, a share of the hidden ones between 0 and 1, or null was expected",
    )
    yield "mask.masks_per_image", mask.masks_per_image >= 1, "at least 1 was expected"
    for sampler, many in {"disjoint": 2, "quarters": 4, "stored_block": 1}.items():
        fits = mask.sampler != sampler or mask.masks_per_image == many
        yield "mask.masks_per_image", fits, f"{many} was expected with sampler {sampler}"
    whole = (mask.sampler != "disjoint" and mask.cell == 1) or mask.n_keep is None
    told = "null was expected with sampler disjoint and in cells: mask.ratio and mask.cell say how many"
    yield "mask.n_keep", whole, told
    celled = mask.sampler == "disjoint" or (mask.sampler == "random" and mask.law == "fixed")
    told = "at least 1 was expected, and 1 but for samplers disjoint and random without a law"
    yield "mask.cell", mask.cell == 1 or (mask.cell > 1 and celled), told
    yield "mask.group", mask.group >= 2, "at least 2 was expected"
    yield "mask.least", 0 <= mask.least < 1, "0 <= ratio < 1 was expected"
    parts = mask.sampler == "crfr_p"
    yield "mask.source", not parts or mask.source.startswith("map:"), "map:NAME was expected with sampler crfr_p"
    told = "uniform was expected with sampler crfr_p: parts are no scores"
    yield "mask.predict", not parts or mask.predict != "score", told
    free = mask.law == "fixed" or (mask.n_keep is None and mask.n_predict in (None, 0))
    yield "mask.law", free, "fixed was expected where n_keep or n_predict says how many"


def _mix_rules(recipe: Recipe) -> Iterable[Rule]:
    mask, student = recipe.mask, recipe.student
    mixes, one = mask.sampler == "mix", mask.masks_per_image == 1 and mask.law == "fixed"
    plain = one and student.hidden == "drop" and student.prune is None
    told = "one mask per image, law fixed and hidden drop were expected with sampler mix"
    yield "mask.sampler", not mixes or plain, told
    told = "null was expected with sampler mix: mask.group says how many"
    yield "mask.n_keep", not mixes or mask.n_keep is None, told
    embeds = mixes or not student.source_embedding
    yield "student.source_embedding", embeds, f"false was expected with sampler {mask.sampler}"


def _student_rules(student: StudentRecipe) -> Iterable[Rule]:
    yield "student.fused_blocks", len(set(student.fused_blocks)) == len(student.fused_blocks), "no block twice"
    yield "student.drop_path", 0 <= student.drop_path < 1, "0 <= rate < 1 was expected"
    start = student.init_values
    yield "student.init_values", start is None or start > 0, "a number above 0, or null, was expected"


def _decoder_rules(decoder: DecoderRecipe) -> Iterable[Rule]:
    at = "student.decoder"
    yield f"{at}.depth", decoder.depth >= 0, "at least 0 was expected"
    yield f"{at}.width", decoder.width > 0 and decoder.width % 4 == 0, "a positive multiple of 4 was expected"
    divides = decoder.heads > 0 and decoder.width % decoder.heads == 0
    yield f"{at}.heads", divides, f"a divisor of the decoder's width {decoder.width} was expected"
    yield f"{at}.mlp_ratio", decoder.mlp_ratio > 0, "a number above 0 was expected"
    behind = decoder.behind == 0 or (decoder.behind > 0 and decoder.kind == "regressor")
    yield f"{at}.behind", behind, "0 was expected, or with decoder regressor a number of blocks"
    sums = not decoder.weighted or decoder.kind == "cross"
    yield f"{at}.weighted", sums, f"false was expected with decoder {decoder.kind}"
    yield f"{at}.blocks", len(set(decoder.blocks)) == len(decoder.blocks), "no block twice"


def _box_rules(boxes: BoxRecipe, student: StudentRecipe) -> Iterable[Rule]:
    at = "student.boxes"
    yield "student.prune", student.prune is None, f"null was expected with {at}"
    told = f"none was expected with {at}: boxes lie anywhere in the grid"
    yield "student.hidden", student.hidden == "none", told
    for name in ("most", "cells", "hide", "width", "heads", "depth", "behind"):
        yield f"{at}.{name}", getattr(boxes, name) >= 1, "at least 1 was expected"
    yield f"{at}.hide", boxes.hide < boxes.cells**2, f"less than the {boxes.cells**2} cells of a box were expected"
    yield f"{at}.width", boxes.width % boxes.heads == 0, f"a multiple of its {boxes.heads} heads was expected"
    whole = all(side >= boxes.cells and side % boxes.cells == 0 for side in boxes.crop)
    yield f"{at}.crop", whole, f"multiples of its {boxes.cells} cells were expected"


def _optim_rules(optim: Optim) -> Iterable[Rule]:
    for name in ("lr_per_256", "min_lr", "weight_decay", "warmup_epochs"):
        yield f"optim.{name}", getattr(optim, name) >= 0, "at least 0 was expected"
    yield "optim.betas", all(0 <= beta < 1 for beta in optim.betas), "two numbers in [0, 1) were expected"
    yield "optim.ema", all(0 <= momentum <= 1 for momentum in optim.ema), "two numbers in [0, 1] were expected"
    yield "optim.lr_scale", optim.lr_scale > 0, "a number above 0 was expected"
    yield "optim.clip_norm", optim.clip_norm is None or optim.clip_norm > 0, "a number above 0, or null, was expected"
    falls = optim.name != "schedule-free" or optim.min_lr == 0
    yield "optim.min_lr", falls, "0 was expected with optim.name schedule-free, whose rate does not fall"
    yield "optim.epochs", optim.epochs >= 1, "at least 1 was expected"
    yield "optim.batch_size", optim.batch_size >= 1, "at least 1 was expected"


def _pair_rules(recipe: Recipe) -> Iterable[Rule]:
    pair, decoder = recipe.prepare.pair, recipe.student.decoder
    alone = "true was expected, for "
    yield "prepare.pair", pair or recipe.mask.sampler != "pair_disjoint", f"{alone}mask.sampler pair_disjoint"
    yield "prepare.pair", pair or decoder is None or decoder.kind != "pair", f"{alone}student.decoder pair"
    yield "mask.masks_per_image", not pair or recipe.mask.masks_per_image == 1, "1 was expected with prepare.pair"
    yield "student.hidden", not pair or recipe.student.hidden == "drop", "drop was expected with prepare.pair"
    for name, term in recipe.terms.items():
        at = f"terms.{name}"
        yield "prepare.pair", pair or (term.views, term.of) == ("first", "same"), f"{alone}{at}.views and .of"
        yield f"{at}.views", term.views == "first" or not term.decoded, "first was expected with a decoder's tap"
        labels = term.views == "first" or term.target != "labels"
        yield f"{at}.views", labels, "first was expected with target labels"
        fits = term.of == "same" or term.target in ("teachers", "ema")
        yield f"{at}.of", fits, f"same was expected with target {term.target}"
        placed = term.of == "other" and not set(term.positions.split("+")) <= {"cls", "pooled"}
        told = "cls or pooled was expected with of other: places of two views are not the same"
        yield f"{at}.positions", not placed, told


def _prune_rules(recipe: Recipe) -> Iterable[Rule]:
    student, prune = recipe.student, recipe.student.prune
    if prune is None:
        return
    ascending = list(prune.before) == sorted(set(prune.before)) and all(i >= 1 for i in prune.before)
    yield "student.prune.before", bool(prune.before) and ascending, "ascending numbers of blocks from 1 were expected"
    yield "student.prune.keep", 0 < prune.keep < 1, "0 < keep < 1 was expected"
    yield "student.decoder", student.decoder is None, "null was expected with student.prune"
    yield "student.hidden", student.hidden != "replace", "drop or none was expected with student.prune"
    yield "mask.sampler", recipe.mask.sampler != "stored_block", "another sampler was expected with student.prune"
    for name, term in recipe.terms.items():
        single = bool(re.fullmatch(r"final|(block|qkv)\d+", term.tap))
        yield f"terms.{name}.tap", single, "final, block<i> or qkv<i> was expected with student.prune"
        others = term.target not in ("self", "ema")
        yield f"terms.{name}.target", others, "another target was expected with student.prune"


def _some_hidden(mask: MaskRecipe) -> Iterable[Rule]:
    yield "mask.ratio", 0 < mask.ratio < 1, "0 < ratio < 1 was expected (0 with student.hidden none)"


def _nothing_hidden(mask: MaskRecipe) -> Iterable[Rule]:
    for name in ("ratio", "sampler", "n_keep", "n_predict", "law", "masks_per_image"):
        whole = 0 if name == "ratio" else getattr(MaskRecipe(), name)
        expected = f"{strict_yaml.shown_value(whole)} was expected with student.hidden none"
        yield f"mask.{name}", getattr(mask, name) == whole, expected


def _tap_rules(recipe: Recipe, at: str, term: TermRecipe) -> Iterable[Rule]:
    """Whether what it reads is there."""
    decoder = recipe.student.decoder
    is_tap = all(tap in ("decoder", "decoded", "boxes", "mto") or ENCODER_TAP.fullmatch(tap) for tap in term.taps)
    told = "final, block<i>, placed<i>, mix<i>, qkv<i>, mean_ln, learned, decoder or decoded was expected, or two joined by +"
    yield f"{at}.tap", is_tap, told
    yield f"{at}.tap", len(set(term.taps)) == len(term.taps), "no tap twice"
    there = not term.decoded or decoder is not None
    yield f"{at}.tap", there, "student.decoder is null; give one, or another tap"
    deep = "decoded" not in term.taps or (decoder is not None and decoder.behind > 0)
    yield f"{at}.tap", deep, "decoded is behind student.decoder.behind blocks; give some, or another tap"


def _position_rules(recipe: Recipe, at: str, term: TermRecipe) -> Iterable[Rule]:
    asked, held = term.positions.split("+"), held_positions(term.taps, recipe.student)
    known = set(asked) <= set(POSITIONS) and len(set(asked)) == len(asked)
    yield f"{at}.positions", known, f"some of {', '.join(POSITIONS)}, joined by +, were expected"
    told = f"tap {term.tap} holds {', '.join(place for place in POSITIONS if place in held)}"
    yield f"{at}.positions", set(asked) <= held, f"{told}; these were expected, or another tap"
    of_patches = term.target in ("teachers", "labels", "ema", "views") or not term.at("cls", "pooled")
    yield f"{at}.positions", of_patches, f"patches were expected with target {term.target}"
    of_image = term.target != "labels" or set(asked) <= {"cls", "pooled"}
    yield f"{at}.positions", of_image, "cls or pooled was expected with target labels"
    hidden = term.target != "self" or term.positions == "predicted"
    yield f"{at}.positions", hidden, f"predicted was expected with target {term.target}"
    told = "cls, pooled, visible, predicted or all was expected with target ema"
    yield f"{at}.positions", term.target != "ema" or not term.at("alive"), told


def _target_rules(recipe: Recipe, at: str, term: TermRecipe) -> Iterable[Rule]:
    given, on_map = term.target != "teachers", term.target == "map"
    yield f"{at}.teachers", not (given and term.teachers), f"none was expected with target {term.target}"
    yield f"{at}.teacher_tap", not (given and term.teacher_tap), f"null was expected with target {term.target}"
    yield f"{at}.teachers", len(set(term.teachers)) == len(term.teachers), "no teacher twice"
    ids, plain = term.classes is not None, ("none", "ln0", "l2")
    transforms = {
        "pixels": ("none", "norm_pix", "norm_pix_biased"),
        "self": plain,
        "ema": plain,
        "map": ("none",) if ids else plain,
    }
    fits = term.transform in transforms.get(term.target, ("none",)) if given else "norm_pix" not in term.transform
    names = "none, ln0, l2, channel, phi_s, position, position+ln0 or position+phi_s"
    told = "pixels: none, norm_pix or norm_pix_biased; hog, labels, ids, boxes, sources, views: none; self, ema and numbers of a map: none, ln0 or l2"
    yield f"{at}.transform", fits, f"{told}; teachers: {names}"
    on_cls = term.at("cls") and term.transform in ("channel", "phi_s")
    yield (
        f"{at}.transform",
        not on_cls,
        "statistics of patch tokens do not describe CLS; none, ln0, l2, position, position+ln0 or position+phi_s",
    )
    yield f"{at}.map", on_map == (term.map is not None), "the name of a map was expected with target map, else null"
    enough = term.classes is None or (on_map and 2 <= term.classes <= 2**16)
    yield f"{at}.classes", enough, "2 to 65536 was expected of a map of ids, else null"
    sized = not on_map or ids or term.distance != "ce"
    yield f"{at}.classes", sized, "2 to 65536, the size of the ids' codebook, was expected with distance ce"


def _distance_rules(recipe: Recipe, at: str, term: TermRecipe) -> Iterable[Rule]:
    target, distance = term.target, term.distance
    of_pixels = distance in ("mse", "l1") if target == "pixels" else distance != "l1"
    yield f"{at}.distance", of_pixels, "mse or l1 was expected with target pixels, and l1 with nothing else"
    yield f"{at}.distance", target != "boxes" or distance == "mse", "mse was expected with target boxes"
    contrast = (target == "sources") == (distance == "supcon")
    yield f"{at}.distance", contrast, "target sources and distance supcon were expected together"
    told_apart = (target == "views") == (distance == "infonce")
    yield f"{at}.distance", told_apart, "target views and distance infonce were expected together"
    labels, on_map, ids = target == "labels", target == "map", term.classes is not None
    of = f"{'one' if labels else 'none'} of {', '.join(OF_LABELS)} was expected with target {target}"
    yield f"{at}.distance", on_map or labels == (distance in OF_LABELS), of
    fits = (distance == "ce") if ids else distance not in OF_LABELS
    of = "ce was expected with classes, of ids" if ids else "one of numbers was expected without classes"
    yield f"{at}.distance", not on_map or fits, of


def _special_rules(recipe: Recipe, at: str, term: TermRecipe) -> Iterable[Rule]:
    """Of the taps and targets that only go together: boxes, mto, sources, views."""
    student, tap = recipe.student, term.tap
    yield f"{at}.tap", (tap == "boxes") == (term.target == "boxes"), "tap and target boxes were expected together"
    built = tap != "boxes" or student.boxes is not None
    yield f"{at}.tap", built, "student.boxes is null; give one, as in --set student.boxes.most=8, or another tap"
    alone = (tap == "mto") == (term.target == "none")
    alone &= tap != "mto" or (term.positions, term.head) == ("alive", "none")
    yield f"{at}.tap", alone, "tap mto, positions alive, head none and target none were expected together"
    has_mask_tokens = student.hidden == "replace" or (student.decoder is not None and student.decoder.kind == "self")
    told = "a decoder of kind self, or student.hidden replace, was expected with tap mto"
    yield f"{at}.tap", has_mask_tokens or tap != "mto", told
    mixes = term.target != "sources" or (recipe.mask.sampler == "mix" and term.positions == "visible")
    yield f"{at}.target", mixes, "sampler mix and positions visible were expected with target sources"
    paired = (term.views, term.of) == ("both", "same") and term.positions in ("cls", "pooled")
    told = "views both, of same and positions cls or pooled were expected with target views"
    yield f"{at}.target", paired or term.target != "views", told


def _weight_rules(recipe: Recipe, at: str, term: TermRecipe) -> Iterable[Rule]:
    """Of weights, and of heads that terms share."""
    yield f"{at}.weight", term.weight >= 0, "at least 0 was expected"
    yield f"{at}.focus", not term.focus or term.positions == "visible", "positions visible was expected with it"
    parts = recipe.mask.sampler == "crfr_p"
    yield f"{at}.focus", not (term.focus and parts), "false was expected with sampler crfr_p: parts are no scores"
    other = recipe.terms.get(term.head_of) if term.head_of is not None else term
    shared = other is not None and (term.head_of is None or other.head_of is None)
    told = f"null, or a term with a head of its own, was expected: one of {', '.join(recipe.terms)}"
    yield f"{at}.head_of", shared, told
    alike = ("tap", "head", "target", "teachers", "teacher_tap")
    same = other is None or all(getattr(term, key) == getattr(other, key) for key in alike)
    yield f"{at}.head_of", same, f"a term with the same {', '.join(alike)} was expected"
    hidden = not term.weighted or term.positions == "predicted"
    yield f"{at}.weighted", hidden, "positions predicted was expected with it"


def _relation_rules(at: str, term: TermRecipe) -> Iterable[Rule]:
    """The same of a term that compares relations among tokens."""
    said = f"with distance {term.distance}"
    yield f"{at}.tap", bool(re.fullmatch(r"qkv\d+", term.tap)), f"qkv<i> was expected {said}"
    yield f"{at}.target", term.target == "teachers", f"teachers was expected {said}"
    given = bool(re.fullmatch(r"qkv_\d+", term.teacher_tap or ""))
    yield f"{at}.teacher_tap", given, f"qkv_<i> was expected {said}, from a stored input_<i>"
    yield f"{at}.head", term.head == "none", f"none was expected {said}"
    yield f"{at}.transform", term.transform == "none", f"none was expected {said}"
    several = not term.at("pooled") and term.positions != "cls"
    yield f"{at}.positions", several, f"patches were expected {said}"
    yield f"{at}.focus", not term.focus, f"false was expected {said}"


def held_positions(taps: Iterable[str], student: StudentRecipe) -> set[str]:
    """Where these taps hold tokens, together."""
    if student.prune is not None:
        return {"cls", "alive"}
    held, visible, decoder = {"alive"}, {"cls", "pooled", "visible"}, student.decoder
    encoded = visible | {"drop": set(), "replace": {"predicted"}, "none": {"all"}}[student.hidden]
    for tap in taps:
        held |= encoded if tap not in ("decoder", "decoded", "boxes") else {"predicted"}
        if tap == "decoder" and decoder is not None and decoder.kind in ("prompt", "regressor"):
            held |= visible
    return held | ({"all"} if {"visible", "predicted"} <= held else set())
