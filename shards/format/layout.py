"""The arrays of a column: which there are, their shapes, dtypes and shards."""

import dataclasses
from typing import Any

from mrmae.shards.format.blocks import IN_BLOCKS
from mrmae.shards.format.quantiser import DTYPES
from mrmae.shards.format.spec import MAP_DTYPES, expect


@dataclasses.dataclass(frozen=True)
class Layout:
    """A column's arrays: n samples in shards of shard_samples, l patches of d channels, tokens as dtype (of DTYPES).

    blocks: chunks per sample of the arrays that are stored block by block (1: raster order). map: the dtype of a map, which is the
    column's only array, of d numbers per patch; None for a teacher's.
    """

    n: int
    l: int
    d: int
    shard_samples: int
    dtype: str
    has_cls: bool
    has_attention: bool
    blocks: int = 1
    map: str | None = None

    def __post_init__(self) -> None:
        expect(self.dtype in DTYPES, "layout.dtype", self.dtype, ", ".join(DTYPES))
        expect(self.map in (None, *MAP_DTYPES), "layout.map", self.map, ", ".join(MAP_DTYPES))

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape of one sample, dtype) of every stored array, by name."""
        if self.map is not None:
            return {"map": ((self.l, self.d) if self.d > 1 else (self.l,), self.map)}
        tokens = DTYPES[self.dtype]
        stored = {
            "tokens": ((self.l, tokens.codes(self.d)), tokens.array),
            "scale": ((self.l,), "float16") if tokens.scaled else None,
            "cls": ((self.d,), "float16") if self.has_cls else None,
            "attention": ((self.l,), "float16") if self.has_attention else None,
            "norm": ((self.l,), "float16"),
        }
        return {name: array for name, array in stored.items() if array is not None}

    def blocks_of(self, name: str) -> int:
        """Chunks per sample of an array."""
        return self.blocks if name in IN_BLOCKS else 1

    def to_json(self) -> dict[str, Any]:
        """The layout as attributes hold it; one block, and that it is no map, go without saying."""
        unsaid = (("blocks", 1), ("map", None))
        return {name: value for name, value in dataclasses.asdict(self).items() if (name, value) not in unsaid}

    def count(self, shard: int) -> int:
        """How many samples the shard holds: shard_samples, fewer in the last."""
        return max(0, min(self.shard_samples, self.n - shard * self.shard_samples))
