"""The MCMAE student: two masked-convolution stages, then a transformer on the visible tokens (arXiv 2205.03892).

Restructured, not stock: the mask is zero on hidden cells where the depth-wise convolutions read them, and every other layer
works on one cell or inside one patch, so only the cells of visible patches are computed at all. The result for visible tokens is
the published one, at a quarter of the pointwise work. Parameter names and shapes are those of Alpha-VL/ConvMAE's checkpoints.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from timm.layers.norm import LayerNorm
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mrmae.common.suggest import did_you_mean
from mrmae.kernels import dispatch
from mrmae.train.method.student import compute_dtype, sincos_positions

STRIDES = (4, 2, 2)
PATCH = 16  # pixels along a side of a patch: the product of the strides
CONV_LN_EPS = 1e-5  # of the convolution stages; the transformer's is MAE's 1e-6


class Size(NamedTuple):
    """Widths and depths of the three stages, heads of the third, MLP ratios."""

    widths: tuple[int, int, int]
    depths: tuple[int, int, int]
    heads: int
    mlp_ratios: tuple[float, float, float] = (4.0, 4.0, 4.0)


# base: MCMAE-B as published; base_mlp8: with the MLP ratios of DMJD's code. large: the widths and depths of that code, with MCMAE's
# MLP ratios. test: for tests only.
SIZES = {
    "mcmae_base": Size((256, 384, 768), (2, 2, 11), 12),
    "mcmae_large": Size((384, 768, 1024), (2, 2, 23), 16),
    "mcmae_base_mlp8": Size((256, 384, 768), (2, 2, 11), 12, (8.0, 8.0, 4.0)),
    "test_mcmae": Size((8, 16, 32), (1, 2, 3), 4),
}


class ConvMlp(nn.Module):
    """`FC2(GELU(FC1(x)))` on every cell; the layers are 1x1 convolutions by name and shape."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """Channels last."""
        return pointwise(self.fc2, F.gelu(pointwise(self.fc1, x)))


class ConvBlock(nn.Module):
    """`x + C2(DW5x5(M * C1(LN(x))))`, then `x + MLP(LN(x))`; M is 1 on cells of visible patches, 0 on the others."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=CONV_LN_EPS), nn.LayerNorm(width, eps=CONV_LN_EPS)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.attn = nn.Conv2d(width, width, 5, padding=2, groups=width)  # its name in published checkpoints
        self.mlp = ConvMlp(width, int(width * mlp_ratio))
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()  # fine-tuning puts stochastic depth here

    def forward(
        self, x: Float[Tensor, "v k r r c"], ids_keep: Int64[Tensor, "v k"], grid: tuple[int, int]
    ) -> Float[Tensor, "v k r r c"]:
        """r x r cells of every visible patch, channels last."""
        mixed = convolve_visible(self.attn, pointwise(self.conv1, self.norm1(x)), ids_keep, grid)
        x = x + self.drop_path1(pointwise(self.conv2, mixed))
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    """Strided convolution, LayerNorm over channels, GELU; applied to patches that are already cut out."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width_in, width, stride, stride=stride)
        self.norm = nn.LayerNorm(width, eps=CONV_LN_EPS)

    def forward(self, patches: Float[Tensor, "... P"]) -> Float[Tensor, "... c"]:
        """Patches flattened (c, p, q)."""
        return F.gelu(self.norm(pointwise(self.proj, patches)))


class MaskedConvViT(nn.Module):
    """MCMAE's encoder with its stage fusion, without CLS. `blocks` is the transformer; taps `block<i>` count in it.

    stage1_output_decode and stage2_output_decode, F1 and F2, bring the convolution stages to the transformer's output in
    pre-training; a fine-tuning net leaves them out.
    """

    num_prefix_tokens = 0

    def __init__(self, size: Size, grid: Sequence[int], channels: int = 3) -> None:
        super().__init__()
        (one, two, three), (mlp1, mlp2, mlp3) = size.widths, size.mlp_ratios
        self.grid, self.embed_dim, self.num_features = (grid[0], grid[1]), three, three
        self.patch_embed1 = PatchEmbed(channels, one, STRIDES[0])
        self.patch_embed2 = PatchEmbed(one, two, STRIDES[1])
        self.patch_embed3 = PatchEmbed(two, three, STRIDES[2])
        self.patch_embed4 = nn.Linear(three, three)
        self.stage1_output_decode = nn.Conv2d(one, three, 4, stride=4)
        self.stage2_output_decode = nn.Conv2d(two, three, 2, stride=2)
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, three)[1:].float()[None], requires_grad=False)
        self.blocks1 = nn.ModuleList(ConvBlock(one, mlp1) for _ in range(size.depths[0]))
        self.blocks2 = nn.ModuleList(ConvBlock(two, mlp2) for _ in range(size.depths[1]))
        self.blocks3 = nn.ModuleList(
            Block(three, size.heads, mlp_ratio=mlp3, qkv_bias=True, norm_layer=LayerNorm) for _ in range(size.depths[2])
        )
        self.norm = LayerNorm(three)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks."""
        return self.blocks3

    def resize(self, grid: tuple[int, int]) -> None:
        """Take images of another grid: positions are interpolated, as timm does for its own models; nothing else has a size."""
        fitted = resample_abs_pos_embed(self.pos_embed.detach(), list(grid), list(self.grid), num_prefix_tokens=0)
        self.pos_embed, self.grid = nn.Parameter(fitted, requires_grad=False), grid

    def stages(
        self, patches: Float[Tensor, "v k P"], ids_keep: Int64[Tensor, "v k"]
    ) -> tuple[Float[Tensor, "v k d"], Float[Tensor, "v k 4 4 c1"], Float[Tensor, "v k 2 2 c2"]]:
        """The transformer's input (with positions), and both convolution stages' outputs. patches: (c, p, q), 16 px."""
        v, k, _ = patches.shape
        cells = patches.reshape(v, k, -1, 4, 4, 4, 4).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        one = self.patch_embed1(cells)
        for block in self.blocks1:
            one = block(one, ids_keep, self.grid)
        two = self.patch_embed2(merge(one, STRIDES[1]))
        for block in self.blocks2:
            two = block(two, ids_keep, self.grid)
        tokens = self.patch_embed4(self.patch_embed3(merge(two, STRIDES[2])).flatten(2))
        return tokens + self.pos_embed[0][ids_keep], one, two

    def fuse(self, z: Tensor, one: Tensor, two: Tensor) -> Float[Tensor, "v k d"]:
        """`LN(z + F1(s1) + F2(s2))`: what the decoder and the mimic heads read."""
        first = pointwise(self.stage1_output_decode, merge(one, 4)).flatten(2)
        second = pointwise(self.stage2_output_decode, merge(two, 2)).flatten(2)
        out: Tensor = self.norm(z + first + second)
        return out

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """All tokens of normalised, unmasked images as fine-tuning uses them: no stage fusion, before any final norm."""
        return self.whole(image)[0]

    def forward_fused(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """All tokens of normalised, unmasked images as pre-training makes them: with the stage fusion, behind its norm."""
        return self.fuse(*self.whole(image))

    def whole(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """The transformer's output for all patches, and both convolution stages'."""
        patches = F.unfold(image, PATCH, stride=PATCH).transpose(1, 2)
        everything = torch.arange(patches.shape[1], device=image.device).expand(image.shape[0], -1)
        x, one, two = self.stages(patches, everything)
        for block in self.blocks3:
            x = block(x)
        return x, one, two


def build_mcmae(
    name: str, *, patch: int, grid: Sequence[int], channels: int = 3, depth: int | None = None
) -> MaskedConvViT:
    """The student `name` for a grid of 16-pixel patches. Raises ValueError for unknown names and other patch sizes.

    depth: only so many of its transformer blocks.
    """
    if name not in SIZES:
        raise ValueError(
            f"student {name!r}: there is no such model; {did_you_mean(name, ['mcmae_base', 'mcmae_large'])}"
        )
    if patch != PATCH:
        raise ValueError(
            f"student {name!r}: the cache's patches have {patch} px; 16 = 4 * 2 * 2 was expected, the strides of its stages; "
            "extract with a --size of 16 times the --grid, or train a vit"
        )
    with torch.random.fork_rng(devices=[]):
        student = MaskedConvViT(SIZES[name], grid, channels)
    student.blocks3 = student.blocks3[:depth]
    return student


def encode_mcmae(
    student: MaskedConvViT,
    pixels: Shaped[Tensor, "b h w c"],
    ids_keep: Int64[Tensor, "v k"],
    *,
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    keep_blocks: Iterable[int] = (),
    kernels: dispatch.Kernels = "auto",
) -> tuple[Float[Tensor, "v k d"], dict[int, Float[Tensor, "v k d"]]]:
    """`final` (with the stage fusion) of the visible patches, and the raw outputs of `keep_blocks`, counted from 1; 0 is their input.

    As `student.encode`, without CLS. Only visible pixels are read: uint8 in, their normalised patches are all that is kept.
    """
    patches = dispatch.gather_patches(
        pixels,
        ids_keep,
        patch=PATCH,
        scale=scale,
        shift=shift,
        channels_last=True,
        dtype=compute_dtype(student.pos_embed),
        kernels=kernels,
    )
    x, one, two = student.stages(patches, ids_keep)
    outputs = {0: x} if 0 in keep_blocks else {}
    for number, block in enumerate(student.blocks3, start=1):
        x = block(x)
        if number in keep_blocks:
            outputs[number] = x
    return student.fuse(x, one, two), outputs


def pointwise(conv: nn.Conv2d, x: Float[Tensor, "... P"]) -> Float[Tensor, "... c"]:
    """A convolution whose window is its stride, on cells or cut-out patches flattened (c, p, q), as one matrix product."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def merge(cells: Float[Tensor, "v k r r c"], stride: int) -> Float[Tensor, "v k s s P"]:
    """stride x stride neighbours of every patch as one row, flattened (c, p, q)."""
    v, k, r, _, c = cells.shape
    blocks = cells.reshape(v, k, r // stride, stride, r // stride, stride, c)
    return blocks.permute(0, 1, 2, 4, 6, 3, 5).flatten(4)


def convolve_visible(
    conv: nn.Conv2d, cells: Float[Tensor, "v k r r c"], ids_keep: Int64[Tensor, "v k"], grid: tuple[int, int]
) -> Float[Tensor, "v k r r c"]:
    """A depth-wise convolution over the whole map in which hidden cells are zero, at the visible cells."""
    (rows, columns), (v, _, r, _, c) = grid, cells.shape
    index = ids_keep[:, :, None].expand(-1, -1, r * r * c)
    whole = cells.new_zeros(v, rows * columns, r * r * c).scatter(1, index, cells.flatten(2))
    image = whole.view(v, rows, columns, r, r, c).transpose(2, 3).reshape(v, rows * r, columns * r, c)
    mixed: Tensor = conv(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last in memory on both sides
    patches = mixed.reshape(v, rows, r, columns, r, c).transpose(2, 3).reshape(v, rows * columns, r * r * c)
    return patches.gather(1, index).view(cells.shape)
