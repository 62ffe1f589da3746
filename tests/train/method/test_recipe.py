"""Recipes: what the shipped ones fix, and that nothing wrong gets in unnoticed."""

import itertools
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mrmae.train.method import heads, masks, samplers
from mrmae.train.method import recipe as recipes
from mrmae.train.method.distances import DISTANCES, LABEL_DISTANCES
from mrmae.train.method.recipe import (
    MaskRecipe,
    Recipe,
    difference,
    from_dict,
    load_recipe,
    recipe_names,
    recipe_text,
    to_dict,
)
from mrmae.train.method.targets import Batch
from mrmae.train.optim import base_lr, lr_at

COUNTS = {
    "cae": (98, 98),
    "cae-v2": (98, 98),
    "maskdistill-sparse": (49, 0),
    "croco": (20, 176),
    "mr-croco": (20, 176),
    "dmjd": (76, 120),
    "dmjd-mimic": (76, 120),
    "fd": (196, 0),
    "hybrid-distill": (196, 0),
    "maskdistill": (118, 78),
    "maskalign": (58, 0),
    "medic": (118, 78),
    "mimic-only": (49, 0),
    "mom": (196, 0),
    "mr-mae-light": (49, 49),
    "mr-satvision": (78, 118),
    "satvision": (78, 118),
    "selective-mae": (29, 49),
    "sycoca-mask": (98, 98),
    "tinymim": (196, 0),
    "umt": (40, 0),
}
LIKE_MAE = [
    "mae",
    "mae-mto",
    "mimic-masked",
    "mimic-only",
    "mr-mae",
    "mr-mae-centred",
    "mr-mae-focused",
    "mr-mae-fused",
    "mr-mcmae",
]
MIMIC = {
    "positions": "visible",
    "target": "teachers",
    "head": "linear",
    "transform": "ln0",
    "distance": "mse",
    "weight": 1.0,
}
PIXELS = {"positions": "predicted", "target": "pixels", "head": "linear", "transform": "norm_pix", "distance": "mse"}


@pytest.mark.parametrize("name", LIKE_MAE)
def test_every_recipe_keeps_the_numbers_of_the_method(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.seed == 0
    n_predict = 0 if name == "mimic-only" else 147
    assert masks.counts(recipe.mask, 196) == (49, n_predict)
    assert recipe.student.model == ("mcmae_base" if name == "mr-mcmae" else "vit_base_patch16_224")
    assert recipe.student.drop_path == 0
    decoder = recipe.student.decoder
    assert (decoder is None) == (name == "mimic-only")
    assert decoder is None or (decoder.depth, decoder.width, decoder.heads, decoder.mlp_ratio) == (8, 512, 16, 4.0)
    optim = recipe.optim
    assert (optim.lr_per_256, optim.min_lr, optim.betas) == (1.5e-4, 0.0, (0.9, 0.95))
    assert (optim.weight_decay, optim.warmup_epochs) == (0.05, 40)
    assert (optim.epochs, optim.batch_size) == ((1600, 4096) if name in ("mae", "mae-mto") else (200, 2048))
    assert recipe.prepare.mean == (0.485, 0.456, 0.406) and recipe.prepare.std == (0.229, 0.224, 0.225)


def test_maskalign_keeps_the_numbers_of_the_method() -> None:
    recipe = load_recipe("maskalign")
    assert masks.counts(recipe.mask, 196) == (58, 0)
    assert (recipe.mask.sampler, recipe.mask.draw, recipe.mask.n_keep) == ("attn_prob", "prob", None)
    assert [masks.counts(recipe.mask, l)[0] for l in (16, 64, 144, 256)] == [4, 19, 43, 76]  # int(l * 0.3)
    student = recipe.student
    assert (student.model, student.decoder, student.drop_path) == ("vit_base_patch16_224", None, 0.1)
    assert list(recipe.terms) == [f"layer{i}" for i in range(8, 13)]
    shared = {"positions": "cls+visible", "target": "teachers", "head": "linear", "transform": "ln0"}
    for i, term in zip(range(8, 13), to_dict(recipe)["terms"].values()):
        own = {"tap": f"mix{i}", "teacher_tap": f"block_{i}", "distance": "2*sl1(1)", "weight": 0.2}
        assert term.items() >= {**shared, **own}.items()
    optim = recipe.optim
    assert (optim.epochs, optim.warmup_epochs, optim.batch_size) == (200, 20, 1024)
    assert (optim.lr_per_256, optim.min_lr, optim.weight_decay) == (1.5e-4, 1e-5, 0.05)


@pytest.mark.parametrize(
    ("name", "peak"), [("mae", 2.4e-3), ("mr-mae", 1.2e-3), ("mr-mcmae", 1.2e-3), ("maskalign", 6e-4)]
)
def test_the_learning_rate_grows_with_the_batch(name: str, peak: float) -> None:
    o = load_recipe(name).optim
    assert base_lr(o.lr_per_256, o.batch_size) == pytest.approx(peak)
    schedule = {"peak": peak, "warmup_epochs": o.warmup_epochs, "epochs": o.epochs, "min_lr": o.min_lr}
    assert lr_at(0, **schedule) == 0 and lr_at(o.warmup_epochs, **schedule) == pytest.approx(peak)
    assert lr_at(o.epochs, **schedule) == pytest.approx(o.min_lr)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_draws_as_many_patches_as_it_says(name: str) -> None:
    said = load_recipe(name).mask
    kept, predicted = COUNTS.get(name, (49, 147))
    if said.law != "fixed":
        kept, predicted = masks.counts(masks.at_update(said, masks.Draw(0, 0), 196), 196)
    attention = torch.rand(3, 196, generator=torch.Generator().manual_seed(0))
    given = {said.source: {"map": (attention * 2047).int()}} if said.source.startswith("map:") else {}
    targets = {"t": {"attention": attention}, **given}
    batch = Batch(torch.tensor([5, -9, 2**40]), torch.empty(0, dtype=torch.uint8), targets)
    tokens = torch.randn(3, 196, 8, generator=torch.Generator().manual_seed(1))
    embedded = tokens if said.sampler == "similarity" else None
    drawn = samplers.draw_masks(batch, masks.Draw(0, 0), recipe=said, l=196, embedded=embedded)
    for ids, n in ((drawn.ids_keep, kept), (drawn.ids_predict, predicted)):
        assert ids.shape == (3 * said.masks_per_image, n) and (ids.diff(dim=1) > 0).all()
    together = torch.cat([drawn.ids_keep, drawn.ids_predict], dim=1)
    assert together.min() >= 0 and together.max() < 196
    assert all(len(set(row.tolist())) == kept + predicted for row in together)


def test_mr_mae_mimics_visible_tokens_and_reconstructs_hidden_pixels() -> None:
    terms = to_dict(load_recipe("mr-mae"))["terms"]
    assert terms["mimic"].items() >= {**MIMIC, "tap": "final", "teachers": [], "focus": False}.items()
    assert terms["pixels"].items() >= {**PIXELS, "tap": "decoder", "weight": 1.0}.items()
    assert list(terms) == ["mimic", "pixels"]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("mr-mae-centred", {"terms.mimic.transform": "position"}),
        ("mr-mae-focused", {"mask.sampler": "attn_prob"}),
        ("mr-mae-fused", {"terms.mimic.tap": "mean_ln"}),
        ("mr-mcmae", {"student.model": "mcmae_base"}),
        ("mimic-masked", {"terms.mimic.tap": "decoder", "terms.mimic.positions": "predicted"}),
    ],
)
def test_a_variant_changes_one_thing_against_mr_mae(name: str, changed: dict[str, Any]) -> None:
    changes = {field: new for field, _, new in difference(load_recipe("mr-mae"), load_recipe(name))}
    assert changes == {"name": name, **changed}


def test_mimic_only_drops_pixels_and_decoder_and_nothing_else() -> None:
    fields = {field for field, _, _ in difference(load_recipe("mr-mae"), load_recipe("mimic-only"))}
    assert {f for f in fields if not f.startswith(("terms.pixels", "student.decoder"))} == {"name", "mask.n_predict"}


def test_fused_mimicking_reads_blocks_3_6_9_12() -> None:
    assert load_recipe("mr-mae-fused").student.fused_blocks == (3, 6, 9, 12)


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_survives_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(recipe)))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_each_yaml_opens_with_paper_command_and_result(name: str) -> None:
    head = [line for line in (recipes.RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert "arXiv" in text and f"--recipe {name}" in text and "result" in text


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_of_a_yaml_is_marked_published_inferred_or_ours(name: str) -> None:
    """`train-mrmae --show-recipe` shows these marks. One key a line, so that each has its own."""
    lines = [line for line in recipe_text(name).splitlines() if not line.startswith(("#", "name:"))]
    values = [line for line in lines if not re.fullmatch(r" *[\w-]+:", line)]
    assert "{" not in "".join(values)
    assert not [line for line in values if not re.search(r" # (published: \w+|inferred: \w+|ours\b)", line)]


@pytest.mark.parametrize("name", recipe_names())
def test_the_docs_write_down_each_loss_and_show_what_the_yaml_says(name: str) -> None:
    section = (
        (Path(__file__).parents[3] / "docs/recipes.md").read_text().partition(f"### `{name}`\n")[2].partition("\n#")[0]
    )
    assert re.search(r"```text\nL (= |as mr-mae's)", section), (
        f"docs/recipes.md: write down the loss under ### `{name}`"
    )
    shown = section.partition("```yaml\n")[2].partition("```")[0]
    assert all(line in recipe_text(name).splitlines() for line in shown.splitlines())


def test_the_names_recipes_allow_are_the_ones_that_exist() -> None:
    assert set(typing.get_args(recipes.SamplerName)) == set(samplers.SAMPLERS)
    assert set(typing.get_args(recipes.HeadKind)) == set(heads.HEADS)
    assert set(typing.get_args(recipes.DistanceName)) == {*DISTANCES, *LABEL_DISTANCES, "supcon", "infonce"}
    assert set(recipes.OF_LABELS) == set(LABEL_DISTANCES)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.lr_per_265=1", "optim.lr_per_265 is not a key of a recipe; did you mean lr_per_256?"),
        ("opitm.epochs=1", "did you mean optim or fit?"),
        ("mask_ratio=0.5", "mask_ratio is not a key of a recipe; did you mean mask.ratio?"),
        ("maskratio=0.5", "maskratio is not a key of a recipe; did you mean mask.ratio?"),
        ("lr=0.5", "lr is not a key of a recipe; did you mean optim.lr_per_256"),
        ("epochs=9", "epochs is not a key of a recipe; did you mean optim.epochs?"),
        ("weight=2", "weight is not a key of a recipe; did you mean terms.NAME.weight?"),
        ("optim.epochs=ten", "optim.epochs is 'ten'; expected an integer"),
        ("optim.epochs=2.5", "optim.epochs is 2.5; expected an integer"),
        ("optim.epochs=true", "optim.epochs is True; expected an integer"),
        ("optim.lr_per_256=.nan", "expected a finite number"),
        ("optim.lr_per_256=true", "expected a finite number"),
        ("optim.betas=[0.9]", "optim.betas is [0.9]; expected a list of 2, each a finite number"),
        ("optim.betas=[0.9, x]", "optim.betas[1] is 'x'; expected a finite number"),
        ("optim=3", "optim is 3; a mapping"),
        ("optim.betas=[0.9, 1.0]", "numbers in [0, 1)"),
        ("optim.epochs=0", "at least 1"),
        ("optim.clip_norm=0", "a number above 0, or null"),
        ("optim={name: schedule-free, min_lr: 1e-5}", "0 was expected with optim.name schedule-free"),
        ("optim.lr_scale=0", "a number above 0"),
        ("student.init_values=0", "a number above 0, or null"),
        ("student.positions=sincos2d", "did you mean sincos"),
        ("mask.ratio=1.5", "mask.ratio is 1.5; 0 < ratio < 1"),
        ("mask.ratio=null", "mask.ratio is null; expected a finite number"),
        ("mask.sampler=crfr_p", "mask.source is 'mean'; map:NAME was expected with sampler crfr_p"),
        ("terms.mimic.head_of=pixel", "terms.mimic.head_of is 'pixel'; null, or a term with a head of its own"),
        ("terms.mimic.head_of=pixels", "a term with the same tap, head, target"),
        ("mask.sampler=randm", "mask.sampler is 'randm'; did you mean random?"),
        ("mask.n_keep=0", "mask.n_keep is 0"),
        ("terms.mimic.tap=block0", "terms.mimic.tap is 'block0'"),
        ("terms.mimic.distance=sl1(3)", "did you mean"),
        ("terms.mimic.weight=-1", "terms.mimic.weight is -1.0; at least 0"),
        ("terms.mimic.positions=predicted", "tap final holds cls, pooled, visible, alive"),
        ("terms.mimic.transform=norm_pix", "teachers: none, ln0, l2, channel, phi_s, position, "),
        ("terms.pixels.transform=ln0", "pixels: none, norm_pix or norm_pix_biased"),
        ("terms.pixels.tap=final", "predicted"),
        ("terms.pixels.distance=cosd", "mse or l1 was expected"),
        ("terms.pixels.teachers=[clip]", "none was expected with target pixels"),
        ("terms.pixels.teacher_tap=block_8", "terms.pixels.teacher_tap is 'block_8'; null was expected"),
        ("terms.mimic={tap: final, positions: cls+visible, target: teachers, transform: phi_s}", "do not describe CLS"),
        ("terms.mimic.tap=mix0", "terms.mimic.tap is 'mix0'"),
        ("student.drop_path=1", "student.drop_path is 1.0; 0 <= rate < 1"),
        ("terms.new.weight=1", "terms.new.tap is missing"),
        ("terms.a/b={tap: final}", "has the name 'a/b'"),
        ("terms={}", "at least one term"),
        ("student.decoder=null", "student.decoder is null"),
        ("student.decoder.heads=7", "a divisor of the decoder's width 512"),
        ("prepare.mean=[0.5]", "as many numbers as in prepare.std"),
        ("prepare.std=[1, 1, 0]", "numbers above 0"),
        ("seed=a", "seed is 'a'; expected an integer"),
        ("seed", "--set 'seed': is not KEY=VALUE"),
        ("seed.x=1", "seed is 0, which has no keys"),
        ("optim.betas=[0.9", "not valid yaml"),
    ],
)
def test_wrong_overrides_are_refused_with_what_was_expected(override: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("mr-mae", [override])
    assert told in str(error.value)


def test_overrides_apply_in_order_and_numbers_may_look_like_1e_3() -> None:
    recipe = load_recipe(
        "mr-mae", ["optim.epochs=5", "optim.epochs=7", "optim.lr_per_256=1e-3", "terms.mimic.teachers=[dino]"]
    )
    assert (recipe.optim.epochs, recipe.optim.lr_per_256, recipe.terms["mimic"].teachers) == (7, 1e-3, ("dino",))


def test_a_term_set_to_null_is_dropped_and_a_decoder_can_be_added() -> None:
    assert list(load_recipe("mr-mae", ["terms.pixels=null"]).terms) == ["mimic"]
    decoder = load_recipe("mimic-only", ["student.decoder.depth=2"]).student.decoder
    assert decoder is not None and (decoder.depth, decoder.width) == (2, 512)


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean mr-mae"):
        load_recipe("mr-mea")
    with pytest.raises(ValueError, match="no such file"):
        load_recipe(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nname: b\n", "'name' appears twice"),
        ("- 1\n", "a mapping of recipe keys was expected"),
        ("name: [\n", "not valid yaml"),
        ("terms: {}\n", "name is missing"),
        ("name: x\nterms: 3\n", "terms is 3; expected a mapping"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid yaml"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(str(path))
    assert told in str(error.value) and "mine.yaml" in str(error.value)


def test_differences_are_named_and_equal_recipes_have_none() -> None:
    old, new = load_recipe("mr-mae"), load_recipe("mr-mae", ["optim.epochs=400", "terms.pixels=null"])
    assert difference(old, load_recipe("mr-mae")) == []
    found = {field: (before, after) for field, before, after in difference(old, new)}
    assert found["optim.epochs"] == (200, 400) and found["terms.pixels.tap"] == ("decoder", None)
    assert not [field for field in found if not field.startswith(("optim.epochs", "terms.pixels."))]


def test_averaged_weights_are_refused_with_batch_norms() -> None:
    with pytest.raises(
        ValueError, match="optim.name is 'schedule-free'; adamw or muon was expected with head predictor"
    ):
        load_recipe("lut", ["optim.name=schedule-free"])


def test_recipes_cannot_be_changed_by_accident() -> None:
    recipe: Recipe = load_recipe("mae")
    with pytest.raises(AttributeError):
        recipe.optim.epochs = 3  # type: ignore[misc]


def test_counts_follow_the_keep_floor_and_refuse_what_cannot_be() -> None:
    floors = {0.60: 78, 0.70: 58, 0.75: 49, 0.80: 39, 0.85: 29, 0.90: 19}
    for ratio, kept in floors.items():
        assert masks.counts(MaskRecipe(ratio=ratio), 196) == (kept, 196 - kept)
    assert masks.counts(MaskRecipe(n_keep=40, n_predict=0), 196) == (40, 0)
    light = load_recipe("mr-mae-light").mask
    assert [masks.counts(light, side**2) for side in (14, 8, 4, 2)] == [(49, 49), (16, 16), (4, 4), (1, 1)]
    for share, n in ((0.5, 6), (0.01, 1), (1, 1), (2.0, 2)):
        assert masks.counts(MaskRecipe(n_predict=share), 16) == (4, n)
    with pytest.raises(ValueError, match="at most 12 hidden.*change mask.n_predict, or give it as a share"):
        masks.counts(MaskRecipe(n_predict=49), 16)
    for value, said in (
        ("1.5", "1.5; a number of patches, a share of the hidden ones"),
        ("-1", "-1"),
        ("x", "expected a finite number"),
    ):
        with pytest.raises(ValueError, match=f"mask.n_predict is .*{said}"):
            load_recipe("mr-mae-light", [f"mask.n_predict={value}"])
    for wrong in (MaskRecipe(ratio=0.99), MaskRecipe(n_keep=17), MaskRecipe(n_keep=4, n_predict=13)):
        with pytest.raises(ValueError, match="mask"):
            masks.counts(wrong, 16)


def test_every_pair_of_shipped_recipes_differs() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    for one, other in itertools.combinations(recipes, 2):
        assert len(difference(one, other)) > 1  # more than the name
