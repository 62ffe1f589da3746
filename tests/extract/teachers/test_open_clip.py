"""Image towers of open_clip against its own models, loaders and forwards."""

import types
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models import vision_transformer_hybrid
from torch import nn

from mrmae.extract.teachers.address import parse_teacher
from mrmae.extract.teachers.open_clip import chosen_activation, clip_config, find_tag
from mrmae.extract.teachers.teacher import DEFAULT_TEACHERS, build_teacher
from mrmae.shards.format.tail import apply_tail

TEXT = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
VISION = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def views() -> torch.Tensor:
    return torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def plain_image(size: int = 64, mean=CLIP_MEAN, std=CLIP_STD) -> torch.Tensor:
    image = views().permute(0, 3, 1, 2).to(torch.float32)
    if size != 64:
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clip(0, 255)
    return (image.div(255) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def build(text: str, *, allow_torchscript: bool = False):
    how = {"grid": 4, "view_size": 64, "device": "cpu", "precision": "fp32"}
    return build_teacher(parse_teacher(text), allow_torchscript=allow_torchscript, **how)


def query(**options) -> str:
    return "?" + "&".join(f"{key}={value}" for key, value in options.items())


def plain_clip(name: str, vision: dict, **how) -> open_clip.CLIP:
    """open_clip's own model, small, whole."""
    return open_clip.create_model(name, vision_cfg=vision, text_cfg=TEXT, embed_dim=32, **how).eval()


def random_weights_file(path: Path, model: nn.Module) -> Path:
    torch.manual_seed(3)
    weights = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    weights = {k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in weights.items()}
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, path)
    return path


@torch.no_grad()
def output_of(module: nn.Module, run) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    run()
    hook.remove()
    return seen[0]


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and a.dtype == torch.float32
    assert (a - b).abs().max() <= 1e-4
    assert b.std() > 0.01


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory) -> Path:
    """A whole CLIP with random weights, for 224 px."""
    model = plain_clip("ViT-B-16-quickgelu", VISION | {"image_size": 224})
    return random_weights_file(tmp_path_factory.mktemp("clip") / "clip.safetensors", model)


@pytest.mark.parametrize("activation, patch", [("quickgelu", 16), ("gelu", 16), ("quickgelu", 14)])
def test_a_clip_vit_equals_a_plain_open_clip_forward(tmp_path, activation, patch):
    name = "ViT-B-16-quickgelu" if activation == "quickgelu" else "ViT-B-16"
    vision = VISION | {"patch_size": patch}
    file = random_weights_file(tmp_path / "w.safetensors", plain_clip(name, vision | {"image_size": 224}))
    teacher = build(f"clip=open_clip:{name}@{file}{query(activation=activation, embed_dim=32, **vision)}")
    features = teacher.forward(views())
    spec = teacher.spec
    assert (spec.activation, spec.input_size, spec.prefix_tokens) == (activation, (4 * patch, 4 * patch), 1)
    assert (spec.mean, spec.std, spec.interpolation) == (CLIP_MEAN, CLIP_STD, "bicubic")

    plain = plain_clip(name, vision | {"image_size": 4 * patch}, pretrained=str(file))
    image = plain_image(4 * patch)
    block = plain.visual.transformer.resblocks[-1]
    tokens = output_of(block, lambda: plain.encode_image(image))
    assert_near(features.tokens, tokens[:, 1:])
    assert_near(features.cls, tokens[:, 0])
    with torch.no_grad():
        x = block.ln_1(output_of(plain.visual.transformer.resblocks[0], lambda: plain.encode_image(image)))
        q, k, _ = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias).reshape(2, 17, 3, 4, 16).unbind(2)
        projected = plain.encode_image(image)
    rows = [torch.softmax(q[:, 0:1, h] @ k[:, :, h].transpose(1, 2) / 4, -1)[:, 0, 1:] for h in range(4)]
    expected = torch.stack(rows).mean(0)
    assert (features.attention - expected).abs().max() <= 1e-6 and expected.std() > 1e-3
    assert_near(apply_tail(features.cls, teacher.tail, "projected"), projected)


def test_projected_is_the_joint_space_and_other_taps_are_their_layers(small_clip):
    options = query(activation="quickgelu", embed_dim=32, **VISION)
    plain = plain_clip("ViT-B-16-quickgelu", VISION | {"image_size": 64}, pretrained=str(small_clip))
    teacher = build(f"clip=open_clip:ViT-B-16-quickgelu@{small_clip}{options}&tap=projected")
    features = teacher.forward(views())
    with torch.no_grad():
        assert_near(features.cls, plain.encode_image(plain_image()))
    assert teacher.spec.width == 32 and features.tokens.shape == (2, 16, 32)
    assert_near(features.norm, features.tokens.norm(dim=-1))
    first = build(f"clip=open_clip:ViT-B-16-quickgelu@{small_clip}{options}&tap=block_1").forward(views())
    tokens = output_of(plain.visual.transformer.resblocks[0], lambda: plain.encode_image(plain_image()))
    assert_near(first.tokens, tokens[:, 1:])
    with pytest.raises(
        ValueError, match="no tap 'last'; this model has pre_tail, post_ln, projected, block_1 to block_2"
    ):
        build(f"clip=open_clip:ViT-B-16-quickgelu@{small_clip}{options}&tap=last")


def test_the_tower_alone_and_the_whole_clip_are_the_same_teacher(small_clip, tmp_path):
    weights = safetensors.torch.load_file(small_clip)
    visual = {k.removeprefix("visual."): v for k, v in weights.items() if k.startswith("visual.")}
    torch.save({"state_dict": {f"module.{k}": v for k, v in visual.items()}}, tmp_path / "visual.pt")
    options = query(activation="quickgelu", embed_dim=32, **VISION)
    one, two = (build(f"c=open_clip:ViT-B-16-quickgelu@{f}{options}") for f in (small_clip, tmp_path / "visual.pt"))
    assert one.spec == two.spec and one.spec.weights == "file"
    assert torch.equal(one.forward(views()).tokens, two.forward(views()).tokens)


def test_openai_archives_need_permission(small_clip, tmp_path):
    model = plain_clip("ViT-B-16-quickgelu", VISION | {"image_size": 224})
    model.load_state_dict(safetensors.torch.load_file(small_clip))
    model.visual.forward = types.MethodType(lambda self, x: x, model.visual)
    torch.jit.trace(model.visual, torch.zeros(1)).save(tmp_path / "clip.pt")
    text = f"c=open_clip:ViT-B-16-quickgelu@{tmp_path}/clip.pt{query(activation='quickgelu', embed_dim=32, **VISION)}"
    with pytest.raises(ValueError, match="pass --allow-torchscript"):
        build(text)
    same = build(text.replace("clip.pt", "w.safetensors").replace(str(tmp_path / "w.safetensors"), str(small_clip)))
    assert build(text, allow_torchscript=True).spec.weights_sha256 == same.spec.weights_sha256


def test_a_timm_trunk_equals_a_plain_open_clip_forward(tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    file = random_weights_file(tmp_path / "w.safetensors", plain_clip("ViT-B-16-SigLIP", vision))
    options = query(activation="gelu", embed_dim=32, **vision).replace("&image_size=160", "")
    features = (teacher := build(f"s=open_clip:ViT-B-16-SigLIP@{file}{options}")).forward(views())
    plain = plain_clip("ViT-B-16-SigLIP", vision, pretrained=str(file))
    plain.visual.set_input_size(64)
    image = plain_image(64, (0.5,) * 3, (0.5,) * 3)
    tokens = output_of(plain.visual.trunk.blocks[-1], lambda: plain.encode_image(image))
    assert_near(features.tokens, tokens[:, 1:])
    assert teacher.spec.mean == (0.5, 0.5, 0.5) and teacher.spec.has_attention
    with torch.no_grad():
        assert_near(apply_tail(features.cls, teacher.tail, "projected"), plain.encode_image(image))


def test_siglip_has_no_cls_and_no_token_projection():
    teacher = build("s=open_clip:ViT-B-16-SigLIP/random?timm_model_name=test_vit3")
    features = teacher.forward(views())
    assert features.cls is None and features.attention is None and teacher.spec.weights == "random"
    assert "proj.weight" not in teacher.tail and "layer_norm.weight" in teacher.tail
    with pytest.raises(ValueError, match="has no tap 'projected'"):
        build("s=open_clip:ViT-B-16-SigLIP/random?timm_model_name=test_vit3&tap=projected")


def test_mobileclip_equals_a_plain_open_clip_forward(tmp_path):
    name = small_mobileclip_trunk.__name__
    if not timm.is_model(name):
        timm.models.register_model(small_mobileclip_trunk)
    config = open_clip.get_model_config("MobileCLIP-B")["vision_cfg"] | {"timm_model_name": name}
    plain = plain_clip("MobileCLIP-B", config)
    file = random_weights_file(tmp_path / "w.safetensors", plain)
    teacher = build(f"m=open_clip:MobileCLIP-B/datacompdr@{file}?timm_model_name={name}&embed_dim=32")
    spec = teacher.spec
    assert (spec.mean, spec.std, spec.interpolation, spec.width) == ((0.0,) * 3, (1.0,) * 3, "bilinear", 64)
    assert spec.input_size == (64, 64) and spec.prefix_tokens == 1 and spec.has_attention

    plain.load_state_dict(safetensors.torch.load_file(file))
    plain.visual.set_input_size(64)
    image = plain_image(64, (0.0,) * 3, (1.0,) * 3)
    tokens = output_of(plain.visual.trunk.blocks[-1], lambda: plain.encode_image(image))
    features = teacher.forward(views())
    assert_near(features.tokens, tokens[:, 1:])
    assert_near(features.cls, tokens[:, 0])
    with torch.no_grad():
        assert_near(apply_tail(features.cls, teacher.tail, "projected"), plain.encode_image(image))


def small_mobileclip_trunk(pretrained=False, **options):
    """timm's vit_base_mci_224, the trunk of MobileCLIP-B, at a twelfth of its width."""
    stem = vision_transformer_hybrid.ConvStem(
        channels=(16, 16, 64), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU
    )
    return vision_transformer_hybrid._create_vision_transformer_hybrid(
        "vit_base_mci_224", backbone=stem, embed_args={"proj": False}, pretrained=pretrained,
        **({"embed_dim": 64, "depth": 2, "num_heads": 2, "no_embed_class": True} | options),
    )  # fmt: skip


def test_a_convolutional_trunk_and_clips_resnet_give_maps(tmp_path):
    vision = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    config = query(embed_dim=32, **vision).replace("&image_size=160", "&input_size=160")
    trunk = build(f"c=open_clip:convnext_base/random{config}")
    assert trunk.spec.native_grid == (5, 5) and trunk.spec.resample == "bilinear" and trunk.spec.tap == "last"

    vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}
    file = random_weights_file(tmp_path / "w.safetensors", plain_clip("RN50-quickgelu", vision))
    options = query(activation="quickgelu", layers="[1,1,1,1]", width=8, head_width=8, embed_dim=32, input_size=64)
    with pytest.raises(ValueError, match=r"attnpool.positional_embedding has shape \[5, 256\].*has \[50, 256\]"):
        build(f"c=open_clip:RN50-quickgelu@{file}{options}")
    plain = plain_clip("RN50-quickgelu", vision | {"image_size": 224})
    file = random_weights_file(tmp_path / "w.safetensors", plain)
    plain.load_state_dict(safetensors.torch.load_file(file))
    teacher = build(f"c=open_clip:RN50-quickgelu@{file}{options.replace('input_size=64', 'input_size=128')}")
    expected = plain.eval().visual
    with torch.no_grad():
        x = expected.layer3(expected.layer2(expected.layer1(expected.stem(plain_image(128)))))
        expected = expected.layer4(x)
    assert teacher.spec.native_grid == (4, 4) and teacher.spec.activation == "relu"
    assert_near(teacher.forward(views()).tokens, expected.flatten(2).transpose(1, 2))


def test_attention_is_not_claimed_where_open_clip_cannot_confirm_it():
    teacher = build(f"c=open_clip:ViT-B-16/random{query(qk_norm='true', embed_dim=32, **VISION)}")
    assert teacher.spec.has_cls and not teacher.spec.has_attention
    assert teacher.forward(views()).attention is None


# --- activation and names


def test_a_quickgelu_mismatch_is_an_error_both_ways():
    with pytest.raises(ValueError, match="trained with QuickGELU, the model would have GELU.*-quickgelu/openai"):
        build("c=open_clip:ViT-B-16/openai")
    with pytest.raises(ValueError, match="another activation: ask for ViT-B-16/laion2b_s34b_b88k"):
        build("c=open_clip:ViT-B-16-quickgelu/laion2b_s34b_b88k")
    with pytest.raises(ValueError, match="trained with QuickGELU, the model would have GELU.*correct"):
        build("c=open_clip:ViT-B-16-quickgelu/openai?activation=gelu")
    with pytest.raises(ValueError, match="activation=relu: open_clip has gelu and quickgelu"):
        build("c=open_clip:ViT-B-16-quickgelu/openai?activation=relu")


def test_a_file_without_a_tag_must_name_its_activation(small_clip):
    options = query(embed_dim=32, **VISION)
    with pytest.raises(ValueError, match=r"add \?activation=gelu or \?activation=quickgelu.*or name the tag"):
        build(f"c=open_clip:ViT-B-16@{small_clip}{options}")
    with pytest.raises(ValueError, match="the model is the QuickGELU one"):
        build(f"c=open_clip:ViT-B-16-quickgelu@{small_clip}{options}&activation=gelu")
    named = build(f"c=open_clip:ViT-B-16@{small_clip}{options}&activation=quickgelu")
    tagged = build(f"c=open_clip:ViT-B-16-quickgelu/openai@{small_clip}{options}")
    assert named.spec.activation == tagged.spec.activation == "quickgelu"
    assert named.spec.weights_sha256 == tagged.spec.weights_sha256 and tagged.spec.tag == "openai"
    assert torch.equal(named.forward(views()).tokens, tagged.forward(views()).tokens)
    with pytest.raises(ValueError, match="activation=quickgelu: this tower's timm trunk has gelu"):
        build(
            "c=open_clip:ViT-B-16-SigLIP@x?timm_model_name=test_vit&activation=quickgelu".replace(
                "@x", f"@{small_clip}"
            )
        )


def test_preprocessing_comes_from_the_tag():
    teacher = build(f"c=open_clip:ViT-B-16/random{query(embed_dim=32, mean=0.1, interpolation='bilinear', **VISION)}")
    assert teacher.spec.mean == (0.1, 0.1, 0.1) and teacher.spec.interpolation == "bilinear"
    assert teacher.spec.std == CLIP_STD and teacher.spec.activation == "gelu"


def test_unknown_models_tags_and_options_give_the_nearest_names():
    with pytest.raises(ValueError, match="no model 'ViT-B16'; nearest: .*ViT-B-16"):
        build("c=open_clip:ViT-B16/openai")
    with pytest.raises(ValueError, match="no tag 'opnai'; it has openai.*nearest: openai"):
        build("c=open_clip:ViT-B-16-quickgelu/opnai")
    with pytest.raises(ValueError, match="names no weights; add /TAG .*openai"):
        build("c=open_clip:ViT-B-16")
    with pytest.raises(ValueError, match="no option 'layer'; nearest: layers"):
        build("c=open_clip:ViT-B-16/random?layer=2")
    with pytest.raises(ValueError, match=r"image_size= follows from the grid; use \?input_size="):
        build("c=open_clip:ViT-B-16/random?image_size=64")


def test_weights_of_another_width_name_the_first_tensor(small_clip):
    options = query(activation="quickgelu", embed_dim=32, **(VISION | {"width": 32}))
    with pytest.raises(ValueError, match=r"class_embedding has shape \[64\] in the weights; the model has \[32\]"):
        build(f"c=open_clip:ViT-B-16@{small_clip}{options}")


def test_every_tag_of_open_clip_has_an_activation_or_an_advice_that_works():
    tags = [
        f"c=open_clip:{model}/{tag}" for model, tag in open_clip.list_pretrained() if open_clip.get_model_config(model)
    ]
    refused = [text for text in tags if (advice := activation_advice(text)) is not None and activation_advice(advice)]
    assert len(tags) > 100 and not refused
    with pytest.raises(ValueError, match="open_clip does not record.*say which with .activation=quickgelu or"):
        build("c=open_clip:roberta-ViT-B-32/laion2b_s12b_b32k")


def activation_advice(text: str) -> str | None:
    """None where the activation is settled, else the request that the error asks for."""
    request = parse_teacher(text)
    try:
        chosen_activation(request, clip_config(request), find_tag(request))
    except ValueError as error:
        if "say which" in str(error):
            return text + "?activation=quickgelu"
        return "c=" + str(error).split("ask for ")[1]
    return None


def test_without_a_network_the_error_says_how_to_pass_a_file(empty_cache, no_network, capfd):
    with pytest.raises(
        ValueError, match="cannot be downloaded .*local file instead: clip=open_clip:ViT-B-16-quickgelu/openai@FILE"
    ):
        build(DEFAULT_TEACHERS[0])
    assert capfd.readouterr() == ("", "")
