"""What a cache holds, as a table for people and as JSON, and how two caches differ, field by field."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

from mrmae.common.backend import exists
from mrmae.common.errors import shortened
from mrmae.common.progress import counted, human_bytes
from mrmae.extract.estimate import blocks_in_words, teacher_in_words
from mrmae.shards import commit as commits
from mrmae.shards.format import (
    PIXELS,
    Plan,
    Unit,
    Values,
    derived_specs,
    load_plan,
    plain,
    read_samples,
    read_tail,
    stats_path,
    units,
)
from mrmae.shards.manifest import read_manifest, worst_quality
from mrmae.shards.store import refuse_foreign_entries

SHOWN_VALUE = 60  # characters of a value in a table of differences
Flat = dict[str, Any]
Records = Mapping[Unit, Mapping[str, Any]]


def description(path: Path) -> dict[str, Any]:
    """Everything that `show` shows, as JSON. Also of an unfinished cache. ValueError where there is none."""
    return described(path, *contents(path))


def contents(path: Path) -> tuple[Plan, Records, dict[str, Values]]:
    """What a description is made of: the plan, the valid commit records by unit, and the columns of samples.arrow."""
    refuse_foreign_entries(path)
    plan = load_plan(path)
    if exists(path / "manifest.json"):
        read_manifest(path)
    return plan, commits.valid_records(path, plan, units(plan)), read_samples(path, plan.numbers)


def described(path: Path, plan: Plan, records: Records, table: Mapping[str, Values]) -> dict[str, Any]:
    """The description, of what was read before."""
    bad = commits.bad_in(records)
    finished = exists(path / "manifest.json")
    ids = read_manifest(path)["dataset_ids"] if finished else [None] * len(plan.parts)
    return {
        "path": str(path),
        "finished": finished,
        "shards_committed": len(records),
        "shards": sum(1 for _ in units(plan)),
        "dataset_id": ids[-1],
        "listing_id": plan.parts[-1].listing_id,
        "parts": [
            {"first": p.numbers.start, "images": len(p.numbers), "dataset_id": id} for p, id in zip(plan.parts, ids)
        ],
        "geometry_id": plan.geometry_id,
        "images": plan.n_images,
        "bad_images": {table["key"][number]: reason for number, reason in sorted(bad.items())},
        "labels": len({label for label in table["label"] if label is not None}),
        "views": plan.n_views,
        "recipe": plain(plan.recipe),
        "grid": list(plan.grid),
        "shard_samples": plan.shard_samples,
        "dtype": plan.dtype,
        "format": plan.format,
        "token_layout": plain(plan.token_layout) if plan.token_layout else "raster",
        "bytes": sum(unit_bytes(record) for record in records.values()),
        "derived": {
            name: {"from": source, "width": spec.width}
            for name, (spec, source) in derived_specs(plan.columns, lambda teacher: read_tail(path, teacher)).items()
        },
        "columns": [column_description(path, plan, name, records) for name in column_names(plan)],
    }


def column_names(plan: Plan) -> list[str]:
    """The pixels, then the teachers' columns."""
    return [PIXELS, *(teacher.column for teacher in plan.columns)]


def unit_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a shard's files."""
    return sum(file["bytes"] for file in record["files"].values())


def column_description(path: Path, plan: Plan, name: str, records: Records) -> dict[str, Any]:
    """One column: id, teacher, shape, progress, bytes, worst quality, seconds spent."""
    mine = [record for (_, column, _), record in records.items() if column == name]
    seconds: dict[str, float] = {}
    for record in mine:
        for what, spent in record.get("seconds", {}).items():
            seconds[what] = round(seconds.get(what, 0.0) + spent, 3)
    fields: dict[str, Any] = {
        "name": name,
        "id": plan.ids.get(name),
        "shards_committed": len(mine),
        "shards": plan.n_views * plan.n_shards,
        "bytes": sum(unit_bytes(record) for record in mine),
        "seconds": seconds,
    }
    if name == PIXELS:
        return fields
    layout, quantiser = plan.layout(name), plan.quantisers.get(name)
    return fields | {
        "teacher": plain(plan.teacher(name)),
        "arrays": {array: [list(shape), dtype] for array, (shape, dtype) in layout.arrays().items()},
        "standardised": quantiser.standardised if quantiser else None,
        "source": quantiser.source if quantiser else None,
        "quality": worst_quality(mine),
        "stats": exists(stats_path(path, name)),
    }


def print_description(found: Mapping[str, Any], plan: Plan, console: Console) -> None:
    """Print a description for a person."""
    state = "finished" if found["finished"] else f"UNFINISHED: {found['shards_committed']} of {found['shards']} shards"
    recipe, (h, w) = found["recipe"], found["grid"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("cache", f"{found['path']}, {state}, {human_bytes(found['bytes'])}")
    facts.add_row("images", f"{found['images']} ({len(found['bad_images'])} bad), {counted(found['labels'], 'label')}")
    if len(parts := found["parts"]) > 1:
        facts.add_row("appended", ", ".join(f"{part['images']} from sample {part['first']}" for part in parts[1:]))
    facts.add_row("views", f"{found['views']} of {recipe['size']} px, crop {recipe['crop_scale'][0]:g} to "
                  f"{recipe['crop_scale'][1]:g}, flip {recipe['flip']:g}, seed {recipe['seed']}")  # fmt: skip
    facts.add_row(
        "grid", f"{h} x {w} patches, shards of {found['shard_samples']}, {found['dtype']} in {found['format']}"
    )
    if plan.token_layout:
        facts.add_row("token blocks", blocks_in_words(plan.token_layout, plan.grid))
    facts.add_row("data set", found["dataset_id"] or "known once all images are read")
    facts.add_row("geometry", found["geometry_id"])
    for name, about_it in found["derived"].items():
        facts.add_row("derived", f"{name}: width {about_it['width']}, from {about_it['from']} and its tail when read")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("column", "left"), ("what", "left"), ("shards", "right"), ("bytes", "right"),
                             ("SNR dB", "right"), ("p99.9 1-cos", "right"), ("id", "left")):  # fmt: skip
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for column in found["columns"]:
        table.add_row(*column_row(column, plan))
    console.print(Group(facts, table))
    for key, reason in list(found["bad_images"].items())[:20]:
        console.print(shortened(f"bad: {key}: {reason}"), markup=False)


def column_row(column: Mapping[str, Any], plan: Plan) -> list[str]:
    """A column's line in the table."""
    name, quality = column["name"], column.get("quality")
    what = (
        plan.recipe.stored.words if name == PIXELS else shortened(teacher_in_words(plan.teacher(name), plan.dtype), 200)
    )
    what += ", standardised" if column.get("standardised") else ""
    what += ", requantised" if column.get("source") else ""
    measured = [f"{quality['snr_db']:.1f}", f"{quality['p999_one_minus_cos']:.2g}"] if quality else ["", ""]
    return [name, what, f"{column['shards_committed']}/{column['shards']}", human_bytes(column["bytes"]), *measured,
            (column["id"] or "not calibrated")[:19]]  # fmt: skip


# --- differences


def differences(a: Path, b: Path) -> Iterator[tuple[str, Any, Any]]:
    """(field, value in a, value in b) for every field by which two caches differ; None where one lacks the field.

    Finished caches are compared by their manifests, else both by their plans. Columns are compared by name, shards by
    the sha256 of their files, one line per column and view.
    """
    both = [comparable(path, finished=all(exists(p / "manifest.json") for p in (a, b))) for path in (a, b)]
    for field in [*both[0], *(name for name in both[1] if name not in both[0])]:
        if both[0].get(field) != both[1].get(field):
            yield field, both[0].get(field), both[1].get(field)


def comparable(path: Path, *, finished: bool) -> Flat:
    """A cache as one flat dict."""
    refuse_foreign_entries(path)
    if not finished:
        fields = load_plan(path).to_json()
        columns = {f"{c['name']}.{c['tap']}": {"teacher": c} for c in fields.pop("columns")}
        quantisers = fields.pop("quantisers")
        return flattened({**fields, "columns": {n: {**c, "quantiser": quantisers.get(n)} for n, c in columns.items()}})
    manifest, plan = read_manifest(path), load_plan(path)
    fields = {name: value for name, value in manifest.items() if name != "shards"}
    fields["columns"] = {column["name"]: column for column in manifest["columns"]}
    hashes: dict[str, list[list[str]]] = {}
    for unit in units(plan):
        files = manifest.entry(plan, unit).get("files", {})
        hashes.setdefault(f"shards.view {unit[0]}.{unit[1]}", []).append([file["sha256"] for file in files.values()])
    return flattened(fields) | hashes


def flattened(value: Any, field: str = "") -> Flat:
    """Nested dicts as one, keys joined with dots; lists stay whole."""
    if not isinstance(value, Mapping):
        return {field: value}
    return {
        k: v for name, inner in value.items() for k, v in flattened(inner, f"{field}.{name}" if field else name).items()
    }


def difference_line(field: str, a: Any, b: Any) -> str:
    """One difference in a line."""
    field = shortened(field, 200)
    if field.startswith("shards.") and isinstance(a, list) and isinstance(b, list):
        other = [i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]]
        return f"{field}: {len(other)} of {max(len(a), len(b))} shards differ, the first is shard {other[0]}"
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and len(a) > 3:
        other = [i for i in range(len(a)) if a[i] != b[i]]
        return (
            f"{field}: {len(other)} of {len(a)} values differ, the first at [{other[0]}]: "
            f"{short(a[other[0]])} | {short(b[other[0]])}"
        )
    return f"{field}: {short(a)} | {short(b)}"


def short(value: Any) -> str:
    """A value, cut to a readable length; `(absent)` for None from a missing field."""
    text = "(absent)" if value is None else repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."
