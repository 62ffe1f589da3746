"""Terms at a tap behind the final norm train on what is stored before it, from the same bytes, to the same loss."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mrmae.shards import commit
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import plan
from mrmae.shards.format import tail as tail_files
from mrmae.shards.stats import compute_stats, write_stats
from mrmae.train import batches
from mrmae.train.feed import load_masked
from mrmae.train.method.masks import draw_of
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.targets import CacheInfo, TeacherInfo
from mrmae.train.online import online_info
from mrmae.train.ranks import Ranks
from mrmae.train.run import Run, build_run
from mrmae.train.setup import Setup

SHORT = ("optim.batch_size=8", "optim.warmup_epochs=0", "optim.epochs=1")
ONLY = "terms.mimic.teachers=[a]"


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache in blocks whose teacher a has a norm and a projection to 5 channels behind its 8."""
    path = make_cache(tmp_path_factory.mktemp("derived") / "cache", finalise=False, blocks=4)
    draw = torch.Generator().manual_seed(0)
    norm = {"layer_norm.weight": torch.rand(8, generator=draw) + 0.5, "layer_norm.bias": torch.randn(8, generator=draw)}
    tail = norm | {"layer_norm.eps": torch.tensor(1e-5), "proj.weight": torch.randn(5, 8, generator=draw)}
    tail_files.write_tail(path, "a", tail)
    commit.finalise(path, plan.load_plan(path))
    return open_cache(path)


def run_of(cache: Cache, recipe: Recipe, out: Path) -> Run:
    return build_run(cache.path, out, recipe, Ranks(), Setup(device="cpu"))


@pytest.mark.parametrize("tap, transform", [("post_ln", "ln0"), ("projected", "none"), ("post_ln", "channel")])
@pytest.mark.parametrize("sampler", ["random", "stored_block"])
def test_the_loss_is_that_of_the_derived_column(
    cache: Cache, tiny_recipe: Callable[..., Recipe], tmp_path: Path, tap: str, transform: str, sampler: str
) -> None:
    if transform == "channel":
        write_stats(cache, f"a.{tap}", compute_stats(cache, f"a.{tap}"))
    term = (f"terms.mimic.transform={transform}", "terms.mimic.positions=cls+visible") if transform == "none" else (
        f"terms.mimic.transform={transform}",)  # fmt: skip
    change = (ONLY, *SHORT, *term, f"mask.sampler={sampler}")
    run = run_of(cache, tiny_recipe("mr-mae", *change, f"terms.mimic.teacher_tap={tap}"), tmp_path)
    assert run.needed.keys() == {"a"} and "norm" not in run.needed["a"], "nothing but the stored column is read"
    numbers = run.numbers[:4]
    batch, masks = load_masked(run, numbers, epoch=0)
    assert masks is not None
    got = run.model(batch, masks)[1][f"mimic/a:{tap}"]

    views = batches.views_of(cache, numbers, epoch=0)
    column = f"a.{tap}"
    targets = {"tokens": cache.read_tokens(column, numbers, views), "cls": cache.read_cls(column, numbers, views)}
    about = run.info.derived[f"a:{tap}"]
    told = TeacherInfo(about.width, None, None, True, True, column, False, stats=about.stats)
    info = CacheInfo(cache.size, cache.grid, {"a": told}, blocks=cache.blocks, n_views=cache.n_views)
    model = build_model(tiny_recipe("mr-mae", *change), info)
    state = {name.replace(f"a:{tap}", "a"): tensor for name, tensor in run.model.state_dict().items()}
    model.load_state_dict(state)
    expected = model(dataclasses.replace(batch, targets={"a": targets}, rows="grid"), masks)[1]["mimic/a"]
    assert torch.allclose(got, expected, rtol=1e-6, atol=0)


def test_a_tail_applies_to_a_stored_block_too_under_a_name_of_its_own(
    make_cache: Callable[..., Path], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = make_cache(
        tmp_path / "cache",
        teachers={"a": {"width": 8, "tap": "block_7", "has_cls": True, "has_attention": True}},
        n_views=1,
        finalise=False,
    )
    draw = torch.Generator().manual_seed(0)
    weight, bias, proj = (torch.randn(shape, generator=draw) for shape in ((8,), (8,), (5, 8)))
    tail = {
        "layer_norm.weight": weight,
        "layer_norm.bias": bias,
        "layer_norm.eps": torch.tensor(1e-5),
        "proj.weight": proj,
    }
    tail_files.write_tail(path, "a", tail)
    commit.finalise(path, plan.load_plan(path))
    cache = open_cache(path)
    assert sorted(cache.derived) == ["a.block_7_post_ln", "a.block_7_projected"]
    stored = cache.read_tokens("a.block_7", [3], [0])[0, 2]
    normed = (stored - stored.mean()) / (stored.var(unbiased=False) + 1e-5).sqrt() * weight + bias
    assert torch.allclose(cache.read_tokens("a.block_7_post_ln", [3], [0])[0, 2], normed, atol=1e-5)
    assert torch.allclose(cache.read_tokens("a.block_7_projected", [3], [0])[0, 2], proj @ normed, atol=1e-5)
    change = ("terms.mimic.teacher_tap=block_7_projected", "terms.mimic.positions=cls+visible", *SHORT)
    run = run_of(cache, tiny_recipe("mr-mae", *change), tmp_path / "out")
    assert [term.name for term in run.model.terms] == ["mimic/a:block_7_projected", "pixels"]
    assert run.model(*load_masked(run, run.numbers[:4], epoch=0))[0].isfinite()  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"wants tap block_8_projected .* the cache has a.block_7; .*[?]tap=block_8, with"
    ):
        run_of(cache, tiny_recipe("mr-mae", "terms.mimic.teacher_tap=block_8_projected", *SHORT), tmp_path / "other")


def test_only_a_term_that_names_the_tap_predicts_it(
    cache: Cache, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = run_of(cache, tiny_recipe("mr-mae", *SHORT), tmp_path)
    assert [term.name for term in run.model.terms] == ["mimic/a", "mimic/b", "pixels"]
    run = run_of(cache, tiny_recipe("mr-mae", *SHORT, "terms.mimic.teacher_tap=projected"), tmp_path)
    assert [term.name for term in run.model.terms] == ["mimic/a:projected", "pixels"]
    assert run.model.heads["mimic/a:projected"].out_features == 5  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="wants tap post_ln of teacher 'b'; the cache has a.pre_tail, b.pre_tail"):
        run_of(
            cache,
            tiny_recipe("mr-mae", *SHORT, "terms.mimic.teacher_tap=post_ln", "terms.mimic.teachers=[b]"),
            tmp_path,
        )


def test_teachers_in_the_step_give_floats_behind_the_same_tail(
    cache: Cache, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe, info = tiny_recipe("mr-mae", ONLY, "terms.mimic.teacher_tap=post_ln"), batches.cache_info(cache)
    floats = dataclasses.replace(info.derived["a:post_ln"], channel_mean=None, channel_std=None, has_scale=False)
    live = online_info(info, {})
    assert live.derived == {} and not live.teachers, "no teacher, nothing that follows from it"
    told = dataclasses.replace(info.teachers["a"], channel_mean=None, channel_std=None, has_scale=False)
    model = build_model(recipe, dataclasses.replace(info, teachers={"a": told}, derived={"a:post_ln": floats}))
    numbers = cache.numbers[:3]
    batch = batches.load_batch(cache, numbers, epoch=0, needed={})
    tokens = cache.read_tokens("a.pre_tail", numbers, batches.views_of(cache, numbers, epoch=0))
    batch = dataclasses.replace(batch, targets={"a": {"tokens": tokens}})
    loss = model(batch, draw_masks(batch, draw_of(recipe, info, 0), recipe=recipe.mask, l=16))[0]
    assert loss.isfinite()
