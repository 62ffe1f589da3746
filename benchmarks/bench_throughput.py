"""Images per second of training from a cache, with the loader and on one resident batch, and peak memory; a grid of decoders.

    python benchmarks/bench_throughput.py --compile                           # mr-mae and mr-mae-light, this machine's device
    python benchmarks/bench_throughput.py --recipe mr-mae --decoder 2x512 --decoder 8x256    # the same with these decoders
    python benchmarks/bench_throughput.py --recipe mr-mae --kernels auto      # who computes the kernels is measured first

One process; in every round each arm makes its steps in turn, and the loader's share of the resident batch's speed is taken within a
round. The cache is synthetic (`synthetic.py`) and lies in the page cache: this is what reading and decoding cost, not what a disk does.
Rows are appended to results/throughput.csv, or `--out`, arm by arm.
"""

import itertools
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from arms import our_arm
from bench_train import TEACHERS, measure_arms, spread
from measure import ROOT, append, clock, machine
from synthetic import write_cache

from mrmae.extract.teachers import build_teacher, parse_teacher
from mrmae.train.feed import feed_of
from mrmae.train.kernel_choice import choice_words, settle_kernels
from mrmae.train.method import load_recipe
from mrmae.train.ranks import Ranks
from mrmae.train.run import build_run
from mrmae.train.setup import Setup

COLUMNS = (
    "recipe,decoder,student,batch,mode,precision,kernels,images_per_s,images_per_s_resident,loader_share,loader_share_min,"
    "loader_share_max,stall,peak_bytes,rounds,workers,load,device,torch,triton,commit,date"
).split(",")


def decoder_words(text: str) -> list[str]:
    """`4x512` as overrides: blocks x width, heads of 64 channels."""
    depth, width = map(int, text.split("x"))
    return [
        f"student.decoder.depth={depth}",
        f"student.decoder.width={width}",
        f"student.decoder.heads={max(1, width // 64)}",
    ]


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--recipe", "recipes", multiple=True, default=("mr-mae", "mr-mae-light"))
@click.option("--decoder", "decoders", multiple=True, metavar="DEPTHxWIDTH", help="Repeatable. [default: the recipe's]")
@click.option("--student", default="vit_base_patch16_224")
@click.option("--batch-size", type=int, help="[default: 256 on CUDA, 4 elsewhere]")
@click.option("--size", default=224, help="Pixels per side of a view.")
@click.option("--grid", default=14, help="Patches per side.")
@click.option("--teacher", "texts", multiple=True, default=TEACHERS, help="Whose columns the cache has.")
@click.option("--compile", is_flag=True, help="torch.compile the forward pass.")
@click.option("--kernels", type=click.Choice(["auto", "triton", "torch"]), default="torch")
@click.option("--rounds", default=5)
@click.option("--steps", type=int, help="Per arm and round. [default: 10 on CUDA, 1 elsewhere]")
@click.option("--workers", type=int, help="Threads that read and decode. [default: as a run]")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "results" / "throughput.csv")
def main(device: str, recipes: tuple[str, ...], decoders: tuple[str, ...], student: str, batch_size: int | None, size: int,
         grid: int, texts: tuple[str, ...], compile: bool, kernels: str, rounds: int, steps: int | None, workers: int | None, out: Path) -> None:  # fmt: skip
    """Measure every recipe with every decoder; print and append a row for each."""
    cuda = device.startswith("cuda")
    batch_size, steps = batch_size or (256 if cuda else 4), steps or (10 if cuda else 1)
    specs = [
        build_teacher(parse_teacher(t), grid=grid, view_size=size, device="cpu", precision="fp32").spec for t in texts
    ]
    setup = Setup(device, workers=workers, compile=compile, kernels=kernels)
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "cache", specs, n=max(64, 4 * batch_size), size=size, grid=grid)
        for recipe, decoder in itertools.product(recipes, decoders or ("",)):
            words = [
                f"student.model={student}",
                f"optim.batch_size={batch_size}",
                *(decoder_words(decoder) if decoder else []),
            ]
            run = build_run(cache, Path(folder) / "out", load_recipe(recipe, words), Ranks(), setup)
            settle_kernels(run, warn=lambda text: click.echo(text, err=True), keep=False)
            assert run.choice is not None
            with ExitStack() as stack:
                feed = stack.enter_context(feed_of(run))
                resident = itertools.repeat(next(feed))
                arms = [
                    our_arm(name, run, source, compile=compile)
                    for name, source in (("loader", feed), ("resident", resident))
                ]
                measure_arms(arms, run, rounds=rounds, steps=steps, now=clock("cuda" if cuda else "cpu"))
            loader, still = arms
            shares = spread([b / a for a, b in zip(loader.seconds, still.seconds)])
            built = run.recipe.student.decoder
            row: dict[str, Any] = {
                "recipe": recipe, "decoder": "" if built is None else f"{built.depth}x{built.width}", "student": student,
                "batch": batch_size, "mode": "compiled" if compile else "eager", "precision": run.precision,
                "kernels": choice_words(run.choice), "images_per_s": batch_size / spread(loader.seconds)[1],
                "images_per_s_resident": batch_size / spread(still.seconds)[1], "loader_share": shares[1],
                "loader_share_min": shares[0], "loader_share_max": shares[2], "stall": loader.waited_s / loader.wall_s,
                "peak_bytes": still.peak_bytes, "rounds": rounds, "workers": workers or "", "load": f"{os.getloadavg()[0]:.1f}",
            }  # fmt: skip
            row |= machine("cuda" if cuda else "cpu")
            click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
            append(out, [row], COLUMNS)
            del run, arms, loader, still, resident
            if cuda:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
