"""Published checkpoints: their weights give their loss, come back unchanged, and misfits are named."""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import LayerScale
from torch import Tensor

from mrmae.train.foreign import export_published, init_from, published_weights, to_cpq, to_pqc
from mrmae.train.method.masks import Draw
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.student import sincos_positions
from mrmae.train.method.targets import Batch, CacheInfo

MakeRecipe = Callable[..., Recipe]
MakeInfo = Callable[..., CacheInfo]
D, HEADS, DEPTH, WIDE, WIDE_HEADS, WIDE_DEPTH = 64, 2, 6, 16, 2, 1  # timm's test_vit; the decoder of the tests


def mae_weights(grid: int, patch: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A random checkpoint under MAE's published names; positions are its fixed sin-cos tables."""
    draw = torch.Generator().manual_seed(4)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D), "mask_token": (1, 1, WIDE), "patch_embed.proj.weight": (D, channels, patch, patch),
        "patch_embed.proj.bias": (D,), "decoder_embed.weight": (WIDE, D), "decoder_embed.bias": (WIDE,),
        "decoder_pred.weight": (patch**2 * channels, WIDE), "decoder_pred.bias": (patch**2 * channels,),
    }  # fmt: skip
    norms = ["norm", "decoder_norm"]
    for at, d, depth, ratio in (("blocks", D, DEPTH, 3), ("decoder_blocks", WIDE, WIDE_DEPTH, 2)):
        for i in range(depth):
            layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (ratio * d, d), "mlp.fc2": (d, ratio * d)}
            shapes |= {f"{at}.{i}.{name}.weight": shape for name, shape in layers.items()}
            shapes |= {f"{at}.{i}.{name}.bias": shape[:1] for name, shape in layers.items()}
            norms += [f"{at}.{i}.norm1", f"{at}.{i}.norm2"]
    weights = {name: 0.2 * torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    for name in norms:
        d = WIDE if name.startswith("decoder") else D
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(d, generator=draw, dtype=torch.float64)
        weights[f"{name}.bias"] = 0.2 * torch.randn(d, generator=draw, dtype=torch.float64)
    weights["pos_embed"] = sincos_positions((grid, grid), D)[None]
    weights["decoder_pos_embed"] = sincos_positions((grid, grid), WIDE)[None]
    return {name: x.to(dtype) for name, x in weights.items()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(weights: dict[str, Tensor], wrapper: str | None = "model") -> Path:
        path = tmp_path / "weights.pth"
        torch.save({wrapper: weights, "args": Namespace(lr=1e-3), "epoch": 3} if wrapper else weights, path)
        return path

    return write


# ---- their formulas, in their layout


def their_block(x: Tensor, w: dict[str, Tensor], at: str, heads: int) -> Tensor:
    b, n, d = x.shape
    y = F.layer_norm(x, (d,), w[at + "norm1.weight"], w[at + "norm1.bias"], 1e-6)
    qkv = y @ w[at + "attn.qkv.weight"].T + w[at + "attn.qkv.bias"]
    q, k, v = qkv.reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    y = ((q @ k.transpose(-2, -1)) / math.sqrt(d // heads)).softmax(-1) @ v
    x = x + y.transpose(1, 2).reshape(b, n, d) @ w[at + "attn.proj.weight"].T + w[at + "attn.proj.bias"]
    y = F.layer_norm(x, (d,), w[at + "norm2.weight"], w[at + "norm2.bias"], 1e-6)
    y = F.gelu(y @ w[at + "mlp.fc1.weight"].T + w[at + "mlp.fc1.bias"])
    return x + y @ w[at + "mlp.fc2.weight"].T + w[at + "mlp.fc2.bias"]


def their_loss(w: dict[str, Tensor], images: Tensor, shuffle: Tensor, n_keep: int, patch: int) -> Tensor:
    """MAE's loss of normalised images [b, c, h, w]: embed all, keep the first of `shuffle`, un-shuffle, predict (p, q, c), mask."""
    b, c, side, _ = images.shape
    l, g = shuffle.shape[1], side // patch
    restore = shuffle.argsort(dim=1)
    x = (
        F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
        .flatten(2)
        .transpose(1, 2)
    )
    x = (x + w["pos_embed"][:, 1:]).gather(1, shuffle[:, :n_keep, None].expand(-1, -1, D))
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(b, -1, -1), x], dim=1)
    for i in range(DEPTH):
        x = their_block(x, w, f"blocks.{i}.", HEADS)
    x = F.layer_norm(x, (D,), w["norm.weight"], w["norm.bias"], 1e-6)
    x = x @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
    whole = torch.cat([x[:, 1:], w["mask_token"].expand(b, l - n_keep, -1)], dim=1)
    whole = whole.gather(1, restore[..., None].expand(-1, -1, WIDE))
    x = torch.cat([x[:, :1], whole], dim=1) + w["decoder_pos_embed"]
    for i in range(WIDE_DEPTH):
        x = their_block(x, w, f"decoder_blocks.{i}.", WIDE_HEADS)
    x = F.layer_norm(x, (WIDE,), w["decoder_norm.weight"], w["decoder_norm.bias"], 1e-6)
    prediction = (x @ w["decoder_pred.weight"].T + w["decoder_pred.bias"])[:, 1:]
    target = images.reshape(b, c, g, patch, g, patch).permute(0, 2, 4, 3, 5, 1).reshape(b, l, -1)  # (p, q, c)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    hidden = torch.ones(b, l, dtype=images.dtype).scatter(1, shuffle[:, :n_keep], 0.0)
    return (((prediction - target) ** 2).mean(-1) * hidden).sum() / hidden.sum()


@pytest.mark.parametrize(("grid", "patch", "channels"), [(4, 5, 3), (14, 2, 3), (4, 4, 1)])
def test_the_loss_of_published_weights_is_theirs_to_1e_10(
    tiny_recipe: MakeRecipe,
    tiny_info: MakeInfo,
    tiny_batch: Callable[..., Batch],
    save: Callable[..., Path],
    grid: int,
    patch: int,
    channels: int,
) -> None:
    weights = mae_weights(grid, patch, channels)
    prepare = ["prepare={mean: [0.5], std: [0.25]}"] if channels == 1 else []
    info = tiny_info(grid, patch, channels)
    model = build_model(tiny_recipe("mae", *prepare), info, dtype=torch.float64)
    notes = init_from(model, save(weights))
    assert len(notes) == 2 and "encoder loaded" in notes[0] and "(p, q, c)" in notes[1]
    batch = tiny_batch(info)
    masks = draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=grid**2)
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (model.recipe.prepare.mean, model.recipe.prepare.std))
    images = ((batch.pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    keep, hidden = masks.ids_keep, masks.ids_predict
    shuffle = torch.cat([keep.flip(1), hidden[:, torch.randperm(hidden.shape[1])]], dim=1)
    theirs = their_loss(weights, images, shuffle, keep.shape[1], patch)
    assert abs(model(batch, masks)[0].item() - theirs.item()) < 1e-10
    wrong = dict(weights, **{"decoder_pred.weight": to_cpq(weights["decoder_pred.weight"], patch, channels)})
    if channels > 1:  # the order matters
        assert abs(their_loss(wrong, images, shuffle, keep.shape[1], patch).item() - theirs.item()) > 1e-3


# ---- there and back


def test_export_gives_back_what_was_imported(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path], tmp_path: Path
) -> None:
    weights = mae_weights(4, 5, dtype=torch.float32)
    model = build_model(tiny_recipe("mr-mae"), tiny_info(4, 5))
    init_from(model, save(weights), decoder=True)
    written = torch.load(export_published(model, tmp_path / "mae.pth"), weights_only=True)
    assert list(written) == ["model"] and written["model"].keys() == weights.keys()
    for name, x in written["model"].items():
        assert torch.equal(x, weights[name]), name
        assert x.untyped_storage().nbytes() == x.nbytes


def test_the_order_of_prediction_rows_round_trips() -> None:
    rows = torch.arange(3 * 4 * 4 * 2).reshape(48, 2)
    assert torch.equal(to_pqc(to_cpq(rows, 4, 3), 4, 3), rows) and torch.equal(
        to_cpq(to_pqc(rows[:, 0], 4, 3), 4, 3), rows[:, 0]
    )
    assert to_cpq(rows, 4, 3)[16 * 1 + 4 * 2 + 3].tolist() == rows[(2 * 4 + 3) * 3 + 1].tolist()  # c 1, p 2, q 3


@pytest.mark.parametrize("name", ["mr-mae", "mimic-only"])
def test_fine_tuning_scripts_load_the_export(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tmp_path: Path, name: str
) -> None:
    """They load with strict=False and then insist on which names are missing: the classifier and its norm."""
    model = build_model(tiny_recipe(name), tiny_info(6, 5))
    weights = torch.load(export_published(model, tmp_path / "mae.pth"), weights_only=True)["model"]
    for pool, missing in (("avg", {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}),
                          ("token", {"head.weight", "head.bias"})):  # fmt: skip
        tuned = timm.create_model(
            "test_vit", img_size=30, patch_size=5, num_classes=3, global_pool=pool, fc_norm=pool == "avg"
        )
        said = tuned.load_state_dict(weights, strict=False)
        assert set(said.missing_keys) == missing
        beside = {n for n in said.unexpected_keys if not n.startswith(("decoder_", "mask_token", "norm."))}
        assert not beside and any(n.startswith("decoder_") for n in said.unexpected_keys) == (name == "mr-mae")
        assert torch.equal(tuned.pos_embed, model.student.pos_embed)


# ---- encoders alone


def test_an_encoder_alone_leaves_the_decoder_as_it_starts(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path]
) -> None:
    weights = mae_weights(4, 5, dtype=torch.float32)
    fresh, model, full = (build_model(tiny_recipe("mae"), tiny_info(4, 5)) for _ in range(3))
    alone = {name: x for name, x in weights.items() if not name.startswith(("decoder", "mask"))}
    assert init_from(model, save(alone))[1:] == ["--init: the decoder starts anew"]
    assert init_from(full, save(weights), decoder=False)[1:] == ["--init: the decoder starts anew"]
    for name, x in model.state_dict().items():
        assert torch.equal(x, full.state_dict()[name])
        theirs = weights[name.removeprefix("student.")] if name.startswith("student.") else fresh.state_dict()[name]
        assert torch.equal(x, theirs), name


def test_any_timm_vit_is_a_start_and_positions_are_interpolated(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tmp_path: Path, tiny_batch: Callable[..., Batch]
) -> None:
    vit = timm.create_model("test_vit", img_size=25, patch_size=5, num_classes=7)
    torch.nn.init.normal_(vit.pos_embed)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model = build_model(tiny_recipe("mr-mae"), tiny_info(4, 5))
    notes = init_from(model, tmp_path / "vit.safetensors")
    assert "--init: positions interpolated from 5 x 5 to 4 x 4 patches" in notes
    resized = timm.create_model("test_vit", img_size=20, patch_size=5, num_classes=0)
    state = dict(vit.state_dict())
    grid = state["pos_embed"][:, 1:].double().reshape(1, 5, 5, D).permute(0, 3, 1, 2)
    smaller = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 16, D)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], smaller.float()], dim=1)
    resized.load_state_dict({n: x for n, x in state.items() if not n.startswith("head.")}, strict=True)
    pixels = tiny_batch(model.info).pixels
    mean, std = torch.tensor(model.recipe.prepare.mean), torch.tensor(model.recipe.prepare.std)
    theirs = resized.forward_features(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))[:, 1:]
    assert (model.tokens(pixels) - theirs).abs().max() < 1e-4
    assert not model.student.pos_embed.requires_grad  # type: ignore[union-attr]


def test_learned_positions_of_the_same_grid_are_kept_and_said(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path]
) -> None:
    weights = mae_weights(4, 5, dtype=torch.float32)
    weights["pos_embed"] = torch.randn(1, 17, D)
    model = build_model(tiny_recipe("mimic-only"), tiny_info(4, 5))
    notes = init_from(model, save(weights, None))
    assert notes[1:] == ["--init: positions are the file's own, not sin-cos; they stay fixed while training"]
    assert torch.equal(model.student.pos_embed, weights["pos_embed"])  # type: ignore[arg-type]


def test_a_fine_tuned_vit_has_no_final_norm_and_that_is_said(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path]
) -> None:
    tuned = timm.create_model("test_vit", img_size=20, patch_size=5, num_classes=3, global_pool="avg", fc_norm=True)
    model = build_model(tiny_recipe("mimic-only"), tiny_info(4, 5))
    notes = init_from(model, save(tuned.state_dict()))
    assert "--init: norm.weight keeps its initial values, the file has none" in notes


# ---- MCMAE


def test_mcmae_checkpoints_come_and_go_under_their_names(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path], tmp_path: Path
) -> None:
    def built(seed: int) -> Pretrainer:
        return build_model(tiny_recipe("mr-mcmae", f"seed={seed}"), tiny_info(2, 16))

    source, target, encoder_only = built(0), built(1), built(2)
    weights = torch.load(export_published(source, tmp_path / "convmae.pth"), weights_only=True)["model"]
    assert weights["pos_embed"].shape == (1, 4, 32) and weights["decoder_pos_embed"].shape == (1, 4, 16)
    assert {n.split(".")[0] for n in weights} == {
        "patch_embed1", "patch_embed2", "patch_embed3", "patch_embed4", "stage1_output_decode", "stage2_output_decode",
        "pos_embed", "blocks1", "blocks2", "blocks3", "norm", "decoder_embed", "mask_token", "decoder_pos_embed",
        "decoder_blocks", "decoder_norm", "decoder_pred",
    }  # fmt: skip
    init_from(target, save({**weights, "cls_token": torch.zeros(1, 1, 32)}))  # ConvMAE-v2 carries a CLS token
    assert all(
        torch.equal(x, source.state_dict()[name])
        for name, x in target.state_dict().items()
        if not name.startswith("heads.mimic")
    )
    tuned = {n: x for n, x in weights.items() if not n.startswith(("decoder", "mask", "stage", "norm"))}
    tuned |= {"fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.zeros(32), "head.weight": torch.zeros(9, 32)}
    notes = init_from(encoder_only, save(tuned))
    assert "--init: stage1_output_decode.weight keeps its initial values, the file has none" in notes
    assert torch.equal(encoder_only.student.blocks1[0].attn.weight, weights["blocks1.0.attn.weight"])  # type: ignore


# ---- what does not fit


def spoiled(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {name: x for name, x in weights.items() if name != "blocks.2.norm1.bias"}
    if how == "deeper":
        return weights | {f"blocks.6.{n}": torch.zeros(1) for n in ("norm1.weight", "norm1.bias")}
    if how == "distilled":
        return weights | {"dist_token": torch.zeros(1, 1, D), "pos_embed": torch.zeros(1, 18, D)}
    if how == "no position for CLS":
        return weights | {"pos_embed": weights["pos_embed"][:, 1:]}
    if how == "wide":
        return weights | {"patch_embed.proj.weight": torch.zeros(D, 3, 4, 4)}
    if how == "deep decoder":
        return weights | {"decoder_blocks.1.norm1.weight": torch.zeros(WIDE)}
    if how == "other decoder":
        return weights | {"decoder_embed.weight": torch.zeros(24, D)}
    if how == "prediction":
        return weights | {"decoder_pred.weight": torch.zeros(48, WIDE), "decoder_pred.bias": torch.zeros(48)}
    if how == "learned decoder positions":
        return weights | {"decoder_pos_embed": torch.ones(1, 17, WIDE)}
    return {"patch_embed1.proj.weight": torch.zeros(8, 3, 4, 4)}


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing", "1 tensor missing in the file: blocks.2.norm1.bias"),
        ("deeper", "2 tensors in the file only: blocks.6.norm1.bias, blocks.6.norm1.weight"),
        ("distilled", "in the file only: dist_token"),
        ("no position for CLS", r"pos_embed has shape \[1, 16, 64\]; \[1, 1 \+ patches of a square grid, width\]"),
        ("wide", r"patch_embed.proj.weight has shape \[64, 3, 4, 4\] in the file; this recipe's has \[64, 3, 5, 5\]"),
        ("deep decoder", "in the file only: decoder.blocks.1.norm1.weight; .* load the encoder alone"),
        ("other decoder", r"embed.weight has shape \[24, 64\] in the file; this recipe's has \[16, 64\]"),
        ("prediction", "decoder_pred predicts 48 values; 75 = 5 x 5 x 3"),
        ("learned decoder positions", "decoder_pos_embed is not the fixed sin-cos table"),
        ("mcmae", "holds MCMAE's student; test_vit was expected"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path], how: str, told: str
) -> None:
    model = build_model(tiny_recipe("mae"), tiny_info(4, 5))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        init_from(model, save(spoiled(mae_weights(4, 5), how)))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_decoder_that_is_asked_for_must_be_there(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path]
) -> None:
    weights = mae_weights(4, 5)
    with pytest.raises(ValueError, match="the recipe has no decoder with a linear pixel head"):
        init_from(build_model(tiny_recipe("mimic-only"), tiny_info(4, 5)), save(weights), decoder=True)
    alone = {name: x for name, x in weights.items() if not name.startswith("decoder_pred")}
    with pytest.raises(ValueError, match="the decoder was asked for and the file has none"):
        init_from(build_model(tiny_recipe("mae"), tiny_info(4, 5)), save(alone), decoder=True)


def test_blocks_that_a_recipe_leaves_out_are_left_in_the_file(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path]
) -> None:
    model, weights = (
        build_model(tiny_recipe("mimic-only", "terms.mimic.tap=block4"), tiny_info(4, 5)),
        mae_weights(4, 5),
    )
    said = init_from(model, save(weights))
    assert any("the file's last 2 blocks left out, no term reads more" in line for line in said)
    assert len(model.student.blocks) == 4
    ours = model.student.blocks[3].mlp.fc1.weight
    assert torch.equal(ours, weights["blocks.3.mlp.fc1.weight"].to(ours.dtype))


def test_only_a_decoder_like_maes_comes_from_its_checkpoint_and_goes_into_one(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path]
) -> None:
    model = build_model(tiny_recipe("mae", "student.decoder.kind=cross"), tiny_info(4, 5))
    assert "--init: the decoder starts anew" in init_from(model, save(mae_weights(4, 5)))
    assert not [name for name in published_weights(model) if "decoder" in name]


def test_a_student_without_cls_has_no_place_in_maes_layout(tiny_recipe: MakeRecipe, tiny_info: MakeInfo) -> None:
    model = build_model(tiny_recipe("mimic-only", "student.cls=false"), tiny_info())
    with pytest.raises(ValueError, match="test_vit has no CLS token, which MAE's ViT does"):
        published_weights(model)


def test_a_vit_into_mcmae_and_a_vit_with_more_parts_are_refused(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, save: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match="holds a plain ViT; test_mcmae was expected"):
        init_from(build_model(tiny_recipe("mr-mcmae"), tiny_info(2, 16)), save(mae_weights(2, 16)))
    scaled = build_model(tiny_recipe("mimic-only"), tiny_info())
    scaled.student.blocks[0].ls1 = LayerScale(D)
    with pytest.raises(ValueError, match="test_vit has blocks.0.ls1.gamma, which MAE's ViT does not"):
        published_weights(scaled)
