"""Columns as tars: plain webdataset reads them beside the pixels, and they say the same as the zarr arrays."""

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from contents import contents

from mrmae.shards.cache import open_cache
from mrmae.shards.drop import drop_column
from mrmae.shards.format import plan
from mrmae.shards.format.layout import Layout
from mrmae.shards.store import tar_columns
from mrmae.shards.store.tar import read_index

Make = Callable[..., Path]
GOLDEN = "00fddffa498411c9b99a51774438f1e91913395d2f1e8124d73d89dfad814a81"
BAD = 5  # position of the image that does not decode, in the order they are made
SERIES = "views/1/{}/{{000000..000002}}.tar"
LAYOUT = Layout(n=3, l=4, d=6, shard_samples=2, dtype="int8", has_cls=False, has_attention=False)


@pytest.fixture(scope="module")
def caches(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images and teachers, stored in both formats; one image is bad."""
    folder = tmp_path_factory.mktemp("formats")
    return {name: make_cache(folder / name, format=name, bad=(BAD,)) for name in ("zarr", "webdataset")}


def samples(path: Path, series: str) -> list[dict[str, Any]]:
    """What plain webdataset makes of a series."""
    webdataset = pytest.importorskip("webdataset")
    return list(webdataset.WebDataset(str(path / SERIES.format(series)), shardshuffle=False).decode("rgb8"))


def test_plain_webdataset_reads_pixels_and_columns_in_step(caches: dict[str, Path]) -> None:
    cache = open_cache(caches["webdataset"])
    pixels = samples(cache.path, "pixels")
    for column, stored in cache.columns.items():
        features = samples(cache.path, column.replace(".", "/"))
        assert len(features) == len(pixels) == len(cache)
        for number, (view, row) in enumerate(zip(pixels, features)):
            assert view["__key__"] == row["__key__"] == f"{number:09d}"
            assert view["json"]["key"] == row["json"]["key"] == cache.keys[number]
            assert row["json"] == {"number": number, "key": cache.keys[number], "valid": "jpg" in view}
            arrays = {name.removesuffix(".npy"): value for name, value in row.items() if name.endswith(".npy")}
            assert set(arrays) == (set(stored.layout.arrays()) if "jpg" in view else set())
            for name, value in arrays.items():
                expected = cache.read_column(column, [number], [1], (name,))[name][0].numpy()
                assert value.dtype == expected.dtype and np.array_equal(value, expected)
    assert [row["json"]["valid"] for row in pixels].count(False) == 1


def test_both_formats_hold_the_same_numbers_under_the_same_ids(caches: dict[str, Path]) -> None:
    one, other = (open_cache(path) for path in caches.values())
    assert one.ids == other.ids and one.keys == other.keys and one.numbers.tolist() == other.numbers.tolist()
    draw = np.random.default_rng(0)
    numbers, views = draw.choice(one.numbers, 17), draw.integers(0, 2, 17)
    assert np.array_equal(one.read_pixels(numbers, views), other.read_pixels(numbers, views))
    for name, column in one.columns.items():
        arrays = tuple(column.layout.arrays())
        a, b = (cache.read_column(name, numbers, views, arrays) for cache in (one, other))
        for array in arrays:
            assert a[array].dtype == b[array].dtype and np.array_equal(a[array], b[array]), array


def test_equal_runs_give_equal_bytes_and_the_container_has_golden_ones(
    caches: dict[str, Path], make_cache: Make, tmp_path: Path
) -> None:
    again = make_cache(tmp_path / "again", format="webdataset", bad=(BAD,))
    assert contents(again) == contents(caches["webdataset"])
    tar_columns.create_column(tmp_path / "x", LAYOUT, {"column_id": "sha256:x", "view": 3})
    arrays = {
        "tokens": np.arange(-24, 24, dtype=np.int8).reshape(2, 4, 6),
        "scale": np.ones((2, 4), np.float16),
        "norm": np.full((2, 4), 2, np.float16),
    }
    record = tar_columns.write_column_shard(tmp_path / "x", 0, arrays, [True, False], ["a/ü.png", "b.png"])
    tar, sidecar = tar_columns.shard_files(tmp_path / "x", LAYOUT, 0)
    assert (record["count"], record["valid"], [f.path for f in record["files"]]) == (2, 1, [tar, sidecar])
    assert hashlib.sha256(tar.read_bytes()).hexdigest() == GOLDEN
    arrays = dict(np.load(sidecar))
    about, places = json.loads(arrays["about"].tobytes()), arrays["members"]
    assert about["of"] == {"column_id": "sha256:x", "view": 3, "shard": 0}
    assert about["tar"] == record["files"][0].to_json()
    assert about["keys"] == ["a/ü.png", "b.png"]
    assert about["extensions"] == ["tokens.npy", "scale.npy", "norm.npy", "json"]
    assert (places < 0).all(2).tolist() == [[False] * 4, [True] * 3 + [False]]
    for offset, n_bytes, crc in places[places[..., 0] >= 0].tolist():
        assert google_crc32c.value(tar.read_bytes()[offset : offset + n_bytes]) == crc


def test_members_are_plain_ustar_and_open_in_numpy(caches: dict[str, Path]) -> None:
    path = caches["webdataset"] / "views/0/a/pre_tail/000001.tar"
    with tarfile.open(path, format=tarfile.USTAR_FORMAT) as tar:
        members = tar.getmembers()
        assert all((m.mtime, m.uid, m.gid, m.uname, m.mode) == (0, 0, 0, "", 0o644) for m in members)
        assert not any(m.pax_headers for m in members)
        assert not any("a" == part or "pre" in part for m in members for part in m.name.split("."))
        file = tar.extractfile("000000008.tokens.npy")
        assert file is not None
        tokens = np.load(io.BytesIO(file.read()))
    assert np.array_equal(tokens, open_cache(caches["zarr"]).read_column("a.pre_tail", [8], [0])["tokens"][0])


def test_a_column_tells_how_to_dequantise_without_the_rest_of_the_cache(caches: dict[str, Path]) -> None:
    layout, attributes = tar_columns.read_attributes(caches["webdataset"] / "views/1/a/pre_tail")
    made = plan.load_plan(caches["webdataset"])
    assert layout == made.layout("a.pre_tail") and attributes["column_id"] == made.ids["a.pre_tail"]
    assert attributes["quantiser"] == made.quantisers["a.pre_tail"].to_json() and attributes["teacher"]["name"] == "a"


def test_damage_names_sample_and_repair(caches: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(caches["webdataset"], path)
    tar = path / "views/0/a/pre_tail/000001.tar"
    key, places = open_cache(path).keys[9], read_index(tar, ["tokens.npy"]).tables["tokens.npy"]
    whole = tar.read_bytes()
    offset, n_bytes, _ = places[1].tolist()
    for at, message in ((offset + 60, "does not begin as an array"), (offset + n_bytes - 1, "fails its crc32c")):
        tar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        cache = open_cache(path)
        cache.read_column("a.pre_tail", [8], [0])
        text = rf"000001.tar: the member {message}.* for sample 9 \({re.escape(repr(key))}\).*to repair, delete .*/a.pre_tail/000001.json"
        with pytest.raises(ValueError, match=text):
            cache.read_column("a.pre_tail", [9], [0])
    cache = open_cache(path)
    tar.write_bytes(whole[: offset + 500])
    with pytest.raises(ValueError, match="ends within the member"):
        cache.read_column("a.pre_tail", [9], [0])


@pytest.mark.parametrize("other", ["0/a/pre_tail/000002", "1/a/pre_tail/000001", "0/b/pre_tail/000001"])
def test_exchanged_tars_are_found_when_they_are_read(caches: dict[str, Path], tmp_path: Path, other: str) -> None:
    path = tmp_path / "c"
    shutil.copytree(caches["webdataset"], path)
    cache = open_cache(path)
    for suffix in (".tar", ".index.npz"):
        a, b = (path / f"views/{name}{suffix}" for name in ("0/a/pre_tail/000001", other))
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
    with pytest.raises(ValueError, match=r"its index belongs to"):
        cache.read_column("a.pre_tail", [8], [0])


def test_wrong_shards_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    tar_columns.create_column(tmp_path, LAYOUT, {"column_id": "sha256:x", "view": 0})
    arrays = {"tokens": np.zeros((2, 4, 6), np.int8), "scale": np.zeros((2, 4), np.float16)}
    arrays["norm"], lowest = arrays["scale"], np.full_like(arrays["tokens"], -128)
    with pytest.raises(ValueError, match="1 keys; expected 2, one per row"):
        tar_columns.write_column_shard(tmp_path, 0, arrays, [True, True], ["a"])
    with pytest.raises(ValueError, match="2 rows; the plan says 1"):
        tar_columns.write_column_shard(tmp_path, 1, arrays, [True, True], ["a", "b"])
    with pytest.raises(ValueError, match=r"values of tokens are codes that are no number \(-128\)"):
        tar_columns.write_column_shard(tmp_path, 0, {**arrays, "tokens": lowest}, [True] * 2, ["a", "b"])
    assert [file.name for file in tmp_path.iterdir()] == ["column.json"]


def test_one_cache_has_one_format(caches: dict[str, Path], make_cache: Make) -> None:
    for name, other in (("zarr", "webdataset"), ("webdataset", "zarr")):
        before = contents(caches[name])
        with pytest.raises(ValueError, match=f"format is '{name}' there and '{other}' in this command"):
            make_cache(caches[name], format=other, bad=(BAD,))
        assert contents(caches[name]) == before


def test_a_dropped_column_leaves_no_folder(caches: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(caches["webdataset"], tmp_path / "c")
    assert drop_column(tmp_path / "c", "b.pre_tail") == ["a.pre_tail"]
    assert not (tmp_path / "c/views/0/b").exists() and open_cache(tmp_path / "c").columns.keys() == {"a.pre_tail"}


def test_a_plan_without_a_format_is_of_the_time_of_zarr(caches: dict[str, Path]) -> None:
    fields = plan.load_plan(caches["zarr"]).to_json()
    assert fields.pop("format") == "zarr"
    assert plan.Plan.from_json(fields, "x").to_json() == plan.load_plan(caches["zarr"]).to_json()
    with pytest.raises(ValueError, match="format 'hdf5' is not known; expected zarr or webdataset"):
        plan.Plan.from_json({**fields, "format": "hdf5"}, "x")
