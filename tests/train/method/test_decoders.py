"""Decoders: each against its formulas in float64, and what leaves them stands where they say it does."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mrmae.train.method.decoders import DECODERS, Decoder, MaskDecoder, Regressor, blocks_read
from mrmae.train.method.model import build_model
from mrmae.train.method.recipe import DecoderRecipe, Recipe
from mrmae.train.method.student import initialise, sincos_positions
from mrmae.train.method.taps import Tokens
from mrmae.train.method.targets import CacheInfo

HEADS, WIDTH, WIDE, DEPTH = 2, 8, 12, 3  # heads, decoder's width, encoder's, encoder's depth
KEEP, PREDICT = torch.tensor([[0, 4, 7], [1, 2, 8]]), torch.tensor([[1, 3, 6, 8], [0, 3, 4, 6]])
Weights = Mapping[str, Tensor]


def test_the_decoder_does_not_care_about_the_order_of_its_tokens() -> None:
    decoder = MaskDecoder(8, DecoderRecipe(depth=2, width=16, heads=2), (3, 3)).double()
    initialise(decoder, 0)
    final, keep, predict = torch.randn(1, 4, 8).double(), torch.tensor([[0, 4, 7]]), torch.tensor([[1, 2, 3, 5, 6, 8]])
    out = decoder(Tokens(final, keep, 1), predict).x
    mixed = decoder(Tokens(final[:, [0, 3, 1, 2]], keep[:, [2, 0, 1]], 1), predict.flip(1)).x
    assert out.shape == (1, 6, 16)
    assert (mixed.flip(1) - out).abs().max() < 1e-12
    assert (decoder(Tokens(final, keep.flip(1), 1), predict).x - out).abs().max() > 1e-3  # a wrong position does matter


# ---- the formulas, one image and one token at a time


def norm(x: Tensor, w: Weights, at: str) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]


def line(x: Tensor, w: Weights, at: str) -> Tensor:
    return w[f"{at}.weight"] @ x + w.get(f"{at}.bias", torch.zeros(()).double())


def look(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query's attention, head by head."""
    out, d = [], len(q) // HEADS
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        logits = torch.stack([q[part] @ k[part] / math.sqrt(d) for k in keys])
        share = logits.exp() / logits.exp().sum()
        out.append(sum((s * v[part] for s, v in zip(share, values)), torch.zeros(d).double()))
    return torch.cat(out)


def mlp(x: Tensor, w: Weights, at: str) -> Tensor:
    hidden = line(x, w, f"{at}.fc1")
    return line(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), w, f"{at}.fc2")


def cross(x: Tensor, y: list[Tensor], w: Weights, at: str) -> Tensor:
    pairs = [line(t, w, f"{at}.kv") for t in y]
    found = look(line(x, w, f"{at}.q"), [p[:WIDTH] for p in pairs], [p[WIDTH:] for p in pairs])
    return line(found, w, f"{at}.proj")


def self_attention(tokens: list[Tensor], w: Weights, at: str) -> list[Tensor]:
    triples = [line(t, w, f"{at}.qkv").split(WIDTH) for t in tokens]
    found = [look(q, [k for _, k, _ in triples], [v for *_, v in triples]) for q, _, _ in triples]
    return [line(f, w, f"{at}.proj") for f in found]


def mae_block(tokens: list[Tensor], w: Weights, at: str) -> list[Tensor]:
    moved = self_attention([norm(t, w, f"{at}.norm1") for t in tokens], w, f"{at}.attn")
    tokens = [t + m for t, m in zip(tokens, moved)]
    return [t + mlp(norm(t, w, f"{at}.norm2"), w, f"{at}.mlp") for t in tokens]


def cross_block(x: Tensor, y: list[Tensor], w: Weights, at: str) -> Tensor:
    x = x + cross(norm(x, w, f"{at}.norm1"), y, w, f"{at}.attn")
    return x + mlp(norm(x, w, f"{at}.norm2"), w, f"{at}.mlp")


def queries(w: Weights, place: Tensor, predict: Tensor) -> list[Tensor]:
    return [w["mask_token"][0, 0] + place[1 + i] for i in predict]


def embedded(final: Tensor, w: Weights, place: Tensor, keep: Tensor) -> list[Tensor]:
    """[CLS | visible] in the decoder's width; row 0 of the positions, CLS's, is zero."""
    return [line(x, w, "embed") + place[j] for x, j in zip(final, [0, *(keep + 1)])]


def plain_self(w: Weights, final: Tensor, _: list[Tensor], place: Tensor, keep: Tensor, predict: Tensor) -> Tensor:
    z = embedded(final, w, place, keep) + queries(w, place, predict)
    for j in range(2):
        z = mae_block(z, w, f"blocks.{j}")
    return torch.stack([norm(t, w, "norm") for t in z[len(final) :]])


def plain_cross(w: Weights, final: Tensor, _: list[Tensor], place: Tensor, keep: Tensor, predict: Tensor) -> Tensor:
    x = queries(w, place, predict)
    for j in range(2):
        x = [cross_block(t, list(final), w, f"blocks.{j}") for t in x]
    return torch.stack([norm(t, w, "norm") for t in x])


def plain_weighted(
    w: Weights, final: Tensor, features: list[Tensor], place: Tensor, keep: Tensor, predict: Tensor
) -> Tensor:
    x = queries(w, place, predict)
    for j in range(2):
        mixed = sum((w["mix.weight"][j, i] * f for i, f in enumerate(features)), torch.zeros_like(final))
        y = [norm(t, w, f"norms.{j}") for t in mixed]
        x = [cross_block(t, y, w, f"blocks.{j}") for t in x]
    return torch.stack([norm(t, w, "norm") for t in x])


def plain_prompt(w: Weights, final: Tensor, _: list[Tensor], place: Tensor, keep: Tensor, predict: Tensor) -> Tensor:
    prompt, x = embedded(final, w, place, keep), queries(w, place, predict)
    for j in range(2):
        normed = [norm(t, w, f"blocks.{j}.norm1") for t in x]
        x = [t + cross(n, prompt + normed, w, f"blocks.{j}.attn") for t, n in zip(x, normed)]
        x = [t + mlp(norm(t, w, f"blocks.{j}.norm2"), w, f"blocks.{j}.mlp") for t in x]
    return torch.stack([norm(t, w, "norm") for t in prompt + x])


def plain_regressor(w: Weights, final: Tensor, _: list[Tensor], place: Tensor, keep: Tensor, predict: Tensor) -> Tensor:
    latent = list(final)
    if "embed.0.weight" in w:
        latent = [norm(line(t, w, "embed.0"), w, "embed.1") for t in final]
    t = [w["mask_token"][0, 0]] * len(predict)
    places = [place[1 + i] for i in [*keep, *predict]]
    for j in range(2):
        at = f"blocks.{j}"
        both = latent[1:] + t
        keys = [line(norm(x + p, w, f"{at}.norm_k"), w, f"{at}.k") for x, p in zip(both, places)]
        values = [line(norm(x, w, f"{at}.norm_v"), w, f"{at}.v") for x in both]
        asked = [line(norm(x + p, w, f"{at}.norm_q"), w, f"{at}.q") for x, p in zip(t, places[len(keep) :])]
        moved = [w[f"{at}.gamma1"] * line(look(q, keys, values), w, f"{at}.proj") for q in asked]
        t = [norm(x + m, w, f"{at}.norm_c") for x, m in zip(t, moved)]
        t = [x + w[f"{at}.gamma2"] * mlp(x, w, f"{at}.mlp") for x in t]
    if "norm.weight" in w:
        t = [norm(x, w, "norm") for x in t]
    return torch.stack(latent + t)


def plain_taps(
    w: Weights, final: Tensor, features: list[Tensor], place: Tensor, keep: Tensor, predict: Tensor
) -> Tensor:
    z = embedded(final, w, place, keep) + queries(w, place, predict)
    for j in range(2):
        z = mae_block(z, w, f"blocks.{j}")
    for j, tap in enumerate((3, 1)):
        y, at = [line(x, w, f"embeds.{j}") for x in features[tap]], f"tap_blocks.{j}"
        moved = self_attention([norm(t, w, f"{at}.norm1") for t in z], w, f"{at}.attn")
        z = [t + m for t, m in zip(z, moved)]
        z = [t + cross(norm(t, w, f"{at}.norm2"), y, w, f"{at}.cross") for t in z]
        z = [t + mlp(norm(t, w, f"{at}.norm3"), w, f"{at}.mlp") for t in z]
    return torch.stack([norm(t, w, "norm") for t in z[len(final) :]])


SMALL = DecoderRecipe(depth=2, width=WIDTH, heads=HEADS, mlp_ratio=2.0)
CASES: dict[str, tuple[DecoderRecipe, Callable[..., Tensor], int]] = {
    "self": (SMALL, plain_self, WIDE),
    "cross": (replace(SMALL, kind="cross"), plain_cross, WIDE),
    "weighted": (replace(SMALL, kind="cross", weighted=True), plain_weighted, WIDE),
    "prompt": (replace(SMALL, kind="prompt"), plain_prompt, WIDE),
    "regressor": (replace(SMALL, kind="regressor", norm=False), plain_regressor, WIDTH),
    "regressor of another width": (replace(SMALL, kind="regressor"), plain_regressor, WIDE),
    "taps": (replace(SMALL, kind="taps", blocks=(3, 1)), plain_taps, WIDE),
}


def random_decoder(recipe: DecoderRecipe, width_in: int) -> Decoder:
    """Every parameter has left its start."""
    decoder = DECODERS[recipe.kind](width_in, recipe, (3, 3), DEPTH).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.4 + 0.1)
    decoder.position = sincos_positions((3, 3), WIDTH)[1:]
    return decoder


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_is_its_formulas_in_loss_and_gradients(case: str) -> None:
    recipe, plain, width_in = CASES[case]
    decoder = random_decoder(recipe, width_in)
    features = [torch.randn(2, 4, width_in).double().requires_grad_() for _ in range(DEPTH + 1)]
    final = torch.randn(2, 4, width_in).double().requires_grad_()
    read = {i: features[i] for i in blocks_read(recipe, DEPTH)}
    out = decoder(Tokens(final, KEEP, 1, 3), PREDICT, read)
    target = torch.randn(out.x.shape).double()
    loss = (out.x - target).square().mean()

    place, w = sincos_positions((3, 3), WIDTH), dict(decoder.named_parameters())
    each = [plain(w, final[i], [f[i] for f in features], place, KEEP[i], PREDICT[i]) for i in range(2)]
    expected = (torch.stack(each) - target).square().mean()
    assert abs(loss - expected) < 1e-10 * expected

    inputs = [*w.values(), final, *features]
    found, wanted = (torch.autograd.grad(x, inputs, allow_unused=True) for x in (loss, expected))
    for ours, theirs in zip(found, wanted):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or (ours - theirs).abs().max() < 1e-10
    assert all(gradient is not None for gradient in found[: len(w)])


@pytest.mark.parametrize("case", CASES)
def test_tokens_say_where_they_stand(case: str) -> None:
    recipe, _, width_in = CASES[case]
    features = {i: torch.randn(2, 4, width_in).double() for i in range(DEPTH + 1)}
    final = Tokens(torch.randn(2, 4, width_in).double(), KEEP, 1, 3)
    out = random_decoder(recipe, width_in)(final, PREDICT, features)
    assert torch.equal(out.at("predicted").ids, PREDICT) and out.at("predicted").x.shape == (2, 4, WIDTH)
    held = recipe.kind in ("prompt", "regressor")
    assert out.prefix == held and out.at("visible").x.shape[1] == (3 if held else 0)
    assert torch.equal(out.at("visible").ids, KEEP[:, : 3 if held else 0])


def test_closed_gates_make_a_regressor_the_norm_of_its_queries() -> None:
    recipe = replace(SMALL, kind="regressor", depth=1, norm=False)
    decoder = random_decoder(recipe, WIDTH)
    assert isinstance(decoder, Regressor)
    block = decoder.blocks[0]
    with torch.no_grad():
        block.gamma1.zero_()
        block.gamma2.zero_()
    out = decoder(Tokens(torch.randn(2, 4, WIDTH).double(), KEEP, 1, 3), PREDICT)
    assert (out.at("predicted").x - block.norm_c(decoder.mask_token)).abs().max() < 1e-12


def test_the_weights_of_block_outputs_start_within_xaviers_bound() -> None:
    recipe = replace(SMALL, kind="cross", depth=12, weighted=True)
    decoder = DECODERS["cross"](WIDE, recipe, (3, 3), 12)
    initialise(decoder, 0)
    weight = decoder.get_parameter("mix.weight")
    bound = math.sqrt(6 / 25)
    assert weight.shape == (12, 13) and 0.95 * bound < weight.abs().max() <= bound


# ---- what does not fit


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["student.decoder.blocks=[7, 2]"], r"reads the blocks \[7, 2\]; numbers from 1 to 6 were expected"),
        (["student.decoder.blocks=[]"], r"reads the blocks \[\]; numbers from 1 to 6"),
        (["student.decoder.blocks=[2, 2]"], "no block twice"),
        (["student.decoder.weighted=true"], "false was expected with decoder taps"),
        (["student.decoder.kind=tap"], "did you mean taps"),
        (["terms.pixels.positions=visible"], "tap decoder holds predicted, alive"),
        (
            ["student.decoder.kind=prompt", "terms.mimic.tap=final+decoder", "terms.mimic.positions=visible+predicted"],
            "one head reads taps final[+]decoder, which are 64 and 16 channels wide",
        ),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], overrides: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        build_model(tiny_recipe("mr-mae", "student.decoder.kind=taps", *overrides), tiny_info())
