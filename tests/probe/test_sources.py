"""What may be probed, and what is said about it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from training import train_quietly

from mrmae.probe.sources import column_features, open_source
from mrmae.shards.cache import open_cache
from mrmae.train.checkpoint import list_checkpoints
from mrmae.train.export import load_mcmae
from mrmae.train.method.mcmae import encode_mcmae
from mrmae.train.method.recipe import load_recipe

PIXELS = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_students_tokens_are_those_that_timm_gives(trained: Path) -> None:
    source = open_source(str(trained))
    model = timm.create_model(f"local-dir:{trained / 'student'}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    with torch.no_grad():
        wanted = model.forward_features(((PIXELS / 255 - mean) / std).permute(0, 3, 1, 2))
    assert source.teacher
    found = source.teacher.forward(PIXELS)
    assert found.cls is not None
    assert (found.tokens - wanted[:, 1:]).abs().max() < 1e-5 and (found.cls - wanted[:, 0]).abs().max() < 1e-5
    assert source.size == 32 and source.home == trained and source.notes


def test_out_its_student_folder_and_its_last_checkpoint_are_one_source(trained: Path) -> None:
    places = [trained, trained / "student", list_checkpoints(trained / "checkpoints")[-1]]
    sources = [open_source(str(place)) for place in places]
    assert sources[0].about == sources[1].about == sources[2].about
    assert all(source.home == trained and source.cache for source in sources)


def test_an_unfinished_run_gives_its_newest_checkpoint_and_says_so(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(trained / "run.json", tmp_path)
    source = open_source(str(tmp_path))
    assert source.about == open_source(str(trained)).about
    assert any("not finished" in note for note in source.notes)


def test_another_size_interpolates_the_positions_and_says_so(trained: Path) -> None:
    source = open_source(str(trained), size=48)
    assert source.spec.grid == (6, 6) and source.size == 48
    assert any("32 px and runs at 48 px" in note and "4 x 4 patches to 6 x 6" in note for note in source.notes)
    assert source.about != open_source(str(trained)).about
    with pytest.raises(ValueError, match="--size 50: is no multiple of the student's patch of 8 px; try 48 or 56"):
        open_source(str(trained), size=50)


def test_a_timm_vit_is_read_behind_its_norm_and_a_cnn_before_its_pooling() -> None:
    vit = open_source("timm:test_vit/random")
    model = vit.teacher.tower.module if vit.teacher else None
    pixels = torch.zeros(1, 160, 160, 3, dtype=torch.uint8)
    assert vit.teacher and model is not None and any("RANDOM" in note for note in vit.notes)
    mean, std = torch.tensor(vit.spec.mean), torch.tensor(vit.spec.std)
    with torch.no_grad():
        wanted = model.forward_features(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))  # type: ignore[operator]
    assert (vit.teacher.forward(pixels).tokens - wanted[:, 1:]).abs().max() < 1e-4
    cnn = open_source("timm:test_resnet/random")
    assert cnn.spec.tap == "head" and cnn.spec.grid == cnn.spec.native_grid and cnn.spec.resample == "none"


def test_a_file_of_another_grid_runs_at_its_own_size_without_a_note(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=64, patch_size=8)
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    text = f"timm:test_vit@{tmp_path / 'w.safetensors'}?patch_size=8"
    asked, own, other = (open_source(text, size=size) for size in (64, 0, 96))
    assert asked.about == own.about and own.size == 64 and own.spec.grid == (8, 8) and not asked.notes
    assert any(
        "trained at 64 px and runs at 96 px" in note and "8 x 8 patches to 12 x 12" in note for note in other.notes
    )


def test_a_column_gives_the_stored_tokens(tiny_cache: Path) -> None:
    source, cache = open_source(f"{tiny_cache}#a"), open_cache(tiny_cache)
    tokens, cls = column_features(source, np.array([3, 1]))
    assert torch.equal(tokens[1], cache[1].views[0]["a"]["tokens"])
    assert cls is not None and torch.equal(cls[0], cache[3].views[0]["a"]["cls"])
    assert any("RANDOM" in note for note in source.notes)


@pytest.mark.parametrize("text, told", [
    ("nowhere", "there is no such file or folder; expected OUT of train-mrmae"),
    ("timm:vit_nothing", "timm has no model"),
    ("open_clip:ViT-B-32", "names no weights; add /TAG"),
])  # fmt: skip
def test_an_unknown_source_is_refused_with_the_forms(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        open_source(text)


def test_folders_and_columns_that_hold_nothing_are_refused(tiny_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no student and no checkpoint"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="has no teacher or column 'z'; it has a, b, a.pre_tail"):
        open_source(f"{tiny_cache}#z")
    with pytest.raises(ValueError, match="--size 64: .* leave --size out"):
        open_source(f"{tiny_cache}#a", size=64)


def test_a_student_whose_file_is_no_weights_or_another_models_is_refused_in_one_line(
    trained: Path, tmp_path: Path
) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    shutil.copytree(trained / "student", tmp_path / "student")
    (tmp_path / "step-000000001.pt").write_bytes(pointer)
    (tmp_path / "student" / "model.safetensors").write_bytes(pointer)
    for place in (tmp_path, tmp_path / "step-000000001.pt"):
        with pytest.raises(ValueError, match="is a git-LFS pointer of 63 bytes, in place of 9; .* git lfs pull"):
            open_source(str(place))
    safetensors.torch.save_file({"cls_token": torch.zeros(1, 1, 3)}, tmp_path / "student" / "model.safetensors")
    with pytest.raises(ValueError, match=r"cls_token has shape \[1, 1, 3\] in the weights; the model has \[1, 1, 64\]"):
        open_source(str(tmp_path))
    torch.save({"model": {}, "optimizer": exec}, tmp_path / "step-000000001.pt")
    with pytest.raises(ValueError, match="step-000000001.pt: is no checkpoint of train-mrmae") as error:
        open_source(str(tmp_path / "step-000000001.pt"))
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_mcmaes_student_is_scored_with_its_fusion_as_while_it_trains(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = make_cache(
        tmp_path / "cache", n=8, size=32, grid=2, teachers={"a": {"width": 8, "has_cls": False, "has_attention": False}}
    )
    recipe = load_recipe("mr-mcmae", ["student.model=test_mcmae", "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
                                      "optim.epochs=2", "optim.warmup_epochs=1", "optim.batch_size=4"])  # fmt: skip
    train_quietly(cache, tmp_path / "out", recipe)
    source = open_source(str(tmp_path / "out"))
    model = load_mcmae(tmp_path / "out" / "student")
    torch.nn.init.normal_(model.stage1_output_decode.weight)  # so that a fusion left out is seen
    safetensors.torch.save_file(model.state_dict(), tmp_path / "out" / "student" / "model.safetensors")
    changed = open_source(str(tmp_path / "out" / "student"))
    mean, std = (torch.tensor(x) for x in (source.spec.mean, source.spec.std))
    everything = torch.arange(4).expand(len(PIXELS), -1)
    with torch.no_grad():  # what Pretrainer.tokens, and so k-NN while training, gives
        wanted, _ = encode_mcmae(model, PIXELS, everything, scale=1 / (255 * std), shift=-mean / std)
    assert changed.teacher
    found = changed.teacher.forward(PIXELS)
    assert found.cls is None and (found.tokens - wanted).abs().max() < 1e-4 and wanted.std() > 0.1
    with torch.no_grad():
        unfused = model.forward_features(((PIXELS / 255 - mean) / std).permute(0, 3, 1, 2))
    assert (unfused - wanted).abs().max() > 0.1, "fine-tuning leaves the fusion out"
    assert open_source(str(list_checkpoints(tmp_path / "out" / "checkpoints")[-1])).about == source.about
    larger = open_source(str(tmp_path / "out"), size=64)
    assert larger.spec.grid == (4, 4) and any("2 x 2 patches to 4 x 4" in note for note in larger.notes)
    assert larger.teacher and larger.teacher.forward(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).tokens.shape[1] == 16
    with pytest.raises(ValueError, match="--size 40: is no multiple of the student's patch of 16 px"):
        open_source(str(tmp_path / "out"), size=40)
