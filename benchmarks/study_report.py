"""The study's tables from its CSV files, and all numbers behind tables and plots. Tables go between `<!-- NAME -->` and `<!-- /NAME -->` of docs/evidence.md,
the command lines of docs/evidence-commands.md.

Intervals are 95 % percentile bootstraps over the test images; those of differences are paired (the same images for both arms), and
where an arm has several seeds the mean over them is resampled. They hold the seeds fixed: the spread over seeds stands beside them.
"""

import csv
import functools
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import study_arms
from study_arms import ARMS, CACHES, RECIPES, Arm

Row = dict[str, Any]
DOCS = Path(__file__).parent.parent / "docs"
PROBES = {"knn": "10-NN", "linear": "linear", "attentive": "attentive", "finetune": "fine-tuned"}
COLUMNS = PROBES | {"segment": "mIoU of mosaics"}
RESAMPLES, NONE = 2000, "–"
T_OF_3_SEEDS = 4.303  # 97.5 % quantile of Student's t with two degrees of freedom


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def packed(right: np.ndarray[Any, Any]) -> str:
    """Right and wrong as hexadecimal digits, four images each."""
    return np.packbits(right.astype(bool)).tobytes().hex()


def unpacked(row: Row) -> np.ndarray[Any, Any]:
    bits = np.frombuffer(bytes.fromhex(row["right"]), np.uint8)
    return np.unpackbits(bits)[: int(row["n_test"])].astype(float)


def write(results: Path, docs: Path = DOCS) -> None:
    """Renew the tables of docs/evidence.md, and its command lines, with what the CSV files hold so far."""
    rows, cost = read(results / "study_mimic.csv"), read(results / "study_cost.csv")
    if not rows:
        return
    for page in (page for page in (docs / "evidence.md", docs / "evidence-commands.md") if page.exists()):
        text = page.read_text()
        for name, table in TABLES.items():
            text = replaced(text, name, table(rows, cost))
        page.write_text(text)


def replaced(text: str, name: str, lines: Iterable[str]) -> str:
    """`text` with these lines between the marks of `name`."""
    block = "\n".join([f"<!-- {name} -->", "", *lines, "", f"<!-- /{name} -->"])
    return re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _: block, text, flags=re.S)


# --- numbers


def chosen(rows: Sequence[Row], arms: Sequence[str], probe: str, epoch: int | None = None) -> list[Row]:
    """The rows of these arms, in their order, at their last epoch unless one is given."""
    found = []
    for arm in arms:
        mine = [
            row for row in rows if (row["arm"], row["probe"]) == (arm, probe) and epoch in (None, int(row["epoch"]))
        ]
        found += sorted(mine, key=lambda row: int(row["epoch"]))[-1:]
    return found


def seeds_of(recipe: str) -> list[str]:
    return [f"{recipe}-s{seed}" for seed in range(3)]


def right_share(rows: Sequence[Row]) -> np.ndarray[Any, Any]:
    """Of every test image the share of these rows that are right about it."""
    shares: np.ndarray[Any, Any] = np.mean([unpacked(row) for row in rows], axis=0)
    return shares


@functools.cache
def resamples(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(n, size=(RESAMPLES, n))


def mean_and_interval(values: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """The mean over test images, and its 95 % bootstrap interval."""
    low, high = np.quantile(values[resamples(len(values))].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def cell(rows: Sequence[Row]) -> str:
    if not rows:
        return NONE
    each = [float(row["accuracy"]) for row in rows]
    if not all(row["right"] for row in rows):
        return f"{np.mean(each):.3f} (seeds {min(each):.3f} to {max(each):.3f})"
    mean, low, high = mean_and_interval(right_share(rows))
    spread = f"; seeds {min(each):.3f} to {max(each):.3f}" if len(rows) > 1 else ""
    return f"{mean:.3f} ({low:.3f} to {high:.3f}{spread})"


def of_shared_seeds(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the seeds that both have; none where they were tested on different images."""
    shared = {row["seed"] for row in ours} & {row["seed"] for row in theirs}
    if not shared or ours[0]["n_test"] != theirs[0]["n_test"]:
        return [], []
    return [row for row in ours if row["seed"] in shared], [row for row in theirs if row["seed"] in shared]


def paired_points(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[float, float, float]:
    """ours - theirs in points, over the seeds that both have, and its paired interval."""
    ours, theirs = of_shared_seeds(ours, theirs)
    mean, low, high = mean_and_interval(right_share(ours) - right_share(theirs))
    return 100 * mean, 100 * low, 100 * high


def difference(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """ours - theirs, in points, over the seeds that both have."""
    ours, theirs = of_shared_seeds(ours, theirs)
    if not ours:
        return NONE
    each = [100 * (float(a["accuracy"]) - float(b["accuracy"])) for a, b in zip(ours, theirs)]
    whole = all(row["right"] for row in (*ours, *theirs))  # by image, else only by seed
    mean, low, high = paired_points(ours, theirs) if whole else (float(np.mean(each)), min(each), max(each))
    spread = f"; by seed {', '.join(f'{x:+.1f}' for x in each)}" if len(each) > 1 else ""
    if len(each) == 3:
        half = T_OF_3_SEEDS * float(np.std(each, ddof=1)) / 3**0.5
        spread += f"; over seeds {mean - half:+.1f} to {mean + half:+.1f}"
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}{spread})"


def cpu_of(cost: Sequence[Row], arm: str, what: str = "train") -> float:
    return sum(float(row["cpu_s"]) for row in cost if (row["arm"], row["what"]) == (arm, what))


# --- tables


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]


def headline_table(rows: Sequence[Row], cost: Sequence[Row]) -> list[str]:
    lines = []
    for recipe in (*RECIPES, "untrained", "teacher"):
        done = [arm for arm in [*seeds_of(recipe), recipe] if chosen(rows, [arm], "knn")]
        if not done:
            continue
        probed = [cell(chosen(rows, done, probe)) for probe in ("knn", "linear", "attentive")]
        tuned = cell(chosen(rows, [f"{recipe}-s0-finetuned"], "finetune"))
        lines.append([f"`{recipe}`" if recipe in RECIPES else recipe, str(len(done)), *probed, tuned,
                      f"{np.mean([cpu_of(cost, arm) for arm in done]):.0f} s" if recipe != "teacher" else NONE])  # fmt: skip
    return table(["recipe", "seeds", *PROBES.values(), "CPU of pre-training"], lines)


def claims_table(rows: Sequence[Row], cost: Sequence[Row]) -> list[str]:
    lines = []
    for other in ("mae", "mimic-only", "mimic-masked"):
        probed = [difference(chosen(rows, seeds_of("mr-mae"), p), chosen(rows, seeds_of(other), p))
                  for p in ("knn", "linear", "attentive")]  # fmt: skip
        tuned = [chosen(rows, [f"{recipe}-s0-finetuned"], "finetune") for recipe in ("mr-mae", other)]
        lines.append([f"`mr-mae` − `{other}`", *probed, difference(*tuned)])
    return table(["points", *PROBES.values()], lines)


def curve_table(rows: Sequence[Row], cost: Sequence[Row]) -> list[str]:
    epochs = sorted({int(row["epoch"]) for row in rows if row["arm"] == "mr-mae-s0" and row["probe"] == "knn"})
    lines = []
    for recipe in RECIPES:
        cells = [chosen(rows, [f"{recipe}-s0"], "knn", epoch) for epoch in epochs]
        lines.append([f"`{recipe}`", *(f"{right_share(c).mean():.3f}" if c else NONE for c in cells)])
    return table(["10-NN after epoch, seed 0", *map(str, epochs)], lines)


def budget_table(rows: Sequence[Row], cost: Sequence[Row]) -> list[str]:
    """Runs of seed 0 of different lengths, each with its own schedule, by what they cost with the teacher's pass."""
    lines = []
    for name in ("mae-s0", "mae-longer", "mimic-only-s0", "mr-mae-half", "mr-mae-s0"):
        arm = next(arm for arm in ARMS if arm["name"] == name)
        probed = [cell(chosen(rows, [name], probe)) for probe in ("knn", "linear")]
        seconds = cpu_of(cost, name) + extraction_of(arm, cost)
        lines.append([name, f"`{arm['recipe']}`", str(arm["epochs"]), *probed, f"{seconds:.0f} s"])
    return table(["arm", "recipe", "epochs", "10-NN", "linear", "CPU, extraction included"], lines)


def extraction_of(arm: Arm, cost: Sequence[Row]) -> float:
    """CPU seconds of the teacher's pass that an arm needs; none for pixels alone."""
    return 0.0 if arm["recipe"] == "mae" else cpu_of(cost, f"cache {arm['cache']}", "extract")


def arms_table(part: str, rows: Sequence[Row], cost: Sequence[Row]) -> list[str]:
    """The arms of a part against `mr-mae` of seed 0, which was run under the same setting."""
    lines = []
    for name in ["mr-mae-s0", *(arm["name"] for arm in ARMS if arm["part"] == part)]:
        arm = next(arm for arm in ARMS if arm["name"] == name)
        pair = [(chosen(rows, [name], probe), chosen(rows, ["mr-mae-s0"], probe)) for probe in ("knn", "linear")]
        values = [f"{float(a[0]['accuracy']):.3f}, {difference(a, b)}" if a else "not run" for a, b in pair]
        values = [f"{float(a[0]['accuracy']):.3f}" for a, _ in pair if a] if name == "mr-mae-s0" else values
        lines.append([name, f"`{changed(arm)}`", *values, f"{cpu_of(cost, name):.0f} s" if pair[0][0] else NONE])
    return table(["arm", "what differs", "10-NN", "linear", "CPU of pre-training"], lines)


def changed(arm: Arm) -> str:
    options = arm["options"].replace(
        study_arms.TEACHER.format(size=study_arms.TEACHER_SIZE[study_arms.data_of(arm)]), "TEACHER"
    )
    return ", ".join(filter(None, [arm["recipe"], options, "" if arm["cache"] == "eurosat-k1" else arm["cache"]]))


def without_seed(name: str) -> str:
    return re.sub(r"-s\d", "", name)


def of_all_seeds(label: str) -> list[Arm]:
    return [arm for arm in ARMS if without_seed(arm["name"]) == label]


def against_table(
    part: str,
    rows: Sequence[Row],
    cost: Sequence[Row],
    *,
    first: Sequence[str] = (),
    probes: Sequence[str] = ("knn", "linear"),
) -> list[str]:
    """The arms of a part over their seeds, each beside what it is compared with: accuracy, and the difference in points."""
    labels = dict.fromkeys([*first, *(without_seed(arm["name"]) for arm in ARMS if arm["part"] == part)])
    lines = []
    for label in labels:
        arms, usual = of_all_seeds(label), next(arm for arm in ARMS if arm["part"] == part)["against"]
        other = usual if label in first else arms[0]["against"]
        names, others = [arm["name"] for arm in arms], [arm["name"] for arm in of_all_seeds(other)]
        found = [(chosen(rows, names, probe), chosen(rows, others, probe)) for probe in probes]
        if not found[0][0]:
            continue
        against = other if other != label and found[0][1] else ""
        cells = [text for ours, theirs in found for text in (cell(ours), difference(ours, theirs) if against else "")]
        spent = [cpu_of(cost, name) for name in names if cpu_of(cost, name)]
        lines.append([label, str(len(found[0][0])), *cells, against, f"{np.mean(spent):.0f} s" if spent else NONE])
    head = [text for probe in probes for text in (COLUMNS[probe], "points more")]
    return table(["arm", "seeds", *head, "than", "CPU of pre-training"], lines)


def clothing_table(rows: Sequence[Row], cost: Sequence[Row]) -> list[str]:
    mine = {recipe: [f"clothing-{recipe}"] for recipe in RECIPES}
    lines = [[f"`{recipe}`", *(cell(chosen(rows, arm, p)) for p in ("knn", "linear")),
              difference(chosen(rows, mine["mr-mae"], "knn"), chosen(rows, arm, "knn")) if recipe != "mr-mae" else "",
              f"{cpu_of(cost, arm[0]):.0f} s" if chosen(rows, arm, "knn") else NONE] for recipe, arm in mine.items()]  # fmt: skip
    return table(["recipe", "10-NN", "linear", "`mr-mae` − it, 10-NN", "CPU of pre-training"], lines)


def cost_table(rows: Sequence[Row], cost: Sequence[Row]) -> list[str]:
    kinds = {"caches": ("extract", "statistics"), "pre-training": ("train",), "fine-tuning": ("finetune",)}
    known = {what for names in kinds.values() for what in names}
    parts = kinds | {"other probes": tuple({row["what"] for row in cost} - known)}
    sums = {kind: [sum(float(row[column]) for row in cost if row["what"] in names) / 60 for column in ("cpu_s", "wall_s")]
            for kind, names in parts.items()}  # fmt: skip
    sums["together"] = [sum(pair[i] for pair in sums.values()) for i in (0, 1)]
    return table(
        ["", "CPU minutes", "wall-clock minutes"], [[k, f"{cpu:.1f}", f"{wall:.1f}"] for k, (cpu, wall) in sums.items()]
    )


def command_lines(rows: Sequence[Row], cost: Sequence[Row]) -> list[str]:
    """What was typed for every arm that ran, long tails once."""
    tails = {study_arms.TRAINING: "TRAINING", study_arms.PROBING: "PROBING", study_arms.FINETUNING: "FINETUNING"}
    lines = [f"{name}='{text}'" for text, name in tails.items()]
    done = {row["arm"] for row in rows}
    ran = [arm for arm in ARMS if arm["name"] in done]
    every = [study_arms.extraction(name) for name in CACHES if name in {arm["cache"] for arm in ran}]
    every += [command for arm in ran for command in study_arms.commands(arm)]
    for command in every:
        text = shlex.join(command)
        for tail, name in tails.items():
            text = text.replace(shlex.join(tail.split()), f"${name}")
        lines.append(text)
    return ["```sh", *lines, "```"]


TABLES: dict[str, Callable[[Sequence[Row], Sequence[Row]], list[str]]] = {
    "headline": headline_table,
    "claims": claims_table,
    "curve": curve_table,
    "budget": budget_table,
    "part 2": functools.partial(arms_table, "2"),
    "part 3": functools.partial(arms_table, "3"),
    "part 4": functools.partial(arms_table, "4"),
    "targets": functools.partial(against_table, "targets"),
    "others": functools.partial(against_table, "others"),
    "decoder": functools.partial(against_table, "decoder", first=["both-position"]),
    "blocks": functools.partial(against_table, "blocks"),
    "optimiser": functools.partial(against_table, "optimiser", first=["both-position"]),
    "fast decoder": functools.partial(against_table, "fast decoder", first=["adamw-12e-3"]),
    "fast blocks": functools.partial(against_table, "fast blocks", first=["adamw-12e-3", "fast-views-4-position"]),
    "fast targets": functools.partial(against_table, "fast targets", first=["adamw-12e-3-ln0", "adamw-12e-3"]),
    "fast others": functools.partial(against_table, "fast others"),
    "fast photos": functools.partial(against_table, "fast photos"),
    "held": functools.partial(against_table, "held"),
    "held tested": functools.partial(against_table, "held tested", probes=("knn", "linear", "attentive")),
    "more": functools.partial(against_table, "more", probes=("attentive", "segment")),
    "codes": functools.partial(against_table, "codes", probes=("knn", "linear", "attentive")),
    "attention": functools.partial(against_table, "attention"),
    "tested": functools.partial(against_table, "tested", probes=("knn", "linear", "attentive")),
    "clothing": clothing_table,
    "cost": cost_table,
    "commands": command_lines,
}
