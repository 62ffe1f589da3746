"""Converting: what stays the same stays the same byte for byte, what changes says so in its id, and damage is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contents import contents_without_records as contents

from mrmae.common import files as write
from mrmae.shards import check, convert
from mrmae.shards.cache import open_cache
from mrmae.shards.format import read_samples, write_samples
from mrmae.shards.format.plan import load_plan
from mrmae.shards.format.product import ProductCodebook, read_product
from mrmae.shards.format.quantiser import Quantiser, measure, quantise, summarise
from mrmae.shards.plans import Wanted, agree
from mrmae.shards.stats import compute_stats, read_stats, write_stats
from mrmae.shards.store.reader import Damaged

Make = Callable[..., Path]
SMALL: dict[str, Any] = {"n": 10, "size": 16, "grid": 2, "shard_samples": 4, "bad": (5,)}
ABOUT = {"command": "inspect-cache convert a b", "folder": "/x"}


@pytest.fixture(scope="module")
def source(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zarr, int8, one bad image, moments of teacher a."""
    path = make_cache(tmp_path_factory.mktemp("source") / "c", **SMALL)
    cache = open_cache(path)
    write_stats(cache, "a.pre_tail", compute_stats(cache, "a.pre_tail"))
    return path


def converted(source: Path, out: Path, **how: Any) -> Path:
    cache = open_cache(source)
    wanted = convert.converted_plan(cache, **{"format": None, "dtype": None, "drop": (), **how})
    convert.convert_cache(cache, out, wanted, about=ABOUT, progress=lambda n_bytes: None)
    assert check.find_problems(out, full=True) == []
    return out


def test_there_and_back_again_is_the_same_cache(source: Path, make_cache: Make, tmp_path: Path) -> None:
    tars = converted(source, tmp_path / "tars", format="webdataset")
    assert open_cache(tars).ids == open_cache(source).ids
    direct = contents(make_cache(tmp_path / "direct", format="webdataset", **SMALL))
    assert {k: v for k, v in contents(tars).items() if "stats/" not in k} == direct, "as if it had been extracted so"
    assert contents(converted(tars, tmp_path / "back", format="zarr")) == contents(source)
    assert read_stats(open_cache(tars), "a.pre_tail").id == read_stats(open_cache(source), "a.pre_tail").id


def test_product_codes_keep_their_codebook_where_only_the_format_changes(
    make_cache: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, also where this version would write the same numbers in other bytes."""
    source = make_cache(tmp_path / "c", dtype="pq4", **{**SMALL, "n_views": 1})
    monkeypatch.setattr(ProductCodebook, "to_bytes", lambda self: b"other")
    tars = converted(source, tmp_path / "tars", format="webdataset")
    assert check.find_problems(tars, full=True) == []
    assert contents(converted(tars, tmp_path / "back", format="zarr")) == contents(source)
    shutil.rmtree(source)
    read_product.cache_clear()
    back = open_cache(tmp_path / "back")
    assert back.read_tokens("a.pre_tail", [0], [0]).isfinite().all(), "of its own codebook"


def test_token_blocks_stay_blocks(make_cache: Make, tmp_path: Path) -> None:
    how: dict[str, Any] = {**SMALL, "grid": 4, "blocks": 4}
    source = make_cache(tmp_path / "c", **how)
    tars = converted(source, tmp_path / "tars", format="webdataset")
    assert contents(tars) == contents(make_cache(tmp_path / "direct", format="webdataset", **how))
    cache, half = open_cache(source), open_cache(converted(source, tmp_path / "half", dtype="float16"))
    assert half.blocks == cache.blocks is not None
    for view in range(cache.n_views):
        views = np.full(len(cache.numbers), view)
        before, after = (c.read_tokens("a.pre_tail", cache.numbers, views) for c in (cache, half))
        assert torch.equal(after, before.half().float()), "the same values of the same patches"


def test_a_dropped_teacher_leaves_everything_else_as_it_was(source: Path, tmp_path: Path) -> None:
    both = contents(source)
    for name in ("b", "b.pre_tail"):
        rest = contents(converted(source, tmp_path / name, drop=[name]))
        assert all(
            rest[file] == both[file]
            for file in rest
            if file not in ("plan.json", "manifest.json", "manifest/000000.arrow")
        )
        assert {file for file in both if file not in rest} == {
            f for f in both if "b.pre_tail" in f or f == "tail/b.safetensors"
        }
    assert open_cache(converted(source, tmp_path / "none", drop=["a", "b"])).columns == {}
    with pytest.raises(ValueError, match="--drop c: .* has no such teacher or column; it holds a.pre_tail, b.pre_tail"):
        converted(source, tmp_path / "x", drop=["c"])


@pytest.mark.parametrize("dtype", ["float16", "fp8", "pq4"])
@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_requantised_columns_say_what_they_are_made_of(
    source: Path, make_cache: Make, tmp_path: Path, dtype: str, format: str
) -> None:
    before, after = open_cache(source), open_cache(converted(source, tmp_path / "c", dtype=dtype, format=format))
    direct = load_plan(make_cache(tmp_path / "direct", dtype=dtype, finalise=False, **{**SMALL, "n_views": 1}))
    numbers, views = before.numbers, before.numbers * 0 + 1
    for name, column in after.columns.items():
        assert column.quantiser.source == before.columns[name].id and column.quantiser.dtype == dtype
        assert column.id not in (before.columns[name].id, direct.ids[name])
        old, new = (cache.read_tokens(name, numbers, views) for cache in (before, after))
        codes, scale = quantise(old, column.quantiser)
        assert torch.equal(after.read_column(name, numbers, views)["tokens"], codes)
        assert (new - old).norm() < {"float16": 3e-4, "fp8": 0.03, "pq4": 0.6}[dtype] * old.norm()
        kept = set(column.layout.arrays()) - {"tokens", "scale"}
        for array in kept:
            a, b = (cache.read_column(name, numbers, views, (array,))[array] for cache in (before, after))
            assert torch.equal(a, b), array
    assert not (tmp_path / "c/stats").exists(), "moments are of the values that they were computed from"


def test_quality_after_two_steps_is_no_better_than_what_is_true(make_cache: Make, tmp_path: Path) -> None:
    """Against the teacher's own values, which a float16 cache holds nearly exactly."""
    exact = open_cache(make_cache(tmp_path / "exact", dtype="float16", n_views=1))
    twice = open_cache(converted(make_cache(tmp_path / "int8", n_views=1), tmp_path / "fp8", dtype="fp8"))
    for name in twice.columns:
        truth, told = [], []
        for shard in range(3):
            numbers = np.arange(shard * 8, shard * 8 + 8)
            x, y = (cache.read_tokens(name, numbers, numbers * 0) for cache in (exact, twice))
            truth.append(summarise([measure(x, y.half(), None, Quantiser("float16"))]))
            told.append(json.loads((twice.path / f"commits/0/{name}/{shard:06d}.json").read_bytes())["quality"])
        for true, said in zip(truth, told):
            assert said["snr_db"] <= true["snr_db"] + 0.05 and said["snr_db"] > true["snr_db"] - 3
            assert said["p999_one_minus_cos"] >= 0.9 * true["p999_one_minus_cos"]


def test_float16_to_int8_is_calibrated_like_an_extraction(make_cache: Make, tmp_path: Path) -> None:
    source = make_cache(tmp_path / "c", dtype="float16", n_views=1)
    after = open_cache(converted(source, tmp_path / "int8", dtype="int8"))
    assert all(column.quantiser.dtype == "int8" for column in after.columns.values())
    assert all(c["quality"]["snr_db"] > 38 for c in after.manifest["columns"])


class Stopped(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("at, dtype", [(2, "fp8"), (9, "fp8"), (3, "pq4"), (9, "pq4")])
def test_a_stop_at_any_write_is_continued_to_the_same_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, dtype: str
) -> None:
    whole = contents(converted(source, tmp_path / "whole", format="webdataset", dtype=dtype))
    real, calls = write.link_exclusively, iter(range(1000))

    def stopping(temporary: Path, target: Path) -> None:
        if next(calls) == at:
            raise Stopped
        real(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(write, "link_exclusively", stopping)
        with pytest.raises(Stopped):
            converted(source, tmp_path / "c", format="webdataset", dtype=dtype)
    if at > 3:  # the plan is written before
        monkeypatch.setattr(convert, "calibrate", None)  # frozen in the plan already
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "c").glob("commits/*/*/*.json")}
    assert contents(converted(source, tmp_path / "c", format="webdataset", dtype=dtype)) == whole
    assert all(file.stat().st_mtime_ns == before for file, before in times.items()), "what was committed stays"


@pytest.mark.parametrize(
    "name, how",
    [
        ("views/1/a.pre_tail.zarr/tokens/c/1/0/0", {"format": "webdataset"}),
        ("views/1/a.pre_tail.zarr/tokens/c/1/0/0", {"drop": ["b"]}),
        ("views/0/pixels/000002.tar", {"dtype": "fp8"}),
    ],
)
def test_a_damaged_source_is_refused_naming_shard_and_repair(
    source: Path, tmp_path: Path, name: str, how: dict[str, Any]
) -> None:
    shutil.copytree(source, tmp_path / "c")
    file = tmp_path / "c" / name
    content = bytearray(file.read_bytes())
    content[100 if "zarr" in name else 700] ^= 1
    file.write_bytes(content)
    column = "pixels/000002" if "pixels" in name else "a.pre_tail/000001"
    with pytest.raises(
        ValueError, match=f"{name}: .*to repair, delete .*{column}.json and run the same extract-features"
    ):
        converted(tmp_path / "c", tmp_path / "out", **how)
    assert not (tmp_path / "out/manifest.json").exists()
    shutil.copy(source / name, file)
    assert contents(converted(tmp_path / "c", tmp_path / "out", **how)) == contents(
        converted(source, tmp_path / "o", **how)
    )


def test_an_unfinished_source_another_target_and_the_source_itself_are_refused(
    source: Path, make_cache: Make, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="this cache is unfinished"):
        converted(make_cache(tmp_path / "half", finalise=False, **SMALL), tmp_path / "x")
    with pytest.raises(ValueError, match="is, or lies in, the cache to convert"):
        converted(source, source, format="webdataset")
    fp8 = converted(source, tmp_path / "fp8", dtype="fp8")
    before = contents(fp8)
    with pytest.raises(ValueError, match="dtype is 'fp8' there and 'float16' in this command"):
        converted(source, fp8, dtype="float16")
    other = converted(converted(source, tmp_path / "f16", dtype="float16"), tmp_path / "again", dtype="fp8")
    with pytest.raises(ValueError, match=r"quantisers.a.pre_tail.*is .* there and .* in this command"):
        converted(other.parent / "f16", fp8, dtype="fp8")
    assert contents(fp8) == before


def test_extraction_does_not_go_on_with_a_requantised_cache(source: Path, tmp_path: Path) -> None:
    made = load_plan(converted(source, tmp_path / "c", dtype="fp8"))
    before = contents(tmp_path / "c")
    with pytest.raises(ValueError, match="a.pre_tail was made by inspect-cache convert .*nothing was changed"):
        agree(tmp_path / "c", Wanted(dataclasses.replace(made, n_views=3, quantisers={})))
    assert contents(tmp_path / "c") == before
    for path, command in ((tmp_path / "c", "inspect-cache convert"), (source, "extract-features")):
        told = open_cache(path).shards.repair_text(Damaged(path, None, "x"), (0, "a.pre_tail", 0))
        assert f"run the same {command} command again" in told


@pytest.mark.parametrize("column, value", [("sha256", "00" * 32), ("bytes", 1), ("label", "other")])
def test_altered_images_of_the_source_are_told_as_the_sources(
    source: Path, tmp_path: Path, column: str, value: object
) -> None:
    altered = shutil.copytree(source, tmp_path / "source")
    table = read_samples(altered)
    write_samples(altered, {**table, column: [value, *table[column][1:]]})
    with pytest.raises(ValueError, match=rf"{altered}/samples.arrow: its rows are not those of the manifest"):
        converted(altered, tmp_path / "out")
    assert not (tmp_path / "out/plan.json").exists()
