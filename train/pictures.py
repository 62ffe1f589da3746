"""Pictures of a run: what the student reconstructs, what teachers and student see, and how the losses went."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mrmae.common.files import publish_by
from mrmae.common.pictures import (
    Pictures,
    Strip,
    as_bytes,
    colour_images,
    draw_sheet,
    layer_normalised,
    palette_of,
    publish_png,
    stretch_of,
)
from mrmae.shards.format import Numbers
from mrmae.train import batches
from mrmae.train.feed import load_masked
from mrmae.train.method import Batch, Masks, Term, as_compared, evaluating, patch_targets
from mrmae.train.online import teach, with_targets
from mrmae.train.run import Run, random_teachers
from mrmae.train.run_page import BLIND, CONTINUED

PATCHES = ("visible", "predicted", "all", "alive")
HIDDEN_GRAY = torch.tensor(128, dtype=torch.uint8)
PANEL_ROWS = 5
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe-Ito
BLIND_LINES = {"zero": (0, (1, 1.5)), "constant": (0, (3, 2)), "position": (0, (6, 2)), "patch_mean": (0, (6, 2))}


def masked_view(
    pixels: UInt8[Tensor, "b h w 3"], ids_keep: Int64[Tensor, "b k"], grid: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """The view as the student got it: hidden patches gray."""
    (gh, gw), (b, h, w, _) = grid, pixels.shape
    seen = torch.zeros(b, gh * gw, dtype=torch.bool).scatter_(1, ids_keep.cpu(), True).reshape(b, gh, gw)
    seen = seen.repeat_interleave(h // gh, 1).repeat_interleave(w // gw, 2)[..., None]
    return torch.where(seen, pixels.cpu(), HIDDEN_GRAY).numpy()


# --- panels


def looks(run: Run, batch: Batch) -> tuple[Callable[[Tensor], Pictures], str]:
    """What makes pictures of images in the views' own numbers, and how to read them: RGB as it is, other bands stretched."""
    if run.cache.encoding.as_shown:
        return lambda images: as_bytes(images.cpu() / 255), ""
    stretch = stretch_of(batch.pixels)
    return stretch.rgb, stretch.note


def panels_path(run: Run, epoch: int) -> Path:
    """Where the panels drawn after so many epochs lie."""
    return run.out / "panels" / f"epoch-{epoch:04d}.png"


@torch.no_grad()
def draw_run_panels(run: Run, epoch: int) -> Path:
    """Write OUT/panels/epoch-XXXX.png: for a few fixed images and masks what the student sees, reconstructs, predicts and encodes."""
    numbers = shown_first(run)[:PANEL_ROWS]
    loaded = batches.tensors_of(load_masked(run, numbers, epoch=0), lambda t: t.to(run.device))
    batch, masks = with_targets(loaded, run.online, run.needed, model=run.model)
    masks = masks.change(lambda x: x[: len(numbers)])  # of several masks per image the first
    keys = [run.cache.keys[number] for number in numbers]
    look, note = looks(run, batch)
    view = look(batch.pixels)
    columns = [
        Strip("view", view, note, captions=keys),
        Strip(
            "seen by the student",
            masked_view(torch.from_numpy(view), masks.ids_keep, run.info.grid),
            f"{masks.ids_keep.shape[1]} of {run.info.n_patches} patches",
        ),
    ]
    with evaluating(run.model), torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        columns += reconstructions(run, batch, masks)
        columns += mimicries(run, batch, masks)
        columns += unused_teachers(run)
        columns += [student_colours(run)]
    title = f"{run.recipe.name}, epoch {epoch} of {run.recipe.optim.epochs}"
    return publish_png(panels_path(run, epoch), draw_sheet(columns, title=title, notes=panel_notes(run)))


def panel_notes(run: Run) -> list[str]:
    """How the panels are to be read."""
    n = len(colour_numbers(run))
    return [
        "Colours of tokens: their three main directions as red, green and blue, after the mean at each position over "
        f"{n} images is taken out. Grey is that mean: what a predictor that never saw the picture would say.",
        "A teacher and what is predicted of it share their colours, which are the same in every epoch; the paler a prediction, "
        "the less it says; white was not predicted. The student's own colours change from epoch to epoch and mean nothing across columns.",
    ]


def reconstructions(run: Run, batch: Batch, masks: Masks) -> list[Strip]:
    """The predicted pixels: as MAE draws them, and without anything from the hidden patches."""
    term = next((term for term in run.model.terms if term.recipe.target == "pixels"), None)
    if term is None:
        return []
    look, _ = looks(run, batch)
    drawn = look(run.model.reconstruct(batch, masks).float() * run.info.unit)
    if term.recipe.transform == "none":
        return [Strip("reconstruction", drawn, "predicted pixels at hidden patches")]
    alone = look(run.model.reconstruct(batch, masks, alone=True).float() * run.info.unit)
    return [
        Strip("reconstruction", drawn, "as in MAE's figures", "BRIGHTNESS AND CONTRAST ARE THE TRUE PATCH'S"),
        Strip("prediction alone", alone, "brightness and contrast are the visible patches' mean: nothing comes from hidden ones"),
    ]  # fmt: skip


def mimicries(run: Run, batch: Batch, masks: Masks) -> list[Strip]:
    """Every teacher that is mimicked, as the loss sees it, and beside it what each head predicts of it, in its colours."""
    columns: list[Strip] = []
    terms = [
        term
        for term in run.model.terms
        if term.teacher is not None and term.recipe.at(*PATCHES) and not term.recipe.relation
    ]
    whole = whole_grids(run, colour_numbers(run)) if terms else None
    for term in terms:
        assert whole is not None
        targets = patch_targets(term, run.model.statistics[term.name], whole)
        palette = palette_of(targets, by_position=True)
        found = run.model.predicted(term, batch, masks)
        rgb = palette.rgb(as_compared(term, found.x.float()), found.ids)
        teacher = Strip(f"teacher {term.teacher}", cells(palette.rgb(targets[: len(batch.pixels)]), run.info.grid),
                         f"as the loss sees it ({term.recipe.transform})", random_warning(run, str(term.teacher)))  # fmt: skip
        if not any(np.array_equal(column.pictures, teacher.pictures) for column in columns):
            columns.append(teacher)
        columns.append(Strip(f"{term.teacher}, predicted", cells(rgb, run.info.grid, found.ids), prediction_note(term)))
    return columns


def prediction_note(term: Term) -> str:
    """From what a head predicts."""
    return f"{term.name}, from the " + ("visible patches" if term.recipe.decoded else "whole view")


def unused_teachers(run: Run) -> list[Strip]:
    """The teachers of the cache that no term of the recipe predicts."""
    used = {run.info.target(term.teacher).source or term.teacher for term in run.model.terms if term.teacher}
    columns, numbers = [], colour_numbers(run)
    for teacher, about in ({} if run.setup.online else run.info.teachers).items():
        if teacher not in used:
            views = batches.views_of(run.cache, numbers, epoch=0)
            tokens = layer_normalised(run.cache.read_tokens(about.column, numbers, views))
            warning = f"NOT USED by {run.recipe.name} {random_warning(run, teacher)}"
            columns.append(Strip(f"teacher {teacher}", own_colours(tokens, run.info.grid), warning=warning))
    return columns


def student_colours(run: Run) -> Strip:
    """The student's own tokens of the whole views."""
    numbers = colour_numbers(run)
    pixels = run.cache.read_pixels(numbers, batches.views_of(run.cache, numbers, epoch=0))
    tokens = torch.cat(
        [run.model.tokens(part.to(run.device)).float().cpu() for part in torch.split(pixels, PANEL_ROWS)]
    )
    return Strip("student", own_colours(layer_normalised(tokens), run.info.grid), "its tokens of the whole view")


def random_warning(run: Run, teacher: str) -> str:
    """What must stand above the colours of a teacher that knows nothing."""
    return "RANDOM WEIGHTS" if teacher.partition(":")[0] in {t.partition(":")[0] for t in random_teachers(run)} else ""


def shown_first(run: Run) -> Numbers:
    """All images, those before the others that a panel can show: with a list of pairs, the first ones of its pairs."""
    numbers = run.cache.numbers
    if run.pairs is None:
        return numbers
    return numbers[np.argsort(~np.isin(numbers, run.pairs.first), kind="stable")]


def colour_numbers(run: Run) -> Numbers:
    """The images over which colours are taken, those of the panels first."""
    return shown_first(run)[: max(PANEL_ROWS, colour_images(run.info.n_patches))]


def whole_grids(run: Run, numbers: Numbers) -> Batch:
    """First views of these samples with the teachers' tokens at every patch: read, or computed where they run in the step."""
    batch = batches.load_batch(run.cache, numbers, epoch=0, needed={} if run.online else run.needed).to(run.device)
    return teach(batch, run.online, run.needed) if run.online else batch


def own_colours(tokens: Float[Tensor, "b l d"], grid: tuple[int, int]) -> Pictures:
    """The panels' images in the colours of these tokens, those of the panels first."""
    return cells(palette_of(tokens, by_position=True).rgb(tokens[:PANEL_ROWS]), grid)


def cells(rgb: Float[Tensor, "b n 3"], grid: tuple[int, int], ids: Int64[Tensor, "b n"] | None = None) -> Pictures:
    """Colours of tokens as pictures, one pixel a token; white where there is none."""
    page = torch.ones(len(rgb), grid[0] * grid[1], 3)
    page = rgb if ids is None else page.scatter(1, ids.cpu()[..., None].expand(-1, -1, 3), rgb)
    return as_bytes(page.reshape(len(rgb), *grid, 3))


# --- curves

PROBED: dict[str, tuple[int, dict[str, Any]]] = {  # of an epoch's row: a factor, and how its axis is set
    "knn_top1": (100, {"ylabel": "%", "title": "k-NN top-1, images held out", "ylim": (0, 100)}),
    "rankme": (1, {"title": "RankMe, images trained on", "ylim": (0, None)}),
}


def draw_curves(
    path: Path, epochs: Sequence[Mapping[str, Any]], *, title: str, note: str = "",
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> None:  # fmt: skip
    """Write one PNG of a run's epoch rows (as in log.jsonl): every loss term, k-NN accuracy and RankMe where they were measured, learning rate.

    baselines: by term, what predictors that never saw an image would cost, by BLIND: dashed lines.
    """
    names = list(dict.fromkeys(name for row in epochs for name in row["terms"]))
    probed = {name: [row for row in epochs if name in row] for name in PROBED}
    probed = {name: rows for name, rows in probed.items() if rows}
    count = len(names) + len(probed) + 1
    across = 2 if count == 4 else min(count, 3)
    down = -(-count // across)
    size = (3.9 * across, 3.1 * down + 0.5)
    with _figure(path, down, across, figsize=size, squeeze=False, layout="constrained") as (figure, axes):
        free = iter(axes.flat)
        for name, colour in zip(names, _COLOURS * len(names)):
            draw_term(next(free), epochs, name, colour, (baselines or {}).get(name, {}))
        for name, rows in probed.items():
            axis, factor, how = next(free), *PROBED[name]
            draw_line(axis, rows, [factor * row[name] for row in rows], _COLOURS[2])
            axis.set(**how)
        last = next(free)
        draw_line(last, epochs, [row["lr"] for row in epochs], _COLOURS[-1])
        last.set(title="learning rate at the epoch's end", ylim=(0, None))
        last.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for unused in free:
            unused.set_axis_off()
        for axis in axes.flat[:count]:
            finish_axis(axis, max((row["epoch"] for row in epochs), default=1))
        dashed = "dashed: what a prediction costs that never sees an image" if baselines else ""
        figure.suptitle("\n".join(filter(None, (title, note, dashed))), fontsize=10, x=0.01, ha="left")


def draw_term(
    axis: Any, epochs: Sequence[Mapping[str, Any]], name: str, colour: str, baselines: Mapping[str, float]
) -> None:
    """One loss term: its mean over each epoch, that of images held out, and what needs no image."""
    seen = [_number(row["terms"].get(name)) for row in epochs]
    aside = [_number(row.get("held_out", {}).get(name)) for row in epochs]
    draw_line(axis, epochs, seen, colour, label="training")
    if continued := [(row["epoch"], y) for row, y in zip(epochs, seen) if row.get("resumed")]:
        axis.plot(*zip(*continued), "D", color=colour, markerfacecolor="white", markersize=6, label=CONTINUED)
    if not np.isnan(aside).all():
        draw_line(axis, epochs, aside, colour, label="held out", linestyle=":", markerfacecolor="white")
    there = {kind: baselines[kind] for kind in BLIND_LINES if kind in baselines}
    for kind, value in there.items():
        axis.axhline(
            value, color="#666666", linewidth=1.1, linestyle=BLIND_LINES[kind], label=f"{BLIND[kind]}: {value:.3g}"
        )
    values = np.array([*seen, *aside, *there.values()])
    values = values[np.isfinite(values)]
    if len(values) and 0 < 20 * values.min() < values.max():
        axis.set_yscale("log")
    elif len(values) and values.min() >= 0:
        axis.set_ylim(0, 1.08 * values.max() or 1)
    axis.set(title=name)
    axis.legend(fontsize=7, edgecolor="none", framealpha=0.85)


def draw_line(axis: Any, epochs: Sequence[Mapping[str, Any]], y: Collection[float], colour: str, **how: Any) -> None:
    """Values over epochs; each with a dot where there are few."""
    x = [row["epoch"] for row in epochs]
    axis.plot(
        x, y, **{"color": colour, "marker": "o" if len(x) <= 30 else None, "markersize": 3, "linewidth": 1.5} | how
    )


def finish_axis(axis: Any, last: int) -> None:
    """Epochs from nought to the last as whole numbers, a pale grid, no box."""
    axis.set(xlabel="epoch", xlim=(0, 1.03 * last))
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.title.set_fontsize(10)
    axis.tick_params(labelsize=8)


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
