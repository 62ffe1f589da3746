"""Decoders: what leaves them stands at the predicted patches, whatever the order of their tokens."""

import torch

from mrmae.train.method.decoders import MaskDecoder
from mrmae.train.method.recipe import DecoderRecipe
from mrmae.train.method.student import initialise
from mrmae.train.method.taps import Tokens


def test_the_decoder_does_not_care_about_the_order_of_its_tokens() -> None:
    decoder = MaskDecoder(8, DecoderRecipe(depth=2, width=16, heads=2), (3, 3)).double()
    initialise(decoder, 0)
    final, keep, predict = torch.randn(1, 4, 8).double(), torch.tensor([[0, 4, 7]]), torch.tensor([[1, 2, 3, 5, 6, 8]])
    out = decoder(Tokens(final, keep, 1), predict).x
    mixed = decoder(Tokens(final[:, [0, 3, 1, 2]], keep[:, [2, 0, 1]], 1), predict.flip(1)).x
    assert out.shape == (1, 6, 16)
    assert (mixed.flip(1) - out).abs().max() < 1e-12
    assert (decoder(Tokens(final, keep.flip(1), 1), predict).x - out).abs().max() > 1e-3  # a wrong position does matter
