"""Teachers in the step say what the cache says of them, on the same views, to within how it is stored."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import train_quietly

from mrmae.extract.run import Options, extract_features
from mrmae.shards.cache import open_cache
from mrmae.shards.format.spec import ViewRecipe
from mrmae.shards.stats import compute_stats, write_stats
from mrmae.train import cost, online
from mrmae.train.log import read_rows
from mrmae.train.method.recipe import load_recipe
from mrmae.train.ranks import Ranks
from mrmae.train.run import build_run
from mrmae.train.setup import Setup

QUICK = (
    "student.model=test_vit_of_3",
    "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
    "optim.epochs=1",
    "optim.batch_size=4",
    "optim.warmup_epochs=0",
)
TEACHERS = ("vit=timm:test_vit/random", "cnn=timm:test_convnext/random")


@pytest.fixture(scope="module")
def caches(tiny_images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of eight images with the features of two small timm models, stored as int8 and as float16."""
    root = tmp_path_factory.mktemp("online")
    for key, data in list(tiny_images.items())[:8]:
        (root / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / key).write_bytes(data)
    for dtype in ("int8", "float16"):
        how: dict[str, Any] = {"teachers": TEACHERS, "grid": 4, "dtype": dtype, "device": "cpu", "workers": 1}
        extract_features(Options([root / "images"], root / dtype, recipe=ViewRecipe(32), **how), say=lambda _: None)
    return {dtype: root / dtype for dtype in ("int8", "float16")}


def _losses(
    cache: Path, out: Path, recipe: str = "mr-mae", sets: Sequence[str] = (), **options: Any
) -> list[dict[str, float]]:
    train_quietly(cache, out, load_recipe(recipe, [*QUICK, *sets]), log_every=1, **options)
    return [{**row["terms"], "loss": row["loss"]} for row in read_rows(out / "log.jsonl", "step")]


@pytest.mark.parametrize("dtype, tolerance", [("int8", 5e-3), ("float16", 1e-4)])
def test_online_losses_are_the_cached_ones_within_quantisation(
    caches: dict[str, Path], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    cached = _losses(caches[dtype], tmp_path / "cached")
    live = _losses(caches[dtype], tmp_path / "live", online=True, panels_every=1)
    told, there = (json.loads((tmp_path / name / "run.json").read_text())["baselines"] for name in ("live", "cached"))
    for name, costs in there.items():
        assert told[name] == pytest.approx(costs, rel=20 * tolerance), "teachers in the step have baselines, too"
    assert cached[0].keys() == live[0].keys() == {"mimic/vit", "mimic/cnn", "pixels", "loss"} and len(live) == 2
    for a, b in zip(cached, live):
        assert a == pytest.approx(b, rel=tolerance)
    assert (tmp_path / "live" / "panels" / "epoch-0001.png").exists()


def test_relations_of_teachers_in_the_step_are_the_cached_ones(caches: dict[str, Path], tmp_path: Path) -> None:
    images, teacher = caches["int8"].parent / "images", "mae=timm:test_vit/random?tap=input_3"
    how: dict[str, Any] = {"grid": 4, "dtype": "float16", "device": "cpu", "workers": 1, "recipe": ViewRecipe(32)}
    extract_features(Options([images], tmp_path / "cache", teachers=[teacher], **how), say=lambda _: None)
    taps = [f"terms.{name}.{key}" for name in ("qk", "vv") for key in ("tap=qkv3", "teacher_tap=qkv_3")]
    sets = ("student.decoder=null", "optim.lr_per_256=0.1", *taps)
    cached = _losses(tmp_path / "cache", tmp_path / "cached", "tinymim", sets)
    live = _losses(tmp_path / "cache", tmp_path / "live", "tinymim", sets, online=True)
    assert len(live) == 2 and live[0].keys() == {"qk/mae:qkv_3", "vv/mae:qkv_3", "loss"}
    for a, b in zip(cached, live):
        assert a == pytest.approx(b, rel=1e-3)
    other = _losses(caches["int8"], tmp_path / "other", "tinymim", sets, online=True, teachers=(teacher,))
    assert [row["loss"] for row in other] == [row["loss"] for row in live], "no column of the cache is read"


def test_statistics_of_cached_features_serve_teachers_in_the_step_and_others_are_refused(
    caches: dict[str, Path], make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = open_cache(caches["float16"])
    for column in cache.columns:
        write_stats(cache, column, compute_stats(cache, column))
    for transform in ("channel", "phi_s", "position", "position+phi_s"):
        terms = (
            f"terms.mimic={{tap: final, positions: visible, target: teachers, teachers: [vit], transform: {transform}}}"
        )
        cached = _losses(cache.path, tmp_path / f"cached-{transform}", sets=[terms])
        live = _losses(cache.path, tmp_path / f"live-{transform}", sets=[terms], online=True)
        assert cached[0] == pytest.approx(live[0], rel=1e-3), transform
        views = make_cache(tmp_path / f"views-{transform}", n=8, n_views=1, teachers={})
        told = f"term mimic: transform {re.escape(transform)} wants statistics of teacher 'vit', which runs in the step and has no column"
        with pytest.raises(ValueError, match=told):
            _losses(views, tmp_path / "refused", sets=[terms], teachers=TEACHERS[:1])
    assert not (tmp_path / "refused").exists()


def test_masks_follow_the_attention_of_a_teacher_in_the_step(caches: dict[str, Path], tmp_path: Path) -> None:
    cached = _losses(caches["float16"], tmp_path / "cached", "mr-mae-focused")
    live = _losses(caches["float16"], tmp_path / "live", "mr-mae-focused", online=True)
    assert cached[0] == pytest.approx(live[0], rel=1e-3)  # the maps differ by float16's rounding: the same patches win


def test_a_cache_of_views_alone_is_enough_and_a_run_does_not_change_roads(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "views", n=8, n_views=1, teachers={})
    assert _losses(cache, tmp_path / "out", teachers=TEACHERS[:1])[0].keys() == {"mimic/vit", "pixels", "loss"}
    assert '"in the step"' in (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(ValueError, match="another cache: online teacher vit was sha256:"):
        _losses(cache, tmp_path / "out", teachers=["vit=timm:test_vit2/random"])
    with pytest.raises(ValueError, match="names no teacher to run"):
        _losses(cache, tmp_path / "other", online=True)


def test_another_teacher_under_a_cached_name_is_refused_naming_the_field(caches: dict[str, Path]) -> None:
    cache = open_cache(caches["int8"])
    with pytest.raises(ValueError, match="teacher vit: model is 'test_vit' there and 'test_vit2' in this command"):
        online.build_teachers(cache, ["vit=timm:test_vit2/random"], device=torch.device("cpu"))


def test_a_teacher_from_a_file_must_be_given_again(caches: dict[str, Path]) -> None:
    cache = open_cache(caches["int8"])
    spec = replace(cache.plan.columns[0], weights="file")
    with pytest.raises(ValueError, match="was loaded from a file.*--teacher .*@FILE"):
        online.request_of(spec, cache)


def test_attention_is_computed_only_where_it_is_read(caches: dict[str, Path]) -> None:
    for recipe, wanted in (("mr-mae", False), ("mr-mae-focused", True)):
        run = build_run(caches["int8"], Path("out"), load_recipe(recipe, QUICK), Ranks(), Setup("cpu", online=True))
        assert (run.online["vit"].tower.attention_row is not None) == wanted
    mae = build_run(caches["int8"], Path("out"), load_recipe("mae", QUICK), Ranks(), Setup("cpu", online=True))
    assert mae.online == {}


def test_the_plan_counts_operations_bytes_and_memory(caches: dict[str, Path]) -> None:
    recipe = load_recipe("mr-mae", [*QUICK, "student.decoder=null", "terms.pixels=null", "terms.mimic.teachers=[vit]"])
    run = build_run(caches["int8"], Path("out"), recipe, Ranks(), Setup("cpu"))
    whole, teachers = cost.teacher_flops(run)
    d, n, hidden = 64, 5, 192  # test_vit on four visible patches and CLS
    block = 2 * n * (4 * d * d + 2 * d * hidden) + 4 * n * n * d
    patches, head = 2 * 4 * 3 * 8 * 8 * d, 2 * 4 * d * 64
    assert teachers == 0
    assert cost.student_flops(run.model, *whole) == len(run.model.student.blocks) * block + patches + head
    assert cost.saved_bytes(run, *whole) > 10 * n * d * 4
    facts = cost.cost_facts(run)
    assert "GFLOP per image and step" in facts["operations"] and "features 1.06 kB" in facts["bytes read"]
    live = build_run(caches["int8"], Path("out"), recipe, Ranks(), Setup("cpu", online=True))
    assert cost.teacher_flops(live)[1] > 0 and "teachers" in cost.cost_facts(live)["operations"]
