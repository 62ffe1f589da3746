"""What glibc's kept memory and SCHED_BATCH do to a teacher's forward on one core: processes in turns, medians of ratios.

OMP_NUM_THREADS=1 python benchmarks/bench_malloc.py --rounds 4
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import timm
import torch
from measure import ROOT, machine
from rows import append

from mrmae.common.device import keep_memory

HOW = ("plain", "mallopt", "SCHED_BATCH")


def forward_seconds(how: str, batch: int = 8, repeats: int = 6) -> float:
    """CPU seconds of MobileNetV2's forward in this process, which is as `how` says."""
    torch.set_num_threads(1)
    if how == "mallopt":
        keep_memory("cpu")
    if how == "SCHED_BATCH":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    model = timm.create_model("mobilenetv2_100").eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            began = time.process_time()
            model(x)
            seconds.append(time.process_time() - began)
    return statistics.median(seconds[1:])


@click.command()
@click.option("--rounds", default=4, type=click.IntRange(1))
@click.option("--how", type=click.Choice(HOW), help="Of one process.")
@click.option("--out", default=ROOT / "results" / "malloc.csv", type=click.Path(path_type=Path))
def main(rounds: int, how: str | None, out: Path) -> None:
    """Append a row per way, as a ratio to a plain process."""
    if how:
        click.echo(forward_seconds(how))
        return
    ask = [sys.executable, __file__, "--how"]
    turns = [{name: float(subprocess.check_output([*ask, name])) for name in HOW} for _ in range(rounds)]
    about = machine("cpu")
    common = {"load": os.getloadavg()[0], **{k: about[k] for k in ("device", "torch", "commit", "date")}}
    found = []
    for name in HOW[1:]:
        ratios = [turn[name] / turn["plain"] for turn in turns]
        found.append({"what": "forward of mobilenetv2_100, batch 8", "how": name, "ratio": round(statistics.median(ratios), 3),
                      "low": round(min(ratios), 3), "high": round(max(ratios), 3), "rounds": rounds, **common})  # fmt: skip
        click.echo(str(found[-1]))
    append(out, found)


if __name__ == "__main__":
    main()
