"""Which patches are visible: an integer hash of (seed, epoch, sample, patch), so a mask depends on nothing else.

Masks are the same on CPU and GPU and do not change with batch size, rank, order or resume; the host knows them before the copy.
Everything is torch int64 with wrap-around multiplication (splitmix64, Steele et al. 2014), which has the same bits everywhere.
"""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
STREAMS = {
    "order": 0,
    "gumbel": 1,
    "block": 3,
    "predict": 4,
    "exchange": 5,
    "join": 6,
    "fill": 7,
    "boxes": 8,
    "cells": 9,
}  # 2 cuts the blocks of a cache: shards/format/blocks.py


def signed(word: int) -> int:
    """The same 64 bits as a Python int that fits torch.int64."""
    word &= WORD
    return word - (1 << 64) if word >> 63 else word


def shift_right(x: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """Logical right shift: torch's `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The splitmix64 finaliser: every input bit changes about half of the output bits."""
    for bits, factor in MIX:
        x = (x ^ shift_right(x, bits)) * signed(factor)
    return x ^ shift_right(x, 31)


def mix_int(x: int) -> int:
    """`mix` of one Python int, for the words known on the host."""
    for bits, factor in MIX:
        x = ((x ^ (x >> bits)) * factor) & WORD
    return x ^ (x >> 31)


def hash_patches(samples: Int64[Tensor, " b"], l: int, *, seed: int, epoch: int, stream: str) -> Int64[Tensor, "b l"]:
    """64 random-looking bits per (sample, patch)."""
    if samples.dtype != torch.int64 or samples.ndim != 1:
        raise ValueError(
            f"ids: samples is {samples.dtype} of shape {tuple(samples.shape)}; "
            "one int64 hash per image was expected, shape [b]; pass the key hashes of the batch"
        )
    if l < 1:
        raise ValueError(f"ids: l = {l} patches in the grid; at least 1 was expected; check image size and patch")
    run = STREAMS[stream]
    for word in (seed, epoch):
        run = mix_int(((run + GOLDEN) ^ word) & WORD)
    image = mix(samples ^ signed(run))
    patch = torch.arange(1, l + 1, device=samples.device) * signed(GOLDEN)
    return mix(image[:, None] + patch)


def patch_noise(
    samples: Int64[Tensor, " b"], l: int, *, seed: int, epoch: int, stream: str = "order"
) -> Int64[Tensor, "b l"]:
    """One unique random key per patch of each image; sorting them gives a uniform random permutation.

    samples: hash of each sample's key. The low bits hold the patch index, so no two keys of an image are equal
    and any sort, stable or not, on any device, gives the same order.
    """
    low = (1 << (l - 1).bit_length()) - 1
    hashed = hash_patches(samples, l, seed=seed, epoch=epoch, stream=stream)
    return (hashed & ~low) | torch.arange(l, device=samples.device)


def random_ids(
    samples: Int64[Tensor, " b"], l: int, n_keep: int, *, seed: int, epoch: int
) -> tuple[Int64[Tensor, "b n_keep"], Int64[Tensor, "b n_hidden"]]:
    """Grid indices of `n_keep` random patches per image and of all the others, both ascending.

    Raises ValueError unless 1 <= n_keep <= l. MAE section 3, "Masking" (arXiv 2111.06377): uniform without replacement.
    """
    if not 1 <= n_keep <= l:
        raise ValueError(
            f"random_ids: n_keep = {n_keep} of l = {l} patches; 1 <= n_keep <= {l} was expected; change the mask ratio"
        )
    order = patch_noise(samples, l, seed=seed, epoch=epoch).argsort(dim=1)
    return order[:, :n_keep].sort(dim=1).values, order[:, n_keep:].sort(dim=1).values


def gumbel_noise(
    samples: Int64[Tensor, " b"], l: int, *, seed: int, epoch: int, stream: str = "gumbel"
) -> Float64[Tensor, "b l"]:
    """Standard Gumbel noise per patch; the top k of `log p + noise` are k draws from p without replacement.

    Streams are independent of each other and of those of `patch_noise`. The uniform under it has the same bits on every device;
    the two logarithms may differ in the last place between CPU and GPU.
    """
    bits = shift_right(hash_patches(samples, l, seed=seed, epoch=epoch, stream=stream), 12)
    # 52 bits and a half: the smallest and the largest value are exact in float64, so 0 < uniform < 1.
    uniform = (bits.double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def drawn_block(samples: Int64[Tensor, " b"], blocks: int, *, seed: int, epoch: int) -> Int64[Tensor, " b"]:
    """One of `blocks` equal parts of each image, uniformly: floor(u * blocks) of a 32-bit hashed u."""
    bits = hash_patches(samples, 1, seed=seed, epoch=epoch, stream="block")[:, 0]
    return (shift_right(bits, 32) * blocks) >> 32
