"""Training, top to bottom: batch, schedule, step, log, save.

`train` is what `train-mrmae` calls, and what a notebook calls. The same call again continues a run that was stopped or
killed, on the CPU in fp32 to the same bits: order, views and masks are functions of (seed, epoch, sample).
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mrmae.common.progress import counted
from mrmae.shards.remote import locate
from mrmae.shards.spec import expect_utf8
from mrmae.train import cost, optim, report
from mrmae.train.checkpoint import checkpoint_path, list_checkpoints
from mrmae.train.export import export_student
from mrmae.train.feed import feed_of
from mrmae.train.live import Habits, Live, draw_due_panels, end_epoch, save_now, take
from mrmae.train.log import RunLog, read_rows, warn
from mrmae.train.method import Recipe
from mrmae.train.online import taught
from mrmae.train.pictures import draw_curves
from mrmae.train.published import export_published
from mrmae.train.ranks import Ranks, agree_on, failing_together, join, mean_over_ranks, replicated, stop_requests
from mrmae.train.run import Run, Setup, begin, build


class Diverged(RuntimeError):
    """Several updates in a row were not finite: which term, and where the state was saved."""


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
    online: bool = False,
    teachers: Sequence[str] = (),
    hold_out: float = 0.0,
    knn_every: int = 0,
    init: str | Path | None = None,
    allow_partial: bool = False,
    export: str | None = None,
    save_minutes: float = 10.0,
    keep: int = 3,
    log_every: int = 20,
    panels_every: int | None = None,
    tensorboard: bool = True,
    wandb: str | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train the student of `recipe` on a finished cache; returns a summary of the run.

    out: a new or empty folder, or one holding the same run, which then continues. Filled with checkpoints/, log.jsonl,
    tensorboard/, panels/, curves.png, student/ (for timm), recipe.yaml, run.json and README.md.
    device: auto, cpu, cuda or cuda:N. compile: torch.compile the forward pass. kernels: auto, triton or torch.
    workers: reading and decoding threads. accum: micro-batches per update in each process.
    online: run the teachers in the step (`teachers` as for extract-features; none: the cache's own) instead of reading their
    features. hold_out: share of the images not trained on; their loss is logged every epoch. knn_every: epochs per k-NN
    accuracy of the images held out, 0 for none.
    allow_partial: train on an unfinished cache's committed images; a later start must find the same ones.
    init: a checkpoint of MAE, MCMAE or a timm ViT to begin from. export: `mae` to write OUT/published.pth beside the student,
    as their fine-tuning scripts load it.
    save_minutes: at least this often, beside every epoch's end. keep: checkpoints kept. log_every: updates per log row.
    panels_every: epochs per picture, 0 for none. wandb: a Weights & Biases project to log to. command: what to type to
    continue, for the last line and for OUT.
    Summary: out, student (None until finished), finished, stopped (a signal's name or None), epoch, epochs, step, loss, terms,
    seconds, images_per_s and stall (since this start), notes.
    SIGTERM, SIGUSR1 and Ctrl-C end the run after the update in flight, saved.
    Raises ValueError for anything in recipe, cache or OUT that does not fit; OSError where OUT cannot be written; Diverged
    after three updates in a row that were not finite, and again when such a run is continued; OtherRankFailed where another
    process of the run failed first.
    """
    if export not in (None, "mae"):
        raise ValueError(f"export: {export!r} is unknown; 'mae' was expected; correct it or leave it out")
    ranks = join()
    talk = console or Console(highlight=False, soft_wrap=True, quiet=ranks.rank > 0)
    setup = Setup(device, kernels, accum, workers, hold_out, knn_every, online or bool(teachers), tuple(teachers),
                  None if init is None else str(init), allow_partial)  # fmt: skip
    refuse_other_encodings(out, setup, command or "")
    habits = Habits(save_minutes, keep, log_every, panels_every)
    again = command or f'train("{cache_path}", "{out}", recipe)'

    with failing_together(ranks), contextlib.ExitStack() as stack:
        run = begin(locate(cache_path), Path(out), recipe, ranks, setup, warn=functools.partial(warn, talk))
        stack.enter_context(run.lock or contextlib.nullcontext())
        check_converges(run)
        log = None
        if ranks.rank == 0:
            report.write_run_files(run, command=again, how={"compile": compile, "ranks": ranks.size})
            for line in report.plan_lines(run):
                talk.print(line, markup=False)
            log = RunLog(run.out, step=run.step, total=run.total, console=talk, tensorboard=tensorboard, wandb=wandb)
            stack.enter_context(log)
        stop = stack.enter_context(stop_requests(ranks))
        feed = stack.enter_context(feed_of(run))
        live = Live(feed, log, stop, habits)
        run_epochs(run, live, forward_of(run, compile=compile))
        check_converges(run)
        return finish(run, live, again, export=export)


def check_converges(run: Run) -> None:
    """Raise Diverged where too many updates in a row were not finite, now or before this start: the same words each time."""
    if run.diverged:
        raise Diverged(
            f"{run.out}: diverged at {run.diverged}; in a new OUT, lower the learning rate (optim.lr_per_256, --blr, is"
            f" {run.recipe.optim.lr_per_256:g}) or use --precision fp32; the state after update {run.step} is saved in"
            f" {checkpoint_path(run.out / 'checkpoints', run.step)}: without this file the run goes on from the one before it"
        )


def dry_run(cache_path: str | Path, out: str | Path, recipe: Recipe, setup: Setup) -> list[str]:
    """The resolved plan of `train` with these arguments, in lines; nothing is written. Raises ValueError like `train`."""
    refuse_other_encodings(out, setup)
    run = build(locate(cache_path), Path(out), recipe, Ranks(), setup)
    saved = list_checkpoints(run.out / "checkpoints")
    return [
        *report.plan_lines(run, cost.cost_facts(run)),
        f"OUT holds {saved[-1].name}: the run would continue from it" if saved else f"OUT {run.out}",
    ]


def refuse_other_encodings(out: str | Path, setup: Setup, command: str = "") -> None:
    """ValueError where OUT, --init, a teacher's text or the command is not UTF-8: what a run writes down is."""
    teachers = [("--teacher", text) for text in setup.teachers]
    for name, text in [("OUT", out), ("--init", setup.init or ""), *teachers, ("the command", command)]:
        expect_utf8(text, name)


def run_epochs(run: Run, live: Live, forward: Callable[..., Any]) -> None:
    """Train until the last epoch is done or a stop is asked for; the state is saved whenever this returns."""
    draw_due_panels(run, live)
    while run.epoch < run.recipe.optim.epochs:
        optim.set_lr(run.optimizer, run.lr(run.step))
        values = step(run, live, forward)
        run.update += 1
        live.updates += 1
        live.readback.push(run.step, values)
        take(run, live)
        stopping = live.stop.agreed()
        if run.update == run.updates:
            end_epoch(run, live)
        elif stopping or time.perf_counter() - live.saved_at > 60 * live.habits.save_minutes:
            save_now(run, live)
        if stopping:
            return


def step(run: Run, live: Live, forward: Callable[..., Any]) -> Tensor:
    """One update: forward and backward over its micro-batches, then AdamW. Nothing waits for the device.

    Returns the vector [loss, terms.., gradient norm, skipped, skipped in a row] on the device.
    """
    run.optimizer.zero_grad(set_to_none=True)
    parts, bf16 = [], run.precision == "bf16"
    for micro in range(run.share.accum):
        batch, masks = taught(
            next(live.feed), run.online, run.needed, recipe=run.recipe, epoch=run.epoch, info=run.info
        )
        last = micro == run.share.accum - 1
        with contextlib.nullcontext() if last else getattr(forward, "no_sync", contextlib.nullcontext)():
            with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
                loss, terms = forward(batch, masks)
            (loss / run.share.accum).backward()
        parts.append(torch.stack([loss.detach(), *terms.values()]))
    norm = optim.gradient_norm(run.model.parameters())
    skipped = optim.guarded_step(run.optimizer, norm)
    run.skipped_in_a_row = optim.skipped_in_a_row(run.skipped_in_a_row, skipped)
    losses = mean_over_ranks(torch.stack(parts).mean(0), run.ranks)
    return torch.cat([losses, torch.stack([norm, skipped, run.skipped_in_a_row]).to(losses.dtype)])


def forward_of(run: Run, *, compile: bool) -> Callable[..., Any]:
    """(batch, masks) -> (loss, terms): the model, data-parallel under several ranks, compiled if asked for."""
    model = replicated(run.model, run.ranks, run.device)
    return torch.compile(model, dynamic=False) if compile else model


def finish(run: Run, live: Live, command: str, *, export: str | None) -> dict[str, Any]:
    """Export the student and draw the curves of a finished run, or say how to continue a stopped one; the summary."""
    seconds = time.perf_counter() - live.started
    finished = run.epoch == run.recipe.optim.epochs
    summary: dict[str, Any] = {
        "out": str(run.out),
        "student": None,
        "finished": finished,
        "stopped": None if finished else live.stop.received,
        "epoch": run.epoch,
        "epochs": run.recipe.optim.epochs,
        "step": run.step,
        "seconds": seconds,
        "images_per_s": live.updates * run.share.batch_size / seconds,
        "stall": live.feed.waited_s / seconds,
        "notes": run.notes,
    }
    if (log := live.log) is not None:
        rows = read_rows(log.path)
        last = rows[-1] if rows else {}
        summary |= {"loss": last.get("loss"), "terms": last.get("terms")}
        log.close()
        if finished:
            summary["student"] = str(write_results(run, export=export))
            log.attempt("curves.png", lambda: draw_run_curves(run, log.path))
        for line in report.closing_lines(run, summary, command):
            log.say(line)
    result: dict[str, Any] = agree_on(summary, run.ranks)
    return result


def write_results(run: Run, *, export: str | None) -> Path:
    """Write OUT/student and, if asked for, OUT/published.pth; returns the student's folder."""
    export_student(run.model, run.out / "student", source=report.card_source(run))
    if export == "mae":
        export_published(run.model, run.out / "published.pth")
    return run.out / "student"


def draw_run_curves(run: Run, rows: Path) -> None:
    """Write OUT/curves.png from the epochs in the log `rows`."""
    title = f"{run.recipe.name}: {run.recipe.student.model}, {counted(run.recipe.optim.epochs, 'epoch')}"
    draw_curves(run.out / "curves.png", read_rows(rows, "epoch"), title=title, note=report.random_line(run) or "")
