"""Maps that were given: what a view shows of them, and that they are a column like any other."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from click.testing import CliRunner
from PIL import Image

from mrmae.extract.inspect.cli import main
from mrmae.extract.maps import on_grid, read_map
from mrmae.shards.cache import open_cache
from mrmae.shards.format.views import View

VIT = "vit=timm:test_vit/random"
FOUR = np.arange(16, dtype=np.uint16).reshape(4, 4)


def photos(folder: Path, first: int, n: int) -> Path:
    """n images more of two sizes whose 4 x 4 fields have the colours 10 * field, so that a view tells where it was taken."""
    folder.mkdir(exist_ok=True)
    for i in range(first, first + n):
        colours = np.repeat((FOUR * 10).astype(np.uint8)[..., None], 3, axis=2)
        Image.fromarray(colours).resize((64 + 8 * (i % 2), 64), Image.Resampling.NEAREST).save(folder / f"{i:03d}.png")
    return folder


def write_npz(file: Path, keys: list[str], array: np.ndarray[Any, Any] = FOUR) -> Path:
    np.savez(file, allow_pickle=False, **dict.fromkeys(keys, array))
    return file


def keys_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def inspect(*words: str | Path) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(extract: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: `images` and `c`, a cache of 10 of them in 2 views, with the map `field` of ids and `light` of scores."""
    root = tmp_path_factory.mktemp("maps")
    images = photos(root / "images", 0, 10)
    write_npz(root / "field.npz", keys_of(images))
    light = pa.table({"key": keys_of(images), "map": [(FOUR / 16).tolist()] * 10})
    pq.write_table(light, root / "light.parquet")
    maps = [f"field={root}/field.npz", f"light={root}/light.parquet"]
    extract(images, root / "c", VIT, maps=maps, views=2, shard_samples=8)
    return root


def test_ids_are_those_that_the_pixels_of_the_same_patches_show(made: Path) -> None:
    cache = open_cache(made / "c")
    assert list(cache.maps) == ["field.map", "light.map"] and list(cache.columns) == ["vit.pre_tail"]
    views = [cache.read_crop(number, view) for number in cache.numbers for view in (0, 1)]
    assert {crop.flip for crop in views} == {True, False}
    for view in (0, 1):
        seen = cache.read_column("field.map", cache.numbers, cache.numbers * 0 + view, ("map",))["map"]
        pixels = cache.read_pixels(cache.numbers, cache.numbers * 0 + view).numpy()[:, 4::8, 4::8, 0]
        assert seen.dtype.itemsize == 2 and seen.shape == (10, 16)
        # bicubic edges ring: a patch whose middle lies near a field's edge shows a blend of neighbours
        assert (np.abs(seen.numpy().reshape(-1, 4, 4) * 10.0 - pixels) < 4).mean() > 0.75


def test_a_map_follows_crop_and_flip_exactly() -> None:
    left_half = View(top=0, left=0, height=8, width=4, flip=False, source_height=8, source_width=8)
    assert on_grid(FOUR, left_half, (4, 2)).tolist() == FOUR[:, :2].tolist()
    flipped = View(top=0, left=4, height=8, width=4, flip=True, source_height=8, source_width=8)
    assert on_grid(FOUR, flipped, (4, 2)).tolist() == FOUR[:, :1:-1].tolist()
    assert on_grid(FOUR.astype(np.float16), flipped, (2, 1)).tolist() == [[4.5], [12.5]], "the mean over the area"
    half_a_cell = View(top=1, left=0, height=2, width=8, flip=False, source_height=8, source_width=8)
    assert on_grid(FOUR.astype(np.float16), half_a_cell, (1, 4)).tolist() == [[2, 3, 4, 5]]


def test_a_column_of_scores_is_what_the_crop_shows(made: Path) -> None:
    cache = open_cache(made / "c")
    for number in cache.numbers:
        seen = cache.read_column("light.map", [number], [1], ("map",))["map"][0].numpy()
        assert np.array_equal(seen, on_grid((FOUR / 16).astype(np.float16), cache.read_crop(number, 1), (4, 4)).ravel())
    assert cache[0].views[1]["light.map"]["map"].shape == (16,)


def test_zarr_alone_reads_a_map(made: Path) -> None:
    array = zarr.open_group(made / "c" / "views" / "0" / "field.map.zarr", mode="r")["map"]
    expected = open_cache(made / "c").read_column("field.map", range(10), [0] * 10, ("map",))["map"].numpy()
    assert np.array_equal(np.asarray(array)[:10], expected) and array.dtype == np.uint16


def test_a_map_is_shown_verified_converted_and_dropped_like_a_column(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "c", tmp_path / "c")
    told = inspect("show", tmp_path / "c").output
    assert "field.map" in told and "uint16 per patch" in " ".join(told.split())
    for words in (["--format", "webdataset"], ["--dtype", "float16"]):
        assert inspect("convert", tmp_path / "c", tmp_path / words[1], *words).exit_code == 0
    before = open_cache(tmp_path / "c")
    for name in ("c", "webdataset", "float16"):
        assert inspect("verify", tmp_path / name, "--full").exit_code == 0
        cache = open_cache(tmp_path / name)
        for column in cache.maps:
            assert cache.ids[column] == before.ids[column]
            read = [one.read_column(column, range(10), [1] * 10, ("map",))["map"].numpy() for one in (before, cache)]
            assert np.array_equal(*read)
    shard = tmp_path / "c" / "views" / "0" / "field.map.zarr" / "map" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    damaged = inspect("verify", tmp_path / "c", "--full")
    assert damaged.exit_code != 0 and "field.map" in damaged.output
    assert inspect("drop", tmp_path / "webdataset", "field", "--yes").exit_code == 0
    assert list(open_cache(tmp_path / "webdataset").maps) == ["light.map"]


def test_other_values_are_refused_and_new_images_bring_their_own(made: Path, extract: Any, tmp_path: Path) -> None:
    images, cache, vit = photos(tmp_path / "images", 0, 6), tmp_path / "c", VIT
    first = f"field={write_npz(tmp_path / 'first.npz', keys_of(images))}"
    extract(images, cache, vit, maps=[first], shard_samples=8)
    plan = (cache / "plan.json").read_bytes()
    other = f"field={write_npz(tmp_path / 'other.npz', keys_of(images), FOUR + np.uint16(1))}"
    with pytest.raises(ValueError, match=r"other\.npz: its values are .*; those of field\.map in .* are .*drop"):
        extract(images, cache, vit, maps=[other])
    photos(images, 6, 3)
    with pytest.raises(ValueError, match=r"first\.npz: has no key '00[678]\.png' \(3 of 3 images"):
        extract(images, cache, vit, maps=[first], append=True)
    assert (cache / "plan.json").read_bytes() == plan and (cache / "manifest.json").exists()
    new = f"field={write_npz(tmp_path / 'new.npz', ['006.png', '007.png', '008.png'], FOUR + np.uint16(1))}"
    for _ in range(2):  # the second time there is nothing to do
        extract(images, cache, vit, maps=[new], append=True)
    grown = open_cache(cache)
    seen = grown.read_column("field.map", grown.numbers, grown.numbers * 0, ("map",))["map"].numpy()
    assert seen[:6].min() >= 0 and seen[6:].max() == 16 and seen[:6].max() <= 15
    assert inspect("verify", cache, "--full").exit_code == 0
    shard = cache / "commits" / "0" / "field.map" / "000000.json"
    shard.unlink()
    with pytest.raises(ValueError, match=r"new\.npz: its values are .*; shard 0 of field\.map is missing"):
        extract(images, cache, vit, maps=[new], append=True)
    extract(images, cache, vit, maps=[first], append=True)
    assert inspect("verify", cache, "--full").exit_code == 0
    assert inspect("drop", cache, "field", "--yes").exit_code == 0
    assert "maps" not in (cache / "plan.json").read_text()


def test_the_patches_of_the_only_view_are_stored_as_they_are(made: Path, extract: Any, tmp_path: Path) -> None:
    images, parts = made / "images", np.arange(65520, 65536).astype(np.uint16)
    file = write_npz(tmp_path / "parts.npz", keys_of(images), parts)
    extract(images, tmp_path / "c", VIT, maps=[f"parts={file}"])
    cache = open_cache(tmp_path / "c")
    assert (
        cache.read_column("parts.map", cache.numbers, cache.numbers * 0, ("map",))["map"].tolist()
        == [parts.tolist()] * 10
    )
    with pytest.raises(
        ValueError, match=r"parts\.npz: '000\.png': has the shape \[16\], the patches of one view; --views 2"
    ):
        extract(images, tmp_path / "c", VIT, maps=[f"parts={file}"], views=2)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(15, np.uint16), r"'000\.png': has the shape \[15\]; expected \[16\]"),
        (np.zeros((2, 3, 4), np.uint16), r"has the shape \[2, 3, 4\]"),
        (np.full((4, 4), 65536), r"'000\.png': holds 65536 \(16 such values\); expected ids or bits of 0 to 65535"),
        (np.full((4, 4), -1), r"holds -1"),
        (np.full((4, 4), np.nan), r"holds nan \(16 such values\); expected finite scores"),
        (np.full((4, 4), 1e6), r"holds 1000000\.0"),
        (np.full((4, 4), "a"), r"holds <U1"),
    ],
)
def test_a_value_that_is_none_is_named_with_file_and_key_before_anything_is_made(
    array: np.ndarray[Any, Any], said: str, made: Path, extract: Any, tmp_path: Path
) -> None:
    file = write_npz(tmp_path / "bad.npz", keys_of(made / "images"), array)
    with pytest.raises(ValueError, match=rf"--map field=.*bad\.npz: .*{said}"):
        extract(made / "images", tmp_path / "c", "no=timm:such_model", maps=[f"field={file}"])
    assert not (tmp_path / "c").exists()


def test_a_missing_key_and_a_foreign_file_are_named(made: Path, extract: Any, tmp_path: Path) -> None:
    file = write_npz(tmp_path / "few.npz", keys_of(made / "images")[1:])
    with pytest.raises(ValueError, match=r"few\.npz: has no key '000\.png' \(1 of 10 images are not in it\)"):
        extract(made / "images", tmp_path / "c", "no=timm:such_model", maps=[f"field={file}"])
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], object))
    (tmp_path / "text.npz").write_text("no zip")
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "columns.parquet")
    for name in ("pickled.npz", "text.npz", "columns.parquet", "absent.npz", "map.csv"):
        with pytest.raises(ValueError, match=rf"--map field=.*{name}: cannot be read as a map"):
            read_map(f"field={tmp_path / name}", grid=4, views=1)
    for text in ("field", "=x.npz", "a/b=x.npz"):
        with pytest.raises(ValueError, match="expected NAME=FILE"):
            read_map(text, grid=4, views=1)


def test_the_same_values_have_the_same_id_in_either_kind_of_file(tmp_path: Path) -> None:
    values = {"b.png": np.arange(16), "a.png": np.zeros((16), int)}
    np.savez(tmp_path / "m.npz", allow_pickle=False, **values)
    pq.write_table(
        pa.table({"key": sorted(values), "map": [values[key].tolist() for key in sorted(values)]}),
        tmp_path / "m.parquet",
    )
    one, other = (read_map(f"m={tmp_path / name}", grid=4, views=1) for name in ("m.npz", "m.parquet"))
    assert one.sha256 == other.sha256 and {k: v.tolist() for k, v in one.values.items()} == {
        k: v.tolist() for k, v in other.values.items()
    }


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_several_numbers_of_a_patch_come_back_bit_for_bit_for_each_view(
    made: Path, extract: Any, tmp_path: Path, format: str
) -> None:
    images, draw = photos(tmp_path / "images", 0, 4), np.random.default_rng(0)
    told = {key: draw.normal(size=(2, 16, 5)).astype(np.float16) for key in keys_of(images)}
    np.savez(tmp_path / "latents.npz", allow_pickle=False, **told)
    rows = pa.table({"key": list(told), "map": [array.astype(np.float32).tolist() for array in told.values()]})
    pq.write_table(rows, tmp_path / "latents.parquet")
    said: list[str] = []
    for file in ("latents.npz", "latents.parquet"):  # the same values are the same map
        given = [f"latents={tmp_path / file}"]
        extract(images, tmp_path / "c", VIT, maps=given, views=2, format=format, say=said.append)
    assert f"latents.map: {told['000.png'].shape[2]} float16 per patch, as given" in said[-1]
    cache = open_cache(tmp_path / "c")
    for view in (0, 1):
        seen = cache.read_column("latents.map", cache.numbers, cache.numbers * 0 + view, ("map",))["map"].numpy()
        assert seen.dtype == np.float16 and all((x == told[key][view]).all() for key, x in zip(cache.keys, seen))
    assert inspect("verify", tmp_path / "c", "--full").exit_code == 0
    assert inspect("pictures", tmp_path / "c", "--out", tmp_path / "sheet.png").exit_code == 0
    if format == "zarr":
        array = zarr.open_array(tmp_path / "c" / "views" / "0" / "latents.map.zarr" / "map", mode="r")
        assert array.metadata.dimension_names == ("sample", "patch", "channel")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 16, 4), np.float16), r"'000\.png': has the shape \[2, 16, 4\]; expected \[1, 16, c\]"),
        (np.zeros((1, 16, 1), np.float16), r"2 to 4096 numbers for each patch of each of --views"),
        (np.zeros((1, 16, 2), np.int64), r"holds int64; expected floats where a patch has several numbers"),
        (np.full((1, 16, 2), np.inf), r"holds inf \(32 such values\); expected finite scores"),
    ],
)
def test_numbers_that_cannot_be_stored_are_refused(tmp_path: Path, array: np.ndarray[Any, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_map(f"m={write_npz(tmp_path / 'm.npz', ['000.png'], array)}", grid=4, views=1)
    two = {"a": np.zeros((1, 16, 2), np.float16), "b": np.zeros((1, 16, 3), np.float16)}
    np.savez(tmp_path / "two.npz", allow_pickle=False, **two)
    with pytest.raises(ValueError, match=r"'b' is float16 with 3 dimensions, 3 numbers per patch; 'a' is .* 2 numbers"):
        read_map(f"m={tmp_path / 'two.npz'}", grid=4, views=1)
