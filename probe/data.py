"""What features are probed on: labelled images in a train and a test part, from folders, tars or a cache."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from mrmae.common.backend import exists, locate
from mrmae.common.files import make_folder
from mrmae.extract.images import KeptIndices, Sources, decoded, digest_images, list_sources, matches
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import FILTERS, BadImage, Pixels, SourceTable, canonical_sources, content_id, dataset_id
from mrmae.shards.format import Source as Row
from mrmae.shards.near import NearFolder

TRAIN, TEST = ("train/*",), ("test/*",)


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images in the order of their keys. image(i): uint8 [height, width, 3] of image i for as
    long as it is needed, from any thread.

    numbers: sample numbers in `cache`, whose stored views are the images; None for files, which still need a view.
    notes: what a person should hear about the listing of files.
    """

    name: str
    rows: Sequence[Row]
    image: Callable[[int], AbstractContextManager[Pixels]]
    cache: Cache | None = None
    numbers: np.ndarray[Any, np.dtype[np.int64]] | None = None
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def id(self) -> str:
        """Id of the images (keys and bytes), and of their stored views."""
        images = dataset_id(canonical_sources(self.rows))
        return content_id({"images": images, "views": self.cache.ids["geometry"]}) if self.cache else images

    def pixels(self, i: int, size: int, interpolation: str) -> Pixels:
        """The picture of image i that a model of this input size is shown: its stored view, or the evaluation view."""
        with self.image(i) as image:
            return image if self.cache else eval_view(image, size, interpolation)


@dataclasses.dataclass(frozen=True)
class Data:
    """Train and test part, and the sorted names of their classes. notes: said aloud."""

    train: Split
    test: Split
    classes: list[str]
    notes: tuple[str, ...] = ()

    def labels(self, part: Split) -> Int64[Tensor, "n"]:
        """Class index of every image of a part."""
        index = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([index[str(row.label)] for row in part.rows])


def open_data(
    paths: Sequence[str], home: Path, *, train_include: Sequence[str] = (), test_include: Sequence[str] = (), workers: int = 1,
    partial: Sequence[str] | None = None, divided: bool = True, labelled: bool = True, near: NearFolder | None = None,
) -> Data:  # fmt: skip
    """Train and test part of DATA: one path with train/ and test/ (or patterns), a train and a test path, or a cache.

    partial: columns that must be committed with the pixels, of a cache that may then be unfinished.
    divided: without, one path that has no train/ and test/ is both parts at once, for what learns nothing from a train part.
    labelled: whether every image must have a class. near: where shards of a cache that is far away are kept.
    home: where digests of the files are kept, so that they are read once. Raises ValueError for missing labels, an empty
    part, fewer than two classes, classes that only the test part has, and images that are in both parts.
    """
    if len(paths) not in (1, 2):
        raise ValueError(f"DATA: {len(paths)} paths; expected one with train/ and test/, or a train and a test path")
    chosen = {"train": tuple(train_include), "test": tuple(test_include)}
    if len(paths) == 1:
        chosen = {"train": chosen["train"] or TRAIN, "test": chosen["test"] or TEST}
    try:
        train, test = (open_part(name, path, chosen[name], home, workers, partial, near)
                       for name, path in zip(chosen, [paths[0], paths[-1]]))  # fmt: skip
    except ValueError:
        if divided or len(paths) > 1 or train_include or test_include:
            raise
        train = test = open_part("whole", paths[0], (), home, workers, partial, near)
    return checked(train, test, labelled=labelled)


def open_part(
    name: str, path: str, include: Sequence[str], home: Path, workers: int, partial: Sequence[str] | None,
    near: NearFolder | None,
) -> Split:  # fmt: skip
    if exists(locate(path) / "plan.json"):
        return cache_part(name, path, include, partial, near)
    kept = KeptIndices(home / "digests" / "tars", home / "digests" / "near")
    try:
        sources = list_sources([path], include, kept=kept)
    except ValueError as error:
        option = f" (the {name} part; choose it with --{name}-include 'PATTERN', or give two paths)"
        raise ValueError(f"DATA: {error}{option if include else ''}") from None
    spool = home / "digests" / f"{content_id([path, list(include)])[7:23]}.jsonl"
    make_folder(spool.parent)
    order = pc.array_sort_indices(sources.keys.array).to_pylist()
    digests = digest_images(sources, order, spool, workers=workers, kept=kept)
    return Split(name, list(digests), functools.partial(read_file, sources, order), notes=sources.notes)


@contextlib.contextmanager
def read_file(sources: Sources, order: Sequence[int], i: int) -> Iterator[Pixels]:
    """Image i of those in `order`, decoded. ValueError naming it where it does not decode: a probe never skips an image silently."""
    with contextlib.ExitStack() as held:
        try:
            image = held.enter_context(decoded(sources.read(order[i])))
        except BadImage as error:
            raise ValueError(
                f"{sources.where(order[i])}: {error.reason}; every image counts in a probe; repair or remove it"
            ) from None
        yield image


def cache_part(
    name: str, path: str, include: Sequence[str], partial: Sequence[str] | None, near: NearFolder | None = None
) -> Split:
    """The samples of a cache whose keys match, with the first stored view of each."""
    cache = open_cache(path, allow_partial=partial is not None, columns=partial, near=near)
    if not cache.encoding.as_shown:
        raise ValueError(f"DATA {path}: its views are {cache.encoding.words}; RGB views were expected, of which all sources can be probed; give the "
                         "images as RGB")  # fmt: skip
    if not len(cache.numbers):
        raise ValueError(f"DATA {path}: no image of this cache can be read: no shard is committed in all views and columns that its "
                         "plan.json tells of, or all images are bad; see inspect-cache verify, or let extract-features run on")  # fmt: skip
    rows = list(SourceTable(cache.table))
    numbers = np.array([n for n in cache.numbers if matches(rows[n].key, include)], np.int64)
    if not len(numbers):
        raise ValueError(f"DATA {path}: none of {len(cache.numbers)} keys match {' '.join(include)}, like "
                         f"{rows[0].key!r}; expected the {name} part; choose it with --{name}-include 'PATTERN'")  # fmt: skip
    numbers = numbers[np.argsort([rows[n].key for n in numbers], kind="stable")]

    def image(i: int) -> AbstractContextManager[Pixels]:
        return contextlib.nullcontext(cache.read_pixels([int(numbers[i])], [0])[0].numpy())

    return Split(name, [rows[n] for n in numbers], image, cache, numbers)


def checked(train: Split, test: Split, *, labelled: bool) -> Data:
    """The data, once every image has a class that can be learnt where it must, with what should be heard about it."""
    if train is not test:
        refuse_same_images(train, test)
    if not labelled:
        names = sorted({str(row.label) for row in train.rows})
        return Data(train, test, names, tuple(dict.fromkeys([*train.notes, *test.notes])))
    for part in (train, test):
        if unlabelled := [row.key for row in part.rows if row.label is None]:
            raise ValueError(f"DATA: {len(unlabelled)} of {len(part)} {part.name} images have no label, first {unlabelled[0]!r}; "
                             "expected one folder per class (or .cls members); sort them into folders")  # fmt: skip
    known, asked = ({str(row.label) for row in part.rows} for part in (train, test))
    if len(known) < 2:
        raise ValueError(f"DATA: the train part has one class only, {min(known)!r}; expected at least two; "
                         "is the parent folder of each image its class?")  # fmt: skip
    if unknown := sorted(asked - known):
        raise ValueError(f"DATA: class {unknown[0]!r} is in the test part and not in the train part ({len(unknown)} such "
                         "classes); nothing can be learnt about it; add train images, or leave it out")  # fmt: skip
    return Data(train, test, sorted(known), tuple(notes_on(train, test, known - asked)))


def notes_on(train: Split, test: Split, absent: set[str]) -> list[str]:
    said = list(dict.fromkeys([*train.notes, *test.notes]))
    if train.cache and train.cache.unfinished:
        said.append(f"UNFINISHED cache: {train.cache.unfinished} are committed; only these are probed")
    if absent:
        said.append(f"{len(absent)} of the classes have no test image ({', '.join(sorted(absent)[:5])}): the accuracy says "
                    "nothing about them")  # fmt: skip
    contents = {row.sha256 for row in train.rows}
    if twins := [row.key for row in test.rows if row.sha256 in contents]:
        said.append(f"{len(twins)} test images have the bytes of a train image under another name, first {twins[0]!r}")
    if len(train) == len({row.label for row in train.rows}):
        said.append(
            "one train image per class: nothing can be held out, and accuracies depend on which images these are"
        )
    return said


def refuse_same_images(train: Split, test: Split) -> None:
    """ValueError where an image is in both parts: by its place (patterns overlap) or by its bytes under the same name."""
    here = {(row.key, row.sha256) for row in train.rows}
    if both := [row.key for row in test.rows if (row.key, row.sha256) in here]:
        raise ValueError(f"DATA: {len(both)} images are in the train and in the test part, first {both[0]!r}; expected "
                         "disjoint parts; correct --train-include and --test-include")  # fmt: skip


def shared_with(test: Split, images: Sequence[Row]) -> list[str]:
    """Keys of test images that are among these, by key or by bytes."""
    rows = [row for row in images if row.key]
    keys, contents = {row.key for row in rows}, {row.sha256 for row in rows}
    return [row.key for row in test.rows if row.key in keys or row.sha256 in contents]


# --- views


def eval_view(image: Pixels, size: int, interpolation: str) -> UInt8[np.ndarray[Any, Any], "size size 3"]:
    """The deterministic evaluation view: shorter side resized to 256/224 of `size`, then the centred square.

    MAE's evaluation (224 of 256), for any input size; Pillow's antialiased filter.
    """
    height, width = image.shape[:2]
    short = round(size * 256 / 224)
    scale = short / min(height, width)
    h, w = max(short, round(height * scale)), max(short, round(width * scale))
    out = Image.fromarray(image).resize((w, h), FILTERS.get(interpolation, Image.Resampling.NEAREST))
    top, left = round((h - size) / 2), round((w - size) / 2)
    return np.asarray(out, np.uint8)[top : top + size, left : left + size].copy()


def stored_view(part: Split, size: int, interpolation: str) -> dict[str, Any]:
    """What the shown pictures are, in plain values (hashed)."""
    if part.cache:
        return {"stored_view": 0, "px": part.cache.size}
    return {"resize_shorter_side": round(size * 256 / 224), "centre_crop": size, "interpolation": interpolation}


def shown_images(
    part: Split, positions: Sequence[int], size: int, interpolation: str, pool: ThreadPoolExecutor
) -> UInt8[Tensor, "b h w 3"]:
    """The pictures of these images, stacked."""
    pictures = pool.map(lambda i: part.pixels(i, size, interpolation), positions)
    return torch.from_numpy(np.stack(list(pictures)))
