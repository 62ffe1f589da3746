"""Several sources on the same images: one table, with paired intervals of their differences, and what nobody trained beside them."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mrmae.common.backend import exists, locate
from mrmae.common.files import publish
from mrmae.common.page import write_document
from mrmae.common.progress import counted
from mrmae.probe import report
from mrmae.probe.compare_page import comparison_page, short_names
from mrmae.probe.data import Data
from mrmae.probe.job import ProbeOptions, Probing, begin_probing, folder_name
from mrmae.probe.run import drawn, one, tell_run_page
from mrmae.probe.sources import LIBRARY_FORMS, PIXELS_ALONE, UNTRAINED
from mrmae.shards.format import content_id

PAIRED = (
    "knn",
    "linear",
    "low-shot",
    "attentive",
    "fusion",
    "finetune",
    "zero-shot",
)  # an answer about every test image
SIDE_BY_SIDE = (
    "segment",
    "region",
    "retrieval",
    "rank",
    "stability",
)  # of pixels, boxes, captions, all images at once: not paired
# What nobody trained, by probe: 16 x 16 pixels have no tokens to attend to, and a training from scratch is asked for by name.
BESIDE = {
    "knn": ("pixels", "untrained"),
    "linear": ("pixels", "untrained"),
    "low-shot": ("pixels", "untrained"),
    **dict.fromkeys(("attentive", "segment", "region", "rank", "stability"), ("untrained",)),
}


@dataclasses.dataclass(frozen=True)
class Compared:
    """One source's result of a probe, and, where it is PAIRED, which test images it got right (of several draws: in what share of them). kind: given, pixels or untrained."""

    source: str
    kind: str
    result: report.Result
    right: Float[Tensor, "n"] | None


def sources_and_data(
    words: Sequence[str], data: Sequence[str], *, compare: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources and DATA of a command line: `SOURCE DATA [TEST]`, or `SOURCE... --data DATA [--data TEST]`.

    compare: `DATA [TEST] --compare SOURCE...` is understood, too: what is no source is DATA. Raises ValueError where DATA is missing, or a second source stands where DATA is expected.
    """
    if data:
        return tuple(words), tuple(data)
    if compare:
        photos = tuple(word for word in words if not looks_like_a_source(word))
        compared = tuple(word for word in words if word not in photos)
        if not compared or len(photos) not in (1, 2):
            raise ValueError(f"--compare: of {', '.join(words)} these are SOURCES: {', '.join(compared) or 'none'}; expected them and one DATA, or its "
                             "train and test part; correct the others, or name the images by --data")  # fmt: skip
        return compared, photos
    if len(words) < 2:
        raise ValueError(
            "DATA: missing; labelled images were expected: a folder, a tar or a cache; give it behind SOURCE"
        )
    strays = [word for word in words[1:] if looks_like_a_source(word)]
    if strays or len(words) > 3:
        sources = [words[0], *strays]
        images = [word for word in words[1:] if word not in strays][-1:] or ["DATA"]
        what = f"{strays[0]} is a SOURCE, not images" if strays else f"{len(words) - 1} paths"
        raise ValueError(f"DATA: {what}; one SOURCE and its DATA (train and test together or apart) were expected; to compare sources, "
                         f"name the images by --data: probe-features {' '.join(sources)} --data {images[0]}")  # fmt: skip
    return (words[0],), tuple(words[1:])


def looks_like_a_source(word: str) -> bool:
    """Whether a word names something to be probed rather than images: by its form, or by what lies there."""
    if word == PIXELS_ALONE or word.startswith((*LIBRARY_FORMS, UNTRAINED)) or word.endswith(".pt"):
        return not os.path.isdir(word)
    cache, mark, _ = word.rpartition("#")
    if mark and not Path(word).exists():
        return exists(locate(cache) / "plan.json")
    return any((Path(word) / name).exists() for name in ("run.json", "model.safetensors", "student"))


def compare_sources(
    sources: Sequence[str], options: ProbeOptions, *, baselines: bool = True, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """What every probe finds of every source on DATA, with the paired difference of any two, and of each from what nobody trained.

    Probes SIDE_BY_SIDE have no differences; of those that have no accuracy either, `measures` has their columns, each with its source.

    options.source is not looked at. Results of each source are kept as probe-features keeps them; the comparison is OUT/comparisons/ID.json,
    .md and .html (OUT: options.out, else `probes` here). In it, per probe: `rows` (source, kind: given, pixels or untrained, accuracy, interval,
    headline), `called`: what `accuracy` is, else the headline says it, and `differences` (a, b, difference, interval), `n_train`, `n_test`. Raises ValueError like probe_features.
    """
    if unknown := [probe for probe in options.probes if probe not in (*PAIRED, *SIDE_BY_SIDE)]:
        raise ValueError(f"--probe {unknown[0]}: gives no number that could be compared; expected {', '.join(PAIRED)} (paired), "
                         f"or {', '.join(SIDE_BY_SIDE)} (side by side); ask for it with one SOURCE")  # fmt: skip
    if repeated := [source for source in dict.fromkeys(sources) if sources.count(source) > 1]:
        raise ValueError(f"SOURCE {repeated[0]}: is given twice; expected sources that differ; leave one out")
    options, known, heard = options.resolved(), set[str](), set[str]()
    data: Data | None = None
    found: dict[str, list[Compared]] = {probe: [] for probe in options.probes}
    for source, kind in [(source, "given") for source in sources] + (unasked(sources) if baselines else []):
        probes = [probe for probe in options.probes if kind == "given" or kind in BESIDE.get(probe, ())]
        if not probes:
            continue
        job = begin_probing(dataclasses.replace(options, source=source, out=home_of(source, options)), say, data)
        data = None if options.allow_partial else job.data
        if kind == "untrained" and architecture(job) in known:
            continue
        known |= {architecture(job)} if kind == "untrained" or source.startswith(UNTRAINED) else set()
        for note in (note for note in job.notes if note not in heard):
            say(f"note: {note}")
        heard |= {*job.notes}
        for probe in probes:
            result = one(job, probe)
            right = report.right_answers(job.home, result, job.labels[1]) if probe in PAIRED else None
            found[probe].append(Compared(source, kind, result, right))
        tell_run_page(job)
    return keep(options, sources, {probe: table_of(rows, options.seed) for probe, rows in found.items()}, say)


def unasked(sources: Sequence[str]) -> list[tuple[str, str]]:
    """What nobody trained, to be put beside the sources, and its kind; not what is among them."""
    beside = [(PIXELS_ALONE, "pixels")]
    beside += [(f"{UNTRAINED}{source}", "untrained") for source in sources
               if "#" not in source and source != PIXELS_ALONE and not source.startswith(UNTRAINED)]  # fmt: skip
    return [(source, kind) for source, kind in beside if source not in sources]


def home_of(source: str, options: ProbeOptions) -> Path | None:
    """Where a source's features and results are kept; None for where probe-features keeps them."""
    return options.out / folder_name(source) if options.out else None


def architecture(job: Probing) -> str:
    """What two sources share that differ by their weights alone."""
    return content_id({name: value for name, value in job.source.about.items() if name != "weights_sha256"})


def table_of(rows: Sequence[Compared], seed: int) -> dict[str, Any]:
    """One probe's rows, and the differences of all pairs but those of two that nobody gave; of a probe without accuracy its measures."""
    about = {name: rows[0].result[name] for name in ("n_train", "n_test", "n_classes")} if rows else {}
    pairs = [(a, b) for a, b in itertools.combinations(rows, 2) if "given" in (a.kind, b.kind) and a.right is not None]
    measures = [
        {"source": row.source, **one}
        for row in rows
        if row.result["accuracy"] is None
        for one in row.result["measures"]
    ]
    return {
        **about,
        "called": "accuracy" if all(row.right is not None for row in rows) else "value",
        "rows": [{"source": row.source, "kind": row.kind, **{name: row.result[name] for name in
                  ("accuracy", "interval", "headline", "id", "notes")}} for row in rows],
        "differences": [paired_difference(a, b, seed) for a, b in pairs],
        **({"measures": measures} if measures else {}),
    }  # fmt: skip


def paired_difference(a: Compared, b: Compared, seed: int) -> dict[str, Any]:
    """By how much `a` is ahead of `b` on the same test images, with the paired interval."""
    assert a.right is not None and b.right is not None
    ahead = float(a.right.mean() - b.right.mean())
    return {
        "a": a.source,
        "b": b.source,
        "difference": ahead,
        "interval": list(report.paired_interval(a.right, b.right, seed=seed)),
    }


def keep(
    options: ProbeOptions, sources: Sequence[str], probes: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """The comparison, also as JSON, Markdown and a page, and its tables said aloud."""
    found = {"data": " ".join(options.data), "sources": list(sources), "seed": options.seed, "probes": probes}
    home = (options.out or Path("probes")) / "comparisons" / content_id(found)[7:19]
    publish(home.with_suffix(".json"), (json.dumps(found, indent=2, default=list) + "\n").encode(), replace=True)
    publish(home.with_suffix(".md"), ("\n".join(markdown_of(found)) + "\n").encode(), replace=True)
    page = home.with_suffix(".html")
    made = drawn(page, lambda: write_document(page, comparison_page(found)), say)
    for line in markdown_of(found):
        say(line)
    say(f"{home}.md, {home}.json" + f", {page}" * made)
    return found


def markdown_of(found: Mapping[str, Any]) -> list[str]:
    """A comparison as tables: accuracies, or what else a probe gives, then paired differences."""
    lines = [f"# {report.cell(found['data'])}: {counted(len(found['sources']), 'source')} compared"]
    for probe, table in found["probes"].items():
        names = short_names([row["source"] for row in table["rows"]])
        if measures := table.get("measures"):
            named = [{**row, "source": names[row["source"]]} for row in measures]
            lines += ["", f"## {probe}", "", *report.measures_table(named)]
            continue
        lines += ["", f"## {probe}: {table['n_train']} train images, {table['n_test']} test images of {table['n_classes']} classes", "",
                  f"| source | {table['called']} | 95 % interval | |", "| --- | ---: | --- | --- |"]  # fmt: skip
        lines += [f"| {report.cell(names[row['source']])} | {row['accuracy']:.3f} | {report.span(row)} | {report.cell(row['headline'])} |"
                  for row in table["rows"]]  # fmt: skip
        if not table["differences"]:
            continue
        lines += ["", "| paired, on the same test images | difference | 95 % interval |", "| --- | ---: | --- |"]
        lines += [f"| {report.cell(names[pair['a']])} − {report.cell(names[pair['b']])} | {pair['difference']:+.3f} | "
                  f"{pair['interval'][0]:+.3f} to {pair['interval'][1]:+.3f} |" for pair in table["differences"]]  # fmt: skip
    return lines
