"""The exported folder: timm builds it in one line, strictly, with our features."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml

from mrmae.train.export import export_student, load_mcmae, load_student
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.targets import Batch, CacheInfo

STATS = ["prepare={mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}"]


@pytest.fixture
def model(tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo]) -> Pretrainer:
    """A student whose every parameter has moved away from its start."""
    built = build_model(tiny_recipe("mr-mae", *STATS), tiny_info(6, 5))
    with torch.no_grad():
        for parameter in built.student.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    return built


def test_timm_loads_the_export_in_one_line_with_our_features(
    model: Pretrainer, tiny_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    folder = export_student(model, tmp_path / "out put" / "student", source={"command": "train-mrmae A B"})
    student = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(student)
    assert config["input_size"] == (3, 30, 30) and config["interpolation"] == "bicubic"
    assert tuple(config["mean"]) == (0.1, 0.2, 0.3) and tuple(config["std"]) == (0.4, 0.5, 0.6)
    assert student.patch_embed.patch_size == (5, 5) and student.num_classes == 0
    assert student.global_pool == "token" and isinstance(student.fc_norm, torch.nn.Identity)

    pixels = tiny_batch(model.info).pixels
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    with torch.no_grad():
        features = student.forward_features(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    assert (features[:, 1:] - model.tokens(pixels)).abs().max() < 1e-5
    assert torch.equal(student.forward_head(features), features[:, 0])


def test_a_detector_s_backbone_is_the_export_with_features_only(
    model: Pretrainer, tiny_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    folder = export_student(model, tmp_path, source={})
    how = {"pretrained": True, "features_only": True}
    student = timm.create_model(f"local-dir:{folder}", **how, out_indices=(1, -1)).eval()
    pixels = tiny_batch(model.info).pixels
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.recipe.prepare.mean, model.recipe.prepare.std))
    with torch.no_grad():
        maps = student((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
        tokens = maps[-1].flatten(2).transpose(1, 2)
        assert (model.student.norm(tokens) - model.tokens(pixels)).abs().max() < 1e-5, (
            "blocks' outputs, before the norm"
        )
    assert student.feature_info.reduction() == [5, 5] and student.feature_info.channels() == [64, 64]
    wide = timm.create_model(f"local-dir:{folder}", **how, out_indices=(-1,), img_size=(30, 60))
    assert wide(torch.zeros(1, 3, 30, 60))[0].shape == (1, 64, 6, 12)


def test_the_state_dict_is_complete_and_loads_strictly(model: Pretrainer, tmp_path: Path) -> None:
    folder = export_student(model, tmp_path, source={})
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    plain = timm.create_model("test_vit", img_size=30, patch_size=5, num_classes=0, global_pool="token", fc_norm=False)
    plain.load_state_dict(weights, strict=True)
    assert "pos_embed" in weights and all(x.dtype == torch.float32 for x in weights.values())
    loaded = load_student(folder)
    assert not loaded.training
    with pytest.raises(ValueError, match="holds test_vit; MCMAE's student was expected"):
        load_mcmae(folder)
    assert all(torch.equal(x, model.student.state_dict()[name]) for name, x in loaded.state_dict().items())


def test_the_export_can_be_fine_tuned_at_another_size(model: Pretrainer, tmp_path: Path) -> None:
    folder = export_student(model, tmp_path, source={})
    tuned = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, global_pool="avg", img_size=40)
    assert tuned(torch.zeros(1, 3, 40, 40)).shape == (1, 7)
    assert torch.equal(tuned.blocks[2].mlp.fc1.weight, model.student.blocks[2].mlp.fc1.weight)
    assert torch.equal(tuned.norm.bias, model.student.norm.bias)  # with fc_norm it would be dropped without a word


def test_images_with_other_channels_export_too(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tmp_path: Path
) -> None:
    recipe = tiny_recipe("mae", "prepare={mean: [0.5], std: [0.25]}")
    folder = export_student(build_model(recipe, tiny_info(channels=1)), tmp_path, source={})
    assert load_student(folder)(torch.zeros(1, 1, 16, 16)).shape == (1, 64)


def test_layer_scale_q_and_v_bias_and_no_cls_come_back_from_timm(
    tiny_recipe: Callable[..., Recipe],
    tiny_info: Callable[..., CacheInfo],
    tiny_batch: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    asked = ["init_values=0.3", "qkv_bias=qv", "cls=false", "positions=sinusoid", "drop_path=0.1"]
    recipe = tiny_recipe("mimic-only", *(f"student.{option}" for option in asked))
    model = build_model(recipe, tiny_info())
    folder = export_student(model, tmp_path, source={})
    student = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert student.cls_token is None and student.global_pool == "avg" and student.blocks[5].ls2.gamma[0] == 0.3
    pixels = tiny_batch(model.info).pixels
    mean, std = torch.tensor(recipe.prepare.mean), torch.tensor(recipe.prepare.std)
    with torch.no_grad():
        features = student.forward_features(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    assert features.shape == (2, 16, 64) and (features - model.tokens(pixels)).abs().max() < 1e-5
    assert load_student(folder).blocks[0].ls1.gamma.shape == (64,)
    assert "[1, 16, 64]\n" in (folder / "README.md").read_text()


def test_blocks_that_no_term_reads_are_left_out_and_the_card_says_so(
    tiny_recipe: Callable[..., Recipe],
    tiny_info: Callable[..., CacheInfo],
    tiny_batch: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    model = build_model(tiny_recipe("mimic-only", "terms.mimic.tap=block4"), tiny_info())
    folder = export_student(model, tmp_path, source={})
    student = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert len(student.blocks) == len(load_student(folder).blocks) == 4
    told = "4 blocks; its last 2 blocks, which no term reads, left out; the final norm, which no term reads, stays at its start"
    assert told in (folder / "README.md").read_text() and told in model.describe()["student"]
    pixels = tiny_batch(model.info).pixels
    mean, std = torch.tensor(model.recipe.prepare.mean), torch.tensor(model.recipe.prepare.std)
    with torch.no_grad():
        features = student.forward_features(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    assert (features[:, 1:] - model.tokens(pixels)).abs().max() < 1e-5


def test_exporting_again_replaces_the_files_and_leaves_no_others(model: Pretrainer, tmp_path: Path) -> None:
    export_student(model, tmp_path, source={"epochs": 1})
    with torch.no_grad():
        model.student.norm.bias.fill_(3.0)
    export_student(model, tmp_path, source={"epochs": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (load_student(tmp_path).norm.bias == 3).all()


def test_the_card_tells_how_to_load_and_how_it_was_made(model: Pretrainer, tmp_path: Path) -> None:
    source = {"command": "train-mrmae CACHE OUT", "teachers": {"clip": "random weights"}, "epochs": 3}
    text = (export_student(model, tmp_path, source=source) / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "timm" and "mr-mae" in front["tags"]
    assert 'timm.create_model("local-dir:' in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == source
    assert "decoder @ predicted > linear ~ pixels" in text
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["tag"] == "mr-mae"


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="has no model.safetensors and no config.json; an exported student was expected"
    ):
        load_student(tmp_path)


def test_a_disk_error_names_the_file(model: Pretrainer, tmp_path: Path) -> None:
    (tmp_path / "student").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="student"):
        export_student(model, tmp_path / "student", source={})


# ---- MCMAE's student, which timm does not have


def test_an_mcmae_student_comes_back_under_convmaes_names(
    tiny_recipe: Callable[..., Recipe],
    tiny_info: Callable[..., CacheInfo],
    tiny_batch: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    model = build_model(tiny_recipe("mr-mcmae", *STATS), tiny_info(3, 16))
    folder = export_student(model, tmp_path, source={"epochs": 1})
    assert set(safetensors.torch.load_file(folder / "model.safetensors")) == set(model.student.state_dict())
    loaded = load_mcmae(folder)
    assert not loaded.training
    with pytest.raises(ValueError, match="holds MCMAE's student; a timm model was expected"):
        load_student(folder)
    assert all(torch.equal(x, model.student.state_dict()[name]) for name, x in loaded.state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_mcmae" and config["input_size"] == [3, 48, 48]
    images = (tiny_batch(model.info).pixels / 255 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    images = images.permute(0, 3, 1, 2)
    assert torch.equal(loaded.forward_features(images), model.student.forward_features(images))
    text = (folder / "README.md").read_text()
    assert "timm\nhas no such model" in text and "load_mcmae" in text and "local-dir" not in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "mrmae"


def test_an_mcmae_student_without_its_last_blocks_comes_back(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tmp_path: Path
) -> None:
    recipe = tiny_recipe("mr-mcmae", "terms.mimic.tap=block2", "terms.pixels=null")
    model = build_model(recipe, tiny_info(4, 16))
    loaded = load_mcmae(export_student(model, tmp_path, source={}))
    assert len(loaded.blocks) == 2
    assert all(torch.equal(x, model.student.state_dict()[name]) for name, x in loaded.state_dict().items())
