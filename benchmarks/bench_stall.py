"""How long a real run waited for its loader, from its own log.

    train-mrmae CACHE OUT --log-every 1 --panels-every 0 ...
    python benchmarks/bench_stall.py OUT --note "60 photographs, two teachers, int8"

The first update, for which nothing could be read ahead, stands in a column of its own. The row is appended to
benchmarks/results/stall.csv, or `--out`.
"""

import json
import os
from pathlib import Path

import click
import yaml
from measure import ROOT, append, machine

from mrmae.train.log import read_rows

COLUMNS = "student,recipe,batch,workers,note,updates,s_per_update,stall,stall_first,stall_worst,load,device,torch,triton,commit,date".split(
    ","
)


def stalls(out: Path) -> list[tuple[float, float]]:
    """(seconds, share of them spent waiting) of every update in the log of a run with `--log-every 1`."""
    rows, batch = read_rows(out / "log.jsonl", "step"), batch_of(out)
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)) or len(rows) < 2:
        raise click.ClickException(
            f"{out}: its log lacks updates; a run from its beginning with --log-every 1 was expected"
        )
    return [(batch / row["images_per_s"], row["stall"]) for row in rows]


def batch_of(out: Path) -> int:
    """Images per update of a run."""
    return int(yaml.safe_load((out / "recipe.yaml").read_text())["optim"]["batch_size"])


@click.command(context_settings={"show_default": True})
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--note", default="", help="What the cache holds.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "results" / "stall.csv")
def main(run: Path, note: str, out: Path) -> None:
    """Append the stall of RUN, an OUT of train-mrmae, to a CSV, and print it."""
    facts = json.loads((run / "run.json").read_text())
    start = facts["starts"][-1]
    (first_s, first), *later = stalls(run)
    seconds = sum(s for s, _ in later)
    row = {
        "student": facts["student"], "recipe": facts["recipe"], "batch": batch_of(run), "workers": start["workers"], "note": note,
        "updates": len(later), "s_per_update": seconds / len(later), "stall": sum(s * share for s, share in later) / seconds,
        "stall_first": first, "stall_worst": max(share for _, share in later), "load": f"{os.getloadavg()[0]:.1f}",
        **machine("cuda" if start["device"].startswith("cuda") else "cpu"),
    }  # fmt: skip
    append(out, [row], COLUMNS)
    print(f"{row['student']}, {len(later)} updates of {row['s_per_update']:.3g} s: waited {100 * row['stall']:.2f} % of the time for the loader"
          f" (first update {100 * first:.2f} % of {first_s:.3g} s)")  # fmt: skip


if __name__ == "__main__":
    main()
