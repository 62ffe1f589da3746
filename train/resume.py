"""A run continues: which state it is brought back to, and why it may go on from there."""

import contextlib
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from mrmae.common.versions import versions
from mrmae.train import checkpoint
from mrmae.train.foreign import init_from
from mrmae.train.kernel_choice import choice_of_state, state_of_choice
from mrmae.train.log import Sums
from mrmae.train.method import Recipe, as_begun, difference, from_dict, to_dict
from mrmae.train.ranks import Ranks, agree_on
from mrmae.train.run import Run, build_run, cache_ids
from mrmae.train.setup import Cadence, Setup

OURS = {"recipe.yaml", "run.json", "baselines.json", "README.md", "log.jsonl", "tensorboard", "wandb", "panels", "curves.png",
        "report.html", "student", "published.pth", "checkpoints", ".lock"}  # fmt: skip


def begin_or_resume(
    cache_path: Path,
    out: Path,
    recipe: Recipe,
    ranks: Ranks,
    setup: Setup,
    cadence: Cadence,
    *,
    warn: Callable[[str], None],
) -> Run:
    """A run ready for its next update: from the beginning, or from the newest checkpoint in `out`, which is now this process's.

    Raises ValueError for anything that does not fit: cache, recipe, batch, device, or what `out` holds.
    """
    begun = agree_on(bool(checkpoint.list_checkpoints(out / "checkpoints")), ranks)
    with contextlib.ExitStack() as held:
        lock = held.enter_context(claim_out(out)) if begun and ranks.rank == 0 else None
        run = continued(
            newest_state(out, ranks, warn) if begun else None, cache_path, out, recipe, ranks, setup, cadence
        )
        if not begun and ranks.rank == 0:  # only now: what does not fit leaves no folder behind
            lock = held.enter_context(claim_out(out))
            refuse_begun_meanwhile(out)
        if not begun and setup.init is not None:
            run.notes += init_from(run.model, setup.init)
            run.model.follow(0.0)
        run.lock = lock
        held.pop_all()
    return run


def continued(
    state: checkpoint.State | None,
    cache_path: Path,
    out: Path,
    recipe: Recipe,
    ranks: Ranks,
    setup: Setup,
    cadence: Cadence,
) -> Run:
    """The run of these arguments as `state` left it, or at its beginning; nothing is written.

    What the recipe leaves open is as the run began with. Raises ValueError where they do not go on from `state`.
    """
    if state is None:
        return build_run(cache_path, out, recipe, ranks, setup, cadence)
    notes = check_recipe(state, recipe := as_begun(recipe, from_dict(state["recipe"])), out)
    run = build_run(cache_path, out, recipe, ranks, setup, cadence)
    check_continues(state, run)
    restore_run(run, state)
    run.notes += notes
    return run


def refuse_begun_meanwhile(out: Path) -> None:
    """ValueError where a run was begun in `out` since it was looked at."""
    if checkpoint.list_checkpoints(out / "checkpoints"):
        raise ValueError(
            f"{out}: another process has begun a run in it meanwhile; the same command again continues that one"
        )


def claim_out(out: Path) -> IO[bytes]:
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


def check_recipe(state: checkpoint.State, recipe: Recipe, out: Path) -> list[str]:
    """What the user should hear about continuing `state` with this recipe. Raises ValueError for another one.

    More epochs may be asked for, with another warm-up: the schedule is a function of both, so from here on the learning rate
    follows the longer curve, and the run is not the one that was planned longer from its beginning.
    """
    old = from_dict(state["recipe"])
    longer = recipe.optim.epochs > old.optim.epochs

    def may_change(field: str, *_: Any) -> bool:
        return longer and field in ("optim.epochs", "optim.warmup_epochs")

    if old.name != recipe.name:
        raise ValueError(
            f"{out}: another recipe: name was {old.name} and is now {recipe.name}; the same one was expected; give"
            f" --recipe {old.name}, or a new OUT"
        )
    changed = checkpoint.check_same_recipe(difference(old, recipe), where=str(out), may_change=may_change)
    told = ", ".join(f"{field} {was} -> {now}" for field, was, now in changed)
    return [f"longer run: {told}; from here the learning rate follows the longer schedule"] if changed else []


def check_continues(state: checkpoint.State, run: Run) -> None:
    """Raise ValueError where `state` was trained on another cache, or on other images of it."""
    checkpoint.check_same_cache(state["cache"], cache_ids(run), where=str(run.out))
    held = state.get("hold_out", 0.0)
    if held != run.setup.hold_out:
        raise ValueError(
            f"{run.out}: this run holds out {held:g} of the images and --hold-out is now {run.setup.hold_out:g}; the same"
            f" share was expected; give --hold-out {held:g}, or a new OUT"
        )


def save(run: Run) -> Path:
    """Write the run's state to `checkpoints/`."""
    state = {
        "model": run.weights(),
        "optimizer": run.optimizer.state_dict(),
        "epoch": run.epoch,
        "update": run.update,
        "step": run.step,
        "updates_per_epoch": run.updates,
        "sums": run.sums.state(),
        "interval": run.interval.state(),
        "epoch_seconds": run.epoch_seconds,
        "resumed": run.resumed,
        "skipped_in_a_row": int(run.skipped_in_a_row),
        "diverged": run.diverged,
        "recipe": to_dict(run.recipe),
        "cache": cache_ids(run),
        "hold_out": run.setup.hold_out,
        "kernels": state_of_choice(run.choice),
        "versions": versions(),
    }
    return checkpoint.save_checkpoint(run.out / "checkpoints", state, step=run.step, keep=run.cadence.keep)


def restore_run(run: Run, state: checkpoint.State) -> None:
    """Bring `run` to where `state` was saved."""
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch, run.update = state["epoch"], state["update"]
    run.sums, run.interval, run.epoch_seconds = Sums(**state["sums"]), Sums(**state["interval"]), state["epoch_seconds"]
    run.resumed = sorted({*state.get("resumed", []), *([run.update] if run.update else [])})
    run.skipped_in_a_row = torch.tensor(float(state["skipped_in_a_row"]), device=run.device)
    run.diverged = state["diverged"]
    run.choice = choice_of_state(state.get("kernels"), run.device)
