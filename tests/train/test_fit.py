"""Shipped values give way to small data and narrow students only, and only where nobody has set them."""

from dataclasses import replace

import pytest

from mrmae.train import fit
from mrmae.train.method.recipe import DecoderRecipe, load_recipe, recipe_names


@pytest.mark.parametrize(
    "n, batch, warmup",
    [(16, 8, 20), (135, 64, 20), (300, 64, 20), (1_500, 64, 20), (5_000, 256, 20), (10_000, 512, 20), (32_767, 1024, 20),
     (32_768, 2048, 40), (1_281_167, 2048, 40)],
)  # fmt: skip
def test_batch_and_warm_up_fit_the_number_of_images(n: int, batch: int, warmup: float) -> None:
    recipe, told = fit.fitted_to_data(load_recipe("mr-mae"), n)
    assert (recipe.optim.batch_size, recipe.optim.warmup_epochs) == (batch, warmup)
    assert bool(told) == (n < 32_768) and all("--set" in line for line in told)


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_published_stays_as_it_is_at_its_size(name: str) -> None:
    recipe = load_recipe(name)
    for n, width in ((1_281_167, 768), (50_000, 1024)):
        assert fit.fitted_to_data(recipe, n) == (recipe, []) and fit.fitted_decoder(recipe, width, 12) == (recipe, [])


def test_what_was_set_is_never_replaced() -> None:
    sets = ("optim.batch_size=2048", "optim.warmup_epochs=40", "student.decoder.depth=8")
    for recipe in (load_recipe("mr-mae", sets), replace(load_recipe("mr-mae"), fit=())):
        assert fit.fitted_to_data(recipe, 300) == (recipe, []) and fit.fitted_decoder(recipe, 192, 12) == (recipe, [])
    half = load_recipe("mr-mae", sets[:1])
    recipe, (told,) = fit.fitted_to_data(half, 300)
    assert (recipe.optim.batch_size, recipe.optim.warmup_epochs) == (2048, 20) and "batch" not in told


@pytest.mark.parametrize(
    "override, key, hit",
    [("optim.batch_size=8", "optim.batch_size", True), ("optim={}", "optim.batch_size", True), ("optim.betas=[0, 0]", "optim.batch_size", False),
     ("student.decoder.depth=1", "student.decoder", True), ("student.decoder=null", "student.decoder", True), ("student.model=x", "student.decoder", False)],
)  # fmt: skip
def test_an_override_closes_the_keys_it_touches(override: str, key: str, hit: bool) -> None:
    assert (key not in load_recipe("mr-mae", ["terms.pixels=null", override.replace("{}", "{epochs: 3}")]).fit) == hit


@pytest.mark.parametrize(
    "width, depth, decoder",
    [(192, 12, (8, 128, 4)), (384, 12, (8, 256, 8)), (64, 6, (4, 32, 1)), (16, 1, (1, 32, 1)), (576, 24, (8, 384, 12))],
)
def test_a_decoder_fits_its_student(width: int, depth: int, decoder: tuple[int, int, int]) -> None:
    recipe, (told,) = fit.fitted_decoder(load_recipe("mae"), width, depth)
    assert recipe.student.decoder == DecoderRecipe(*decoder, mlp_ratio=4.0) and "instead of the shipped 8 x 512" in told
    assert fit.fitted_decoder(load_recipe("mimic-only"), width, depth)[1] == []
    kept, _ = fit.fitted_decoder(load_recipe("crossmae"), width, depth)
    assert kept.student.decoder is not None and kept.student.decoder.kind == "cross" and kept.student.decoder.weighted


def test_a_fitting_batch_splits_evenly() -> None:
    for parts in (1, 2, 3, 6, 8, 100):
        assert fit.fitting_batch(2048, 1_500, parts) % parts == 0
    assert fit.fitting_batch(2048, 1, 1) == 1


def test_a_small_learning_rate_is_said_with_one_that_was_tried() -> None:
    recipe, _ = fit.fitted_to_data(load_recipe("mr-mae"), 300)
    (told,) = fit.small_rate_words(recipe)
    assert "3.75e-05" in told and "--blr 0.004" in told
    assert fit.small_rate_words(load_recipe("mr-mae")) == []
