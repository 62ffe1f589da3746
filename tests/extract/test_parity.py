"""Through the whole product: what a cache gives back is what plain open_clip and timm make of the stored view."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mrmae.extract.images.decode import decode_rgb
from mrmae.extract.run import Options, extract_features
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format.spec import ViewRecipe
from mrmae.shards.format.views import encode_view, render

GRID, SIZE = 4, 64
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SIGLIP = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
TEXT = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
KINDS = ("cls", "registers", "patch14", "cnn", "trunk")


def plain_model(kind: str) -> nn.Module:
    """The library's own model at its own size."""
    if kind == "trunk":
        return open_clip.create_model(
            "ViT-B-16-SigLIP", vision_cfg=SIGLIP | {"image_size": 160}, text_cfg=TEXT, embed_dim=32
        ).eval()
    name, options = {
        "cls": ("vit_tiny_patch16_224", {"depth": 2}),
        "registers": ("vit_small_patch16_dinov3", SMALL),
        "patch14": ("vit_small_patch14_dinov2", SMALL),
        "cnn": ("test_efficientnet", {}),
    }[kind]
    return timm.create_model(name, pretrained=False, **options).eval()


def teacher_text(kind: str, file: Path) -> str:
    """The same model as extract-features is asked for it."""
    small = "?" + "&".join(f"{k}={v}" for k, v in SMALL.items())
    siglip = "?activation=gelu&embed_dim=32&" + "&".join(f"{k}={v}" for k, v in SIGLIP.items())
    return {
        "cls": f"cls=timm:vit_tiny_patch16_224@{file}?depth=2",
        "registers": f"registers=timm:vit_small_patch16_dinov3@{file}{small}",
        "patch14": f"patch14=timm:vit_small_patch14_dinov2@{file}{small}",
        "cnn": f"cnn=timm:test_efficientnet@{file}",
        "trunk": f"trunk=open_clip:ViT-B-16-SigLIP@{file}{siglip}",
    }[kind]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, dict[str, Path], Path]:
    """Five teachers on twelve images, int8, two views; the weights' files; the images."""
    folder = tmp_path_factory.mktemp("parity")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(12):
        coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), np.uint8))
        coarse.resize((90 + i, 100 - i), Image.Resampling.BICUBIC).save(folder / f"images/{i}.png")
    files = {}
    for kind in KINDS:
        torch.manual_seed(7)
        model, files[kind] = plain_model(kind), folder / f"{kind}.safetensors"
        weights = {
            k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()
        }
        weights = {k: v.abs() + 0.5 if k.endswith("running_var") else v.contiguous() for k, v in weights.items()}
        safetensors.torch.save_file(weights, files[kind])
    options = Options([folder / "images"], folder / "cache", ViewRecipe(SIZE), views=2, grid=GRID, batch_size=5,
                      teachers=[teacher_text(kind, files[kind]) for kind in KINDS], device="cpu")  # fmt: skip
    extract_features(options, say=lambda line: None)
    return open_cache(folder / "cache"), files, folder / "images"


def plain_tokens(kind: str, file: Path, pixels: Tensor) -> Tensor:
    """Last block's patch tokens [b, l, d] by the library's own model, loader and forward, at grid x patch pixels."""
    model = plain_model(kind)
    size = {"patch14": 14 * GRID, "cnn": 160}.get(kind, 16 * GRID)
    if kind in ("cls", "registers", "patch14"):
        name = {"cls": "vit_tiny_patch16_224", "registers": "vit_small_patch16_dinov3",
                "patch14": "vit_small_patch14_dinov2"}[kind]  # fmt: skip
        options = {"depth": 2} if kind == "cls" else SMALL
        overlay = {"file": str(file), "custom_load": False}
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, **options
        ).eval()
    else:
        model.load_state_dict(safetensors.torch.load_file(file))
    tower: nn.Module = model.visual if kind == "trunk" else model
    if kind == "trunk":
        tower.set_input_size(size)
    mean, std = (
        ((0.5,) * 3, (0.5,) * 3) if kind == "trunk" else (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    )
    image = pixels.permute(0, 3, 1, 2).float()
    if size != SIZE:
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    image = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    block = {"cnn": lambda: tower.blocks[-1], "trunk": lambda: tower.trunk.blocks[-1]}.get(
        kind, lambda: tower.blocks[-1]
    )()
    out = output_of(block, lambda: tower(image))
    if kind == "cnn":
        out = F.interpolate(out, (GRID, GRID), mode="bilinear", antialias=True)
        return out.flatten(2).transpose(1, 2)
    return out[:, {"registers": 5}.get(kind, 1) :]


@torch.no_grad()
def output_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    run()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_int8_features_are_the_plain_models_on_the_stored_view(
    cache: tuple[Cache, dict[str, Path], Path], kind: str, view: int
) -> None:
    opened, files, _ = cache
    views = np.full_like(opened.numbers, view)
    column = next(name for name in opened.columns if name.startswith(kind))
    expected = plain_tokens(kind, files[kind], opened.read_pixels(opened.numbers, views))
    got = opened.read_tokens(column, opened.numbers, views)
    quality = next(c["quality"] for c in opened.manifest["columns"] if c["name"] == column)
    centred = expected - expected.mean(dim=(0, 1))
    snr = 10 * torch.log10(centred.square().sum() / (got - expected).square().sum())
    assert snr >= quality["snr_db"] - 3, "the manifest's SNR is the one a reader gets"
    cosine = F.cosine_similarity(got, expected, dim=-1)
    assert quality["snr_db"] >= 40 and cosine.min() >= 0.9998
    mirrored = F.cosine_similarity(got, expected.unflatten(1, (GRID, GRID)).flip(2).flatten(1, 2), dim=-1)
    assert mirrored.min() < 0.9998, "the mirror control fails"


def test_stored_views_are_replayed_bit_by_bit(cache: tuple[Cache, dict[str, Path], Path]) -> None:
    opened, _, images = cache
    flips = set()
    for number, key in enumerate(opened.keys):
        for view in opened[number].views:
            crop = view["view"]
            image = decode_rgb((images / key).read_bytes())
            again = decode_rgb(encode_view(render(image, crop, opened.plan.recipe), opened.encoding))
            assert np.array_equal(again, view["pixels"].numpy())
            flips.add(crop.flip)
    assert flips == {False, True}
