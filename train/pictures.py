"""Pictures of a run: what the student reconstructs, what teachers and student see, and how the losses went."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from mrmae.common.files import publish_by
from mrmae.common.pictures import pca_rgb
from mrmae.shards.format import Numbers
from mrmae.train import batches
from mrmae.train.feed import load_masked
from mrmae.train.method import evaluating
from mrmae.train.online import with_targets
from mrmae.train.run import Run, random_teachers

HIDDEN_GRAY = torch.tensor(128, dtype=torch.uint8)
PANEL_ROWS = 5
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe-Ito


def masked_view(
    pixels: UInt8[Tensor, "b h w 3"], ids_keep: Int[Tensor, "b k"], grid: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """The view as the student got it: hidden patches gray."""
    (gh, gw), (b, h, w, _) = grid, pixels.shape
    seen = torch.zeros(b, gh * gw, dtype=torch.bool).scatter_(1, ids_keep.cpu(), True).reshape(b, gh, gw)
    seen = seen.repeat_interleave(h // gh, 1).repeat_interleave(w // gw, 2)[..., None]
    return torch.where(seen, pixels.cpu(), HIDDEN_GRAY).numpy()


def draw_panels(path: Path, columns: Mapping[str, np.ndarray[Any, Any]], *, title: str, note: str = "") -> None:
    """Write one PNG: a row per image, a labelled column per entry of `columns` ([rows, height, width, 3] each).

    Small maps are enlarged to the same size without smoothing, so one square is one token.
    """
    rows, side = len(next(iter(columns.values()))), 1.55
    width, height = side * len(columns), side * rows + 1.05
    bounds = {"left": 0.01, "right": 0.99, "top": 1 - 0.62 / height, "bottom": 0.42 / height}
    with _figure(path, rows, len(columns), figsize=(width, height), squeeze=False) as (figure, axes):
        for axis, (label, images) in zip(axes.T, columns.items()):
            axis[0].set_title(label, fontsize=8)
            for cell, image in zip(axis, images):
                cell.imshow(image, interpolation="nearest", extent=(0, 1, 0, 1))
                cell.set_axis_off()
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", y=1 - 0.12 / height, va="top")
        figure.text(0.01, 0.06 / height, note, fontsize=7, color="#444444", va="bottom")
        figure.subplots_adjust(**bounds, wspace=0.04, hspace=0.04)


def panels_path(run: Run, epoch: int) -> Path:
    """Where the panels drawn after so many epochs lie."""
    return run.out / "panels" / f"epoch-{epoch:04d}.png"


@torch.no_grad()
def draw_run_panels(run: Run, epoch: int) -> Path:
    """Write OUT/panels/epoch-XXXX.png: for a few fixed images and masks what the student sees, reconstructs and encodes."""
    numbers = run.cache.numbers[:PANEL_ROWS]
    loaded = batches.tensors_of(load_masked(run, numbers, epoch=0), lambda t: t.to(run.device))
    there = with_targets(loaded, run.online, run.needed, model=run.model)
    batch, masks = there[0], there[1]
    columns = {
        "view": batch.pixels.cpu().numpy(),
        "seen by the student": masked_view(batch.pixels, masks.ids_keep, run.info.grid),
    }
    with evaluating(run.model), torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        if any(term.teacher is None for term in run.model.terms):
            columns["reconstruction"] = run.model.reconstruct(*there).float().cpu().numpy()
        student = run.model.tokens(there[0].pixels)
    for teacher, tokens in teacher_tokens(run, numbers).items():
        random = "\n(random weights)" if teacher in random_teachers(run) else ""
        columns[f"teacher {teacher}{random}"] = pca_rgb(tokens, run.info.grid).numpy()
    columns["student"] = pca_rgb(student, run.info.grid).numpy()
    path = panels_path(run, epoch)
    note = "Colours of teachers and student: the three main directions of each model's own tokens over these images."
    if any(term.recipe.transform == "norm_pix" for term in run.model.terms):
        note += "\nPredicted patches take brightness and contrast from the true patch, as in MAE's figures."
    draw_panels(path, columns, title=f"{run.recipe.name}, epoch {epoch} of {run.recipe.optim.epochs}", note=note)
    return path


def teacher_tokens(run: Run, numbers: Numbers) -> dict[str, Tensor]:
    """Every teacher's tokens [b, l, d] of these samples' first views: dequantised, or computed where it runs in the step."""
    views = batches.views_of(run.cache, numbers, epoch=0)
    found: dict[str, Tensor] = {}
    if run.setup.online:
        pixels = run.cache.read_pixels(numbers, views).to(run.device)
        return {name: teacher.forward(pixels).tokens for name, teacher in run.online.items()}
    for teacher, about in run.info.teachers.items():
        found[teacher] = run.cache.read_tokens(about.column, numbers, views)
    return found


def draw_curves(path: Path, epochs: Sequence[Mapping[str, Any]], *, title: str, note: str = "") -> None:
    """Write one PNG of a run's epoch rows (as in log.jsonl): loss terms, k-NN accuracy where it was measured, schedule.

    Losses of images held out are dashed.
    """
    scores = [row["knn_top1"] for row in epochs if "knn_top1" in row]
    ratios = (3, 2, 2) if scores else (3, 2)
    size = (sum(ratios) * 1.8, 3.6)
    with _figure(path, 1, len(ratios), figsize=size, width_ratios=ratios, layout="constrained") as (figure, axes):
        left, right = axes[0], axes[-1]
        x = [row["epoch"] for row in epochs]
        marker = "o" if len(x) <= 30 else None
        names = list(dict.fromkeys(name for row in epochs for name in row["terms"]))
        for name, colour in zip(names, _COLOURS * len(names)):
            y = [_number(row["terms"].get(name)) for row in epochs]
            left.plot(x, y, label=name, color=colour, marker=marker, markersize=3, linewidth=1.5)
            if any("held_out" in row for row in epochs):
                aside = [_number(row.get("held_out", {}).get(name)) for row in epochs]
                left.plot(x, aside, label=f"{name}, held out", color=colour, linestyle="--", linewidth=1.5)
        if scores:
            at = [row["epoch"] for row in epochs if "knn_top1" in row]
            axes[1].plot(
                at, [100 * score for score in scores], color=_COLOURS[2], marker="o", markersize=3, linewidth=1.5
            )
            axes[1].set(xlabel="epoch", ylabel="%", title="k-NN top-1, images held out", ylim=(0, 100))
        left.set(xlabel="epoch", ylabel="loss (mean over the epoch)", title="Loss terms, before weighting")
        right.plot(x, [row["lr"] for row in epochs], color=_COLOURS[-1], marker=marker, markersize=3, linewidth=1.5)
        right.set(xlabel="epoch", ylabel="learning rate at the epoch's end", title="Schedule")
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for axis in axes:
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.title.set_fontsize(10)
        if names:  # else no update of the run counted
            left.legend(frameon=False, fontsize=8)
        figure.suptitle(title + (f"\n{note}" if note else ""), fontsize=10, x=0.01, ha="left")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


@contextlib.contextmanager
def _figure(path: Path, rows: int, columns: int, **how: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes; written to `path` at the end, and closed whatever happens."""
    figure, axes = plt.subplots(rows, columns, dpi=150, **how)
    try:
        yield figure, axes
        publish_by(path, lambda aside: figure.savefig(aside, format="png"))
    finally:
        plt.close(figure)
