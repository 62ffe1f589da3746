"""The manifest follows from plan, samples and records: where it disagrees with them, it is what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.format.spec import content_id
from mrmae.shards.manifest import read_manifest
from mrmae.shards.repair import prepare_repair


def test_an_edited_manifest_is_not_taken_for_a_damaged_plan(every_kind: Path, tmp_path: Path) -> None:
    """Its own id was made to fit: commit records tell which of the two is right."""
    shutil.copytree(every_kind, tmp_path / "c")
    manifest = json.loads((every_kind / "manifest.json").read_bytes())
    manifest["recipe"]["seed"] = 5
    body = {name: value for name, value in manifest.items() if name != "manifest_id"}
    (tmp_path / "c/manifest.json").write_text(json.dumps({**body, "manifest_id": content_id(body)}))
    problems = check.find_problems(tmp_path / "c", full=True)
    assert [problem.file for problem in problems] == ["manifest.json"]
    prepare_repair(tmp_path / "c", problems)
    assert (tmp_path / "c/plan.json").read_bytes() == (every_kind / "plan.json").read_bytes()


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and give it the id that then belongs to it."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    body = {name: value for name, value in manifest.items() if name != "manifest_id"}
    (path / "manifest.json").write_text(json.dumps({**body, "manifest_id": content_id(body)}))


MANIFEST_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "the id of a record": lambda manifest: manifest["shards"]["1"]["pixels"][0].update(record_id="sha256:x"),
    "a count": lambda manifest: manifest["shards"]["0"]["a.pre_tail"][1].update(count=1),
    "a quality": lambda manifest: manifest["columns"][0]["quality"].update(snr_db=99.0),
    "a shard too many": lambda manifest: manifest["shards"]["0"]["pixels"].append(manifest["shards"]["0"]["pixels"][0]),
}


@pytest.mark.parametrize("what", MANIFEST_EDITS)
def test_a_manifest_that_disagrees_with_the_records_is_named_whatever_its_id(
    every_kind: Path, tmp_path: Path, what: str
) -> None:
    shutil.copytree(every_kind, tmp_path / "c")
    edit_manifest(tmp_path / "c", MANIFEST_EDITS[what])
    for full in (False, True):
        (problem,) = check.find_problems(tmp_path / "c", full=full)
        assert problem.file == "manifest.json" and "in the commit records, so it was edited" in problem.what
    assert prepare_repair(tmp_path / "c", [problem]) == [tmp_path / "c/manifest.json"], "no shard is written again"


def test_a_manifest_of_another_format_version_is_not_called_damaged(every_kind: Path, tmp_path: Path) -> None:
    """Its fields are others, and extracting with the same command does not mend it."""
    manifest = json.loads((every_kind / "manifest.json").read_bytes())
    del manifest["dataset_ids"]
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(
        ValueError, match=r"manifest\.json: format version 3; this mrmae reads 4; extract the cache anew"
    ):
        read_manifest(tmp_path)


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
