"""Token blocks: which patches of a view are stored together, so that training reads only the ones it shows.

Every (key, view) has a permutation of its grid, cut into equal blocks. A mask that shows one block then needs one block
from storage: at four blocks a quarter of the bytes. docs/format.md, "Token blocks".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mrmae.shards.format.spec import Array, Numbers, expect

IN_BLOCKS = ("tokens", "scale")  # arrays stored block by block; the others are small and of use only as a whole
RULE = "splitmix64"
GOLDEN, FIRST, SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
STREAM = np.uint64(2)  # apart from the words behind masks, which are streams 0 and 1 of the same hash
Words = np.ndarray[Any, np.dtype[np.uint64]]


@dataclasses.dataclass(frozen=True)
class BlockRule:
    """How a cache's tokens are cut: into `blocks` equal parts of a permutation drawn from (seed, hash(key), view)."""

    seed: int
    blocks: int
    rule: str = RULE

    def __post_init__(self) -> None:
        expect(self.rule == RULE, "token_layout.rule", self.rule, RULE)
        expect(self.blocks >= 2, "--blocks", self.blocks, "at least 2; one block is --token-layout raster")
        expect(0 <= self.seed < 2**64, "token_layout.seed", self.seed, "0 <= seed < 2**64")

    @staticmethod
    def from_json(fields: Mapping[str, Any] | None) -> "BlockRule | None":
        """The rule that plan.json holds; None for raster order."""
        return None if fields is None else BlockRule(**fields)

    def rows(self, l: int) -> int:
        """Patches per block of a grid of l. ValueError where the blocks do not divide it."""
        if l % self.blocks:
            fits = [n for n in range(2, l + 1) if l % n == 0]
            raise ValueError(f"--blocks {self.blocks}: do not divide a grid of {l} patches; expected one of "
                             f"{', '.join(map(str, fits))}; change --blocks or --grid, or use --token-layout raster")  # fmt: skip
        return l // self.blocks

    def order(self, hashes: Array, views: Array, l: int) -> Numbers:
        """[b, l]: the grid index of every stored row, block after block, ascending inside a block.

        hashes: of the keys, int64 as in `Cache.hashes` or unsigned; views: the view of each.
        """
        words = patch_words(np.asarray(hashes).view(np.uint64), np.asarray(views).astype(np.uint64), l, self.seed)
        drawn = words.argsort(axis=1).reshape(len(words), self.blocks, self.rows(l))
        return np.asarray(np.sort(drawn, axis=2).reshape(len(words), l), np.int64)

    def ids(self, hashes: Array, views: Array, blocks: Array, l: int) -> Numbers:
        """[b, l / blocks]: the grid indices of one block of each sample, ascending."""
        order = self.order(hashes, views, l).reshape(-1, self.blocks, self.rows(l))
        return np.asarray(order[np.arange(len(order)), np.asarray(blocks)], np.int64)


def patch_words(hashes: Words, views: Words, l: int, seed: int) -> Words:
    """One word per (sample, patch), no two of a sample equal: the low bits are the patch's index."""
    with np.errstate(over="ignore"):
        run = mix_words((STREAM + GOLDEN) ^ np.array([seed], np.uint64))
        image = mix_words(hashes ^ mix_words((run + GOLDEN) ^ views))
        patches = np.arange(l, dtype=np.uint64)
        words = mix_words(image[:, None] + (patches + np.uint64(1)) * GOLDEN)
    low = np.uint64((1 << (l - 1).bit_length()) - 1)
    return (words & ~low) | patches


def mix_words(x: Words) -> Words:
    """The splitmix64 finaliser (Steele et al. 2014), as behind the masks."""
    x = (x ^ (x >> np.uint64(30))) * FIRST
    x = (x ^ (x >> np.uint64(27))) * SECOND
    return x ^ (x >> np.uint64(31))


def in_blocks(array: Array, order: Numbers) -> Array:
    """[b, l, ...] of the grid, in stored order."""
    return np.ascontiguousarray(array[np.arange(len(order))[:, None], order])
