"""A run before its first step: what is trained, on what, on which device, and how far it is."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mrmae.common.device import resolve_device, resolve_precision
from mrmae.common.progress import counted
from mrmae.extract.boxes import BoxFile
from mrmae.extract.teachers import Teacher
from mrmae.kernels.choose import Choice
from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers, TeacherSpec
from mrmae.train import batches, checkpoint, online, optim
from mrmae.train.batches import Share
from mrmae.train.elsewhere import check_exports
from mrmae.train.fit import fitted_bands, fitted_decoder, fitted_to_data, small_rate_words
from mrmae.train.labels import Labels, labels_of
from mrmae.train.log import Sums
from mrmae.train.method import (
    MAP,
    CacheInfo,
    Pretrainer,
    Recipe,
    as_begun,
    build_model,
    check_blocks,
    needed_arrays,
    replaced,
    student_size,
)
from mrmae.train.pairs import Pairs, pairs_for
from mrmae.train.ranks import Ranks
from mrmae.train.setup import CADENCE, Cadence, Setup, check_fit, open_needed, refuse_small_near


@dataclass
class Run:
    """One process's part of a run: what is trained, on what, and how far it is (`update` updates of `epoch`, from 0).

    recipe: nothing in it is open any more. cache: as the run knows it, with no other columns and views. unread: what it holds
    besides, and why that is not read. numbers, held_out: the samples to train on, and those kept aside. online: the teachers that run in the step, none where
    their features are read. sums, interval: of the epoch's updates so far, and of those since the last log row. epoch_seconds:
    what the epoch took until it was last saved. resumed: after which of the epoch's updates the run was continued. skipped_in_a_row: updates up to this one that were not finite, on the device. diverged: at which
    update there were too many of them, and why; such a run does not go on. labels, boxes: where a term asks for them. baselines: per term what predictions that never see an
    image cost (baselines.py). pairs: where partners are other images. choice: who computes the kernels, once that is settled (kernel_choice.py).
    """

    out: Path
    recipe: Recipe
    setup: Setup
    cadence: Cadence
    cache: Cache
    unread: dict[str, str]
    numbers: Numbers
    held_out: Numbers
    info: CacheInfo
    needed: dict[str, set[str]]
    online: dict[str, Teacher]
    model: Pretrainer
    optimizer: optim.Optimizer
    share: Share
    ranks: Ranks
    device: torch.device
    precision: str
    updates: int
    skipped_in_a_row: Tensor
    labels: Labels | None = None
    boxes: BoxFile | None = None
    epoch: int = 0
    update: int = 0
    sums: Sums = field(default_factory=Sums)
    interval: Sums = field(default_factory=Sums)
    epoch_seconds: float = 0.0
    resumed: list[int] = field(default_factory=list)
    diverged: str | None = None
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: Pairs | None = None
    choice: Choice | None = None
    lock: IO[bytes] | None = None

    @property
    def step(self) -> int:
        """Updates done since the beginning of the run."""
        return self.epoch * self.updates + self.update

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch == self.recipe.optim.epochs

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.recipe.optim.epochs * self.updates

    def lr(self, step: int) -> float:
        """The learning rate of the update that follows `step` updates."""
        o = self.recipe.optim
        peak = optim.base_lr(o.lr_per_256, o.batch_size, o.lr_scale, o.lr_rule)
        lowest = peak if o.name == "schedule-free" else o.min_lr
        return optim.lr_at(
            step / self.updates, peak=peak, warmup_epochs=o.warmup_epochs, epochs=o.epochs, min_lr=lowest
        )

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict as it is evaluated, exported and saved: averaged where the optimiser averages."""
        if isinstance(self.optimizer, optim.ScheduleFreeAdamW):
            return self.optimizer.averaged(self.model)
        return self.model.state_dict()

    def evaluated(self) -> "Run":
        """The run to evaluate, draw and export: itself, or one whose model is a copy with the averaged `weights`."""
        if not isinstance(self.optimizer, optim.ScheduleFreeAdamW):
            return self
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.weights())
        return replace(self, model=model)


def build_run(
    cache_path: Path, out: Path, recipe: Recipe, ranks: Ranks, setup: Setup, cadence: Cadence = CADENCE
) -> Run:
    """A run at its beginning; nothing is written. Raises ValueError where cache, recipe, batch and device do not fit."""
    whole = open_needed(cache_path, recipe, setup, files=ranks.local == 0)
    cache = whole.narrowed(recipe.prepare.columns, recipe.prepare.views, recipe.prepare.images)
    numbers, held_out = batches.split_off(cache, setup.hold_out)
    told: list[str] = []
    pairs = pairs_for(recipe, cache, None if setup.pairs is None else Path(setup.pairs))
    if pairs is not None:
        numbers, held_out, pairs, told = paired(pairs, numbers, held_out)
    told += batches.without_knn(cache, numbers, held_out) if cadence.probe_every else []
    where = device_of(setup, ranks)
    recipe, notes = fitted_to_data(recipe, len(numbers), ranks.size * setup.accum * recipe.mask.joined)
    recipe, of_bands = fitted_bands(recipe, cache, numbers)
    share = Share(recipe.optim.batch_size, ranks.rank, ranks.size, setup.accum)
    labels, boxes = labels_of(cache, recipe, setup.labels), batches.boxes_of(cache, recipe, setup.boxes)
    info = replace(batches.cache_info(cache), classes=() if labels is None else labels.classes)
    check_fit(recipe, info, share, len(numbers))
    check_blocks(recipe, info, cached=not setup.online)
    info, needed, teachers = targets_of(cache, recipe, setup, info, where)
    refuse_small_near(cache, columns_read(info, needed, online=setup.online))
    recipe, of_decoder = closed(recipe, cache, info, needed, online=setup.online)
    model = build_model(recipe, info, kernels=setup.kernels).to(where)
    check_exports(model, setup.export)
    return Run(
        out=out,
        recipe=recipe,
        setup=setup,
        cadence=cadence,
        cache=cache,
        unread=unread(whole, cache, {info.column(target) for target in needed}),
        numbers=numbers,
        held_out=held_out,
        info=info,
        needed=needed,
        online=teachers,
        model=model,
        optimizer=optim.build_optimizer(
            model, betas=recipe.optim.betas, decay=recipe.optim.weight_decay, name=recipe.optim.name
        ),
        share=share,
        ranks=ranks,
        device=where,
        precision=resolve_precision(recipe.optim.precision, where),
        updates=batches.updates_per_epoch(len(numbers), recipe.optim.batch_size),
        skipped_in_a_row=torch.zeros((), device=where),
        labels=labels,
        boxes=boxes,
        notes=[*told, *notes, *of_bands, *of_decoder, *small_rate_words(recipe)],
        pairs=pairs,
    )


def device_of(setup: Setup, ranks: Ranks) -> torch.device:
    """The device of this process; the kernels asked for run there."""
    where = resolve_device(setup.device, ranks.local)
    if setup.kernels == "triton" and where.type != "cuda":
        raise ValueError(f"--kernels triton: the device is {where}; Triton runs on CUDA; use --kernels auto")
    return where


def targets_of(
    cache: Cache, recipe: Recipe, setup: Setup, info: CacheInfo, where: torch.device
) -> tuple[CacheInfo, dict[str, set[str]], dict[str, Teacher]]:
    """(`info` with the statistics of targets, the arrays that terms read by target, the teachers that run in the step)."""
    teachers: dict[str, Teacher] = {}
    if setup.online:
        teachers = online.build_teachers(cache, setup.teachers, device=where)
        info = online.online_info(info, teachers)
    info = batches.stored_statistics(info, cache, recipe)
    needed = needed_arrays(recipe, info)
    return info, needed, online.only_needed(teachers, needed)


def columns_read(info: CacheInfo, needed: Mapping[str, set[str]], *, online: bool) -> list[str]:
    """The stored columns that batches read: of teachers that run in the step none, only maps."""
    read = [target for target, arrays in needed.items() if arrays and (target.startswith(MAP) or not online)]
    return [info.column(target) for target in read]


def closed(
    recipe: Recipe, cache: Cache, info: CacheInfo, needed: Collection[str], *, online: bool
) -> tuple[Recipe, list[str]]:
    """`recipe` with nothing open any more, and what to tell of it."""
    notes: list[str] = []
    if "student.decoder" in recipe.fit:
        recipe, notes = fitted_decoder(recipe, *student_size(recipe, info))
    taught = [target for target in needed if not target.startswith(MAP)]
    return pinned(recipe, cache, info, taught or (info.teachers if online else ())), notes


def paired(pairs: Pairs, numbers: Numbers, held_out: Numbers) -> tuple[Numbers, Numbers, Pairs, list[str]]:
    """(images to train on, those held out, their pairs, what to tell): an image counts where it stands first in a pair.

    A pair of which one image is held out and the other is not is left out. Raises ValueError where no pair is left to train on.
    """
    kept = pairs.within(numbers, held_out)
    if not len(mine := numbers[np.isin(numbers, kept.first)]):
        raise ValueError(
            "--pairs: no pair has two images to train on; at least one was expected; give another list or a smaller --hold-out"
        )
    left = len(pairs.first) - len(kept.first)
    told = [f"{counted(left, 'pair')} left out: one image is held out and the other is not"] if left else []
    return mine, held_out[np.isin(held_out, kept.first)], kept, told


def pinned(recipe: Recipe, cache: Cache, info: CacheInfo, needed: Collection[str]) -> Recipe:
    """`recipe` with nothing open: with the images, views and columns that it reads of `cache`, which may grow later.

    Of a teacher that is read, every tap: they decide by what name its targets go.
    """
    teachers = {info.teachers[name].column.rpartition(".")[0] for name in needed}
    columns = tuple(name for name, column in cache.columns.items() if column.spec.name in teachers)
    known = {"prepare.images": cache.plan.n_images, "prepare.views": cache.n_views, "prepare.columns": columns}
    return as_begun(recipe, replaced(recipe, known))


def unread(whole: Cache, cache: Cache, read: Collection[str]) -> dict[str, str]:
    """What `whole` holds and a run does not read, and why. cache: as the run knows it; read: its columns that are."""
    why = {True: "no term of this recipe asks for it", False: "not among the run's columns (prepare.columns)"}
    found = {f"column {name}": why[name in cache.columns] for name in whole.columns if name not in read}
    found |= {
        f"map {column.spec.name}": "nothing of this recipe names it"
        for name, column in whole.maps.items()
        if name not in read
    }
    if cache.n_views < whole.n_views:
        found["views"] = f"the run keeps to the first {cache.n_views} of {whole.n_views} (prepare.views)"
    if cache.readable.sum() < whole.readable.sum():
        found["images"] = f"the run keeps to {cache.readable.sum():,} of {whole.readable.sum():,} (prepare.images)"
    return found


def cache_ids(run: Run) -> dict[str, Any]:
    """The ids of everything a run reads: data set, geometry, number of views, and its columns or teachers in the step."""
    cache = run.cache
    ids: dict[str, Any] = {"dataset": cache.ids["dataset"], "geometry": cache.ids["geometry"], "views": cache.n_views}
    if cache.unfinished is not None:
        ids[checkpoint.COMMITTED] = cache.unfinished
    if run.labels is not None:
        ids["labels"] = run.labels.id
    if run.pairs is not None:
        ids["pairs"] = run.pairs.id
    if run.boxes is not None:
        keys = cache.keys[:]
        ids["boxes"] = run.boxes.id([keys[number] for number in cache.numbers.tolist()])
    targets = {term.teacher: run.info.target(term.teacher) for term in run.model.terms if term.teacher is not None}
    ids |= {f"statistics {name}": about.stats.id for name, about in sorted(targets.items()) if about.stats is not None}
    if run.setup.online:
        ids |= online.online_ids(cache, run.online)
    read = [target for target in sorted(run.needed) if target.startswith(MAP) or not run.setup.online]
    return ids | {f"column {target}": cache.stored[run.info.column(target)].id for target in read}


def teacher_specs(run: Run) -> dict[str, TeacherSpec]:
    """Every teacher there is, by name: those in the step, else the cache's."""
    if run.setup.online:
        return {name: teacher.spec for name, teacher in run.online.items()}
    return {name: run.cache.columns[teacher.column].spec for name, teacher in run.info.teachers.items()}


def maps_read(run: Run) -> dict[str, TeacherSpec]:
    """The maps that training reads, by name."""
    maps = [target.removeprefix(MAP) for target in sorted(run.needed) if target.startswith(MAP)]
    return {name: run.cache.maps[f"{name}.map"].spec for name in maps}


def random_teachers(run: Run) -> list[str]:
    """The teachers whose weights are random: every report names them."""
    return [name for name, spec in teacher_specs(run).items() if spec.weights == "random"]
