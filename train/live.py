"""The part of a run that ends with its process: feed, log, clocks; and what it tells and saves along the way."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from mrmae.common.device import memory_mib
from mrmae.train import optim
from mrmae.train.feed import Feed
from mrmae.train.held_out import held_out_loss, knn_accuracy
from mrmae.train.log import Readback, RunLog, Sums
from mrmae.train.pictures import draw_run_panels, panels_path
from mrmae.train.ranks import StopRequest
from mrmae.train.run import Run, save

MAX_SKIPPED_IN_A_ROW = 3
ROW_SECONDS = 10.0  # a log row comes at least this often, however slow the updates are


@dataclass(frozen=True)
class Habits:
    """What a run does beside training, and how often. panels_every: epochs per picture, 0 for none, None for ten per run."""

    save_minutes: float
    keep: int
    log_every: int
    panels_every: int | None


@dataclass
class Live:
    """This process at work since its start: its log is rank 0's only; `row_*` begin anew with every log row."""

    feed: Feed
    log: RunLog | None
    stop: StopRequest
    habits: Habits
    readback: Readback = field(default_factory=Readback)
    started: float = field(default_factory=time.perf_counter)
    row_at: float = field(default_factory=time.perf_counter)
    saved_at: float = field(default_factory=time.perf_counter)
    epoch_at: float = field(default_factory=time.perf_counter)
    row_waited_s: float = 0.0
    row_updates: int = 0
    updates: int = 0


def take(run: Run, live: Live, *, wait: bool = False) -> None:
    """Take in the losses that have arrived, all of them with `wait`; write a log row when one is due.

    Asks for a stop, and marks the run as diverged, when too many updates in a row were skipped.
    """
    names = [term.name for term in run.model.terms]
    for at, (loss, *rest) in live.readback.ready(wait=wait):
        terms, (norm, skipped, in_a_row) = dict(zip(names, rest)), rest[len(names) :]
        run.sums.add({"loss": loss, **terms}, skipped=bool(skipped))
        run.interval.add({"loss": loss, **terms, "grad_norm": norm}, skipped=bool(skipped))
        if in_a_row >= MAX_SKIPPED_IN_A_ROW and run.diverged is None:
            live.stop.received = "divergence"
            run.diverged = (
                f"update {at}: the last {MAX_SKIPPED_IN_A_ROW} updates were not finite and were skipped:"
                f" {optim.culprit(terms)}"
            )
        slow = time.perf_counter() - live.row_at > ROW_SECONDS
        if at % live.habits.log_every == 0 or slow or at == run.total:
            write_row(run, live, at)


def write_row(run: Run, live: Live, at: int) -> None:
    """One log row of the updates since the row before: losses, speed, stall, learning rate, memory, time left."""
    now = time.perf_counter()
    seconds, updates = max(now - live.row_at, 1e-9), live.updates - live.row_updates
    means = run.interval.means()
    row = {
        "kind": "step",
        "epoch": (at - 1) // run.updates + 1,
        "epochs": run.recipe.optim.epochs,
        "step": at,
        "loss": means.pop("loss"),
        "grad_norm": means.pop("grad_norm", math.nan),
        "terms": means,
        "lr": run.lr(at - 1),
        "images_per_s": updates * run.share.batch_size / seconds,
        "stall": (live.feed.waited_s - live.row_waited_s) / seconds,
        "memory_mib": memory_mib(run.device),
        "skipped": run.interval.skipped,
        "eta_s": (now - live.started) / live.updates * (run.total - at),
        "time": time.time(),
    }
    if live.log is not None:
        live.log.write(row)
        live.log.show(row, always=at == run.total)
    run.interval, live.row_at = Sums(), now
    live.row_updates, live.row_waited_s = live.updates, live.feed.waited_s


def end_epoch(run: Run, live: Live) -> None:
    """Log the epoch's means and how the images held out do, save the beginning of the next epoch, draw panels when due."""
    take(run, live, wait=True)
    means, done, epochs = run.sums.means(), run.epoch + 1, run.recipe.optim.epochs
    row: dict[str, Any] = {
        "kind": "epoch",
        "epoch": done,
        "epochs": epochs,
        "step": run.step,
        "loss": means.pop("loss"),
        "terms": means,
        **looked_aside(run, done),
        "lr": run.lr(run.step),
        "skipped": run.sums.skipped,
        "seconds": run.epoch_seconds + time.perf_counter() - live.epoch_at,
        "memory_mib": memory_mib(run.device),
        "time": time.time(),
    }
    run.epoch_seconds, live.epoch_at = 0.0, time.perf_counter()
    if live.log is not None:
        live.log.write(row)
        live.log.show_epoch(row)
    run.epoch, run.update, run.sums = done, 0, Sums()
    save_now(run, live)
    draw_due_panels(run, live)


def draw_due_panels(run: Run, live: Live) -> None:
    """Draw the panels of the epoch that has just ended where they are due and absent: a kill may come between state and picture."""
    every, epochs = live.habits.panels_every, run.recipe.optim.epochs
    if live.log is None or run.update > 0 or run.epoch == 0 or panels_path(run, run.epoch).exists():
        return
    if due(run.epoch, epochs, math.ceil(epochs / 10) if every is None else every):
        live.log.attempt("panels", lambda: draw_run_panels(run, run.epoch))


def looked_aside(run: Run, done: int) -> dict[str, Any]:
    """What the images held out say after `done` epochs: losses, and k-NN accuracy when due; nothing where there are none."""
    found: dict[str, Any] = {}
    if len(run.held_out):
        found["held_out"] = held_out_loss(run)
    if due(done, run.recipe.optim.epochs, run.setup.knn_every):
        found["knn_top1"] = knn_accuracy(run)
    return found


def due(done: int, epochs: int, every: int) -> bool:
    """Whether something done every so many epochs (0: never), and at the end, is due after `done` of them."""
    return every > 0 and (done % every == 0 or done == epochs)


def save_now(run: Run, live: Live) -> None:
    """Save the state (rank 0), with every loss so far in its sums."""
    take(run, live, wait=True)
    now = time.perf_counter()
    run.epoch_seconds, live.epoch_at = run.epoch_seconds + now - live.epoch_at, now
    if live.log is not None:
        save(run, keep=live.habits.keep)
    live.saved_at = time.perf_counter()
