"""What turns visible tokens into predictions at hidden patches, dropped after training: the tap `decoder`.

Each kind has hidden tokens `mask_token + position` that read the encoder's output in its own way. Only patches that are predicted
have one: hidden patches nobody predicts are absent. CLS, where the student has one, has no position.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mrmae.train.method.recipe import DecoderRecipe
from mrmae.train.method.student import sincos_positions, without_keys
from mrmae.train.method.taps import Outputs, Tokens, placed


class MaskDecoder(nn.Module):
    """`self`: MAE's decoder over [CLS | visible | mask tokens], then LayerNorm of the mask tokens (arXiv 2111.06377).

    Restructured, not stock: the order is [CLS | visible | predicted], and only predicted patches leave it.
    """

    position: Tensor

    def __init__(self, width_in: int, recipe: DecoderRecipe, grid: tuple[int, int], encoder_depth: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(width_in, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, recipe.width))
        self.register_buffer("position", sincos_positions(grid, recipe.width)[1:].float(), persistent=False)
        self.norm = last_norm(recipe)
        self.blocks = nn.Sequential(*self_blocks(recipe))

    def forward(
        self,
        final: Tokens,
        ids_predict: Int64[Tensor, "v m"],
        outputs: Outputs | None = None,
        kept: list[Tensor] | None = None,
    ) -> Tokens:
        """Decoded tokens [v, m, width] at `ids_predict`, from the encoder's `final`; what enters each block goes to `kept`."""
        x = placed(final._replace(x=self.embed(final.x)), self.position).x
        seen, x = x.shape[1], torch.cat([x, self.mask_token + self.position[ids_predict]], dim=1)
        for block in self.blocks:
            if kept is not None:
                kept.append(x)
            x = block(x)
        return Tokens(self.norm(x[:, seen:]), ids_predict)


class CrossDecoder(nn.Module):
    """`cross`: mask tokens that look at the encoder's output, never at each other (SelectiveMAE, arXiv 2406.11933).

    weighted: block j reads `LN_j(sum_i W[j, i] F_i)` instead, F_0 the encoder's input and F_i its raw block outputs (CrossMAE,
    arXiv 2401.14391).
    """

    position: Tensor

    def __init__(self, width_in: int, recipe: DecoderRecipe, grid: tuple[int, int], encoder_depth: int = 0) -> None:
        super().__init__()
        self.weighted = recipe.weighted
        self.mask_token = nn.Parameter(torch.zeros(1, 1, recipe.width))
        self.register_buffer("position", sincos_positions(grid, recipe.width)[1:].float(), persistent=False)
        self.norm = last_norm(recipe)
        self.blocks = nn.ModuleList(CrossBlock(recipe, width_in) for _ in range(recipe.depth))
        if recipe.weighted:
            self.mix = nn.Linear(encoder_depth + 1, recipe.depth, bias=False)
            self.norms = nn.ModuleList(LayerNorm(width_in) for _ in range(recipe.depth))

    def forward(self, final: Tokens, ids_predict: Int64[Tensor, "v m"], outputs: Outputs | None = None) -> Tokens:
        """Decoded tokens [v, m, width] at `ids_predict`; `outputs`: blocks 0 (the encoder's input) to the last, for `weighted`."""
        x, read = self.mask_token + self.position[ids_predict], [final.x] * len(self.blocks)
        if self.weighted:
            assert outputs is not None
            features = torch.stack([outputs[i] for i in range(self.mix.in_features)])
            mixed = torch.einsum("ji,i...->j...", self.mix.weight, features)
            read = [norm(y) for norm, y in zip(self.norms, mixed)]
        for block, y in zip(self.blocks, read):
            x = block(x, y)
        return Tokens(self.norm(x), ids_predict)


class PromptDecoder(nn.Module):
    """`prompt`: MILAN's prompting decoder (arXiv 2208.06049); holds CLS and visible patches, too.

    They are embedded once, P, and stay as they are through all blocks; mask tokens look at [P | themselves], P not normalised.
    """

    position: Tensor

    def __init__(self, width_in: int, recipe: DecoderRecipe, grid: tuple[int, int], encoder_depth: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(width_in, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, recipe.width))
        self.register_buffer("position", sincos_positions(grid, recipe.width)[1:].float(), persistent=False)
        self.norm = last_norm(recipe)
        self.blocks = nn.ModuleList(CrossBlock(recipe, recipe.width) for _ in range(recipe.depth))

    def forward(self, final: Tokens, ids_predict: Int64[Tensor, "v m"], outputs: Outputs | None = None) -> Tokens:
        """[CLS | visible | predicted], from the encoder's `final`."""
        prompt = placed(final._replace(x=self.embed(final.x)), self.position).x
        x = self.mask_token + self.position[ids_predict]
        for block in self.blocks:
            x = block(x, prompt, among=True)
        return with_prefix(final, self.norm(torch.cat([prompt, x], dim=1)), ids_predict)


class Regressor(nn.Module):
    """`regressor`: CAE's latent contextual regressor (arXiv 2202.03026); holds CLS and visible patches, too, as `final` has them.

    Where its width is not the encoder's, all of `final` first passes a Linear and a LayerNorm (CAE v2's smallest student).
    `behind`: blocks of self-attention over the predicted tokens, with positions, and a LayerNorm: CAE's own decoder.
    """

    position: Tensor

    def __init__(self, width_in: int, recipe: DecoderRecipe, grid: tuple[int, int], encoder_depth: int = 0) -> None:
        super().__init__()
        same = width_in == recipe.width
        self.embed = (
            nn.Identity() if same else nn.Sequential(nn.Linear(width_in, recipe.width), LayerNorm(recipe.width))
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, recipe.width))
        self.register_buffer("position", sincos_positions(grid, recipe.width)[1:].float(), persistent=False)
        self.norm = last_norm(recipe)
        self.blocks = nn.ModuleList(RegressorBlock(recipe) for _ in range(recipe.depth))
        self.behind = nn.Sequential(*gated_blocks(recipe))

    def decoded(self, latents: Tokens) -> Tokens:
        """What the blocks behind the regressor make of what it says at predicted patches."""
        t = latents.at("predicted")
        return t._replace(x=self.behind(t.x + self.position[t.ids]))

    def forward(self, final: Tokens, ids_predict: Int64[Tensor, "v m"], outputs: Outputs | None = None) -> Tokens:
        """[CLS | visible | predicted], from the encoder's `final`; the queries start as the mask token, without a position."""
        latent = self.embed(final.x)
        place = self.position[ids_predict]
        where = torch.cat([self.position[final.ids], place], dim=1)
        t = self.mask_token.expand(place.shape)
        for block in self.blocks:
            t = block(t, latent[:, final.prefix :], place, where)
        return with_prefix(final, torch.cat([latent, self.norm(t)], dim=1), ids_predict)


class TapDecoder(nn.Module):
    """`taps`: Hi-End-MAE's decoder (arXiv 2502.08347): `depth` blocks of MAE's, then one for each of `blocks`, in their order.

    These also look at the raw output of an encoder block, [CLS | visible], through a Linear of its own, not normalised.
    """

    position: Tensor

    def __init__(self, width_in: int, recipe: DecoderRecipe, grid: tuple[int, int], encoder_depth: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(width_in, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, recipe.width))
        self.register_buffer("position", sincos_positions(grid, recipe.width)[1:].float(), persistent=False)
        self.norm = last_norm(recipe)
        self.blocks = nn.Sequential(*self_blocks(recipe))
        self.taps = recipe.blocks
        self.embeds = nn.ModuleList(nn.Linear(width_in, recipe.width) for _ in recipe.blocks)
        self.tap_blocks = nn.ModuleList(TapBlock(recipe) for _ in recipe.blocks)

    def forward(self, final: Tokens, ids_predict: Int64[Tensor, "v m"], outputs: Outputs | None = None) -> Tokens:
        """Decoded tokens [v, m, width] at `ids_predict`, from the encoder's `final` and its blocks' raw outputs."""
        assert outputs is not None
        x = placed(final._replace(x=self.embed(final.x)), self.position).x
        z = self.blocks(torch.cat([x, self.mask_token + self.position[ids_predict]], dim=1))
        for tap, embed, block in zip(self.taps, self.embeds, self.tap_blocks):
            z = block(z, embed(outputs[tap]))
        return Tokens(self.norm(z[:, x.shape[1] :]), ids_predict)


class PairDecoder(nn.Module):
    """`pair`: CroCo's decoder (arXiv 2210.10716): `depth` blocks over [CLS | visible | mask tokens] that also look at the partner.

    The partner's `final` passes the same Linear, has positions and stays as it is; each block sees it through a LayerNorm of its own.
    """

    position: Tensor

    def __init__(self, width_in: int, recipe: DecoderRecipe, grid: tuple[int, int], encoder_depth: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(width_in, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, recipe.width))
        self.register_buffer("position", sincos_positions(grid, recipe.width)[1:].float(), persistent=False)
        self.norm = last_norm(recipe)
        self.blocks = nn.ModuleList(TapBlock(recipe) for _ in range(recipe.depth))
        self.norms = nn.ModuleList(LayerNorm(recipe.width) for _ in range(recipe.depth))

    def forward(
        self,
        final: Tokens,
        ids_predict: Int64[Tensor, "v m"],
        outputs: Outputs | None = None,
        partner: Tokens | None = None,
    ) -> Tokens:
        """Decoded tokens [v, m, width] at `ids_predict`, from the encoder's `final` of both views."""
        assert partner is not None
        x, y = (placed(tokens._replace(x=self.embed(tokens.x)), self.position).x for tokens in (final, partner))
        z = torch.cat([x, self.mask_token + self.position[ids_predict]], dim=1)
        for block, norm in zip(self.blocks, self.norms):
            z = block(z, norm(y))
        return Tokens(self.norm(z[:, x.shape[1] :]), ids_predict)


Decoder = MaskDecoder | CrossDecoder | PromptDecoder | Regressor | TapDecoder | PairDecoder
DECODERS: dict[str, type[Decoder]] = {
    "self": MaskDecoder,
    "cross": CrossDecoder,
    "prompt": PromptDecoder,
    "regressor": Regressor,
    "taps": TapDecoder,
    "pair": PairDecoder,
}


def blocks_read(recipe: DecoderRecipe, depth: int) -> set[int]:
    """The encoder's blocks whose raw outputs the decoder reads, of `depth`; 0 is the encoder's input.

    Raises ValueError for one that the student does not have.
    """
    if recipe.kind == "taps":
        if not recipe.blocks or not all(1 <= i <= depth for i in recipe.blocks):
            raise ValueError(
                f"student.decoder.blocks: reads the blocks {list(recipe.blocks)}; numbers from 1 to {depth} were expected, the student "
                f"has {depth}; change student.decoder.blocks"
            )
        return set(recipe.blocks)
    return set(range(depth + 1)) if recipe.kind == "cross" and recipe.weighted else set()


def reads_final(recipe: DecoderRecipe) -> bool:
    """Whether the decoder reads the encoder's `final`."""
    return not (recipe.kind == "cross" and recipe.weighted)


# ---- blocks


class CrossAttention(nn.Module):
    """Multi-head attention of queries on other tokens, of any width."""

    def __init__(self, width: int, width_kv: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width_kv, 2 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "v m d"], y: Float[Tensor, "v n e"]) -> Float[Tensor, "v m d"]:
        """What the queries `x` find in `y`."""
        k, v = self.kv(y).chunk(2, dim=-1)
        out: Tensor = self.proj(attend(self.q(x), k, v, self.heads))
        return out


class CrossBlock(nn.Module):
    """`x += CA(LN x, y); x += MLP(LN x)`."""

    def __init__(self, recipe: DecoderRecipe, width_kv: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(recipe.width), LayerNorm(recipe.width)
        self.attn, self.mlp = CrossAttention(recipe.width, width_kv, recipe.heads), mlp_of(recipe)

    def forward(
        self, x: Float[Tensor, "v m d"], y: Float[Tensor, "v n e"], *, among: bool = False
    ) -> Float[Tensor, "v m d"]:
        """among: the queries look at [y | LN x], each other, too."""
        query = self.norm1(x)
        x = x + self.attn(query, torch.cat([y, query], dim=1) if among else y)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TapBlock(nn.Module):
    """`z += SA(LN z); z += CA(LN z, y); z += MLP(LN z)`."""

    def __init__(self, recipe: DecoderRecipe) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(recipe.width) for _ in range(3))
        self.attn = Attention(recipe.width, recipe.heads, qkv_bias=True)
        self.cross, self.mlp = CrossAttention(recipe.width, recipe.width, recipe.heads), mlp_of(recipe)

    def forward(self, z: Float[Tensor, "v n d"], y: Float[Tensor, "v k d"]) -> Float[Tensor, "v n d"]:
        """y: [CLS | visible] of an encoder block, or another view."""
        z = z + self.attn(self.norm1(z))
        z = z + self.cross(self.norm2(z), y)
        out: Tensor = z + self.mlp(self.norm3(z))
        return out


class RegressorBlock(nn.Module):
    """CAE's block: `t += g1 CA(LN_q(t + pos), LN_k([v | t] + pos), LN_v([v | t])); t = LN_c(t); t += g2 MLP(t)`.

    LN_c's output is the residual stream. A bias of k would cancel in the softmax: it has none.
    """

    def __init__(self, recipe: DecoderRecipe) -> None:
        super().__init__()
        width, self.heads = recipe.width, recipe.heads
        self.norm_q, self.norm_k, self.norm_v, self.norm_c = (LayerNorm(width) for _ in range(4))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.mlp = mlp_of(recipe)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((width,), recipe.init_values)) for _ in range(2))

    def forward(
        self,
        t: Float[Tensor, "v m d"],
        latent: Float[Tensor, "v n d"],
        place: Float[Tensor, "v m d"],
        where: Float[Tensor, "v n+m d"],
    ) -> Float[Tensor, "v m d"]:
        """latent: visible patches; place, where: positions of the queries, and of visible patches and queries."""
        tokens = torch.cat([latent, t], dim=1)
        q, k, v = self.q(self.norm_q(t + place)), self.k(self.norm_k(tokens + where)), self.v(self.norm_v(tokens))
        t = self.norm_c(t + self.gamma1 * self.proj(attend(q, k, v, self.heads)))
        out: Tensor = t + self.gamma2 * self.mlp(t)
        return out


def attend(
    q: Float[Tensor, "v m d"], k: Float[Tensor, "v n d"], v: Float[Tensor, "v n d"], heads: int
) -> Float[Tensor, "v m d"]:
    """Softmax attention in `heads` heads, each scaled by the root of its width."""
    q, k, v = (x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mlp_of(recipe: DecoderRecipe) -> nn.Module:
    """Linear, GELU, Linear."""
    return Mlp(recipe.width, int(recipe.width * recipe.mlp_ratio))


def self_blocks(recipe: DecoderRecipe) -> list[Block]:
    """`depth` blocks of MAE's decoder."""
    with torch.random.fork_rng(devices=[]):
        return [
            Block(recipe.width, recipe.heads, mlp_ratio=recipe.mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(recipe.depth)
        ]


def gated_blocks(recipe: DecoderRecipe) -> list[nn.Module]:
    """`behind` blocks of MAE's decoder with a layer scale, then a LayerNorm; the keys' bias, which the softmax does not see, stays at zero."""
    told: dict[str, Any] = {
        "mlp_ratio": recipe.mlp_ratio,
        "qkv_bias": True,
        "init_values": recipe.init_values,
        "norm_layer": LayerNorm,
    }
    with torch.random.fork_rng(devices=[]):
        blocks = [Block(recipe.width, recipe.heads, **told) for _ in range(recipe.behind)]
    for block in blocks:
        block.get_parameter("attn.qkv.bias").register_hook(without_keys)  # type: ignore[no-untyped-call]
    return [*blocks, LayerNorm(recipe.width)] if blocks else []


# ---- tokens


def last_norm(recipe: DecoderRecipe) -> nn.Module:
    """What ends a decoder."""
    return LayerNorm(recipe.width) if recipe.norm else nn.Identity()


def with_prefix(final: Tokens, x: Float[Tensor, "v n d"], ids_predict: Int64[Tensor, "v m"]) -> Tokens:
    """[CLS | visible | predicted] with where they stand."""
    return Tokens(x, torch.cat([final.ids, ids_predict], dim=1), final.prefix, final.visible)
