"""Labels: what terms with target `labels` predict, one or several classes per image, from a file by key or from the cache itself."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from torch import Tensor

from mrmae.common.progress import counted
from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers, content_id
from mrmae.train.method import Recipe

LABELS_FORM = (
    "a .csv or .parquet with the columns key and label: a row per image and label, or in parquet a list of labels"
)


@dataclass(frozen=True)
class Labels:
    """The classes of every image of a run.

    classes: their names, sorted: class k of every head and loss is the k-th. members: class numbers of all images, one image behind the
    other; sample `n` of the cache has those from starts[n] to starts[n + 1]. id: of names and members, by key.
    """

    classes: tuple[str, ...]
    starts: Numbers
    members: Numbers
    id: str

    def rows(self, numbers: Numbers) -> UInt8[Tensor, "b k"]:
        """1 for every class that a sample has, else 0."""
        rows = torch.zeros(len(numbers), len(self.classes), dtype=torch.uint8)
        for row, number in zip(rows, numbers):
            row[self.members[self.starts[number] : self.starts[number + 1]]] = 1
        return rows


def labels_of(cache: Cache, recipe: Recipe, file: str | Path | None) -> Labels | None:
    """The labels of all images that a run reads, held out or not: of `file` (--labels), else those that the cache keeps; None where no term asks.

    Raises ValueError for images without any, naming the first, for a file that is none, and where `ce` has not one class per image.
    """
    asking = [name for name, term in recipe.terms.items() if term.target == "labels"]
    if not asking:
        if file is not None:
            raise ValueError(f"--labels {file}: no term of recipe {recipe.name} has target labels; one was expected; leave --labels out, or "
                             "add one, as in --set 'terms.labels={tap: final, positions: pooled, target: labels, distance: bce}'")  # fmt: skip
        return None
    all_keys, labels = cache.keys[:], cache.labels[:]
    keys = {number: all_keys[number] for number in cache.numbers.tolist()}
    stored = {key: (str(labels[n]),) for n, key in keys.items() if labels[n] is not None}
    given = stored if file is None else read_labels(Path(file))
    where = f"--labels {file}" if file is not None else str(cache.path)
    if lacking := [key for key in keys.values() if key not in given]:
        raise ValueError(f"{where}: has no label for {len(lacking)} of {counted(len(keys), 'image')}, first {lacking[0]!r}; term {asking[0]} wants one for "
                         f"every image; {'add them to the file, or drop' if file else 'give --labels FILE, or drop'} the term with --set terms.{asking[0]}=null")  # fmt: skip
    found = {number: given[key] for number, key in keys.items()}
    single = [name for name in asking if recipe.terms[name].distance == "ce"]
    if single and (wrong := [number for number, names in found.items() if len(names) != 1]):
        raise ValueError(f"{where}: {keys[wrong[0]]!r} has the labels {list(found[wrong[0]])}, like {counted(len(wrong), 'image')} not exactly one; distance ce of term "
                         f"{single[0]} expects one class per image; use --set terms.{single[0]}.distance=bce")  # fmt: skip
    return numbered(found, keys, len(cache))


def numbered(found: Mapping[int, Sequence[str]], keys: Mapping[int, str], n: int) -> Labels:
    """Labels as class numbers, by sample number of n."""
    classes = tuple(sorted({name for names in found.values() for name in names}))
    number_of = {name: k for k, name in enumerate(classes)}
    each = {number: sorted(number_of[name] for name in names) for number, names in found.items()}
    lengths = np.array([len(each.get(number, ())) for number in range(n)], np.int64)
    members = np.array([k for number in range(n) for k in each.get(number, ())], np.int64)
    told = content_id([classes, sorted((keys[number], ks) for number, ks in each.items())])
    return Labels(classes, np.concatenate([[0], lengths.cumsum()]), members, told)


def read_labels(path: Path) -> dict[str, tuple[str, ...]]:
    """Labels by key. ValueError, naming file and key, for what is no such file and for a label that an image has twice."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        for key, told in label_rows(path):
            names = (*found.get(key, ()), *told)
            if len(set(names)) != len(names):
                raise ValueError(f"{key!r} has the label {names[-1]!r} twice")
            found[key] = names
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(
            f"--labels {path}: cannot be read as labels ({error}); expected {LABELS_FORM}; correct the file"
        ) from None
    if not any(found.values()):
        raise ValueError(f"--labels {path}: holds no label; expected {LABELS_FORM}; correct the file")
    return found


def label_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(key, labels) of every row."""
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            refuse_other_columns(reader.fieldnames or ())
            for row in reader:
                yield checked_row(row["key"], [row["label"]])
    elif path.suffix == ".parquet":
        with pq.ParquetFile(path, pre_buffer=False) as file:
            refuse_other_columns(file.schema_arrow.names)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["key", "label"], use_threads=False)
                for key, names in zip(table["key"].to_pylist(), table["label"].to_pylist()):
                    yield checked_row(key, names if isinstance(names, list) else [names])
    else:
        raise ValueError(f"the name ends in {path.suffix!r}; .csv or .parquet was expected")


def refuse_other_columns(names: Sequence[str]) -> None:
    """ValueError unless there are a key and a label."""
    if not {"key", "label"} <= set(names):
        raise ValueError(f"its columns are {list(names)}; key and label were expected")


def checked_row(key: Any, names: list[Any]) -> tuple[str, list[str]]:
    """A row's key and labels, as text. ValueError for what is neither text nor an integer, and for an empty label."""
    names = [str(name) if type(name) is int else name for name in names]
    if not isinstance(key, str) or not key or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"key {key!r} has the label {names if len(names) != 1 else names[0]!r}; text or an integer was expected"
        )
    return key, names
