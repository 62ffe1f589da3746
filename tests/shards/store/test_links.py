"""A cache is a folder of plain files: no link is followed out of it, no FIFO read, no path taken from what it says."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contents import contents

from mrmae.extract.inspect.show import description
from mrmae.shards import check, commit
from mrmae.shards.cache import open_cache
from mrmae.shards.drop import drop_column
from mrmae.shards.format import plan
from mrmae.shards.format.spec import content_id
from mrmae.shards.plans import Wanted, agree
from mrmae.shards.repair import files_to_remove, prepare_repair
from mrmae.shards.store import links

Make = Callable[..., Path]


@pytest.fixture
def cache(make_cache: Make, tmp_path: Path) -> Path:
    return make_cache(tmp_path / "c", n=4, size=16, grid=2, n_views=1, shard_samples=4)


def moved_and_linked(name: str) -> Callable[[Path, Path], str]:
    """What stood there lies outside now, whole, and a link stands for it."""

    def change(cache: Path, outside: Path) -> str:
        shutil.move(cache / name, outside / Path(name).name)
        (cache / name).symlink_to(outside / Path(name).name)
        return name

    return change


def endless(cache: Path, _: Path) -> str:
    (cache / "tail/a.safetensors").unlink()
    (cache / "tail/a.safetensors").symlink_to("/dev/zero")
    return "tail/a.safetensors"


def fifo(name: str) -> Callable[[Path, Path], str]:
    def change(cache: Path, _: Path) -> str:
        (cache / name).unlink()
        os.mkfifo(cache / name)
        return name

    return change


def folder(cache: Path, _: Path) -> str:
    (cache / "samples.arrow").unlink()
    (cache / "samples.arrow").mkdir()
    return "samples.arrow"


FOREIGN = {
    "a linked record": moved_and_linked("commits/0/pixels/000000.json"),
    "linked records": moved_and_linked("commits/0"),
    "a linked shard": moved_and_linked("views/0/b.pre_tail.zarr/tokens/c/0/0/0"),
    "linked views": moved_and_linked("views"),
    "a linked plan": moved_and_linked("plan.json"),
    "a tail without end": endless,
    "a plan nobody writes": fifo("plan.json"),
    "a manifest nobody writes": fifo("manifest.json"),
    "a record nobody writes": fifo("commits/0/a.pre_tail/000000.json"),
    "a folder": folder,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_plain_file_is_named_and_neither_read_nor_written(cache: Path, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    made, sources = plan.load_plan(cache), plan.read_sources(cache)
    name = FOREIGN[kind](cache, outside)
    before = contents(outside)
    assert [problem.file for problem in check.find_problems(cache, full=True)] == [name]
    attempts: list[Callable[[], Any]] = [
        lambda: open_cache(cache),
        lambda: open_cache(cache, allow_partial=True),
        lambda: description(cache),
        lambda: drop_column(cache, "b.pre_tail"),
        lambda: files_to_remove(cache, check.find_problems(cache)),
        lambda: agree(cache, Wanted(made)),
        lambda: agree(cache, Wanted(made, rows=sources)),
    ]
    for attempt in attempts:
        with pytest.raises((ValueError, OSError), match=f"{name}.*(link|neither a file|is a folder|no regular file)"):
            attempt()
    assert contents(outside) == before


def test_a_linked_shard_is_not_committed(cache: Path, tmp_path: Path) -> None:
    made = plan.load_plan(cache)
    moved_and_linked("views/0/b.pre_tail.zarr/tokens/c/0/0/0")(cache, tmp_path)
    assert commit.missing(cache, made) == [(0, "b.pre_tail", 0)]


def test_the_cache_itself_may_be_a_link_and_other_files_may_lie_beside_its_own(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache)
    (cache / "notes").symlink_to("/dev/zero")
    assert check.find_problems(tmp_path / "link", full=True) == []
    assert len(open_cache(tmp_path / "link").numbers) == 4
    assert links.foreign_entries(tmp_path / "nowhere") == {}


def forged(cache: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest with a change, and with the id that belongs to it."""
    manifest = json.loads((cache / "manifest.json").read_bytes())
    change(manifest)
    body = {name: value for name, value in manifest.items() if name != "manifest_id"}
    (cache / "manifest.json").write_text(json.dumps({**body, "manifest_id": content_id(body)}))


def test_no_path_of_a_manifest_is_used(cache: Path, tmp_path: Path) -> None:
    """Neither read nor removed: what a manifest names is compared with what the plan says, and that is all."""
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    whole = (cache / "manifest.json").read_bytes()

    def tail(manifest: dict[str, Any]) -> None:
        manifest["columns"][0]["tail"] = {"file": "../victim.txt", "bytes": 5, "sha256": ""}

    forged(cache, tail)
    with pytest.raises(ValueError):
        open_cache(cache)
    problems = check.find_problems(cache, full=True)
    assert problems and not any("victim" in problem.file for problem in problems)
    prepare_repair(cache, problems)
    assert victim.read_text() == "mine"
    (cache / "manifest.json").write_bytes(whole)


def test_no_path_of_a_commit_record_is_used(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "victim.txt").write_text("mine")
    (cache / "manifest.json").unlink()
    record = cache / "commits/0/pixels/000000.json"
    about = json.loads(record.read_bytes())
    about["files"]["../victim.txt"] = {"bytes": 4, "sha256": ""}
    about["record_id"] = commit.record_id(about)
    record.write_text(json.dumps(about))
    problems = check.find_problems(cache, full=True)
    assert any("which is no file of this shard" in str(problem) for problem in problems)
    assert record in prepare_repair(cache, problems) and (tmp_path / "victim.txt").exists()
