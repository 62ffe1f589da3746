"""From a cache to batches: which images, which view, in which order, and what is read of them.

Everything is a function of (seed, epoch, sample), so the order, the views and the masks are the same for any number of
ranks, threads or resumes. Each epoch is one permutation of all valid images that are not held out; its last partial batch
is dropped, and as the permutation changes with the epoch, so does what is dropped.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrmae.extract.boxes import BoxFile, read_box_file
from mrmae.kernels import ids
from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers
from mrmae.shards.order import EpochOrder, view_of
from mrmae.shards.stats import read_stats
from mrmae.train.method import (
    ADD,
    MAP,
    NEEDS_STATISTICS,
    Batch,
    CacheInfo,
    Draw,
    GivenBoxes,
    Masks,
    Recipe,
    Rows,
    TeacherInfo,
    chosen,
    fit_values,
    target_names,
)

Loaded = tuple[Batch, Masks | Draw]  # a draw where masks follow from what a teacher or the student will say in the step


def cache_info(cache: Cache) -> CacheInfo:
    """What the student needs to know of a cache: size, grid, and each column's width, quantiser and extras."""
    teachers = {}
    for target, name in target_names(cache.columns).items():
        column = cache.columns[name]
        teachers[target] = TeacherInfo(
            width=column.spec.width,
            channel_mean=_tensor(column.quantiser.channel_mean),
            channel_std=_tensor(column.quantiser.channel_std),
            has_cls=column.spec.has_cls,
            has_attention=column.spec.has_attention,
            column=name,
            has_scale=column.quantiser.stored.scaled,
            codebook=column.quantiser.product.tensors() if column.quantiser.stored.product else {},
        )
    derived = derived_targets(cache, teachers)
    maps = {column.spec.name: str(column.layout.map) for column in cache.maps.values() if column.spec.width == 1}
    vectors = {column.spec.name: column.spec.width for column in cache.maps.values() if column.spec.width > 1}
    kind = cache.encoding
    return CacheInfo(
        cache.size,
        cache.grid,
        teachers,
        kind.bands,
        cache.blocks,
        cache.n_views,
        derived,
        maps,
        vectors,
        unit=kind.unit,
    )


def derived_targets(cache: Cache, teachers: Mapping[str, TeacherInfo]) -> dict[str, TeacherInfo]:
    """The targets, `<teacher>:<tap>`, that follow from stored ones by their teachers' tails."""
    target_of = {about.column: target for target, about in teachers.items()}
    return {
        f"{about.spec.name}:{about.spec.tap}": replace(
            teachers[target_of[about.source]],
            width=about.spec.width,
            column=name,
            source=target_of[about.source],
            tail=cache.tail(about.spec.tail_name),
        )
        for name, about in cache.derived.items()
    }


def stored_statistics(info: CacheInfo, cache: Cache, recipe: Recipe) -> CacheInfo:
    """`info` with the exact statistics that the recipe's terms need, from where `inspect-cache stats` stored them.

    Raises ValueError where they are not there, or are of other data, and for a teacher in the step that the cache does not hold.
    """
    teachers, derived = dict(info.teachers), dict(info.derived)
    terms = [(name, term) for name, term in recipe.terms.items() if term.transform in NEEDS_STATISTICS]
    wanted = {target: name for name, term in terms for target in chosen(name, term, info)}
    for target, name in wanted.items():
        group = teachers if target in teachers else derived
        if group[target].online and group[target].column not in cache.columns:
            raise ValueError(
                f"term {name}: transform {recipe.terms[name].transform} wants statistics of teacher {target!r}, which runs "
                f"in the step and has no column in {cache.path}; statistics of cached features were expected; {ADD} {target}=..., or "
                f"use --set terms.{name}.transform=ln0"
            )
        group[target] = replace(group[target], stats=read_stats(cache, group[target].column))
    return replace(info, teachers=teachers, derived=derived)


def _tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.as_tensor(np.asarray(values, np.float32))


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process trains: `rank` of `ranks`, in `accum` micro-batches one after another."""

    batch_size: int
    rank: int = 0
    ranks: int = 1
    accum: int = 1

    @property
    def micro_size(self) -> int:
        """Images per forward pass of this process."""
        return self.batch_size // (self.ranks * self.accum)


def check_share(share: Share, n_samples: int, joined: int = 1) -> None:
    """Raise ValueError where a batch does not fit the cache, or does not split evenly over ranks and micro-batches.

    joined: images that share a sequence, which must lie in one micro-batch.
    """
    parts = share.ranks * share.accum
    if share.batch_size > n_samples:
        raise ValueError(
            f"optim.batch_size: is {share.batch_size}, more than the {n_samples} valid images of the cache to train on; an"
            f" epoch must hold at least one batch; give --batch-size {n_samples} or less"
        )
    if share.batch_size % parts:
        raise ValueError(
            f"optim.batch_size: is {share.batch_size}, which does not split evenly over {share.ranks} processes x"
            f" {share.accum} micro-batches; give a multiple of {parts}"
        )
    if share.micro_size % joined:
        raise ValueError(
            f"optim.batch_size: is {share.batch_size}, which leaves micro-batches of {share.micro_size} images to {share.ranks} processes x"
            f" {share.accum}; mask.sampler = mix joins {joined} images to a sequence; give a multiple of {parts * joined}"
        )


def updates_per_epoch(n_samples: int, batch_size: int) -> int:
    """Whole batches in one pass over the cache."""
    return n_samples // batch_size


def split_off(cache: Cache, share: float) -> tuple[Numbers, Numbers]:
    """(numbers to train on, numbers held out): the low half of each key's hash decides, so a key never changes sides.

    share: of the images to hold out, 0 <= share < 1. The order of samples on disk follows the hash's high half, so what is
    held out is spread over all shards. Raises ValueError where either side would be empty.
    """
    if share == 0:
        return cache.numbers, cache.numbers[:0]
    low = cache.hashes.numpy()[cache.numbers].view(np.uint64) & np.uint64(0xFFFFFFFF)
    held = low < share * 2**32
    if share > 0 and (held.all() or not held.any()):
        raise ValueError(
            f"--hold-out {share:g}: takes {held.sum()} of the {len(held)} valid images of the cache; at least one image on"
            f" either side was expected; give another share"
        )
    return cache.numbers[~held], cache.numbers[held]


def labelled(cache: Cache, numbers: Numbers) -> Numbers:
    """Those of `numbers` that have a label."""
    there: Numbers = numbers[np.asarray(cache.labels.array.is_valid())[numbers]]
    return there


def without_knn(cache: Cache, numbers: Numbers, held_out: Numbers) -> list[str]:
    """Why --probe-every cannot tell k-NN accuracy, which needs labels of images held out and of others; nothing where it can."""
    if not len(held_out):
        return [
            "--probe-every: RankMe alone, no images are held out; --hold-out 0.01 adds k-NN accuracy where there are labels"
        ]
    known = [len(labelled(cache, part)) for part in (numbers, held_out)]
    if all(known):
        return []
    return [
        f"--probe-every: RankMe alone, the cache has labels for {known[0]} images to train on and for {known[1]} held out"
    ]


def numbers_of_epoch(cache: Cache, numbers: Numbers, *, seed: int, epoch: int) -> EpochOrder:
    """`numbers` of the cache in the order of `epoch`: global, whatever the number of ranks."""
    return EpochOrder(numbers, cache.shard_samples, seed=seed, epoch=epoch)


def micro_batch_of(order: EpochOrder, update: int, micro: int, share: Share) -> Numbers:
    """The sample numbers of one micro-batch of this rank in update `update` of the epoch."""
    size = share.micro_size
    start = update * share.batch_size + (share.rank * share.accum + micro) * size
    return order[start : start + size]


def views_of(cache: Cache, numbers: Numbers, *, epoch: int) -> Numbers:
    """Each sample's view in this epoch: (epoch + hash) mod K, so every image goes through its views in turn."""
    return view_of(cache.hashes.numpy()[numbers], epoch, cache.n_views)


def load_batch(
    cache: Cache,
    numbers: Numbers,
    *,
    epoch: int,
    needed: Mapping[str, set[str]],
    blocks: Numbers | None = None,
    views: Numbers | None = None,
) -> Batch:
    """The batch of these samples on the host: hashes, pixels of the epoch's views (or of `views`), and only the arrays that are needed.

    needed: target -> arrays of its column (`tokens`, `scale`, `cls`, `attention`, `norm`; of a map `map`). blocks: of tokens and
    scale, the one block of each sample to read.
    """
    samples = cache.hashes[torch.from_numpy(numbers)]
    views = views_of(cache, numbers, epoch=epoch) if views is None else views
    columns = target_names(cache.columns) | {f"{MAP}{column.spec.name}": name for name, column in cache.maps.items()}

    def read(column: str, arrays: tuple[str, ...]) -> dict[str, Tensor]:
        if column in cache.maps:
            values = cache.read_column(column, numbers, views, arrays=arrays)["map"]
            return {"map": values.int() if values.dtype == torch.uint16 else values}
        if blocks is None:
            return cache.read_column(column, numbers, views, arrays=arrays)
        return cache.read_block(column, numbers, views, blocks, arrays=arrays)

    targets = {teacher: read(columns[teacher], tuple(sorted(arrays))) for teacher, arrays in needed.items() if arrays}
    rows: Rows = "grid" if blocks is None else "visible"
    pixels = cache.read_pixels(numbers, views)
    return Batch(samples=samples, pixels=pixels, targets=targets, rows=rows, epoch=torch.tensor(epoch))


def refuse_unfit_map(cache: Cache, numbers: Numbers, batch: Batch, recipe: Recipe) -> None:
    """ValueError, naming map, image and value, where a map that the recipe reads holds what it cannot use."""
    for name, term in recipe.terms.items():
        if term.classes is not None and f"{MAP}{term.map}" in batch.targets:
            held = batch.targets[f"{MAP}{term.map}"]["map"]
            if len(wrong := (held >= term.classes).nonzero()):
                image, patch = wrong[0].tolist()
                raise ValueError(
                    f"{cache.path}: map {term.map} holds {held[image, patch].item()} at patch {patch} of {cache.keys[numbers[image]]!r}; for term {name} "
                    f"ids below {term.classes} were expected; give the size of its codebook with --set terms.{name}.classes=N"
                )
    values = batch.targets.get(recipe.mask.source, {}).get("map")
    if values is None:
        return
    low, high, expected = fit_values(recipe)
    if len(wrong := ((values < low) | (values > high)).nonzero()):
        image, patch = wrong[0].tolist()
        raise ValueError(
            f"{cache.path}: map {recipe.mask.source.removeprefix(MAP)} holds {values[image, patch].item():g} at patch {patch} of "
            f"{cache.keys[numbers[image]]!r}; for mask.sampler {recipe.mask.sampler} {expected}"
        )


def boxes_of(cache: Cache, recipe: Recipe, file: str | Path | None) -> BoxFile | None:
    """The boxes of `file` (--boxes); None where no term reads boxes.

    Raises ValueError where a term reads some and there is no file, or the other way round, and for boxes that do not fit the images.
    """
    asking = [name for name, term in recipe.terms.items() if term.target == "boxes"]
    if not asking and file is not None:
        raise ValueError(
            f"--boxes {file}: no term of recipe {recipe.name} reads boxes; one was expected; leave --boxes out, or use --recipe mom"
        )
    if asking and file is None:
        raise ValueError(
            f"term {asking[0]}: reads boxes, which no cache holds; a file of them was expected; give --boxes FILE, or drop the term with "
            f"--set terms.{asking[0]}=null"
        )
    if file is None:
        return None
    boxes = read_box_file(Path(file))
    boxes.refuse_unfit(cache, cache.numbers)
    return boxes


def boxes_seen(cache: Cache, numbers: Numbers, boxes: BoxFile, recipe: Recipe, *, epoch: int) -> GivenBoxes:
    """The boxes in these samples' views of an epoch, `student.boxes.most` of each at most, and which cells of each are hidden.

    Which boxes, where there are more, and which cells, are hashes of (seed, epoch, sample, box of the image).
    """
    assert (asked := recipe.student.boxes) is not None
    at = torch.zeros(len(numbers), asked.most, 4)
    hidden = torch.arange(asked.hide).repeat(len(numbers), asked.most, 1)
    hashes, told = cache.hashes[torch.from_numpy(numbers)], {"seed": recipe.seed, "epoch": epoch}
    for row, (number, view) in enumerate(zip(numbers.tolist(), views_of(cache, numbers, epoch=epoch).tolist())):
        corners, which = boxes.seen(cache.keys[number], cache.read_crop(number, view), cache.size)
        if not len(which):
            continue
        of, hash = int(which[-1]) + 1, hashes[row : row + 1]
        noise = ids.patch_noise(hash, of, **told, stream="boxes")[0].numpy()[which]
        chosen = np.sort(noise.argsort()[: asked.most])
        own = ids.mix(hash ^ torch.from_numpy(which[chosen] + 1))
        order = ids.patch_noise(own, asked.cells**2, **told, stream="cells").argsort(dim=1)
        at[row, : len(chosen)] = torch.from_numpy(corners[chosen]).float()
        hidden[row, : len(chosen)] = order[:, : asked.hide].sort(dim=1).values
    return GivenBoxes(at, hidden)


@dataclass(frozen=True)
class Position:
    """A point in a run: `update` updates of epoch `epoch` (both from 0) are done."""

    epoch: int
    update: int


def jobs(start: Position, *, epochs: int, updates: int, accum: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, update, micro) of every micro-batch from `start` to the end of the run."""
    for epoch in range(start.epoch, epochs):
        for update in range(start.update if epoch == start.epoch else 0, updates):
            for micro in range(accum):
                yield epoch, update, micro


def tensors_of(loaded: Loaded, change: Callable[[Tensor], Tensor]) -> Loaded:
    """The same batch and masks with every tensor replaced by `change(tensor)`."""
    batch, masks = loaded
    return batch.change(change), masks if isinstance(masks, Draw) else masks.change(change)


def reads_only_visible(recipe: Recipe) -> bool:
    """Whether teachers' tokens are read at visible patches, at all of them, so that the others need not leave the host."""
    return recipe.student.prune is None and not any(
        t.at("predicted", "all", "pooled") for t in recipe.terms.values() if t.target == "teachers"
    )


def visible_rows(batch: Batch, masks: Masks) -> Batch:
    """The same batch with only the visible rows of every teacher's tokens and scales: a quarter of the bytes to copy.

    Of several masks per image, each has rows of its own. Of a partner that is seen whole all rows stay.
    """
    partner = batch.partner
    if partner is not None and masks.ids_partner is not None and partner.targets:
        shown = masks.ids_partner
        if shown.shape[1] < masks.ids_keep.shape[1] + masks.ids_predict.shape[1]:
            partner = visible_rows(partner, Masks(shown, shown[:, :0]))
    rows = torch.arange(len(masks.ids_keep))[:, None] % len(batch.samples)
    targets = {
        teacher: {name: v[rows, masks.ids_keep] if name in ("tokens", "scale") else v for name, v in arrays.items()}
        for teacher, arrays in batch.targets.items()
    }
    return replace(batch, targets=targets, rows="visible", partner=partner)


def default_workers() -> int:
    """Reading threads: one fewer than the cores this process may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))
