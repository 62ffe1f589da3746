"""The student: a plain timm VisionTransformer on visible patches.

Restructured, not stock: patches are gathered before anything is computed. Attention is permutation-equivariant, so nothing is
un-shuffled. The modules are timm's own, so the state dict is timm's.
"""

import hashlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, Shaped
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrmae.common.suggest import nearest
from mrmae.kernels import dispatch, reference
from mrmae.train.method.drop_path import scaled_block
from mrmae.train.method.mixing import mixed, unmixed
from mrmae.train.method.recipe import PositionKind, PruneRecipe

LN_EPS = 1e-6  # also timm's LayerNorm, which the blocks use
MAE_EMBEDDING, MCMAE_EMBEDDING = "patch_embed.proj", "patch_embed3.proj"


def sincos_positions(grid: tuple[int, int], width: int) -> Float64[Tensor, "l+1 width"]:
    """Fixed 2-D sin-cos positions, temperature 10000; row 0 belongs to CLS and is zero.

    The first half of the channels encodes the column, the second the row, each as [sin.., cos..].
    Raises ValueError unless width is a multiple of 4. MAE (arXiv 2111.06377), the numerics of its released code.
    """
    if width % 4:
        raise ValueError(f"positions: width {width}; a multiple of 4 was expected; choose another width")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (column, row)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches])


def sincos_row_first(grid: tuple[int, int], width: int) -> Float64[Tensor, "l+1 width"]:
    """As `sincos_positions`, but the first half of the channels encodes the row (CAE, arXiv 2202.03026)."""
    half = width // 2
    table = sincos_positions(grid, width)
    return torch.cat([table[:, half:], table[:, :half]], dim=1)


def sinusoid_positions(grid: tuple[int, int], width: int) -> Float64[Tensor, "l+1 width"]:
    """Fixed 1-D positions in raster order, sin on even and cos on odd channels; row 0 belongs to CLS and is zero (UMT, arXiv 2303.16058)."""
    frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(grid[0] * grid[1], dtype=torch.float64)[:, None] * frequency
    patches = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches])


POSITION_TABLES: dict[PositionKind, Callable[[tuple[int, int], int], Float64[Tensor, "l+1 width"]]] = {
    "sincos": sincos_positions,
    "sincos_cae": sincos_row_first,
    "sinusoid": sinusoid_positions,
}


def vit_arguments(
    *,
    size: int,
    patch: int,
    channels: int = 3,
    cls: bool = True,
    init_values: float | None = None,
    depth: int | None = None,
) -> dict[str, Any]:
    """What `timm.create_model` is told beside the name to build a student, here and wherever an exported one is loaded."""
    told: dict[str, Any] = {"img_size": size, "patch_size": patch, "in_chans": channels, "fc_norm": False}
    told |= {"global_pool": "token"} if cls else {"global_pool": "avg", "class_token": False}
    chosen = {"init_values": init_values, "depth": depth}
    return told | {name: value for name, value in chosen.items() if value is not None}


def build_vit(
    name: str, *, size: int, patch: int, grid: tuple[int, int], channels: int = 3, cls: bool = True, **more: Any
) -> VisionTransformer:
    """timm's VisionTransformer `name` at another image and patch size, without classifier, with fixed sin-cos positions.

    more: init_values and depth, as `vit_arguments` takes them.
    Raises ValueError for unknown names (with the nearest ones) and for models that are more than a plain ViT with a CLS token and
    absolute positions: their extra parts would be skipped silently.
    """
    if not timm.is_model(name):
        near = nearest(name, timm.list_models("vit_*"))
        raise ValueError(
            f"student {name!r}: timm has no such model; a plain ViT like vit_base_patch16_224 was expected; "
            f"did you mean {' or '.join(near) or 'vit_base_patch16_224'}?"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            told = vit_arguments(size=size, patch=patch, channels=channels, cls=cls, **more)
            vit = timm.create_model(name, pretrained=False, num_classes=0, **told)
        surplus = what_is_not_plain(vit, cls=cls)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        surplus = f"it cannot be built with a CLS token at {size} px and patch {patch} ({error})"
    if surplus:
        raise ValueError(
            f"student {name!r}: {surplus}; a plain timm VisionTransformer with a CLS token and absolute positions was expected; "
            "use vit_tiny, vit_small, vit_base, vit_large or vit_huge"
        )
    assert isinstance(vit, VisionTransformer)
    positions = sincos_positions(grid, vit.embed_dim)[1 - vit.num_prefix_tokens :]
    vit.pos_embed = nn.Parameter(positions.to(torch.float32)[None], requires_grad=False)
    return vit


def what_is_not_plain(vit: nn.Module, *, cls: bool = True) -> str:
    """What `encode` would skip in this model; empty for a plain ViT."""
    if type(vit) is not VisionTransformer:
        return f"it is a {type(vit).__name__}"
    if (vit.cls_token is not None) != cls or vit.num_prefix_tokens != cls:
        return f"it has {vit.num_prefix_tokens} prefix tokens instead of one CLS token"
    if vit.pos_embed is None or vit.no_embed_class:
        return "it has no absolute position per token"
    if type(vit.patch_embed) is not PatchEmbed or not isinstance(vit.patch_embed.norm, nn.Identity):
        return f"its patch embedding is {type(vit.patch_embed).__name__} or has a norm"
    if not isinstance(vit.norm_pre, nn.Identity) or not isinstance(vit.norm, nn.LayerNorm) or vit.attn_pool is not None:
        return "it has a norm before its blocks, no final LayerNorm, or attention pooling"
    return ""


def hold_key_bias(vit: VisionTransformer) -> None:
    """Keep the keys' bias of every block at its start, zero: only q and v have one then, in timm's own parameters.

    The softmax does not see it, so nothing else changes.
    """
    for number in range(len(vit.blocks)):
        vit.get_parameter(f"blocks.{number}.attn.qkv.bias").register_hook(without_keys)  # type: ignore[no-untyped-call]


def without_keys(gradient: Float[Tensor, " 3d"]) -> Float[Tensor, " 3d"]:
    """The gradient of a qkv bias, zero for the keys'."""
    q, k, v = gradient.chunk(3)
    return torch.cat([q, torch.zeros_like(k), v])


def initialise(model: nn.Module, seed: int) -> None:
    """MAE's initial weights, each parameter a function of (seed, its name) only: shared parts of two recipes start equal.

    Linear: xavier uniform, bias 0 (qkv as one matrix); patch embedding: xavier on its [d, c*p*p] view; LayerNorm 1 and 0;
    CLS, mask and source tokens N(0, 0.02), what is named `unit_...` N(0, 1). What has its own start (LayerScale, fusion weights) keeps it. MCMAE: xavier on the last
    embedding convolution's weight; its bias and the other convolutions keep PyTorch's law, U(-1, 1) / sqrt(fan-in).
    """
    for at, module in model.named_modules():
        if isinstance(module, nn.Linear) or at.endswith(MAE_EMBEDDING):
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator_of(seed, f"{at}.weight"))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            for name, parameter in module.named_parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator_of(seed, f"{at}.{name}"))
            if at.endswith(MCMAE_EMBEDDING):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator_of(seed, f"{at}.weight"))
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "mask_token", "source_tokens"):
            nn.init.normal_(parameter, std=0.02, generator=generator_of(seed, name))
        elif name.rpartition(".")[2].startswith("unit_"):
            nn.init.normal_(parameter, generator=generator_of(seed, name))


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on (seed, name) only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matrix product with `x` runs in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Encoded(NamedTuple):
    """What an encoder says of the tokens it was given, [CLS | patches]; blocks are counted from 1.

    final: the last block, then the final norm. blocks: raw outputs; 0 is the first one's input. qkv: [q | k | v] in a block.
    alive: the patches that a block still holds, where some have left on the way; empty where none does.
    """

    final: Float[Tensor, "v n d"]
    blocks: dict[int, Float[Tensor, "v n d"]]
    qkv: dict[int, Float[Tensor, "v n 3*d"]] = {}
    alive: dict[int, Int64[Tensor, "v n"]] = {}

    def change(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        """The same with every tensor of tokens replaced by `change(tensor)`."""
        blocks, qkv = ({i: change(x) for i, x in each.items()} for each in (self.blocks, self.qkv))
        return Encoded(change(self.final), blocks, qkv, self.alive)


def encode_vit(
    vit: VisionTransformer,
    pixels: Shaped[Tensor, "b h w c"],
    ids_keep: Int64[Tensor, "v k"],
    *,
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    hidden: tuple[Float[Tensor, "1 1 d"], Int64[Tensor, "v h"]] | None = None,
    group: int = 1,
    sources: Float[Tensor, "1 g d"] | None = None,
    keep_blocks: Collection[int] = (),
    keep_qkv: Collection[int] = (),
    prune: PruneRecipe | None = None,
    paths: Float[Tensor, "v depth 2"] | None = None,
    kernels: dispatch.Kernels = "auto",
) -> Encoded:
    """[CLS | visible] (visible without CLS) through the encoder: `final`, the raw outputs of `keep_blocks` and what `keep_qkv` make of their input.

    The value of a pixel is `pixel * scale + shift`. A patch embedding is one Linear on patches flattened (c, p, q).
    hidden: the mask token and where it stands for a patch's embedding; these tokens follow the visible ones.
    prune: when patches leave, those most like the mean of all that are there. paths: factors of the blocks' residual branches, from `path_factors`.
    group: images that share a sequence (`mixing.py`), with an embedding for each place in it; what comes out is every image's own again.
    """
    assert vit.pos_embed is not None
    proj, patch, position = vit.patch_embed.proj, vit.patch_embed.patch_size[0], vit.pos_embed[0]
    patches = dispatch.gather_patches(
        pixels,
        ids_keep,
        patch=patch,
        scale=scale,
        shift=shift,
        channels_last=True,
        dtype=compute_dtype(proj.weight),
        kernels=kernels,
    )
    tokens = F.linear(patches, proj.weight.flatten(1), proj.bias)
    if vit.cls_token is None:
        x = tokens + position[ids_keep]
    else:
        x = dispatch.embed_tokens(tokens, position[1:], vit.cls_token[0, 0] + position[0], ids_keep, kernels=kernels)
    if hidden is not None:
        mask_token, ids_hidden = hidden
        x = torch.cat([x, mask_token + position[vit.num_prefix_tokens :][ids_hidden]], dim=1)
    b, prefix = len(x), vit.num_prefix_tokens
    if group > 1:
        x = mixed(x, group, prefix, sources)
        paths = None if paths is None else paths[::group]
    outputs = {0: x} if 0 in keep_blocks else {}
    alive = ids_keep
    qkv: dict[int, Tensor] = {}
    held = {0: alive} if prune is not None else {}
    for number, block in enumerate(vit.blocks, start=1):
        if prune is not None:
            if number in prune.before:
                x, alive = without_redundant(x, alive, prune.keep)
            held[number] = alive
        if number in keep_qkv:
            qkv[number] = block.attn.qkv(block.norm1(x))  # type: ignore[operator,union-attr]
        x = block(x) if paths is None else scaled_block(block, x, paths[:, number - 1])  # type: ignore[arg-type]
        if number in keep_blocks:
            outputs[number] = x
    encoded = Encoded(vit.norm(x), outputs, qkv, held)
    return encoded.change(lambda y: unmixed(y, group, prefix, b)) if group > 1 else encoded


def without_redundant(
    x: Float[Tensor, "v p+n d"], ids: Int64[Tensor, "v n"], keep: float
) -> tuple[Float[Tensor, "v p+m d"], Int64[Tensor, "v m"]]:
    """The `int(keep * n)` patches whose cosine with the mean of all n is smallest, in their order, behind the p prefix tokens; and their ids.

    Nothing of the others is left; who they are has no gradient. Hybrid Distillation drops redundant tokens (ICLR 2024); this rule is a guess.
    """
    n = ids.shape[1]
    prefix, patches = x[:, :-n], x[:, -n:]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wide = patches.to(reference.wide(patches))
        likeness = F.cosine_similarity(wide, wide.mean(dim=1, keepdim=True), dim=-1)
        left = likeness.argsort(dim=1, stable=True)[:, : int(keep * n)].sort(dim=1).values
    x = torch.cat([prefix, patches.gather(1, left[..., None].expand(-1, -1, x.shape[2]))], dim=1)
    return x, ids.gather(1, left)
