"""Token blocks: a fixed permutation, stored block by block; every reader sees raster order, training can read one block."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from mrmae.kernels import ids
from mrmae.shards import check
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import spec
from mrmae.shards.format.blocks import BlockRule, patch_words
from mrmae.shards.format.plan import load_plan
from mrmae.shards.stats import compute_stats

Make = Callable[..., Path]
RULE = BlockRule(seed=7, blocks=4)


@pytest.fixture(scope="module")
def path(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images and features of `tiny_cache` (4 x 4 patches, 2 views), in 4 blocks of 4."""
    return make_cache(tmp_path_factory.mktemp("blocks") / "cache", blocks=4)


@pytest.fixture(scope="module")
def cache(path: Path) -> Cache:
    return open_cache(path)


def test_the_permutation_is_golden() -> None:
    """Caches that exist depend on it."""
    hashes = spec.signed_hashes(["cats/a.jpg", "cats/a.jpg", "ü.png"])
    assert RULE.order(hashes, np.array([0, 1, 0]), 16).tolist() == [
        [7, 10, 13, 14, 1, 5, 6, 15, 0, 8, 9, 11, 2, 3, 4, 12],
        [2, 9, 11, 15, 0, 1, 7, 13, 3, 5, 6, 8, 4, 10, 12, 14],
        [7, 8, 9, 11, 3, 5, 10, 15, 2, 4, 12, 13, 0, 1, 6, 14],
    ]


def test_the_words_are_the_hash_behind_masks_in_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 not in ids.STREAMS.values()
    monkeypatch.setitem(ids.STREAMS, "layout", 2)
    hashes = torch.randint(-(2**62), 2**62, (5,), generator=torch.Generator().manual_seed(0))
    for view in (0, 3):
        expected = ids.hash_patches(hashes, 196, seed=7, epoch=view, stream="layout").numpy().view(np.uint64)
        words = patch_words(hashes.numpy().view(np.uint64), np.full(5, view, np.uint64), 196, 7)
        assert ((words ^ expected) < 256).all() and (words % 256 == np.arange(196)).all()


def test_every_patch_is_in_one_block_and_in_each_equally_often() -> None:
    n, l = 4000, 16
    order = RULE.order(np.arange(n, dtype=np.int64), np.zeros(n, np.int64), l)
    assert (np.sort(order, axis=1) == np.arange(l)).all()
    assert (np.diff(order.reshape(n, 4, 4), axis=2) > 0).all()
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(l) // 4, (n, l)), axis=1)
    counts = np.stack([(places == block).sum(axis=0) for block in range(4)])
    assert abs(counts - n / 4).max() < 6 * (n * 3 / 16) ** 0.5
    together = (places[:, 0] == places[:, 1]).mean()  # 3 of the 15 others share a block
    assert abs(together - 3 / 15) < 6 * (0.16 / n) ** 0.5


def test_seed_key_and_view_each_change_the_blocks() -> None:
    one, two, zero = np.array([5]), np.array([6]), np.array([0])
    drawn = [RULE.order(one, zero, 196), RULE.order(two, zero, 196), RULE.order(one, one, 196),
             BlockRule(8, 4).order(one, zero, 196)]  # fmt: skip
    assert len({row.tobytes() for row in drawn}) == 4


def test_the_rule_is_in_the_ids_and_raster_leaves_no_trace(path: Path, tiny_cache: Path) -> None:
    blocked, raster = load_plan(path), load_plan(tiny_cache)
    assert blocked.geometry_id == raster.geometry_id
    assert blocked.ids["a.pre_tail"] != raster.ids["a.pre_tail"]
    assert dataclasses.replace(blocked, token_layout=None).ids == raster.ids
    other = dataclasses.replace(blocked, token_layout=BlockRule(1, 4))
    assert other.ids["a.pre_tail"] != blocked.ids["a.pre_tail"]
    told = json.loads((path / "plan.json").read_text())["token_layout"]
    assert told == {"rule": "splitmix64", "seed": 0, "blocks": 4}
    assert "token_layout" not in (tiny_cache / "plan.json").read_text()
    assert "token_layout" not in (tiny_cache / "manifest.json").read_text()
    group = tiny_cache / "views/0/a.pre_tail.zarr/zarr.json"
    assert "blocks" not in group.read_text() and "token_layout" not in group.read_text()
    assert load_plan(path).token_layout == BlockRule(0, 4) and check.find_problems(path, full=True) == []


@pytest.mark.parametrize(
    "dtype, format", [("int8", "zarr"), ("float16", "zarr"), ("int8", "webdataset"), ("pq4", "zarr")]
)
def test_readers_see_raster_order(make_cache: Make, tmp_path: Path, dtype: str, format: str) -> None:
    raster = open_cache(make_cache(tmp_path / "raster", dtype=dtype, bad=[3]))
    blocked = open_cache(make_cache(tmp_path / "blocks", dtype=dtype, bad=[3], blocks=2, format=format))
    assert check.find_problems(tmp_path / "blocks", full=True) == []
    draw = np.random.default_rng(0)
    numbers, views = draw.permutation(np.tile(raster.numbers, 2)), draw.integers(0, 2, 2 * len(raster.numbers))
    for column in raster.columns:
        names = tuple(raster.columns[column].layout.arrays())
        a, b = (cache.read_column(column, numbers, views, names) for cache in (raster, blocked))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        out = {name: torch.empty_like(tensor) for name, tensor in a.items()}
        blocked.read_column(column, numbers, views, names, out=out)
        assert all(torch.equal(a[name], out[name]) for name in a)
    one, two = raster[int(numbers[0])].views[1]["a"], blocked[int(numbers[0])].views[1]["a"]
    assert all(torch.equal(one[name], two[name]) for name in one)
    x, y = compute_stats(raster, "a.pre_tail"), compute_stats(blocked, "a.pre_tail")
    assert torch.equal(x.covariance, y.covariance) and x.id != y.id
    assert blocked.read_column("a.pre_tail", [], [])["tokens"].shape == (0, 16, 2 if dtype == "pq4" else 8)


def test_plain_zarr_reads_blocks_in_the_recorded_order(path: Path, tiny_cache: Path, cache: Cache) -> None:
    for view in range(2):
        group, raster = (zarr.open_group(p / f"views/{view}/a.pre_tail.zarr", mode="r") for p in (path, tiny_cache))
        rule = BlockRule(**group.attrs["token_layout"])  # type: ignore[arg-type]
        order = rule.order(cache.hashes.numpy(), np.full(len(cache), view), 16)
        for name in ("tokens", "scale"):
            stored, expected = (np.asarray(g[name][:]) for g in (group, raster))  # type: ignore[index]
            assert np.array_equal(stored, np.stack([row[o] for row, o in zip(expected, order)]))
            assert group[name].chunks[:2] == (1, 4) and group[name].shards[:2] == (8, 16)  # type: ignore[union-attr]
        assert group["norm"].chunks == (1, 16)  # type: ignore[union-attr]
        assert np.array_equal(group["norm"][:], raster["norm"][:])  # type: ignore[index]


@pytest.mark.parametrize("format, header", [("zarr", 4), ("webdataset", 128)])
def test_one_block_is_read_alone(
    make_cache: Make, path: Path, tmp_path: Path, format: str, header: int, read_sizes: list[int]
) -> None:
    cache = open_cache(path if format == "zarr" else make_cache(tmp_path / "cache", blocks=4, format=format))
    numbers, views, blocks = np.array([9, 3, 20, 3]), np.array([0, 1, 1, 1]), np.array([3, 0, 2, 1])
    whole = cache.read_column("a.pre_tail", numbers, views, ("tokens", "scale", "norm"))
    where = cache.block_ids(numbers, views, blocks)
    read_sizes.clear()
    part = cache.read_block("a.pre_tail", numbers, views, blocks, ("tokens", "scale"))
    assert sum(read_sizes) == 4 * (4 * 8 + 4 * 2 + 2 * header), (
        "4 of 16 rows of 8 codes and of scales; a crc32c or header each"
    )
    assert part["tokens"].shape == (4, 4, 8) and part["scale"].shape == (4, 4)
    for name, tensor in part.items():
        assert torch.equal(tensor, torch.stack([row[i] for row, i in zip(whole[name], where)]))
    assert torch.equal(cache.read_block("a.pre_tail", numbers, views, blocks, ("norm",))["norm"], whole["norm"])
    assert cache.read_block("a.pre_tail", [], [], [])["tokens"].shape == (0, 4, 8)


def test_in_tars_each_block_is_a_member(make_cache: Make, tmp_path: Path, cache: Cache) -> None:
    path = make_cache(tmp_path / "cache", blocks=4, format="webdataset")
    assert load_plan(path).ids == cache.plan.ids, "the format changes no number"
    with tarfile.open(path / "views/1/a/pre_tail/000002.tar") as tar:
        names = [name for name in tar.getnames() if name.startswith("000000017")]
        members = {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    blocks = [f"{name}.{block}.npy" for block in range(4) for name in ("tokens", "scale")]
    assert [name[10:] for name in names] == [*blocks, "cls.npy", "attention.npy", "norm.npy", "json"]
    for block in range(4):
        expected = cache.read_block("a.pre_tail", [17], [1], [block])
        for name, tensor in expected.items():
            assert np.array_equal(np.load(io.BytesIO(members[f"000000017.{name}.{block}.npy"])), tensor[0].numpy())


def test_each_block_is_checked_alone(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", blocks=4)
    file = path / "views/0/a.pre_tail.zarr/tokens/c/1/0/0"
    data = bytearray(file.read_bytes())
    data[32 + (5 * 4 + 2) * (4 * 8 + 4) + 1] ^= 16  # the third block of the shard's sixth sample
    file.write_bytes(data)
    damaged = open_cache(path)
    for block in (0, 1, 3):
        damaged.read_block("a.pre_tail", [13], [0], [block])
    for read in (
        lambda: damaged.read_block("a.pre_tail", [13], [0], [2]),
        lambda: damaged.read_tokens("a.pre_tail", [13], [0]),
    ):
        with pytest.raises(ValueError, match="the chunk fails its crc32c for sample 13"):
            read()
    found = check.find_problems(path, full=True)
    assert [problem.unit for problem in found] == [(0, "a.pre_tail", 1)]


def test_what_cannot_be_is_refused(cache: Cache, tiny_cache: Path, make_cache: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--blocks 3: do not divide a grid of 16 patches; expected one of 2, 4, 8, 16"):
        make_cache(tmp_path / "x", blocks=3)
    with pytest.raises(ValueError, match="raster order; token blocks were expected"):
        open_cache(tiny_cache).read_block("a.pre_tail", [0], [0], [0])
    with pytest.raises(ValueError, match="expected one of 0 to 3 per sample"):
        cache.read_block("a.pre_tail", [0], [0], [4])
    with pytest.raises(ValueError, match="--blocks: 1 cannot be used"):
        BlockRule(0, 1)
    with pytest.raises(ValueError, match="token_layout.rule: 'other' cannot be used; expected splitmix64"):
        BlockRule(0, 4, "other")
