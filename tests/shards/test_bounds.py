"""What the files of a cache say of sizes is checked before anything is allocated, and ends in one line that names the file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.commit import read_record
from mrmae.shards.format import SAMPLES, Plan, ViewRecipe, load_plan, read_samples
from mrmae.shards.manifest import read_manifest

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def unfinished(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache without a manifest. Do not change it."""
    return make_cache(tmp_path_factory.mktemp("bounds") / "c", n=6, size=16, grid=2, n_views=1, finalise=False)


@pytest.fixture
def copy(unfinished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(unfinished, tmp_path / "c")


HOSTILE_PLANS: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "more samples than names": (("n_samples",), 10**12, "rows of samples"),
    "shards without end": (("n_samples",), 10**9, "shards of all views"),
    "views without end": (("n_views",), 10**9, "views"),
    "a shard larger than memory": (("shard_samples",), 10**12, "samples per shard"),
    "a grid without end": (("grid",), [10**9, 10**9], "grid"),
    "a grid of three sides": (("grid",), [2, 2, 2], "grid"),
    "a width without end": (("columns", 0, "width"), 10**15, "width"),
    "a picture without end": (("recipe", "size"), 10**9, "size"),
    "half a pixel": (("recipe", "size"), 16.5, "size"),
    "true for a number": (("n_views",), True, "n_views"),
    "text for a number": (("n_samples",), "6", "n_samples"),
    "a number for text": (("dataset_id",), 6, "dataset_id"),
    "a list for a format": (("format",), ["zarr"], "format"),
    "columns that are none": (("columns",), [1], "damaged"),
    "a teacher's name with a path": (("columns", 0, "name"), "../x", "teacher name"),
    "another number of deviations": (("quantisers", "a.pre_tail", "channel_std"), [1.0], "quantiser"),
    "the quantiser of no column": (("quantisers", "zzz"), {"dtype": "int8", "standardised": False, "channel_mean": None,
                                                          "channel_std": None}, "zzz"),
    "a field of 100,000 letters": (("x" * 10**5,), 1, "damaged"),
    "a teacher's field of 100,000 letters": (("columns", 0, "x" * 10**5), 1, "are missing or unknown"),
    "an option of 100,000 letters": (("columns", 0, "model_options"), {"x" * 10**5: float("nan")}, "expected a finite number"),
    "a quantiser of 100,000 letters": (("quantisers", "x" * 10**5), {"dtype": "int8"}, "has no"),
    "a version of 100,000 letters": (("format_version",), "x" * 10**5, "format version"),
    "appended images without end": (("appended",), [{"dataset_id": "x", "n_samples": 10**12}], "rows of samples"),
    "appended gaps without end": (("appended",), [{"dataset_id": "x", "n_samples": 1}] * 6, "empty rows"),
    "appended parts without end": (("appended",), [{"dataset_id": "x", "n_samples": 1}] * 3 * 10**5, "bytes"),
    "fewer than no images": (("appended",), [{"dataset_id": "x", "n_samples": -1}], "n_samples"),
    "blocks without end": (("token_layout",), {"rule": "splitmix64", "seed": 0, "blocks": 10**18}, "blocks"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_PLANS)
def test_a_plan_that_sizes_anything_beyond_reason_is_refused(copy: Path, what: str) -> None:
    (*at, last), value, said = HOSTILE_PLANS[what]
    plan = json.loads((copy / "plan.json").read_bytes())
    inner = plan
    for name in at:
        inner = inner[name]
    inner[last] = value
    if what == "appended gaps without end":
        plan["shard_samples"] = 2**20
    (copy / "plan.json").write_text(json.dumps(plan))
    for read in (load_plan, open_cache, check.find_problems):
        with pytest.raises(ValueError, match=rf"plan\.json.*{said}") as caught:
            read(copy)
        assert len(str(caught.value)) < 2000


def test_a_plan_of_more_samples_than_names_have_digits_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="1000000001 rows of samples; at most 1000000000 .*several caches"):
        Plan("sha256:0", 10**9 + 1, ViewRecipe(size=8), (2, 2), 1, 10**5, "int8", ())


@pytest.mark.parametrize("field, value", [("n_samples", 10**6), ("n_samples", 5), ("n_samples", 7)])
def test_a_plan_must_have_as_many_samples_as_there_are_rows(copy: Path, field: str, value: int) -> None:
    plan = json.loads((copy / "plan.json").read_bytes())
    (copy / "plan.json").write_text(json.dumps({**plan, field: value}))
    if value > 6:
        with pytest.raises(ValueError, match=rf"samples\.parquet.*6 rows; the plan says {value}"):
            open_cache(copy, allow_partial=True)
    else:
        with pytest.raises(ValueError, match=r"plan\.json: none of the commit records there is of this plan"):
            open_cache(copy, allow_partial=True)


def test_a_plan_that_is_not_of_one_columns_records_is_refused(copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_bytes())
    plan["columns"][0]["weights_sha256"] = "0" * 64
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(
        ValueError, match=r"plan\.json: none of the commit records of a\.pre_tail there is of this plan"
    ):
        open_cache(copy, allow_partial=True)


def test_a_file_of_json_larger_than_its_writer_makes_is_not_read(copy: Path) -> None:
    for name, read in (
        ("plan.json", load_plan),
        ("manifest.json", read_manifest),
        ("commits/0/pixels/000000.json", read_record),
    ):
        (copy / name).touch()
        os.truncate(copy / name, 2**40)
        if read is read_record:
            assert read(copy / name) is None
            continue
        with pytest.raises(ValueError, match=rf"{name}: .*{2**40} bytes; at most"):
            read(copy)


def rewritten(path: Path, change: Callable[[dict[str, list[Any]]], object], **options: Any) -> None:
    table = pq.read_table(path / "samples.parquet").to_pydict()
    change(table)
    pq.write_table(pa.table(table, SAMPLES), path / "samples.parquet", **options)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t["number"].__setitem__(-1, 10**9), "numbered 0 to 5"),
        (lambda t: t["number"].__setitem__(2, 2**63 - 1), "numbered 0 to 5"),
        (lambda t: t["number"].__setitem__(0, None), "'?number'? has rows without a value|column number"),
        (lambda t: t["key"].__setitem__(0, None), "column key has rows without a value"),
        (lambda t: t["key"].__setitem__(0, "x" * 10**7), "it says that it holds 6 rows"),
        (lambda t: [values.clear() for values in t.values()], "it says that it holds 0 rows"),
        (lambda t: [values.extend(values[:1] * 10**6) for values in t.values()], "it says that it holds"),
        (lambda t: [values.extend(values) for values in t.values()], "rows twice"),
    ],
    ids=["a number", "64 bits", "no number", "no key", "a bomb", "empty", "rows out of nothing", "twice"],
)
def test_samples_that_would_fill_the_memory_are_refused_before(copy: Path, change: Any, said: str) -> None:
    rewritten(copy, change, compression="zstd")
    parts = load_plan(copy).numbers
    with pytest.raises(ValueError, match=rf"samples\.parquet: cannot be read \(.*({said})"):
        read_samples(copy, parts)
    with pytest.raises(ValueError, match=r"samples\.parquet"):
        open_cache(copy, allow_partial=True)
    assert [problem.file for problem in check.find_problems(copy) if "samples" in problem.file] == ["samples.parquet"]
