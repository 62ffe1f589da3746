"""What a run would do, what it costs and how long it takes, without doing it."""

import contextlib
import time
from pathlib import Path

from mrmae.common.backend import expect_utf8, locate
from mrmae.common.progress import counted, human_bytes, human_time
from mrmae.shards.order import views_for
from mrmae.train import cost, optim, report
from mrmae.train.baselines import baselines_of
from mrmae.train.batches import Share
from mrmae.train.checkpoint import newest_readable
from mrmae.train.feed import feed_of
from mrmae.train.kernel_choice import settle_kernels
from mrmae.train.loop import TIMED_UPDATES, Loop, forward_of, step
from mrmae.train.method import Recipe
from mrmae.train.ranks import Ranks, StopRequest
from mrmae.train.resume import continued
from mrmae.train.run import Run
from mrmae.train.setup import CADENCE, SETUP, Cadence, Setup

BASELINE_IMAGES = 500  # to estimate baselines from that are not kept yet
MOST_SECONDS = 30.0  # no update is timed that begins later
CPU_IMAGES = 16  # of a micro-batch at most, on a CPU, where a larger one is no faster per image


def dry_run(
    cache_path: str | Path, out: str | Path, recipe: Recipe, setup: Setup = SETUP, cadence: Cadence = CADENCE
) -> list[str]:
    """The resolved plan of `train` with these arguments, in lines, and how long it would take, from a few updates whose result is
    thrown away; nothing is written. Raises ValueError like `train`."""
    expect_utf8(out, "OUT")
    state = newest_readable(Path(out) / "checkpoints")
    run = continued(state, locate(cache_path), Path(out), recipe, Ranks(), setup, cadence)
    settle_kernels(run, warn=run.notes.append, keep=False)
    run.baselines = baselines_of(run, limit=BASELINE_IMAGES, keep=False)
    return [*report.plan_lines(run, cost.cost_facts(run)), *more_views(run), *dry_time(run), f"OUT {run.out}"]


def more_views(run: Run) -> list[str]:
    """What more stored views would cost, where the run is long for those there are."""
    there, epochs = run.cache.n_views, run.recipe.optim.epochs
    if there >= (wanted := views_for(epochs)):
        return []
    n_bytes = (wanted - there) * len(run.cache.numbers) * (report.feature_bytes(run) + cost.view_bytes(run))
    return [
        f"views: {counted(epochs, 'epoch')} show {counted(there, 'stored crop')} of every image in turn; {wanted} are recommended:"
        f" about {human_bytes(n_bytes)} more, by the command that made the cache with --views {wanted}, for a new run"
    ]


def dry_time(run: Run) -> list[str]:
    """How long what is left of a run would take in this process, from ten of its micro-batches; none where nothing is left.

    Trains: the run is not to be used afterwards.
    """
    if run.finished:
        return []
    left, size = (run.total - run.step) * run.share.batch_size, run.share.micro_size
    size = min(size, CPU_IMAGES) if run.device.type == "cpu" else size
    run.share = Share(size)
    seconds, waited, done = timed_updates(run)
    return [
        f"time: about {human_time(left * seconds / (done * size))} for {left:,} images in this one process, without pictures and checkpoints:"
        f" {counted(done, 'micro-batch', 'micro-batches')} of {size} took {seconds:.3g} s, {100 * waited / seconds:.0f} % of it waiting for data"
    ]


def timed_updates(run: Run) -> tuple[float, float, int]:
    """(seconds, seconds of them waiting for data, how many): ten updates after a first one, fewer where they are slow or all there are."""
    forward = forward_of(run)
    times: list[tuple[float, float]] = []
    optim.set_lr(run.optimizer, 0.0)
    with feed_of(run) as feed, contextlib.suppress(StopIteration):
        loop = Loop(feed, None, StopRequest(run.ranks))
        began = time.perf_counter()
        while len(times) <= TIMED_UPDATES and time.perf_counter() - began < MOST_SECONDS:
            float(step(run, loop, forward)[0])  # waits for the device
            times.append((time.perf_counter(), feed.waited_s))
    if len(times) == 1:
        return times[0][0] - began, times[0][1], 1
    (start, waited), (end, waited_too) = times[0], times[-1]
    return end - start, waited_too - waited, len(times) - 1
