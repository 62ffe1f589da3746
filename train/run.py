"""A run before its first step: everything checked, built, and brought back to where it was."""

import contextlib
import fcntl
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from mrmae.shards.cache import Cache, open_cache
from mrmae.train import batches, checkpoint, masks, optim
from mrmae.train.batches import Share
from mrmae.train.log import Sums
from mrmae.train.model import Pretrainer, build_model
from mrmae.train.ranks import Ranks, agree_on
from mrmae.train.recipe import Recipe, difference, from_dict, to_dict
from mrmae.train.targets import CacheInfo
from mrmae.train.terms import needed_arrays

OURS = {"recipe.yaml", "run.json", "README.md", "log.jsonl", "tensorboard", "panels", "curves.png", "student", "checkpoints",
        ".lock"}  # fmt: skip


@dataclass
class Run:
    """One process's part of a run: what is trained, on what, and how far it is (`update` updates of `epoch`, from 0)."""

    out: Path
    recipe: Recipe
    cache: Cache
    info: CacheInfo
    needed: dict[str, set[str]]
    model: Pretrainer
    optimizer: torch.optim.AdamW
    share: Share
    ranks: Ranks
    device: torch.device
    precision: str
    updates: int
    epoch: int = 0
    update: int = 0
    sums: Sums = field(default_factory=Sums)
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
    cache_path: Path,
    out: Path,
    recipe: Recipe,
    ranks: Ranks,
    *,
    device: str,
    kernels: str,
    accum: int,
    workers: int | None,
    warn: Callable[[str], None],
) -> Run:
    """A run ready for its next update: from the beginning, or from the newest checkpoint in `out`, which is now this process's.

    Raises ValueError for anything that does not fit: cache, recipe, batch, device, or what `out` holds.
    """
    run = build(cache_path, out, recipe, ranks, device=device, kernels=kernels, accum=accum, workers=workers)
    run.lock = claim(out) if ranks.rank == 0 else None
    try:
        state = newest_state(out, ranks, warn)
        if state is not None:
            run.notes += check_continues(state, run)
            restore(run, state)
    except BaseException:
        if run.lock is not None:
            run.lock.close()
        raise
    return run


def build(
    cache_path: Path,
    out: Path,
    recipe: Recipe,
    ranks: Ranks,
    *,
    device: str,
    kernels: str,
    accum: int,
    workers: int | None,
) -> Run:
    """A run at its beginning; nothing is written. Raises ValueError where cache, recipe, batch and device do not fit."""
    cache = open_cache(cache_path, threads=workers or batches.default_workers())
    info = batches.cache_info(cache)
    share = Share(recipe.optim.batch_size, ranks.rank, ranks.size, accum)
    check_fit(recipe, info, share, len(cache.numbers))
    where, o = resolve_device(device, ranks), recipe.optim
    model = build_model(recipe, info, kernels=kernels).to(where)
    return Run(
        out=out,
        recipe=recipe,
        cache=cache,
        info=info,
        needed=needed_arrays(recipe, info),
        model=model,
        optimizer=optim.build_optimizer(model, betas=o.betas, decay=o.weight_decay),
        share=share,
        ranks=ranks,
        device=where,
        precision=resolve_precision(o.precision, where),
        updates=batches.updates_per_epoch(len(cache.numbers), o.batch_size),
    )


def check_fit(recipe: Recipe, info: CacheInfo, share: Share, n_samples: int) -> None:
    """Raise ValueError where recipe, cache and batch do not fit, before anything is built or written."""
    o = recipe.optim
    needed_arrays(recipe, info)
    masks.counts(recipe.mask, info.n_patches)
    batches.check_share(share, n_samples)
    if o.warmup_epochs >= o.epochs:
        raise ValueError(
            f"optim.warmup_epochs: is {o.warmup_epochs:g} in a run of {o.epochs} epochs, which would never reach its learning"
            f" rate; less than optim.epochs was expected; set optim.warmup_epochs={optim.usual_warmup(o.epochs)}"
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

    differences = difference(old, run.recipe)
    changed = checkpoint.check_same_recipe(differences, where=str(run.out), may_change=may_change)
    checkpoint.check_same_cache(state["cache"], cache_ids(run.cache, run.needed), where=str(run.out))
    told = ", ".join(f"{field} {was} -> {now}" for field, was, now in changed)
    return [f"longer run: {told}; from here the learning rate follows the longer schedule"] if changed else []


def cache_ids(cache: Cache, needed: dict[str, set[str]]) -> dict[str, Any]:
    """The ids of everything a run reads: data set, geometry, number of views, and the columns it uses."""
    ids: dict[str, Any] = {"dataset": cache.ids["dataset"], "geometry": cache.ids["geometry"], "views": cache.n_views}
    return ids | {f"column {teacher}": cache.columns[cache.teachers[teacher]].id for teacher in sorted(needed)}


def random_teachers(cache: Cache) -> list[str]:
    """The cache's teachers whose weights are random: every report names them."""
    return [teacher for teacher, column in cache.teachers.items() if cache.columns[column].spec.weights == "random"]


def resolve_device(name: str, ranks: Ranks) -> torch.device:
    """The device to train on; under torchrun each rank takes the GPU of its number. Raises ValueError for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", ranks.local)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used ({reason}); expected auto, cpu, cuda or cuda:N") from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


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
        "recipe": to_dict(run.recipe),
        "cache": cache_ids(run.cache, run.needed),
        "versions": versions(),
    }
    return checkpoint.save_checkpoint(run.out / "checkpoints", state, step=run.step, keep=keep)


def restore(run: Run, state: checkpoint.State) -> None:
    """Bring `run` to where `state` was saved."""
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch, run.update = state["epoch"], state["update"]
    run.sums = Sums(**state["sums"])


def memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the GPU where it trains on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def versions() -> dict[str, str]:
    """What the numbers may depend on: Python and the packages that compute."""
    found = {"python": platform.python_version()}
    for name in ("mrmae", "torch", "timm", "numpy", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
