"""A comparison of sources as a page that one can send: accuracies, and paired intervals of their differences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mrmae.common import page
from mrmae.common.page import Html
from mrmae.common.progress import counted
from mrmae.probe.report import cell, measured, title

UNTAUGHT = {"given": "", "pixels": "pixels alone, shrunk", "untrained": "the same model before any training"}
Interval = tuple[float, float, float]


def comparison_page(found: Mapping[str, Any]) -> str:
    """The page of what `compare_sources` found."""
    sections = [page.section(heading(probe, table), *compared(table)) for probe, table in found["probes"].items()]
    return page.document(
        f"{counted(len(found['sources']), 'source')} compared",
        *sections,
        lead=f"On {cell(found['data'])}; seed {found['seed']}.",
    )


def heading(probe: str, table: Mapping[str, Any]) -> str:
    """The probe, and how many images it had where it answers about them."""
    if "measures" in table:
        return probe
    return f"{probe}: {table['n_train']:,} train and {table['n_test']:,} test images of {counted(table['n_classes'], 'class', 'classes')}"


def compared(table: Mapping[str, Any]) -> Iterator[Html]:
    """One probe's accuracies and differences, drawn and as numbers."""
    rows, pairs = table["rows"], table["differences"]
    names = short_names([row["source"] for row in rows])
    if measures := table.get("measures"):
        yield page.table(
            list(measures[0]), [[names[row["source"]], *map(measured, list(row.values())[1:])] for row in measures]
        )
        return
    yield page.intervals(
        f"{table['called'].capitalize()} on the test images, 95 % intervals",
        {names[row["source"]]: in_percent(row, "accuracy") for row in rows},
        x="%",
    )
    yield page.table(
        ["source", f"{table['called']}, % [95 %]", "how", ""],
        [
            [
                names[row["source"]],
                value_words(in_percent(row, "accuracy")),
                row["headline"],
                UNTAUGHT.get(row["kind"], row["kind"]),
            ]
            for row in rows
        ],
    )
    if long := {names[row["source"]]: row["source"] for row in rows if names[row["source"]] != row["source"]}:
        yield page.folded("The sources as they were given", page.facts(long))
    notes = dict.fromkeys(f"{names[row['source']]}: {note}" for row in rows for note in row["notes"])
    for note in notes:
        yield page.paragraph(note, "quiet")
    if not pairs:
        return
    drawn = {f"{names[pair['a']]} − {names[pair['b']]}": in_percent(pair, "difference") for pair in pairs}
    yield page.intervals("Paired differences, 95 % intervals", drawn, x="percentage points", zero=True)
    yield page.table(
        ["difference", "points [95 %]", "verdict"],
        [[name, value_words(value, sign="+"), who_is_ahead(value)] for name, value in drawn.items()],
        caption="Paired: both answered about the same test images, which are drawn for both at once.",
    )


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """The sources by what is read of them: without folders of absolute paths and options, unless two would be called the same."""
    short = [title(source) for source in sources]
    return {source: name if short.count(name) == 1 else source for source, name in zip(sources, short)}


def in_percent(row: Mapping[str, Any], name: str) -> Interval:
    """A value and its interval, in percent."""
    low, high = row["interval"]
    return 100 * row[name], 100 * low, 100 * high


def value_words(value: Interval, sign: str = "") -> str:
    """`81.2 [79.0, 83.3]`."""
    middle, low, high = (f"{v:{sign}.1f}" for v in value)
    return f"{middle} [{low}, {high}]"


def who_is_ahead(value: Interval) -> str:
    """Whether the interval says which one is ahead."""
    _, low, high = value
    return "the first is ahead" if low > 0 else "the second is ahead" if high < 0 else "neither is shown to be ahead"
