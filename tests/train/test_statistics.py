"""Exact statistics of a column, and the targets made of them: `channel` and `phi_s`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training import distance_of, restated

from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.stats import compute_stats, read_stats, write_stats
from mrmae.train.batches import cache_info, load_batch, stored_statistics
from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import build_model
from mrmae.train.method.phi_s import hadamard, phi_s
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.targets import Batch, CacheInfo, TeacherInfo, TeacherStatistics
from mrmae.train.method.terms import needed_arrays

MakeRecipe = Callable[..., Recipe]
PHI = ["terms.mimic.teachers=[a]", "terms.mimic.transform=phi_s", "terms.pixels=null", "student.decoder=null"]


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache whose moments are stored, as `inspect-cache stats` stores them."""
    return with_moments(make_cache(tmp_path_factory.mktemp("statistics") / "cache"))


@pytest.fixture(scope="module")
def product_cache(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same in product codes."""
    return with_moments(make_cache(tmp_path_factory.mktemp("statistics") / "product", dtype="pq4"))


def with_moments(path: Path) -> Cache:
    opened = open_cache(path)
    for column in opened.columns:
        write_stats(opened, column, compute_stats(opened, column))
    return opened


def exact_values(a: TeacherInfo, raw: dict[str, Tensor]) -> Tensor:
    """What stored tokens stand for, in float64, by the formulas of docs/format.md."""
    if a.codebook:
        book = {name: tensor if name == "group" else tensor.double() for name, tensor in a.codebook.items()}
        codes = raw["tokens"].long()
        parts = [book["entries"][codes[..., g], k, None] * book["basis"][k] for k, g in enumerate(book["group"])]
        return book["mean"] + torch.stack(parts).sum(0)
    value = raw["tokens"].double() * raw["scale"].double()[..., None]
    return value if a.channel_std is None else value * a.channel_std.double() + a.channel_mean.double()


def all_tokens(cache: Cache, column: str) -> Tensor:
    views = [cache.read_tokens(column, cache.numbers, np.full(len(cache.numbers), v)) for v in range(cache.n_views)]
    return torch.cat(views).flatten(0, 1).double()


def test_only_what_the_terms_need_is_read(cache: Cache, tiny_recipe: MakeRecipe) -> None:
    info = cache_info(cache)
    assert stored_statistics(info, cache, tiny_recipe("mr-mae")) == info
    filled = stored_statistics(info, cache, tiny_recipe("mr-mae", *PHI))
    assert filled.teachers["b"] == info.teachers["b"]
    a = filled.teachers["a"]
    assert a.stats.covariance.shape == (8, 8) and a.stats.id == compute_stats(cache, "a.pre_tail").id


@pytest.mark.parametrize("name", ["position_mean", "residual_covariance"])
def test_moments_of_another_shape_are_damage(cache: Cache, name: str) -> None:
    column, whole = "b.pre_tail", read_stats(cache, "b.pre_tail")
    values = getattr(whole, name)
    try:
        for wrong in (values[:-1], values.float(), values * torch.nan):
            write_stats(cache, column, replace(whole, **{name: wrong}))
            with pytest.raises(
                ValueError, match=rf"b\.pre_tail\.safetensors: .*{name} is .*expected finite torch.float64"
            ):
                read_stats(cache, column)
    finally:
        write_stats(cache, column, whole)


# ---- phi_s


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 192, 384, 768, 1024, 1280, 1408, 1536, 1664])
def test_hadamard_matrices_are_orthonormal_and_flat(n: int) -> None:
    h = hadamard(n)
    assert (h.abs() - n**-0.5).abs().max() < 1e-15
    assert (h @ h.T - torch.eye(n)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [6, 10, 100 - 1])
def test_widths_without_a_hadamard_matrix_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} channels have no Hadamard matrix here"):
        hadamard(n)


def test_phi_s_gives_every_channel_variance_1_and_keeps_distances() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=draw).double() @ torch.randn(12, 12, generator=draw).double().mul(10) + 5
    covariance = torch.cov(x.T, correction=0)
    y = (x - x.mean(0)) @ phi_s(covariance).T
    assert y.mean(0).abs().max() < 1e-10
    assert torch.allclose(torch.cov(y.T, correction=0).diagonal(), torch.ones(12).double(), atol=1e-10)
    ratio = torch.pdist(y) / torch.pdist(x)
    assert ((ratio - ratio[0]).abs() < 1e-10 * ratio[0]).all()
    spread = covariance.diagonal().max() / covariance.diagonal().min()
    assert spread > 1.5  # there was something to level


def test_phi_s_of_features_that_do_not_vary_is_refused() -> None:
    with pytest.raises(ValueError, match="no variance"):
        phi_s(torch.zeros(4, 4))


# ---- in a model, on a real (small) cache


def on_cache(cache: Cache, recipe: Recipe) -> tuple[CacheInfo, Batch]:
    info = stored_statistics(cache_info(cache), cache, recipe)
    return info, load_batch(cache, cache.numbers[:4], epoch=0, needed=needed_arrays(recipe, info))


CASES = (
    ("mse", "phi_s", "visible"),
    ("sl1(1)", "phi_s", "visible"),
    ("mse", "channel", "visible"),
    ("mse", "position", "visible"),
    ("cosd", "position", "cls"),
    ("sl1(1)", "position", "cls+visible"),
    ("mse", "position+ln0", "cls+visible"),
    ("mse", "position+phi_s", "cls+visible"),
    ("mse", "none", "visible"),
    ("mse", "ln0", "cls+visible"),
)


@pytest.mark.parametrize(
    ("kind", "distance", "transform", "positions"),
    [("cache", *case) for case in CASES[:8]] + [("product_cache", *case) for case in CASES[2:] if case[0] == "mse"],
)
def test_the_term_equals_its_restatement(
    kind: str, tiny_recipe: MakeRecipe, distance: str, transform: str, positions: str, request: pytest.FixtureRequest
) -> None:
    cache: Cache = request.getfixturevalue(kind)
    what = (f"terms.mimic.distance={distance}", f"terms.mimic.transform={transform}")
    recipe = tiny_recipe("mr-mae", *PHI, *what, f"terms.mimic.positions={positions}")
    info, batch = on_cache(cache, recipe)
    model = build_model(recipe, info, dtype=torch.float64)
    masks = draw_masks(batch, Draw(0, 0), recipe=recipe.mask, l=info.n_patches)
    a, raw, goals = info.teachers["a"], batch.targets["a"], []
    if "cls" in positions:
        views = [cache.read_cls("a.pre_tail", cache.numbers, cache.numbers * 0 + v) for v in range(cache.n_views)]
        goals.append(restated(torch.cat(views)[:, None].double(), raw["cls"][:, None].double(), transform))
    if "visible" in positions:
        everything = all_tokens(cache, "a.pre_tail").unflatten(0, (-1, info.n_patches))
        goal = restated(everything, exact_values(a, raw), transform)
        goals.append(torch.stack([image[ids] for image, ids in zip(goal, masks.ids_keep)]))
    told = model.encode(batch.pixels, masks.ids_keep)[0]
    told = model.heads["mimic/a"](told[:, :1] if positions == "cls" else told[:, positions == "visible" :])
    expected, got = distance_of(told, torch.cat(goals, 1), distance), model(batch, masks)[0]
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)
    weight = model.heads["mimic/a"].weight
    for ours, theirs in zip(*(torch.autograd.grad(x, weight, retain_graph=True) for x in (got, expected))):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    rows = torch.arange(4)[:, None]
    picked = {name: v[rows, masks.ids_keep] if name in ("tokens", "scale") else v for name, v in raw.items()}
    gathered = replace(batch, targets={"a": picked}, rows="visible")
    assert model(gathered, masks)[0].item() == model(batch, masks)[0].item()
    assert all(torch.isfinite(p.grad).all() for p in backward(model, batch, masks))


def backward(model: torch.nn.Module, batch: Batch, masks: Masks) -> list[Tensor]:
    model(batch, masks)[0].backward()
    return [p for p in model.parameters() if p.requires_grad]


def test_a_zero_prediction_of_phi_s_costs_1(cache: Cache, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("mr-mae", *PHI, "mask.n_keep=16", "mask.n_predict=0")
    info = stored_statistics(cache_info(cache), cache, recipe)
    model = build_model(recipe, info, dtype=torch.float64)
    model.heads["mimic/a"].weight.data.zero_()  # type: ignore[operator]
    total, views = 0.0, range(cache.n_views)
    for view in views:
        raw = cache.read_column("a.pre_tail", cache.numbers, np.full(len(cache.numbers), view))
        side = (len(cache.numbers), info.size, info.size, 3)
        batch = Batch(cache.hashes[cache.numbers], torch.zeros(side, dtype=torch.uint8), {"a": raw})
        masks = draw_masks(batch, Draw(0, 0), recipe=recipe.mask, l=16)
        total += model(batch, masks)[0].item() / len(views)
    assert total == pytest.approx(1.0, abs=1e-6)


def test_the_rotation_is_saved_with_the_weights_and_applied_outside_autocast(
    cache: Cache, tiny_recipe: MakeRecipe
) -> None:
    recipe = tiny_recipe("mr-mae", *PHI)
    info, batch = on_cache(cache, recipe)
    model = build_model(recipe, info)
    masks = draw_masks(batch, Draw(0, 0), recipe=recipe.mask, l=info.n_patches)
    state = model.state_dict()
    assert [name for name in state if name.startswith("statistics")] == ["statistics.mimic/a.phi"]
    like = torch.zeros(4, masks.ids_keep.shape[1], 8)
    statistics, raw = model.statistics["mimic/a"], batch.targets["a"]
    assert isinstance(statistics, TeacherStatistics)
    stored = (
        raw["tokens"],
        masks.ids_keep,
        raw["scale"],
        statistics.channel_mean,
        statistics.channel_std,
        masks.ids_keep,
    )
    exact = statistics.values(*stored, like=like)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(statistics.values(*stored, like=like), exact)
    flipped = {**state, "statistics.mimic/a.phi": -state["statistics.mimic/a.phi"]}
    before = model(batch, masks)[0].item()
    model.load_state_dict(flipped)
    assert model(batch, masks)[0].item() != before


def test_the_rotation_of_a_teacher_is_computed_once(
    cache: Cache, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def phi(covariance: Tensor) -> Tensor:
        counted.append(len(covariance))
        return phi_s(covariance)

    monkeypatch.setattr("mrmae.train.method.targets.phi_s", phi)
    second = (
        "terms.more={tap: final, positions: visible, target: teachers, teachers: [a], transform: phi_s, distance: mse}"
    )
    recipe = tiny_recipe("mr-mae", *PHI, second)
    model = build_model(recipe, stored_statistics(cache_info(cache), cache, recipe))
    assert counted == [8] and set(model.statistics) == {"mimic/a", "more/a"}
    assert torch.equal(model.state_dict()["statistics.mimic/a.phi"], model.state_dict()["statistics.more/a.phi"])


def test_phi_s_of_a_width_without_hadamard_matrix_is_refused_when_the_model_is_built(
    cache: Cache, tiny_recipe: MakeRecipe
) -> None:
    recipe = tiny_recipe("mr-mae", *PHI, "terms.mimic.teachers=[b]")
    with pytest.raises(ValueError, match="6 channels have no Hadamard matrix here"):
        build_model(recipe, stored_statistics(cache_info(cache), cache, recipe))
