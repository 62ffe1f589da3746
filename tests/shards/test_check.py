"""A few hundred faults in a finished cache: every one is noticed, named and can be repaired. benchmarks/faults.py has them."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.format import plan
from mrmae.shards.format.spec import content_id
from mrmae.shards.repair import prepare_repair

Make = Callable[..., Path]
FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"
SPECIFICATION = importlib.util.spec_from_file_location("faults", FAULTS)
assert SPECIFICATION and SPECIFICATION.loader
faults: Any = importlib.util.module_from_spec(SPECIFICATION)
sys.modules["faults"] = faults
SPECIFICATION.loader.exec_module(faults)

SMALL: dict[str, Any] = {"n": 5, "size": 16, "grid": 2, "n_views": 2, "shard_samples": 3, "bad": (2,)}


@pytest.fixture(scope="module", params=[("zarr", "int8"), ("webdataset", "int8"), ("zarr", "fp8")], ids="-".join)
def cache(make_cache: Make, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    format, dtype = request.param
    return make_cache(tmp_path_factory.mktemp("faults") / "c", format=format, dtype=dtype, **SMALL)


def test_a_clean_cache_raises_no_alarm(cache: Path, tiny_cache: Path) -> None:
    for path in (cache, tiny_cache):
        assert faults.noticed_by(path) == {}


@pytest.mark.parametrize("kind", faults.KINDS)
def test_every_fault_is_noticed_named_and_repairable(cache: Path, kind: str) -> None:
    made, rng = plan.load_plan(cache), np.random.default_rng(list(faults.KINDS).index(kind))
    for case in range(8):
        fault, found = faults.try_fault(cache, made, kind, rng)
        assert found or faults.harmless(fault), (kind, case, fault.files)
        assert not found or faults.well_told(fault, found), (kind, case, fault.files, found)
    assert faults.noticed_by(cache) == {}, "every fault was undone"


def test_what_repair_removes_is_enough_for_every_kind(make_cache: Make, cache: Path, tmp_path: Path) -> None:
    """After repair and the same extraction again, all bytes are as they were."""
    made, rng = plan.load_plan(cache), np.random.default_rng(1)
    whole = contents(cache)
    for i, kind in enumerate(faults.KINDS):
        path = tmp_path / str(i)
        shutil.copytree(cache, path)
        faults.KINDS[kind](path, made, rng)
        prepare_repair(path, check.find_problems(path, full=True))
        make_cache(path, format=made.format, dtype=made.dtype, **SMALL)
        assert contents(path) == whole, kind


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_edited_manifest_is_not_taken_for_a_damaged_plan(cache: Path, tmp_path: Path) -> None:
    """Its own id was made to fit: commit records tell which of the two is right."""
    shutil.copytree(cache, tmp_path / "c")
    manifest = json.loads((cache / "manifest.json").read_bytes())
    manifest["recipe"]["seed"] = 5
    body = {name: value for name, value in manifest.items() if name != "manifest_id"}
    (tmp_path / "c/manifest.json").write_text(json.dumps({**body, "manifest_id": content_id(body)}))
    problems = check.find_problems(tmp_path / "c", full=True)
    assert [problem.file for problem in problems] == ["manifest.json"]
    prepare_repair(tmp_path / "c", problems)
    assert (tmp_path / "c/plan.json").read_bytes() == (cache / "plan.json").read_bytes()


@pytest.mark.parametrize("field", ["n_views", "recipe", "quantisers", "channel_mean", "standardised", "tap"])
def test_a_misspelt_field_of_the_plan_is_a_damaged_plan(cache: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(cache, tmp_path / "c")
    file = tmp_path / "c/plan.json"
    file.write_text(file.read_text().replace(f'"{field}"', f'"{field[:-1]}_"', 1))
    with pytest.raises(ValueError, match="plan.json: (damaged|fields)"):
        open_cache(tmp_path / "c")
    assert [problem.file for problem in check.find_problems(tmp_path / "c")] == ["plan.json"]
    prepare_repair(tmp_path / "c", check.find_problems(tmp_path / "c"))
    assert file.read_bytes() == (cache / "plan.json").read_bytes()


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and give it the id that then belongs to it."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    body = {name: value for name, value in manifest.items() if name != "manifest_id"}
    (path / "manifest.json").write_text(json.dumps({**body, "manifest_id": content_id(body)}))


def edit_plan(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((path / "plan.json").read_bytes())
    change(fields)
    (path / "plan.json").write_text(json.dumps(fields))


MANIFEST_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "the id of a record": lambda manifest: manifest["shards"]["1"]["pixels"][0].update(record_id="sha256:x"),
    "a count": lambda manifest: manifest["shards"]["0"]["a.pre_tail"][1].update(count=1),
    "a quality": lambda manifest: manifest["columns"][0]["quality"].update(snr_db=99.0),
    "a shard too many": lambda manifest: manifest["shards"]["0"]["pixels"].append(manifest["shards"]["0"]["pixels"][0]),
}


@pytest.mark.parametrize("what", MANIFEST_EDITS)
def test_a_manifest_that_disagrees_with_the_records_is_named_whatever_its_id(
    cache: Path, tmp_path: Path, what: str
) -> None:
    shutil.copytree(cache, tmp_path / "c")
    edit_manifest(tmp_path / "c", MANIFEST_EDITS[what])
    for full in (False, True):
        (problem,) = check.find_problems(tmp_path / "c", full=full)
        assert problem.file == "manifest.json" and "in the commit records, so it was edited" in problem.what
    assert prepare_repair(tmp_path / "c", [problem]) == [tmp_path / "c/manifest.json"], "no shard is written again"


PLAN_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a seed": lambda plan: plan["recipe"].update(seed=5),
    "a view too many": lambda plan: plan.update(n_views=3),
    "other shards": lambda plan: plan.update(shard_samples=2),
    "one teacher": lambda plan: plan["columns"][1].update(precision="bfloat16"),
    "where weights come from": lambda plan: plan["columns"][0].update(tag="other"),
}


@pytest.mark.parametrize("what", PLAN_EDITS)
def test_a_plan_that_the_shards_were_not_written_for_is_written_again_from_the_manifest(
    cache: Path, tmp_path: Path, what: str
) -> None:
    shutil.copytree(cache, tmp_path / "c")
    edit_plan(tmp_path / "c", PLAN_EDITS[what])
    problems = check.find_problems(tmp_path / "c", full=True)
    assert [problem.file for problem in problems] == ["plan.json"]
    assert prepare_repair(tmp_path / "c", problems) == []
    assert contents(tmp_path / "c") == contents(cache)


def test_records_of_one_teacher_are_not_removed_for_an_altered_plan(cache: Path, tmp_path: Path) -> None:
    """Without a manifest nothing tells what was right, so nothing is lost."""
    shutil.copytree(cache, tmp_path / "c")
    edit_plan(tmp_path / "c", PLAN_EDITS["one teacher"])
    (tmp_path / "c/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"4 of 12 commit records are of another plan.*nothing was changed"):
        prepare_repair(tmp_path / "c", check.find_problems(tmp_path / "c"))


def test_a_cache_that_is_finished_while_it_is_checked_is_the_unfinished_one_that_was_looked_at(
    make_cache: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_cache(tmp_path / "c", **SMALL)
    manifest, real = (path / "manifest.json").read_bytes(), check.read_records
    (path / "manifest.json").unlink()

    def meanwhile(*given: Any) -> Any:
        (path / "manifest.json").write_bytes(manifest)
        return real(*given)

    monkeypatch.setattr(check, "read_records", meanwhile)
    (problem,) = check.find_problems(path, full=True)
    assert problem.file == "manifest.json" and "absent: the cache is unfinished" in problem.what


def test_a_plan_that_lost_a_quantiser_is_told_by_its_commit_records(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", finalise=False, **SMALL)
    fields = json.loads((path / "plan.json").read_bytes())
    del fields["quantisers"]["a.pre_tail"]
    (path / "plan.json").write_text(json.dumps(fields))
    found = check.find_problems(path, full=True)
    assert any("a.pre_tail" in problem.file and "expected None" in problem.what for problem in found)
