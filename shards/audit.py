"""Every problem of a cache at once, by file and shard.

Opening a cache checks existence and sizes; this also reads: records, hashes, every checksum, metadata.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrmae.common.backend import exists, file_pieces, read_bytes, size_of
from mrmae.shards import verify
from mrmae.shards.commit import bad_images, decoded_columns, manifest_body, read_record, valid_record, wrong_in_record
from mrmae.shards.format import (
    PIXELS,
    Plan,
    Unit,
    column_attributes,
    commit_path,
    compare_specs,
    pixels_of,
    plain,
    read_samples,
    tail_path,
    units,
)
from mrmae.shards.store import (
    Damaged,
    column_folder,
    foreign_entries,
    parse_row,
    read_index,
    read_members,
    storage_of,
    unit_files,
)
from mrmae.shards.trust import Manifest, Problem, fields_of, reason, trusted


def find_problems(path: Path, *, full: bool = False) -> list[Problem]:
    """Everything wrong with the cache at `path`; an empty list for a finished, whole one.

    Existence and sizes of all files, ids, commit records. full: also the sha256 of every file, the crc32c of every chunk
    and member, and the metadata of columns. Raises ValueError where there is no plan and no manifest to go by.
    """
    if foreign := foreign_entries(path):  # nothing behind a link is looked at
        return [Problem(name, what) for name, what in sorted(foreign.items())]
    plan, manifest, found = trusted(path)
    if manifest is None and not found:
        done = sum(valid_record(path, plan, *unit) is not None for unit in units(plan))
        total = sum(1 for _ in units(plan))
        found.append(
            Problem("manifest.json", f"absent: the cache is unfinished, {done} of {total} shards are committed")
        )
    table, samples_problems = samples_of(path, plan, manifest)
    found += samples_problems
    bad = bad_rows(path, plan, table)
    keys = None if table is None else table["key"]
    for unit in units(plan):
        found += unit_problems(
            path, plan, unit, verify.promised(manifest, unit) if manifest else None, bad, keys, full=full
        )
    found += metadata_problems(path, plan, full=full)
    found += tail_problems(path, plan, manifest, full=full)
    if full and manifest is not None and table is not None and not found:
        found += manifest_problems(path, plan, manifest, table)
    return found


def samples_of(path: Path, plan: Plan, manifest: Manifest | None) -> tuple[dict[str, list[Any]] | None, list[Problem]]:
    """The table of samples, None where it is damaged or not this cache's."""
    try:
        table = read_samples(path, plan.numbers)
    except ValueError as error:
        return None, [Problem("samples.parquet", reason(error, path / "samples.parquet"))]
    if manifest is not None:
        wrong = [what for what in verify.id_problems(plan, manifest, table) if what.startswith("samples.parquet")]
        if wrong:
            return None, [Problem("samples.parquet", wrong[0].partition(": ")[2])]
    return table, []


def bad_rows(path: Path, plan: Plan, table: Mapping[str, list[Any]] | None) -> set[int]:
    """The samples that need have no chunk in any column: the bad images, and rows that hold none."""
    if table is not None and None not in table["valid"]:
        return {number for number, valid in enumerate(table["valid"]) if not valid}
    return set(bad_images(path, plan))


def unit_problems(
    path: Path, plan: Plan, unit: Unit, promised: Mapping[str, Any] | None, bad: set[int],
    keys: Sequence[str] | None, *, full: bool,
) -> Iterator[Problem]:  # fmt: skip
    """What is wrong with one shard: its record, its files' sizes; full: their hashes and checksums."""
    record_file = commit_path(path, *unit)
    record = read_record(record_file)
    if record is None:
        if promised is None:
            return  # not extracted yet
        yield Problem(relative(path, record_file), "the commit record is missing or damaged", unit)
    elif promised is not None and right_but_for_manifest(path, plan, unit, record, promised, bad):
        what = f"its entry for shard {unit[2]} of {unit[1]}, view {unit[0]}, is not that of the commit record and files"
        yield Problem("manifest.json", what)
        promised = None
    elif record_problem := wrong_record(path, plan, unit, record, promised):
        yield Problem(relative(path, record_file), record_problem, unit)
    entry = promised or record or {}
    files = entry.get("files", {}) if isinstance(entry, dict) else {}
    for file in unit_files(path, plan, *unit):
        about = files.get(relative(path, file))
        if about is None:
            yield Problem(relative(path, file), "neither manifest nor commit record tells its size", unit)
        elif what := wrong_file(file, about, full=full):
            yield Problem(relative(path, file), what, unit)
            return  # its checksums would only say the same again
    if full:
        yield from checksum_problems(path, plan, unit, bad, keys)


def wrong_record(
    path: Path, plan: Plan, unit: Unit, record: Mapping[str, Any], promised: Mapping[str, Any] | None
) -> str:
    """What is wrong with a commit record; empty where nothing is."""
    if wrong := wrong_in_record(plan, unit, record):
        return wrong
    if unknown := verify.unknown_names(path, plan, unit, record.get("files", ())):
        return f"it names {unknown[0]!r}, which is no file of this shard"
    for name in ("count", "valid", "files", "record_id"):
        if promised is not None and record.get(name) != promised[name]:
            return f"{name} differs from the manifest"
    return ""


def right_but_for_manifest(
    path: Path,
    plan: Plan,
    unit: Unit,
    record: Mapping[str, Any],
    promised: Mapping[str, Any],
    bad: set[int],
) -> bool:
    """Whether a shard's files are exactly what its record says, and only the manifest says something else."""
    if wrong_record(path, plan, unit, record, None) or record["valid"] != sum(
        number not in bad for number in plan.ranges[unit[2]]
    ):
        return False
    if all(record[name] == promised[name] for name in ("count", "valid", "files")):
        return False  # at most the ids differ: the record is what can be written again from the images
    files = record.get("files")
    return isinstance(files, dict) and all(
        (about := files.get(relative(path, file))) and not wrong_file(file, about, full=True)
        for file in unit_files(path, plan, *unit)
    )


def wrong_file(file: Path, about: Mapping[str, Any], *, full: bool) -> str:
    """What is wrong with a file of known size and sha256; empty where nothing is."""
    try:
        if (size := size_of(file)) != about["bytes"]:
            return f"{size} bytes; {about['bytes']} were written"
        if full and sha256_of(file) != about["sha256"]:
            return "its sha256 is not that of what was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def sha256_of(file: Path) -> str:
    """The file's sha256 in hex."""
    digest = hashlib.sha256()
    for piece in file_pieces(file):
        digest.update(piece)
    return digest.hexdigest()


def checksum_problems(
    path: Path, plan: Plan, unit: Unit, bad: set[int], keys: Sequence[str] | None
) -> Iterator[Problem]:
    """Chunks and members of one shard that fail their crc32c, are absent, or should not be there.

    keys: of all samples; None where they are not known for sure.
    """
    view, column, shard = unit
    numbers = plan.ranges[shard]
    rows = [row for row, number in enumerate(numbers) if number not in bad]
    try:
        if column == PIXELS:
            check_tar(unit_files(path, plan, *unit)[0], plan, view, shard, numbers, rows)
            return
        folder, layout = column_folder(path, plan, view, column), plan.layout(column)
        mine = None if keys is None else keys[numbers.start : numbers.stop]
        storage_of(plan).open_shard(folder, layout, plan.shard_ids(shard)[column], view, shard, mine).check(rows)
    except Damaged as error:
        yield Problem(relative(path, error.path), error.what + where_row(error.row, numbers), unit)
    except ValueError as error:
        yield Problem(relative(path, unit_files(path, plan, *unit)[0]), reason(error, path), unit)


def check_tar(tar: Path, plan: Plan, view: int, shard: int, numbers: range, rows: list[int]) -> None:
    """Raise Damaged or ValueError unless sidecar, JPEGs and JSON members of a pixel tar are whole and its own."""
    index = read_index(tar)
    if index.of != pixels_of(plan, view, shard):
        raise Damaged(tar, None, f"its index belongs to {index.of}")
    for _ in read_members(tar, rows, index.tables["jpg"]):
        pass
    for row, content in enumerate(read_members(tar, range(len(numbers)), index.tables["json"])):
        about = parse_row(content)
        if (about.number, about.key) != (numbers[row], index.keys[row]):
            raise Damaged(tar, row, f"the member belongs to sample {about.number} ({about.key!r})")


def where_row(row: int | None, numbers: range) -> str:
    """Which sample a row of a shard is."""
    return "" if row is None else f" (sample {numbers[row]})"


def metadata_problems(path: Path, plan: Plan, *, full: bool) -> Iterator[Problem]:
    """Files that tell what a column holds, missing or, with `full`, say something else than was written."""
    for view in range(plan.n_views):
        for teacher in plan.columns:
            if teacher.column not in plan.quantisers:
                continue
            folder, layout = column_folder(path, plan, view, teacher.column), plan.layout(teacher.column)
            expected = storage_of(plan).metadata(layout, column_attributes(plan, view, teacher.column)) if full else {}
            for file in storage_of(plan).metadata_paths(folder, layout):
                name = file.relative_to(folder).as_posix()
                if not exists(file):
                    yield Problem(relative(path, file), "missing metadata of a column")
                elif full and fields_of(read_bytes(file)) != fields_of(expected[name]):
                    yield Problem(relative(path, file), "it is not what was written")


def tail_problems(path: Path, plan: Plan, manifest: Manifest | None, *, full: bool) -> Iterator[Problem]:
    """Tails that are missing, resized or, with `full`, altered."""
    told = {column["name"]: column["tail"] for column in manifest["columns"]} if manifest else {}
    for teacher in plan.columns:
        file = tail_path(path, teacher.name)
        if (tail := told.get(teacher.column)) and (what := wrong_file(file, tail, full=full)):
            yield Problem(relative(path, file), f"{what}, says manifest.json")


def manifest_problems(
    path: Path, plan: Plan, manifest: Mapping[str, Any], table: Mapping[str, list[Any]]
) -> Iterator[Problem]:
    """Where the manifest is not what commit records and samples say; only for caches in which nothing else is wrong."""
    records = {unit: record for unit in units(plan) if (record := read_record(commit_path(path, *unit)))}
    decoded = decoded_columns(plan, records)
    if other := [name for name, values in decoded.items() if values != table[name]]:
        yield Problem("samples.parquet", f"its column {other[0]} is not what the commit records say, so it was edited")
    body = plain(manifest_body(path, plan, records, table))
    told = {name: manifest.get(name) for name in body}
    if told == body:
        return
    try:
        compare_specs(told, body, "manifest.json")
    except ValueError as error:
        what = str(error).removeprefix("manifest.json: ").partition(" in this command;")[0]
        yield Problem("manifest.json", f"{what} in the commit records, so it was edited")


def relative(path: Path, file: Path) -> str:
    """The file's name inside the cache."""
    return file.relative_to(path).as_posix()
