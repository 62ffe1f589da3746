"""Faults for a finished cache, and who notices: used by the test suite (hundreds) and by soak_cache.py (10,000).

A fault is one change to one or two files. It is detected when opening, verifying in full, or reading everything says so,
names the file or its shard, and says how to repair.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.format import PIXELS, Plan, Unit, Values, commit_path, content_id, units, write_arrow
from mrmae.shards.shard_table import SHARD_TABLE, ShardTable, table_file
from mrmae.shards.store import unit_files

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Fault:
    """What was done, to which files (relative), and their content before (None: there was none)."""

    kind: str
    files: tuple[str, ...]
    before: tuple[bytes | None, ...]
    unit: Unit | None = None
    after: bytes | None = None


def undo(path: Path, fault: Fault) -> None:
    """Put everything back."""
    for name, content in zip(fault.files, fault.before):
        if content is None:
            (path / name).unlink(missing_ok=True)
        else:
            (path / name).write_bytes(content)


def change(path: Path, kind: str, name: str, content: bytes | None, unit: Unit | None = None) -> Fault:
    """Give a file other content, or none."""
    before = (path / name).read_bytes()
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    return Fault(kind, (name,), (before,), unit, content)


# --- the kinds


def flip_bit(path: Path, made: Plan, rng: Rng) -> Fault:
    """One bit of a shard file or sidecar."""
    unit, name, content = some_file(path, made, rng)
    at, bit = int(rng.integers(len(content))), int(rng.integers(8))
    return change(path, "bit flip", name, content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :], unit)


def truncate(path: Path, made: Plan, rng: Rng) -> Fault:
    """A file cut anywhere."""
    unit, name, content = some_file(path, made, rng)
    return change(path, "truncation", name, content[: int(rng.integers(len(content)))], unit)


def truncate_at_member(path: Path, made: Plan, rng: Rng) -> Fault:
    """A tar cut at a member's boundary and closed properly, its sidecar telling the new truth: it looks complete."""
    view, shard = int(rng.integers(made.n_views)), int(rng.integers(made.n_shards))
    column = PIXELS if made.format == "zarr" else some_column(made, rng)
    tar, sidecar = unit_files(path, made, view, column, shard)
    before = tar.read_bytes(), sidecar.read_bytes()
    index = dict(np.load(sidecar))
    offsets = index["members"][..., 0]
    end = int(rng.choice(np.sort(offsets[offsets > 0])[1:])) - 512
    tar.write_bytes(before[0][:end] + bytes(1024))
    if rng.random() < 0.5:
        index["members"][offsets > end] = -1
        np.savez(sidecar, **index)
    names = tuple(check.relative(path, file) for file in (tar, sidecar))
    return Fault("truncation at a member", names, before, (view, column, shard))


def zero_fill(path: Path, made: Plan, rng: Rng) -> Fault:
    """A range of zeros, as a lost write leaves it; of the same size."""
    unit, name, content = some_file(path, made, rng)
    while True:
        a, b = sorted(int(n) for n in rng.integers(0, len(content) + 1, 2))
        changed = content[:a] + bytes(b - a) + content[b:]
        if changed != content:
            return change(path, "zero fill", name, changed, unit)


def swap_shards(path: Path, made: Plan, rng: Rng) -> Fault:
    """Two shards exchanged: of one array or tar alone, or of one view's tars with their sidecars."""
    column = some_column(made, rng)
    view = int(rng.integers(made.n_views))
    a, b = (int(n) for n in rng.choice(made.n_shards, 2, replace=False))
    pairs = list(zip(*(unit_files(path, made, view, column, shard) for shard in (a, b))))
    whole = column == PIXELS or (made.format == "webdataset" and rng.random() < 0.5)
    chosen = pairs if whole else [pairs[int(rng.integers(len(pairs)))]]
    files = [file for pair in chosen for file in pair]
    before = [file.read_bytes() for file in files]
    for (one, other), (x, y) in zip(chosen, zip(before[::2], before[1::2])):
        one.write_bytes(y)
        other.write_bytes(x)
    return Fault("swapped shards", tuple(check.relative(path, f) for f in files), tuple(before), (view, column, a))


def delete_shard(path: Path, made: Plan, rng: Rng) -> Fault:
    """A shard file is gone."""
    unit, name, _ = some_file(path, made, rng)
    return change(path, "deleted shard", name, None, unit)


def delete_record(path: Path, made: Plan, rng: Rng) -> Fault:
    """A commit record is gone."""
    every = list(units(made))
    unit = every[int(rng.integers(len(every)))]
    return change(path, "deleted commit record", check.relative(path, commit_path(path, *unit)), None, unit)


def edit_manifest(path: Path, made: Plan, rng: Rng) -> Fault:
    """A number or a word of the manifest is another one; half of the time its own id is made to fit."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    holder, key = list(leaves(manifest))[int(rng.integers(len(list(leaves(manifest)))))]
    value = holder[key]
    holder[key] = (not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float)
                   else value + "x" if isinstance(value, str) else "x")  # fmt: skip
    if rng.random() < 0.5:
        manifest["manifest_id"] = content_id({k: v for k, v in manifest.items() if k != "manifest_id"})
    return change(path, "edited manifest", "manifest.json", json.dumps(manifest).encode())


def edit_shards(path: Path, made: Plan, rng: Rng) -> Fault:
    """A value of the manifest's table of shards is another one; half of the time manifest.json is made to fit."""
    file = table_file(path, 0)
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    name = table.column_names[int(rng.integers(table.num_columns))]
    values, row = table[name].to_pylist(), int(rng.integers(table.num_rows))
    values[row] = rng.bytes(32) if isinstance(values[row], bytes) else values[row] + ("x" if name == "column" else 1)
    table = table.set_column(
        table.column_names.index(name), table.schema.field(name), pa.array(values, table.schema.field(name).type)
    )
    names = [file, path / "manifest.json"]
    before = tuple(file.read_bytes() for file in names)
    columns = {name: Values(table[name].combine_chunks(), name) for name in table.column_names}
    write_arrow(file, columns, SHARD_TABLE)
    if rng.random() < 0.5:
        manifest = json.loads(before[1])
        manifest["shards"][0] = ShardTable.of(columns).digests
        manifest["manifest_id"] = content_id({k: v for k, v in manifest.items() if k != "manifest_id"})
        names[1].write_text(json.dumps(manifest))
    return Fault("edited table of shards", tuple(check.relative(path, file) for file in names), before)


def flip_metadata(path: Path, made: Plan, rng: Rng) -> Fault:
    """One bit of plan, manifest or a tail."""
    names = ["plan.json", "manifest.json", *(f"tail/{t.name}.safetensors" for t in made.columns)]
    name = names[int(rng.integers(len(names)))]
    content = (path / name).read_bytes()
    at, bit = int(rng.integers(len(content))), int(rng.integers(8))
    return change(
        path, "bit flip in metadata", name, content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
    )


KINDS: dict[str, Callable[[Path, Plan, Rng], Fault]] = {
    "bit flip": flip_bit,
    "truncation": truncate,
    "truncation at a member": truncate_at_member,
    "zero fill": zero_fill,
    "swapped shards": swap_shards,
    "deleted shard": delete_shard,
    "deleted commit record": delete_record,
    "edited manifest": edit_manifest,
    "edited table of shards": edit_shards,
    "bit flip in metadata": flip_metadata,
}


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every plain value of nested JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            yield from leaves(inner)
        else:
            yield value, key


def some_column(made: Plan, rng: Rng) -> str:
    """The pixels or a teacher's column."""
    return [PIXELS, *(t.column for t in made.columns)][int(rng.integers(1 + len(made.columns)))]


def some_file(path: Path, made: Plan, rng: Rng) -> tuple[Unit, str, bytes]:
    """A file of a random unit."""
    every = list(units(made))
    unit = every[int(rng.integers(len(every)))]
    files = unit_files(path, made, *unit)
    file = files[int(rng.integers(len(files)))]
    return unit, check.relative(path, file), file.read_bytes()


# --- who notices


def read_everything(path: Path) -> None:
    """Open the cache and read every array and view of every sample."""
    cache = open_cache(path, threads=1)
    for view in range(cache.n_views):
        views = np.full_like(cache.numbers, view)
        cache.read_pixels(cache.numbers, views)
        for number in cache.numbers.tolist():
            cache.read_crop(number, view)
        for name, column in cache.columns.items():
            cache.read_column(name, cache.numbers, views, tuple(column.layout.arrays()))


def noticed_by(path: Path) -> dict[str, str]:
    """What each check says, by its name; empty for a clean cache."""
    found = {}
    problems = check.find_problems(path, full=True)
    if problems:
        found["verify --full"] = "\n".join(map(str, problems)) + f"\nto repair: inspect-cache repair {path}"
    try:
        read_everything(path)
    except ValueError as error:
        found["open and read"] = str(error)
    return found


def harmless(fault: Fault) -> bool:
    """Whether a change to JSON left every value as it was, such as 1e-05 written 1E-05."""
    before, after = fault.before[0], fault.after
    if after is None or before is None or not fault.files[0].endswith(".json"):
        return False
    try:
        return bool(json.loads(after) == json.loads(before))
    except ValueError:
        return False


def well_told(fault: Fault, found: dict[str, str]) -> bool:
    """Whether some check names a damaged file or its shard's record, and how to repair it."""
    return any(any(name in text for name in fault.files) and ("inspect-cache repair" in text or "to repair" in text or "run the same" in text)
               for text in found.values())  # fmt: skip


def try_fault(path: Path, made: Plan, kind: str, rng: Rng) -> tuple[Fault, dict[str, str]]:
    """Apply a fault, ask every check, put everything back."""
    fault = KINDS[kind](path, made, rng)
    try:
        return fault, noticed_by(path)
    finally:
        undo(path, fault)
