"""A cache's columns as they are stored: whole samples in raster order, or one token block of each."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mrmae.shards.format import IN_BLOCKS, BlockRule, signed_hashes
from mrmae.shards.opened import Indices, Numbers, OpenedFiles


class StoredColumns(OpenedFiles):
    """Raw reads of stored columns, verified. grid: (height, width) in patches; blocks: how tokens are cut, None in raster order."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a view: height, width."""
        return self.plan.grid

    @property
    def blocks(self) -> BlockRule | None:
        """How tokens are cut into blocks, None where they lie in raster order."""
        return self.plan.token_layout

    @functools.cached_property
    def hashes(self) -> Int64[Tensor, "n"]:
        """Hash of every sample's key, as signed 64-bit integers."""
        return torch.from_numpy(signed_hashes(self.keys))

    def read_column(
        self, column: str, numbers: Indices, views: Indices, arrays: Sequence[str] = ("tokens", "scale"),
        *, out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The named arrays of a column for these samples, [b, ...] in their stored dtypes, patches in raster order.

        views: which view of each sample. `scale` is left out where tokens have none (float16). out: buffers to fill.
        Raises ValueError for an array that the column does not have.
        """
        at, of = self.checked(numbers, views)
        empty = self.buffers(column, arrays, 0 if out else len(at))
        tensors = {name: out[name] for name in empty} if out else empty
        self.fill(column, at, of, tensors, None)
        return tensors

    def read_block(
        self,
        column: str,
        numbers: Indices,
        views: Indices,
        blocks: Indices,
        arrays: Sequence[str] = ("tokens", "scale"),
    ) -> dict[str, Tensor]:
        """As read_column, but of tokens and scale one block of each sample, [b, l / B, ...]; nothing else of them is read.

        blocks: which block of each sample; `block_ids` tells the patches. ValueError where the cache has no blocks.
        """
        (at, of), rule = self.checked(numbers, views), self.block_rule()
        which = self.checked_blocks(blocks, len(at))
        tensors = self.buffers(column, arrays, len(at), rule.blocks)
        self.fill(column, at, of, tensors, which)
        return tensors

    def fill(self, column: str, at: Numbers, of: Numbers, tensors: Mapping[str, Tensor], which: Numbers | None) -> None:
        """Read arrays of a column into `tensors`: whole and in raster order, or, of those in blocks, the blocks `which`."""
        final = {name: tensor.numpy() for name, tensor in tensors.items()}
        mixed = [name for name in final if self.blocks and which is None and name in IN_BLOCKS]

        def read(positions: Numbers, view: int, shard: int) -> None:
            rows = (at[positions] % self.shard_samples).tolist()
            stored = {name: np.empty((len(rows), *final[name].shape[1:]), final[name].dtype) for name in mixed}
            out = {
                name: list(stored[name]) if name in stored else [array[i] for i in positions]
                for name, array in final.items()
            }
            self.column_shard(column, view, shard).read(rows, out, None if which is None else which[positions].tolist())
            order = self.order(at[positions], of[positions]) if stored else positions
            for name, array in stored.items():
                final[name][positions[:, None], order] = array

        self.run(column, read, at, of)

    def block_ids(self, numbers: Indices, views: Indices, blocks: Indices) -> Int64[Tensor, "b n"]:
        """Grid indices, ascending, of one block of each sample: what `read_block` reads. ValueError without blocks."""
        (at, of), rule = self.checked(numbers, views), self.block_rule()
        which = self.checked_blocks(blocks, len(at))
        return torch.from_numpy(rule.ids(self.hashes.numpy()[at], of, which, self.grid[0] * self.grid[1]))

    def checked_blocks(self, blocks: Indices, n: int) -> Numbers:
        """As int64. ValueError unless they are one block of the rule for each of n samples."""
        which, last = np.asarray(blocks, np.int64), self.block_rule().blocks - 1
        if which.shape != (n,) or ((which < 0) | (which > last)).any():
            raise ValueError(
                f"{self.path}: blocks {which.tolist()} for {n} samples; expected one of 0 to {last} per sample"
            )
        return which

    def block_rule(self) -> BlockRule:
        """How tokens are cut. ValueError where they lie in raster order."""
        if self.blocks is None:
            raise ValueError(f"{self.path}: its tokens lie in raster order; token blocks were expected; extract a cache with "
                             "--token-layout blocks")  # fmt: skip
        return self.blocks

    def order(self, numbers: Numbers, views: Numbers) -> Numbers:
        """[b, l]: the grid index of every stored row of tokens. ValueError where the cache has no blocks."""
        return self.block_rule().order(self.hashes.numpy()[numbers], views, self.grid[0] * self.grid[1])

    def buffers(self, column: str, arrays: Sequence[str], n: int, blocks: int = 1) -> dict[str, Tensor]:
        """Empty tensors [n, ...] for the named arrays of a column; of those in blocks, for one of so many.

        ValueError for a column or an array that the cache does not have.
        """
        if column not in self.columns:
            raise ValueError(f"{self.path}: there is no column {column!r}; it holds {sorted(self.columns)}; "
                             "choose one, or extract with that teacher")  # fmt: skip
        stored = self.columns[column].layout.arrays()
        arrays = [name for name in arrays if name != "scale" or name in stored]
        if lacking := [name for name in arrays if name not in stored]:
            raise ValueError(f"{self.path}: column {column} has no {lacking[0]}; it holds {sorted(stored)}; "
                             "choose a teacher that has it")  # fmt: skip
        found = {}
        for name in arrays:
            (first, *rest), dtype = stored[name]
            first //= blocks if name in IN_BLOCKS else 1
            found[name] = torch.empty(n, first, *rest, dtype=getattr(torch, dtype))
        return found
