"""plan.json: it survives itself, is frozen once, and what it sizes beyond reason is refused in one line before anything is allocated."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrmae.common import files as write
from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.commit import read_record
from mrmae.shards.format import (
    Plan,
    plan,
)
from mrmae.shards.format.plan import PlanFields, load_plan
from mrmae.shards.format.quantiser import Quantiser
from mrmae.shards.format.shape import expect_kind
from mrmae.shards.format.spec import ViewRecipe
from mrmae.shards.manifest import read_manifest

Make = Callable[..., Path]


def test_quantisers_are_frozen_once(tiny_cache: Path) -> None:
    made = plan.load_plan(tiny_cache)
    with pytest.raises(ValueError, match=r"quantisers\..*dtype is 'int8' there and 'float16'"):
        plan.freeze_quantisers(tiny_cache, made, {name: Quantiser("float16") for name in made.quantisers})
    with pytest.raises(ValueError, match="one for every column"):
        plan.freeze_quantisers(tiny_cache, made, {})


def test_a_quantiser_of_another_dtype_is_refused(make_cache: Make, tmp_path: Path) -> None:
    made = plan.load_plan(make_cache(tmp_path / "c", n=6, size=16, grid=2, n_views=1))
    fresh = dataclasses.replace(made, quantisers={})
    write.publish(tmp_path / "c/plan.json", plan.readable_json(fresh.to_json()), replace=True)
    with pytest.raises(ValueError, match="a quantiser is of fp8; the cache has int8"):
        plan.freeze_quantisers(tmp_path / "c", fresh, {name: Quantiser("fp8") for name in made.quantisers})


def test_plans_survive_json_and_give_the_same_ids(tiny_cache: Path) -> None:
    made = plan.load_plan(tiny_cache)
    again = dataclasses.replace(made)
    assert again.to_json() == made.to_json() == json.loads((tiny_cache / "plan.json").read_bytes())
    assert again.ids == made.ids and set(made.ids) == {"pixels", "a.pre_tail", "b.pre_tail"}


def test_contradictory_plans_are_refused(tiny_cache: Path) -> None:
    made = plan.load_plan(tiny_cache)
    for change, message in (({"columns": made.columns + made.columns[:1]}, "repeat"), ({"n_views": 0}, "0 views"),
                            ({"grid": (3, 3)}, "one grid")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(made, **change)  # type: ignore[arg-type]


def test_a_plan_of_an_unknown_dtype_is_refused(tiny_cache: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int8x' is not known; expected int8, fp8, float16"):
        dataclasses.replace(plan.load_plan(tiny_cache), dtype="int8x")


def test_shard_ranges_and_the_default_size() -> None:
    assert plan.shard_ranges(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert plan.default_shard_samples(100, 150_528) == 64
    assert plan.default_shard_samples(6400, 150_528) == 100
    assert plan.default_shard_samples(1_281_167, 150_528) == 512 * 10**6 // 150_528


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
    "a number for text": (("listing_id",), 6, "listing_id"),
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
    "appended images without end": (("appended",), [{"listing_id": "x", "n_samples": 10**12}], "rows of samples"),
    "appended gaps without end": (("appended",), [{"listing_id": "x", "n_samples": 1}] * 6, "empty rows"),
    "appended parts without end": (("appended",), [{"listing_id": "x", "n_samples": 1}] * 3 * 10**5, "bytes"),
    "fewer than no images": (("appended",), [{"listing_id": "x", "n_samples": -1}], "n_samples"),
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
        with pytest.raises(ValueError, match=rf"samples\.arrow.*6 rows; the plan says {value}"):
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


def test_a_quantiser_of_no_column_is_a_damaged_plan(copy: Path) -> None:
    fields = json.loads((copy / "plan.json").read_bytes())
    fields["quantisers"]["../../x"] = fields["quantisers"]["a.pre_tail"]
    (copy / "plan.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"a quantiser is of '../../x', which is no column"):
        plan.load_plan(copy)


def test_a_plan_says_which_field_is_of_another_type(tiny_cache: Path) -> None:
    fields = load_plan(tiny_cache).to_json()
    expect_kind(fields, PlanFields)
    fields["columns"][1]["width"] = "6"
    with pytest.raises(ValueError, match=r"^columns\[1\].width is '6'; expected an integer"):
        expect_kind(fields, PlanFields)
