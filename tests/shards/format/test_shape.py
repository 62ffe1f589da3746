"""JSON of another shape than its writer's is a damaged file, never an error of Python."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.commit import RecordFields, committed, finalise, read_record, withdraw_manifest
from mrmae.shards.format import read_samples, tail, write_samples
from mrmae.shards.format.plan import PlanFields, load_plan
from mrmae.shards.format.shape import expect_kind, parsed
from mrmae.shards.format.spec import content_id
from mrmae.shards.plans import Wanted, agree


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, 5, True),
        (int, 2**64 - 1, 2**64),
        (int, 1, 1.0),
        (float, 1, "1"),
        (float, 0.5, float("nan")),
        (float, 0, 10**400),
        (bool, True, 1),
        (str, "é", "\ud800"),
        (str | None, None, 0),
        (list[int], [], {}),
        (tuple[int, int], [1, 2], [1, 2, 3]),
        (dict[str, int], {"a": 1}, {"a": [1]}),
        (Any, {"a": [1, None, "x"]}, {"a": ["\udfff"]}),
        (RecordFields, None, {"files": {}}),
    ],
)
def test_a_value_of_another_type_is_refused(kind: Any, good: Any, bad: Any) -> None:
    if kind is not RecordFields:
        expect_kind(good, kind)
    with pytest.raises(ValueError, match="expected|has no"):
        expect_kind(bad, kind)


@pytest.mark.parametrize("depth", [60, 100_000])
def test_lists_in_lists_are_refused_before_they_fill_the_stack(depth: int) -> None:
    with pytest.raises(ValueError, match="too deep"):
        parsed(b"[" * depth + b"]" * depth, Any)


def test_a_plan_says_which_field_is_of_another_type(tiny_cache: Path) -> None:
    fields = load_plan(tiny_cache).to_json()
    expect_kind(fields, PlanFields)
    fields["columns"][1]["width"] = "6"
    with pytest.raises(ValueError, match=r"^columns\[1\].width is '6'; expected an integer"):
        expect_kind(fields, PlanFields)


def altered(tiny_cache: Path, to: Path, change: Callable[[dict[str, Any]], Any], file: str) -> Path:
    """A copy of the cache with a JSON file changed; the manifest's id fits."""
    shutil.copytree(tiny_cache, to)
    value = json.loads((to / file).read_bytes())
    change(value)
    if file == "manifest.json":
        value["manifest_id"] = content_id({name: inner for name, inner in value.items() if name != "manifest_id"})
    (to / file).write_text(json.dumps(value))
    return to


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["shards"]["0"]["pixels"][0].update(files=[[]]),
        lambda manifest: manifest.update(shards=[]),
        lambda manifest: manifest["columns"][0].update(tail="tail/a.safetensors"),
        lambda manifest: manifest["columns"][0]["teacher"].pop("width"),
    ],
)
def test_a_manifest_of_another_shape_is_damaged(
    tiny_cache: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    path = altered(tiny_cache, tmp_path / "c", change, "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json: damaged \((shards|columns)"):
        open_cache(path)
    assert [problem.file for problem in check.find_problems(path)] == ["manifest.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(heights=[40.5] * 8),
        lambda record: record.update(heights=[40]),
        lambda record: record.update(bad={"x": "broken"}),
        lambda record: record.update(bad={"99": "broken"}),
        lambda record: record.update(count=3),
        lambda record: record.update(seconds=[None]),
        lambda record: record["files"].update(x=None),
    ],
)
def test_a_commit_record_of_another_shape_commits_nothing(
    tiny_cache: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    path = altered(tiny_cache, tmp_path / "c", change, "commits/0/pixels/000001.json")
    assert (0, "pixels", 1) not in committed(path, load_plan(path))
    (path / "manifest.json").unlink()
    assert open_cache(path, allow_partial=True).numbers.tolist() == [*range(8), *range(16, 24)]
    assert read_record(tiny_cache / "commits/0/pixels/000001.json") is not None


@pytest.mark.parametrize(
    "tensors",
    [
        {"layer_norm.weight": torch.ones(4)},
        {"layer_norm.weight": torch.ones(4), "layer_norm.eps": torch.ones(2)},
        {"layer_norm.weight": torch.ones(2, 2), "layer_norm.eps": torch.tensor(1e-6)},
        {"layer_norm.weight": torch.ones(4), "layer_norm.eps": torch.tensor(1e-6), "proj.weight": torch.ones(3, 5)},
        {},
    ],
)
def test_a_tail_that_no_teacher_has_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tail.write_tail(tmp_path, "a", tensors)
    file = tail.tail_path(tmp_path, "a")
    if not tensors:
        file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match="a.safetensors: no tail of .*run the same extract-features command"):
        tail.read_tail(tmp_path, "a")


def test_a_new_manifest_does_not_vouch_for_an_altered_tail(tiny_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_cache, tmp_path / "c")
    manifest = (tmp_path / "c/manifest.json").read_bytes()
    tail.write_tail(tmp_path / "c", "a", {"norm.weight": torch.zeros(8), "norm.bias": torch.zeros(8)})
    with pytest.raises(ValueError, match="a.safetensors: its sha256 is not that of the manifest.*delete it"):
        finalise(tmp_path / "c", load_plan(tmp_path / "c"))
    with pytest.raises(ValueError, match="a.safetensors: its sha256 is not that of the manifest.*delete it"):
        agree(tmp_path / "c", Wanted(dataclasses.replace(load_plan(tmp_path / "c"), n_views=9)))
    assert (tmp_path / "c/manifest.json").read_bytes() == manifest


def test_a_tail_that_is_none_is_not_vouched_for_and_written_again(tiny_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_cache, tmp_path / "c")
    (tmp_path / "c/manifest.json").unlink()
    file = tail.tail_path(tmp_path / "c", "a")
    good, tensors = file.read_bytes(), tail.read_tail(tmp_path / "c", "a")
    for bad in (b"", good[:-1]):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="a.safetensors: no tail of"):
            finalise(tmp_path / "c", load_plan(tmp_path / "c"))
        tail.keep_tail(tmp_path / "c", "a", tensors)
        assert file.read_bytes() == good
    kept = file.stat().st_ino
    tail.keep_tail(tmp_path / "c", "a", tensors)
    assert file.stat().st_ino == kept, "what is there as it should be is not written again"
    finalise(tmp_path / "c", load_plan(tmp_path / "c"))


def test_a_new_manifest_does_not_vouch_for_altered_samples(tiny_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_cache, tmp_path / "c")
    plan = load_plan(tmp_path / "c")
    table = read_samples(tmp_path / "c", plan.numbers)
    write_samples(tmp_path / "c", table | {"label": ["other"] * plan.n_rows})
    with pytest.raises(ValueError, match="samples.parquet: its rows are not those of the manifest"):
        withdraw_manifest(tmp_path / "c", plan)
    assert (tmp_path / "c/manifest.json").exists()
    write_samples(tmp_path / "c", table)
    withdraw_manifest(tmp_path / "c", plan)
    assert not (tmp_path / "c/manifest.json").exists()
