"""Teachers against plain timm forwards: other construction, other loading, other way to the features."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mrmae.extract.teachers.address import parse_teacher
from mrmae.extract.teachers.teacher import DEFAULT_TEACHERS, build_teacher, normalise
from mrmae.extract.teachers.timm import native_pixels
from mrmae.extract.teachers.weights import load_weights
from mrmae.shards.format.spec import TeacherSpec, canonical_json
from mrmae.shards.format.tail import apply_tail

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    """Models begin with the same weights, whatever ran before."""
    torch.manual_seed(0)


def views(size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def build(text: str, *, grid: int = 4, view_size: int = 64, precision: str = "fp32"):
    return build_teacher(parse_teacher(text), grid=grid, view_size=view_size, device="cpu", precision=precision)


def query(**options) -> str:
    return "?" + "&".join(f"{key}={value}" for key, value in options.items())


def plain_image(pixels: torch.Tensor, mean, std, size: int) -> torch.Tensor:
    image = pixels.permute(0, 3, 1, 2).to(torch.float32)
    if image.shape[-1] != size:
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clip(0, 255)
    return (image.div(255) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def output_of(model: nn.Module, module: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """What `module` returns in a plain forward of `model`."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model.eval()(image)
    hook.remove()
    return seen[0]


def random_weights_file(path: Path, model: nn.Module) -> Path:
    """Weights large enough that every part of the model matters (LayerScale starts at 1e-5, biases at 0)."""
    torch.manual_seed(3)
    weights = {k: v + 0.2 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    weights = {k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in weights.items()}
    safetensors.torch.save_file(weights, path)
    return path


def plain_timm(file: Path, name: str, **options) -> nn.Module:
    """timm's own pretrained loading, from `file`."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **options).eval()


def assert_near(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-4) -> None:
    assert a.shape == b.shape and a.dtype == torch.float32
    assert (a - b).abs().max() <= limit
    assert b.std() > 0.01  # equal because right, not because all zero


VITS = {
    "cls": ("test_vit", {}, 16, 1),
    "registers": ("vit_small_patch16_dinov3", SMALL, 16, 5),
    "registers, patch 14": ("vit_small_patch14_reg4_dinov2", SMALL, 14, 5),
    "patch 14": ("vit_small_patch14_dinov2", SMALL, 14, 1),
    "register, no cls": ("test_vit2", {}, 16, 1),
    "swiglu, rope, qk-norm": ("vit_medium_patch16_rope_reg1_gap_256", SMALL | {"qk_norm": True}, 16, 1),
}


@pytest.mark.parametrize("kind", VITS)
def test_vit_features_and_attention_equal_a_plain_timm_forward(tmp_path, kind):
    name, options, patch, prefix = VITS[kind]
    native = timm.create_model(name, **options)
    file = random_weights_file(tmp_path / "w.safetensors", native)
    teacher = build(f"a=timm:{name}@{file}{query(**options)}")
    features = teacher.forward(views())

    timm.layers.set_fused_attn(False)  # so that the plain model makes its attention matrix
    try:
        plain = plain_timm(file, name, img_size=4 * patch, **options)
    finally:
        timm.layers.set_fused_attn(True)
    config = plain.pretrained_cfg
    image = plain_image(views(), config["mean"], config["std"], 4 * patch)
    tokens = output_of(plain, plain.blocks[-1], image)
    assert teacher.spec.prefix_tokens == plain.num_prefix_tokens == prefix
    assert_near(features.tokens, tokens[:, prefix:])
    assert_near(features.norm, tokens[:, prefix:].norm(dim=-1), 1e-3)
    has_cls = plain.cls_token is not None
    assert teacher.spec.has_cls == has_cls == (features.cls is not None)
    assert teacher.spec.has_attention == has_cls == (features.attention is not None)
    if has_cls:
        assert_near(features.cls, tokens[:, 0])
        matrix = output_of(plain, plain.blocks[-1].attn.attn_drop, image)
        row = matrix[:, :, 0, prefix:].mean(1)
        assert (features.attention - row).abs().max() <= 1e-6 and (row.sum(1) < 1).all()
        assert row.std() > 1e-3


def test_attention_equals_an_explicit_softmax_and_the_fused_kernel_stays(tmp_path):
    file = random_weights_file(tmp_path / "w.safetensors", timm.create_model("test_vit"))
    teacher = build(f"a=timm:test_vit@{file}")
    plain = plain_timm(file, "test_vit", img_size=64)
    image = plain_image(views(), plain.pretrained_cfg["mean"], plain.pretrained_cfg["std"], 64)
    with torch.no_grad():
        x = plain.blocks[-1].norm1(output_of(plain, plain.blocks[-2], image))
        q, k, _ = plain.blocks[-1].attn.qkv(x).reshape(2, 17, 3, 2, 32).permute(2, 0, 3, 1, 4)
    rows = [torch.softmax(q[:, head, 0:1] @ k[:, head].transpose(1, 2) / 32**0.5, -1)[:, 0] for head in range(2)]
    expected = torch.stack(rows).mean(0)[:, 1:]
    assert (teacher.forward(views()).attention - expected).abs().max() <= 1e-6
    assert teacher.tower.module.blocks[-1].attn.fused_attn and teacher.spec.attention_backend == "sdpa"


def test_attention_is_not_claimed_where_a_bias_changes_it():
    teacher = build("a=timm:beit_base_patch16_224/random?depth=1&embed_dim=48&num_heads=3")
    assert teacher.spec.has_cls and not teacher.spec.has_attention
    features = teacher.forward(views())
    assert features.cls is not None and features.attention is None


@pytest.mark.parametrize("tap, width, side", [("last", 64, 5), ("stage_3", 32, 20), ("head", 256, 5)])
def test_cnn_maps_equal_a_plain_timm_forward_resampled_to_the_grid(tmp_path, tap, width, side):
    name = "test_efficientnet"
    file = random_weights_file(tmp_path / "w.safetensors", timm.create_model(name))
    teacher = build(f"a=timm:{name}@{file}?tap={tap}", view_size=160)
    plain = plain_timm(file, name)
    image = plain_image(views(160), plain.pretrained_cfg["mean"], plain.pretrained_cfg["std"], 160)
    module = {"last": plain.blocks, "stage_3": plain.blocks[2], "head": plain.bn2}[tap]
    expected = F.interpolate(output_of(plain, module, image), (4, 4), mode="bilinear", antialias=True)
    spec = teacher.spec
    assert (spec.native_grid, spec.grid, spec.resample, spec.width) == ((side, side), (4, 4), "bilinear", width)
    assert (spec.input_size, spec.has_cls, spec.has_attention, spec.prefix_tokens) == ((160, 160), False, False, 0)
    features = teacher.forward(views(160))
    assert features.cls is None and features.attention is None
    assert_near(features.tokens, expected.flatten(2).transpose(1, 2))


def test_a_cnn_runs_at_the_asked_for_size_and_fits_without_resampling():
    teacher = build("a=timm:test_efficientnet/random?input_size=128")
    assert teacher.spec.input_size == (128, 128) and teacher.spec.native_grid == (4, 4)
    assert teacher.spec.resample == "none"


def test_a_vit_at_another_size_is_resampled_and_attention_keeps_its_sum():
    at_grid, larger = build("a=timm:test_vit/random"), build("a=timm:test_vit/random?input_size=128")
    assert larger.spec.native_grid == (8, 8) and larger.spec.resample == "bilinear"
    assert at_grid.spec.weights_sha256 == larger.spec.weights_sha256
    features = larger.forward(views())
    assert features.tokens.shape == (2, 16, 64)
    assert torch.allclose(features.attention.sum(1), torch.full((2,), 64 / 65), atol=0.02)


@pytest.mark.parametrize("name, side", [("test_vit", 4), ("test_vit2", 4), ("test_vit", 10)])
def test_positions_of_a_file_are_taken_as_they_are_at_its_own_size(tmp_path, name, side):
    model = timm.create_model(name, img_size=16 * side)
    file = random_weights_file(tmp_path / "w.safetensors", model)
    request = parse_teacher(f"a=timm:{name}@{file}")
    assert native_pixels(request) == 16 * side
    teacher = build(f"a=timm:{name}@{file}?input_size={16 * side}")
    assert torch.equal(teacher.tower.module.pos_embed, load_weights(file)["pos_embed"])
    larger = build(f"a=timm:{name}@{file}?input_size=192").tower.module
    assert torch.equal(larger.pos_embed, plain_timm(file, name, img_size=192).pos_embed), "interpolated once"


@pytest.mark.parametrize("tap", ["block_1", "block_3", "post_ln"])
def test_other_taps_are_the_named_layers(tmp_path, tap):
    file = random_weights_file(tmp_path / "w.safetensors", timm.create_model("test_vit"))
    teacher, last = build(f"a=timm:test_vit@{file}?tap={tap}"), build(f"a=timm:test_vit@{file}")
    plain = plain_timm(file, "test_vit", img_size=64)
    image = plain_image(views(), plain.pretrained_cfg["mean"], plain.pretrained_cfg["std"], 64)
    module = plain.norm if tap == "post_ln" else plain.blocks[int(tap[-1]) - 1]
    tokens = output_of(plain, module, image)
    features = teacher.forward(views())
    assert_near(features.tokens, tokens[:, 1:])
    assert_near(features.cls, tokens[:, 0])
    assert torch.equal(features.attention, last.forward(views()).attention)  # always the last block's
    if tap == "post_ln":
        assert_near(apply_tail(last.forward(views()).tokens, last.tail, "post_ln"), tokens[:, 1:])


def test_an_unknown_tap_names_the_ones_there_are():
    with pytest.raises(ValueError, match="no tap 'block_7'; this model has pre_tail, post_ln, block_1 to block_6"):
        build("a=timm:test_vit/random?tap=block_7")
    with pytest.raises(ValueError, match="no tap 'pre_tail'; this model has last, head, stage_1 to stage_5"):
        build("a=timm:test_efficientnet/random?tap=pre_tail")
    with pytest.raises(ValueError, match="has no tap 'projected'"):
        build("a=timm:test_vit/random?tap=projected")


def test_resizing_is_within_a_level_of_pil_and_takes_the_asked_for_statistics():
    teacher = build("a=timm:test_vit/random?mean=0.5&std=0.25,0.5,1&interpolation=bilinear&input_size=48")
    spec = teacher.spec
    assert (spec.mean, spec.std, spec.interpolation, spec.antialias) == ((0.5,) * 3, (0.25, 0.5, 1.0), "bilinear", True)
    assert spec.input_size == (48, 48)
    image = normalise(views(), spec)
    pixels = (image * torch.tensor(spec.std).view(3, 1, 1) + torch.tensor(spec.mean).view(3, 1, 1)) * 255
    for ours, view in zip(pixels, views()):
        theirs = np.asarray(PIL.Image.fromarray(view.numpy()).resize((48, 48), PIL.Image.Resampling.BILINEAR))
        assert np.abs(ours.permute(1, 2, 0).round().numpy() - theirs).max() <= 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_near_fp32_and_comes_out_as_fp32(precision):
    exact, low = build("a=timm:test_vit/random"), build("a=timm:test_vit/random", precision=precision)
    a, b = exact.forward(views()), low.forward(views())
    assert b.tokens.dtype == b.attention.dtype == b.cls.dtype == torch.float32
    assert F.cosine_similarity(a.tokens, b.tokens, dim=-1).min() > 0.999
    assert not torch.equal(a.tokens, b.tokens)
    with pytest.raises(ValueError, match="precision 'fp8' is unknown"):
        build("a=timm:test_vit/random", precision="fp8")


def test_teachers_are_frozen_but_their_features_can_feed_a_loss():
    teacher = build("a=timm:test_vit/random")
    assert not any(p.requires_grad for p in teacher.tower.module.parameters()) and not teacher.tower.module.training
    features = teacher.forward(views())
    student = torch.ones_like(features.tokens, requires_grad=True)
    F.mse_loss(student * features.tokens, features.tokens).backward()
    assert student.grad is not None and not features.tokens.requires_grad


def test_random_teachers_say_so_and_are_the_same_every_time():
    torch.manual_seed(5)
    one, state = build("a=timm:test_vit/random"), torch.get_rng_state()
    two = build("a=timm:test_vit/random", grid=6)
    assert one.spec.weights == "random" and one.spec.weights_sha256 == two.spec.weights_sha256
    assert torch.equal(state, torch.get_rng_state())
    again = build("a=timm:test_vit/random")
    assert torch.equal(one.forward(views()).tokens, again.forward(views()).tokens)
    spec = TeacherSpec(**json.loads(canonical_json(vars(one.spec))))
    assert canonical_json(vars(spec)) == canonical_json(vars(again.spec))


def test_the_sha256_sees_values_but_neither_classifier_nor_float_type(tmp_path):
    model = timm.create_model("test_vit")
    file = random_weights_file(tmp_path / "w.safetensors", model)
    weights = safetensors.torch.load_file(file)
    half = {k: v.half() for k, v in weights.items()}
    rounded = {k: v.float() for k, v in half.items()} | {
        "head.weight": torch.zeros(10, 64),
        "head.bias": torch.zeros(10),
    }
    for name, content in (("half", half), ("rounded", rounded)):
        safetensors.torch.save_file(content, tmp_path / f"{name}.safetensors")
    sha = {
        n: build(f"a=timm:test_vit@{tmp_path}/{n}.safetensors").spec.weights_sha256 for n in ("w", "half", "rounded")
    }
    assert sha["half"] == sha["rounded"] != sha["w"]
    assert build(f"a=timm:test_vit@{file}").spec.weights == "file"


def test_an_mae_checkpoint_loads_without_its_decoder(tmp_path):
    weights = timm.create_model("test_vit").state_dict()
    weights = {k: v for k, v in weights.items() if not k.startswith("head")} | {"decoder_norm.weight": torch.zeros(2)}
    torch.save({"model": weights | {"mask_token": torch.zeros(1, 1, 64)}, "epoch": 1}, tmp_path / "mae.pth")
    assert build(f"a=timm:test_vit@{tmp_path}/mae.pth").spec.weights == "file"


def test_weights_of_another_model_name_the_first_tensor_and_both_shapes(tmp_path):
    file = random_weights_file(tmp_path / "w.safetensors", timm.create_model("test_vit", embed_dim=96))
    with pytest.raises(
        ValueError, match=r"a=timm:test_vit: cls_token has shape \[1, 1, 96\].*the model has \[1, 1, 64\]"
    ):
        build(f"a=timm:test_vit@{file}")
    safetensors.torch.save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="tensors missing in the weights: cls_token.*1 tensor in the weights only: x"):
        build(f"a=timm:test_vit@{file}")


def test_unknown_models_tags_and_options_give_the_nearest_names():
    with pytest.raises(ValueError, match="no model 'vit_bse_patch16_224'; nearest: .*vit_base_patch16_224"):
        build("a=timm:vit_bse_patch16_224.dino")
    with pytest.raises(ValueError, match="vit_base_patch16_224 has no tag 'dina'; it has .*dino"):
        build("a=timm:vit_base_patch16_224.dina")
    with pytest.raises(ValueError, match="timm cannot build it with .*dept.*correct the options"):
        build("a=timm:test_vit/random?dept=2")
    with pytest.raises(ValueError, match="img_size= follows from the grid"):
        build("a=timm:test_vit/random?img_size=64")
    with pytest.raises(
        ValueError, match=r"cannot be run on an image of 3 channels \(.*4 channels.*\); teachers see three"
    ):
        build("a=timm:test_vit/random?in_chans=4")
    with pytest.raises(ValueError, match="timm knows no weights for it; expected one of none"):
        build("a=timm:vit_giant_patch14_224")


def test_a_model_that_cannot_be_resized_says_how_to_run_it():
    small = query(depth=1, embed_dim=48, num_heads=3, depth_token_only=1)
    with pytest.raises(ValueError, match=r"cannot run at 64 px.*pos_embed has shape.*with \?input_size=224"):
        build(f"a=timm:cait_xxs24_224/random{small}")
    spec = build(f"a=timm:cait_xxs24_224/random{small}&input_size=224").spec
    assert spec.native_grid == (14, 14) and spec.resample == "bilinear"


def test_quickgelu_weights_in_a_gelu_model_are_an_error(tmp_path):
    name = "vit_base_patch16_clip_224"
    file = random_weights_file(tmp_path / "w.safetensors", timm.create_model(name, num_classes=512, **SMALL))
    with pytest.raises(ValueError, match=r"QuickGELU, the model has gelu.*ask for \w+_clip_quickgelu_224.openai"):
        build(f"a=timm:{name}.openai@{file}{query(**SMALL)}")
    assert build(f"a=timm:{name}.openai@{file}{query(activation='quickgelu', **SMALL)}").spec.activation == "quickgelu"
    assert build(f"a=timm:{name}@{file}{query(**SMALL)}").spec.activation == "gelu"


def test_without_a_network_the_error_says_how_to_pass_a_file(empty_cache, no_network, capfd):
    with pytest.raises(
        ValueError, match=r"cannot be downloaded .*pass a local file instead: dino=timm:vit_base_patch16_224.dino@FILE"
    ):
        build(DEFAULT_TEACHERS[1])
    assert capfd.readouterr() == ("", "")


# --- real weights


@pytest.mark.parametrize("tap, width", [("last", 320), ("stage_4", 96), ("head", 1280)])
def test_mobilenet_with_real_weights_equals_a_plain_forward(tap, width, real_file):
    file = real_file("weights/mobilenetv2_100_imagenet1k.safetensors")
    how = query(pad_type="same", mean=0.5, std=0.5, interpolation="bilinear", tap=tap)
    teacher = build(f"cnn=timm:mobilenetv2_100@{file}{how}", grid=14, view_size=224)
    plain = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    plain.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(file).items()}, strict=False)
    module = {"last": plain.blocks, "stage_4": plain.blocks[4], "head": plain.bn2}[tap]
    expected = output_of(plain, module, plain_image(views(224), (0.5,) * 3, (0.5,) * 3, 224))
    side = 14 if tap == "stage_4" else 7
    assert expected.shape == (2, width, side, side) and teacher.spec.native_grid == (side, side)
    if side == 7:
        expected = F.interpolate(expected, (14, 14), mode="bilinear", align_corners=False)
    assert_near(teacher.forward(views(224)).tokens, expected.flatten(2).transpose(1, 2))


@pytest.mark.soak
def test_a_trained_dinov2_at_another_grid_equals_a_plain_forward_and_looks_at_few_patches(real_file):
    file = real_file("weights/dinov2s_saliency_finetuned_fp16.safetensors")
    teacher = build(f"dino=timm:vit_small_patch14_dinov2@{file}", grid=14, view_size=224)
    plain = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
    plain.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(file).items()}, strict=False)
    plain.set_input_size(img_size=(196, 196))
    noise = views(224)
    smooth = F.avg_pool2d(noise.permute(0, 3, 1, 2).float(), 31, 1, 15).permute(0, 2, 3, 1).mul(2).clip(0, 255).byte()
    image = normalise(smooth, teacher.spec)
    found = teacher.forward(smooth)
    assert_near(found.tokens, output_of(plain, plain.blocks, image)[:, 1:])
    plain.blocks[-1].attn.fused_attn = False
    matrix = output_of(plain, plain.blocks[-1].attn.attn_drop, image)
    assert_near(196 * found.attention, 196 * matrix.mean(1)[:, 0, 1:])
    share = found.attention / found.attention.sum(1, keepdim=True)
    assert share.sort(descending=True).values[:, :49].sum(1).min() > 0.3, "uniform: 0.25"
    assert found.tokens.square().mean((0, 1)).sqrt().max() > 5 * found.tokens.square().mean((0, 1)).sqrt().median()


def test_a_conversion_that_fails_on_other_weights_names_the_tensor_or_the_reason(tmp_path, monkeypatch):
    def failing(weights, model):
        raise RuntimeError("shape '[1, 14]' is invalid\nand a page more")

    monkeypatch.setattr("timm.models.vision_transformer.checkpoint_filter_fn", failing)
    model = timm.create_model("test_vit")
    file = random_weights_file(tmp_path / "w.safetensors", model)
    with pytest.raises(
        ValueError, match=r"a=timm:test_vit: timm cannot convert .* .shape '\[1, 14\]' is invalid.; choose"
    ):
        build(f"a=timm:test_vit@{file}")
    safetensors.torch.save_file(model.state_dict() | {"cls_token": torch.zeros(1, 1, 96)}, file)
    with pytest.raises(ValueError, match=r"a=timm:test_vit: cls_token has shape \[1, 1, 96\] in the weights"):
        build(f"a=timm:test_vit@{file}")
    with pytest.raises(ValueError, match="timm cannot build it with .*dept.*correct the options"):
        build(f"a=timm:test_vit@{file}?dept=2")


def test_weights_are_loaded_strictly_also_where_timm_is_not_strict_itself(tmp_path):
    weights = timm.create_model(
        "dla46_c"
    ).state_dict()  # timm passes over what is missing of a DLA, and what is too much
    del weights["base_layer.0.weight"]
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match="1 tensor missing in the weights: base_layer.0.weight; 0 tensors in the weights only"
    ):
        build(f"a=timm:dla46_c@{tmp_path}/w.safetensors")


def test_a_model_is_left_as_timm_makes_it(tmp_path):
    file = random_weights_file(tmp_path / "w.safetensors", timm.create_model("test_vit"))
    model = build(f"a=timm:test_vit@{file}").tower.module
    assert "state_dict" not in model.pretrained_cfg  # no second copy of the weights
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)  # what took timm's weights from it is gone
    assert not any(tensor.any() for tensor in model.state_dict().values())
