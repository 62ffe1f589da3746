"""Several taps of one teacher: columns of their own, one tail, read apart."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae.extract.inspect.compare import compare_live
from mrmae.extract.options import one_per_tap
from mrmae.shards.cache import open_cache

VIT = "vit=timm:test_vit/random"


def test_a_text_is_split_at_its_taps() -> None:
    assert one_per_tap(VIT) == [VIT] and one_per_tap(f"{VIT}?tap=block_1") == [f"{VIT}?tap=block_1"]
    assert one_per_tap(f"{VIT}?mean=0,0,0&tap=a,b&x=1,2") == [f"{VIT}?mean=0,0,0&tap={t}&x=1,2" for t in "ab"]
    assert one_per_tap("vit=timm:m@odd?tap=a/w.pth") == ["vit=timm:m@odd?tap=a/w.pth"]


def test_taps_of_one_teacher_are_columns_with_one_tail(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    manifest = extract(photo_folder, tmp_path / "c", f"{VIT}?tap=pre_tail,block_1")
    assert [column["name"] for column in manifest["columns"]] == ["vit.pre_tail", "vit.block_1"]
    assert len({column["tail"]["file"] for column in manifest["columns"]}) == 1
    cache = open_cache(tmp_path / "c")
    assert cache.teachers == {"vit": "vit.pre_tail"}, "the first tap is the teacher's"
    view = cache[0].views[0]
    assert set(view) == {"pixels", "view", "vit", "vit.pre_tail", "vit.block_1", "vit.post_ln", "vit.block_1_post_ln"}
    assert all(column.good for column in compare_live(cache, 3)) and not any(
        column.good for column in compare_live(cache, 3, mirror=True, texts=[VIT])
    )
    assert not torch.allclose(view["vit"]["tokens"], view["vit.block_1"]["tokens"], atol=0.1)


def test_a_tap_is_added_later_as_if_it_had_been_there(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    whole = extract(photo_folder, tmp_path / "whole", f"{VIT}?tap=pre_tail,block_1")
    extract(photo_folder, tmp_path / "c", f"{VIT}?tap=pre_tail")
    assert extract(photo_folder, tmp_path / "c", f"{VIT}?tap=pre_tail", f"{VIT}?tap=block_1") == whole


def test_two_models_of_one_name_are_refused(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two models are named vit; expected one name per model"):
        extract(photo_folder, tmp_path / "c", f"{VIT}?tap=block_1", "vit=timm:test_vit2/random")
    with pytest.raises(ValueError, match="columns .'vit.pre_tail', 'vit.pre_tail'. repeat"):
        extract(photo_folder, tmp_path / "c", VIT, f"{VIT}?tap=pre_tail")
