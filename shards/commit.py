"""Commit records: what is done, what is left to do, and the end, when all is. docs/format.md, "Commit protocol".

Shards are written in any order, each followed by its commit record; the manifest comes last. What is missing is always
plan minus valid commits, so a killed extraction leaves nothing to clean up by hand.
"""

import hashlib
import os
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from mrmae.common.backend import About, Url, exists, file_pieces, size_of
from mrmae.common.files import is_still, publish, remove, remove_leftovers
from mrmae.common.leases import expect_held
from mrmae.shards.claims import remove_locks
from mrmae.shards.format import (
    FORMAT_VERSION,
    IN_BLOCKS,
    NO_IMAGE,
    PIXELS,
    Array,
    Plan,
    Source,
    SourceTable,
    Unit,
    Values,
    canonical_json,
    column_attributes,
    commit_path,
    content_id,
    hash_values,
    in_blocks,
    kept_path,
    pixels_of,
    product_path,
    read_codebook,
    read_json,
    read_product,
    read_samples,
    read_tail,
    sample_values,
    shown,
    signed_hashes,
    tar_path,
    units,
    write_samples,
)
from mrmae.shards.manifest import (
    MOST_MANIFEST_BYTES,
    FileFields,
    Manifest,
    ManifestFields,
    QualityFields,
    file_summary,
    samples_digests,
    write_manifest,
)
from mrmae.shards.store import (
    PixelRow,
    column_folder,
    digest_of_hashes,
    index_path,
    read_hashes,
    read_index,
    storage_of,
    unit_files,
    write_pixel_tar,
)

STORE_ATTEMPTS, WAIT_SECONDS = 6, 0.5  # to write a unit beside another writer; the first wait at most, 30 s in all
REMOTE_RECORDS = 32  # asked for at a time
ASKED_BY_NAME = 16  # commit records at most; of more their folders are listed
MOST_RECORD_BYTES = 1 << 26  # the largest shard's has 14 MB, and reasons of its bad images
# What a record says of its shard. Time, host, versions and command are beside it, so that equal runs have equal ids.
RECORDED = ("format_version", "view", "column", "shard", "id", "files", "count", "valid", "first", "last", "heights", "widths",
            "sha256", "bad", "quality")  # fmt: skip


class RecordFields(TypedDict):
    """A commit record: sha256 is the digest of its images' hashes; first, last, heights, widths and bad of the pixels, quality of
    columns; from `seconds` on, what lies beside the shard and is in no id."""

    format_version: int
    view: int
    column: str
    shard: int
    id: str
    files: dict[str, FileFields]
    count: int
    valid: int
    record_id: str
    sha256: str
    first: NotRequired[str]
    last: NotRequired[str]
    heights: NotRequired[list[int]]
    widths: NotRequired[list[int]]
    bad: NotRequired[dict[str, str]]
    quality: NotRequired[QualityFields | None]
    seconds: NotRequired[dict[str, float]]
    versions: NotRequired[dict[str, Any]]
    device: NotRequired[str]
    command: NotRequired[str]
    folder: NotRequired[str]
    written: NotRequired[int]
    objects: NotRequired[dict[str, Any]]
    extracted: NotRequired[dict[str, Any]]


def store_pixels(
    path: Path, plan: Plan, view: int, shard: int, rows: Sequence[PixelRow], about: Mapping[str, Any] | None = None
) -> None:
    """Write and commit the pixels of a shard, unless they are committed by now. about: more for the record.

    ValueError where a column of the shard is there that was made of other bytes: its pixels were lost, and an image changed since.
    """
    expected = plan.ranges[shard]
    if [row.number for row in rows] != list(expected):
        raise ValueError(f"{tar_path(path, view, shard)}: the rows are not samples {expected.start} to "
                         f"{expected.stop - 1} in order; write whole shards")  # fmt: skip
    now = digest_of_hashes(row.sha256 for row in rows)
    for column in plan.quantisers:
        record = valid_record(path, plan, view, column, shard)
        if record is not None and record["sha256"] != now:
            raise ValueError(f"{commit_path(path, view, column, shard)}: this column was made of images with other bytes (the digest of their "
                             f"sha256 is {record['sha256']}) than those that are there now ({now}), and its pixels are lost; restore the "
                             f"image that changed (of {len(rows)}, in canonical order {rows[0].key!r} to {rows[-1].key!r}), or delete this record, by which the column is "
                             "computed anew, and run the same extract-features command again")  # fmt: skip
    store(path, plan, (view, PIXELS, shard), about,
          lambda: write_pixel_tar(tar_path(path, view, shard), rows, pixels_of(plan, view, shard),
                                  extension=plan.recipe.stored.extension))  # fmt: skip


def store_column(
    path: Path, plan: Plan, view: int, column: str, shard: int,
    arrays: Mapping[str, Array], valid: Sequence[bool] | Array, sha256: str, about: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write and commit a shard of a teacher's column, unless it is committed by now; its pixels are there already.

    arrays, valid: as the storage's write_column_shard takes them, but patches in raster order. sha256: the digest of the hashes of
    the images that it was made of. about: more for the record, `quality` among it.
    """
    folder, layout = column_folder(path, plan, view, column), plan.layout(column)
    storage_of(plan).create_column(folder, layout, column_attributes(plan, view, column))
    keys, id, count = (
        read_index(tar_path(path, view, shard)).keys,
        plan.shard_ids(shard)[column],
        len(plan.ranges[shard]),
    )
    arrays = stored_order(plan, view, arrays, keys)
    store(path, plan, (view, column, shard), {**(about or {}), "sha256": sha256},
          lambda: storage_of(plan).write_column_shard(folder, shard, arrays, valid, keys, id=id, count=count))  # fmt: skip


def store(
    path: Path, plan: Plan, unit: Unit, about: Mapping[str, Any] | None, write: Callable[[], Mapping[str, Any]]
) -> None:
    """Clear what a killed run left of a unit, write its files and commit them, unless it is committed by now.

    Where another writer came between, which only a file system without locks allows, the attempt starts again. At a URL one may come whose
    claim was taken over: LeaseLost, whether the store tells equal bytes of two writers apart (Azure) or not (S3).
    """
    for attempt in range(STORE_ATTEMPTS):
        if valid_record(path, plan, *unit) is not None:
            return
        began = time.perf_counter()
        try:
            clear(path, plan, *unit)
            record = write()
            commit(path, plan, *unit, {**written_in(began, about), **record})
            return
        except FileExistsError:
            if isinstance(path, Url):
                expect_held(commit_path(path, *unit))
            if attempt == STORE_ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0, WAIT_SECONDS * 2**attempt))


def written_in(began: float, about: Mapping[str, Any] | None) -> dict[str, Any]:
    """`about`; where it tells seconds, with those that the shard's files took to write, fsync included, since `began`."""
    about = dict(about or {})
    if "seconds" in about:
        about["seconds"] = {**about["seconds"], "write": time.perf_counter() - began}
    return about


def stored_order(plan: Plan, view: int, arrays: Mapping[str, Array], keys: Sequence[str]) -> Mapping[str, Array]:
    """A shard's arrays with patches as the plan orders them on disk. keys: of all its samples."""
    if plan.token_layout is None:
        return arrays
    hashes = signed_hashes(keys)
    order = plan.token_layout.order(hashes, np.full(len(hashes), view), plan.grid[0] * plan.grid[1])
    return {name: in_blocks(array, order) if name in IN_BLOCKS else array for name, array in arrays.items()}


def create_columns(path: Path, plan: Plan) -> None:
    """Write the metadata of every column and view where it is missing, or where images were appended since."""
    for view in range(plan.n_views):
        for column in plan.quantisers:
            attributes = column_attributes(plan, view, column)
            folder, layout = column_folder(path, plan, view, column), plan.layout(column)
            storage_of(plan).create_column(folder, layout, attributes)
            if storage_of(plan).read_attributes(folder)[0].n != layout.n:
                contents = storage_of(plan).metadata(layout, attributes)
                for file in reversed(storage_of(plan).metadata_paths(folder, layout)):  # the one that tells n last
                    publish(file, contents[file.relative_to(folder).as_posix()], replace=True)


def clear(path: Path, plan: Plan, view: int, column: str, shard: int) -> None:
    """Remove what is there of an uncommitted, or invalidly committed, shard."""
    for file in (commit_path(path, view, column, shard), *unit_files(path, plan, view, column, shard)):
        remove(file)


def commit(path: Path, plan: Plan, view: int, column: str, shard: int, record: Mapping[str, Any]) -> None:
    """Publish the commit record of a shard whose files are on disk.

    record: what the writer returned (`files` as they were published), and anything else worth keeping: seconds, versions.
    FileExistsError where a file is not the one that was written, but another writer's.
    """
    if strange := [file for file in record["files"] if not is_still(file)]:
        raise FileExistsError(f"{strange[0].path}: another process wrote this file, too; each shard has one writer; is the same "
                              "command running twice?")  # fmt: skip
    files = {file.path.relative_to(path).as_posix(): file.to_json() for file in record["files"]}
    unit = {"format_version": FORMAT_VERSION, "view": view, "column": column, "shard": shard}
    content = {**record, **unit, "id": plan.shard_ids(shard)[column], "files": files}
    content["record_id"] = record_id(content)
    if isinstance(path, Url):
        versions = {file.path.relative_to(path).as_posix(): file.inode[1] for file in record["files"]}
        content["objects"] = {"at": str(path), "versions": versions}
    publish(commit_path(path, view, column, shard), canonical_json(content) + b"\n")


def record_id(record: Mapping[str, Any]) -> str:
    """Content id of what a commit record says of its shard."""
    return content_id({name: record[name] for name in RECORDED if name in record})


def wrong_in_record(plan: Plan, unit: Unit, record: Mapping[str, Any]) -> str:
    """What a commit record says that the unit's own cannot; empty where nothing. Files are not looked at."""
    view, column, shard = unit
    numbers = plan.ranges[shard]
    expected = {"format_version": FORMAT_VERSION, "view": view, "column": column, "shard": shard,
                "id": plan.shard_ids(shard).get(column), "count": len(numbers)}  # fmt: skip
    for name, value in expected.items():
        if record.get(name) != value:
            return f"{name} is {shown(record.get(name))}; expected {value!r}"
    if unknown := sorted(set(record) - set(RecordFields.__annotations__)):
        return f"it tells {shown(unknown[0])}, which no commit record does, so it was edited"
    if record["record_id"] != record_id(record):
        return "it does not match its own id, so it was edited or damaged"
    if "sha256" not in record:
        return "it does not tell of which images it was made"
    counted = column != PIXELS or counts_images(record, numbers)
    return "" if counted else "its sizes and bad images are not those of its samples, so it was edited"


def counts_images(record: Mapping[str, Any], numbers: range) -> bool:
    """Whether the record of a pixel shard has a size for each of its samples, and bad images among them."""
    bad = record.get("bad", {"": ""})
    return ((not bad or set(bad) <= set(map(str, numbers))) and record["valid"] == len(numbers) - len(bad)
            and all(len(record.get(name, ())) == len(numbers) and 0 <= min(record[name]) and max(record[name]) < 2**31
                    for name in ("heights", "widths")))  # fmt: skip


def valid_record(
    path: Path, plan: Plan, view: int, column: str, shard: int, listed: Mapping[str, About] | None = None
) -> dict[str, Any] | None:
    """A unit's commit record; None when it is absent, edited, of another plan, or a file is missing or resized.

    listed: the objects of a cache at a URL, where they were listed just now. There a file is also the one that was committed.
    """
    try:
        record = read_record(commit_path(path, view, column, shard))
        if record is None or wrong_in_record(plan, (view, column, shard), record):
            return None
        files = {file.relative_to(path).as_posix(): file for file in unit_files(path, plan, view, column, shard)}
        told = record["files"]
        if set(told) != set(files):
            return None
        if isinstance(path, Url):
            versions = record["objects"]["versions"] if record.get("objects", {}).get("at") == str(path) else {}
            return (
                record
                if all(is_object(file, told[name], versions.get(name), listed) for name, file in files.items())
                else None
            )
        return record if all(size_of(file) == told[name]["bytes"] for name, file in files.items()) else None
    except (OSError, KeyError):
        return None


def is_object(file: Path, about: Mapping[str, Any], version: int | None, listed: Mapping[str, About] | None) -> bool:
    """Whether an object has the size that a record tells, and is the version of then; one that was copied there since has its sha256.

    version: None where the record was written elsewhere. OSError where there is no such object.
    """
    assert isinstance(file, Url)
    there = file.bucket.about(file.key) if listed is None else listed.get(file.key)
    if there is None or there.size_bytes != about["bytes"]:
        return False
    if version in (None, there.version):
        return True
    digest = hashlib.sha256()
    for piece in file_pieces(file):
        digest.update(piece)
    return bool(digest.hexdigest() == about["sha256"])


def read_record(file: Path) -> dict[str, Any] | None:
    """A commit record, None where it cannot be read or is none."""
    try:
        record: dict[str, Any] = read_json(file, RecordFields, MOST_RECORD_BYTES)
        return record
    except (OSError, ValueError):
        return None


def valid_records(path: Path, plan: Plan, which: Iterable[Unit], *, few: bool = False) -> dict[Unit, dict[str, Any]]:
    """The valid commit records among these units. few: as in each_valid."""
    return dict(each_valid(path, plan, which, few=few))


def each_valid(
    path: Path, plan: Plan, which: Iterable[Unit], *, few: bool = False
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """The valid commit records among these units, one after the other: which there are is seen from a listing of each folder, where more than a
    few are asked for, and only those are read.

    At a URL all objects are listed, then many records are asked for side by side. few: hardly any of them are expected to be there, so
    that at a URL the records are listed, and a record's files looked at one by one.
    """
    which = list(which)
    if not isinstance(path, Url):
        folders = {commit_path(path, *unit).parent for unit in which} if len(which) > ASKED_BY_NAME else ()
        names = {folder: names_in(folder) for folder in folders}
        for unit in which:
            file = commit_path(path, *unit)
            listed = names.get(file.parent)
            if (listed is None or file.name in listed) and (record := valid_record(path, plan, *unit)) is not None:
                yield unit, record
        return
    objects = dict(path.bucket.below(object_name(path / "commits" if few else path)))
    there = [unit for unit in which if object_name(commit_path(path, *unit)) in objects]
    files = None if few else objects
    with ThreadPoolExecutor(REMOTE_RECORDS) as pool:
        found = pool.map(lambda unit: valid_record(path, plan, unit[0], unit[1], unit[2], files), there)
        yield from ((unit, record) for unit, record in zip(there, found) if record is not None)


def names_in(folder: Path) -> set[str] | None:
    """The names in a folder, none where there is no such folder; None where it cannot be listed, though a file in it may be read."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:
        return None


def object_name(file: Path) -> str:
    """The name of an object in its bucket."""
    assert isinstance(file, Url)
    return file.key


def committed(path: Path, plan: Plan) -> set[Unit]:
    """The units of work that are validly committed."""
    return {unit for unit, _ in each_valid(path, plan, units(plan))}


def missing(path: Path, plan: Plan, shards: Collection[int] | None = None) -> list[Unit]:
    """The units of work (of these shards) that still have to be done, by view, then shard, pixels before teachers."""
    asked = [unit for unit in units(plan) if shards is None or unit[2] in shards]
    there = {unit for unit, _ in each_valid(path, plan, asked)}
    return [unit for unit in asked if unit not in there]


def bad_images(path: Path, plan: Plan) -> dict[int, str]:
    """Reason why each bad image is bad, by sample number, as far as pixels are committed."""
    return bad_in(valid_records(path, plan, (unit for unit in units(plan) if unit[1] == PIXELS)))


def bad_in(records: Mapping[Unit, Mapping[str, Any]]) -> dict[int, str]:
    """The same of records that were read already."""
    pixels = [record for (_, column, _), record in records.items() if column == PIXELS]
    return {int(n): reason for record in pixels for n, reason in record["bad"].items()}


def finalise(path: Path, plan: Plan) -> Manifest:
    """The manifest, written with the final samples.arrow once every shard is committed.

    It holds nothing of time, host or versions: equal runs give equal manifests.
    Raises ValueError when shards are missing, or disagree about which images are bad.
    """
    complete = {unit: compact(record) for unit, record in each_valid(path, plan, units(plan))}
    if absent := [unit for unit in units(plan) if unit not in complete]:
        raise ValueError(f"{path}: {len(absent)} of {len(absent) + len(complete)} shards are not committed, the first is view "
                         f"{absent[0][0]}, {absent[0][1]}, shard {absent[0][2]}; run the same command again")  # fmt: skip
    refuse_disagreement(path, complete)
    refuse_other_tails(path, plan)
    table = {**read_samples(path, plan.numbers), **decoded_columns(path, plan, complete)}
    write_samples(path, table)
    manifest = write_manifest(path, plan, complete, table)
    remove_leftovers(path)
    remove_locks(path)
    return manifest


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """A commit record with its images' sizes as int32: as Python's numbers, those of a hundred million images take gigabytes."""
    return {**record, **{name: np.array(record[name], np.int32) for name in ("heights", "widths") if name in record}}


def withdraw_manifest(path: Path, plan: Plan) -> None:
    """Remove the manifest, where the cache is to be finished again later.

    ValueError, and nothing changed, where tails or samples are not those that it vouches for: the next one would vouch for these.
    """
    if exists(path / "manifest.json"):
        refuse_other_tails(path, plan)
        refuse_other_samples(path, plan)
    remove(path / "manifest.json")


def vouched(path: Path) -> Mapping[str, Any] | None:
    """What the manifest vouches for and no commit record does; None where it cannot be read."""
    try:
        told: Mapping[str, Any] = read_json(path / "manifest.json", ManifestFields, MOST_MANIFEST_BYTES)
        return told
    except (OSError, ValueError):
        return None


def refuse_other_tails(path: Path, plan: Plan) -> None:
    """ValueError where a tail is not the one of the manifest that is there: a new one would vouch for what was altered."""
    told = vouched(path)
    tails = {column["name"]: column["tail"] for column in told["columns"]} if told else {}
    for teacher in plan.columns:
        file, about, quantiser = (
            kept_path(path, teacher),
            tails.get(teacher.column),
            plan.quantisers.get(teacher.column),
        )
        if not teacher.is_map:
            read_tail(path, teacher.tail_name)  # where no manifest tells what it was, it is a tail at least
            if quantiser is not None and quantiser.stored.product and quantiser.codebook is not None:
                read_product(product_path(path, teacher.column), quantiser.codebook["sha256"])
        elif quantiser is not None and quantiser.codebook is not None and exists(file):
            read_codebook(path, teacher.name, quantiser.codebook["sha256"])
        if about and exists(file) and file_summary(path, file)["sha256"] != about["sha256"]:
            raise ValueError(f"{file}: its sha256 is not that of the manifest, so it was altered or damaged; to repair, delete it "
                             "and run the same command again")  # fmt: skip


def refuse_other_samples(path: Path, plan: Plan) -> None:
    """The same for the table of samples; one that was just written again from the images knows not yet which are valid."""
    try:
        told, table = vouched(path), read_samples(path, plan.numbers)
    except ValueError:  # damaged or lost: it is written again, or refused, by who goes on
        return
    if told and not table["valid"].array.null_count and samples_digests(table) != told["samples"]:
        raise ValueError(f"{path / 'samples.arrow'}: its rows are not those of the manifest, so it was altered or damaged; restore "
                         "it, or see inspect-cache repair (nothing was changed)")  # fmt: skip


def refuse_disagreement(path: Path, records: Mapping[Unit, Mapping[str, Any]]) -> None:
    """ValueError when a view or a column counts other bad images than the pixels of view 0, or was made of other bytes."""
    for (view, column, shard), record in records.items():
        first = records[0, PIXELS, shard]
        if made_of_others(record, first):
            raise ValueError(f"{commit_path(path, view, column, shard)}: its images have other bytes (the digest of their sha256 is "
                             f"{record['sha256']}) than those that view 0 was made of ({first['sha256']}); delete the commit records of "
                             "this shard and run the same extract-features command again")  # fmt: skip
        if counts_others(record, first):
            raise ValueError(f"{commit_path(path, view, column, shard)}: {record['valid']} valid images; the pixels of "
                             f"view 0 have {first['valid']}; delete the commit records of this shard and run the "
                             "same extract-features command again")  # fmt: skip


def counts_others(record: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether a record counts other bad images than the pixels of its shard in view 0 do."""
    return bool(record["valid"] != first["valid"] or record.get("bad", first["bad"]) != first["bad"])


def made_of_others(record: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether a record tells of images with other bytes than that of view 0's pixels does."""
    return bool(record["sha256"] != first["sha256"])


def recorded_hashes(path: Path, plan: Plan, view: int, shard: int, record: Mapping[str, Any]) -> Array:
    """sha256 of the images that the pixels of a shard were made of, uint8 [samples, 32]. ValueError where they are not those of its record."""
    tar = tar_path(path, view, shard)
    hashes = read_hashes(tar)
    if len(hashes) != record["count"] or hashlib.sha256(hashes.tobytes()).hexdigest() != record["sha256"]:
        raise ValueError(f"{index_path(tar)}: its hashes of images are not those of the commit record, so it was altered or damaged; run "
                         f"inspect-cache repair {path}")  # fmt: skip
    return hashes


def known_hashes(
    path: Path, plan: Plan, rows: Sequence[Source], records: Mapping[Unit, Mapping[str, Any]] | None = None
) -> Values:
    """sha256 of every image by number, as far as it is known: as `rows` tell, else as the pixels that are committed do.

    records: those of pixels, where they were read just now.
    """
    told = SourceTable.of(rows).columns["sha256"]
    known = told.array.is_valid().to_numpy(zero_copy_only=False)
    lacking = [shard for shard, numbers in enumerate(plan.ranges) if not known[numbers.start : numbers.stop].all()]
    if records is None:
        every = [(view, PIXELS, shard) for shard in lacking for view in range(plan.n_views)]
        records = valid_records(path, plan, every)
    hashes, known = told.numpy().copy(), known.copy()
    for shard in lacking:
        for view in range(plan.n_views):
            if (record := records.get((view, PIXELS, shard))) is not None:
                at = slice(plan.ranges[shard].start, plan.ranges[shard].stop)
                hashes[at], known[at] = recorded_hashes(path, plan, view, shard, record), True
                break
    return hash_values(hashes, known)


def decoded_columns(path: Path, plan: Plan, records: Mapping[Unit, Mapping[str, Any]]) -> dict[str, Values]:
    """sha256, height, width, valid and reason of every sample, as the pixels of view 0 tell."""
    sizes = {name: np.zeros(plan.n_rows, np.int32) for name in ("height", "width")}
    hashes, known = np.zeros((plan.n_rows, 32), np.uint8), np.zeros(plan.n_rows, bool)
    valid, reasons = np.zeros(plan.n_rows, bool), [NO_IMAGE["reason"]] * plan.n_rows
    for shard, numbers in enumerate(plan.ranges):
        record, rows = records[0, PIXELS, shard], slice(numbers.start, numbers.stop)
        for name, values in sizes.items():
            values[rows] = record[f"{name}s"]
        valid[rows], reasons[rows] = True, [None] * len(numbers)
        hashes[rows], known[rows] = recorded_hashes(path, plan, 0, shard, record), True
        for number, reason in record["bad"].items():
            valid[int(number)], reasons[int(number)] = False, reason
    columns = {"sha256": hash_values(hashes, known), **sizes, "valid": valid, "reason": reasons}
    return {name: sample_values(values, name) for name, values in columns.items()}
