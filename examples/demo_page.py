"""The demo's page: what its commands have left behind, as numbers with intervals, pictures and curves."""

import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mrmae.common import page
from mrmae.common.files import publish_by
from mrmae.train.log import read_rows
from mrmae.train.run_page import BLIND

Interval = tuple[float, float, float]  # value, low, high: in percent or percentage points
ABOUT = {
    "teacher": "Galileo-nano, frozen, all patches visible",
    "mr-mae": "student that mimics the teacher on visible patches and reconstructs hidden ones",
    "mae": "student that reconstructs hidden patches",
    "untrained": "the weights that both students began with",
    "pixels": "no model: the image at 16 × 16 pixels",
}
PAIRS = (("mr-mae", "mae"), ("mr-mae", "untrained"), ("mae", "untrained"), ("teacher", "mr-mae"))


def write(
    out: Path, commands: Mapping[str, Sequence[str]], took: Mapping[str, Sequence[float]], *, teacher: str
) -> Path:
    """OUT/index.html, from what the commands found. took: wall-clock and CPU seconds of each. teacher: as it was probed."""
    found = comparison(out)
    sources = {
        "teacher": teacher,
        "mr-mae": str(out / "mr-mae"),
        "mae": str(out / "mae"),
        "untrained": f"untrained:{out / 'mr-mae'}",
        "pixels": "pixels",
    }
    accuracies = {name: accuracy(found, source) for name, source in sources.items()}
    differences = {f"{a} − {b}": difference(found, sources[a], sources[b]) for a, b in PAIRS}
    draw_summary(out / "demo.png", newest_panel(out / "mr-mae"), accuracies, probe_words(found))
    parts = [
        page.section("What they are worth", *worth(found, accuracies, differences)),
        page.section("What the students see", *panels(out)),
        page.section("How the losses went", *curves(out)),
        page.section("What it took, and how to repeat it", *repeat(commands, took)),
        page.section("Read this before quoting it", *limits(found)),
    ]
    text = page.document(
        "mrmae: what the demo has measured", *parts, lead=verdict(accuracies, differences["mr-mae − mae"], found)
    )
    return page.write_document(out / "index.html", text)


# --- numbers


def comparison(out: Path) -> dict[str, Any]:
    """What probe-features has found when it was last asked: accuracies and paired differences by k-NN."""
    files = sorted((out / "probes" / "comparisons").glob("*.json"), key=lambda file: file.stat().st_mtime)
    found: dict[str, Any] = json.loads(files[-1].read_bytes())["probes"]["knn"]
    return found


def accuracy(found: Mapping[str, Any], source: str) -> Interval:
    """A source's accuracy and its interval, in percent."""
    row = next(row for row in found["rows"] if row["source"] == source)
    return tuple(map(percent, (row["accuracy"], *row["interval"])))


def difference(found: Mapping[str, Any], ours: str, theirs: str) -> Interval:
    """Ours less theirs in percentage points, with the paired interval."""
    pair = next(pair for pair in found["differences"] if {pair["a"], pair["b"]} == {ours, theirs})
    sign = 1 if pair["a"] == ours else -1
    return tuple(percent(sign * value) for value in (pair["difference"], *pair["interval"][::sign]))


def percent(fraction: float) -> float:
    """In percent, rounded as the terminal and the probes' tables round: 0.7425 is 0.743 there, and 74.3 here."""
    return 100 * round(fraction, 3) + 0.0  # no -0.0


def probe_words(found: Mapping[str, Any]) -> str:
    """What was asked of the features, in a line."""
    return f"{found['rows'][0]['headline']}: {found['n_train']} labelled images, {found['n_test']} test images that no student saw, {found['n_classes']} classes"


def verdict(accuracies: Mapping[str, Interval], gain: Interval, found: Mapping[str, Any]) -> str:
    """The first sentence: who is ahead, and whether the interval allows to say so."""
    ours, theirs = (accuracies[name][0] for name in ("mr-mae", "mae"))
    words = (f"Of {found['n_test']} images that no student saw, {ours:.1f} % are classified right with the features of mr-mae's student and"
             f" {theirs:.1f} % with those of mae's")  # fmt: skip
    value, low, high = gain
    seen = "the interval excludes zero" if low > 0 or high < 0 else "the interval holds zero, so neither is ahead"
    return f"{words}: {value:+.1f} points ({low:+.1f} to {high:+.1f}); {seen}."


def worth(
    found: Mapping[str, Any], accuracies: Mapping[str, Interval], differences: Mapping[str, Interval]
) -> list[page.Html]:
    """Accuracies and their paired differences, as dots and as tables."""
    return [
        page.paragraph(f"{probe_words(found)}, chance is {100 / found['n_classes']:.0f} %. The class of an image is voted by its nearest neighbours among the labelled images, on pooled"
                       " patch features. Labels are used here only."),
        page.beside(page.intervals("Right of 100 test images", accuracies, x="%"),
                    page.intervals("Differences, on the same test images", differences, x="percentage points", zero=True)),
        page.table(["features of", "%", "95 % interval", "what it is"],
                   [(name, f"{v:.1f}", f"{low:.1f} to {high:.1f}", ABOUT[name]) for name, (v, low, high) in accuracies.items()]),
        page.table(["difference", "points", "95 % interval, paired"],
                   [(name, f"{v:+.1f}", f"{low:+.1f} to {high:+.1f}") for name, (v, low, high) in differences.items()]),
    ]  # fmt: skip


# --- pictures and curves


def panels_of(run: Path) -> dict[str, Path]:
    """A run's panels by their epoch, in order."""
    return {f"epoch {int(path.stem.rpartition('-')[2])}": path for path in sorted((run / "panels").glob("epoch-*.png"))}


def newest_panel(run: Path) -> Path:
    """The panels drawn at a run's end."""
    return list(panels_of(run).values())[-1]


def panels(out: Path) -> list[page.Html]:
    """Unseen images as teacher and student see them, then each run's panels, a picture per epoch."""
    unseen = page.picture(page.as_webp(out / "unseen.png"), alt="Token colours and similarities of the teacher and of mr-mae's student, five test images",
                          caption="Five test images that no student saw: all patches shown, nothing masked.")  # fmt: skip
    sliders = [page.slider({label: page.as_webp(path) for label, path in panels_of(out / name).items()},
                           alt=f"What the student of {name} is shown, reconstructs and encodes",
                           caption=f"{name}: {ABOUT[name]}. Images of the training part, with the same masks in every picture.")
               for name in ("mr-mae", "mae")]  # fmt: skip
    return [
        unseen,
        *sliders,
        page.paragraph(
            "Each run has a page of its own: mr-mae/report.html and mae/report.html beside this one.", "quiet"
        ),
    ]


def curves(out: Path) -> list[page.Html]:
    """Every loss term of both runs over epochs, and dotted what the best prediction costs that never sees an image."""
    rows = {
        name: [row for row in read_rows(out / name / "log.jsonl") if row["kind"] == "epoch"]
        for name in ("mr-mae", "mae")
    }
    blind = json.loads((out / "mr-mae" / "run.json").read_bytes())["baselines"]
    terms = dict.fromkeys(term for found in rows.values() for row in found for term in row["terms"])
    charts = []
    for term in terms:
        lines = [page.Curve(name, [row["epoch"] for row in found], [row["terms"].get(term) for row in found], hue=hue)
                 for hue, (name, found) in enumerate(rows.items()) if any(term in row["terms"] for row in found)]  # fmt: skip
        lines += [page.Curve(f"without an image: {BLIND[kind]}", line.x, [cost] * len(line.x), dotted=True)
                  for kind, cost in blind.get(term, {}).items() if kind in ("position", "patch_mean") for line in lines[:1]]  # fmt: skip
        charts.append(page.chart(f"Loss term {term}, mean of an epoch", lines, x="epoch"))
    return [page.beside(*charts)]


def draw_summary(path: Path, panel: Path, accuracies: Mapping[str, Interval], title: str) -> None:
    """The accuracies with their intervals and the last panel of a run, as one PNG that can be sent."""
    picture = plt.imread(panel)
    width = 11.0
    heights = (1.9, width * picture.shape[0] / picture.shape[1])
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(width, sum(heights)), height_ratios=heights, layout="constrained"
    )
    for row, (value, low, high) in enumerate(accuracies.values()):
        top.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", color="#0072b2", capsize=4)
        top.annotate(f"{value:.1f}", (value, row), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9)
    top.set_yticks(range(len(accuracies)), accuracies)
    top.set(xlabel="% right, 95 % interval", ylim=(len(accuracies) - 0.4, -0.8))
    top.grid(axis="x", color="#dddddd", linewidth=0.6)
    top.spines[["top", "right"]].set_visible(False)
    top.set_title(title, fontsize=10, loc="left")
    bottom.imshow(picture, interpolation="antialiased")
    bottom.set_axis_off()
    publish_by(path, lambda aside: figure.savefig(aside, format="png", dpi=130))
    plt.close(figure)


# --- words


def repeat(commands: Mapping[str, Sequence[str]], took: Mapping[str, Sequence[float]]) -> list[page.Html]:
    """Times per command on this machine, the commands themselves, and how the student is loaded."""
    student = Path(commands["mr-mae"][2]) / "student"
    rows = [*took.items(), ("together", [sum(column) for column in zip(*took.values())])]
    return [
        page.table(["command", "seconds", "of CPU time"], [(name, f"{wall:.0f}", f"{cpu:.0f}") for name, (wall, cpu) in rows],
                   caption=f"Start of each command included: {os.cpu_count()} cores, {processor()}. Where seconds are well above CPU time, the machine had other work."),
        page.folded("The commands", page.code("\n".join(shlex.join(command) for command in commands.values()))),
        page.paragraph("To use the student:"),
        page.code(f'import timm\n\nmodel = timm.create_model("local-dir:{student}", pretrained=True)\ntokens = model.forward_features(images)'),
    ]  # fmt: skip


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def limits(found: Mapping[str, Any]) -> list[page.Html]:
    """What these numbers do not say."""
    return [
        page.paragraph("The intervals are over test images, with everything else held fixed: one run of each recipe, one seed. What another seed gives is in docs/measured.md."),
        page.paragraph("Epochs and learning rate were chosen with mr-mae, on 1,500 other EuroSAT images and not on these; both recipes have the same. The recipes are as shipped."),
        page.paragraph("The teacher was pre-trained without labels on far more satellite images than these, so a student that mimics it gets what mae cannot see here: that is the point of a"
                       " teacher, and no fair race of two methods. Small students, small images: nothing here speaks of ImageNet or of ViT-B."),
        *(page.paragraph(note, "quiet") for note in dict.fromkeys(note for row in found["rows"] if row["kind"] == "given" for note in row["notes"])),
    ]  # fmt: skip
