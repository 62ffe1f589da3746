"""What other libraries load gives the student's own tokens, and what cannot be made is said before training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mrmae.train import elsewhere
from mrmae.train.cli import main
from mrmae.train.export import export_student, load_student
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.targets import CacheInfo

MakeModel = Callable[..., Pretrainer]


@pytest.fixture
def make_model(tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo]) -> MakeModel:
    """A student of `recipe` whose every parameter has moved away from its start."""

    def make(recipe: str, *sets: str, patch: int = 5) -> Pretrainer:
        model = build_model(tiny_recipe(recipe, *sets), tiny_info(3, patch))
        with torch.no_grad():
            for parameter in model.student.parameters():
                parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
        return model

    return make


def images_of(model: Pretrainer, n: int) -> torch.Tensor:
    return torch.randn(n, model.info.channels, model.info.size, model.info.size)


@pytest.mark.soak
def test_transformers_gives_timm_s_tokens_and_its_processor_timm_s_pixels(
    make_model: MakeModel, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    import numpy as np
    import timm
    from PIL import Image

    model = make_model("mr-mae", "prepare={mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}")
    elsewhere.export_transformers(model, tmp_path / "vit")
    student = load_student(export_student(model, tmp_path / "timm", source={}))
    theirs, told = transformers.ViTModel.from_pretrained(
        tmp_path / "vit", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = images_of(model, 2)
    with torch.no_grad():
        off = theirs.eval()(images).last_hidden_state - student.forward_features(images)
    assert off.abs().max() < 1e-5
    photo = Image.effect_noise((60, 45), 80).convert("RGB").resize((70, 50), Image.Resampling.BICUBIC)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    pixels = torch.as_tensor(np.asarray(processor(photo, return_tensors="np")["pixel_values"]))[0]
    assert pixels.shape == (3, 15, 15) and (pixels - transform(photo)).abs().max() < 0.05  # one grey level: 0.01


@pytest.mark.soak
@pytest.mark.parametrize("recipe, patch", [("mr-mae", 5), ("mr-mcmae", 16)])
def test_onnx_gives_the_student_s_tokens_for_any_number_of_images(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, patch: int
) -> None:
    for name in elsewhere.ONNX_PACKAGES:
        pytest.importorskip(name, reason="pip install 'mrmae[onnx]'")
    import onnxruntime

    model, path = make_model(recipe, patch=patch), tmp_path / "student.onnx"
    elsewhere.export_onnx(model, path)
    images = images_of(model, 3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["tokens"], {"images": images.numpy()})[0])
    with torch.no_grad():
        assert (found - model.student.eval().forward_features(images)).abs().max() < 1e-4
    monkeypatch.setattr(elsewhere, "ONNX_AGREES", 0.0)
    with pytest.raises(ValueError, match="other.onnx: its tokens differ from the student's by .* nothing was written"):
        elsewhere.export_onnx(model, path.with_name("other.onnx"))
    assert not path.with_name("other.onnx").exists()


def test_names_of_transformers_are_those_of_its_files_and_nothing_is_lost(make_model: MakeModel) -> None:
    model = make_model("mr-mae")
    ours, theirs = model.student.state_dict(), elsewhere.transformers_weights(model)
    assert sum(x.numel() for x in theirs.values()) == sum(x.numel() for x in ours.values())
    assert theirs["embeddings.position_embeddings"].equal(ours["pos_embed"])
    key = theirs["encoder.layer.5.attention.attention.key.weight"]
    assert key.equal(ours["blocks.5.attn.qkv.weight"][64:128]) and key.is_contiguous()
    assert theirs["encoder.layer.0.intermediate.dense.bias"].equal(ours["blocks.0.mlp.fc1.bias"])
    assert elsewhere.transformers_config(model)["intermediate_size"] == 192


@pytest.mark.parametrize("kind", ["mae", "transformers"])
def test_a_student_with_other_parts_is_refused(make_model: MakeModel, kind: str) -> None:
    elsewhere.check_exports(make_model("mr-mae"), [kind])
    with pytest.raises(ValueError, match=rf"--export {kind}: test_vit has no CLS token"):
        elsewhere.check_exports(make_model("mimic-only", "student.cls=false"), [kind])
    with pytest.raises(ValueError, match=rf"--export {kind}: test_vit has blocks.0.ls1.gamma"):
        elsewhere.check_exports(make_model("mimic-only", "student.init_values=0.1"), [kind])
    with pytest.raises(ValueError, match="export: 'pickle' is unknown; one of mae, transformers, onnx was expected"):
        elsewhere.check_exports(make_model("mr-mae"), ["pickle"])


def test_what_cannot_be_exported_is_said_before_anything_is_written(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "ONNX_PACKAGES", ("onnx_that_is_not_there",))
    args = [str(tiny_cache), str(tmp_path / "out"), "--student", "test_vit", "--batch-size", "8", "--export", "onnx"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1 and "pip install 'mrmae[onnx]'" in result.output
    assert not (tmp_path / "out").exists()
