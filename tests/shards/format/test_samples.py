"""samples.arrow: what is damaged or would fill the memory is refused, and no thread outlives the reading."""

import contextlib
import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from processes import ends, forked

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.format import (
    SAMPLES,
    Source,
    SourceTable,
    Values,
    canonical_sources,
    canonical_table,
    dataset_id,
    joined_sources,
    listing_id,
    nulls,
    read_samples,
    sample_values,
    write_arrow,
)
from mrmae.shards.format.plan import load_plan

ROWS = canonical_sources(
    Source(*row)
    for row in [
        ("a.jpg", None, 10, "00" * 32),
        ("b/ü c.png", "b", 20, "11" * 32),
        ("c.1.2.840.tif", None, 30, "22" * 32),
    ]
)


def rewritten(path: Path, change: Callable[[dict[str, list[Any]]], object], **options: Any) -> None:
    file = path / "samples.arrow"
    table = pa.ipc.open_file(file.read_bytes()).read_all().to_pydict()
    change(table)
    with pa.ipc.new_file(str(file), SAMPLES, options=pa.ipc.IpcWriteOptions(**options)) as out:
        out.write_batch(pa.record_batch([pa.array(table[f.name], f.type) for f in SAMPLES], SAMPLES))


def test_dataset_id_is_golden_and_of_keys_and_bytes_not_of_labels() -> None:
    expected = "sha256:fa22870fadb64a66b7eaa62ccb52c467335d41c32258e150536e96787f6afcea"
    assert dataset_id(ROWS) == dataset_id([dataclasses.replace(row, label="x") for row in ROWS]) == expected
    others: list[dict[str, Any]] = [{"sha256": "33" * 32}, {"bytes": 11}, {"key": "a.png"}]
    assert all(dataset_id([dataclasses.replace(ROWS[0], **other), *ROWS[1:]]) != expected for other in others)
    assert dataset_id(SourceTable.of(ROWS)[1:]) == dataset_id(ROWS[1:])


def test_columns_are_ordered_as_objects_are() -> None:
    rows = [Source(f"é/{i}.png", str(i), i, f"{i:064x}") for i in range(300)]
    assert canonical_table(SourceTable.of(rows)) == canonical_sources(rows) != rows
    with pytest.raises(ValueError, match="'é/7.png': this key occurs twice .1 such keys."):
        canonical_table(SourceTable.of([*rows, rows[7]]))
    gap = SourceTable.of([Source("", None, 0, "")] * 2)
    parts = [SourceTable.of(rows[:5]), gap, SourceTable.of(rows[5:])]
    assert joined_sources(parts) == [*rows[:5], *gap, *rows[5:]]


def test_listing_id_is_golden_and_of_keys_and_sizes_alone() -> None:
    expected = "sha256:401d6112173379dfc5d1304be90879c98792e5ea25bae7954b70fa230978e1d4"
    unread = [dataclasses.replace(row, sha256="", label="x") for row in ROWS]
    assert listing_id(ROWS) == listing_id(unread) == expected
    others: list[dict[str, Any]] = [{"bytes": 11}, {"key": "a.png"}]
    assert all(listing_id([dataclasses.replace(ROWS[0], **other), *ROWS[1:]]) != expected for other in others)


def test_digests_are_golden_and_do_not_depend_on_where_in_an_array_rows_lie() -> None:
    found = {}
    for name, values in {
        "key": ["a", "üb", ""],
        "label": [None, "x", ""],
        "valid": [True, False, True],
        "height": [1, 2, 3],
    }.items():
        column = sample_values(values, name)
        doubled = sample_values([*values, *values], name)
        assert (
            column.digest == sample_values(doubled.array[3:], name).digest == doubled.head(3).digest != doubled.digest
        )
        found[name] = column.digest[:16]
    assert found == {
        "key": "1c71f9849fb502dc",
        "label": "0777642db8f9ae53",
        "valid": "85f90dfea1d8027e",
        "height": "4636993d3e1da4e9",
    }


@pytest.mark.parametrize("n", [0, 1, 8, 9, 100])
@pytest.mark.parametrize("name", SAMPLES.names)
def test_columns_of_nulls_are_arrows_to_the_byte(n: int, name: str, tmp_path: Path) -> None:
    schema = pa.schema([SAMPLES.field(name)])
    for file, column in (("ours", nulls(n, schema.types[0])), ("arrows", pa.nulls(n, schema.types[0]))):
        column.validate(full=True)
        assert column.null_count == n
        write_arrow(tmp_path / file, {name: Values(column, name)}, schema)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "arrows").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of mappings")
def test_what_a_digest_looks_over_does_not_stay_in_memory(tmp_path: Path) -> None:
    n = 300_000
    draw = np.random.default_rng(0)
    numbers: dict[str, Any] = {name: draw.integers(0, 1000, n) for name in ("hash", "bytes", "height", "width")}
    sha256 = pa.Array.from_buffers(pa.binary(32), n, [None, pa.py_buffer(draw.bytes(32 * n))])
    columns = {
        "key": pa.array(["k"] * n, pa.large_string()),
        "sha256": sha256,
        **{k: pa.array(v) for k, v in numbers.items()},
    }
    batch = pa.record_batch(
        [columns[f.name].cast(f.type) if f.name in columns else pa.nulls(n, f.type) for f in SAMPLES], SAMPLES
    )
    with pa.ipc.new_file(str(tmp_path / "samples.arrow"), SAMPLES) as out:
        out.write_batch(batch)

    def resident_kb() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "samples.arrow")))
        return int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1])

    table = read_samples(tmp_path)
    for name, mb in (("hash", 2.4), ("sha256", 9.6)):
        assert table[name].digest == sample_values(batch[name], name).digest
        assert resident_kb() < 1000, f"{mb} MB were looked over"
    assert np.array_equal(table["hash"].numpy(), numbers["hash"]) and resident_kb() > 2000, (
        "they come back when they are read"
    )


def test_columns_read_as_sequences_and_survive_pickling(tiny_cache: Path) -> None:
    table = read_samples(tiny_cache)
    keys, hashes = table["key"], pickle.loads(pickle.dumps(table["hash"]))
    assert keys[-1] == keys[:][-1] == [*keys][-1] and keys == [*keys] and keys != [*keys][::-1]
    assert np.array_equal(hashes.numpy(), table["hash"].numpy()) and len(pickle.dumps(table["hash"])) < 1000
    with pytest.raises(IndexError):
        keys[len(keys)]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t["key"].__setitem__(0, None), "column key has rows without a value"),
        (lambda t: t["hash"].__setitem__(0, None), "column hash has rows without a value"),
        (lambda t: [values.clear() for values in t.values()], "it has 0 rows"),
        (lambda t: [values.pop() for values in t.values()], "rows; the plan says"),
    ],
    ids=["no key", "no hash", "empty", "one row less"],
)
def test_samples_of_another_shape_are_refused(copy: Path, change: Any, said: str) -> None:
    rewritten(copy, change)
    parts = load_plan(copy).numbers
    with pytest.raises(ValueError, match=rf"samples\.arrow: cannot be read \(.*({said})"):
        read_samples(copy, parts)
    with pytest.raises(ValueError, match=r"samples\.arrow"):
        open_cache(copy, allow_partial=True)
    assert [problem.file for problem in check.find_problems(copy) if "samples" in problem.file] == ["samples.arrow"]


def test_a_compressed_table_is_refused_before_it_is_unpacked(copy: Path) -> None:
    rewritten(copy, lambda t: t["reason"].__setitem__(0, "x" * 10**7), compression="zstd")
    assert (copy / "samples.arrow").stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"samples\.arrow: cannot be read \(it is compressed\)"):
        read_samples(copy)


def test_damage_anywhere_is_told_and_crashes_nothing(copy: Path) -> None:
    file, rng = copy / "samples.arrow", np.random.default_rng(0)
    whole = file.read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content[: rng.integers(len(content))] if rng.random() < 0.2 else content)
        with contextlib.suppress(ValueError):
            assert all(len([*values]) == len(values) and values.digest for values in read_samples(copy).values())


@pytest.mark.parametrize("column", ["key", "label"])
def test_text_whose_places_lie_outside_the_file_is_refused_where_it_is_read(copy: Path, column: str) -> None:
    file = copy / "samples.arrow"
    content = bytearray(file.read_bytes())
    offsets = np.frombuffer(read_samples(copy)[column].array.buffers()[1], np.int64)[:5].tobytes()
    at = content.index(offsets) + 8
    content[at : at + 8] = (2**62).to_bytes(8, "little")
    file.write_bytes(content)
    for values in (lambda: read_samples(copy)[column][1], lambda: [*read_samples(copy)[column]]):
        with pytest.raises(ValueError, match=f"samples.arrow: its column {column} is damaged"):
            values()


def test_altered_labels_are_refused_when_they_are_asked_for(tiny_cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_cache, tmp_path / "c")
    rewritten(copy, lambda t: t["label"].__setitem__(0, "other"))
    with pytest.raises(ValueError, match=r"samples\.arrow: its labels are not those that the manifest was written for"):
        open_cache(copy).labels  # noqa: B018


def test_altered_keys_are_refused_with_the_first_of_their_shard(copy: Path) -> None:
    rewritten(copy, lambda t: t["key"].__setitem__(0, "other.png"))
    cache = open_cache(copy, allow_partial=True)
    with pytest.raises(ValueError, match=r"samples\.arrow: its keys and their hashes do not fit"):
        cache.read_pixels(cache.numbers[:1], cache.numbers[:1] * 0)


def test_samples_are_read_without_arrows_threads(tiny_cache: Path) -> None:
    """One that outlives the read by a moment holds Python's bytes, and a process that ends in that moment aborts."""

    def work() -> None:  # a fork begins with one thread
        read_samples(tiny_cache)
        assert len(os.listdir("/proc/self/task")) == 1

    assert ends([forked(work)]) == [0]
