"""Training on maps of a cache: the plan names them, masks follow their values, and what does not fit is refused with what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from training import distance_of, restated, train_quietly

from mrmae.extract.inspect.cli import main as inspect_command
from mrmae.shards import commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format.spec import key_hash
from mrmae.train.feed import load_masked
from mrmae.train.method.recipe import Recipe
from mrmae.train.online import with_targets
from mrmae.train.ranks import Ranks
from mrmae.train.report import plan_lines, source_of
from mrmae.train.run import Run, build_run, cache_ids
from mrmae.train.setup import Setup

MakeRecipe = Callable[..., Recipe]
SHORT = ("optim.batch_size=4", "optim.epochs=1", "optim.warmup_epochs=0")
DEPTH = ("mask.sampler=score", "mask.source=map:depth", "mask.ratio=0.5")


def depth(key: str, view: int) -> np.ndarray[Any, Any]:
    """Scores of a key's view, some below 0."""
    return np.random.default_rng([key_hash(key), view]).normal(size=16).astype(np.float16)


def rank(key: str, view: int) -> np.ndarray[Any, Any]:
    """The same order as numbers, the largest above what int16 holds."""
    return (depth(key, view).argsort().argsort() * 4000).astype(np.uint16)


def latents(key: str, view: int) -> np.ndarray[Any, Any]:
    """Five numbers per patch of a key's view."""
    return np.random.default_rng([key_hash(key), view, 1]).normal(size=(16, 5)).astype(np.float16)


MAPS = {"depth": depth, "rank": rank, "latents": latents}


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("maps") / "cache", n=8, blocks=4, maps=MAPS)


def run_of(cache: Path, out: Path, recipe: Recipe, **setup: Any) -> Run:
    return build_run(cache, out, recipe, Ranks(), Setup(device="cpu", **setup))


def test_masks_follow_the_stored_values_of_each_view(cache: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    keys = open_cache(cache).keys
    for name in ("depth", "rank"):
        run = run_of(cache, tmp_path / "out", tiny_recipe("mae", *SHORT, *DEPTH, f"mask.source=map:{name}"))
        shown = []
        for epoch in (0, 1):
            batch, masks = load_masked(run, run.numbers, epoch=epoch)
            for key, hashed, keep in zip(keys, batch.samples.tolist(), masks.ids_keep.tolist()):
                values = depth(key, (epoch + hashed) % 2)
                assert keep == sorted(values.argsort(kind="stable")[:8].tolist()), name
            shown.append(masks.ids_keep)
        assert batch.targets[f"map:{name}"]["map"].dtype == (torch.int32 if name == "rank" else torch.float16)
        assert not torch.equal(*shown) and "column map:rank" in cache_ids(run) or name == "depth"


def test_a_term_reads_ids_and_tells_of_one_beyond_its_classes_and_of_scores(
    cache: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def run(*told: str) -> Run:
        return run_of(cache, tmp_path / "out", tiny_recipe("cae", *SHORT, "optim.min_lr=0", *told))

    whole = run("terms.ids.map=rank", "terms.ids.classes=60001")
    batch, _ = load_masked(whole, whole.numbers, epoch=0)
    assert sorted(batch.targets["map:rank"]["map"][0].tolist()) == [4000 * i for i in range(16)]
    assert "column map:rank" in cache_ids(whole)
    beyond = (
        r"map rank holds \d+ at patch \d+ of '.*'; for term ids ids below 60000 were expected; .*terms.ids.classes=N"
    )
    with pytest.raises(ValueError, match=beyond):
        load_masked(run("terms.ids.map=rank", "terms.ids.classes=60000"), whole.numbers, epoch=0)
    with pytest.raises(ValueError, match="predicts ids and the cache has map 'depth' of float16; a map of ids"):
        run("terms.ids.map=depth")


def test_a_map_beside_one_block_of_tokens_and_teachers_in_the_step_is_read_whole(
    cache: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    score = ("mask.predict=score", "mask.source=map:rank")
    blocks = ("mask.sampler=stored_block", "mask.n_predict=5", "terms.mimic.teachers=[a]")
    run = run_of(cache, tmp_path / "out", tiny_recipe("mr-mae", *SHORT, *score, *blocks))
    batch, masks = load_masked(run, run.numbers, epoch=0)
    assert batch.targets["a"]["tokens"].shape[1] == 4 and batch.targets["map:rank"]["map"].shape == (8, 16)
    assert masks.ids_predict.shape == (8, 5)
    live = run_of(
        cache, tmp_path / "live", tiny_recipe("mr-mae", *SHORT, *DEPTH), teachers=("vit=timm:test_vit/random",)
    )
    plain = run_of(cache, tmp_path / "plain", tiny_recipe("mae", *SHORT, *DEPTH))
    loaded = load_masked(live, live.numbers, epoch=0)
    batch, masks = with_targets(loaded, live.online, live.needed, model=live.model)
    assert set(batch.targets) == {"vit", "map:depth"} and "column map:depth" in cache_ids(live)
    assert torch.equal(masks.ids_keep, load_masked(plain, plain.numbers, epoch=0)[1].ids_keep)


def test_the_plan_and_the_run_say_which_map(cache: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = run_of(cache, tmp_path / "out", tiny_recipe("mae", *SHORT, *DEPTH))
    told = "\n".join(plan_lines(run))
    assert "scores, a float16 per patch, for mask.sampler score (mask.source map:depth)" in told
    assert "map rank: nothing of this recipe names it" in told and "0.0 KiB per image" in told
    assert source_of(run)["cache_ids"]["column map:depth"] == run.cache.ids["depth.map"]


def test_what_cannot_be_read_of_a_map_is_refused_with_what_to_do(
    cache: Path, make_cache: Callable[..., Path], tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lacking = "mask.source = map:dept: the cache has no map 'dept', it has depth, rank; .* --map dept=FILE"
    with pytest.raises(ValueError, match=lacking):
        train_quietly(cache, out, tiny_recipe("mae", *SHORT, *DEPTH, "mask.source=map:dept"))
    drawn = tiny_recipe("mae", *SHORT, *DEPTH, "mask.mode=multinomial")
    with pytest.raises(ValueError, match="map depth holds -.* at patch .* of '.*png'; .* shares, of at least 0, were"):
        train_quietly(cache, out, drawn)
    focused = tiny_recipe("mr-mae", *SHORT, "terms.mimic.focus=true", "mask.source=map:depth")
    with pytest.raises(ValueError, match="shares, of at least 0"):
        load_masked(run := run_of(cache, out, focused), run.numbers, epoch=0)
    copy = make_cache(tmp_path / "copy", n=8, maps=MAPS, teachers={})
    recipe = tiny_recipe("mae", *SHORT, *DEPTH)
    train_quietly(copy, tmp_path / "begun", recipe)
    assert CliRunner().invoke(inspect_command, ["drop", str(copy), "depth.map", "--yes"]).exit_code == 0
    with pytest.raises(ValueError, match="has no map 'depth', it has rank; .* --map depth=FILE"):
        train_quietly(copy, tmp_path / "begun", recipe)


def test_a_map_of_parts_holds_parts(make_cache: Callable[..., Path], tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    maps = {
        "ids": lambda key, view: np.arange(16, dtype=np.uint16) % 11,
        "wide": lambda key, view: np.full(16, 2048, np.uint16),
    }
    cache = make_cache(tmp_path / "cache", n=8, maps=maps | {"depth": depth}, teachers={})

    def masks_of(*overrides: str) -> Any:
        run = run_of(cache, tmp_path / "out", tiny_recipe("fsfm", *SHORT, "terms.mimic=null", *overrides))
        return load_masked(run, run.numbers, epoch=0)[1]

    told = "map ids holds 0 at patch 0 of .*; for mask.sampler crfr_p bits of the parts 0 to 10.* or use mask.parts=ids"
    with pytest.raises(ValueError, match=told):
        masks_of("mask.source=map:ids")
    assert masks_of("mask.source=map:ids", "mask.parts=ids").weight.shape == (8, 12)
    for kind, told in (
        ("bits", "wide holds 2048 .* bits of"),
        ("ids", "wide holds 2048 .* ids of the parts 0 to 10 were"),
    ):
        with pytest.raises(ValueError, match=told):
            masks_of("mask.source=map:wide", f"mask.parts={kind}")
    with pytest.raises(ValueError, match="map:depth: holds scores; with mask.sampler crfr_p ids or bits"):
        masks_of("mask.source=map:depth")
    with pytest.raises(ValueError, match="has no map 'parts', it has ids, wide, depth; .* --map parts=FILE"):
        masks_of()


def test_a_pinned_run_waits_for_its_map(
    make_cache: Callable[..., Path], tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = make_cache(tmp_path / "cache", n=24, n_views=1, maps=MAPS, teachers={}, finalise=False)
    (path / "commits/0/depth.map/000001.json").unlink()
    recipe = tiny_recipe("mae", *SHORT, *DEPTH, "prepare.columns=[]")
    with pytest.raises(ValueError, match="unfinished|not finished"):
        run_of(path, tmp_path / "out", recipe)
    assert len(run_of(path, tmp_path / "out", recipe, allow_partial=True).numbers) == 16
    ranked = tiny_recipe("mae", *SHORT, *DEPTH, "mask.source=map:rank", "prepare.columns=[]")
    assert len(run_of(path, tmp_path / "out", ranked).numbers) == 24
    assert commit.missing(path, open_cache(path, allow_partial=True).plan)


@pytest.mark.parametrize(("transform", "distance"), [("none", "mse"), ("ln0", "2*sl1(1)"), ("l2", "cosd")])
def test_numbers_of_a_map_are_predicted_where_they_stand(
    cache: Path, tiny_recipe: MakeRecipe, tmp_path: Path, transform: str, distance: str
) -> None:
    asked = (f"terms.latents.transform={transform}", f"terms.latents.distance={distance}")
    run = run_of(cache, tmp_path / "out", tiny_recipe("harmon-latents", *SHORT, *asked))
    batch, masks = load_masked(run, run.numbers, epoch=0)
    shown = [(hashed % 2) for hashed in batch.samples.tolist()]
    values = torch.stack([torch.from_numpy(latents(key, v)) for key, v in zip(open_cache(cache).keys, shown)])
    run.model.double()
    run.model.fill_constants(torch.float64)
    loss, _ = run.model(batch, masks)
    tokens = run.model.taps(batch, masks)["decoder"]
    goals = torch.stack([v[ids] for v, ids in zip(values.double(), tokens.ids)])
    told = run.model.heads["latents"](tokens.x)
    assert told.shape[2] == 5 and "column map:latents" in cache_ids(run)
    factor, name = (2, distance[2:]) if distance.startswith("2*") else (1, distance)
    again = factor * distance_of(told, restated(goals, goals, transform), name)
    assert abs((loss - again).item()) < 1e-10
    lines = "\n".join(plan_lines(run))
    assert "5 numbers, float16, per patch, for terms.latents" in lines


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (("terms.latents.map=depth",), "predicts numbers and the cache has map 'depth' of float16; a map of several"),
        (("terms.latents.classes=9", "terms.latents.distance=ce"), "predicts ids and the cache has map 'latents' of 5"),
        (("mask.law=fixed", "mask.sampler=score", "mask.source=map:latents"), "map:latents: holds 5 numbers per patch"),
    ],
)
def test_a_map_of_another_kind_is_refused(
    cache: Path, tiny_recipe: MakeRecipe, tmp_path: Path, told: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        run_of(cache, tmp_path / "out", tiny_recipe("harmon-latents", *SHORT, *told))
