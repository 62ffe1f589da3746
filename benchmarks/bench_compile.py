"""torch.compile of a training step against the same step eager, in turns in one process, and what is compiled how often.

    python benchmarks/bench_compile.py                                        # mr-mae, ViT-B/16, this machine's device; minutes on a CPU
    python benchmarks/bench_compile.py --student vit_small_patch16_224 --recipe mr-mae-light --batch-size 8

The compiled arm then trains three epochs of its own, whose last images do not fill a batch and are left out, with images held out, whose
last piece is smaller: graphs and recompilations are counted over everything, warming up and timing included. One row is appended to
results/compile.csv, or `--out`; exit status 1 where more than one graph was made.
"""

import itertools
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from arms import our_arm
from bench_train import TEACHERS, measure_arms, spread
from measure import ROOT, append, clock, machine
from synthetic import write_cache
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from mrmae.extract.teachers import build_teacher, parse_teacher
from mrmae.train import loop
from mrmae.train.feed import feed_of
from mrmae.train.held_out import held_out_loss
from mrmae.train.method import load_recipe
from mrmae.train.ranks import Ranks, StopRequest
from mrmae.train.run import build_run
from mrmae.train.setup import Setup

COLUMNS = (
    "recipe,student,batch,precision,eager_ms,compiled_ms,ratio,ratio_p20,ratio_p80,first_step_s,graphs,graph_breaks,epochs,updates,left_out,"
    "held_out,rounds,threads,load,device,torch,triton,commit,date"
).split(",")
EPOCHS = 3


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--recipe", default="mr-mae")
@click.option("--student", default="vit_base_patch16_224")
@click.option("--batch-size", type=int, help="[default: 256 on CUDA, 4 elsewhere]")
@click.option("--size", default=224)
@click.option("--grid", default=14)
@click.option("--teacher", "texts", multiple=True, default=TEACHERS)
@click.option("--rounds", default=5)
@click.option("--steps", type=int, help="Per arm and round. [default: 10 on CUDA, 1 elsewhere]")
@click.option("--threads", default=1, help="On the CPU.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "results" / "compile.csv")
def main(device: str, recipe: str, student: str, batch_size: int | None, size: int, grid: int, texts: tuple[str, ...],
         rounds: int, steps: int | None, threads: int, out: Path) -> None:  # fmt: skip
    """Measure, count, print and append the row."""
    cuda = device.startswith("cuda")
    batch, steps = batch_size or (256 if cuda else 4), steps or (10 if cuda else 1)
    torch.set_num_threads(threads)
    specs = [
        build_teacher(parse_teacher(t), grid=grid, view_size=size, device="cpu", precision="fp32").spec for t in texts
    ]
    backend = CompileCounterWithBackend("inductor")  # type: ignore[no-untyped-call]
    plain = torch.compile
    loop.torch.compile = lambda model, **how: plain(model, backend=backend, **how)  # type: ignore[attr-defined]
    counters.clear()
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "cache", specs, n=8 * batch + 16, size=size, grid=grid)
        chosen = load_recipe(
            recipe, [f"student.model={student}", f"optim.batch_size={batch}", f"optim.epochs={EPOCHS}"]
        )
        run = build_run(cache, Path(folder) / "out", chosen, Ranks(), Setup(device, workers=1, hold_out=0.25))
        numbers, held = (
            run.numbers[: EPOCHS * batch + max(1, batch // 2)],
            run.held_out[: batch + 1],
        )  # neither fills its last batch
        run = replace(run, numbers=numbers, held_out=held, updates=len(numbers) // batch)
        with feed_of(run) as feed:
            resident = itertools.repeat(next(feed))
        arms = [our_arm(name, run, resident, compile=name == "compiled") for name in ("eager", "compiled")]
        start = time.perf_counter()
        arms[1].step()
        first = time.perf_counter() - start
        measure_arms(arms, run, rounds=rounds, steps=steps, now=clock("cuda" if cuda else "cpu"))
        updates = three_epochs(run)
        ratios = spread([b / a for a, b in zip(arms[0].seconds, arms[1].seconds)])
        row: dict[str, Any] = {
            "recipe": recipe, "student": student, "batch": batch, "precision": run.precision,
            "eager_ms": 1e3 * spread(arms[0].seconds)[1], "compiled_ms": 1e3 * spread(arms[1].seconds)[1],
            "ratio": ratios[1], "ratio_p20": ratios[0], "ratio_p80": ratios[2], "first_step_s": first,
            "graphs": backend.frame_count, "graph_breaks": sum(counters["graph_break"].values()), "epochs": EPOCHS, "updates": updates,
            "left_out": len(run.numbers) - run.updates * batch, "held_out": len(run.held_out), "rounds": rounds, "threads": threads,
            "load": f"{os.getloadavg()[0]:.1f}", **machine("cuda" if cuda else "cpu"),
        }  # fmt: skip
    click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    append(out, [row], COLUMNS)
    raise SystemExit((row["graphs"], row["graph_breaks"]) != (1, 0))


def three_epochs(run: Any) -> int:
    """Train the run's epochs, compiled, each with the loss of what is held out at its end; the number of updates."""
    run = replace(run, setup=replace(run.setup, compile=True))
    forward = loop.forward_of(run)
    with feed_of(run) as feed:
        state = loop.Loop(feed, None, StopRequest(run.ranks))
        for _ in range(run.recipe.optim.epochs):
            for _ in range(run.updates):
                loop.step(run, state, forward)
                run.update += 1
            held_out_loss(run)
            run.epoch, run.update = run.epoch + 1, 0
    return int(run.total)


if __name__ == "__main__":
    main()
