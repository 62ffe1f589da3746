"""Commit records have an id over what they say: one that was edited is noticed, and nobody believes it."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrmae.shards import check, commit, convert
from mrmae.shards.cache import open_cache
from mrmae.shards.format import plan

Make = Callable[..., Path]
SMALL: dict[str, Any] = {"n": 6, "size": 16, "grid": 2, "n_views": 1, "shard_samples": 3, "bad": (2,)}


@pytest.fixture(scope="module")
def whole(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("whole") / "c", **SMALL)


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "c")
    return tmp_path / "c"


def test_a_cache_of_the_first_version_must_be_extracted_anew(path: Path) -> None:
    for name in ("plan.json", "manifest.json"):
        (path / name).write_text((path / name).read_text().replace('"format_version": 2', '"format_version": 1'))
    for attempt in (open_cache, check.find_problems):
        with pytest.raises(ValueError, match="format version 1; this mrmae reads 2; extract the cache anew"):
            attempt(path)


def record_of(path: Path, shard: int) -> dict[str, Any]:
    """The record of a shard of the pixels."""
    return dict(json.loads((path / f"commits/0/pixels/{shard:06d}.json").read_bytes()))


def edited(file: Path, change: Callable[[dict[str, Any]], object], *, forged: bool) -> None:
    """Change a commit record; forged: with the id that then belongs to it."""
    record = json.loads(file.read_bytes())
    change(record)
    if forged:
        record["record_id"] = commit.record_id(record)
    file.write_text(json.dumps(record))


def taller(record: dict[str, Any]) -> None:
    record["heights"][0] += 1


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a height": ("pixels", taller),
    "a reason": ("pixels", lambda record: record["bad"].update({key: "ugly" for key in record["bad"]})),
    "a quality": ("a.pre_tail", lambda record: record["quality"].update(snr_db=99.0)),
    "a count": ("a.pre_tail", lambda record: record.update(valid=record["valid"] - 1)),
    "a sha256": ("b.pre_tail", lambda record: next(iter(record["files"].values())).update(sha256="0" * 64)),
}
# What is named once the record matches its own id again: records win, so it is what disagrees with them.
FORGED = {
    "a height": ["samples.parquet", "manifest.json"],
    "a reason": ["samples.parquet", "manifest.json"],
    "a quality": ["manifest.json"],
    "a count": ["commits/0/a.pre_tail/000000.json"],
    "a sha256": ["views/0/b.pre_tail.zarr/norm/c/0/0"],
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_commit_record_is_noticed_and_never_used(path: Path, tmp_path: Path, what: str) -> None:
    column, change = EDITS[what]
    made, before, opened = plan.load_plan(path), (path / "manifest.json").read_bytes(), open_cache(path)
    shard = next(s for s in range(2) if column != "pixels" or record_of(path, s)["bad"])
    name = f"commits/0/{column}/{shard:06d}.json"
    edited(path / name, change, forged=False)
    for full in (False, True):
        assert [problem.file for problem in check.find_problems(path, full=full)] == [name]
    assert commit.missing(path, made) == [(0, column, shard)], "the same extraction writes it anew"
    with pytest.raises(ValueError, match="1 of .* shards are not committed"):
        commit.finalise(path, made)
    wanted = convert.converted_plan(opened, format=None, dtype=None, drop=())
    with pytest.raises(ValueError, match=f"{name}: the commit record is missing, or is not the one that was written"):
        convert.convert_cache(opened, tmp_path / "out", wanted, about={}, progress=lambda _: None)
    edited(path / name, lambda _: None, forged=True)  # now it matches its own id, and not the manifest
    assert [problem.file for problem in check.find_problems(path, full=True)] == FORGED[what]
    with pytest.raises(ValueError, match="is not the one that was written"):
        convert.convert_cache(opened, tmp_path / "other", wanted, about={}, progress=lambda _: None)
    assert (path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("change", [
    lambda record: record["heights"].pop(), lambda record: record["bad"].update({"999": "x"}),
    lambda record: record.update(bad=None), lambda record: record.update(heights="12"), lambda record: record.pop("files"),
    lambda record: record["widths"].__setitem__(0, float("nan")),
])  # fmt: skip
def test_a_record_that_tells_of_other_samples_is_not_valid_whatever_its_id(
    path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edited(path / "commits/0/pixels/000000.json", change, forged=False)
    with contextlib.suppress(ValueError):  # NaN has no id
        edited(path / "commits/0/pixels/000000.json", lambda _: None, forged=True)
    assert commit.missing(path, plan.load_plan(path)) == [(0, "pixels", 0)]
    assert any(problem.file.startswith("commits/") for problem in check.find_problems(path, full=True))


def test_a_record_that_tells_what_no_record_does_was_edited(path: Path) -> None:
    edited(path / "commits/0/pixels/000000.json", lambda record: record.update(x=record["last"]), forged=True)
    (problem,) = check.find_problems(path, full=True)
    assert str(problem).endswith("it tells 'x', which no commit record does, so it was edited")
    assert commit.missing(path, plan.load_plan(path)) == [(0, "pixels", 0)]


def test_equal_extractions_have_equal_record_ids(make_cache: Make, whole: Path, tmp_path: Path) -> None:
    ids = [[json.loads(file.read_bytes())["record_id"] for file in sorted(path.rglob("commits/*/*/*.json"))]
           for path in (whole, make_cache(tmp_path / "again", **SMALL))]  # fmt: skip
    assert ids[0] == ids[1] and len(set(ids[0])) == 6


def test_record_ids_are_golden_and_know_nothing_of_time_host_and_command() -> None:
    record = {"format_version": 2, "view": 0, "column": "pixels", "shard": 1, "id": "sha256:x", "files": {}, "count": 2, "valid": 1,
              "first": "a", "last": "b", "heights": [3, 0], "widths": [4, 0], "bad": {"3": "no image"}}  # fmt: skip
    beside = {
        "written": 5,
        "seconds": {"write": 0.1},
        "versions": {"torch": "2"},
        "command": "x",
        "folder": "/",
        "device": "cpu",
    }
    assert (
        commit.record_id(record)
        == commit.record_id({**record, **beside})
        == "sha256:34cf3ff6ad1bfe633700c5a037595cb3cdb641e5a74c19449e108358db8e63c2"
    )
