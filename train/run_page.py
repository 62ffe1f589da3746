"""OUT/report.html: what a run leaves, finished or stopped, as a page that one can send. It is drawn from the files in OUT alone."""

import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mrmae.common import page
from mrmae.common.page import Curve, Html
from mrmae.common.progress import counted, human_bytes, human_time
from mrmae.train.cost import FLOPS_BESIDE
from mrmae.train.log import read_rows
from mrmae.train.optim import base_lr

FEW_EPOCHS = 30  # whose losses are drawn row by row of the log, not epoch by epoch
BLIND = {"zero": "zero", "constant": "one constant", "position": "one per position", "patch_mean": "each patch's mean"}
CONTINUED = "mean of a continued epoch"  # one in which the run was stopped and went on
MOST_POINTS = 500  # of a curve: more are means of neighbours
Facts = Mapping[str, Any]
LogRows = Sequence[Facts]


def write_run_page(out: Path) -> Path:
    """OUT/report.html, written from what lies in OUT. Raises ValueError, OSError or KeyError where OUT holds no run."""
    return page.write_document(out / "report.html", run_page(out))


def run_page(out: Path) -> str:
    """The page of the run in `out`: from run.json, recipe.yaml, log.jsonl, panels/ and probes/results."""
    run = json.loads((out / "run.json").read_text())
    recipe = (out / "recipe.yaml").read_text()
    epochs, steps = read_rows(out / "log.jsonl", "epoch"), read_rows(out / "log.jsonl", "step")
    panels = {
        f"epoch {int(path.stem.removeprefix('epoch-'))}": path for path in sorted((out / "panels").glob("epoch-*.png"))
    }
    probes = [json.loads(path.read_bytes()) for path in sorted((out / "probes" / "results").glob("*.json"))]
    end = unfinished_words(run, yaml.safe_load(recipe)["optim"]["epochs"], epochs)
    sections = [
        *(
            [
                page.section(
                    "Continue", page.paragraph("The same command goes on from what is saved:"), page.code(again(run))
                )
            ]
            if end
            else []
        ),
        page.section("What was trained on what", *origin(run, recipe)),
        page.section("Losses", *losses(run, epochs, steps)),
        page.section("What it is worth", *worth(epochs, probes)),
        *([page.section("What it sees", panel_slider(panels))] if panels else []),
        page.section("Speed", *speed(run, steps)),
        page.section("What it costs", *costs(run, trained_images(recipe, epochs))),
        page.section("Load the student", *loading(run, finished=not end)),
    ]
    return page.document(
        f"{run['recipe']}: {run['student']}", *sections, lead=lead(run, epochs), warnings=[*end, *warnings_of(run)]
    )


def unfinished_words(run: Facts, wanted: int, epochs: LogRows) -> list[str]:
    """What is said above the page of a run that has not done the epochs it was asked for; nothing of one that has."""
    done, stopped = epochs[-1]["epoch"] if epochs else 0, run.get("stopped")
    if done >= wanted and not stopped:
        return []
    stopped = stopped or f"{done} of {counted(wanted, 'epoch')} are done"
    return [f"UNFINISHED: {stopped}; there is no student yet"]


def again(run: Facts) -> str:
    """The command of the last start, from the folder it was given in."""
    last = run["starts"][-1]
    return f"cd {shlex.quote(last['folder'])}\n{last['command']}"


def lead(run: Facts, epochs: LogRows) -> str:
    """How much was trained, in a sentence."""
    seconds = sum(row["seconds"] for row in epochs)
    done = counted(len(epochs), "epoch") if epochs else "no whole epoch"
    begun = run["starts"][0]["started"].partition("T")[0]
    return f"{done} on {counted(run['images'], 'image')}, {human_time(seconds)} of training, begun on {begun}"


def warnings_of(run: Facts) -> list[str]:
    """What nobody may overlook: teachers that know nothing, a cache that was not finished."""
    found = [run["warning"]] if run.get("warning") else []
    if "unfinished_cache" in run:
        found.append(f"UNFINISHED CACHE: it held {run['unfinished_cache']}; only these were trained on")
    return found


def origin(run: Facts, recipe: str) -> Iterator[Html]:
    """Recipe, data, teachers, ids, versions, and the command that repeats it."""
    last = run["starts"][-1]
    yield page.facts({
        "recipe": run["recipe"],
        "student": run["student"],
        "images": f"{run['images']:,}" + (f", and {run['held_out']:,} held out" if run["held_out"] else ""),
        "cache": run["cache"] if "://" in run["cache"] else os.path.join(last["folder"], run["cache"]),
        **{f"teacher {name}": teacher_line(about, run["teachers_run"]) for name, about in run["teachers"].items()},
        "schedule": schedule(yaml.safe_load(recipe)),
        "computed on": f"{last['device']}, {last['precision']}, {counted(last['ranks'], 'process', 'processes')}",
    })  # fmt: skip
    if not run["teachers"]:
        yield page.paragraph("No teacher: this recipe reads none.", "quiet")
    yield page.paragraph("The same again, from the same cache:")
    yield page.code(again(run))
    yield page.folded("Ids of what was read", page.facts(run["cache_ids"]))
    yield page.folded("Versions", page.facts({**last["versions"], "git": last["git"] or "no checkout"}))
    yield page.folded("The recipe, resolved", page.code(recipe))
    starts = [
        [start["started"], f"{start['from_step']:,}", start["device"], " ".join(start["notes"])]
        for start in run["starts"]
    ]
    yield page.folded(counted(len(starts), "start"), page.table(["started", "from update", "device", "notes"], starts))


def schedule(recipe: Facts) -> str:
    """Batch, learning rate and seed of a recipe in a line."""
    o = recipe["optim"]
    peak = base_lr(o["lr_per_256"], o["batch_size"], o["lr_scale"], o.get("lr_rule", "linear"))
    warmup = counted(o["warmup_epochs"], "epoch")
    return f"{counted(o['epochs'], 'epoch')}, batch {o['batch_size']:,}, learning rate up to {peak:.3g}, warm-up {warmup}, seed {recipe['seed']}"


def teacher_line(about: Facts, how: str) -> str:
    """A teacher in a line; random weights are said loudly."""
    weights = "RANDOM weights, it knows nothing" if about["weights"] == "random" else f"{about['weights']} weights"
    return f"{about['model']}, {weights}, {about['tap']}, run {how}"


def losses(run: Facts, epochs: LogRows, steps: LogRows) -> Iterator[Html]:
    """A table of every term at the first and the last epoch, and the curves."""
    if not epochs:
        yield page.paragraph("No epoch was ended.")
        return
    names = ["loss", *dict.fromkeys(name for row in epochs for name in row["terms"])]
    held = any("held_out" in row for row in epochs)
    blind = run.get("baselines", {})
    kinds = [kind for kind in BLIND if any(kind in costs for costs in blind.values())]
    yield page.table(
        ["", "first epoch", "last epoch", *(["held out, last"] if held else []), *(BLIND[kind] for kind in kinds)],
        [["weighted sum" if name == "loss" else name,
          *(loss_words(loss_of(row, name)) for row in (epochs[0], epochs[-1])),
          *([loss_words(epochs[-1].get("held_out", {}).get(name))] if held else []),
          *(loss_words(blind[name][kind]) if kind in blind.get(name, {}) else "" for kind in kinds)] for name in names],
        caption="Mean losses over an epoch; every term before its weight." + continued_words(epochs)
        + (" Behind them what a prediction costs that never sees an image: a loss above it has learnt nothing from images." if kinds else ""),
    )  # fmt: skip
    per_epoch = run["updates_per_epoch"]
    rows = steps if len(epochs) < FEW_EPOCHS and len(steps) > len(epochs) else epochs
    curves = []
    for hue, name in enumerate(names[1:]):
        xs, ys = thinned([row["step"] / per_epoch for row in rows], [row["terms"].get(name) for row in rows])
        curves.append(Curve(name, xs, ys, hue=hue))
        if held:
            aside = [row.get("held_out", {}).get(name) for row in epochs]
            curves.append(Curve(f"{name}, held out", [row["epoch"] for row in epochs], aside, dashed=True, hue=hue))
        if continued := [row for row in epochs if row.get("resumed")]:
            ys = [row["terms"].get(name) for row in continued]
            curves.append(Curve(f"{name}, {CONTINUED}", [row["epoch"] for row in continued], ys, hollow=True, hue=hue))
        for kind in [kind for kind in ("position", "patch_mean", "constant") if kind in blind.get(name, {})][:1]:
            curves.append(Curve(f"{name}, {BLIND[kind]}", xs, [blind[name][kind]] * len(xs), dotted=True, hue=hue))
    yield page.chart("Loss per term, before weighting", curves, x="epoch", y="loss")


def continued_words(epochs: LogRows) -> str:
    """Which epochs the run was stopped in and went on; nothing where it was in none."""
    told = [
        f"{row['epoch']} (after update {', '.join(map(str, row['resumed']))})" for row in epochs if row.get("resumed")
    ]
    return f" Stopped and continued within epoch {', '.join(told)}: hollow marks in the chart." if told else ""


def loss_of(row: Facts, name: str) -> float | None:
    """A term's loss in a row of the log, or the weighted sum."""
    found: float | None = row["loss"] if name == "loss" else row["terms"].get(name)
    return found


def loss_words(value: float | None) -> str:
    """A loss in a table."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def thinned(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """At most MOST_POINTS points of a curve: the means of neighbours, at the last one's place; gaps stay where all are."""
    at_once = math.ceil(len(xs) / MOST_POINTS) or 1
    found: list[float | None] = []
    for start in range(0, len(ys), at_once):
        known = [y for y in ys[start : start + at_once] if y is not None and math.isfinite(y)]
        found.append(sum(known) / len(known) if known else None)
    ends = [min(start + at_once, len(xs)) - 1 for start in range(0, len(xs), at_once)]
    return [xs[end] for end in ends], found


def worth(epochs: LogRows, probes: LogRows) -> Iterator[Html]:
    """k-NN and RankMe while training and what probes found, with intervals; where there is neither, how to find out."""
    scores = [row for row in epochs if "knn_top1" in row and "knn" in row]
    measured = [found for found in probes if found.get("accuracy") is not None]
    if measured:
        yield page.intervals(
            "Probes: shares of the test part, with 95 % intervals",
            {name: (found["accuracy"], *found["interval"]) for name, found in zip(probe_names(measured), measured)},
            x="accuracy",
        )
        yield page.table(
            ["what", "accuracy [95 %]", "train / test / classes", "source", "data"],
            [[name, interval_words(found), f"{found['n_train']} / {found['n_test']} / {found['n_classes']}", found["source"],
              found["data"]] for name, found in zip(probe_names(measured), measured)],
        )  # fmt: skip
    if scores:
        yield knn_chart(scores)
    if ranked := [row for row in epochs if "rankme" in row]:
        yield rank_chart(ranked)
    if not measured and not scores:
        yield page.paragraph("Nothing was measured yet. On labelled images that the student has not seen:")
        yield page.code("probe-features OUT DATA --probe knn --probe linear")


def probe_names(probes: LogRows) -> list[str]:
    """What was done, with what is needed to tell it from the others: untrained weights, the data, else the result's id."""
    several = len({found["data"] for found in probes}) > 1
    names = [
        "untrained weights, " * found["source"].startswith("untrained:")
        + found["headline"]
        + f", {Path(found['data']).name}" * several
        for found in probes
    ]
    return [name if names.count(name) == 1 else f"{name}, {found['id'][7:13]}" for name, found in zip(names, probes)]


def knn_chart(scores: LogRows) -> Html:
    """k-NN accuracy over the epochs, between the ends of its intervals."""
    of = scores[-1]["knn"]
    at, found = [row["epoch"] for row in scores], [row["knn_top1"] for row in scores]
    ends = [share_interval(share, of["queries"]) for share in found]
    return page.chart(
        f"{of['k']}-NN top-1 of {counted(of['queries'], 'image')} held out, by the labels of {of['bank']:,} trained on",
        [Curve("accuracy", at, [100 * share for share in found], hue=0),
         *(Curve(f"95 % interval, {end}", at, [100 * pair[i] for pair in ends], dashed=True, hue=0)
           for i, end in enumerate(("low", "high")))],
        x="epoch", y="%",
    )  # fmt: skip


def rank_chart(rows: LogRows) -> Html:
    """RankMe over the epochs."""
    of = rows[-1]["rank"]
    return page.chart(
        f"RankMe of {counted(of['images'], 'image')} trained on, at most {min(of.values())}: how many directions the features use",
        [Curve("RankMe", [row["epoch"] for row in rows], [row["rankme"] for row in rows])], x="epoch", y="",
    )  # fmt: skip


def share_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share among n."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def interval_words(found: Facts) -> str:
    """`0.812 [0.790, 0.833]`."""
    low, high = found["interval"]
    return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def panel_slider(panels: Mapping[str, Path]) -> Html:
    """The panels of all epochs."""
    smaller = {label: page.as_webp(path) for label, path in panels.items()}
    return page.slider(smaller, alt="Views, what the student sees and reconstructs of them, and as colours the teachers' tokens, "
                       "what is predicted of them, and the student's own", caption="The same images, masks and teachers' colours at every epoch.")  # fmt: skip


def speed(run: Facts, steps: LogRows) -> Iterator[Html]:
    """Images per second, waiting, memory and learning rate over the run."""
    if not steps:
        yield page.paragraph("No update was logged.")
        return
    per_epoch = run["updates_per_epoch"]
    drawn: list[tuple[str, str, Callable[[Facts], float | None]]] = [
        ("Images per second", "images/s", lambda row: row["images_per_s"]),
        ("Stall: share of the time that a step waits for data", "%", lambda row: 100 * row["stall"]),
        ("Learning rate", "", lambda row: row["lr"]),
        ("Memory of the first process", "MiB", lambda row: row["memory_mib"]),
    ]
    charts = []
    for title, unit, value in drawn:
        xs, ys = thinned([row["step"] / per_epoch for row in steps], [value(row) for row in steps])
        charts.append(page.chart(title, [Curve(unit or title, xs, ys)], x="epoch", y=unit))
    yield page.beside(*charts)


def trained_images(recipe: str, epochs: LogRows) -> int:
    """Images of all updates so far, an image counted every time it came."""
    return int(epochs[-1]["step"] * yaml.safe_load(recipe)["optim"]["batch_size"]) if epochs else 0


def costs(run: Facts, seen: int) -> Iterator[Html]:
    """Multiply-accumulates and bytes, per image and of the whole run."""
    if not (cost := run.get("costs")):
        yield page.paragraph("Not counted.")
        return
    rows = [("parameters that are trained", f"{cost['parameters']:,}", ""),
            ("student alone, a whole image, forward", macs(cost["encoder_flops"]), ""),
            ("a step's forward pass", macs(cost["forward_flops"]), macs(cost["forward_flops"] * seen)),
            ("a step, with backward", macs(cost["step_flops"]), macs(cost["step_flops"] * seen)),
            ("features read", human_bytes(cost["feature_bytes"]), human_bytes(cost["feature_bytes"] * seen)),
            ("views read", human_bytes(cost["view_bytes"]), human_bytes(cost["view_bytes"] * seen))]  # fmt: skip
    for key, what in reversed(FLOPS_BESIDE.items()):
        if flops := cost.get(key):
            rows.insert(3, (f"beside it, {what}", macs(flops), macs(flops * seen)))
    yield page.table(["", "per image", f"whole run, {counted(seen, 'image')}"], rows)
    yield page.paragraph(
        "MAC: multiply-accumulate of matrix products, attention and convolutions, counted on one image; two FLOP each.",
        "quiet",
    )


def macs(flops: float) -> str:
    """Multiply-accumulates in words, from FLOP."""
    n, units = flops / 2, ["MAC", "kMAC", "MMAC", "GMAC", "TMAC", "PMAC", "EMAC"]
    while n >= 999.5 and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{n:.3g} {units[0]}"


def loading(run: Facts, *, finished: bool) -> Iterator[Html]:
    """The lines of Python that load the student."""
    if not finished:
        yield page.paragraph("It is written when the run is finished; then:")
    yield page.code(run["load"])
