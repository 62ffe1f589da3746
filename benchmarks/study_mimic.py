"""Does mimicking before reconstructing help? Small students on a CPU; every arm is a few product commands (`--list`).

    python benchmarks/study_mimic.py                      # all arms that are not finished; the same again continues
    python benchmarks/study_mimic.py --only 'weight-*'    # some
    python benchmarks/study_mimic.py --report             # tables and plots from the CSV files; computes nothing

Writes benchmarks/results/study_mimic.csv (a row per arm, seed, probe and epoch) and study_cost.csv (CPU time).
Labels are used by the probes only.
"""

import csv
import fnmatch
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import safetensors.numpy
import study_arms
import study_plots
import study_report
from study_arms import ARMS, CACHES, Arm

RESULTS = Path(__file__).parent / "results"
MODULES = {"extract-features": "mrmae.extract.cli", "train-mrmae": "mrmae.train.cli", "inspect-cache": "mrmae.extract.inspect.cli"}  # fmt: skip
KEY = ("arm", "probe", "epoch")


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option(
    "--data-root", type=click.Path(path_type=Path), default=Path("../shared/data"), help="DATA/ of the commands."
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/study"), help="WORK/: caches and runs.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Arms whose name matches; repeatable.")
@click.option("--list", "listing", is_flag=True, help="Print every arm's commands and stop.")
@click.option("--report", is_flag=True, help="Tables and plots from the CSV files; nothing is computed.")
def main(data_root: Path, work: Path, only: Sequence[str], listing: bool, report: bool) -> None:
    """Run the arms of the study, in the order of their worth, and report."""
    arms = [arm for arm in ARMS if not only or any(fnmatch.fnmatch(arm["name"], pattern) for pattern in only)]
    if not arms:
        raise click.ClickException(f"--only {' '.join(only)}: matches no arm; expected one of --list")
    if listing:
        for line in listed(arms):
            click.echo(line)
        return
    places = {"DATA": str(data_root), "WORK": str(work)}
    for arm in [] if report else arms:
        run_arm(arm, places)
    study_report.write(RESULTS)
    study_plots.draw(RESULTS)


def listed(arms: Sequence[Arm]) -> list[str]:
    """Every command of these arms and of the caches they read."""
    lines = [f"# cache {name}\n{shlex.join(study_arms.extraction(name))}"
             for name in CACHES if name in {arm["cache"] for arm in arms}]  # fmt: skip
    for arm in arms:
        lines += [f"# {arm['name']}", *(shlex.join(command) for command in study_arms.commands(arm))]
    return lines


def run_arm(arm: Arm, places: Mapping[str, str]) -> None:
    """Train and probe one arm, unless that is done; its rows go into the CSV files."""
    state = State(Path(places["WORK"]) / "arms" / f"{arm['name']}.json")
    if state.finished:
        return
    make_cache(arm["cache"], places)
    if command := study_arms.training(arm):
        with state.timed("train"):
            outside(command, places)
    rows = []
    for epoch, probes, command in study_arms.probings(arm):
        with state.timed("+".join(probes)):
            inside(command, places)
        rows += [row_of(arm, epoch, found) for found in results_of(command, probes, places)]
    merge(RESULTS / "study_mimic.csv", rows, KEY)
    state.finish(arm["name"])
    study_report.write(RESULTS)


def make_cache(name: str, places: Mapping[str, str]) -> None:
    """Extract a cache (or grow a copy of a smaller one), with the statistics that one target normalisation needs."""
    state = State(Path(places["WORK"]) / "arms" / f"cache-{name}.json")
    if state.finished:
        return
    path, smaller = Path(places["WORK"]) / "caches" / name, CACHES[name][3]
    if smaller:
        make_cache(smaller, places)
        if not path.exists():
            shutil.copytree(path.with_name(smaller), path.with_name(f"{name}.copy"), dirs_exist_ok=True)
            path.with_name(f"{name}.copy").rename(path)
    with state.timed("extract"):
        outside(study_arms.extraction(name), places)
    with state.timed("statistics"):
        outside(["inspect-cache", "stats", f"WORK/caches/{name}"], places)
    state.finish(f"cache {name}")


class State:
    """What an arm has cost so far, and whether it is finished: a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cost": {}, "finished": False}

    @property
    def finished(self) -> bool:
        return bool(self.now["finished"])

    @contextmanager
    def timed(self, what: str) -> Any:
        """Adds CPU and wall-clock seconds of this process and its children to `what`, also when it fails."""
        before = cpu_s(), time.monotonic()
        try:
            yield
        finally:
            old = self.now["cost"].get(what, [0.0, 0.0])
            self.now["cost"][what] = [old[0] + cpu_s() - before[0], old[1] + time.monotonic() - before[1]]
            self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".tmp")
        part.write_text(json.dumps(self.now))
        part.replace(self.path)

    def finish(self, name: str) -> None:
        self.now["finished"] = True
        self.save()
        where = machine()
        rows = [{"arm": name, "what": what, "cpu_s": f"{cpu:.1f}", "wall_s": f"{wall:.1f}", **where}
                for what, (cpu, wall) in self.now["cost"].items()]  # fmt: skip
        merge(RESULTS / "study_cost.csv", rows, ("arm", "what"))


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in spent)


def placed(command: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """The command with DATA/ and WORK/ filled in."""
    return [word.replace("DATA/", f"{places['DATA']}/").replace("WORK/", f"{places['WORK']}/") for word in command]


def outside(command: Sequence[str], places: Mapping[str, str]) -> None:
    """Run a product command in its own process."""
    click.secho(f"$ {shlex.join(command)}", bold=True)
    name, *words = placed(command, places)
    code = subprocess.run(
        [sys.executable, "-m", MODULES[name], *words], env=os.environ | {"OMP_NUM_THREADS": "1"}
    ).returncode
    if code:
        raise click.ClickException(f"{command[0]}: ended with {code}; the same study command continues")


def inside(command: Sequence[str], places: Mapping[str, str]) -> None:
    """Run probe-features in this process: importing torch for each of hundreds of probes would cost more than the probes."""
    import torch

    from mrmae.probe.cli import main as probe_features

    torch.set_num_threads(1)
    click.secho(f"$ {shlex.join(command)}", bold=True)
    probe_features.main(placed(command, places)[1:], standalone_mode=False)


def results_of(command: Sequence[str], probes: Sequence[str], places: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a probing command has just found, with the right and wrong test images: a hexadecimal digit for every four."""
    from mrmae.probe import report
    from mrmae.probe.data import open_data

    words = placed(command, places)
    source, photos, home = words[1], words[2], Path(words[words.index("--out") + 1])
    includes = {
        option: [words[words.index(option) + 1]] for option in ("--train-include", "--test-include") if option in words
    }
    data = open_data([photos], home, **{option[2:].replace("-", "_"): found for option, found in includes.items()})
    truth, found = data.labels(data.test).numpy(), []
    for probe in probes:
        result = newest([r for r in report.all_results(home) if (r["source"], r["probe"]) == (source, probe)], home)
        answers = report.result_path(home, probe, result["id"]).with_suffix(".safetensors")
        right = ""  # of pixels there is no answer per image
        if probe != "segment":
            right = study_report.packed(safetensors.numpy.load_file(answers)["predicted"] == truth)
        found.append(result | {"right": right})
    return found


def newest(results: Sequence[dict[str, Any]], home: Path) -> dict[str, Any]:
    """Of several results of one probe (other settings, earlier) the one that was written last."""
    from mrmae.probe import report

    return max(results, key=lambda r: report.result_path(home, r["probe"], r["id"]).stat().st_mtime)


def row_of(arm: Arm, epoch: int, found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = found["interval"]
    return {"part": arm["part"], "arm": arm["name"], "recipe": arm["recipe"], "seed": arm["seed"], "epoch": epoch, "probe": found["probe"],
            "accuracy": f"{found['accuracy']:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}", "n_train": found["n_train"],
            "n_test": found["n_test"], **machine(), "right": found["right"]}  # fmt: skip


def machine() -> dict[str, str]:
    """When, on what and with what: the columns that every row ends with."""
    import torch

    git = subprocess.run(["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if "model name" in line), "unknown")
    return {"load": f"{os.getloadavg()[0]:.1f}", "device": f"CPU, 1 thread, {model}", "torch": torch.__version__,
            "commit": git.stdout.strip(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}  # fmt: skip


def merge(path: Path, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Put rows into a CSV file, in the place of rows of the same key."""

    def id_of(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in key)

    old: list[dict[str, Any]] = study_report.read(path)
    kept = {id_of(row): row for row in [*old, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    main()
