"""`inspect-cache report`: what a cache holds, as a page that one can send."""

import io
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrmae.common import page
from mrmae.common.backend import Url
from mrmae.common.page import Curve, Html
from mrmae.common.progress import counted, human_bytes, human_time
from mrmae.extract.inspect.pictures import contact_sheet
from mrmae.extract.inspect.show import Records, column_row, contents, described
from mrmae.extract.recorded import told_command
from mrmae.shards.cache import open_cache
from mrmae.shards.format import PIXELS, Plan

SHOWN_LABELS, LISTED_BAD, SHOWN_ROWS, BINS = 30, 200, 8, 12
Table = Mapping[str, Sequence[Any]]
WORK = {
    "decode": "decoding (threads)",
    "decode_wait": "waiting for it",
    "forward": "teacher",
    "quantise": "quantising",
    "write": "writing",
}


def cache_page(path: Path, *, rows: int = SHOWN_ROWS) -> str:
    """The page of a cache, also of an unfinished one. rows: of the contact sheet. ValueError where there is no cache."""
    plan, records, table = contents(path)
    found = described(path, plan, records, table)
    sections = [
        page.section("What it holds", *holdings(path, found, plan, records)),
        page.section("Columns", *columns(found, plan, records)),
        page.section("Pictures", *sheet_of(path, rows)),
        page.section("Images", *images(table)),
        page.section("Labels", *labels(table)),
        page.section("Images that cannot be read", *unreadable(found["bad_images"])),
        page.section("How long it took", *times(found)),
        page.section("Use it", page.code(f"train-mrmae {shlex.quote(found['path'])} OUT\ninspect-cache verify --full {shlex.quote(found['path'])}")),
    ]  # fmt: skip
    lead = f"{counted(found['images'], 'image')} x {counted(found['views'], 'view')}, {human_bytes(found['bytes'])}"
    return page.document(f"Cache {path.name}", *sections, lead=lead, warnings=warnings_about(found))


def warnings_about(found: Mapping[str, Any]) -> list[str]:
    """What nobody may overlook: shards that are not there yet, teachers that know nothing."""
    unfinished = f"UNFINISHED: {found['shards_committed']} of {found['shards']} shards are committed; extract-features continues it"
    random = [c["teacher"]["name"] for c in found["columns"] if c.get("teacher", {}).get("weights") == "random"]
    said = f"RANDOM WEIGHTS: the features of {', '.join(random)} come from untrained teachers and know nothing"
    return [unfinished] * (not found["finished"]) + [said] * bool(random)


def holdings(path: Path, found: Mapping[str, Any], plan: Plan, records: Records) -> Iterator[Html]:
    """Views, grid, format, ids, and the command that made it."""
    recipe, (h, w) = found["recipe"], found["grid"]
    yield page.facts({
        "images": f"{found['images']:,}, {len(found['bad_images']):,} of them cannot be read",
        "labels": f"{found['labels']:,}",
        "views": f"{found['views']} per image, {recipe['size']} px, crop {recipe['crop_scale'][0]:g} to"
                 f" {recipe['crop_scale'][1]:g} of the area, flip {recipe['flip']:g}, seed {recipe['seed']}",
        "grid": f"{h} x {w} patches",
        "stored as": f"{found['dtype']} in {found['format']}, shards of {found['shard_samples']} images",
        **({"appended": ", ".join(f"{part['images']:,} from sample {part['first']:,}" for part in found["parts"][1:])}
           if len(found["parts"]) > 1 else {}),
        "lies at": found["path"] if isinstance(path, Url) else path.absolute(),
    })  # fmt: skip
    if told := told_command(records.get((0, PIXELS, 0))):
        yield page.paragraph("Made by")
        yield page.code(f"cd {shlex.quote(str(told[1]))}\n{shlex.join(told[0])}")
    derived = {
        name: f"width {about['width']}, from {about['from']} when read" for name, about in found["derived"].items()
    }
    ids = {"data set": found["dataset_id"] or "known once all images are read", "listing": found["listing_id"], "geometry": found["geometry_id"],
           **{column["name"]: column["id"] or "not calibrated" for column in found["columns"]}}  # fmt: skip
    yield page.folded("Ids", page.facts(ids))
    if derived:
        yield page.folded("Columns that follow from others", page.facts(derived))
    made = records.get((0, PIXELS, 0), {}).get("versions")
    if isinstance(made, dict):
        yield page.folded("Versions that wrote the first shard", page.facts(made))


def columns(found: Mapping[str, Any], plan: Plan, records: Records) -> Iterator[Html]:
    """Every column's size and quality, and its quality shard by shard."""
    rows = []
    for column in found["columns"]:
        name, what, shards, size, snr, p999, _ = column_row(column, plan)
        each = column["bytes"] / max(1, plan.n_images * plan.n_views)
        rows.append([name, what, shards, size, human_bytes(each), snr and f"{snr} dB", p999])
    headings = ["column", "what", "shards", "bytes", "per view", "SNR, worst shard", "p99.9 of 1 - cos"]
    yield page.table(headings, rows, caption="Quality: what is read back against what the teacher gave.")
    names = [teacher.column for teacher in plan.columns]
    for title, field, digits in (("Signal to noise per shard, dB", "snr_db", 4), ("99.9th percentile of 1 - cosine per shard", "p999_one_minus_cos", 3)):  # fmt: skip
        curves = [curve for name in names if (curve := quality_curve(name, field, plan, records)).x]
        if curves:
            yield page.chart(title, curves, x="shard, view after view", y="dB" * (field == "snr_db"), digits=digits,
                             logarithmic=field != "snr_db")  # fmt: skip


def quality_curve(name: str, field: str, plan: Plan, records: Records) -> Curve:
    """A column's quality over its shards."""
    found = {
        view * plan.n_shards + shard: record["quality"][field]
        for (view, column, shard), record in records.items()
        if column == name and record.get("quality")
    }
    at = sorted(found)
    return Curve(name, at, [found[place] for place in at])


def sheet_of(path: Path, rows: int) -> Iterator[Html]:
    """The contact sheet, and what is on it."""
    cache = open_cache(path, allow_partial=True)
    if not len(cache.numbers):
        yield page.paragraph("No image can be shown yet.")
        return
    out = io.BytesIO()
    contact_sheet(cache, rows).save(out, "PNG")
    columns = ", ".join(cache.columns) or "no teacher"
    yield page.picture(
        page.as_webp(out.getvalue()),
        alt=f"Stored views of {min(rows, len(cache.numbers))} images, a row each; beside each the tokens of {columns} as colours, and"
        " attention or token norms as brightness",
        caption="Brightness: attention, or the norm of a token, each image from its lowest to its highest.",
    )


def images(table: Table) -> Iterator[Html]:
    """How large the images are, as files and in pixels."""
    of = {"file": [n for n in table["bytes"] if n],
          "width": [n for n in table["width"] if n], "height": [n for n in table["height"] if n]}  # fmt: skip
    words = {"file": human_bytes, "width": "{:.0f} px".format, "height": "{:.0f} px".format}
    quantiles = (0, 0.05, 0.5, 0.95, 1)
    rows = [[name, *(words[name](q) for q in np.quantile(values, quantiles))] for name, values in of.items() if values]
    yield page.table(["", "smallest", "5 %", "median", "95 %", "largest"], rows,
                     caption=f"{human_bytes(sum(of['file']))} of files in all. Pixels are known of what has been decoded.")  # fmt: skip
    if sides := [max(h, w) for h, w in zip(table["height"], table["width"]) if h and w]:
        yield page.bars("Longer side of the images", binned(sides, " px"), x="images")


def binned(values: Sequence[float], unit: str) -> dict[str, float]:
    """Counts by bin, `64 to 95 px`; by value where there are few."""
    if len(counts := Counter(values)) <= BINS:
        return {f"{value:g}{unit}": float(counts[value]) for value in sorted(counts)}
    counted_in, edges = np.histogram(values, bins=BINS)
    return {f"{low:.0f} to {high:.0f}{unit}": float(n) for n, low, high in zip(counted_in, edges, edges[1:])}


def labels(table: Table) -> Iterator[Html]:
    """How many images every label has, the most frequent ones."""
    counts = Counter(label for label in table["label"] if label is not None)
    if not counts:
        yield page.paragraph("The images have no labels; training needs none.")
        return
    shown = dict(counts.most_common(SHOWN_LABELS))
    title = "Images per label" + (
        f", the {SHOWN_LABELS} largest of {len(counts):,}" if len(counts) > SHOWN_LABELS else ""
    )
    yield page.bars(title, shown, x="images")
    without = len(table["label"]) - sum(counts.values())
    if without:
        yield page.paragraph(f"{counted(without, 'image')} without a label.")


def unreadable(bad: Mapping[str, str]) -> Iterator[Html]:
    """Every image that cannot be read, with its reason."""
    if not bad:
        yield page.paragraph("None.")
        return
    yield page.table(["image", "reason"], list(bad.items())[:LISTED_BAD])
    if len(bad) > LISTED_BAD:
        yield page.paragraph(f"... and {len(bad) - LISTED_BAD:,} more: inspect-cache show --json names all.")


def times(found: Mapping[str, Any]) -> Iterator[Html]:
    """Seconds spent on every column, by what they were spent on."""
    spent = [column for column in found["columns"] if column["seconds"]]
    if not spent:
        yield page.paragraph("Its commit records do not tell; those of a converted cache never do.")
        return
    names = [name for name in WORK if any(name in column["seconds"] for column in spent)]
    rows = [[column["name"], *(seconds(column["seconds"].get(name)) for name in names)] for column in spent]
    rows.append(["all", *(seconds(sum(column["seconds"].get(name, 0.0) for column in spent)) for name in names)])
    yield page.table(["column", *(WORK[name] for name in names)], rows,
                     caption="Summed over shards and processes; these run side by side, so that the sum is more than what a clock showed.")  # fmt: skip


def seconds(spent: float | None) -> str:
    """A duration in a table."""
    return "" if spent is None else f"{spent:.1f} s" if spent < 60 else human_time(spent)
