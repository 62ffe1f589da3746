"""MoM: masked reconstruction of the pixels in boxes, from the student's own grid of tokens (DistFormer, arXiv 2401.03191).

Each box is cells x cells tokens by RoIAlign; some are hidden at random, and what a small transformer says of them is compared with
the raw pixels of the box's crop. Dropped after training.
"""

import torch
from jaxtyping import Float, Int64, UInt8
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.ops import roi_align  # type: ignore[import-untyped]

from mrmae.train.method.recipe import BoxRecipe
from mrmae.train.method.taps import Tokens
from mrmae.train.method.targets import GivenBoxes


class BoxHead(nn.Module):
    """Tap `boxes`: RoIAlign, two 1x1 convolutions with ELU between, LN-Linear-LN, positions; blocks on shown cells, then on all of them.

    Convolutions of one cell are Linear layers on tokens. The number of boxes per image is fixed (ours): a box that is not there weighs nothing.
    """

    def __init__(self, width_in: int, recipe: BoxRecipe) -> None:
        super().__init__()
        self.cells, width = recipe.cells, recipe.width
        self.project = nn.Sequential(nn.Linear(width_in, width), nn.ELU(), nn.Linear(width, width))
        self.embed = nn.Sequential(LayerNorm(width), nn.Linear(width, width), LayerNorm(width))
        self.unit_places = nn.Parameter(torch.zeros(1, recipe.cells**2, width))
        self.unit_places_behind = nn.Parameter(torch.zeros(1, recipe.cells**2, width))
        self.unit_hidden = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks, self.norm = nn.Sequential(*box_blocks(recipe, recipe.depth)), LayerNorm(width)
        self.behind, self.norm_behind = nn.Sequential(*box_blocks(recipe, recipe.behind)), LayerNorm(width)

    def forward(self, final: Tokens, boxes: GivenBoxes, patch: int) -> Tokens:
        """What is said of hidden cells: [b, m * hidden, width], at `box * cells^2 + cell`. final: of all patches, in raster order."""
        (b, m), cells = boxes.at.shape[:2], self.cells**2
        patches = final.x[:, final.prefix :]
        side = int(patches.shape[1] ** 0.5)
        grid = patches.transpose(1, 2).reshape(b, -1, side, side)
        x = self.embed(self.project(aligned(grid, boxes.at, self.cells, 1 / patch).flatten(2).transpose(1, 2)))
        hidden = boxes.hidden.flatten(0, 1)
        shown = shown_cells(hidden, cells)
        seen = self.norm(self.blocks(rows_at(x + self.unit_places, shown)))
        places = self.unit_places_behind.expand(b * m, -1, -1)
        tokens = torch.cat([seen + rows_at(places, shown), self.unit_hidden + rows_at(places, hidden)], dim=1)
        told = self.norm_behind(self.behind(tokens)[:, shown.shape[1] :])
        ids = boxes.hidden + torch.arange(m, device=hidden.device)[:, None] * cells
        return Tokens(told.reshape(b, -1, told.shape[2]), ids.flatten(1))


def box_blocks(recipe: BoxRecipe, depth: int) -> list[Block]:
    """`depth` transformer blocks."""
    with torch.random.fork_rng(devices=[]):
        return [
            Block(recipe.width, recipe.heads, mlp_ratio=recipe.mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(depth)
        ]


def aligned(
    grid: Float[Tensor, "b d h w"], boxes: Float[Tensor, "b m 4"], cells: int, scale: float
) -> Float[Tensor, "b*m d cells cells"]:
    """torchvision's RoIAlign at its defaults (not aligned, adaptive sampling), in fp32 at least. scale: grid cells per pixel of a box."""
    work = torch.promote_types(grid.dtype, torch.float32)
    with torch.autocast(grid.device.type, enabled=False):
        out: Tensor = roi_align(grid.to(work), regions(boxes).to(work), cells, spatial_scale=scale)
    return out


def regions(boxes: Float[Tensor, "b m 4"]) -> Float[Tensor, "b*m 5"]:
    """Boxes behind the number of their image, as torchvision takes them."""
    image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(
        -1, boxes.shape[1], 1
    )
    return torch.cat([image, boxes], dim=2).flatten(0, 1)


def shown_cells(hidden: Int64[Tensor, "n k"], cells: int) -> Int64[Tensor, "n s"]:
    """The other cells of each box, ascending."""
    order = torch.zeros(len(hidden), cells, dtype=torch.int64, device=hidden.device).scatter(1, hidden, 1)
    return order.argsort(dim=1, stable=True)[:, : cells - hidden.shape[1]]


def rows_at(x: Float[Tensor, "n l d"], ids: Int64[Tensor, "n k"]) -> Float[Tensor, "n k d"]:
    """The tokens at `ids`."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


@torch.no_grad()
def box_targets(
    pixels: UInt8[Tensor, "b h w c"], boxes: GivenBoxes, recipe: BoxRecipe, work: torch.dtype
) -> tuple[Float[Tensor, "b m*k p"], Float[Tensor, "b m*k"]]:
    """Raw pixels in [0, 1] of the hidden cells of each box's crop, flattened (c, p, q), and what each cell weighs.

    A crop is the box resized to `recipe.crop` (bilinear, each pixel the mean of samples across it: RoIAlign with half-pixel corners, ours).
    It weighs 0 where the mean of its brightest channel is below `dark`, a side below `least` px, or there is no box.
    """
    image = (pixels.to(work) / 255).permute(0, 3, 1, 2)
    with torch.autocast(pixels.device.type, enabled=False):
        crops = roi_align(image, regions(boxes.at).to(work), recipe.crop, aligned=True)
    (h, w), cells = recipe.crop, recipe.cells
    cut = crops.reshape(*crops.shape[:2], cells, h // cells, cells, w // cells)
    targets = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    sides = (boxes.at[..., 2:] - boxes.at[..., :2]).flatten(0, 1)
    counts = (
        (crops.amax(dim=1).mean(dim=(1, 2)) >= recipe.dark)
        & (sides > 0).all(dim=1)
        & (sides >= recipe.least).all(dim=1)
    )
    hidden = boxes.hidden.flatten(0, 1)
    weight = counts[:, None].to(work).expand(-1, hidden.shape[1])
    b = len(pixels)
    return rows_at(targets, hidden).reshape(b, -1, targets.shape[2]), weight.reshape(b, -1)
