"""Taps behind the final norm: computed when reading from what is stored before it, and never stored twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from mrmae.extract.inspect.cli import main as inspect_cache
from mrmae.extract.run import Options, extract_features
from mrmae.probe.sources import column_features, open_source
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.dataset import CacheImages
from mrmae.shards.format.spec import ViewRecipe

Extract = Callable[..., dict[str, Any]]
SIZE, GRID = 64, 4
VISION = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
KINDS = {"norm": {}, "fcnorm": {"global_pool": "avg"}}


def clip(size: int, **how: Any) -> Any:
    """A small CLIP for views of this size."""
    vision, name = VISION | {"image_size": size}, "ViT-B-16-quickgelu"
    return open_clip.create_model(name, vision_cfg=vision, text_cfg=TEXT, embed_dim=32, **how).eval()


def save_random(model: Any, file: Path) -> None:
    """Random weights of `model`, norms included, in a file."""
    torch.manual_seed(3)
    state = {key: value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
             for key, value in model.state_dict().items()}  # fmt: skip
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, file)


@pytest.fixture(scope="module")
def made(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, dict[str, Any], list[str]]:
    """A float16 cache of random-weights towers, these towers for the views' size, and what extract-features said."""
    folder = tmp_path_factory.mktemp("derived")
    save_random(clip(224), folder / "clip.safetensors")
    models = {"clip": clip(SIZE, pretrained=str(folder / "clip.safetensors"))}
    for kind, options in KINDS.items():
        save_random(timm.create_model("test_vit", **options), file := folder / f"{kind}.safetensors")
        how = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
        models[kind] = timm.create_model("test_vit", img_size=SIZE, **options, **how).eval()
    small = "&".join(f"{key}={value}" for key, value in VISION.items())
    texts = [
        f"clip=open_clip:ViT-B-16-quickgelu@{folder}/clip.safetensors?tap=pre_tail,post_ln,projected&embed_dim=32&"
        f"activation=quickgelu&{small}",
        f"norm=timm:test_vit@{folder}/norm.safetensors",
        f"fcnorm=timm:test_vit@{folder}/fcnorm.safetensors?global_pool=avg",
    ]  # fmt: skip
    said: list[str] = []
    options = Options([photo_folder], folder / "cache", ViewRecipe(SIZE), texts, grid=GRID, dtype="float16", batch_size=5,
                      device="cpu", workers=1)  # fmt: skip
    extract_features(options, say=said.append)
    return open_cache(folder / "cache"), models, said


def plain_image(cache: Cache, name: str, numbers: Any) -> Tensor:
    """The stored views as the tower wants them."""
    spec = cache.column(f"{name}.pre_tail").spec
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (spec.mean, spec.std))
    return (cache.read_pixels(numbers, numbers * 0).permute(0, 3, 1, 2).float() / 255 - mean) / std


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert F.cosine_similarity(found.double(), expected.double(), dim=-1).min() >= 0.9999
    assert (found - expected).abs().max() <= 0.01 * expected.std()


@torch.no_grad()
def test_a_clip_tower_s_taps_are_its_own(made: tuple[Cache, dict[str, Any], list[str]]) -> None:
    cache, models, _ = made
    numbers, visual = cache.numbers[:6], models["clip"].visual
    image = plain_image(cache, "clip", numbers)
    visual.output_tokens = True
    pooled, tokens = visual(image)
    visual.output_tokens = False
    for how in ({"column": "clip.post_ln"}, {"column": "clip.pre_tail", "tap": "post_ln"}):
        assert_same(cache.read_tokens(numbers=numbers, views=numbers * 0, **how), tokens)
    assert_same(cache.read_tokens("clip.projected", numbers, numbers * 0), tokens @ visual.proj)
    assert_same(cache.read_cls("clip.projected", numbers, numbers * 0), pooled)
    before = cache.read_tokens("clip.pre_tail", numbers, numbers * 0)
    assert F.cosine_similarity(before, tokens, dim=-1).min() < 0.999, "the norm of these weights does something"
    assert cache.column("clip.projected").spec.width == 32


@torch.no_grad()
@pytest.mark.parametrize("name", list(KINDS))
def test_a_timm_vit_s_norm_is_its_own(made: tuple[Cache, dict[str, Any], list[str]], name: str) -> None:
    cache, models, _ = made
    numbers = cache.numbers[:6]
    out = models[name].forward_features(plain_image(cache, name, numbers))
    out = models[name].fc_norm(out)  # the identity where there is a norm before pooling
    assert_same(cache.read_tokens(f"{name}.post_ln", numbers, numbers * 0), out[:, 1:])
    assert_same(cache.read_cls(f"{name}.post_ln", numbers, numbers * 0), out[:, 0])
    with pytest.raises(ValueError, match=f"no column '{name}.projected'"):
        cache.read_tokens(f"{name}.pre_tail", numbers, numbers * 0, tap="projected")


def test_a_view_of_a_sample_has_every_column_that_is_listed(made: tuple[Cache, dict[str, Any], list[str]]) -> None:
    cache = made[0]
    view, item = cache[2].views[0], CacheImages(cache, columns=["clip.projected"])[2]
    assert set(view) == {"pixels", "view", *cache.teachers, *cache.columns, *cache.derived}
    for name in cache.derived:
        assert torch.equal(view[name]["tokens"], cache.read_tokens(name, [2], [0])[0])
        assert torch.equal(view[name]["cls"], cache.read_cls(name, [2], [0])[0])
    assert view["clip"] is view["clip.pre_tail"] and torch.equal(
        item["clip.projected"], view["clip.projected"]["tokens"]
    )


def test_what_follows_is_not_stored_but_listed(made: tuple[Cache, dict[str, Any], list[str]], tmp_path: Path) -> None:
    cache, _, said = made
    assert list(cache.columns) == ["clip.pre_tail", "norm.pre_tail", "fcnorm.pre_tail"]
    assert list(cache.derived) == ["clip.post_ln", "clip.projected", "norm.post_ln", "fcnorm.post_ln"]
    assert sum("is not stored twice, it follows from clip.pre_tail and the tail" in line for line in said) == 2
    shown = CliRunner().invoke(inspect_cache, ["show", str(cache.path)]).output
    assert "clip.projected: width 32, from clip.pre_tail and its tail when read" in shown
    done = CliRunner().invoke(inspect_cache, ["stats", str(cache.path), "--column", "clip.projected"])
    assert done.exit_code == 0 and "clip.projected: " in done.output, done.output
    for name in ("clip.post_ln", "clip.projected", "clip.pre_tail", "clip"):
        tokens, cls = column_features(open_source(f"{cache.path}#{name}"), cache.numbers[:3])
        column = "clip.post_ln" if name == "clip" else name
        assert torch.equal(tokens, cache.read_tokens(column, cache.numbers[:3], [0] * 3)) and cls is not None
    assert (
        len({str(open_source(f"{cache.path}#clip.{tap}").about) for tap in ("pre_tail", "post_ln", "projected")}) == 3
    )


def test_a_tap_asked_for_alone_is_stored_and_stays(extract: Extract, photo_folder: Path, tmp_path: Path) -> None:
    text = "vit=timm:test_vit/random?tap="
    extract(photo_folder, tmp_path / "c", f"{text}post_ln")
    extract(photo_folder, tmp_path / "c", f"{text}post_ln", f"{text}pre_tail")
    cache = open_cache(tmp_path / "c")
    assert set(cache.columns) == {"vit.post_ln", "vit.pre_tail"} and cache.derived == {}


def test_an_altered_tail_is_refused(extract: Extract, photo_folder: Path, tmp_path: Path) -> None:
    extract(photo_folder, tmp_path / "c")
    file = tmp_path / "c/tail/vit.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="tail/vit.safetensors: its sha256 is not that of the manifest"):
        open_cache(tmp_path / "c").read_tokens("vit.post_ln", [0], [0])
