"""Several taps of one teacher: columns of their own, one tail, read apart."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae.extract.inspect.compare import compare_live
from mrmae.extract.options import one_per_tap
from mrmae.extract.teachers import build_teacher, parse_teacher
from mrmae.extract.teachers.teacher import normalise
from mrmae.shards.cache import open_cache
from mrmae.shards.check import find_problems
from mrmae.shards.drop import files_of_column

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


@torch.no_grad()
def test_queries_keys_and_values_of_a_block_follow_from_its_stored_input(
    extract: Any, photo_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    manifest = extract(photo_folder, path, f"{VIT}?tap=pre_tail,input_5,k_5", dtype="float16")
    tails = {column["name"]: column["tail"]["file"] for column in manifest["columns"]}
    assert tails == {
        "vit.pre_tail": "tail/vit.safetensors",
        "vit.input_5": "tail/vit.input_5.safetensors",
        "vit.k_5": "tail/vit.input_5.safetensors",
    }
    cache, at = open_cache(path), ([0, 1, 2], [0, 0, 0])
    assert list(cache.derived) == ["vit.post_ln", "vit.qkv_5", "vit.q_5", "vit.v_5"]
    vit = build_teacher(parse_teacher(VIT), grid=4, view_size=32, device="cpu", precision="fp32").tower.module
    said: list[torch.Tensor] = []
    vit.blocks[4].attn.qkv.register_forward_hook(lambda _m, _i, out: said.append(out))  # type: ignore[index,operator]
    spec = cache.columns["vit.input_5"].spec
    vit(normalise(cache.read_pixels(*at), spec))
    qkv = torch.cat([cache.read_cls("vit.qkv_5", *at)[:, None], cache.read_tokens("vit.qkv_5", *at)], dim=1)
    assert qkv.shape == said[0].shape and torch.allclose(qkv, said[0], atol=5e-3)
    for name, part in zip(("vit.q_5", "vit.k_5", "vit.v_5"), qkv[:, 1:].chunk(3, dim=-1)):
        assert torch.allclose(cache.read_tokens(name, *at), part, atol=5e-3)
    assert int(cache.tail("vit.input_5")["qkv.heads"]) == vit.blocks[4].attn.num_heads  # type: ignore[index,union-attr]
    assert all(column.good for column in compare_live(cache, 3)) and not find_problems(path, full=True)
    assert {file.name for file in files_of_column(path, "vit.k_5")}.isdisjoint(
        {"vit.input_5.safetensors", "vit.safetensors"}
    )


def test_a_block_without_plain_projections_has_no_facets(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    for text, said in {
        f"{VIT}?tap=q_1": "there is no tap 'input_1'; this model has input_2 to input_6",
        "cnn=timm:test_efficientnet/random?tap=input_2": "there is no tap 'input_2'",
        f"{VIT}?tap=k_3&qk_norm=true": r"this block is a Block with Attention; a plain ViT's was expected",
    }.items():
        with pytest.raises(ValueError, match=said):
            extract(photo_folder, tmp_path / "c", text)
