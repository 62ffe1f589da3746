"""Partners: which view or image they are, what a list of pairs may say, and what a run tells of one that does not fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from training import train_quietly

from mrmae.shards.cache import Cache, open_cache
from mrmae.train.cost import count_costs, view_bytes
from mrmae.train.feed import load_masked
from mrmae.train.method.recipe import Recipe
from mrmae.train.pairs import partners_of, read_pairs
from mrmae.train.ranks import Ranks
from mrmae.train.report import feature_bytes, plan_lines
from mrmae.train.run import Run, build_run
from mrmae.train.setup import Setup

MakeRecipe = Callable[..., Recipe]
SHORT = ("optim.batch_size=4", "optim.epochs=2", "optim.warmup_epochs=0", "optim.lr_per_256=0.064")


@pytest.fixture(scope="module")
def cache(tiny_cache: Path) -> Cache:
    return open_cache(tiny_cache)


def listed(path: Path, pairs: list[tuple[str, str]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"key": [k for k, _ in pairs], "partner": [p for _, p in pairs]}), path)
    else:
        path.write_text("key,partner\n" + "".join(f"{k},{p}\n" for k, p in pairs), encoding="utf-8")
    return path


def run_of(cache: Cache, recipe: Recipe, tmp_path: Path, pairs: Path | None = None, **more: object) -> Run:
    return build_run(cache.path, tmp_path / "out", recipe, Ranks(), Setup(device="cpu", pairs=pairs, **more))  # type: ignore[arg-type]


def test_partners_are_all_other_views_in_turn_and_never_the_own(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = open_cache(make_cache(tmp_path / "cache", n=5, n_views=3))
    seen: dict[int, set[tuple[int, int]]] = {}
    for epoch in range(6):
        numbers, views = partners_of(cache, cache.numbers, None, epoch=epoch)
        assert np.array_equal(numbers, cache.numbers)
        own = (epoch + cache.hashes.numpy().view(np.uint64) % np.uint64(3)) % 3
        for number, one, two in zip(numbers, own[cache.numbers], views):
            seen.setdefault(int(number), set()).add((int(one), int(two)))
    assert all(pairs == {(i, j) for i in range(3) for j in range(3) if i != j} for pairs in seen.values())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_list_pairs_images_which_go_through_their_partners_in_turn(cache: Cache, tmp_path: Path, suffix: str) -> None:
    keys = [cache.keys[n] for n in cache.numbers]
    pairs = read_pairs(
        listed(tmp_path / f"p{suffix}", [(keys[3], keys[0]), (keys[1], keys[2]), (keys[3], keys[4])]), cache
    )
    assert pairs.first.tolist() == [1, 3, 3]
    numbers = np.array([3, 1])
    found = [partners_of(cache, numbers, pairs, epoch=epoch)[0].tolist() for epoch in range(4)]
    assert {row[0] for row in found} == {0, 4} and found[0] != found[1] and found[:2] == found[2:]
    assert {row[1] for row in found} == {2}
    assert partners_of(cache, np.array([5, 3]), pairs, epoch=0)[0].tolist() == [5, found[0][0]]
    assert pairs.within(np.array([1, 2, 3]), np.array([4])).first.tolist() == [1]


def test_a_batch_holds_each_images_partner_as_the_cache_stores_it(
    cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    keys = [cache.keys[n] for n in cache.numbers]
    path = listed(tmp_path / "pairs.csv", [(keys[i], keys[i + 8]) for i in range(8)])
    run = run_of(cache, tiny_recipe("mr-croco", *SHORT), tmp_path, path)
    assert run.numbers.tolist() == list(range(8)) and run.updates == 2
    batch, masks = load_masked(run, run.numbers[:3], epoch=1)
    other = batch.partner
    assert other is not None and torch.equal(other.samples, cache.hashes[8:11])
    views = (1 + other.samples.numpy().view(np.uint64) % np.uint64(2)) % 2
    assert torch.equal(other.pixels, cache.read_pixels(np.arange(8, 11), views))
    tokens = cache.read_column("a.pre_tail", np.arange(8, 11), views)["tokens"]
    assert torch.equal(other.targets["a"]["tokens"], tokens) and (batch.rows, other.rows) == ("visible", "grid")
    plain = run_of(cache, tiny_recipe("croco", *SHORT), tmp_path, path)
    alone, _ = load_masked(plain, plain.numbers[:3], epoch=1)
    assert alone.partner is not None and not alone.partner.targets
    assert run.model(batch, masks)[0].isfinite()


def test_bytes_and_operations_count_both_views(cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    run, mae = (run_of(cache, tiny_recipe(name, *SHORT), tmp_path) for name in ("mr-croco", "mr-mae"))
    assert feature_bytes(run) == 2 * feature_bytes(mae) and view_bytes(run) == 2 * view_bytes(mae)
    assert any(
        "2 + 16 of the partner encoder, 16 decoder, which look at 16, per image" in line for line in plan_lines(run)
    )
    l, d, e, keep = 16, 64, 16, run.model.n_keep  # patches, widths of student and decoder
    patch, depth = 3 * 8 * 8, 6

    def block(tokens: int, width: int, ratio: float) -> float:
        return (4 + 2 * ratio) * tokens * width**2 + 2 * tokens**2 * width

    encoder = sum(n * patch * d + depth * block(n, d, 3.0) for n in (keep, l))
    cross = 2 * l * e**2 + 2 * l * e**2 + 2 * l * l * e  # q and projection, k and v, two products
    decoder = (keep + l) * d * e + block(l, e, 2.0) + cross + (l - keep) * e * patch
    heads = (keep + l) * d * (8 + 6)
    assert count_costs(run)["forward_flops"] == pytest.approx(2 * (encoder + decoder + heads), rel=1e-9)
    lut, plain = (count_costs(run_of(cache, tiny_recipe(name, *SHORT), tmp_path)) for name in ("lut", "mae"))
    whole = l * patch * d + depth * block(l + 1, d, 3.0) + 2 * d * 4096
    assert lut["own_flops"] == pytest.approx(2 * 2 * whole, rel=1e-9) and plain["own_flops"] == 0
    more = keep_of(lut, plain)
    assert more == pytest.approx(2 * (4 * patch * d + depth * block(5, d, 3.0) + 2 * 4 * d * 4096), rel=1e-9)


def keep_of(one: dict[str, float], two: dict[str, float]) -> float:
    return one["forward_flops"] - two["forward_flops"]


def test_a_run_keeps_to_its_list_and_leaves_out_pairs_over_the_sides(
    cache: Cache, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    keys = [cache.keys[n] for n in cache.numbers]
    path = listed(tmp_path / "pairs.csv", [(keys[i], keys[(i + 1) % 24]) for i in range(24)])
    recipe = tiny_recipe("croco", *SHORT)
    split = run_of(cache, recipe, tmp_path, path, hold_out=0.4)
    assert split.pairs is not None and any("left out: one image is held out" in note for note in split.notes)
    sides = [set(split.numbers.tolist()), set(split.held_out.tolist())]
    assert sides[0] and not sides[0] & sides[1]
    assert train_quietly(cache.path, tmp_path / "out", recipe, pairs=path)["finished"]
    other = listed(tmp_path / "others.csv", [(keys[i], keys[(i + 2) % 24]) for i in range(24)])
    with pytest.raises(ValueError, match="trained on another cache: pairs was sha256"):
        train_quietly(cache.path, tmp_path / "out", recipe, pairs=other)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{0},{1}\n{2},nowhere.png\n", r"pairs.csv, line 2: there is no image 'nowhere.png' among the 24"),
        ("{0},{1},{2}\n", "line 1: holds 3 values; two keys a row were expected"),
        ("{0},{0}\n", "line 1: pairs .* with itself; two images were expected"),
        ("key,partner\n", "holds no pair; two keys a row"),
        ('{0},"{1}\n', "cannot be read .Error: unexpected end of data"),
    ],
)
def test_a_list_that_cannot_be_is_refused_naming_file_line_and_key(
    cache: Cache, tmp_path: Path, text: str, told: str
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text.format(*cache.keys[:3]), encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        read_pairs(path, cache)


def test_a_parquet_of_other_columns_and_no_file_at_all_are_refused(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), path)
    with pytest.raises(ValueError, match="has the columns a, b; two keys a row"):
        read_pairs(path, cache)
    with pytest.raises(ValueError, match="--pairs .*absent.csv: cannot be read .FileNotFoundError"):
        read_pairs(tmp_path / "absent.csv", cache)


def test_what_pairs_nothing_takes_no_list_and_one_view_is_not_two(
    cache: Cache, tiny_recipe: MakeRecipe, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="recipe mae pairs nothing; prepare.pair was expected"):
        run_of(cache, tiny_recipe("mae", *SHORT), tmp_path, tmp_path / "pairs.csv")
    with pytest.raises(ValueError, match="reads 1 view of each; 2 at least were expected; .* --views 2, or"):
        run_of(cache, tiny_recipe("lut", *SHORT, "prepare.views=1"), tmp_path)
