"""Everything wanted from one NVIDIA GPU, in one call under ten minutes; the targets were declared before any GPU was seen.

    benchmarks/gpu.sh                 # chooses small shapes by itself where there is no GPU: every piece runs, and its numbers say nothing
    benchmarks/gpu.sh --only kernels --only steps

Each piece is a process of its own with its own time limit; one that fails or takes too long is said, what it had measured stays, and
the others run. Rows go to benchmarks/results (with small shapes to a temporary folder, unless --results names another); the table of
targets comes last. The exit status is 1 where a piece failed.
"""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rows import append

HERE = Path(__file__).parent
TINY = ("a=timm:test_vit/random", "b=timm:test_vit2/random")
SMALL_TRAIN = (*"--student test_vit --batch-size 2 --size 112 --grid 14 --rounds 1 --steps 1 --workers 1".split(),
               "--teacher", TINY[0], "--teacher", TINY[1])  # fmt: skip
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Piece:
    """One process: a script of this folder (or `-m module`), what it is told on a GPU and for small shapes, and its time limit.

    to: the CSV its rows belong to; empty for none.
    """

    name: str
    seconds: float
    script: str
    full: Sequence[str]
    small: Sequence[str]
    to: str = ""

    def command(self, small: bool, out: Path) -> list[str]:
        """The process to start."""
        start = ["-m", *self.script.split()[1:]] if self.script.startswith("-m ") else [str(HERE / self.script)]
        return [
            sys.executable,
            *start,
            *(self.small if small else self.full),
            *(["--out", str(out)] if self.to else []),
        ]


PIECES = (
    Piece("throughput", 120, "bench_throughput.py", ("--compile", "--batch-size", "512", "--rounds", "5"), SMALL_TRAIN, "throughput.csv"),
    Piece("extraction", 60, "bench_two_teachers.py", ("--images", "6144"),
          ("--images", "8", "--batch-size", "4", "--size", "112", "--rounds", "1", "--teacher", TINY[0], "--teacher", TINY[1]),
          "two_teachers.csv"),
    Piece("kernels", 80, "bench_kernels.py", ("--device", "cuda", "-n", "256", "-n", "1024", "--budget-s", "0.1"),
          ("--device", "cpu", "-n", "1", "--no-compiled", "--budget-s", "0.01"), "kernels.csv"),
    Piece("steps", 150, "bench_train.py", ("--device", "cuda", "--rounds", "3", "--steps", "5"), SMALL_TRAIN, "train.csv"),
    Piece("kernels auto", 40, "bench_throughput.py", ("--recipe", "mr-mae", "--kernels", "auto", "--rounds", "3", "--steps", "3"),
          (*SMALL_TRAIN, "--recipe", "mr-mae", "--kernels", "auto"), "throughput.csv"),
    Piece("decoder grid", 40, "bench_throughput.py",
          ("--recipe", "mr-mae", "--rounds", "3", "--steps", "5", *(x for d in (1, 2, 4, 8) for w in (256, 512) for x in ("--decoder", f"{d}x{w}")),
           "--decoder", "2x384"),
          (*SMALL_TRAIN, "--recipe", "mr-mae", "--decoder", "1x64", "--decoder", "2x64"), "throughput.csv"),
    Piece("device tests", 100, "-m pytest", ("-m", "gpu", "tests/kernels", "-q", "-p", "no:cacheprovider"),
          ("-m", "gpu", "tests/kernels/test_ops.py", "-q", "-p", "no:cacheprovider")),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What one H100 should reach. value: the number found among the rows of this call, None where it is not there."""

    what: str
    at_least: float | None
    at_most: float | None
    value: Callable[[dict[str, Rows]], float | None]


def throughput(recipe: str, column: str) -> Callable[[dict[str, Rows]], float | None]:
    """The best of a compiled recipe with its own decoder."""

    def found(rows: dict[str, Rows]) -> float | None:
        mine = [
            float(r[column]) for r in rows.get("throughput", []) if (r["recipe"], r["mode"]) == (recipe, "compiled")
        ]
        return max(mine, default=None)

    return found


def extraction_ratio(rows: dict[str, Rows]) -> float | None:
    return min((float(r["ratio"]) for r in rows.get("extraction", [])), default=None)


def step_ratio(one: str, other: str) -> Callable[[dict[str, Rows]], float | None]:
    """The compiled one."""

    def found(rows: dict[str, Rows]) -> float | None:
        mine = [r for r in rows.get("steps", []) if (r["arm"], r["ratio_to"], r["mode"]) == (one, other, "compiled")]
        return float(mine[0]["ratio"]) if mine else None

    return found


def worst_kernel(rows: dict[str, Rows]) -> float | None:
    """The largest ratio of a kernel's time to its compiled reference's."""
    times = {(r["kernel"], r["mode"], r["shape"], r["provider"]): float(r["p50_ms"]) for r in rows.get("kernels", [])}
    pairs = [(ms, times.get((*case, "reference compiled"))) for (*case, who), ms in times.items() if who == "triton"]
    return max((ms / other for ms, other in pairs if other), default=None)


TARGETS = (
    Target("images/s, published decoder (mr-mae), loader running", 5500, None, throughput("mr-mae", "images_per_s")),
    Target("images/s, light decoder (mr-mae-light), loader running", 9000, None, throughput("mr-mae-light", "images_per_s")),
    Target("loader, of a resident batch's speed, mr-mae", 0.95, None, throughput("mr-mae", "loader_share")),
    Target("loader, of a resident batch's speed, mr-mae-light", 0.95, None, throughput("mr-mae-light", "loader_share")),
    Target("extraction with two ViT-B / their forward alone", None, 1.05, extraction_ratio),
    Target("step, cached / online, compiled", None, 0.48, step_ratio("MR-MAE cached", "MR-MAE online")),
    Target("step, cached / stock MAE, compiled", None, 1.02, step_ratio("MR-MAE cached", "stock MAE")),
    Target("slowest kernel / its compiled reference", None, 1.0, worst_kernel),
)  # fmt: skip


def verdict(target: Target, value: float | None, *, small: bool) -> str:
    """`met`, `missed` or `not measured`; small shapes measure nothing."""
    if value is None or small or not value == value:
        return "not measured"
    reached = (target.at_least is None or value >= target.at_least) and (
        target.at_most is None or value <= target.at_most
    )
    return "met" if reached else "missed"


def run_piece(piece: Piece, *, small: bool, out: Path) -> str:
    """`ok` with its seconds, or how it ended; nothing of it runs on."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(piece.command(small, out), cwd=HERE.parent, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=piece.seconds)
        how = "ok" if status == 0 else f"FAILED with status {status}"
    except subprocess.TimeoutExpired:
        how = "CUT SHORT at its limit"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group: helpers that it left behind
        process.wait()
    return f"{how}, {time.perf_counter() - began:.0f} of {piece.seconds:.0f} s"


def read_csv(path: Path) -> Rows:
    """The rows of a CSV; none where it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def targets_table(found: dict[str, Rows], device: str, *, small: bool) -> list[str]:
    """A line per target."""
    lines = [f"targets, declared for one H100 before any GPU had run this; here: {device}"]
    for target in TARGETS:
        value = target.value(found)
        goal = f">= {target.at_least:g}" if target.at_least is not None else f"<= {target.at_most:g}"
        number = "-" if value is None or small else f"{value:.4g}"
        lines.append(f"  {target.what:<58} {goal:>9} {number:>9}  {verdict(target, value, small=small)}")
    return lines


@click.command(context_settings={"show_default": True})
@click.option("--small", is_flag=True, help="Small shapes on the CPU. [default: where there is no GPU]")
@click.option(
    "--only", multiple=True, type=click.Choice([p.name for p in PIECES]), help="Only these pieces; repeatable."
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Folder for the rows. [default: benchmarks/results; with small shapes none]",
)
def main(small: bool, only: tuple[str, ...], results: Path | None) -> None:
    """Run the pieces one after another, and hold what they found to the targets."""
    import torch

    small = small or not torch.cuda.is_available()
    device = "CPU, small shapes: nothing is measured" if small else torch.cuda.get_device_name()
    if small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    click.echo(f"{device}; torch {torch.__version__}; at most {sum(p.seconds for p in PIECES):.0f} s")
    found: dict[str, Rows] = {}
    ends: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as work:
        for i, piece in enumerate(p for p in PIECES if not only or p.name in only):
            click.echo(f"--- {piece.name}")
            out = Path(work) / f"{i}-{piece.to}"
            ends[piece.name] = run_piece(piece, small=small, out=out)
            found[piece.name] = read_csv(out)
            click.echo(f"--- {piece.name}: {ends[piece.name]}, {len(found[piece.name])} rows")
            target: Any = results or (None if small else HERE / "results")
            if piece.to and target is not None and found[piece.name]:
                target.mkdir(parents=True, exist_ok=True)
                append(target / piece.to, found[piece.name])
    for name, how in ends.items():
        click.echo(f"{name:<16} {how}")
    for line in targets_table(found, device, small=small):
        click.echo(line)
    raise SystemExit(any(not how.startswith("ok") for how in ends.values()))


if __name__ == "__main__":
    main()
