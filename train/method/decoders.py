"""What turns visible tokens into predictions at hidden patches, dropped after training."""

import torch
from jaxtyping import Int64
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mrmae.train.method.recipe import DecoderRecipe
from mrmae.train.method.student import sincos_positions
from mrmae.train.method.taps import Tokens


class MaskDecoder(nn.Module):
    """MAE's decoder over [CLS | visible | mask tokens], then LayerNorm of the mask tokens: the tap `decoder`.

    Restructured, not stock: the order is [CLS | visible | predicted], and only predicted patches leave it. Mask tokens stand at
    the predicted patches only: hidden patches nobody predicts are absent. CLS, where the student has
    one, has no position.
    """

    position: Tensor

    def __init__(self, width_in: int, recipe: DecoderRecipe, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Linear(width_in, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, recipe.width))
        self.register_buffer("position", sincos_positions(grid, recipe.width)[1:].float(), persistent=False)
        with torch.random.fork_rng(devices=[]):
            self.blocks = nn.Sequential(
                *(
                    Block(recipe.width, recipe.heads, mlp_ratio=recipe.mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
                    for _ in range(recipe.depth)
                )
            )
        self.norm = LayerNorm(recipe.width)

    def forward(self, final: Tokens, ids_predict: Int64[Tensor, "v m"]) -> Tokens:
        """Decoded tokens [v, m, width] at `ids_predict`, from the encoder's `final`."""
        x = self.embed(final.x)
        visible = x[:, final.prefix :] + self.position[final.ids]
        hidden = self.mask_token + self.position[ids_predict]
        decoded = self.blocks(torch.cat([x[:, : final.prefix], visible, hidden], dim=1))
        return Tokens(self.norm(decoded[:, x.shape[1] :]), ids_predict)
