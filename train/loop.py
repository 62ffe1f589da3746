"""Training, top to bottom: batch, schedule, step, log, save.

`train` is what `train-mrmae` calls, and what a notebook calls. The same call again continues a run that was stopped or
killed, on the CPU in fp32 to the same bits: order, views and masks are functions of (seed, epoch, sample).
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mrmae.train import batches, optim, report
from mrmae.train.batches import Feed, Loaded
from mrmae.train.checkpoint import list_checkpoints
from mrmae.train.export import export_student
from mrmae.train.log import Readback, RunLog, Sums, read_rows
from mrmae.train.masks import Draw, draw_masks
from mrmae.train.pictures import draw_curves, draw_run_panels
from mrmae.train.ranks import Ranks, StopRequest, agree_on, join, mean_over_ranks, replicated, stop_requests
from mrmae.train.recipe import Recipe
from mrmae.train.run import Run, begin, build, memory_mib, save

MAX_SKIPPED_IN_A_ROW = 3
ROW_SECONDS = 10.0  # a log row comes at least this often, however slow the updates are


class Diverged(RuntimeError):
    """Several updates in a row were not finite: which term, and where the state was saved."""


@dataclass(frozen=True)
class Habits:
    """What a run does beside training, and how often. panels_every: epochs per picture, 0 for none, None for ten per run."""

    save_minutes: float
    keep: int
    log_every: int
    panels_every: int | None


@dataclass
class Session:
    """This process at work: its feed, its log (rank 0 only), its clocks, and what was measured since the last log row."""

    feed: Feed
    log: RunLog | None
    stop: StopRequest
    habits: Habits
    in_a_row: Tensor
    readback: Readback = field(default_factory=Readback)
    interval: Sums = field(default_factory=Sums)
    started: float = field(default_factory=time.perf_counter)
    row_at: float = field(default_factory=time.perf_counter)
    saved_at: float = field(default_factory=time.perf_counter)
    epoch_at: float = field(default_factory=time.perf_counter)
    row_waited_s: float = 0.0
    row_updates: int = 0
    updates: int = 0
    diverged: str | None = None


def train(
    cache_path: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    compile: bool = False,
    kernels: str = "auto",
    workers: int | None = None,
    accum: int = 1,
    save_minutes: float = 10.0,
    keep: int = 3,
    log_every: int = 20,
    panels_every: int | None = None,
    tensorboard: bool = True,
    command: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train the student of `recipe` on a finished cache; returns a summary of the run.

    out: a new or empty folder, or one holding the same run, which then continues. Filled with checkpoints/, log.jsonl,
    tensorboard/, panels/, curves.png, student/ (for timm), recipe.yaml, run.json and README.md.
    device: auto, cpu, cuda or cuda:N. compile: torch.compile the forward pass. kernels: auto, triton or torch.
    workers: reading and decoding threads. accum: micro-batches per update in each process. save_minutes: at least this often,
    beside every epoch's end. keep: checkpoints kept. log_every: updates per log row. panels_every: epochs per picture, 0 for
    none. command: what to type to continue, for the last line and for OUT.
    Summary: out, student (None until finished), finished, stopped (a signal's name or None), epoch, epochs, step, loss, terms,
    seconds, images_per_s and stall (of this session), notes.
    SIGTERM, SIGUSR1 and Ctrl-C end the run after the update in flight, saved.
    Raises ValueError for anything in recipe, cache or OUT that does not fit; OSError where OUT cannot be written; Diverged
    after three updates in a row that were not finite.
    """
    ranks = join()
    talk = console or Console(highlight=False, soft_wrap=True, quiet=ranks.rank > 0)
    run = begin(
        Path(cache_path),
        Path(out),
        recipe,
        ranks,
        device=device,
        kernels=kernels,
        accum=accum,
        workers=workers,
        warn=lambda text: talk.print(f"WARNING {text}", markup=False, style="bold red"),
    )
    again = command or f'train("{cache_path}", "{out}", recipe)'
    with run.lock or contextlib.nullcontext(), contextlib.ExitStack() as stack:
        log = None
        if ranks.rank == 0:
            how = {"compile": compile, "kernels": kernels, "accum": accum, "ranks": ranks.size}
            report.write_run_files(run, command=again, how=how)
            for line in report.plan_lines(run):
                talk.print(line, markup=False)
            log = stack.enter_context(
                RunLog(run.out, step=run.step, total=run.total, console=talk, tensorboard=tensorboard)
            )
        stop = stack.enter_context(stop_requests(ranks))
        feed = stack.enter_context(feed_of(run))
        habits = Habits(save_minutes, keep, log_every, panels_every)
        session = Session(feed, log, stop, habits, torch.zeros((), device=run.device))
        run_epochs(run, session, forward_of(run, compile=compile))
        if session.diverged:
            where = f"state saved in {run.out / 'checkpoints'}"
            raise Diverged(f"{session.diverged}; {where}; lower the learning rate or use fp32, in a new OUT")
        return finish(run, session, again)


def dry_run(
    cache_path: str | Path, out: str | Path, recipe: Recipe, *, device: str, kernels: str, accum: int
) -> list[str]:
    """The resolved plan of `train` with these arguments, in lines; nothing is written. Raises ValueError like `train`."""
    run = build(Path(cache_path), Path(out), recipe, Ranks(), device=device, kernels=kernels, accum=accum, workers=None)
    saved = list_checkpoints(run.out / "checkpoints")
    return [
        *report.plan_lines(run),
        f"OUT holds {saved[-1].name}: the run would continue from it" if saved else f"OUT {run.out}",
    ]


def run_epochs(run: Run, session: Session, forward: Callable[..., Any]) -> None:
    """Train until the last epoch is done or a stop is asked for; the state is saved whenever this returns."""
    while run.epoch < run.recipe.optim.epochs:
        optim.set_lr(run.optimizer, run.lr(run.step))
        values = step(run, session, forward)
        run.update += 1
        session.updates += 1
        session.readback.push(run.step, values)
        take(run, session)
        stopping = session.stop.agreed()
        if run.update == run.updates:
            end_epoch(run, session)
        elif stopping or time.perf_counter() - session.saved_at > 60 * session.habits.save_minutes:
            save_now(run, session)
        if stopping:
            return


def step(run: Run, session: Session, forward: Callable[..., Any]) -> Tensor:
    """One update: forward and backward over its micro-batches, then AdamW. Nothing waits for the device.

    Returns the vector [loss, terms.., gradient norm, skipped, skipped in a row] on the device.
    """
    run.optimizer.zero_grad(set_to_none=True)
    parts, bf16 = [], run.precision == "bf16"
    for micro in range(run.share.accum):
        batch, masks = next(session.feed)
        last = micro == run.share.accum - 1
        with contextlib.nullcontext() if last else getattr(forward, "no_sync", contextlib.nullcontext)():
            with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
                loss, terms = forward(batch, masks)
            (loss / run.share.accum).backward()
        parts.append(torch.stack([loss.detach(), *terms.values()]))
    norm = optim.gradient_norm(run.model.parameters())
    skipped = optim.guarded_step(run.optimizer, norm)
    session.in_a_row = optim.skipped_in_a_row(session.in_a_row, skipped)
    losses = mean_over_ranks(torch.stack(parts).mean(0), run.ranks)
    return torch.cat([losses, torch.stack([norm, skipped, session.in_a_row]).to(losses.dtype)])


def take(run: Run, session: Session, *, wait: bool = False) -> None:
    """Take in the losses that have arrived, all of them with `wait`; write a log row when one is due.

    Asks for a stop when too many updates in a row were skipped.
    """
    names = [term.name for term in run.model.terms]
    for at, (loss, *rest) in session.readback.ready(wait=wait):
        terms, (norm, skipped, in_a_row) = dict(zip(names, rest)), rest[len(names) :]
        run.sums.add({"loss": loss, **terms}, skipped=bool(skipped))
        session.interval.add({"loss": loss, **terms, "grad_norm": norm}, skipped=bool(skipped))
        if in_a_row >= MAX_SKIPPED_IN_A_ROW and session.diverged is None:
            session.stop.received = "divergence"
            session.diverged = f"update {at}: the last {MAX_SKIPPED_IN_A_ROW} updates were not finite and were skipped: {optim.culprit(terms)}"
        slow = time.perf_counter() - session.row_at > ROW_SECONDS
        if at % session.habits.log_every == 0 or slow or at == run.total:
            write_row(run, session, at)


def write_row(run: Run, session: Session, at: int) -> None:
    """One log row of the updates since the row before: losses, speed, stall, learning rate, memory, time left."""
    now = time.perf_counter()
    seconds, updates = max(now - session.row_at, 1e-9), session.updates - session.row_updates
    means = session.interval.means()
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
        "stall": (session.feed.waited_s - session.row_waited_s) / seconds,
        "memory_mib": memory_mib(run.device),
        "skipped": session.interval.skipped,
        "eta_s": (now - session.started) / session.updates * (run.total - at),
        "time": time.time(),
    }
    if session.log is not None:
        session.log.write(row)
        session.log.show(row, always=at == run.total)
    session.interval, session.row_at = Sums(), now
    session.row_updates, session.row_waited_s = session.updates, session.feed.waited_s


def end_epoch(run: Run, session: Session) -> None:
    """Log the epoch's means, draw panels when due, and save the state as the beginning of the next epoch."""
    take(run, session, wait=True)
    means, done, epochs = run.sums.means(), run.epoch + 1, run.recipe.optim.epochs
    now = time.perf_counter()
    row = {
        "kind": "epoch",
        "epoch": done,
        "epochs": epochs,
        "step": run.step,
        "loss": means.pop("loss"),
        "terms": means,
        "lr": run.lr(run.step),
        "skipped": run.sums.skipped,
        "seconds": now - session.epoch_at,
        "time": time.time(),
    }
    session.epoch_at = now
    every = session.habits.panels_every
    every = math.ceil(epochs / 10) if every is None else every
    if session.log is not None:
        session.log.write(row)
        if every and (done % every == 0 or done == epochs):
            draw_run_panels(run, done)
    run.epoch, run.update, run.sums = done, 0, Sums()
    save_now(run, session)


def save_now(run: Run, session: Session) -> None:
    """Save the state (rank 0), with every loss so far in its sums."""
    take(run, session, wait=True)
    if session.log is not None:
        save(run, keep=session.habits.keep)
    session.saved_at = time.perf_counter()


def forward_of(run: Run, *, compile: bool) -> Callable[..., Any]:
    """(batch, masks) -> (loss, terms): the model, data-parallel under several ranks, compiled if asked for."""
    model = replicated(run.model, run.ranks, run.device)
    return torch.compile(model, dynamic=False) if compile else model


def feed_of(run: Run) -> Feed:
    """This rank's micro-batches from where the run is to its end."""
    seed, only_visible = run.recipe.seed, batches.reads_only_visible(run.recipe)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> batches.Numbers:
        return batches.numbers_of_epoch(run.cache, seed=seed, epoch=epoch)

    def load(epoch: int, update: int, micro: int) -> Loaded:
        numbers = batches.rows_of(order(epoch), update, micro, run.share)
        batch = batches.load_batch(run.cache, numbers, epoch=epoch, needed=run.needed)
        masks = draw_masks(batch, Draw(seed, epoch), recipe=run.recipe.mask, l=run.info.n_patches)
        return (batches.visible_rows(batch, masks) if only_visible else batch), masks

    start = batches.Position(run.epoch, run.update)
    todo = batches.jobs(start, epochs=run.recipe.optim.epochs, updates=run.updates, accum=run.share.accum)
    return Feed(load, todo, run.device)


def finish(run: Run, session: Session, command: str) -> dict[str, Any]:
    """Export the student and draw the curves of a finished run, or say how to continue a stopped one; the summary."""
    seconds = time.perf_counter() - session.started
    finished = run.epoch == run.recipe.optim.epochs
    summary: dict[str, Any] = {
        "out": str(run.out),
        "student": None,
        "finished": finished,
        "stopped": None if finished else session.stop.received,
        "epoch": run.epoch,
        "epochs": run.recipe.optim.epochs,
        "step": run.step,
        "seconds": seconds,
        "images_per_s": session.updates * run.share.batch_size / seconds,
        "stall": session.feed.waited_s / seconds,
        "notes": run.notes,
    }
    if session.log is not None:
        rows = read_rows(session.log.path)
        last = rows[-1] if rows else {}
        summary |= {"loss": last.get("loss"), "terms": last.get("terms")}
        session.log.close()
        if finished:
            summary["student"] = str(write_results(run, rows))
        for line in report.closing_lines(run, summary, command):
            session.log.say(line)
    result: dict[str, Any] = agree_on(summary, run.ranks)
    return result


def write_results(run: Run, rows: list[dict[str, Any]]) -> Path:
    """Write OUT/student and OUT/curves.png; returns the student's folder."""
    epochs = [row for row in rows if row["kind"] == "epoch"]
    title = f"{run.recipe.name}: {run.recipe.student.model}, {run.recipe.optim.epochs} epochs"
    draw_curves(run.out / "curves.png", epochs, title=title, note=report.random_line(run) or "")
    export_student(run.model, run.out / "student", source=report.card_source(run))
    return run.out / "student"
