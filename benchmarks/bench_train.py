"""Steps of stock MAE, of MR-MAE with its teachers in the step, and of MR-MAE from a cache: same student, same views.

    python benchmarks/bench_train.py                                   # this machine's device; ViT-B/16
    python benchmarks/bench_train.py --device cpu --batch-size 4 --rounds 5
    python benchmarks/bench_train.py --batch-size 8 --rounds 5 --replace   # these rows again, instead of the older ones
    python benchmarks/bench_train.py --variant 'student.decoder.depth=2 mask.n_predict=49 mask.predict=uniform'   # one more arm
    python benchmarks/bench_train.py --student vit_tiny_patch16_224 --batch-size 2 --rounds 3 --out /tmp/try.csv

One process; in every round each arm makes its steps in turn, and a ratio is taken within a round. All arms read the same JPEG views
through the same loader, running; stock MAE normalises them in the step. The cache is synthetic (`synthetic.py`). Rows are appended
to benchmarks/results/train.csv, or `--out`. Run it from a clean commit, whose name stands in the row (`+`: files were changed). With one CPU thread the clock is CPU time of the whole process, loader included, so that
other work on the machine counts less (not nothing: it takes caches and memory bandwidth; the load stands in the row).
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from arms import CACHED, EXPLICIT, ONLINE, REFERENCE, RESIDENT, STOCK, TRITON, Arm, build_arms, online_run
from measure import ROOT, append, clock, machine, memory_mark, memory_peak
from synthetic import write_cache
from torch import Tensor, nn

from mrmae.extract.teachers import build_teacher, parse_teacher
from mrmae.train import optim
from mrmae.train.cost import counted_flops
from mrmae.train.feed import Feed, feed_of
from mrmae.train.method import load_recipe
from mrmae.train.online import with_targets
from mrmae.train.ranks import Ranks
from mrmae.train.run import Run, build_run
from mrmae.train.setup import Setup

COLUMNS = (
    "arm,part,student,batch,mode,precision,p20_ms,p50_ms,p80_ms,images_per_s,ratio,ratio_p20,ratio_p80,ratio_to,stall,"
    "saved_bytes_per_image,peak_bytes,gflop_per_image,rounds,load,device,torch,triton,commit,date"
).split(",")
TEACHERS = ("clip=open_clip:ViT-B-16-quickgelu/random", "dino=timm:vit_base_patch16_224.dino/random")
RATIOS = (
    (CACHED, ONLINE),
    (CACHED, STOCK),
    (EXPLICIT, STOCK),
    (ONLINE, STOCK),
    (CACHED, RESIDENT),
    (TRITON, REFERENCE),
)
VARIANT = f"{CACHED}, "  # and the overrides
SAME = ("student", "batch", "mode", "precision", "device")  # what rows must share to take each other's place
Clock = Callable[[], float]


# ---- measuring


def seconds_of(arm: Arm, steps: int, device: torch.device, now: Clock) -> float:
    """Seconds per step."""
    start = settled(device, now)
    for _ in range(steps):
        arm.step()
    return (settled(device, now) - start) / steps


def settled(device: torch.device, now: Clock) -> float:
    """The time once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now()


def spread(values: list[float]) -> tuple[float, float, float]:
    """p20, median, p80; of fewer than five values the smallest, median, largest."""
    if len(values) < 5:
        return min(values), statistics.median(values), max(values)
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, statistics.median(values), p80


def kept_bytes(arm: Arm, run: Run) -> int:
    """Bytes that a forward pass keeps for backward, beside weights."""
    weights = {t.untyped_storage().data_ptr() for t in [*arm.model.parameters(), *arm.model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss = arm.forward()
    del loss
    return sum(kept.values())


def gflop(arm: Arm, run: Run) -> float:
    """GFLOP per image and step: three times the forward pass, and the teachers."""
    with counted_flops() as counter, torch.no_grad():
        arm.forward()
    return (3 * counter.get_total_flops() / run.share.batch_size + arm.teachers_flops) / 1e9


def parts_of(run: Run, feed: Feed, now: Clock, steps: int) -> dict[str, list[float]]:
    """Seconds by part of an eager step, with the device settled between parts."""
    parts: dict[str, list[float]] = {}
    spent = {"encoder blocks": 0.0, "decoder": 0.0}
    started = [0.0]

    def watch(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: started.__setitem__(0, settled(run.device, now)))
        module.register_forward_hook(
            lambda *_: spent.__setitem__(name, spent[name] + settled(run.device, now) - started[0])
        )

    for block in run.model.student.blocks:
        watch(block, "encoder blocks")
    if run.model.decoder is not None:
        watch(run.model.decoder, "decoder")
    for _ in range(steps):
        spent.update(dict.fromkeys(spent, 0.0))
        run.optimizer.zero_grad(set_to_none=True)
        marks = [settled(run.device, now)]
        loaded = next(feed)
        marks.append(settled(run.device, now))
        whole = with_targets(loaded, run.online, run.needed, model=run.model)
        marks.append(settled(run.device, now))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss, _ = run.model(*whole)
        marks.append(settled(run.device, now))
        loss.backward()
        marks.append(settled(run.device, now))
        norm = optim.gradient_norm(run.model.parameters())
        marks.append(settled(run.device, now))
        optim.guarded_step(run.optimizer, norm)
        marks.append(settled(run.device, now))
        wait, teachers, forward, backward, norm_s, update = (b - a for a, b in itertools.pairwise(marks))
        found = {"next batch": wait, "teachers": teachers, **spent}
        found |= {
            "embedding, heads, losses": forward - sum(spent.values()),
            "backward": backward,
            "gradient norm": norm_s,
            "AdamW": update,
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    return parts


def measure_arms(arms: list[Arm], run: Run, *, rounds: int, steps: int, now: Clock) -> None:
    """Fill every arm's seconds, one value per round, the arms taking turns, and its peak memory beyond what lies there between steps."""
    for turn in range(-1, rounds):  # the first round warms up
        for arm in arms:
            waited, start = getattr(arm.feed, "waited_s", 0.0), time.perf_counter()
            seconds = seconds_of(arm, steps, run.device, now)
            if turn >= 0:
                arm.seconds.append(seconds)
                arm.wall_s += time.perf_counter() - start
                arm.waited_s += getattr(arm.feed, "waited_s", 0.0) - waited
    for arm in arms:  # apart: giving memory back to the system, to see what a step takes, would cost the next step time
        mark = memory_mark(run.device.type)
        seconds_of(arm, 1, run.device, now)
        arm.peak_bytes = memory_peak(run.device.type, mark)


# ---- rows


def rows_of(arms: list[Arm], run: Run, common: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per arm, one per ratio."""
    rows, batch = [], run.share.batch_size
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        p20, p50, p80 = spread(arm.seconds)
        rows.append(common | {"arm": arm.name, "part": "step", "p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80,
                              "images_per_s": batch / p50, "peak_bytes": arm.peak_bytes, "stall": arm.waited_s / arm.wall_s,
                              "saved_bytes_per_image": kept_bytes(arm, run) // batch, "gflop_per_image": gflop(arm, run)})  # fmt: skip
    for one, other in [
        *RATIOS,
        *((arm.name, other) for arm in arms if arm.name.startswith(VARIANT) for other in (ONLINE, STOCK)),
    ]:
        if one in by_name and other in by_name:
            ratios = [a / b for a, b in zip(by_name[one].seconds, by_name[other].seconds)]
            p20, p50, p80 = spread(ratios)
            rows.append(common | {"arm": one, "part": "ratio of steps", "ratio_to": other, "ratio": p50,
                                  "ratio_p20": p20, "ratio_p80": p80})  # fmt: skip
    return rows


def part_rows(name: str, run: Run, common: dict[str, Any], now: Clock, steps: int) -> list[dict[str, Any]]:
    """One row per part of this run's step."""
    with feed_of(run) as feed:
        parts = parts_of(run, feed, now, steps)
    rows = []
    for part, seconds in parts.items():
        p20, p50, p80 = (1e3 * value for value in spread(seconds[1:]))
        rows.append(common | {"arm": name, "part": part, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The short table."""
    for row in rows:
        if "ratio" in row:
            text = f"{row['ratio']:.3f} x {row['ratio_to']} ({row['ratio_p20']:.3f} to {row['ratio_p80']:.3f})"
        else:
            more = f"  {row['gflop_per_image']:.1f} GFLOP per image" if "gflop_per_image" in row else ""
            text = f"{row['p50_ms']:.1f} ms ({row['p20_ms']:.1f} to {row['p80_ms']:.1f}){more}"
        print(f"{row['mode']:<9} {row['arm']:<30} {row['part']:<26} {text}", flush=True)


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--student", default="vit_base_patch16_224")
@click.option("--batch-size", type=int, help="[default: 256 on CUDA, 4 elsewhere]")
@click.option("--size", default=224, help="Pixels per side of a view.")
@click.option("--grid", default=14, help="Patches per side.")
@click.option("--teacher", "texts", multiple=True, default=TEACHERS)
@click.option("--rounds", default=7)
@click.option("--steps", type=int, help="Per arm and round. [default: 10 on CUDA, 1 elsewhere]")
@click.option("--threads", default=1, help="On the CPU.")
@click.option("--workers", default=1, help="Threads that read and decode.")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="'KEY=VALUE ...'",
    help="Another arm from the cache: mr-mae with these; repeatable.",
)
@click.option("--replace", is_flag=True, help="Drop older rows of the same student, batch, mode, precision and device.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "results" / "train.csv")
def main(device: str, student: str, batch_size: int | None, size: int, grid: int, texts: tuple[str, ...], rounds: int,
         steps: int | None, threads: int, workers: int, variants: tuple[str, ...], replace: bool, out: Path) -> None:  # fmt: skip
    """Measure every arm and the parts of our steps; print the table and append it."""
    cuda = device.startswith("cuda")
    batch_size, steps = batch_size or (256 if cuda else 4), steps or (10 if cuda else 1)
    torch.set_num_threads(threads)
    now, precision = clock("cuda" if cuda else "cpu"), "fp16" if cuda else "fp32"
    teachers = [
        build_teacher(parse_teacher(t), grid=grid, view_size=size, device=device, precision=precision) for t in texts
    ]
    usual = (f"student.model={student}", f"optim.batch_size={batch_size}")
    recipe, setup = load_recipe("mr-mae", usual), Setup(device, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        n = max(64, 4 * batch_size)
        cache = write_cache(Path(folder) / "cache", [t.spec for t in teachers], n=n, size=size, grid=grid)
        run = build_run(cache, Path(folder) / "out", recipe, Ranks(), setup)
        live = online_run(run, teachers)
        others = {
            VARIANT + text: build_run(
                cache, Path(folder) / "out", load_recipe("mr-mae", [*usual, *text.split()]), Ranks(), setup
            )
            for text in variants
        }
        common = {"student": student, "batch": batch_size, "precision": run.precision, "rounds": rounds}
        common |= {"load": f"{os.getloadavg()[0]:.1f}", **machine("cuda" if cuda else "cpu")}
        for compile in (False, True) if cuda else (False,):
            mode = common | {"mode": "compiled" if compile else "eager"}
            arms = build_arms(run, live, compile=compile, others=others)
            try:
                measure_arms(arms, run, rounds=rounds, steps=steps, now=now)
            finally:
                for arm in arms:
                    if isinstance(arm.feed, Feed):
                        arm.feed.close()
            rows = rows_of(arms, run, mode)
            if not compile:
                for name, one in ((CACHED, run), (ONLINE, live)):
                    rows += part_rows(name, one, mode, now, min(rounds, 4) + 1)
            show(rows)
            append(out, rows, COLUMNS, instead_of=SAME if replace else ())


if __name__ == "__main__":
    main()
