"""The study's plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study_arms
import study_report
from study_arms import ARMS

Row = dict[str, Any]
COLOURS = {"mae": "#000000", "mr-mae": "#0072b2", "mimic-only": "#d55e00", "mimic-masked": "#009e73"}  # Okabe-Ito


def draw(results: Path, docs: Path = study_report.DOCS) -> None:
    """Draw all plots from what the CSV files hold so far."""
    rows, cost = study_report.read(results / "study_mimic.csv"), study_report.read(results / "study_cost.csv")
    if rows:
        draw_curves(docs / "pictures" / "study_curves.png", rows, cost)
        draw_arms(docs / "pictures" / "study_arms.png", rows)


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
    """Every other arm minus `mr-mae` of the same seed, best first by 10-NN; paired intervals, full where they leave 0 out."""
    plt, usual = pyplot(), "mr-mae-s0"
    names = [arm["name"] for arm in ARMS if arm["part"] in ("2", "3", "4")]
    names = [name for name in names if study_report.chosen(rows, [name], "knn")]
    if not names or not study_report.chosen(rows, [usual], "knn"):
        return
    found = {probe: {name: minus_usual(rows, name, usual, probe) for name in names} for probe in ("knn", "linear")}
    names.sort(key=lambda name: found["knn"][name][0])
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 1.3 + 0.26 * len(names)), sharey=True, sharex=True, layout="constrained"
    )
    for axis, (probe, points) in zip(axes, found.items()):
        for y, name in enumerate(names):
            mean, low, high = points[name]
            colour, clear = COLOURS["mr-mae"], low > 0 or high < 0
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, ms=5, capsize=2,
                          markerfacecolor=colour if clear else "white")  # fmt: skip
        axis.axvline(0, color="#999999", lw=0.8)
        there = float(study_report.chosen(rows, [usual], probe)[0]["accuracy"])
        axis.set(xlabel="points", title=f"{study_report.PROBES[probe]}: arm − mr-mae ({there:.3f})")
        axis.title.set_fontsize(10)
    axes[0].set_yticks(range(len(names)), names)
    finish(figure, path)


def minus_usual(rows: Sequence[Row], name: str, usual: str, probe: str) -> tuple[float, float, float]:
    """The difference in points and its paired interval."""
    ours, theirs = (study_report.chosen(rows, [arm], probe) for arm in (name, usual))
    return study_report.paired_points(ours, theirs)


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
