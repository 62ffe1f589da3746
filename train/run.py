"""A run before its first step: everything checked, built, and brought back to where it was."""

import fcntl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mrmae.common.device import resolve_device, resolve_precision
from mrmae.common.progress import counted
from mrmae.common.versions import versions
from mrmae.extract.teachers import Teacher
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.remote import RemotePath
from mrmae.shards.spec import TeacherSpec
from mrmae.train import batches, checkpoint, online, optim
from mrmae.train.batches import Share
from mrmae.train.log import Sums
from mrmae.train.method import (
    CacheInfo,
    Optim,
    Pretrainer,
    Recipe,
    build_model,
    check_blocks,
    counts,
    difference,
    from_dict,
    needed_arrays,
    to_dict,
)
from mrmae.train.published import init_from
from mrmae.train.ranks import Ranks, agree_on

OURS = {"recipe.yaml", "run.json", "README.md", "log.jsonl", "tensorboard", "wandb", "panels", "curves.png", "student",
        "published.pth", "checkpoints", ".lock"}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Where and how a run computes: what is not part of its recipe.

    device: auto, cpu, cuda or cuda:N. kernels: auto, triton or torch. accum: micro-batches per update. workers: reading
    threads. hold_out: share of the images not trained on. knn_every: epochs per k-NN accuracy of those, 0 for none.
    online: teachers run in the step; `teachers` says which, none: the cache's own. init: published weights to start from. allow_partial: an unfinished cache will do.
    """

    device: str = "auto"
    kernels: str = "auto"
    accum: int = 1
    workers: int | None = None
    hold_out: float = 0.0
    knn_every: int = 0
    online: bool = False
    teachers: tuple[str, ...] = ()
    init: str | None = None
    allow_partial: bool = False


@dataclass
class Run:
    """One process's part of a run: what is trained, on what, and how far it is (`update` updates of `epoch`, from 0).

    numbers, held_out: the samples to train on, and those kept aside. online: the teachers that run in the step, none where
    their features are read. sums, interval: of the epoch's updates so far, and of those since the last log row. epoch_seconds:
    what the epoch took until it was last saved. skipped_in_a_row: updates up to this one that were not finite, on the device. diverged: at which
    update there were too many of them, and why; such a run does not go on.
    """

    out: Path
    recipe: Recipe
    setup: Setup
    cache: Cache
    numbers: batches.Numbers
    held_out: batches.Numbers
    info: CacheInfo
    needed: dict[str, set[str]]
    online: dict[str, Teacher]
    model: Pretrainer
    optimizer: torch.optim.AdamW
    share: Share
    ranks: Ranks
    device: torch.device
    precision: str
    updates: int
    skipped_in_a_row: Tensor
    epoch: int = 0
    update: int = 0
    sums: Sums = field(default_factory=Sums)
    interval: Sums = field(default_factory=Sums)
    epoch_seconds: float = 0.0
    diverged: str | None = None
    notes: list[str] = field(default_factory=list)
    lock: IO[bytes] | None = None

    @property
    def step(self) -> int:
        """Updates done since the beginning of the run."""
        return self.epoch * self.updates + self.update

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.recipe.optim.epochs * self.updates

    def lr(self, step: int) -> float:
        """The learning rate of the update that follows `step` updates."""
        o = self.recipe.optim
        peak = optim.base_lr(o.lr_per_256, o.batch_size)
        return optim.lr_at(
            step / self.updates, peak=peak, warmup_epochs=o.warmup_epochs, epochs=o.epochs, min_lr=o.min_lr
        )


def begin(
    cache_path: Path, out: Path, recipe: Recipe, ranks: Ranks, setup: Setup, *, warn: Callable[[str], None]
) -> Run:
    """A run ready for its next update: from the beginning, or from the newest checkpoint in `out`, which is now this process's.

    Raises ValueError for anything that does not fit: cache, recipe, batch, device, or what `out` holds.
    """
    run = build(cache_path, out, recipe, ranks, setup)
    run.lock = claim(out) if ranks.rank == 0 else None
    try:
        state = newest_state(out, ranks, warn)
        if state is not None:
            run.notes += check_continues(state, run)
            restore(run, state)
        elif setup.init is not None:
            run.notes += init_from(run.model, setup.init)
    except BaseException:
        if run.lock is not None:
            run.lock.close()
        raise
    return run


def build(cache_path: Path, out: Path, recipe: Recipe, ranks: Ranks, setup: Setup) -> Run:
    """A run at its beginning; nothing is written. Raises ValueError where cache, recipe, batch and device do not fit."""
    cache = open_needed(cache_path, recipe, setup)
    numbers, held_out = batches.split_off(cache, setup.hold_out)
    if setup.knn_every:
        batches.check_knn(cache, numbers, held_out)
    where = resolve_device(setup.device, ranks.local)
    if setup.kernels == "triton" and where.type != "cuda":
        raise ValueError(f"--kernels triton: the device is {where}; Triton runs on CUDA; use --kernels auto")
    share = Share(recipe.optim.batch_size, ranks.rank, ranks.size, setup.accum)
    info = batches.cache_info(cache)
    check_fit(recipe, info, share, len(numbers))
    check_blocks(recipe, info, cached=not setup.online)
    teachers: dict[str, Teacher] = {}
    if setup.online:
        teachers = online.build_teachers(cache, setup.teachers, device=where)
        info = online.online_info(info, teachers)
    info = batches.stored_statistics(info, cache, recipe)
    needed = needed_arrays(recipe, info)
    model = build_model(recipe, info, kernels=setup.kernels).to(where)
    return Run(
        out=out,
        recipe=recipe,
        setup=setup,
        cache=cache,
        numbers=numbers,
        held_out=held_out,
        info=info,
        needed=needed,
        online=online.only_needed(teachers, needed),
        model=model,
        optimizer=optim.build_optimizer(model, betas=recipe.optim.betas, decay=recipe.optim.weight_decay),
        share=share,
        ranks=ranks,
        device=where,
        precision=resolve_precision(recipe.optim.precision, where),
        updates=batches.updates_per_epoch(len(numbers), recipe.optim.batch_size),
        skipped_in_a_row=torch.zeros((), device=where),
    )


def open_needed(path: Path, recipe: Recipe, setup: Setup) -> Cache:
    """The cache; with allow_partial an unfinished one too, with the samples that are committed in all that the recipe reads."""
    threads = setup.workers or (None if isinstance(path, RemotePath) else batches.default_workers())
    cache = open_cache(path, allow_partial=setup.allow_partial, threads=threads)
    if cache.unfinished is None:
        return cache
    info = batches.cache_info(cache)
    needed = () if setup.online else needed_arrays(recipe, info)
    columns = [info.teachers[teacher].column for teacher in needed]
    cache = open_cache(path, allow_partial=True, columns=columns, threads=threads)
    if cache.unfinished is not None and not len(cache.numbers):
        raise ValueError(f"{path}: of this unfinished cache no shard is committed in the pixels and {', '.join(columns) or 'them'};"
                         " at least one was expected; let extract-features run on")  # fmt: skip
    return cache


def check_fit(recipe: Recipe, info: CacheInfo, share: Share, n_samples: int) -> None:
    """Raise ValueError where mask, batch or schedule do not fit, before any teacher is built."""
    counts(recipe.mask, info.n_patches)
    batches.check_share(share, n_samples)
    check_schedule(recipe.optim)


def check_schedule(o: Optim) -> None:
    """Raise ValueError where a run would never reach its peak learning rate, or would rise from there to its end."""
    if o.warmup_epochs >= o.epochs:
        raise ValueError(
            f"optim.warmup_epochs: is {o.warmup_epochs:g} in a run of {counted(o.epochs, 'epoch')}, which would never reach its learning"
            f" rate; less than optim.epochs was expected; set optim.warmup_epochs={optim.usual_warmup(o.epochs)}"
        )
    peak = optim.base_lr(o.lr_per_256, o.batch_size)
    if o.min_lr > peak:
        raise ValueError(
            f"optim.min_lr: is {o.min_lr:g}, above the peak learning rate {peak:.3g} = {o.lr_per_256:g} x {o.batch_size} / 256; at"
            " most that was expected; give a larger batch, a higher --blr, or --set optim.min_lr=0"
        )


def claim(out: Path) -> IO[bytes]:
    """Make `out` this process's own until the returned lock is closed (or the process is gone).

    Raises ValueError where `out` holds something other than a run, cannot be written, or another process trains into it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        strangers = sorted(p.name for p in out.iterdir() if p.name not in OURS and not p.name.startswith("."))
        if strangers and not (out / "run.json").exists():
            raise ValueError(
                f"{out}: is not a run of train-mrmae and not empty (it holds {strangers[0]}); give a new folder"
            )
        lock = open(out / ".lock", "ab")  # noqa: SIM115 (held as long as the run)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); give a folder that can") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"{out}: another process is training into it; wait for it, or give a new folder") from None
    except OSError:
        pass  # a file system without locks
    return lock


def newest_state(out: Path, ranks: Ranks, warn: Callable[[str], None]) -> checkpoint.State | None:
    """The checkpoint to continue from, the same on every rank; rank 0 decides which one can be read."""
    folder = out / "checkpoints"
    state = checkpoint.latest_checkpoint(folder, warn=warn) if ranks.rank == 0 else None
    step = agree_on(None if state is None else state["step"], ranks)
    return (
        state
        if ranks.rank == 0 or step is None
        else checkpoint.read_checkpoint(checkpoint.checkpoint_path(folder, step))
    )


def check_continues(state: checkpoint.State, run: Run) -> list[str]:
    """What the user should hear about continuing `state`. Raises ValueError for another cache or another recipe.

    More epochs may be asked for, with another warm-up: the schedule is a function of both, so from here on the learning rate
    follows the longer curve, and the run is not the one that was planned longer from its beginning.
    """
    old = from_dict(state["recipe"])
    longer = run.recipe.optim.epochs > old.optim.epochs

    def may_change(field: str, *_: Any) -> bool:
        return longer and field in ("optim.epochs", "optim.warmup_epochs")

    if old.name != run.recipe.name:
        raise ValueError(
            f"{run.out}: another recipe: name was {old.name} and is now {run.recipe.name}; the same one was expected; give"
            f" --recipe {old.name}, or a new OUT"
        )
    differences = difference(old, run.recipe)
    changed = checkpoint.check_same_recipe(differences, where=str(run.out), may_change=may_change)
    parts = [part.dataset_id for part in run.cache.plan.parts]
    checkpoint.check_same_cache(state["cache"], cache_ids(run), where=str(run.out), parts=parts)
    held = state.get("hold_out", 0.0)
    if held != run.setup.hold_out:
        raise ValueError(
            f"{run.out}: this run holds out {held:g} of the images and --hold-out is now {run.setup.hold_out:g}; the same"
            f" share was expected; give --hold-out {held:g}, or a new OUT"
        )
    told = ", ".join(f"{field} {was} -> {now}" for field, was, now in changed)
    return [f"longer run: {told}; from here the learning rate follows the longer schedule"] if changed else []


def cache_ids(run: Run) -> dict[str, Any]:
    """The ids of everything a run reads: data set, geometry, number of views, and its columns or teachers in the step."""
    cache = run.cache
    ids: dict[str, Any] = {"dataset": cache.ids["dataset"], "geometry": cache.ids["geometry"], "views": cache.n_views}
    if cache.unfinished is not None:
        ids[checkpoint.COMMITTED] = cache.unfinished
    if run.setup.online:
        return ids | online.online_ids(cache, run.online)
    return ids | {f"column {name}": cache.columns[run.info.teachers[name].column].id for name in sorted(run.needed)}


def teacher_specs(run: Run) -> dict[str, TeacherSpec]:
    """Every teacher there is, by name: those in the step, else the cache's."""
    if run.setup.online:
        return {name: teacher.spec for name, teacher in run.online.items()}
    return {name: run.cache.columns[teacher.column].spec for name, teacher in run.info.teachers.items()}


def random_teachers(run: Run) -> list[str]:
    """The teachers whose weights are random: every report names them."""
    return [name for name, spec in teacher_specs(run).items() if spec.weights == "random"]


def save(run: Run, *, keep: int) -> Path:
    """Write the run's state to `checkpoints/`."""
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "epoch": run.epoch,
        "update": run.update,
        "step": run.step,
        "updates_per_epoch": run.updates,
        "sums": run.sums.state(),
        "interval": run.interval.state(),
        "epoch_seconds": run.epoch_seconds,
        "skipped_in_a_row": int(run.skipped_in_a_row),
        "diverged": run.diverged,
        "recipe": to_dict(run.recipe),
        "cache": cache_ids(run),
        "hold_out": run.setup.hold_out,
        "versions": versions(),
    }
    return checkpoint.save_checkpoint(run.out / "checkpoints", state, step=run.step, keep=keep)


def restore(run: Run, state: checkpoint.State) -> None:
    """Bring `run` to where `state` was saved."""
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch, run.update = state["epoch"], state["update"]
    run.sums, run.interval, run.epoch_seconds = Sums(**state["sums"]), Sums(**state["interval"]), state["epoch_seconds"]
    run.skipped_in_a_row = torch.tensor(float(state["skipped_in_a_row"]), device=run.device)
    run.diverged = state["diverged"]
