"""Draws architecture.png, the picture of docs/architecture.md: python docs/pictures/architecture.py

What stands on what is read from the table that tests/test_layers.py enforces.
"""

import runpy
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
RULES = runpy.run_path(str(HERE.parent.parent / "tests" / "test_layers.py"))
WHAT = {
    "common": ["progress, devices, files, object stores, pictures, k-NN"],
    "kernels": ["masking gather,", "normalised-pixel loss,", "mimic loss:", "a reference, Triton,", "and who chooses"],
    "shards": ["the cache: opened, ordered, committed, planned, checked, converted"],
    "extract": ["images and frozen teachers in, committed shards out"],
    "train": ["batches, steps, checkpoints, the student as timm loads it"],
    "probe": ["what a student is worth: k-NN, linear, attentive, fine-tuning, dense pictures"],
}
INNER = {
    "format": "what a cache is",
    "store": "its bytes",
    "images": "list, decode",
    "teachers": "towers",
    "inspect": "look into it",
    "method": "recipes, masks, targets, students, terms: pure functions of a batch",
}
# Left, bottom, width, height of every storey.
BOX = {
    "probe": (0.2, 8.4, 11.6, 1.1),
    "train": (0.2, 6.4, 11.6, 1.5),
    "extract": (0.2, 4.4, 7.2, 1.5),
    "shards": (0.2, 2.4, 7.2, 1.5),
    "common": (0.2, 0.8, 7.2, 1.1),
    "kernels": (8.2, 0.8, 3.6, 5.1),
}
INK, PAPER, ROOM = "#28323c", "#f4f1ea", "#ffffff"


def main() -> None:
    """Write the PNG beside this file."""
    figure, axes = plt.subplots(figsize=(9.6, 7.4), dpi=130)
    axes.set(xlim=(0, 12), ylim=(0.5, 9.7))
    axes.axis("off")
    for name, (x, y, width, height) in BOX.items():
        axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.06", facecolor=PAPER, edgecolor=INK))
        axes.text(x + 0.1, y + height - 0.08, name, weight="bold", size=13, va="top", color=INK)
        axes.text(x + 0.1, y + height - 0.52, "\n".join(WHAT[name]), size=9, va="top", color=INK)
        inner = [sub for sub in RULES["INSIDE"].get(name, []) if sub]
        step = (width - 0.1) / max(len(inner), 1)
        for i, sub in enumerate(inner):
            at, size = (x + 0.1 + i * step, y + 0.08), (step - 0.15, 0.48)
            axes.add_patch(FancyBboxPatch(at, *size, "round,pad=0.03", facecolor=ROOM, edgecolor=INK, linewidth=0.7))
            axes.text(at[0] + 0.08, at[1] + 0.24, f"{sub}: {INNER[sub]}", size=8.5, va="center", color=INK)
    for upper, lower in (
        ("probe", "train"),
        ("train", "extract"),
        ("extract", "shards"),
        ("shards", "common"),
        ("train", "kernels"),
    ):
        assert lower in RULES["MAY_IMPORT"][upper]
        axes.add_patch(arrow(upper, lower))
    figure.savefig(HERE / "architecture.png", bbox_inches="tight")


def arrow(upper: str, lower: str) -> FancyArrowPatch:
    """From the bottom of one box straight down to the top of the one that it imports."""
    x, y, width, height = BOX[lower]
    start, end = (x + width / 2, BOX[upper][1] - 0.07), (x + width / 2, y + height + 0.07)
    return FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=INK, linewidth=1.4)


if __name__ == "__main__":
    main()
