"""The manifest follows from plan, samples and records: where it disagrees with them, it is what is wrong."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mrmae.shards import check, shard_table
from mrmae.shards import manifest as manifests
from mrmae.shards.cache import open_cache
from mrmae.shards.commit import finalise
from mrmae.shards.format import PIXELS, Values, load_plan, units, write_arrow
from mrmae.shards.format.spec import content_id
from mrmae.shards.manifest import read_manifest
from mrmae.shards.repair import prepare_repair
from mrmae.shards.shard_table import SHARD_TABLE, ShardTable, table_file


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


def edit_table(path: Path, change: Callable[[dict[str, list[Any]]], object]) -> dict[str, str]:
    """Change the table of shards, as lists by column; the digests that then belong to it."""
    file = table_file(path, 0)
    values = pa.ipc.open_file(file.read_bytes()).read_all().to_pydict()
    change(values)
    columns = {name: Values(pa.array(values[name], SHARD_TABLE.field(name).type), name) for name in SHARD_TABLE.names}
    write_arrow(file, columns, SHARD_TABLE)
    return ShardTable.of(columns).digests


def of_row(name: str, value: Any, row: int = 3) -> Callable[[dict[str, list[Any]]], object]:
    """Give a row another value."""
    return lambda values: values[name].__setitem__(row, value)


def once_more(values: dict[str, list[Any]]) -> None:
    """A file that no shard has."""
    for column in values.values():
        column.insert(1, column[1])


TABLE_EDITS: dict[str, Callable[[dict[str, list[Any]]], object]] = {
    "the id of a record": of_row("record_id", bytes(32)),
    "a count": of_row("count", 1),
    "a hash": of_row("sha256", bytes(32)),
}
MANIFEST_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a quality": lambda manifest: manifest["columns"][0]["quality"].update(snr_db=99.0),
    **{what: lambda manifest: None for what in TABLE_EDITS},
}


@pytest.mark.parametrize("what", MANIFEST_EDITS)
def test_a_manifest_that_disagrees_with_the_records_is_named_whatever_its_id(
    every_kind: Path, tmp_path: Path, what: str
) -> None:
    shutil.copytree(every_kind, tmp_path / "c")
    if what in TABLE_EDITS:
        digests = edit_table(tmp_path / "c", TABLE_EDITS[what])
        edit_manifest(tmp_path / "c", lambda manifest: manifest["shards"].__setitem__(0, digests))
    edit_manifest(tmp_path / "c", MANIFEST_EDITS[what])
    for full in (False, True):
        (problem,) = check.find_problems(tmp_path / "c", full=full)
        assert problem.file == "manifest.json" and "in the commit records, so it was edited" in problem.what
    assert prepare_repair(tmp_path / "c", [problem]) == [tmp_path / "c/manifest.json"], "no shard is written again"


@pytest.mark.parametrize(
    "change", [once_more, of_row("bytes", 2**62), of_row("view", 7), of_row("column", "../../etc")]
)
def test_a_table_of_shards_of_other_files_is_refused_whatever_its_hashes(
    tiny_cache: Path, tmp_path: Path, change: Callable[[dict[str, list[Any]]], object]
) -> None:
    shutil.copytree(tiny_cache, tmp_path / "c")
    digests = edit_table(tmp_path / "c", change)
    edit_manifest(tmp_path / "c", lambda manifest: manifest["shards"].__setitem__(0, digests))
    with pytest.raises(ValueError, match=r"views/\d+/.* bytes; the manifest says"):
        open_cache(tmp_path / "c")
    assert [problem.file for problem in check.find_problems(tmp_path / "c")] == ["manifest.json"]


def test_a_damaged_table_of_shards_is_named_and_written_anew_with_the_manifest(
    tiny_cache: Path, tmp_path: Path
) -> None:
    """The commit records say the same, so that nothing else is lost."""
    path, whole = tmp_path / "c", table_file(tiny_cache, 0).read_bytes()
    file, rows = table_file(path, 0), whole.index(b"pixels")
    flipped = whole[:rows] + b"q" + whole[rows + 1 :]
    for content, what in (
        (None, "missing"),
        (whole[:100], "cannot be read"),
        (b"", "cannot be read"),
        (flipped, "column 'column' is not the one of"),
    ):
        shutil.copytree(tiny_cache, path)
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(ValueError, match=f"manifest/000000.arrow: .*{what}.*") as refused:
            open_cache(path)
        assert "run the same extract-features command again" in str(refused.value)
        problems = check.find_problems(path, full=True)
        assert [problem.file for problem in problems] == ["manifest/000000.arrow"]
        doomed = prepare_repair(path, problems)
        assert doomed == [*([file] if content is not None else []), path / "manifest.json"]
        finalise(path, load_plan(path))
        assert (file.read_bytes(), (path / "manifest.json").read_bytes()) == (
            whole,
            (tiny_cache / "manifest.json").read_bytes(),
        )
        assert not check.find_problems(path, full=True) and open_cache(path)
        shutil.rmtree(path)


def test_many_shards_are_told_of_by_many_tables(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its digests in manifest.json, and read when one of its shards is asked for."""
    path = tmp_path / "c"
    shutil.copytree(tiny_cache, path)
    one, plan = read_manifest(path), load_plan(path)
    every = {unit: one.entry(plan, unit) for unit in units(plan)}
    for module in (shard_table, manifests):
        monkeypatch.setattr(module, "SHARDS_IN_TABLE", 2)
    assert [problem.what for problem in check.find_problems(path)] == [
        "it tells of 1 table of shards; the plan wants 2"
    ]
    finalise(path, plan)
    many = read_manifest(path)
    assert len(many["shards"]) == 2 and not check.find_problems(path, full=True) and open_cache(path)
    assert {unit: many.entry(plan, unit) for unit in every} == every and all(every.values())
    table_file(path, 1).unlink()
    assert read_manifest(path).entry(plan, (0, PIXELS, 1)) == every[0, PIXELS, 1], "only what is asked for is read"
    with pytest.raises(ValueError, match=r"manifest/000001\.arrow: cannot be read"):
        read_manifest(path).entry(plan, (0, PIXELS, 2))
    again = pickle.loads(pickle.dumps(many))
    assert again == many and again.entry(plan, (0, PIXELS, 2)) == every[0, PIXELS, 2]
    assert many.entry(plan, (0, PIXELS, 99)) == many.entry(plan, (9, PIXELS, 0)) == {}


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
        lambda manifest: manifest["shards"][0].update(bytes=[]),
        lambda manifest: manifest.update(shards={}),
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
