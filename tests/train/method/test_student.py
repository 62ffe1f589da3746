"""The student: positions, initial weights, the restructured forward against timm's own, and which names are refused."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mrmae.train.method.decoders import MaskDecoder
from mrmae.train.method.recipe import DecoderRecipe
from mrmae.train.method.student import (
    POSITION_TABLES,
    build_vit,
    encode_vit,
    hold_key_bias,
    initialise,
    sincos_positions,
    what_is_not_plain,
)
from mrmae.train.method.taps import LearnedSum, MeanOfNorms


def tiny_vit(grid: int = 4, patch: int = 4, channels: int = 3) -> VisionTransformer:
    vit = build_vit("test_vit", size=grid * patch, patch=patch, grid=(grid, grid), channels=channels)
    initialise(vit, 0)
    return vit


def test_positions_are_the_sin_cos_of_column_then_row() -> None:
    rows, columns, width = 3, 5, 16
    position = sincos_positions((rows, columns), width)
    assert position.shape == (1 + rows * columns, width)
    assert (position[0] == 0).all()
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                expected = [math.sin(column * frequency), math.cos(column * frequency)]
                expected += [math.sin(row * frequency), math.cos(row * frequency)]
                found = [position[1 + row * columns + column, i + part * quarter].item() for part in range(4)]
                assert found == pytest.approx(expected, abs=1e-12)


def test_the_first_half_of_the_position_is_constant_along_a_grid_column() -> None:
    position = sincos_positions((4, 6), 32)[1:].reshape(4, 6, 32)
    assert torch.equal(position[..., :16], position[:1, :, :16].expand(4, 6, 16))
    assert torch.equal(position[..., 16:], position[:, :1, 16:].expand(4, 6, 16))
    assert not torch.equal(position[..., 16:], position[:1, :, 16:].expand(4, 6, 16))


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (4, 4)])
def test_caes_positions_put_the_row_first_and_umts_run_through_the_patches(rows: int, columns: int) -> None:
    width, n = 16, rows * columns
    cae, umt = (POSITION_TABLES[kind]((rows, columns), width) for kind in ("sincos_cae", "sinusoid"))  # type: ignore[index]
    assert cae.shape == umt.shape == (1 + n, width) and (cae[0] == 0).all() and (umt[0] == 0).all()
    for at in range(n):
        row, column = divmod(at, columns)
        halves = [
            wave(place / 10000 ** (i / 4)) for place in (row, column) for wave in (math.sin, math.cos) for i in range(4)
        ]
        assert cae[1 + at].tolist() == pytest.approx(halves, abs=1e-12)
        waves = [(math.cos if i % 2 else math.sin)(at / 10000 ** (2 * (i // 2) / width)) for i in range(width)]
        assert umt[1 + at].tolist() == pytest.approx(waves, abs=1e-12)


def test_the_student_holds_frozen_sin_cos_positions() -> None:
    vit = tiny_vit(5)
    assert vit.pos_embed is not None and not vit.pos_embed.requires_grad
    assert torch.equal(vit.pos_embed[0], sincos_positions((5, 5), 64).float())
    assert "pos_embed" in vit.state_dict()


def test_initial_weights_are_maes() -> None:
    vit = tiny_vit()
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.flatten(1)  # a patch embedding counts as its [d, c*p*p] view, qkv as one matrix
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.97 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            assert module.bias is not None and (module.bias == 0).all()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.eps == 1e-6
    wide = MaskDecoder(64, DecoderRecipe(depth=1, width=512, heads=2), (4, 4))
    initialise(wide, 0)
    assert wide.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert vit.cls_token is not None and vit.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_initial_weights_depend_on_the_seed_and_not_on_torchs_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = tiny_vit().state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # nor do they change it
    torch.manual_seed(2)
    two, other = tiny_vit().state_dict(), build_vit("test_vit", size=16, patch=4, grid=(4, 4))
    initialise(other, 1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["patch_embed.proj.weight"], other.state_dict()["patch_embed.proj.weight"])


@pytest.mark.parametrize(("grid", "patch", "channels"), [(4, 4, 3), (3, 7, 3), (5, 3, 1), (4, 2, 6)])
def test_with_every_patch_visible_the_forward_is_timms(grid: int, patch: int, channels: int) -> None:
    vit, l = tiny_vit(grid, patch, channels).double(), grid * grid
    pixels = torch.randint(0, 256, (2, grid * patch, grid * patch, channels), dtype=torch.uint8)
    scale, shift = torch.rand(channels).double() / 128 + 1e-3, torch.randn(channels).double()
    ours, _, *_ = encode_vit(vit, pixels, torch.arange(l).expand(2, l), scale=scale, shift=shift)
    theirs = vit.forward_features((pixels.double() * scale + shift).permute(0, 3, 1, 2))
    assert (ours - theirs).abs().max() < 1e-10


def test_layer_scale_starts_where_it_is_told_and_is_timms() -> None:
    vit = build_vit("test_vit", size=16, patch=4, grid=(4, 4), init_values=0.3)
    initialise(vit, 0)
    gammas = {name: p for name, p in vit.named_parameters() if name.endswith("gamma")}
    assert len(gammas) == 12 and all((g == 0.3).all() for g in gammas.values())
    whole = torch.arange(16).expand(2, -1)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    ours, _, *_ = encode_vit(
        vit.double(), pixels, whole, scale=torch.ones(3).double() / 99, shift=torch.zeros(3).double()
    )
    theirs = vit.forward_features((pixels.double() / 99).permute(0, 3, 1, 2))
    assert (ours - theirs).abs().max() < 1e-10


def test_a_student_without_cls_is_timms() -> None:
    vit = build_vit("test_vit", size=16, patch=4, grid=(4, 4), cls=False)
    initialise(vit, 0)
    assert vit.cls_token is None and vit.pos_embed is not None
    assert torch.equal(vit.pos_embed[0], sincos_positions((4, 4), 64)[1:].float())
    whole = torch.arange(16).expand(2, -1)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    ours, _, *_ = encode_vit(
        vit.double(), pixels, whole, scale=torch.ones(3).double() / 99, shift=torch.zeros(3).double()
    )
    theirs = vit.forward_features((pixels.double() / 99).permute(0, 3, 1, 2))
    assert ours.shape == (2, 16, 64) and (ours - theirs).abs().max() < 1e-10


def test_without_a_bias_of_keys_they_stay_at_zero_and_nothing_else_changes() -> None:
    free, held = tiny_vit(), tiny_vit()
    hold_key_bias(held)
    keep, pixels = torch.tensor([[1, 2, 7]]), torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    for vit in (free, held):
        final, _, *_ = encode_vit(vit, pixels, keep, scale=torch.ones(3) / 99, shift=torch.zeros(3))
        final.square().sum().backward()
    for (name, one), (_, other) in zip(free.named_parameters(), held.named_parameters()):
        if name.endswith("qkv.bias"):
            (q, k, v), (q_held, k_held, v_held) = one.grad.chunk(3), other.grad.chunk(3)  # type: ignore[union-attr]
            assert (k_held == 0).all() and k.abs().max() < 1e-4 * q.abs().max()  # the softmax cancels it: rounding only
            assert torch.equal(q, q_held) and torch.equal(v, v_held)
        else:
            assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_hidden_pixels_do_not_reach_visible_tokens_and_visible_ones_do() -> None:
    vit, scale, shift = tiny_vit(), torch.full((3,), 0.01), torch.zeros(3)
    pixels = torch.randint(0, 200, (1, 16, 16, 3), dtype=torch.uint8)
    keep = torch.tensor([[0, 5, 6, 15]])
    before, _, *_ = encode_vit(vit, pixels, keep, scale=scale, shift=shift)
    hidden, seen = pixels.clone(), pixels.clone()
    hidden[:, :4, 4:8] += 50  # patch 1
    seen[:, 4:8, 4:8] += 50  # patch 5
    assert torch.equal(encode_vit(vit, hidden, keep, scale=scale, shift=shift)[0], before)
    assert not torch.allclose(encode_vit(vit, seen, keep, scale=scale, shift=shift)[0], before)


def test_kept_blocks_are_the_raw_outputs_of_timms_blocks() -> None:
    vit = tiny_vit()
    caught: dict[int, torch.Tensor] = {}
    for i in (2, 6):
        vit.blocks[i - 1].register_forward_hook(lambda _, __, out, i=i: caught.__setitem__(i, out))
    pixels = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    final, blocks, *_ = encode_vit(
        vit, pixels, torch.tensor([[1, 2]]), scale=torch.ones(3), shift=torch.zeros(3), keep_blocks=(2, 6)
    )
    assert blocks.keys() == {2, 6} and all(torch.equal(blocks[i], caught[i]) for i in blocks)
    assert torch.equal(final, vit.norm(blocks[6]))


def test_the_learned_sum_at_a_one_hot_weight_is_the_last_layer() -> None:
    fusion, norm = LearnedSum(range(1, 4)), nn.LayerNorm(8)
    assert fusion.weight.tolist() == pytest.approx([0.01, 0.01, 1.01])
    outputs = {i: torch.randn(1, 2, 8) for i in (1, 2, 3)}
    with torch.no_grad():
        fusion.weight.copy_(torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(fusion(outputs, norm), norm(outputs[3]))


def test_mean_ln_averages_each_block_through_a_norm_of_its_own() -> None:
    fusion, outputs = MeanOfNorms(8, (3, 1)), {1: torch.randn(1, 2, 8), 3: torch.randn(1, 2, 8)}
    with torch.no_grad():
        fusion.norms["1"].weight.fill_(2.0)
    first, third = (nn.functional.layer_norm(outputs[i], (8,), eps=1e-6) for i in (1, 3))
    assert torch.allclose(fusion(outputs, nn.Identity()), (2 * first + third) / 2, atol=1e-6)


def test_unknown_students_get_the_nearest_names() -> None:
    with pytest.raises(ValueError, match="did you mean.*vit_tiny_patch16_224"):
        build_vit("vit_tiny_patch16_242", size=16, patch=4, grid=(4, 4))


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",  # no ViT
        "test_vit2",  # no CLS
        "vit_wee_patch16_reg1_gap_256",  # registers, no CLS
        "deit3_small_patch16_224",  # CLS without a position
        "vit_small_patch16_dinov3",  # rotary positions
        "deit_tiny_distilled_patch16_224",  # two prefix tokens
    ],
)
def test_students_that_are_more_than_a_plain_vit_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a plain timm VisionTransformer with a CLS token .* was expected"):
        build_vit(name, size=32, patch=16, grid=(2, 2))


def test_a_norm_before_the_blocks_is_not_plain() -> None:
    vit = tiny_vit()
    assert what_is_not_plain(vit) == ""
    vit.norm_pre = nn.LayerNorm(64)
    assert "norm before its blocks" in what_is_not_plain(vit)
