"""What is wrong with a cache, by file and shard.

Records win: a commit record has an id over all that it says of its shard, and plan.json is the plan. The manifest repeats both, so
where it disagrees with them it is the manifest that is wrong. Opening a cache compares names, sizes and ids with the manifest
(refuse_problems); find_problems also reads the records and, with `full`, every byte.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrmae.common.backend import Url, exists, file_pieces, files_below, read_bytes, size_of
from mrmae.common.errors import shortened
from mrmae.common.progress import counted
from mrmae.shards.commit import (
    bad_images,
    committed,
    counts_others,
    decoded_columns,
    made_of_others,
    read_record,
    record_id,
    recorded_hashes,
    wrong_in_record,
)
from mrmae.shards.format import (
    PIXELS,
    SAMPLES,
    Plan,
    SampleTable,
    Unit,
    column_attributes,
    commit_path,
    compare_specs,
    kept_path,
    load_plan,
    opened_moments,
    parsed,
    pixels_of,
    plain,
    product_path,
    read_samples,
    shown,
    units,
)
from mrmae.shards.manifest import Manifest, manifest_body, plan_fields, read_manifest, samples_digests
from mrmae.shards.shard_table import n_tables, shard_tables, table_file
from mrmae.shards.store import (
    MOST_METADATA_BYTES,
    Damaged,
    column_folder,
    foreign_entries,
    parse_row,
    read_index,
    read_members,
    storage_of,
    unit_files,
)

SHOWN_AT_OPENING = 50  # problems in one message
BLOCK_BYTES = 1 << 20
# What a column's metadata say of the data; other versions of zarr may add fields.
METADATA_FIELDS = ("zarr_format", "node_type", "attributes", "shape", "data_type", "chunk_grid", "chunk_key_encoding",
                   "fill_value", "codecs")  # fmt: skip
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a file of the cache. unit: the shard (view, column, shard) it belongs to, if any."""

    file: str
    what: str
    unit: Unit | None = None

    def __str__(self) -> str:
        view, column, shard = self.unit or (0, "", 0)
        whose = f" (shard {shard} of {column}, view {view})" if self.unit else ""
        return f"{self.file}{whose}: {shortened(self.what)}"


@dataclasses.dataclass(frozen=True)
class Described:
    """A cache as its own files describe it.

    manifest, table: None where they are absent, damaged or not this cache's. records: those that can be read, right or wrong.
    finished: whether there was a manifest, whatever it says; another process may write it while others are checked.
    """

    path: Path
    plan: Plan
    manifest: Manifest | None
    table: SampleTable | None
    records: Mapping[Unit, Record]
    finished: bool

    def entry(self, unit: Unit) -> dict[str, Any]:
        """What the manifest says of a shard; empty where it says nothing, or where that is damaged."""
        try:
            return self.manifest.entry(self.plan, unit) if self.manifest else {}
        except ValueError:
            return {}


# --- when a cache is opened: nothing is read but the plan, the manifest and the samples


def refuse_problems(path: Path, plan: Plan, manifest: Manifest, table: SampleTable, *, files: bool = True) -> None:
    """ValueError that lists everything wrong with ids and, unless `files` is False, with names and sizes of files."""
    found = [*map(str, wrong_ids(plan, manifest, table))]
    found += map(str, wrong_files(path, plan, manifest)) if files else ()
    if found:
        more = [f"... and {len(found) - SHOWN_AT_OPENING} more"] if len(found) > SHOWN_AT_OPENING else []
        todo = ("run the same extract-features command again, it rewrites what is missing"
                + isinstance(path, Url) * ", or upload these files again from where they were copied")  # fmt: skip
        raise ValueError(f"{path}: {counted(len(found), 'problem')}; the cache cannot be trusted; {todo}:\n  "
                         + "\n  ".join(found[:SHOWN_AT_OPENING] + more))  # fmt: skip


def wrong_ids(plan: Plan, manifest: Manifest, table: SampleTable) -> Iterator[Problem]:
    """What can be wrong with plan, manifest and samples."""
    ids = {column["name"]: column["id"] for column in manifest["columns"]}
    if {PIXELS: manifest["geometry_id"], **ids} != plan.ids or len(manifest["dataset_ids"]) != len(plan.parts):
        yield Problem("plan.json", "its ids are not those of manifest.json")
    yield from other_samples(manifest, table, ("hash", "valid"))  # the others where they are read


def wrong_files(path: Path, plan: Plan, manifest: Manifest) -> Iterator[Problem]:
    """What can be wrong with files without a look into them."""
    if damaged := [*wrong_tables(plan, manifest)]:
        yield from damaged
        return
    for file, n_bytes in promised_sizes(path, plan, manifest):
        try:
            if (size := size_of(file)) != n_bytes:
                yield Problem(relative(path, file), f"{size} bytes; the manifest says {n_bytes}")
        except OSError as error:
            yield Problem(relative(path, file), str(error.strerror))
    yield from metadata_problems(path, plan, full=False)


def other_samples(manifest: Manifest, table: SampleTable, columns: Sequence[str] = SAMPLES.names) -> Iterator[Problem]:
    """samples.arrow, where these columns are not those of the manifest."""
    if samples_digests(table, columns) != {name: manifest["samples"].get(name) for name in columns}:
        yield Problem(
            "samples.arrow", "its rows are not those the manifest was written for, or manifest.json was edited"
        )


def wrong_tables(plan: Plan, manifest: Manifest) -> Iterator[Problem]:
    """The tables of shards that are not those that the manifest was written with."""
    if len(manifest["shards"]) != (wanted := n_tables(plan)):
        yield Problem(
            "manifest.json",
            f"it tells of {counted(len(manifest['shards']), 'table')} of shards; the plan wants {wanted}",
        )
        return
    for number in range(len(manifest["shards"])):
        try:
            manifest.table(number)
        except ValueError as error:
            file = table_file(manifest.path, number)
            yield Problem(relative(manifest.path, file), reason(error, file))


def promised_sizes(path: Path, plan: Plan, manifest: Manifest) -> Iterator[tuple[Path, int | None]]:
    """Every shard file and tail of the plan, and how many bytes the manifest says that it has; None where it does not say.

    The plan tells where files lie.
    """
    for unit in units(plan):
        files, told = unit_files(path, plan, *unit), manifest.told(unit).get("files", [])
        sizes = [about["bytes"] for about in told] if len(told) == len(files) else [None] * len(files)
        yield from zip(files, sizes)
    for file, tail, _ in tails_of(path, plan, manifest):
        yield file, tail["bytes"]


def refuse_unfinished(path: Path, plan: Plan, done: int) -> None:
    """ValueError for a cache without a manifest: how far it is, and how to go on."""
    total = sum(1 for _ in units(plan))
    raise ValueError(f"{path}: this cache is unfinished (no manifest.json): {done} of {total} shards are committed; "
                     "a finished cache was expected; run the same extract-features command again, it continues where "
                     "it stopped, or use what is there with --allow-partial (open_cache(..., allow_partial=True))")  # fmt: skip


def refuse_other_plan(path: Path, plan: Plan, done: Collection[Unit]) -> None:
    """ValueError where nothing of a column is committed for the plan, and yet it has commit records. done: what is committed."""
    columns = {column for _, column, _ in done}
    others = (unit for unit in units(plan) if unit[1] not in columns and exists(commit_path(path, *unit)))
    if other := next(others, None):
        whose = f" of {other[1]}" if done else ""
        raise ValueError(f"{path / 'plan.json'}: none of the commit records{whose} there is of this plan, so it, or all of them, were "
                         "altered or damaged; restore it, or run the extract-features command again, which says what differs")  # fmt: skip


# --- everything


def find_problems(path: Path, *, full: bool = False) -> list[Problem]:
    """Everything wrong with the cache at `path`; an empty list for a finished, whole one.

    Existence and sizes of all files, ids, commit records. full: also the sha256 of every file, the crc32c of every chunk
    and member, and the metadata of columns. Raises ValueError where there is no plan and no manifest to go by.
    """
    if foreign := foreign_entries(path):  # nothing behind a link is looked at
        return [Problem(name, what) for name, what in sorted(foreign.items())]
    plan, manifest, wrong_plan = plan_and_manifest(path)
    table, wrong_samples = samples_and_problems(path, plan, manifest)
    finished = manifest is not None or any(problem.file == "manifest.json" for problem in wrong_plan)
    cache = Described(path, plan, manifest, table, read_records(path, plan), finished)
    found = [
        *wrong_plan,
        *unfinished_problems(cache),
        *wrong_samples,
        *(wrong_tables(plan, manifest) if manifest else ()),
        *shard_problems(cache, full=full),
        *metadata_problems(path, plan, full=full),
        *tail_problems(cache, full=full),
        *(damaged_moments(path) if full else ()),
    ]
    return found or [*edited_samples(cache), *edited_manifest(cache)]


def damaged_moments(path: Path) -> Iterator[Problem]:
    """The files of moments that are not as they were written; whether they are of these data is seen where they are used."""
    for file in files_below(path / "stats"):
        try:
            if file.suffix == ".safetensors":
                opened_moments(read_bytes(file))
        except (ValueError, OSError) as error:
            yield Problem(relative(path, file), f"{reason(error, file)}; inspect-cache stats computes moments anew")


def read_records(path: Path, plan: Plan) -> dict[Unit, Record]:
    """The commit records of the plan's shards that can be read, right or wrong."""
    return {unit: record for unit in units(plan) if (record := read_record(commit_path(path, *unit))) is not None}


def plan_and_manifest(path: Path) -> tuple[Plan, Manifest | None, list[Problem]]:
    """The plan, the manifest where it belongs to it (else None), and what is wrong with the two files.

    The plan is plan.json; where that is damaged, or what lies in the cache was written for the plan that the manifest repeats and
    not for it, it is the manifest's. Raises ValueError where neither can be read.
    """
    manifest, repeated, problems = manifest_and_its_plan(path)
    try:
        plan, fields = load_plan(path), parsed(read_bytes(path / "plan.json"), dict[str, Any])
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        if repeated is None:
            raise ValueError(f"{path}: neither plan.json nor manifest.json can be read ({reason(error, path)}); this is "
                             "no cache, or one that must be extracted anew") from None  # fmt: skip
        said = f"cannot be read ({reason(error, path / 'plan.json')}); the manifest holds the same"
        return repeated, manifest, [*problems, Problem("plan.json", said)]
    if manifest is None or repeated is None or fields == plan_fields(manifest):
        return plan, manifest, problems
    for told_otherwise in (records_tell_otherwise, attributes_tell_otherwise):
        if told_otherwise(path, plan) and not told_otherwise(path, repeated):
            return repeated, manifest, [Problem("plan.json", "it is not the plan of the manifest and of the shards")]
    return plan, None, [Problem("manifest.json", "it is not the manifest of plan.json and of the shards")]


def manifest_and_its_plan(path: Path) -> tuple[Manifest | None, Plan | None, list[Problem]]:
    """The manifest and the plan that it repeats, None where it is absent or damaged, and what is wrong with it."""
    if not exists(path / "manifest.json"):
        return None, None, []
    try:
        manifest = read_manifest(path)
    except (ValueError, OSError) as error:
        return None, None, [Problem("manifest.json", reason(error, path / "manifest.json"))]
    try:
        return manifest, Plan.from_json(plan_fields(manifest), str(path / "manifest.json")), []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return None, None, [Problem("manifest.json", f"it is no manifest ({error}), so it was edited")]


def records_tell_otherwise(path: Path, plan: Plan) -> bool:
    """Whether an intact commit record is of another plan, or a whole view has no record."""
    records = read_records(path, plan)
    return bool(strangers(plan, records)) or {view for view, _, _ in records} != set(range(plan.n_views))


def strangers(plan: Plan, records: Mapping[Unit, Record]) -> list[Unit]:
    """The shards whose commit record is intact, and of another plan."""
    return [(view, column, shard) for (view, column, shard), record in records.items()
            if record["record_id"] == record_id(record)
            and (record["id"], record["count"]) != (plan.shard_ids(shard).get(column), len(plan.ranges[shard]))]  # fmt: skip


def attributes_tell_otherwise(path: Path, plan: Plan) -> bool:
    """Whether a column says that it was written for another plan; names of weights stand there, and in no id."""
    for column in plan.quantisers:
        expected = column_attributes(plan, 0, column)
        try:
            found = storage_of(plan).read_attributes(column_folder(path, plan, 0, column))[1]
        except ValueError:
            continue
        if {name: found.get(name) for name in expected} != expected:
            return True
    return False


def unfinished_problems(cache: Described) -> Iterator[Problem]:
    """An absent manifest: how many shards are committed."""
    if not cache.finished:
        done, total = len(committed(cache.path, cache.plan)), sum(1 for _ in units(cache.plan))
        yield Problem("manifest.json", f"absent: the cache is unfinished, {done} of {total} shards are committed")


def samples_and_problems(path: Path, plan: Plan, manifest: Manifest | None) -> tuple[SampleTable | None, list[Problem]]:
    """The table of samples, None where it is damaged or not this cache's."""
    try:
        table = read_samples(path, plan.numbers)
    except ValueError as error:
        return None, [Problem("samples.arrow", reason(error, path / "samples.arrow"))]
    wrong = [*other_samples(manifest, table)] if manifest is not None else []
    return (None if wrong else table), wrong


def shard_problems(cache: Described, *, full: bool) -> Iterator[Problem]:
    """What is wrong with every shard: its record, its files' sizes; full: their hashes and checksums."""
    bad = bad_rows(cache)
    for unit in units(cache.plan):
        record, told = cache.records.get(unit), cache.entry(unit)
        if record is None and not cache.finished:
            continue  # not extracted yet
        if wrong := wrong_record(cache, unit):
            yield Problem(relative(cache.path, commit_path(cache.path, *unit)), wrong, unit)
        believed = told or record if wrong else record
        if not believed:
            continue
        damaged = [*file_problems(cache, unit, believed["files"], full=full)]
        yield from damaged
        known = unit[1] in cache.plan.shard_ids(unit[2])  # a plan that lost a quantiser: its record said so
        if full and known and not damaged:  # else its checksums would only say the same again
            yield from checksum_problems(cache, unit, bad, None if wrong else record)


def bad_rows(cache: Described) -> set[int]:
    """The samples that need have no chunk in any column: the bad images, and rows that hold none."""
    if cache.table is not None and not cache.table["valid"].array.null_count:
        return set(np.flatnonzero(~cache.table["valid"].numpy()).tolist())
    return set(bad_images(cache.path, cache.plan))


def wrong_record(cache: Described, unit: Unit) -> str:
    """What is wrong with a shard's commit record; empty where nothing is."""
    if (record := cache.records.get(unit)) is None:
        return "the commit record is missing or damaged"
    if wrong := wrong_in_record(cache.plan, unit, record):
        return wrong
    if others := sorted(set(record["files"]) ^ {*shard_names(cache.path, cache.plan, unit)}):
        named = others[0] in record["files"]
        return (
            f"it names {shown(others[0])}, which is no file of this shard"
            if named
            else f"it does not name {others[0]!r}"
        )
    first = cache.records.get((0, PIXELS, unit[2]))
    if not first or wrong_in_record(cache.plan, (0, PIXELS, unit[2]), first):
        return ""
    if made_of_others(record, first):
        return "its images have other bytes than those that view 0 was made of"
    return f"{record['valid']} valid images; the pixels of view 0 have {first['valid']}" * counts_others(record, first)


def file_problems(
    cache: Described, unit: Unit, files: Mapping[str, Mapping[str, Any]], *, full: bool
) -> Iterator[Problem]:
    """A shard's files that are not as its record tells. files: what it tells of each."""
    for name, file in shard_names(cache.path, cache.plan, unit).items():
        if name not in files:
            yield Problem(name, "neither manifest nor commit record tells its size", unit)
        elif what := wrong_file(file, files[name], full=full):
            yield Problem(name, what, unit)


def wrong_file(file: Path, about: Mapping[str, Any], *, full: bool) -> str:
    """What is wrong with a file of known size and sha256; empty where nothing is."""
    try:
        if (size := size_of(file)) != about["bytes"]:
            return f"{size} bytes; {about['bytes']} were written"
        for _ in verified_blocks(file, about["sha256"]) if full else ():
            pass
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except Damaged as error:
        return error.what
    return ""


def verified_blocks(file: Path, sha256: str) -> Iterator[bytes]:
    """The content of a file, block by block. Raises Damaged at its end where it is not what was written."""
    digest = hashlib.sha256()
    try:
        for block in file_pieces(file, BLOCK_BYTES):
            digest.update(block)
            yield block
    except OSError as error:
        raise Damaged(file, None, f"cannot be read ({error.strerror})") from None
    if digest.hexdigest() != sha256:
        raise Damaged(file, None, "its sha256 is not that of what was written")


def checksum_problems(cache: Described, unit: Unit, bad: set[int], record: Record | None) -> Iterator[Problem]:
    """Chunks and members of one shard that fail their crc32c, are absent, or should not be there. record: the shard's, where it is right."""
    view, column, shard = unit
    path, plan, numbers = cache.path, cache.plan, cache.plan.ranges[shard]
    rows = [row for row, number in enumerate(numbers) if number not in bad]
    try:
        if column == PIXELS:
            check_tar(unit_files(path, plan, *unit)[0], plan, view, shard, numbers, rows)
            if record is not None:
                recorded_hashes(path, plan, view, shard, record)
            return
        folder, layout = column_folder(path, plan, view, column), plan.layout(column)
        keys = None if cache.table is None else cache.table["key"][numbers.start : numbers.stop]
        storage_of(plan).open_shard(folder, layout, plan.shard_ids(shard)[column], view, shard, keys).check(rows)
    except Damaged as error:
        where = "" if error.row is None else f" (sample {numbers[error.row]})"
        yield Problem(relative(path, error.path), error.what + where, unit)
    except ValueError as error:
        yield Problem(relative(path, unit_files(path, plan, *unit)[0]), reason(error, path), unit)


def check_tar(tar: Path, plan: Plan, view: int, shard: int, numbers: range, rows: Sequence[int]) -> None:
    """Raise Damaged or ValueError unless sidecar, views and JSON members of a pixel tar are whole and its own."""
    extension = plan.recipe.stored.extension
    index = read_index(tar, (extension, "json"))
    if index.of != pixels_of(plan, view, shard):
        raise Damaged(tar, None, f"its index belongs to {shown(index.of)}")
    if len(index.keys) != len(numbers):
        raise Damaged(tar, None, f"its index has {len(index.keys)} samples; the plan gives this shard {len(numbers)}")
    for _ in read_members(tar, rows, index.tables[extension]):
        pass
    for row, content in enumerate(read_members(tar, range(len(numbers)), index.tables["json"])):
        about = parse_row(content)
        if (about.number, about.key) != (numbers[row], index.keys[row]):
            raise Damaged(tar, row, f"the member belongs to sample {about.number} ({shown(about.key)})")


def metadata_problems(path: Path, plan: Plan, *, full: bool) -> Iterator[Problem]:
    """Files that tell what a column holds, missing or, with `full`, say something else than was written."""
    for view, column in itertools.product(range(plan.n_views), plan.quantisers):
        folder, layout = column_folder(path, plan, view, column), plan.layout(column)
        expected = storage_of(plan).metadata(layout, column_attributes(plan, view, column)) if full else {}
        for file in storage_of(plan).metadata_paths(folder, layout):
            name = file.relative_to(folder).as_posix()
            if not exists(file):
                yield Problem(relative(path, file), "missing metadata of a column")
            elif full and (
                size_of(file) > MOST_METADATA_BYTES
                or metadata_fields(read_bytes(file)) != metadata_fields(expected[name])
            ):
                yield Problem(relative(path, file), "it is not what was written")


def metadata_fields(content: bytes) -> dict[str, Any] | None:
    """What a column's metadata say of the data; None where they are not JSON."""
    try:
        fields = parsed(content, dict[str, Any])
        return {name: value for name, value in fields.items() if name in METADATA_FIELDS}
    except ValueError:
        return None


def tail_problems(cache: Described, *, full: bool) -> Iterator[Problem]:
    """Tails that are missing, resized or, with `full`, altered."""
    for file, tail, told_by in tails_of(cache.path, cache.plan, cache.manifest):
        if what := wrong_file(file, tail, full=full):
            yield Problem(relative(cache.path, file), f"{what}, says {told_by}")


def tails_of(path: Path, plan: Plan, manifest: Manifest | None) -> Iterator[tuple[Path, Mapping[str, Any], str]]:
    """The file of every tail and codebook, what is told of it, and what tells: of a tail the manifest, of product codes' codebook the plan, of a map's the plan
    the sha256 and the manifest the size."""
    told = {column["name"]: column["tail"] for column in manifest["columns"]} if manifest else {}
    for teacher in plan.columns:
        quantiser = plan.quantisers.get(teacher.column)
        codebook = {} if quantiser is None or quantiser.codebook is None else quantiser.codebook
        if quantiser is not None and quantiser.stored.product:
            yield product_path(path, teacher.column), codebook, "plan.json"
            codebook = {}
        if tail := told.get(teacher.column):
            about = {**tail, "sha256": codebook.get("sha256", tail["sha256"])}
            yield kept_path(path, teacher), about, "manifest.json" + " with plan.json" * bool(codebook)


def edited_samples(cache: Described) -> Iterator[Problem]:
    """samples.arrow, where it is not what the commit records say; only for a cache in which nothing else is wrong."""
    assert cache.table is not None, "else this was a problem already"
    try:
        decoded = decoded_columns(cache.path, cache.plan, cache.records)
    except ValueError as error:  # a sidecar of the right size
        yield Problem("samples.arrow", f"it cannot be compared with the pixels ({error})")
        return
    if other := [name for name, values in decoded.items() if values != cache.table[name]]:
        yield Problem("samples.arrow", f"its column {other[0]} is not what the commit records say, so it was edited")


def edited_manifest(cache: Described) -> Iterator[Problem]:
    """manifest.json, where it is not what plan, records and samples say; only for a cache in which nothing else is wrong."""
    assert cache.manifest is not None and cache.table is not None, "else this was a problem already"
    tables = shard_tables(cache.plan, cache.records)
    body = plain(manifest_body(cache.path, cache.plan, cache.records, cache.table, tables))
    told = {name: cache.manifest.get(name) for name in body}
    try:
        compare_specs(told, body, "manifest.json")
    except ValueError as error:
        what = str(error).removeprefix("manifest.json: ").partition(" in this command;")[0]
        yield Problem("manifest.json", f"{what} in the commit records, so it was edited")


def shard_names(path: Path, plan: Plan, unit: Unit) -> dict[str, Path]:
    """The files of a shard by their names inside the cache."""
    return {relative(path, file): file for file in unit_files(path, plan, *unit)}


def relative(path: Path, file: Path) -> str:
    """The file's name inside the cache."""
    return file.relative_to(path).as_posix()


def reason(error: Exception, file: Path) -> str:
    """An error's message without the file's name in front."""
    return str(error).removeprefix(f"{file}: ") or type(error).__name__
