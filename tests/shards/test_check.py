"""A few hundred faults in a finished cache: every one is noticed, named and can be repaired. benchmarks/faults.py has them."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contents import contents

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.format import plan
from mrmae.shards.repair import prepare_repair
from mrmae.shards.store import zarr

Make = Callable[..., Path]
FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"
SPECIFICATION = importlib.util.spec_from_file_location("faults", FAULTS)
assert SPECIFICATION and SPECIFICATION.loader
faults: Any = importlib.util.module_from_spec(SPECIFICATION)
sys.modules["faults"] = faults
SPECIFICATION.loader.exec_module(faults)


def test_a_clean_cache_raises_no_alarm(every_kind: Path, tiny_cache: Path) -> None:
    for path in (every_kind, tiny_cache):
        assert faults.noticed_by(path) == {}


@pytest.mark.parametrize("kind", faults.KINDS)
def test_every_fault_is_noticed_named_and_repairable(every_kind: Path, kind: str) -> None:
    made, rng = plan.load_plan(every_kind), np.random.default_rng(list(faults.KINDS).index(kind))
    for case in range(8):
        fault, found = faults.try_fault(every_kind, made, kind, rng)
        assert found or faults.harmless(fault), (kind, case, fault.files)
        assert not found or faults.well_told(fault, found), (kind, case, fault.files, found)
    assert faults.noticed_by(every_kind) == {}, "every fault was undone"


def test_what_repair_removes_is_enough_for_every_kind(make_small: Make, every_kind: Path, tmp_path: Path) -> None:
    """After repair and the same extraction again, all bytes are as they were."""
    made, rng = plan.load_plan(every_kind), np.random.default_rng(1)
    whole = contents(every_kind)
    for i, kind in enumerate(faults.KINDS):
        path = tmp_path / str(i)
        shutil.copytree(every_kind, path)
        faults.KINDS[kind](path, made, rng)
        prepare_repair(path, check.find_problems(path, full=True))
        make_small(path, format=made.format, dtype=made.dtype)
        assert contents(path) == whole, kind


def test_a_cache_that_is_finished_while_it_is_checked_is_the_unfinished_one_that_was_looked_at(
    make_small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_small(tmp_path / "c")
    manifest, real = (path / "manifest.json").read_bytes(), check.read_records
    (path / "manifest.json").unlink()

    def meanwhile(*given: Any) -> Any:
        (path / "manifest.json").write_bytes(manifest)
        return real(*given)

    monkeypatch.setattr(check, "read_records", meanwhile)
    (problem,) = check.find_problems(path, full=True)
    assert problem.file == "manifest.json" and "absent: the cache is unfinished" in problem.what


def test_a_plan_that_lost_a_quantiser_is_told_by_its_commit_records(make_small: Make, tmp_path: Path) -> None:
    path = make_small(tmp_path / "c", finalise=False)
    fields = json.loads((path / "plan.json").read_bytes())
    del fields["quantisers"]["a.pre_tail"]
    (path / "plan.json").write_text(json.dumps(fields))
    found = check.find_problems(path, full=True)
    assert any("a.pre_tail" in problem.file and "expected None" in problem.what for problem in found)


def test_a_tar_of_fewer_samples_than_its_shard_is_told(make_small: Make, tmp_path: Path) -> None:
    path = make_small(tmp_path / "c", finalise=False)
    made = plan.load_plan(path)
    tar = plan.tar_path(path, 0, 0)
    check.check_tar(tar, made, 0, 0, range(3), range(3))
    with pytest.raises(ValueError, match="000000.tar: its index has 3 samples; the plan gives this shard 5"):
        check.check_tar(tar, made, 0, 0, range(5), range(5))


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
@pytest.mark.parametrize(
    "dtype, code, said",
    [
        ("fp8", 0x7F, r"codes that are no number \(127 or 255\)"),
        ("fp8", 0xFF, r"codes that are no number \(127 or 255\)"),
        ("float16", np.nan, "NaN or infinite"),
        ("int8", -128, r"codes that are no number \(-128\)"),
        ("pq4", 255, r"codes that are no number \(255\)"),
    ],
)
def test_a_value_that_is_none_is_noticed_under_the_right_checksums(
    make_small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, dtype: str, code: float, said: str
) -> None:
    """Another writer may have stored it; reading gives NaN."""

    def spoilt(arrays: Any, keep: Any, layout: Any, where: str) -> None:
        if "a.pre_tail" in where or "a/pre_tail" in where:
            arrays["tokens"][0, 1, 0] = code

    monkeypatch.setattr(zarr, "check_arrays", spoilt)
    path = make_small(tmp_path / "c", format=format, dtype=dtype)
    assert check.find_problems(path) == []
    found = check.find_problems(path, full=True)
    assert {problem.unit for problem in found} == {(view, "a.pre_tail", shard) for view in (0, 1) for shard in (0, 1)}
    for problem in found:
        where = (
            rf"1 values of tokens are {said}, which no command writes \(sample {3 * (problem.unit or (0, '', 0))[2]}\)"
        )
        assert re.fullmatch(where, problem.what), problem
    assert open_cache(path).read_tokens("a.pre_tail", [3], [0])[0, 1].isnan().any()
