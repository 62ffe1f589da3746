"""Training, top to bottom: batch, schedule, step, log, save.

`train` is what `train-mrmae` calls, and what a notebook calls. The same call again continues a run that was stopped or
killed, on the CPU in fp32 to the same bits: order, views and masks are functions of (seed, epoch, sample).
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mrmae.common.backend import expect_utf8, locate
from mrmae.common.device import memory_mib
from mrmae.common.progress import counted, human_time
from mrmae.train import cost, optim, report
from mrmae.train.baselines import baselines_of, explained_shares
from mrmae.train.checkpoint import checkpoint_path
from mrmae.train.elsewhere import EXPORTS
from mrmae.train.export import export_student
from mrmae.train.feed import Feed, feed_of
from mrmae.train.held_out import held_out_loss, probe_student
from mrmae.train.kernel_choice import settle_kernels
from mrmae.train.log import Readback, RunLog, Sums, read_rows, warn
from mrmae.train.method import Recipe, running_statistics
from mrmae.train.online import with_targets
from mrmae.train.pictures import draw_curves, draw_run_panels, panels_path
from mrmae.train.ranks import (
    StopRequest,
    agree_on,
    failing_together,
    join_ranks,
    mean_over_ranks,
    replicated,
    stop_requests,
)
from mrmae.train.resume import begin_or_resume, save
from mrmae.train.run import Run
from mrmae.train.run_page import write_run_page
from mrmae.train.setup import CADENCE, SETUP, Cadence, Setup

MAX_SKIPPED_IN_A_ROW = 3
TIMED_UPDATES = 10  # after the first one, which compiles and warms up
SHOWN_SECONDS = 10.0  # progress is shown at least this often, however many updates a log row is of


class Diverged(RuntimeError):
    """Several updates in a row were not finite: which term, and where the state was saved."""


@dataclass
class Loop:
    """The part of a run that ends with its process: feed, log (rank 0's only), clocks.

    `row_*` begin anew with every log row.
    """

    feed: Feed
    log: RunLog | None
    stop: StopRequest
    readback: Readback = field(default_factory=Readback)
    started: float = field(default_factory=time.perf_counter)
    row_at: float = field(default_factory=time.perf_counter)
    shown_at: float = field(default_factory=time.perf_counter)
    timed_at: float = field(default_factory=time.perf_counter)
    saved_at: float = field(default_factory=time.perf_counter)
    epoch_at: float = field(default_factory=time.perf_counter)
    row_waited_s: float = 0.0
    row_updates: int = 0
    updates: int = 0


def train(
    cache_path: str | Path,
    out: str | Path,
    recipe: Recipe,
    setup: Setup = SETUP,
    cadence: Cadence = CADENCE,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train the student of `recipe` on a finished cache; returns a summary of the run.

    out: a new or empty folder, or one holding the same run, which then continues. Filled with checkpoints/, log.jsonl,
    tensorboard/, panels/, curves.png, report.html, student/ (for timm), recipe.yaml, run.json and README.md. Where it can be
    written, the cache gets stats/baselines.json, which the next run reads.
    Summary: out, student (None until finished), finished, stopped (a signal's name or None), epoch, epochs, step, loss, terms,
    updates, seconds, images_per_s and stall (since this start), notes.
    SIGTERM, SIGUSR1 and Ctrl-C end the run after the update in flight, saved; its page says so.
    Raises ValueError for anything in recipe, cache or OUT that does not fit; OSError where OUT cannot be written; Diverged
    after three updates in a row that were not finite, and again when such a run is continued; OtherRankFailed where another
    process of the run failed first.
    """
    expect_utf8(out, "OUT")
    ranks = join_ranks()
    talk = console or Console(highlight=False, soft_wrap=True, quiet=ranks.rank > 0)
    with failing_together(ranks), contextlib.ExitStack() as stack:
        told = functools.partial(warn, talk)
        run = begin_or_resume(locate(cache_path), Path(out), recipe, ranks, setup, cadence, warn=told)
        stack.enter_context(run.lock or contextlib.nullcontext())
        check_converges(run)
        settle_kernels(run, warn=told)
        run.baselines = baselines_of(run, console=talk)
        command = setup.command or f'train("{cache_path}", "{out}", recipe)'
        log = stack.enter_context(begin_log(run, command, talk)) if ranks.rank == 0 else None
        stop = stack.enter_context(stop_requests(ranks))
        feed = stack.enter_context(feed_of(run))
        loop = Loop(feed, log, stop)
        run_epochs(run, loop, forward_of(run))
        if run.diverged and log is not None:
            report.add_facts(run, stopped=f"diverged at {run.diverged}")
            draw_report(run, log)
        check_converges(run)
        return finish(run, loop, command)


def begin_log(run: Run, command: str, console: Console) -> RunLog:
    """The run's log, after the files that say what OUT is, and the plan, aloud."""
    report.write_run_files(run, command=command, how=start_facts(run))
    for line in report.plan_lines(run):
        console.print(line, markup=False)
    board, wandb = run.cadence.tensorboard, run.cadence.wandb
    return RunLog(run.out, step=run.step, total=run.total, console=console, tensorboard=board, wandb=wandb)


def start_facts(run: Run) -> dict[str, Any]:
    """What run.json notes of a start beside the run's setup."""
    chosen = None if run.choice is None else asdict(run.choice)
    return {"compile": run.setup.compile, "ranks": run.ranks.size, "kernels_chosen": chosen}


def check_converges(run: Run) -> None:
    """Raise Diverged where too many updates in a row were not finite, now or before this start: the same words each time."""
    if run.diverged:
        raise Diverged(
            f"{run.out}: diverged at {run.diverged}; in a new OUT, lower the learning rate (optim.lr_per_256, --blr, is"
            f" {run.recipe.optim.lr_per_256:g}) or use --precision fp32; the state after update {run.step} is saved in"
            f" {checkpoint_path(run.out / 'checkpoints', run.step)}: without this file the run goes on from the one before it"
        )


def tell_time(run: Run, loop: Loop) -> None:
    """Say, ten updates after the first, how long all that are left will take."""
    take_losses(run, loop, wait=True)  # until the device has done them
    now = time.perf_counter()
    if loop.updates == 1:
        loop.timed_at = now
    elif loop.log is not None:
        seconds = (now - loop.timed_at) / TIMED_UPDATES
        left = run.total - run.step
        until = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + left * seconds))
        loop.log.say(
            f"{TIMED_UPDATES} updates took {seconds * TIMED_UPDATES:.3g} s: about {human_time(left * seconds)} for the {left:,} that are left, until {until}"
        )


def run_epochs(run: Run, loop: Loop, forward: Callable[..., Any]) -> None:
    """Train until the last epoch is done or a stop is asked for; the state is saved whenever this returns."""
    draw_due_panels(run, loop)
    while run.epoch < run.recipe.optim.epochs:
        optim.set_lr(run.optimizer, run.lr(run.step))
        values = step(run, loop, forward)
        run.update += 1
        loop.updates += 1
        loop.readback.push(run.step, values)
        take_losses(run, loop)
        if loop.updates in (1, 1 + TIMED_UPDATES):
            tell_time(run, loop)
        stopping = loop.stop.agreed()
        if run.update == run.updates:
            end_epoch(run, loop)
        elif stopping or time.perf_counter() - loop.saved_at > 60 * run.cadence.save_minutes:
            save_state(run, loop)
        if stopping:
            return


def step(run: Run, loop: Loop, forward: Callable[..., Any]) -> Tensor:
    """One update: forward and backward over its micro-batches, then the optimiser's. Nothing waits for the device.

    Returns the vector [loss, terms.., gradient norm, skipped, skipped in a row] on the device.
    """
    run.optimizer.zero_grad(set_to_none=True)
    parts, bf16 = [], run.precision == "bf16"
    seen = running_statistics(run.model)
    before = [x.clone() for x in seen]
    for micro in range(run.share.accum):
        batch, masks = with_targets(next(loop.feed), run.online, run.needed, model=run.model)
        last = micro == run.share.accum - 1
        with contextlib.nullcontext() if last else getattr(forward, "no_sync", contextlib.nullcontext)():
            with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
                loss, terms = forward(batch, masks)
            (loss / run.share.accum).backward()
        parts.append(torch.stack([loss.detach(), *terms.values()]))
    norm = optim.gradient_norm(run.model.parameters())
    optim.clip_gradients(run.model.parameters(), norm, run.recipe.optim.clip_norm)
    skipped = optim.guarded_step(run.optimizer, norm)
    run.skipped_in_a_row = optim.skipped_in_a_row(run.skipped_in_a_row, skipped)
    optim.keep_where(skipped, seen, before)
    run.model.follow(optim.momentum_at(run.step, run.total, *run.recipe.optim.ema))
    losses = mean_over_ranks(torch.stack(parts).mean(0), run.ranks)
    return torch.cat([losses, torch.stack([norm, skipped, run.skipped_in_a_row]).to(losses.dtype)])


def forward_of(run: Run) -> Callable[..., Any]:
    """(batch, masks) -> (loss, terms): the model, data-parallel under several ranks, compiled if asked for."""
    model = replicated(run.model, run.ranks, run.device)
    return torch.compile(model, dynamic=False) if run.setup.compile else model


def take_losses(run: Run, loop: Loop, *, wait: bool = False) -> None:
    """Take in the losses that have arrived, all of them with `wait`; write the log row of every `log_every` updates.

    Asks for a stop, and marks the run as diverged, when too many updates in a row were skipped.
    """
    names = [term.name for term in run.model.terms]
    for at, (loss, *rest) in loop.readback.ready(wait=wait):
        terms, (norm, skipped, in_a_row) = dict(zip(names, rest)), rest[len(names) :]
        run.sums.add({"loss": loss, **terms}, skipped=bool(skipped))
        run.interval.add({"loss": loss, **terms, "grad_norm": norm}, skipped=bool(skipped))
        if in_a_row >= MAX_SKIPPED_IN_A_ROW and run.diverged is None:
            loop.stop.received = "divergence"
            run.diverged = (
                f"update {at}: the last {MAX_SKIPPED_IN_A_ROW} updates were not finite and were skipped:"
                f" {optim.culprit(terms)}"
            )
        at_row = at % run.cadence.log_every == 0 or at == run.total
        if at_row or time.perf_counter() - loop.shown_at > SHOWN_SECONDS:
            show_row(run, loop, at, write=at_row)


def show_row(run: Run, loop: Loop, at: int, *, write: bool) -> None:
    """Show where the run is and, with `write`, write the log row and begin the next one."""
    row = row_of(run, loop, at)
    loop.shown_at = time.perf_counter()
    if loop.log is not None:
        loop.log.show(row, always=at == run.total)
    if not write:
        return
    if loop.log is not None:
        loop.log.write(row)
    run.interval, loop.row_at = Sums(), loop.shown_at
    loop.row_updates, loop.row_waited_s = loop.updates, loop.feed.waited_s


def row_of(run: Run, loop: Loop, at: int) -> dict[str, Any]:
    """A log row of the updates since the row before: losses, speed, stall, learning rate, memory, time left."""
    now = time.perf_counter()
    seconds, updates = max(now - loop.row_at, 1e-9), loop.updates - loop.row_updates
    means = run.interval.means()
    return {
        "kind": "step",
        "epoch": (at - 1) // run.updates + 1,
        "epochs": run.recipe.optim.epochs,
        "step": at,
        "loss": means.pop("loss"),
        "grad_norm": means.pop("grad_norm", math.nan),
        "terms": means,
        "lr": run.lr(at - 1),
        "images_per_s": updates * run.share.batch_size / seconds,
        "stall": (loop.feed.waited_s - loop.row_waited_s) / seconds,
        "memory_mib": memory_mib(run.device),
        "skipped": run.interval.skipped,
        "eta_s": (now - loop.started) / loop.updates * (run.total - at),
        "time": time.time(),
    }


def end_epoch(run: Run, loop: Loop) -> None:
    """Log the epoch's means and how the images held out do, save the beginning of the next epoch, draw panels when due."""
    take_losses(run, loop, wait=True)
    means, done, epochs = run.sums.means(), run.epoch + 1, run.recipe.optim.epochs
    row: dict[str, Any] = {
        "kind": "epoch",
        "epoch": done,
        "epochs": epochs,
        "step": run.step,
        "loss": means.pop("loss"),
        "terms": means,
        "explained": explained_shares(means, run.baselines),
        **held_out_row(run, done),
        "lr": run.lr(run.step),
        "skipped": run.sums.skipped,
        **({"resumed": run.resumed} if run.resumed else {}),
        "seconds": run.epoch_seconds + time.perf_counter() - loop.epoch_at,
        "memory_mib": memory_mib(run.device),
        "time": time.time(),
    }
    run.epoch_seconds, loop.epoch_at = 0.0, time.perf_counter()
    if loop.log is not None:
        loop.log.write(row)
        loop.log.show_epoch(row)
    run.epoch, run.update, run.sums, run.resumed = done, 0, Sums(), []
    save_state(run, loop)
    draw_due_panels(run, loop)


def draw_due_panels(run: Run, loop: Loop) -> None:
    """Draw the panels of the epoch that has just ended where they are due and absent: a kill may come between state and picture."""
    every, epochs = run.cadence.panels_every, run.recipe.optim.epochs
    if loop.log is None or run.update > 0 or run.epoch == 0 or panels_path(run, run.epoch).exists():
        return
    if due(run.epoch, epochs, math.ceil(epochs / 10) if every is None else every):
        loop.log.attempt("panels", lambda: draw_run_panels(run.evaluated(), run.epoch))


def held_out_row(run: Run, done: int) -> dict[str, Any]:
    """What the images held out say after `done` epochs, nothing where there are none, and the probes when due."""
    found: dict[str, Any] = {}
    run = run.evaluated()
    if len(run.held_out):
        found["held_out"] = held_out_loss(run)
    if due(done, run.recipe.optim.epochs, run.cadence.probe_every):
        found |= probe_student(run)
    return found


def due(done: int, epochs: int, every: int) -> bool:
    """Whether something done every so many epochs (0: never), and at the end, is due after `done` of them."""
    return every > 0 and (done % every == 0 or done == epochs)


def save_state(run: Run, loop: Loop) -> None:
    """Save the state (rank 0), with every loss so far in its sums."""
    take_losses(run, loop, wait=True)
    now = time.perf_counter()
    run.epoch_seconds, loop.epoch_at = run.epoch_seconds + now - loop.epoch_at, now
    if loop.log is not None:
        save(run)
    loop.saved_at = time.perf_counter()


def finish(run: Run, loop: Loop, command: str) -> dict[str, Any]:
    """Export the student of a finished run and draw its curves and its page, or say how to continue a stopped one; the summary."""
    seconds = time.perf_counter() - loop.started
    finished = run.finished
    summary: dict[str, Any] = {
        "out": str(run.out),
        "student": None,
        "finished": finished,
        "stopped": None if finished else loop.stop.received,
        "epoch": run.epoch,
        "epochs": run.recipe.optim.epochs,
        "step": run.step,
        "updates": loop.updates,
        "seconds": seconds,
        "images_per_s": loop.updates * run.share.batch_size / seconds,
        "stall": loop.feed.waited_s / seconds,
        "notes": run.notes,
    }
    if (log := loop.log) is not None:
        rows = read_rows(log.path)
        last = rows[-1] if rows else {}
        summary |= {"loss": last.get("loss"), "terms": last.get("terms")}
        log.close()
        if finished:
            summary["student"] = str(write_results(run))
            if run.cadence.page:
                log.attempt("cost", lambda: report.add_facts(run, costs=cost.count_costs(run)))
        else:
            report.add_facts(run, stopped=report.stopped_words(run, summary["stopped"]))
        draw_report(run, log)
        for line in report.closing_lines(run, summary, command):
            log.say(line)
    result: dict[str, Any] = agree_on(summary, run.ranks)
    return result


def draw_report(run: Run, log: RunLog) -> None:
    """Draw OUT/curves.png and OUT/report.html as far as the run is."""
    if run.finished or (run.cadence.page and run.epoch):
        log.attempt("curves.png", lambda: draw_run_curves(run, log.path))
    if run.cadence.page:
        log.attempt("report.html", lambda: write_run_page(run.out))


def write_results(run: Run) -> Path:
    """Write OUT/student and, if asked for, OUT/published.pth; returns the student's folder."""
    run = run.evaluated()
    export_student(run.model, run.out / "student", source=report.card_source(run))
    for kind in run.setup.export:
        name, write = EXPORTS[kind]
        write(run.model, run.out / name)
    return run.out / "student"


def draw_run_curves(run: Run, rows: Path) -> None:
    """Write OUT/curves.png from the epochs in the log `rows`."""
    title = f"{run.recipe.name}: {run.recipe.student.model}, {counted(run.recipe.optim.epochs, 'epoch')}"
    blind = json.loads((run.out / "run.json").read_text()).get("baselines")
    note = report.random_line(run) or ""
    draw_curves(run.out / "curves.png", read_rows(rows, "epoch"), title=title, note=note, baselines=blind)
