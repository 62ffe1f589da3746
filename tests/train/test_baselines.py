"""Baselines are what they say: brute force over every image finds the same costs, and no constant does better."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from training import distance_of, restated, train_quietly

from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.stats import compute_stats, shared_energy, write_stats
from mrmae.train import baselines, rehearsal
from mrmae.train.log import read_rows
from mrmae.train.method.distances import LABEL_DISTANCES
from mrmae.train.method.hog import hog_targets
from mrmae.train.method.recipe import Recipe
from mrmae.train.ranks import Ranks
from mrmae.train.report import plan_lines
from mrmae.train.run import Run, build_run
from mrmae.train.setup import Setup

MakeRecipe = Callable[..., Recipe]
SHORT = ("optim.batch_size=8", "optim.warmup_epochs=0", "optim.epochs=1")
ONLY = ("terms.mimic.teachers=[a]", "terms.pixels=null", "student.decoder=null")


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache with moments; 11 images in two views, in token blocks."""
    opened = open_cache(make_cache(tmp_path_factory.mktemp("baselines") / "cache", n=11, blocks=4))
    write_stats(opened, "a.pre_tail", compute_stats(opened, "a.pre_tail"))
    return opened


def run_of(cache: Cache, recipe: Recipe, out: Path) -> Run:
    return build_run(cache.path, out, recipe, Ranks(), Setup(device="cpu"))


def costs_of_constants(targets: Tensor, distance: str) -> dict[str, float]:
    """Zero, one constant, one per position: the mean target, or for cosines the mean unit target."""
    factor, name = (2, distance[2:]) if distance.startswith("2*") else (1, distance)
    x = torch.nn.functional.normalize(targets, dim=-1) if distance == "cosd" else targets
    guesses = {"zero": x * 0, "constant": x.mean((0, 1)).expand_as(x), "position": x.mean(0).expand_as(x)}
    return {kind: factor * distance_of(guess, targets, name).item() for kind, guess in guesses.items()}


@pytest.mark.parametrize(
    ("transform", "distance", "positions"),
    [
        ("none", "mse", "visible"),
        ("ln0", "mse", "visible"),
        ("ln0", "2*sl1(1)", "cls+visible"),
        ("l2", "cosd", "visible"),
        ("channel", "mse", "visible"),
        ("phi_s", "mse", "visible"),
        ("position", "mse", "cls+visible"),
        ("position+ln0", "cosd", "visible"),
        ("position+phi_s", "sl1(1)", "cls"),
    ],
)
def test_costs_are_those_of_brute_force(
    cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path, transform: str, distance: str, positions: str
) -> None:
    what = (f"transform={transform}", f"distance={distance}", f"positions={positions}")
    recipe = tiny_recipe("mr-mae", *ONLY, *SHORT, *(f"terms.mimic.{x}" for x in what))
    got = baselines.baselines_of(run_of(cache, recipe, tmp_path), keep=False)["mimic/a"]
    assert got.pop("images") == 11
    views = [cache.numbers * 0 + view for view in range(2)]
    parts = []
    if "visible" in positions:
        parts.append((4, torch.cat([cache.read_tokens("a.pre_tail", cache.numbers, view) for view in views])))
    if "cls" in positions:
        parts.append((1, torch.cat([cache.read_cls("a.pre_tail", cache.numbers, view)[:, None] for view in views])))
    costs = [(n, costs_of_constants(restated(x.double(), x.double(), transform), distance)) for n, x in parts]
    total = sum(n for n, _ in costs)
    assert got == pytest.approx({kind: sum(n * c[kind] for n, c in costs) / total for kind in got}, rel=1e-5)
    assert got["position"] <= got["constant"] + 1e-6


@pytest.mark.parametrize("distance", ["mse", "cosd"])
def test_no_constant_costs_less(cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path, distance: str) -> None:
    recipe = tiny_recipe("mr-mae", *ONLY, *SHORT, f"terms.mimic.distance={distance}")
    got = baselines.baselines_of(run_of(cache, recipe, tmp_path), keep=False)["mimic/a"]
    x = torch.cat([cache.read_tokens("a.pre_tail", cache.numbers, cache.numbers * 0 + v) for v in range(2)]).double()
    targets = restated(x, x, "ln0")
    token = targets.mean((0, 1)).clone().requires_grad_()
    for _ in range(200):
        cost = distance_of(token.expand_as(targets), targets, distance)
        assert cost.item() > got["constant"] * (1 - 1e-6)
        token = (token - 0.5 * torch.autograd.grad(cost, token)[0]).detach().requires_grad_()
    assert cost.item() == pytest.approx(got["constant"], rel=1e-3)


def test_pixels_are_measured_against_each_patchs_mean(cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    x = torch.cat([cache.read_pixels(cache.numbers, cache.numbers * 0 + v) for v in range(2)]).double()
    mean, std = (torch.tensor(v).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((x / 255 - mean) / std).reshape(-1, 4, 8, 4, 8, 3).transpose(2, 3).reshape(-1, 16, 192)
    for transform, expected in {
        "norm_pix": (x.var(-1, correction=0) / (x.var(-1) + 1e-6)).mean(),
        "none": x.var(-1, correction=0).mean(),
    }.items():
        recipe = tiny_recipe("mae", *SHORT, f"terms.pixels.transform={transform}")
        got = baselines.baselines_of(run_of(cache, recipe, tmp_path), keep=False)
        assert got["pixels"] == pytest.approx({"patch_mean": expected.item(), "images": 11}, rel=1e-5)


def test_absolute_errors_of_pixels_are_measured_likewise(cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    x = torch.cat([cache.read_pixels(cache.numbers, cache.numbers * 0 + v) for v in range(2)]).double()
    mean, std = (torch.tensor(v).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((x / 255 - mean) / std).reshape(-1, 4, 8, 4, 8, 3).transpose(2, 3).reshape(-1, 16, 192)
    got = baselines.baselines_of(run_of(cache, tiny_recipe("satvision", *SHORT), tmp_path), keep=False)["pixels"]
    expected = (x - x.mean(-1, keepdim=True)).abs().mean().item()
    assert got == pytest.approx({"patch_mean": expected, "images": 11}, rel=1e-5)


def test_ids_and_numbers_of_maps_have_baselines(
    make_cache: Callable[..., Path], tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def ids(key: str, view: int) -> Any:
        return np.random.default_rng([len(key), view, sum(key.encode())]).integers(0, 3, 16).astype(np.uint16)

    def latents(key: str, view: int) -> Any:
        return np.random.default_rng([view, sum(key.encode())]).normal(1, 2, (16, 5)).astype(np.float16)

    path = make_cache(tmp_path / "cache", n=7, teachers={}, maps={"ids": ids, "latents": latents})
    opened = open_cache(path)
    views = [opened.numbers * 0 + view for view in range(2)]
    held = {
        name: torch.cat([opened.read_column(f"{name}.map", opened.numbers, v, ("map",))["map"] for v in views])
        for name in ("ids", "latents")
    }
    recipe = tiny_recipe("meissonic-ids", "optim.batch_size=4", *SHORT[1:], "terms.ids.classes=5")
    got = baselines.baselines_of(run_of(opened, recipe, tmp_path))["ids"]
    share = torch.bincount(held["ids"].flatten().long(), minlength=5).double() / held["ids"].numel()
    entropy = -sum(float(p * p.log()) for p in share if p > 0)
    assert got == pytest.approx({"zero": math.log(5), "constant": entropy, "images": 7}, rel=1e-6)
    assert baselines.baselines_of(run_of(opened, recipe, tmp_path), keep=False)["ids"] == got, "from the file"
    with pytest.raises(ValueError, match=r"map ids holds 2 at patch .*; for term ids ids below 2 were expected"):
        baselines.baselines_of(
            run_of(
                opened, tiny_recipe("meissonic-ids", "optim.batch_size=4", *SHORT[1:], "terms.ids.classes=2"), tmp_path
            )
        )
    for transform, distance in (("none", "mse"), ("ln0", "2*sl1(1)")):
        told = (f"terms.latents.transform={transform}", f"terms.latents.distance={distance}")
        recipe = tiny_recipe("harmon-latents", "optim.batch_size=4", *SHORT[1:], *told)
        got = baselines.baselines_of(run_of(opened, recipe, tmp_path), keep=False)["latents"]
        x = held["latents"].double()
        costs = costs_of_constants(restated(x, x, transform), distance)
        assert got == pytest.approx(costs | {"images": 7}, rel=1e-4)


@pytest.mark.parametrize("distance", ["bce", "asl", "ce"])
def test_the_best_logits_without_an_image_are_found(distance: str) -> None:
    shares = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    got = baselines.label_costs(shares, distance)
    y = torch.eye(3, dtype=torch.float64)[torch.tensor([0] * 2 + [1] * 7 + [2])][:, None]

    def cost(z: Tensor) -> Tensor:
        return LABEL_DISTANCES[distance](z.expand(10, 1, 3), y).mean()

    assert got["zero"] == pytest.approx(cost(torch.zeros(3, dtype=torch.float64)).item())
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = cost(z)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    assert got["constant"] == pytest.approx(cost(z).item(), abs=2e-5)


def test_labels_and_contrast_are_counted_and_the_plan_says_who_has_none(
    cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The cache's folders hold 4, 4 and 3 of 11 images."""
    run = run_of(cache, tiny_recipe("heuristic", *SHORT), tmp_path)
    run.baselines = baselines.baselines_of(run, keep=False)
    best = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (4 / 11, 4 / 11, 3 / 11)) / 3
    told = {"zero": math.log(2), "constant": best, "images": 11}
    assert run.baselines["labels"] == pytest.approx(told, abs=1e-5)
    assert run.baselines["contrast"] == {"constant": math.log(8), "images": 11}
    assert baselines.explained_shares({"labels": 0.0}, run.baselines) == {"constant": {"labels": 1.0}}
    lut = run_of(cache, tiny_recipe("lut", *SHORT), tmp_path)
    assert any(
        "baseline context" in line and "none: its target changes with the student" in line for line in plan_lines(lut)
    )


def test_gradients_of_pixels_have_baselines_like_tokens(
    make_cache: Callable[..., Path], tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    cache = open_cache(make_cache(tmp_path / "cache", n=5))
    term = "terms.hog={tap: decoder, positions: predicted, target: hog, distance: mse}"
    got = baselines.baselines_of(run_of(cache, tiny_recipe("mae", "optim.batch_size=4", *SHORT[1:], term), tmp_path))
    x = torch.cat([cache.read_pixels(cache.numbers, cache.numbers * 0 + v) for v in range(2)])
    expected = costs_of_constants(hog_targets(x, 8, dtype=torch.float64), "mse")
    assert got["hog"] == pytest.approx({**expected, "images": 5}, rel=1e-5)


def test_several_ranks_measure_it_together(
    cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "IMAGES_AT_ONCE", 3)
    monkeypatch.setattr(baselines, "gather", lambda mine, ranks: [mine])
    run = run_of(cache, tiny_recipe("mr-mae", *ONLY, *SHORT), tmp_path)
    wanted = {y.id: y for y, _ in baselines.yardsticks(run, run.model.terms[0])}
    (whole,) = baselines.total_sums(run, wanted, {}, None, None).values()
    parts = []
    for rank in range(2):
        run.ranks = Ranks(rank, 2)
        parts += baselines.total_sums(run, wanted, {}, None, None).values()
    assert parts[0].n == 2 * 6 and parts[1].n == 2 * 5
    both = parts[0].plus(parts[1])
    assert both.n == whole.n and torch.allclose(both.first, whole.first) and torch.allclose(both.second, whole.second)


# ---- in a run


def test_a_run_tells_its_baselines_and_what_is_explained_beyond_them(
    make_cache: Callable[..., Path], tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, recipe = make_cache(tmp_path / "cache", n=12), tiny_recipe("mr-mae", *SHORT)
    console = Console(record=True, width=400, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    train_quietly(path, tmp_path / "one", recipe, console)
    facts = json.loads((tmp_path / "one" / "run.json").read_text())["baselines"]
    assert facts.keys() == {"mimic/a", "mimic/b", "pixels"} and facts["pixels"].keys() == {"patch_mean", "images"}
    assert facts["mimic/a"].keys() == {"zero", "constant", "position", "images"}
    (row,) = read_rows(tmp_path / "one" / "log.jsonl", "epoch")
    for name in ("mimic/a", "mimic/b"):
        expected = 1 - row["terms"][name] / facts[name]["position"]
        assert row["explained"]["position"][name] == pytest.approx(expected)
    said = console.export_text()
    assert f"baseline mimic/a zero {facts['mimic/a']['zero']:.4g}, one constant" in " ".join(said.split())
    assert "explained beyond position mimic/a" in said

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(baselines, "blind_costs", refuse)
    train_quietly(path, tmp_path / "two", recipe)
    again = json.loads((tmp_path / "two" / "run.json").read_text())["baselines"]
    assert again == facts and not (tmp_path / "two" / "baselines.json").exists()
    (path / "stats" / "baselines.json").write_text('{"sha256:x": {"zero": null}, "sha256:y": []}')
    with pytest.raises(AssertionError, match="measured again"):
        train_quietly(path, tmp_path / "three", recipe)


def test_a_cache_that_cannot_be_written_leaves_them_in_out(
    make_cache: Callable[..., Path], tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, recipe, real = make_cache(tmp_path / "cache", n=12), tiny_recipe("mr-mae", *SHORT), baselines.publish

    def publish(file: Path, *args: Any, **how: Any) -> Any:
        if path in file.parents:
            raise PermissionError("read-only")
        return real(file, *args, **how)

    monkeypatch.setattr(baselines, "publish", publish)
    train_quietly(path, tmp_path / "out", recipe)
    assert (tmp_path / "out" / "baselines.json").exists() and not (path / "stats").exists()
    run = run_of(open_cache(path), recipe, tmp_path / "out")
    monkeypatch.setattr(baselines, "blind_costs", lambda *_: pytest.fail("measured again"))
    assert baselines.baselines_of(run).keys() == {"mimic/a", "mimic/b", "pixels"}


def test_a_dry_run_estimates_them_and_writes_nothing(
    make_cache: Callable[..., Path], tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_cache(tmp_path / "cache", n=12)
    monkeypatch.setattr(rehearsal, "BASELINE_IMAGES", 8)
    lines = rehearsal.dry_run(path, tmp_path / "out", tiny_recipe("mr-mae", *SHORT), Setup(device="cpu"))
    (line,) = [line for line in lines if line.startswith("baseline mimic/a")]
    assert "one per position" in line and "(about: from 8 images)" in line
    assert not (path / "stats").exists() and not (tmp_path / "out").exists()


def test_explained_shares_are_of_the_best_blind_prediction() -> None:
    told = {"m": {"zero": 1.0, "constant": 0.5, "position": 0.25, "images": 3}, "p": {"patch_mean": 0.8, "images": 3}}
    shares = baselines.explained_shares({"m": 0.3, "p": 0.2}, told)
    assert shares == {"position": {"m": pytest.approx(-0.2)}, "patch_mean": {"p": pytest.approx(0.75)}}
    assert baselines.explained_shares({}, told) == {}


def test_the_energy_that_images_share_is_estimated_without_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(16, 64, generator=draw) + torch.randn(64, generator=draw)
    tokens = shared + torch.randn(400, 16, 64, generator=draw)

    class Drawn:
        """A cache of these tokens."""

        def __init__(self, n: int) -> None:
            self.numbers = torch.arange(n).numpy()

        def read_tokens(self, column: str, numbers: Any, views: Any) -> Tensor:
            return tokens[torch.from_numpy(numbers)]

    few, many = (shared_energy(Drawn(n), "x") for n in (40, 400))  # type: ignore[arg-type]
    assert few == pytest.approx(many, abs=0.01)
    assert many == pytest.approx((1 / 3, 2 / 3), abs=0.06)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"x": {"zero": ' + "1" * 4000 + "}}",
        '{"x": {"zero": 1e999}}',
        '{"x": 3}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_a_damaged_file_of_baselines_is_as_if_it_were_not(
    cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path, content: str | bytes
) -> None:
    run = run_of(cache, tiny_recipe("mr-mae", *SHORT, *ONLY), tmp_path)
    told = baselines.baselines_of(run, keep=False)
    tmp_path.joinpath("baselines.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert baselines.baselines_of(run) == told
    kept = json.loads((cache.path / "stats" / "baselines.json").read_text())
    (tmp_path / "baselines.json").write_text(json.dumps(kept | {"more": {"zero": "x" * baselines.MOST_BYTES}}))
    assert baselines.stored_costs(tmp_path / "baselines.json") == {}
