"""The study's plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import study_arms
import study_report
from study_arms import ARMS

Row = dict[str, Any]
COLOURS = {"mae": "#000000", "mr-mae": "#0072b2", "mimic-only": "#d55e00", "mimic-masked": "#009e73"}  # Okabe-Ito
DRAWN = ("knn", "linear")  # probes side by side


def draw(results: Path, docs: Path = study_report.DOCS) -> None:
    """Draw all plots from what the CSV files hold so far."""
    rows, cost = study_report.read(results / "study_mimic.csv"), study_report.read(results / "study_cost.csv")
    if rows:
        draw_curves(docs / "pictures" / "study_curves.png", rows, cost)
        draw_arms(docs / "pictures" / "study_arms.png", rows)
        draw_choices(docs / "pictures" / "study_choices.png", rows, study_arms.VALIDATION, "validation tiles")
        draw_choices(docs / "pictures" / "study_photographs.png", rows, study_arms.HELD_OUT, "validation photographs")
        draw_cost(docs / "pictures" / "study_cost.png", rows, cost)


def draw_curves(path: Path, rows: Sequence[Row], cost: Sequence[Row]) -> None:
    """10-NN accuracy over epochs, and over the CPU time that was spent until then, extraction included."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    arms = [
        (arm["name"], arm)
        for arm in ARMS
        if arm["part"] == "1" and arm["recipe"] in COLOURS and arm["name"] != "untrained-s0"
    ]
    named: set[str] = set()
    for name, arm in arms:
        points = sorted(
            (int(r["epoch"]), float(r["accuracy"])) for r in rows if (r["arm"], r["probe"]) == (name, "knn")
        )
        if not points:
            continue
        recipe, longer = arm["recipe"], arm["epochs"] != study_arms.EPOCHS
        extraction = study_report.extraction_of(arm, cost)
        per_epoch = study_report.cpu_of(cost, name) / arm["epochs"]
        style = {
            "color": COLOURS[recipe],
            "marker": "s" if longer else "o",
            "ms": 5 if longer else 3,
            "lw": 1.2,
            "ls": "--" if longer else "-",
        }
        label = recipe + (f", {arm['epochs']} epochs" if longer else "")
        label = "_" + label if label in named else label
        named.add(label)
        epochs, accuracy = zip(*points)
        axes[0].plot(epochs, accuracy, label=label, **style)
        axes[1].plot([extraction + per_epoch * e for e in epochs], accuracy, **style)
    axes[0].set(xlabel="epoch", ylabel="10-NN accuracy, EuroSAT test part", xticks=range(0, 31, 5))
    axes[1].set(xlabel="CPU seconds: extraction (if any) and pre-training so far")
    for row in study_report.chosen(rows, ["untrained-s0"], "knn"):
        for axis in axes:
            axis.axhline(float(row["accuracy"]), color="#999999", lw=0.8, zorder=0)
        at = {"x": 0.99, "y": float(row["accuracy"]), "transform": axes[1].get_yaxis_transform()}
        axes[1].text(s="untrained", color="#777777", fontsize=8, ha="right", va="bottom", **at)
    order = sorted(axes[0].get_lines(), key=lambda line: -line.get_ydata()[-1])
    order = [line for line in order if not str(line.get_label()).startswith("_")]
    axes[0].legend(
        order, [line.get_label() for line in order], fontsize=8, loc="lower right", title="best first", title_fontsize=8
    )
    finish(figure, path)


def draw_arms(path: Path, rows: Sequence[Row]) -> None:
    """Every other arm minus `mr-mae` of the same seed."""
    usual = {probe: study_report.chosen(rows, ["mr-mae-s0"], probe) for probe in DRAWN}
    arms = {arm["name"]: ([arm["name"]], ["mr-mae-s0"]) for arm in ARMS if arm["part"] in ("2", "3", "4")}
    if all(usual.values()):
        titles = {probe: f"arm − mr-mae ({float(found[0]['accuracy']):.3f})" for probe, found in usual.items()}
        draw_differences(path, rows, arms, titles)


def draw_choices(path: Path, rows: Sequence[Row], test: str, title: str) -> None:
    """What was chosen on these images, each minus what it is compared with, over the seeds that both have."""
    arms = {}
    for arm in ARMS:
        label = study_report.without_seed(arm["name"])
        if arm["against"] not in ("", label) and arm["test"] == test:
            pair = (study_report.of_all_seeds(name) for name in (label, arm["against"]))
            arms[f"{label} − {arm['against']}"] = tuple([one["name"] for one in side] for side in pair)
    draw_differences(path, rows, arms, dict.fromkeys(DRAWN, title))


def draw_differences(path: Path, rows: Sequence[Row], arms: Mapping[str, Any], titles: Mapping[str, str]) -> None:
    """Differences in points of pairs of arms, best first by 10-NN; paired intervals, full where they leave 0 out. titles: by probe."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {probe: {} for probe in DRAWN}
    for probe, points in found.items():
        for label, sides in arms.items():
            ours, theirs = (study_report.chosen(rows, names, probe) for names in sides)
            if ours and theirs and study_report.of_shared_seeds(ours, theirs)[0]:
                points[label] = study_report.paired_points(ours, theirs)
    names = sorted(found["knn"], key=lambda name: found["knn"][name][0])
    if not names:
        return
    size = (9, 1.3 + 0.26 * len(names))
    figure, axes = pyplot().subplots(1, 2, figsize=size, sharey=True, sharex=True, layout="constrained")
    for axis, (probe, points) in zip(axes, found.items()):
        for y, name in enumerate(names):
            mean, low, high = points[name]
            colour, clear = COLOURS["mr-mae"], low > 0 or high < 0
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, ms=5, capsize=2,
                          markerfacecolor=colour if clear else "white")  # fmt: skip
        axis.axvline(0, color="#999999", lw=0.8)
        axis.set(xlabel="points", title=f"{study_report.PROBES[probe]}: {titles[probe]}")
        axis.title.set_fontsize(10)
    axes[0].set_yticks(range(len(names)), names)
    finish(figure, path)


def draw_cost(path: Path, rows: Sequence[Row], cost: Sequence[Row]) -> None:
    """Accuracy on the validation tiles over the CPU seconds of pre-training, the mean over seeds, of all that had both teachers and the better rate."""
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 6), layout="constrained")
    parts = {"optimiser": "#cc79a7", "fast targets": "#000000", "fast others": "#d55e00", "fast decoder": "#0072b2", "fast blocks": "#009e73"}  # fmt: skip
    for axis, probe in zip(axes, DRAWN):
        for label in dict.fromkeys(study_report.without_seed(arm["name"]) for arm in ARMS if arm["part"] in parts):
            arms = study_report.of_all_seeds(label)
            done = study_report.chosen(rows, [arm["name"] for arm in arms], probe)
            alike = arms[0]["test"] == study_arms.VALIDATION and "teachers=" not in arms[0]["options"]
            if done and alike and ("12e-3" in arms[0]["options"] or "36e-3" in arms[0]["options"]):
                known = [seconds for row in done if (seconds := study_report.cpu_of(cost, row["arm"]))]
                if not known:
                    continue
                spent = sum(known) / len(known)  # of those that were not interrupted
                share = study_report.right_share(done).mean()
                axis.plot(spent, share, "o", color=parts[arms[0]["part"]], ms=4)
                axis.annotate(
                    f"{label.removeprefix('fast-')} ({len(done)})",
                    (spent, share),
                    (4, 2),
                    textcoords="offset points",
                    fontsize=7,
                )
        axis.set(xlabel="CPU seconds of pre-training", ylabel=f"{study_report.PROBES[probe]} accuracy")
        axis.margins(x=0.2)
    finish(figure, path)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot().close(figure)
