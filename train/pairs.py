"""Pairs: which view stands beside an image's own in an epoch, another of its stored views or the other image of a pair."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mrmae.common.progress import counted
from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers, content_id
from mrmae.shards.order import view_of
from mrmae.train.method import Recipe

PAIR_COLUMNS = ["key", "partner"]
PAIR_FORM = "two keys a row were expected, in a .csv (its first line may be key,partner) or in the columns key and partner of a .parquet"


@dataclass(frozen=True)
class Pairs:
    """Pairs of sample numbers, ascending in `first`, else in the order they were given. id: of the keys as given."""

    first: Numbers
    second: Numbers
    id: str

    def within(self, *groups: Numbers) -> "Pairs":
        """The pairs both of whose images are in the same group."""
        kept = np.zeros(len(self.first), bool)
        for group in groups:
            kept |= np.isin(self.first, group) & np.isin(self.second, group)
        return Pairs(self.first[kept], self.second[kept], self.id)

    def partners(self, numbers: Numbers, hashes: Numbers, epoch: int) -> Numbers:
        """One partner of each of these images: number (epoch + hash) mod how many it has, so that it goes through them in turn.

        An image that is first in no pair, which only pictures show, stands beside itself.
        """
        start, end = (np.searchsorted(self.first, numbers, side) for side in ("left", "right"))
        n = np.maximum(end - start, 1)
        turn = (epoch + (hashes.view(np.uint64) % n.astype(np.uint64)).astype(np.int64)) % n
        found: Numbers = np.where(end > start, self.second[np.minimum(start + turn, len(self.second) - 1)], numbers)
        return found


def partners_of(cache: Cache, numbers: Numbers, pairs: Pairs | None, *, epoch: int) -> tuple[Numbers, Numbers]:
    """(sample numbers, views) of the partners in an epoch.

    Without pairs: the same images in another view than their own, all others in turn.
    """
    hashes = cache.hashes.numpy()
    if pairs is not None:
        numbers = pairs.partners(numbers, hashes[numbers], epoch)
        return numbers, view_of(hashes[numbers], epoch, cache.n_views)
    k = cache.n_views
    own = view_of(hashes[numbers], epoch, k)
    return numbers, (own + 1 + epoch // k % (k - 1)) % k


def pairs_for(recipe: Recipe, cache: Cache, path: Path | None) -> Pairs | None:
    """The list that a run's pairs come from; None where they are views of one image, or there are none.

    Raises ValueError for a list that the recipe does not read or the cache does not hold, and where a recipe wants two views of one.
    """
    if not recipe.prepare.pair:
        if path is not None:
            raise ValueError(
                f"--pairs {path}: recipe {recipe.name} pairs nothing; prepare.pair was expected, as in recipe croco; leave the option out"
            )
        return None
    if path is not None:
        return read_pairs(path, cache)
    if cache.n_views < 2:
        raise ValueError(
            f"{cache.path}: recipe {recipe.name} pairs two views of an image and reads {counted(cache.n_views, 'view')} of each; 2 at least were "
            "expected; give the command that made the cache again with --views 2, or a list of pairs by --pairs FILE"
        )
    return None


def read_pairs(path: Path, cache: Cache) -> Pairs:
    """The pairs of a file. Raises ValueError, naming file, line and key, for one whose image the run does not have, or that is no pair."""
    keys = cache.keys[:]
    numbers = {keys[number]: number for number in cache.numbers.tolist()}
    found, given = [], []
    for where, row in rows_of_pairs(path):
        if len(row) != 2:
            raise ValueError(f"--pairs {where}: holds {counted(len(row), 'value')}; {PAIR_FORM}; correct the line")
        for key in row:
            if key not in numbers:
                raise ValueError(
                    f"--pairs {where}: there is no image {key!r} among the {len(numbers):,} that the run reads of {cache.path}; keys as inspect-cache "
                    "names them were expected; correct the list, or add the image with extract-features --append"
                )
        if row[0] == row[1]:
            raise ValueError(
                f"--pairs {where}: pairs {row[0]!r} with itself; two images were expected; correct the line"
            )
        given.append(row)
        found.append([numbers[key] for key in row])
    if not found:
        raise ValueError(f"--pairs {path}: holds no pair; {PAIR_FORM}; give another file")
    table = np.array(found, np.int64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Pairs(table[:, 0].copy(), table[:, 1].copy(), content_id(given))


def rows_of_pairs(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(file and line, its values) of every pair. Raises ValueError where the file cannot be read as a list."""
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            if table.column_names[:2] != PAIR_COLUMNS:
                raise ValueError(f"has the columns {', '.join(table.column_names) or 'none'}; {PAIR_FORM}")
            for i, pair in enumerate(zip(*(table[name].to_pylist() for name in PAIR_COLUMNS)), start=1):
                yield f"{path}, row {i}", ["" if value is None else str(value) for value in pair]
            return
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row and not (reader.line_num == 1 and row == PAIR_COLUMNS):
                    yield f"{path}, line {reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"--pairs {path}: cannot be read ({type(error).__name__}: {error}); {PAIR_FORM}") from error
