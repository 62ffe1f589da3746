"""Images are appended to a finished cache: what was there stays byte for byte, and the rest works as with any cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from click.testing import CliRunner
from PIL import Image

from mrmae.extract import run
from mrmae.extract.inspect.cli import main
from mrmae.shards.cache import open_cache
from mrmae.shards.format.plan import load_plan
from mrmae.shards.format.spec import canonical_order

VIT, CNN = "vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random"


def photos(folder: Path, first: int, n: int) -> Path:
    """n random images more in a folder."""
    draw = np.random.default_rng(first)
    for i in range(first, first + n):
        (folder / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        coarse = draw.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((40, 36)).save(folder / f"class {i % 2}" / f"{i:03d}.png")
    return folder


def files(path: Path) -> dict[str, bytes]:
    """Shards, sidecars and commit records: what may not change (zarr.json tells the number of samples, and does)."""
    found = [file for folder in ("views", "commits", "tail") for file in (path / folder).rglob("*") if file.is_file()]
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in found if f.name != "zarr.json"}


def inspect(*words: str | Path) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(extract: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: `base`, a cache of 10 images in shards of 8; `c`, the same with 7 appended; `images`, all of them."""
    root = tmp_path_factory.mktemp("grown")
    images, cache = photos(root / "images", 0, 10), root / "c"
    extract(images, root / "base", VIT, shard_samples=8)
    shutil.copytree(root / "base", cache)
    said: list[str] = []
    extract(photos(images, 10, 7), cache, VIT, append=True, say=said.append)
    assert "10 of 17 images are in the cache already and are skipped; 7 are new" in said
    return root


@pytest.fixture
def grown(made: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, bytes]]:
    """(cache, images, what the cache held before images were appended), the test's own."""
    for name in ("c", "images"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "c", tmp_path / "images", files(made / "base")


def test_what_was_there_stays_and_new_images_follow_in_their_own_order(
    grown: tuple[Path, Path, dict[str, bytes]], made: Path, extract: Any, tmp_path: Path
) -> None:
    path, images, before = grown
    after = files(path)
    plans = [json.loads((cache / "plan.json").read_text()) for cache in (made / "base", path)]
    assert plans[1].pop("appended")[0]["n_samples"] == 7 and plans[0] == plans[1], "the calibration is kept, too"
    assert {name: after[name] for name in before} == before
    cache = open_cache(path)
    new = [f"class {i % 2}/{i:03d}.png" for i in range(10, 17)]
    assert cache.numbers.tolist() == [*range(10), *range(16, 23)] and cache.keys[10:16] == [""] * 6
    assert cache.keys[16:] == [new[i] for i in canonical_order(new)]
    assert cache.number(cache.keys[20]) == 20 and not cache[12].valid
    with pytest.raises(ValueError, match="sample 12 .*this row holds no image"):
        cache.read_pixels([12], [0])
    extract(images, tmp_path / "once", VIT, shard_samples=8)
    once = open_cache(tmp_path / "once")
    for key in (cache.keys[3], cache.keys[22]):  # another calibration, the same images and almost the same features
        assert np.array_equal(cache[key].views[0]["pixels"], once[key].views[0]["pixels"])
        ours, theirs = cache[key].views[0]["vit"]["tokens"], once[key].views[0]["vit"]["tokens"]
        assert (ours - theirs).norm() < 0.03 * theirs.norm()
    assert cache.ids["dataset"] != once.ids["dataset"]


def test_zarr_and_tensorstore_read_all_parts(grown: tuple[Path, Path, dict[str, bytes]]) -> None:
    path = grown[0]
    cache = open_cache(path)
    array = zarr.open_group(path / "views/0/vit.pre_tail.zarr", mode="r")["tokens"]
    other = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "views/0/vit.pre_tail.zarr/tokens")}}).result()  # fmt: skip
    raw = cache.read_column("vit.pre_tail", cache.numbers, cache.numbers * 0)["tokens"].numpy()
    for values in (np.asarray(array[:]), other.read().result()):
        assert values.shape[0] == 23 and (values[10:16] == -128).all()
        assert np.array_equal(values[cache.numbers], raw)


def test_inspect_cache_works_on_a_grown_cache(grown: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> None:
    path = grown[0]
    assert inspect("verify", path, "--full").exit_code == 0
    shown = inspect("show", path).output
    assert "17 (0 bad)" in shown and "7 from sample 16" in shown
    assert inspect("stats", path).exit_code == 0
    other = shutil.copytree(path, tmp_path / "other")
    assert inspect("diff", path, other).exit_code == 0
    whole = files(path)
    victim = other / "views/0/vit.pre_tail.zarr/tokens/c/2/0/0"
    data = bytearray(victim.read_bytes())
    data[50] ^= 1
    victim.write_bytes(bytes(data))
    assert "tokens/c/2/0/0 (shard 2 of vit.pre_tail, view 0)" in inspect("verify", other, "--full").output
    assert inspect("repair", other, "--yes").exit_code == 0
    assert not (other / "commits/0/vit.pre_tail/000002.json").exists()
    assert whole.keys() - files(other).keys() == {"commits/0/vit.pre_tail/000002.json"}


def test_shards_of_other_parts_and_other_appends_are_told_apart(extract: Any, tmp_path: Path) -> None:
    images = photos(tmp_path / "images", 0, 8)
    extract(images, tmp_path / "a", VIT, shard_samples=8)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    extract(photos(tmp_path / "more", 10, 8), tmp_path / "a", VIT, append=True)
    extract(photos(tmp_path / "others", 30, 8), tmp_path / "b", VIT, append=True)
    a, b = (tmp_path / name / "views/0/vit.pre_tail.zarr/tokens/c/1/0/0" for name in "ab")
    b.write_bytes(a.read_bytes())
    with pytest.raises(ValueError, match="its seal says that it is another shard"):
        open_cache(tmp_path / "b").read_column("vit.pre_tail", [9], [0])


def test_append_twice_then_teachers_and_views_cover_all_parts(
    grown: tuple[Path, Path, dict[str, bytes]], extract: Any, tmp_path: Path
) -> None:
    path, images, _ = grown
    before = files(path)
    extract(photos(tmp_path / "third", 40, 3), path, VIT, append=True)  # the others need not be given
    assert [len(part.numbers) for part in load_plan(path).parts] == [10, 7, 3]
    assert {name: files(path)[name] for name in before} == before
    with pytest.raises(ValueError, match="3 gone"):
        extract(images, path, VIT, CNN)
    shutil.copytree(tmp_path / "third", images, dirs_exist_ok=True)
    extract(images, path, VIT, CNN, views=2)
    cache = open_cache(path)
    assert set(cache.columns) == {"vit.pre_tail", "cnn.last"} and len(cache.numbers) == 20 and cache.n_views == 2
    for name in cache.columns:
        assert np.isfinite(cache.read_tokens(name, cache.numbers, cache.numbers * 0 + 1).numpy()).all()
    assert inspect("verify", path, "--full").exit_code == 0
    assert inspect("drop", path, "cnn", "--yes").exit_code == 0 and inspect("verify", path, "--full").exit_code == 0
    manifest = (path / "manifest.json").read_bytes()
    extract(images, path, VIT, views=2)
    assert (path / "manifest.json").read_bytes() == manifest


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_append_killed_anywhere_is_resumed_by_the_same_command(
    extract: Any,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grown: tuple[Path, Path, dict[str, bytes]],
) -> None:
    expected, cache = files_without_time(grown[0]), tmp_path / "killed"
    shutil.copytree(made / "base", cache)
    images = grown[1]
    for module, name in ((run.commits, "create_columns"), (run, "extract_missing"), (run.commits, "finalise"), ("append", "publish")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr("mrmae.shards.plans.publish" if module == "append" else f"{module.__name__}.{name}", killed)
            if module != "append" or not load_plan(cache).appended:
                with pytest.raises(KeyboardInterrupt):
                    extract(images, cache, VIT, append=True)
    extract(images, cache, VIT, append=True)
    assert files_without_time(cache) == expected
    assert json.loads((cache / "manifest.json").read_bytes()) == json.loads((grown[0] / "manifest.json").read_bytes())


def test_a_kill_between_samples_and_plan_changes_nothing(
    extract: Any,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grown: tuple[Path, Path, dict[str, bytes]],
) -> None:
    cache, base = tmp_path / "killed", photos(tmp_path / "base", 0, 10)
    shutil.copytree(made / "base", cache)
    manifest = (cache / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("mrmae.shards.plans.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(grown[1], cache, VIT, append=True)
    other = shutil.copytree(cache, tmp_path / "other")
    extract(base, cache, VIT)
    assert (cache / "manifest.json").read_bytes() == manifest and inspect("verify", cache, "--full").exit_code == 0
    extract(grown[1], other, VIT, append=True)
    assert files_without_time(other) == files_without_time(grown[0])


def test_parts_of_an_append_are_done_by_several_processes(
    grown: tuple[Path, Path, dict[str, bytes]], made: Path, extract: Any, tmp_path: Path
) -> None:
    cache = shutil.copytree(made / "base", tmp_path / "parts")
    for shards in ("0/2", "1/2", ""):
        extract(grown[1], cache, VIT, append=True, shards=shards)
    assert files_without_time(cache) == files_without_time(grown[0])


def test_lost_samples_are_written_again(grown: tuple[Path, Path, dict[str, bytes]], extract: Any) -> None:
    path, images, _ = grown
    before = (path / "samples.arrow").read_bytes(), (path / "manifest.json").read_bytes()
    (path / "samples.arrow").unlink()
    extract(images, path, VIT)
    assert ((path / "samples.arrow").read_bytes(), (path / "manifest.json").read_bytes()) == before


def test_columns_in_tars_grow_as_well(extract: Any, tmp_path: Path) -> None:
    images, path = photos(tmp_path / "images", 0, 5), tmp_path / "c"
    extract(images, path, VIT, shard_samples=4, format="webdataset")
    before = files(path)
    extract(photos(images, 5, 3), path, VIT, append=True, format="webdataset")
    after = files(path)
    assert {name: after[name] for name in before if not name.endswith("column.json")} == {
        name: data for name, data in before.items() if not name.endswith("column.json")}  # fmt: skip
    cache = open_cache(path)
    assert cache.numbers.tolist() == [0, 1, 2, 3, 4, 8, 9, 10]
    assert np.isfinite(cache.read_tokens("vit.pre_tail", cache.numbers, cache.numbers * 0).numpy()).all()
    assert inspect("verify", path, "--full").exit_code == 0
    assert inspect("convert", path, tmp_path / "zarr", "--format", "zarr").exit_code == 0
    other = open_cache(tmp_path / "zarr")
    assert other.ids == cache.ids and inspect("verify", tmp_path / "zarr", "--full").exit_code == 0
    raw = [one.read_column("vit.pre_tail", cache.numbers, cache.numbers * 0)["tokens"] for one in (cache, other)]
    assert raw[0].equal(raw[1])


def files_without_time(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(path).items() if not name.startswith("commits")}


def test_what_cannot_be_appended_is_refused(
    grown: tuple[Path, Path, dict[str, bytes]], extract: Any, tmp_path: Path
) -> None:
    path, images, _ = grown
    before = files(path), (path / "plan.json").read_bytes(), (path / "samples.arrow").read_bytes()
    with pytest.raises(ValueError, match="--append: there is no cache at"):
        extract(images, tmp_path / "none", VIT, append=True)
    photos(images, 60, 1)
    with pytest.raises(ValueError, match="1 new, 0 changed .new is 'class 0/060.png'.; .*add --append"):
        extract(images, path, VIT)
    victim = images / "class 1/003.png"
    data = bytearray(victim.read_bytes())
    data[-20] ^= 1  # as long as it was
    victim.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="image 'class 1/003.png' has other bytes"):
        extract(images, path, VIT, append=True)
    with pytest.raises(ValueError, match="flip"):
        extract(photos(tmp_path / "more", 70, 1), path, VIT, append=True, recipe=run.Options((), path).recipe.__class__(32, flip=0.0))  # fmt: skip
    assert before == (files(path), (path / "plan.json").read_bytes(), (path / "samples.arrow").read_bytes())


def test_repair_names_the_command_of_the_damaged_part_and_the_cache_where_it_lies(
    grown: tuple[Path, Path, dict[str, bytes]], made: Path, extract: Any
) -> None:
    path, images, _ = grown
    for shard in (0, 2):  # of the first images, and of those appended
        tar = path / f"views/0/pixels/{shard:06d}.tar"
        tar.write_bytes(tar.read_bytes()[:-1])
        text = inspect("repair", path, "--yes").output
        words = text.rpartition("extract-features ")[2].split()
        assert words[:2] == [str(made / "images"), str(path)] and "--append" in words, text
        extract(images, path, VIT, append=True, shard_samples=8)
        assert inspect("verify", path, "--full").exit_code == 0


def test_a_limit_is_a_random_sample_that_grows_by_appending(extract: Any, tmp_path: Path) -> None:
    images, cache = photos(tmp_path / "images", 0, 10), tmp_path / "c"
    said: list[str] = []
    extract(images, cache, VIT, shard_samples=4, limit=4, say=said.append)
    assert "4 of 10 images are taken (--limit): the first in canonical order, a random sample" in said
    keys = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    order = [keys[i] for i in canonical_order(keys)]
    assert open_cache(cache).keys == order[:4]
    extract(images, cache, VIT, limit=4, say=said.append)
    assert "complete before" in said[-1]
    with pytest.raises(
        ValueError, match="2 new, 0 changed .*--limit 6 takes the first in canonical order .*add --append"
    ):
        extract(images, cache, VIT, limit=6)
    extract(images, cache, VIT, limit=6, append=True)
    assert open_cache(cache).keys == order[:6]
    assert "--limit 6 --append" in json.loads((cache / "commits/0/vit.pre_tail/000001.json").read_text())["command"]
