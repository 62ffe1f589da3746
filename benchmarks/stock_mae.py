"""MAE as published, for comparison only: its formulas on the whole grid, in the order a plain implementation applies them.

Written from the paper (arXiv 2111.06377) with today's timm blocks: every patch is embedded by a convolution, shuffled and cut to the
visible ones; behind the encoder mask tokens are appended, the order is restored, every patch is predicted, and the loss is masked.
"""

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mrmae.train.method import DecoderRecipe, sincos_positions


class StockMAE(nn.Module):
    """Loss of one batch of normalised fp32 images. fused: PyTorch's fused attention; else products and softmax, as in 2021."""

    def __init__(
        self, model: str, decoder: DecoderRecipe, *, size: int, patch: int, fused: bool, ratio: float = 0.75
    ) -> None:
        super().__init__()
        self.vit = timm.create_model(model, img_size=size, patch_size=patch, num_classes=0)
        grid, width = (size // patch, size // patch), self.vit.embed_dim
        self.patch, self.l = patch, grid[0] * grid[1]
        self.n_keep = int(self.l * (1 - ratio))
        self.vit.pos_embed = nn.Parameter(sincos_positions(grid, width).float()[None], requires_grad=False)
        self.embed = nn.Linear(width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        positions = sincos_positions(grid, decoder.width).float()[None]
        self.position = nn.Parameter(positions, requires_grad=False)
        blocks = [Block(decoder.width, decoder.heads, decoder.mlp_ratio, qkv_bias=True) for _ in range(decoder.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(decoder.width)
        self.head = nn.Linear(decoder.width, 3 * patch**2)
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        b, l, d = len(image), self.l, self.vit.embed_dim
        x = self.vit.patch_embed(image).reshape(b, l, d) + self.vit.pos_embed[:, 1:]
        shuffle = torch.rand(b, l, device=x.device).argsort(1)
        restore = shuffle.argsort(1)
        x = x.gather(1, shuffle[:, : self.n_keep, None].expand(-1, -1, d))
        hidden = torch.ones(b, l, device=x.device)
        hidden[:, : self.n_keep] = 0
        hidden = hidden.gather(1, restore)
        x = torch.cat([(self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(b, -1, -1), x], 1)
        x = self.embed(self.vit.norm(self.vit.blocks(x)))
        tokens = torch.cat([x[:, 1:], self.mask_token.expand(b, l - self.n_keep, -1)], 1)
        tokens = tokens.gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = self.blocks(torch.cat([x[:, :1], tokens], 1) + self.position)
        prediction = self.head(self.norm(x))[:, 1:]
        target = self.patchify(image)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = ((prediction - target) ** 2).mean(-1)
        return (loss * hidden).sum() / hidden.sum()

    def patchify(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l P"]:
        """Patches flattened (p, q, c)."""
        b, c, h, w = image.shape
        cells = image.reshape(b, c, h // self.patch, self.patch, w // self.patch, self.patch)
        return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, self.l, -1)
