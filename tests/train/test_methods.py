"""docs/methods.md: a row per shipped recipe, with its command, what its yaml reads of a cache, and what its step costs at full size."""

import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mrmae.common.device import without_numbers
from mrmae.kernels import check
from mrmae.shards.format import BEHIND, stored_tap
from mrmae.shards.stats import Stats
from mrmae.train import cost
from mrmae.train.method.masks import Masks, buckets, counts, map_columns, reads_saliency
from mrmae.train.method.model import Pretrainer
from mrmae.train.method.recipe import RECIPES, MaskRecipe, Recipe, load_recipe, recipe_names
from mrmae.train.method.targets import MAP, Batch, CacheInfo, GivenBoxes, TeacherInfo

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
L, WIDTH = 196, 768
FEW = ("mr-mae", "cae", "selective-mae")  # counted in every run of the suite
TAILS: dict[str, tuple[int, str | None]] = {
    "projected": (512, "proj.weight"),
    "post_ln": (WIDTH, None),
    "qkv": (3 * WIDTH, "qkv.weight"),
}  # by tap


def rows() -> dict[str, list[str]]:
    """The cells of every row, by the recipe's name."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("` "): row for row in cells}


def full_info(recipe: Recipe) -> CacheInfo:
    """A cache of RGB views of 224 px in 14 x 14 patches: CLIP and DINO of width 768, or a column for each tap that the recipe names."""
    stored, derived = dict[str, TeacherInfo](), dict[str, TeacherInfo]()
    for term in (term for term in recipe.terms.values() if term.target == "teachers"):
        tap = term.teacher_tap or "pre_tail"
        base = "pre_tail" if tap in BEHIND else stored_tap(tap)
        names = (
            ("clip", "dino") if term.teacher_tap is None else ("clip" if base == "pre_tail" else base.replace("_", ""),)
        )
        for name in names:
            stored[name] = TeacherInfo(WIDTH, None, None, True, True, f"{name}.{base}", has_scale=False)
            if tap != base:
                width, key = TAILS[next(end for end in TAILS if end in tap)]
                norm = {"layer_norm.weight": torch.zeros(WIDTH), "layer_norm.eps": 1e-5, "qkv.heads": 12}
                tail = norm if key is None else norm | {key: torch.zeros(width, WIDTH)}
                about = replace(stored[name], width=width, column=f"{name}.{tap}", source=name, tail=tail)
                derived[f"{name}:{tap}"] = about
            elif term.transform == "position":
                stored[name] = replace(stored[name], stats=Stats("", 1, torch.zeros(L, WIDTH), torch.eye(WIDTH)))
    if reads_saliency(recipe.mask) and not recipe.mask.source.startswith(MAP):
        stored.setdefault("clip", TeacherInfo(WIDTH, None, None, True, True, "clip.pre_tail", has_scale=False))
    maps = {term.map: "uint16" for term in recipe.terms.values() if term.map and term.classes}
    vectors = {term.map: 16 for term in recipe.terms.values() if term.map and not term.classes}
    if recipe.mask.source.startswith(MAP):
        maps[recipe.mask.source.removeprefix(MAP)] = "uint16" if recipe.mask.sampler == "crfr_p" else "float16"
    return CacheInfo(224, (14, 14), stored, derived=derived, maps=maps, vectors=vectors, classes=tuple("abcdefghij"))


def step_of(recipe: Recipe, info: CacheInfo, model: Pretrainer, mask: MaskRecipe) -> tuple[float, float]:
    """(forward, beside it) in MAC per image, counted as the plan counts."""
    b, joined = recipe.mask.joined, recipe.mask.masks_per_image
    n_keep, n_predict = counts(mask, L)
    n_partner = n_keep if mask.sampler == "pair_disjoint" else L

    def ids(n: int) -> torch.Tensor:
        return torch.zeros(b * joined, n, dtype=torch.int64)

    targets: dict[str, dict[str, torch.Tensor]] = {}
    for name in info.teachers:
        targets[name] = {
            "tokens": torch.zeros(b, L, WIDTH),
            "cls": torch.zeros(b, WIDTH),
            "attention": torch.zeros(b, L),
        }
    targets |= {f"{MAP}{name}": {"map": torch.zeros(b, L, dtype=torch.int64)} for name in info.maps}
    targets |= {f"{MAP}{name}": {"map": torch.zeros(b, L, width)} for name, width in info.vectors.items()}
    pixels, hashes = torch.zeros(b, 224, 224, 3, dtype=torch.uint8), torch.zeros(b, dtype=torch.int64)
    boxes = None
    if (asked := recipe.student.boxes) is not None:
        boxes = GivenBoxes(torch.zeros(b, asked.most, 4), torch.zeros(b, asked.most, asked.hide, dtype=torch.int64))
    labels = torch.zeros(b, len(info.classes), dtype=torch.uint8)
    batch = Batch(hashes, pixels, targets, labels=labels, boxes=boxes)
    batch = replace(batch, partner=batch)
    weight = torch.zeros(b * joined, n_predict)
    masks = Masks(ids(n_keep), ids(n_predict), weight, ids_partner=ids(n_partner))
    own = cost.own_flops(model, batch, masks)
    return (cost.student_flops(model, batch, masks) - own) / 2, own / 2


def gmacs_of(recipe: Recipe) -> tuple[float, float]:
    """(forward, step) in GMAC per image, in the mean over a law of the ratio. Nothing is computed: tensors have shapes only."""
    info = full_info(recipe)
    with without_numbers():
        model = Pretrainer(recipe, info, "torch").eval()
    laws = [recipe.mask]
    if recipe.mask.law != "fixed":
        laws = [replace(recipe.mask, law="fixed", n_keep=n) for n in buckets(recipe.mask, L)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.fill_constants(torch.float32)
        each = [step_of(recipe, info, model, mask) for mask in laws]
    forward, beside = (statistics.mean(numbers) / 1e9 for numbers in zip(*each))
    return forward, (1 + cost.BACKWARD) * forward + beside


def test_every_recipe_has_a_row_and_no_other_has() -> None:
    assert sorted(rows()) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_a_row_says_what_the_yaml_reads(name: str) -> None:
    recipe, (_, needs, command, _, differs) = load_recipe(name), rows()[name]
    header = re.sub(r"\s+", " ", (RECIPES / f"{name}.yaml").read_text())
    assert command.strip("`") in header and differs, "the command is that of the yaml"
    wanted = [f"`{term.teacher_tap}`" for term in recipe.terms.values() if term.teacher_tap not in (None, "pre_tail")]
    wanted += [f"`{column.removesuffix('.map')}`" for column in map_columns(recipe)]
    wanted += ["two views"] * recipe.prepare.pair
    wanted += ["CLS" for term in recipe.terms.values() if term.target == "teachers" and term.at("cls")]
    wanted += ["labels" for term in recipe.terms.values() if term.target == "labels"]
    wanted += ["boxes"] * (recipe.student.boxes is not None)
    wanted += ["attention"] * (recipe.mask.sampler == "attn_prob")
    assert all(what in needs for what in wanted), (needs, wanted)
    nothing = not wanted and not any(term.target == "teachers" for term in recipe.terms.values())
    assert ("views only" in needs) == nothing, needs


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.soak) for name in recipe_names()]
)
def test_a_row_says_what_a_step_costs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ids_of", lambda *_, **__: None)  # there are no numbers to check
    forward, step = gmacs_of(load_recipe(name))
    told = f"{forward:.1f} / {step:.1f}"
    assert rows()[name][3] == told, f"docs/methods.md: {name}: the plan counts {told}"
