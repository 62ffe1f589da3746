"""The study's plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    axes[0].legend(fontsize=8, loc="lower right")
    finish(figure, path)


def draw_arms(path: Path, rows: Sequence[Row]) -> None:
    """Every other arm with its intervals, beside `mr-mae` of the same seed."""
    plt = pyplot()
    names = ["mr-mae-s0", *(arm["name"] for arm in ARMS if arm["part"] in ("2", "3", "4"))]
    names = [name for name in names if study_report.chosen(rows, [name], "knn")][::-1]
    if len(names) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 1 + 0.26 * len(names)), sharey=True, layout="constrained")
    for axis, probe in zip(axes, ("knn", "linear")):
        found = [study_report.chosen(rows, [name], probe)[0] for name in names]
        values = np.array([[float(row[key]) for key in ("accuracy", "low", "high")] for row in found])
        spread = np.abs(values[:, 1:] - values[:, :1]).T
        axis.errorbar(values[:, 0], range(len(names)), xerr=spread, fmt="o", color="#0072b2", ms=4, capsize=2)
        axis.axvline(values[-1, 0], color="#999999", lw=0.8)
        axis.set_xlabel(f"{study_report.PROBES[probe]} accuracy, EuroSAT test part")
    axes[0].set_yticks(range(len(names)), names)
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
