"""The masked-convolution student against a dense float64 restatement: what is hidden is never read, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae.common.device import without_numbers
from mrmae.train.foreign import published_weights
from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.mcmae import SIZES, MaskedConvViT, Size, build_mcmae, encode_mcmae
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.student import initialise, sincos_positions
from mrmae.train.method.targets import Batch, CacheInfo

SCALE, SHIFT = torch.tensor([0.02, 0.01, 0.015]).double(), torch.tensor([-1.0, -2.0, -1.5]).double()
TINY = SIZES["test_mcmae"]


def shaken(grid: tuple[int, int], size: str = "test_mcmae") -> MaskedConvViT:
    """A float64 student whose every parameter has moved away from its start."""
    student = build_mcmae(size, patch=16, grid=grid).double()
    initialise(student, 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += (
                0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * parameter.requires_grad
            )
    return student


def images(grid: tuple[int, int], b: int = 2) -> Tensor:
    side = (b, 16 * grid[0], 16 * grid[1], 3)
    return torch.randint(0, 256, side, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


# ---- the restatement: dense maps [b, c, h, w], the mask multiplied in, every token computed


def channel_norm(x: Tensor, w: dict[str, Tensor], at: str, eps: float) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],), w[at + ".weight"], w[at + ".bias"], eps).movedim(-1, 1)


def conv(x: Tensor, w: dict[str, Tensor], at: str, **how: int) -> Tensor:
    return F.conv2d(x, w[at + ".weight"], w[at + ".bias"], **how)


def dense_conv_block(x: Tensor, w: dict[str, Tensor], at: str, seen: Tensor) -> Tensor:
    y = seen * conv(channel_norm(x, w, at + "norm1", 1e-5), w, at + "conv1")
    x = x + conv(conv(y, w, at + "attn", padding=2, groups=x.shape[1]), w, at + "conv2")
    y = F.gelu(conv(channel_norm(x, w, at + "norm2", 1e-5), w, at + "mlp.fc1"))
    return x + conv(y, w, at + "mlp.fc2")


def transformer_block(x: Tensor, w: dict[str, Tensor], at: str, heads: int) -> Tensor:
    b, n, d = x.shape
    y = F.layer_norm(x, (d,), w[at + "norm1.weight"], w[at + "norm1.bias"], 1e-6)
    q, k, v = (
        F.linear(y, w[at + "attn.qkv.weight"], w[at + "attn.qkv.bias"]).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    )
    share = (q @ k.transpose(2, 3) / (d // heads) ** 0.5).softmax(-1)
    y = (share @ v).transpose(1, 2).reshape(b, n, d)
    x = x + F.linear(y, w[at + "attn.proj.weight"], w[at + "attn.proj.bias"])
    y = F.layer_norm(x, (d,), w[at + "norm2.weight"], w[at + "norm2.bias"], 1e-6)
    y = F.gelu(F.linear(y, w[at + "mlp.fc1.weight"], w[at + "mlp.fc1.bias"]))
    return x + F.linear(y, w[at + "mlp.fc2.weight"], w[at + "mlp.fc2.bias"])


def dense(
    w: dict[str, Tensor], image: Tensor, keep: Tensor, grid: tuple[int, int], size: Size, *, masked: bool = True
) -> tuple[Tensor, Tensor]:
    """(transformer output, fused output) at `keep` of normalised images [b, c, h, w]; without `masked`, M = 1 everywhere."""
    visible = torch.zeros(len(image), grid[0] * grid[1], dtype=image.dtype).scatter(1, keep, 1.0).view(-1, 1, *grid)
    seen = visible if masked else torch.ones_like(visible)
    x, stages = image, []
    for stage, stride, up in ((1, 4, 4), (2, 2, 2), (3, 2, 1)):
        x = F.gelu(
            channel_norm(conv(x, w, f"patch_embed{stage}.proj", stride=stride), w, f"patch_embed{stage}.norm", 1e-5)
        )
        if stage < 3:
            cells = seen.repeat_interleave(up, 2).repeat_interleave(up, 3)
            for i in range(size.depths[stage - 1]):
                x = dense_conv_block(x, w, f"blocks{stage}.{i}.", cells)
            fused = conv(x, w, f"stage{stage}_output_decode", stride=up).flatten(2).transpose(1, 2)
            stages.append(fused.take_along_dim(keep[..., None], 1))
    tokens = F.linear(x.flatten(2).transpose(1, 2), w["patch_embed4.weight"], w["patch_embed4.bias"])
    z = (tokens + w["pos_embed"]).take_along_dim(keep[..., None], 1)
    for i in range(size.depths[2]):
        z = transformer_block(z, w, f"blocks3.{i}.", size.heads)
    return z, F.layer_norm(z + sum(stages), (z.shape[2],), w["norm.weight"], w["norm.bias"], 1e-6)


@pytest.mark.parametrize(("grid", "n_keep"), [((4, 4), 4), ((3, 5), 6), ((2, 2), 4)])
def test_visible_tokens_and_gradients_equal_the_dense_restatement(grid: tuple[int, int], n_keep: int) -> None:
    student, pixels, l = shaken(grid), images(grid), grid[0] * grid[1]
    keep = torch.stack([torch.randperm(l)[:n_keep].sort().values for _ in range(2)])
    ours, blocks = encode_mcmae(student, pixels, keep, scale=SCALE, shift=SHIFT, keep_blocks=(3,))
    w = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in student.named_parameters()}
    image = (pixels.double() * SCALE + SHIFT).permute(0, 3, 1, 2)
    z, theirs = dense(w, image, keep, grid, TINY)
    assert ours.shape == (2, n_keep, 32) and (ours - theirs).abs().max() < 1e-12
    assert (blocks[3] - z).abs().max() < 1e-12
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            found, wanted = parameter.grad, w[name].grad
            assert found is not None and wanted is not None and wanted.abs().max() > 0, name
            assert (found - wanted).norm() <= 1e-10 * wanted.norm() + 1e-13, name


def test_with_all_patches_visible_it_is_the_unmasked_net_and_masking_does_change_it() -> None:
    grid, keep = (3, 3), torch.arange(9).expand(2, -1)
    student, pixels = shaken(grid), images(grid)
    image = (pixels.double() * SCALE + SHIFT).permute(0, 3, 1, 2)
    w = dict(student.named_parameters())
    ours, _ = encode_mcmae(student, pixels, keep, scale=SCALE, shift=SHIFT)
    z, whole = dense(w, image, keep, grid, TINY, masked=False)
    assert (ours - whole).abs().max() < 1e-12
    assert (student.forward_features(image) - z).abs().max() < 1e-12  # what fine-tuning starts from: no stage fusion
    few = torch.tensor([[0, 4], [4, 8]])
    masked, _ = encode_mcmae(student, pixels, few, scale=SCALE, shift=SHIFT)
    assert (masked - dense(w, image, few, grid, TINY, masked=False)[1]).abs().max() > 1e-3


def test_hidden_pixels_leave_tokens_and_mimic_loss_bit_equal_and_visible_ones_do_not(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]
) -> None:
    info = tiny_info(4, 16)
    model = build_model(tiny_recipe("mr-mcmae", "terms.pixels=null"), info)
    batch = tiny_batch(info, 1)
    masks = Masks(torch.tensor([[0, 5, 6, 15]]), torch.tensor([[1, 2]]))

    def run(row: int, column: int) -> tuple[Tensor, Tensor]:
        changed = batch.pixels.clone()
        changed[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] ^= 0x55
        return model.encode(changed, masks.ids_keep)[0], model(Batch(batch.samples, changed, batch.targets), masks)[0]

    before, loss = model.encode(batch.pixels, masks.ids_keep)[0], model(batch, masks)[0]
    for hidden in ((0, 1), (1, 0), (2, 2), (3, 0)):  # some of them beside visible patches
        tokens, value = run(*hidden)
        assert torch.equal(tokens, before) and torch.equal(value, loss)
    tokens, value = run(1, 1)
    assert not torch.allclose(tokens, before) and value != loss
    assert not torch.allclose(
        tokens[:, 2], before[:, 2]
    )  # patch 6, its neighbour, sees it through the convolutions too


def test_several_masks_per_image_are_rows(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]
) -> None:
    info = tiny_info(3, 16)
    model = build_model(tiny_recipe("mr-mcmae"), info, dtype=torch.float64)
    batch = tiny_batch(info)
    one, two = (draw_masks(batch, Draw(0, epoch), recipe=model.recipe.mask, l=9) for epoch in (0, 1))
    both = Masks(torch.cat([one.ids_keep, two.ids_keep]), torch.cat([one.ids_predict, two.ids_predict]))
    mean = (model(batch, one)[0] + model(batch, two)[0]) / 2
    assert model(batch, both)[0].item() == pytest.approx(mean.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["mr-mcmae", "mcmae"])
def test_the_loss_is_theirs_to_1e_10_in_their_layout(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch], name: str
) -> None:
    """Pixels as in ConvMAE's code: decoder over all tokens un-shuffled, (p, q, c) predictions, masked mean."""
    info, (b, l, g) = tiny_info(4, 16), (2, 16, 4)
    pixels_only = ["terms.mimic=null"] if name == "mcmae" else []
    model = build_model(tiny_recipe("mr-mcmae", *pixels_only), info, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, dtype=torch.float64) * parameter.requires_grad
    batch, w = tiny_batch(info), published_weights(model)
    masks = draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=l)
    image = (batch.pixels.double() * model.scale + model.shift).permute(0, 3, 1, 2)
    _, u = dense(w, image, masks.ids_keep, (g, g), TINY)
    u = F.linear(u, w["decoder_embed.weight"], w["decoder_embed.bias"])
    order = torch.cat([masks.ids_keep, masks.ids_predict], dim=1)
    x = torch.cat([u, w["mask_token"].expand(b, l - u.shape[1], -1)], dim=1)
    x = x.take_along_dim(order.argsort(dim=1)[..., None], 1) + w["decoder_pos_embed"]
    x = transformer_block(x, w, "decoder_blocks.0.", 2)
    x = F.layer_norm(x, (16,), w["decoder_norm.weight"], w["decoder_norm.bias"], 1e-6)
    prediction = F.linear(x, w["decoder_pred.weight"], w["decoder_pred.bias"])
    target = image.reshape(b, 3, g, 16, g, 16).permute(0, 2, 4, 3, 5, 1).reshape(b, l, -1)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    hidden = torch.ones(b, l).double().scatter(1, masks.ids_keep, 0.0)
    theirs = (((prediction - target) ** 2).mean(-1) * hidden).sum() / hidden.sum()
    assert abs(model(batch, masks)[1]["pixels"].item() - theirs.item()) < 1e-10


# ---- sizes, names, initial weights


def test_the_base_student_has_the_published_numbers_of_parameters() -> None:
    with without_numbers():
        student = MaskedConvViT(SIZES["mcmae_base"], (14, 14))
    sizes = {name: x.numel() for name, x in student.named_parameters() if x.requires_grad}
    fusion = sum(n for name, n in sizes.items() if name.startswith("stage"))
    assert round((sum(sizes.values()) - fusion) / 1e6, 1) == 84.5
    assert round(sum(sizes.values()) / 1e6, 1) == 88.8
    assert student.pos_embed.shape == (1, 196, 768) and "pos_embed" not in sizes
    assert SIZES["mcmae_base"] == Size((256, 384, 768), (2, 2, 11), 12, (4.0, 4.0, 4.0))
    assert SIZES["mcmae_large"] == Size((384, 768, 1024), (2, 2, 23), 16, (4.0, 4.0, 4.0))


def test_names_and_shapes_are_those_of_published_checkpoints() -> None:
    with without_numbers():
        shapes = {name: tuple(x.shape) for name, x in MaskedConvViT(SIZES["mcmae_base"], (14, 14)).state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {"pos_embed": (1, 196, 768), "norm.weight": (768,), "norm.bias": (768,)}
    layers: dict[str, tuple[int, ...]] = {
        "patch_embed4": (768, 768),
        "stage1_output_decode": (768, 256, 4, 4),
        "stage2_output_decode": (768, 384, 2, 2),
    }
    for stage, (c, d, k) in enumerate([(3, 256, 4), (256, 384, 2), (384, 768, 2)], start=1):
        layers |= {f"patch_embed{stage}.proj": (d, c, k, k), f"patch_embed{stage}.norm": (d,)}
    for stage, d in ((1, 256), (2, 384)):
        for i in range(2):
            at = f"blocks{stage}.{i}."
            layers |= {at + "norm1": (d,), at + "norm2": (d,), at + "conv1": (d, d, 1, 1), at + "conv2": (d, d, 1, 1)}
            layers |= {at + "attn": (d, 1, 5, 5), at + "mlp.fc1": (4 * d, d, 1, 1), at + "mlp.fc2": (d, 4 * d, 1, 1)}
    for i in range(11):
        at = f"blocks3.{i}."
        layers |= {
            at + "norm1": (768,),
            at + "norm2": (768,),
            at + "attn.qkv": (2304, 768),
            at + "attn.proj": (768, 768),
        }
        layers |= {at + "mlp.fc1": (3072, 768), at + "mlp.fc2": (768, 3072)}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert shapes == expected


def test_initial_weights_follow_the_published_rules_and_the_seed() -> None:
    one, two, other = (build_mcmae("test_mcmae", patch=16, grid=(2, 2)) for _ in range(3))
    for student, seed in ((one, 0), (two, 0), (other, 1)):
        initialise(student, seed)
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values()))
    for name, module in one.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rows = module.weight.flatten(1)
            xavier = isinstance(module, nn.Linear) or name == "patch_embed3.proj"
            bound = (6 / sum(rows.shape)) ** 0.5 if xavier else rows.shape[1] ** -0.5
            assert 0.8 * bound < rows.abs().max() <= bound, name
            assert module.bias is not None
            assert (module.bias == 0).all() if isinstance(module, nn.Linear) else module.bias.abs().max() > 0, name
            assert not torch.equal(module.weight, other.get_submodule(name).weight), name  # type: ignore[arg-type]
    assert torch.equal(one.pos_embed[0], sincos_positions((2, 2), 32)[1:].float()) and not one.pos_embed.requires_grad


def test_under_bf16_the_residual_stream_stays_fp32() -> None:
    student = build_mcmae("test_mcmae", patch=16, grid=(2, 2))
    initialise(student, 0)
    keep, pixels = torch.tensor([[0, 3], [1, 2]]), images((2, 2))
    exact, _ = encode_mcmae(student, pixels, keep, scale=SCALE.float(), shift=SHIFT.float())
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = encode_mcmae(student, pixels, keep, scale=SCALE.float(), shift=SHIFT.float())
    assert rough.dtype == torch.float32 and (rough - exact).norm() < 0.02 * exact.norm()


# ---- what does not fit


@pytest.mark.parametrize(
    ("grid", "patch", "overrides", "told"),
    [
        (4, 4, [], r"patches have 4 px; 16 = 4 \* 2 \* 2 was expected"),
        (4, 14, [], "patches have 14 px"),
        (4, 16, ["student.model=mcmae_bas"], "did you mean mcmae_base"),
        (4, 16, ["student.drop_path=0.1"], "drop_path is 0.1 and its blocks are not plain transformer blocks"),
        (4, 16, ["student.qkv_bias=qv"], "qkv_bias is qv .* all was expected; use --set student.qkv_bias=all"),
        (4, 16, ["student.init_values=0.1"], "init_values is 0.1 .* use --set student.init_values=null"),
        (4, 16, ["terms.mimic.positions=cls"], "wants a CLS token and the student has no CLS"),
        (4, 16, ["terms.mimic.positions=cls+visible"], "wants a CLS token and the student has no CLS"),
        (4, 16, ["terms.mimic.tap=learned"], "reads tap learned, made for a plain ViT"),
        (4, 16, ["terms.mimic.tap=placed2"], "reads tap placed2, made for a plain ViT"),
        (4, 16, ["terms.mimic.tap=block4"], "numbers from 1 to 3"),
    ],
)
def test_what_does_not_fit_the_student_is_refused(
    tiny_recipe: Callable[..., Recipe],
    tiny_info: Callable[..., CacheInfo],
    grid: int,
    patch: int,
    overrides: list[str],
    told: str,
) -> None:
    with pytest.raises(ValueError, match=told):
        build_model(tiny_recipe("mr-mcmae", *overrides), tiny_info(grid, patch))


def test_block_taps_count_in_the_transformer_and_what_they_do_not_read_does_not_train(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]
) -> None:
    info = tiny_info(4, 16)
    model = build_model(tiny_recipe("mr-mcmae", "terms.mimic.tap=block2", "terms.pixels=null"), info)
    batch = tiny_batch(info)
    model(batch, draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=16))[0].backward()
    still = {name for name, p in model.student.named_parameters() if not p.requires_grad}
    assert {name.partition(".")[0] for name in still} == {
        "pos_embed", "norm", "stage1_output_decode", "stage2_output_decode"
    }  # fmt: skip
    assert len(model.student.blocks) == 2 and model.blocks_cut == 1
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
