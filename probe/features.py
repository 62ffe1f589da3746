"""Features, computed once: content-addressed safetensors beside the run, in chunks that survive a kill.

A folder is named after the hash of weights, images and view; other settings of a probe do not compute anything again.
`pooled-*` holds the mean of patch tokens and CLS (fp32), `tokens-*` all patch tokens (fp16), written when a probe asks.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.common.backend import absolute
from mrmae.common.files import publish
from mrmae.common.progress import Progress, human_bytes
from mrmae.probe.data import Split, shown_images, stored_view
from mrmae.probe.sources import FeatureSource, column_features
from mrmae.shards.format import FP16_MAX, content_id

FEATURES_VERSION = 1  # raise it when the numbers of a source or a view change
FILE_IMAGES = 512  # images per file

KINDS = ("pooled", "tokens")
FeatureChunk = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class PooledFeatures:
    """Features of one part of DATA from one source, on disk. batch_size, workers: how missing ones are computed."""

    source: FeatureSource
    part: Split
    home: Path
    batch_size: int = 32
    workers: int = 2
    say: Callable[[str], None] = print

    @property
    def id(self) -> str:
        """Hash of everything that decides the numbers."""
        return content_id(
            {"version": FEATURES_VERSION, "source": self.source.about, "data": self.part.id, "view": self.view}
        )

    @property
    def view(self) -> dict[str, object]:
        """What the source was shown, in plain values."""
        return stored_view(self.part, self.source.size, self.source.spec.interpolation)

    @property
    def folder(self) -> Path:
        """Where the chunks lie."""
        return self.home / "features" / self.id[7:23]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        return self.source.spec.grid

    def pooled(self) -> FeatureChunk:
        """`mean` [n, d] of patch tokens and, where the source has it, `cls` [n, d]; fp32."""
        chunks = list(self.chunks("pooled"))
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def tokens(self, *, limit_bytes: float = float("inf")) -> Float[Tensor, "n l d"]:
        """All patch tokens, in their stored dtype. ValueError where they would take more memory than limit_bytes."""
        spec = self.source.spec
        needed = len(self.part) * spec.grid[0] * spec.grid[1] * spec.width * 2
        if needed > limit_bytes:
            raise ValueError(f"{self.part.name} part: its patch tokens take {human_bytes(needed)} of memory, {human_bytes(limit_bytes)} "
                             "are free; expected to hold them all; probe fewer images with --train-include")  # fmt: skip
        return torch.cat([chunk["tokens"] for chunk in self.chunks("tokens")])

    def chunks(self, kind: str) -> Iterator[FeatureChunk]:
        """The stored chunks in order, computed first where they are missing or damaged."""
        starts = range(0, len(self.part), FILE_IMAGES)
        if kind == "tokens" and self.source.column:  # they are stored in the cache already
            yield from (self.compute(range(s, min(s + FILE_IMAGES, len(self.part))), None, None) for s in starts)
            return
        missing = [s for s in starts if not self.whole(kind, s)]
        if missing:
            self.compute_missing(kind, missing)
        for start in starts:
            yield safetensors.torch.load_file(self.path(kind, start))

    def path(self, kind: str, start: int) -> Path:
        """The file of one chunk."""
        return self.folder / f"{kind}-{start // FILE_IMAGES:06d}.safetensors"

    def whole(self, kind: str, start: int) -> bool:
        """Is this chunk there, of its full length? A damaged one is said. Reads the header only."""
        path, rows = self.path(kind, start), min(FILE_IMAGES, len(self.part) - start)
        if not path.exists():
            return False
        try:
            with safetensors.safe_open(path, "pt") as file:
                found = {file.get_slice(name).get_shape()[0] for name in file.keys()}
            reason = "" if found == {rows} else f"holds {found} rows instead of {rows}"
        except (safetensors.SafetensorError, OSError) as error:
            reason = str(error)
        if reason:
            self.say(f"{path}: is damaged ({reason}); it is computed again")
        return not reason

    def compute_missing(self, kind: str, starts: list[int]) -> None:
        """Compute and publish these chunks; tokens bring their pooled features with them."""
        about = {
            "source": self.source.name,
            **self.source.about,
            "part": self.part.name,
            "images": self.part.id,
            "view": self.view,
        }
        publish(self.folder / "about.json", json.dumps(about, indent=2, default=list).encode(), replace=True)
        count = sum(min(FILE_IMAGES, len(self.part) - s) for s in starts)
        what = f"{self.part.name} features"
        with Progress(what, count) as progress, ThreadPoolExecutor(self.workers, "views") as pool:
            for start in starts:
                chunk = self.compute(range(start, min(start + FILE_IMAGES, len(self.part))), progress, pool)
                for written in KINDS if kind == "tokens" else KINDS[:1]:
                    names = ["tokens"] if written == "tokens" else [name for name in chunk if name != "tokens"]
                    data = safetensors.torch.save({name: chunk[name].contiguous() for name in names})
                    publish(self.path(written, start), data, replace=True)

    def compute(self, positions: range, progress: Progress | None, pool: ThreadPoolExecutor | None) -> FeatureChunk:
        """Tokens (fp16 where they fit), their mean and CLS (fp32, from the tokens before rounding)."""
        found = []
        for first in range(positions.start, positions.stop, self.batch_size):
            batch = range(first, min(first + self.batch_size, positions.stop))
            tokens, cls = self.forward(batch, pool)
            halves = tokens.half() if tokens.abs().amax() < FP16_MAX else tokens
            found.append({"tokens": halves, "mean": tokens.mean(dim=1)} | ({} if cls is None else {"cls": cls}))
            if progress:
                progress.add(len(batch))
        return {name: torch.cat([chunk[name] for chunk in found]) for name in found[0]}

    def forward(self, batch: range, pool: ThreadPoolExecutor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens and CLS of these images, fp32 on the CPU. ValueError where a feature is not finite."""
        if self.source.column:
            assert self.part.numbers is not None
            tokens, cls = column_features(self.source, self.part.numbers[batch.start : batch.stop])
        else:
            assert self.source.teacher and pool
            pixels = shown_images(self.part, batch, self.source.size, self.source.spec.interpolation, pool)
            out = self.source.teacher.forward(pixels)
            tokens, cls = out.tokens.cpu(), None if out.cls is None else out.cls.cpu()
        if not bool(torch.isfinite(tokens).all()):
            bad = int((~torch.isfinite(tokens)).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"{self.source.name}: features of {self.part.rows[batch[bad]].key!r} are not finite; "
                             "expected numbers; use --precision fp32, or check the weights")  # fmt: skip
        return tokens, cls


def refuse_foreign_column(source: FeatureSource, part: Split) -> None:
    """ValueError where a cache column should give features of images that are not its own."""
    if source.column and (part.cache is None or absolute(part.cache.path) != absolute(source.column[0].path)):
        path = source.column[0].path
        raise ValueError(f"SOURCE {source.name}: a column has features of its own cache's views only; expected DATA {path}; "
                         "give the cache as DATA, or the model itself as timm:NAME")  # fmt: skip
