"""Labelled images in two parts: what is accepted, refused and said; and the evaluation view."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mrmae.probe.data import eval_view, open_data, shared_with
from mrmae.probe.sources import column_features, open_source
from mrmae.shards.cache import open_cache
from mrmae.shards.format import read_sources
from mrmae.shards.near import NearFolder


def test_a_folder_and_its_tar_give_the_same_parts(images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(images.rglob("*.png")):
            tar.add(path, path.relative_to(images))
    folder = open_data([str(images)], tmp_path)
    tar_data = open_data([str(tmp_path / "images.tar")], tmp_path)
    assert folder.classes == ["azure", "brick", "moss"] and len(folder.train) == 24 and len(folder.test) == 12
    assert folder.train.id == tar_data.train.id and folder.test.id == tar_data.test.id != folder.train.id
    with folder.test.image(5) as one, tar_data.test.image(5) as other:
        assert np.array_equal(one, other)
    assert folder.labels(folder.test).tolist() == sorted(list(range(3)) * 4)


def test_two_paths_and_patterns_choose_the_parts(images: Path, tmp_path: Path) -> None:
    two = open_data([str(images / "train"), str(images / "test")], tmp_path)
    assert len(two.train) == 24 and two.test.rows[0].key == "azure/test-0.png"
    some = open_data([str(images)], tmp_path, train_include=["train/*-[0-3].png"], test_include=["train/*-[4-7].png"])
    assert len(some.train) == len(some.test) == 12


def test_a_cache_that_is_far_away_is_read_through_a_near_folder(tiny_cache: Path, tmp_path: Path) -> None:
    near, chosen = NearFolder(tmp_path / "near", 1 << 20), {"train_include": ["*0? *"], "test_include": ["*[12]? *"]}
    plain, data = (open_data([str(tiny_cache)], tmp_path, near=how, **chosen) for how in (None, near))
    assert np.array_equal(data.test.pixels(3, 32, "bicubic"), plain.test.pixels(3, 32, "bicubic"))
    source, direct = (open_source(f"{tiny_cache}#a", near=how) for how in (near, None))
    assert torch.equal(column_features(source, [0, 5])[0], column_features(direct, [0, 5])[0])
    assert data.test.cache and data.test.cache.local and data.test.cache.local.fetched == 1
    assert source.column and source.column[0].local and source.column[0].local.fetched == 1, "one shard of the column"


def test_a_cache_gives_its_stored_views(tiny_cache: Path, tmp_path: Path) -> None:
    keys = sorted(open_cache(tiny_cache).keys)
    data = open_data([str(tiny_cache)], tmp_path, train_include=["*0? *"], test_include=["*[12]? *"])
    assert [row.key for row in data.train.rows] == [key for key in keys if " 00" in key or " 0" in key and "00" in key]
    cache = open_cache(tiny_cache)
    view = cache[data.test.rows[2].key].views[0]["pixels"].numpy()
    assert np.array_equal(data.test.pixels(2, 99, "bicubic"), view)


def test_a_cache_of_which_nothing_can_be_read_says_where_to_look(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_cache(tmp_path / "c", n=4, n_views=1, finalise=False)
    for record in path.glob("commits/0/b.pre_tail/*.json"):
        record.unlink()
    with pytest.raises(ValueError, match="no image of this cache can be read: .*plan.json .*inspect-cache verify"):
        open_data([str(path)], tmp_path, partial=["b.pre_tail"])


def test_missing_labels_are_refused(make_images: Callable[..., Path], tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", {"train": 2, "test": 1})
    for path in root.glob("test/*/*.png"):
        shutil.move(path, root / f"{path.parent.name}.png")
    with pytest.raises(
        ValueError, match=r"3 of 3 test images have no label, first 'azure.png'; expected one folder per class"
    ):
        open_data([str(root)], tmp_path, test_include=["azure.png", "brick.png", "moss.png"])


def test_a_class_absent_from_test_is_said_and_one_absent_from_train_refused(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_images(tmp_path / "images", {"train": 2, "test": 2})
    shutil.rmtree(root / "test" / "moss")
    data = open_data([str(root)], tmp_path)
    assert len(data.classes) == 3 and any("1 of the classes have no test image (moss)" in note for note in data.notes)
    with pytest.raises(ValueError, match="class 'moss' is in the test part and not in the train part"):
        open_data([str(root)], tmp_path, train_include=["test/*"], test_include=["train/*"])


def test_one_class_only_and_an_empty_part_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one class only, 'moss'"):
        open_data([str(images)], tmp_path, train_include=["train/moss/*"])
    with pytest.raises(ValueError, match=r"matches none of the 36 images.*choose it with --test-include"):
        open_data([str(images)], tmp_path, test_include=["val/*"])
    with pytest.raises(ValueError, match="3 paths; expected one"):
        open_data([str(images)] * 3, tmp_path)


def test_one_image_per_class_is_said(make_images: Callable[..., Path], tmp_path: Path) -> None:
    data = open_data([str(make_images(tmp_path / "images", {"train": 1, "test": 1}))], tmp_path)
    assert any("one train image per class" in note for note in data.notes)


def test_an_image_in_both_parts_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="8 images are in the train and in the test part, first 'train/azure/train-0.png'"
    ):
        open_data([str(images)], tmp_path, test_include=["train/azure/*"])


def test_an_image_that_does_not_decode_is_named(make_images: Callable[..., Path], tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", {"train": 1, "test": 1})
    (root / "test" / "moss" / "test-0.png").write_bytes(b"no image")
    data = open_data([str(root)], tmp_path)
    with pytest.raises(ValueError, match="moss/test-0.png: not an image in a known format.*every image counts"):
        with data.test.image(2):
            pass


def test_images_are_shared_with_a_cache_by_key_or_by_bytes(
    tiny_cache: Path, tiny_images: dict[str, bytes], images: Path, tmp_path: Path
) -> None:
    data = open_data([str(images)], tmp_path)
    assert shared_with(data.test, read_sources(tiny_cache)) == []
    key, content = next(iter(tiny_images.items()))
    for part in ("train", "test"):
        (tmp_path / "mixed" / part / "x").mkdir(parents=True)
        shutil.copy(images / "train/moss/train-0.png", tmp_path / "mixed" / part / "x" / f"{part}.png")
    shutil.copytree(images / "train", tmp_path / "mixed" / "train", dirs_exist_ok=True)
    (tmp_path / "mixed/test/x/renamed.png").write_bytes(content)
    assert shared_with(open_data([str(tmp_path / "mixed")], tmp_path).test, read_sources(tiny_cache)) == [
        "test/x/renamed.png"
    ]
    same_key = tmp_path / "same" / key
    same_key.parent.mkdir(parents=True)
    shutil.copy(images / "train/moss/train-1.png", same_key)
    (tmp_path / "base" / key.split("/")[0]).mkdir(parents=True)
    (tmp_path / "base" / "other").mkdir()
    shutil.copy(images / "train/moss/train-2.png", tmp_path / "base" / key.split("/")[0])
    shutil.copy(images / "train/moss/train-3.png", tmp_path / "base" / "other")
    assert shared_with(
        open_data([str(tmp_path / "base"), str(tmp_path / "same")], tmp_path).test, read_sources(tiny_cache)
    ) == [key]


@pytest.mark.parametrize("height, width", [(256, 256), (300, 513), (57, 31), (224, 1000)])
def test_the_evaluation_view_is_the_centre_of_the_resized_image(height: int, width: int) -> None:
    across = np.linspace(0, 255, width)[None, :, None].repeat(height, 0).repeat(3, 2).astype(np.uint8)
    view = eval_view(across, 224, "bicubic")
    assert view.shape == (224, 224, 3)
    middle = view[112].astype(float)[:, 0]
    assert abs(middle.mean() - 127.5) < 3  # centred
    share = 224 / 256 * min(height, width) / width  # of the image's width that is seen
    assert abs((middle[-1] - middle[0]) / 255 - share) < 0.03


def test_at_224_px_an_image_of_256_is_only_cropped() -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    assert np.array_equal(eval_view(image, 224, "bicubic"), image[16:240, 16:240])
