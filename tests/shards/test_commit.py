"""Commit records and resuming: whatever happens, the same command again ends in the same cache, and no edited record is believed."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import contents
from processes import ends, forked

from mrmae.common import files as write
from mrmae.shards import check, commit, convert
from mrmae.shards.cache import open_cache
from mrmae.shards.commit import committed, finalise, read_record, withdraw_manifest
from mrmae.shards.format import commit_path, plan, read_samples, samples, tail, units, write_samples
from mrmae.shards.format.plan import load_plan
from mrmae.shards.format.spec import content_id
from mrmae.shards.plans import Wanted, agree
from mrmae.shards.store import unit_files

Make = Callable[..., Path]
SMALL = {"n": 6, "size": 16, "grid": 2, "n_views": 1, "shard_samples": 4, "bad": (2,)}


@pytest.fixture(scope="module")
def uninterrupted(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("whole") / "c", **SMALL)


def test_equal_runs_give_equal_manifests_samples_and_shards(
    make_cache: Make, uninterrupted: Path, tmp_path: Path
) -> None:
    again = make_cache(tmp_path / "elsewhere", **SMALL)
    assert contents(again) == contents(uninterrupted)
    text = (again / "manifest.json").read_text()
    assert str(tmp_path) not in text and "seconds" not in text


@pytest.fixture
def path(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted cache, to be altered."""
    return shutil.copytree(uninterrupted, tmp_path / "copy")


class Stopped(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("at", [0, 1, 3, 4, 7, 12, 14, 18, 22, 26])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_stop_at_any_write_is_continued_to_the_same_cache(
    make_cache: Make, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, moment: str
) -> None:
    path, real, calls = tmp_path / "c", write.link_exclusively, iter(range(1000))

    def stopping(temporary: Path, target: Path) -> None:
        stop = next(calls) == at
        if not stop or moment == "after":
            real(temporary, target)
        if stop:
            raise Stopped

    monkeypatch.setattr(write, "link_exclusively", stopping)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with pytest.raises(Stopped):
        make_cache(path, **SMALL)
    assert not (path / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"no plan.json|unfinished .* of 6 shards are committed; .*same extract"):
        open_cache(path)
    make_cache(path, **SMALL)
    assert contents(path) == contents(uninterrupted)


def test_sigkill_leaves_a_state_that_continues(make_cache: Make, uninterrupted: Path, tmp_path: Path) -> None:
    """A real kill, in the middle of a file: the temporary file stays, and is cleared at the end."""
    path, real, calls = tmp_path / "c", write.link_exclusively, iter(range(1000))

    def killing(*names: Path) -> None:
        if next(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)

    def work() -> None:
        write.link_exclusively = killing
        make_cache(path, **SMALL)

    assert ends([forked(work)]) == [-signal.SIGKILL]
    assert list(path.rglob(write.TEMPORARY)) and not (path / "manifest.json").exists()
    make_cache(path, **SMALL)
    assert contents(path) == contents(uninterrupted)


def test_a_full_disk_keeps_what_was_committed(
    make_cache: Make, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, calls = tmp_path / "c", write.write_durably, iter(range(1000))

    def full(file: Path, chunks: Any) -> tuple[int, str]:
        if next(calls) >= 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, chunks)

    monkeypatch.setattr(write, "write_durably", full)
    with pytest.raises(OSError, match="stays valid; free some space, then run the same command again"):
        make_cache(path, **SMALL)
    monkeypatch.undo()
    before = commit.committed(path, plan.load_plan(path))
    assert 0 < len(before) < 6
    times = {unit: commit_path(path, *unit).stat().st_mtime_ns for unit in before}
    make_cache(path, **SMALL)
    assert {unit: commit_path(path, *unit).stat().st_mtime_ns for unit in before} == times, "not redone"
    assert contents(path) == contents(uninterrupted)


@pytest.mark.parametrize("harm", ["delete", "shorten", "lengthen", "record", "empty record"])
@pytest.mark.parametrize("column", ["pixels", "a.pre_tail"])
def test_missing_and_resized_shards_are_written_again(
    make_cache: Make, uninterrupted: Path, tmp_path: Path, harm: str, column: str
) -> None:
    path = tmp_path / "c"
    shutil.copytree(uninterrupted, path)
    made = plan.load_plan(path)
    unit = (0, column, 1)
    file = unit_files(path, made, *unit)[0]
    {
        "delete": lambda: file.unlink(),
        "shorten": lambda: os.truncate(file, file.stat().st_size - 1),
        "lengthen": lambda: os.truncate(file, file.stat().st_size + 512),
        "record": lambda: commit_path(path, *unit).unlink(),
        "empty record": lambda: commit_path(path, *unit).write_bytes(b""),
    }[harm]()
    assert commit.missing(path, made) == [unit]
    make_cache(path, **SMALL)
    assert contents(path) == contents(uninterrupted)


def test_a_committed_shard_is_never_written_twice_and_that_is_no_error(uninterrupted: Path) -> None:
    made, before = plan.load_plan(uninterrupted), contents(uninterrupted)
    commit.store(uninterrupted, made, (0, "pixels", 0), {}, lambda: pytest.fail("nothing is to be written"))
    assert contents(uninterrupted) == before


def other_writer(path: Path, real: Any, times: int) -> Any:
    """publish as `real`, beside a writer that, so many times, puts another file in place of a whole one."""
    left = [times]

    def publish(file: Path, content: Any, *, replace: bool = False) -> Any:
        done = real(file, content, replace=replace)
        if file.suffix == ".tar" and left[0]:
            left[0] -= 1
            other = file.with_name("other")
            other.write_bytes(file.read_bytes())  # as long as ours: only the inode tells
            os.replace(other, file)
        return done

    return publish


def test_a_file_that_another_writer_replaced_is_not_committed_but_written_again(
    make_cache: Make, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr("mrmae.shards.store.tar.publish", other_writer(tmp_path / "c", write.publish, 2))
    make_cache(tmp_path / "c", **SMALL)
    assert contents(tmp_path / "c") == contents(uninterrupted)
    monkeypatch.setattr("mrmae.shards.store.tar.publish", other_writer(tmp_path / "d", write.publish, 99))
    with pytest.raises(
        FileExistsError, match="000000.tar: another process wrote this file, too; each shard has one writer"
    ):
        make_cache(tmp_path / "d", **SMALL)


def test_finalising_early_says_what_is_missing(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", **SMALL, finalise=False)
    made = plan.load_plan(path)
    commit_path(path, 0, "b.pre_tail", 1).unlink()
    with pytest.raises(ValueError, match="1 of 6 shards are not committed, the first is view 0, b.pre_tail, shard 1"):
        commit.finalise(path, made)
    assert not (path / "manifest.json").exists()


def test_which_records_there_are_is_seen_from_listings_and_no_other_is_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, lost, asked = load_plan(path), (0, "a.pre_tail", 1), list[Path]()
    commit_path(path, *lost).unlink()
    shutil.rmtree(commit_path(path, 0, "b.pre_tail", 0).parent)
    real, listed, names = commit.read_record, list[Path](), commit.names_in
    monkeypatch.setattr(commit, "read_record", lambda file: asked.append(file) or real(file))
    monkeypatch.setattr(commit, "names_in", lambda folder: listed.append(folder) or names(folder))
    monkeypatch.setattr(commit, "ASKED_BY_NAME", 5)
    there = {(0, "pixels", 0), (0, "pixels", 1), (0, "a.pre_tail", 0)}
    assert committed(path, made) == there == set(units(made)) - set(commit.missing(path, made))
    assert sorted(asked) == sorted(2 * [commit_path(path, *unit) for unit in there])
    assert sorted(listed) == sorted(2 * [path / "commits" / "0" / column for column in ("pixels", "a.pre_tail", "b.pre_tail")])  # fmt: skip
    assert len(commit.missing(path, made, [0])) == 1 and len(listed) == 6, "few are asked for by name"


@pytest.mark.parametrize("error, counted", [(errno.EACCES, 6), (errno.EIO, 6), (errno.ESTALE, 6), (errno.ENOENT, 0)])
def test_where_a_folder_cannot_be_listed_its_records_are_asked_for_by_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: int, counted: int
) -> None:
    def refusing(folder: Path) -> list[str]:
        raise OSError(error, os.strerror(error), str(folder))

    monkeypatch.setattr(commit, "ASKED_BY_NAME", 0)
    monkeypatch.setattr(os, "listdir", refusing)
    assert len(committed(path, load_plan(path))) == counted


def test_a_compact_record_tells_the_same_sizes_in_four_bytes_each() -> None:
    record = {"heights": [375, 0, 40_000], "widths": [500, 1, 2**31 - 1], "bad": {"1": "no image"}}
    compact = commit.compact(record)
    assert {name: list(value) for name, value in compact.items() if name != "bad"} == {name: record[name] for name in ("heights", "widths")}  # fmt: skip
    assert compact["bad"] == record["bad"] and compact["heights"].nbytes == 12


def test_bad_images_are_listed_before_and_after_the_end(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", **SMALL, finalise=False)
    made = plan.load_plan(path)
    (number,) = commit.bad_images(path, made)
    assert plan.read_sources(path)[number].key == "class 2/bild 002 ü.png"
    assert samples.read_samples(path)["valid"] == [None] * 6
    assert commit.finalise(path, made)["n_valid"] == 5
    table = samples.read_samples(path)
    assert table["valid"] == [i != number for i in range(6)]
    assert table["reason"][number].startswith("not an image") and table["height"][number] == 0


def test_views_that_disagree_about_bad_images_are_refused(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", **SMALL, finalise=False)
    file = commit_path(path, 0, "b.pre_tail", 0)
    record = json.loads(file.read_bytes())
    record["valid"] -= 1
    file.write_text(json.dumps({**record, "record_id": commit.record_id(record)}))
    with pytest.raises(ValueError, match="000000.json: . valid images; the pixels of view 0 have ."):
        commit.finalise(path, plan.load_plan(path))


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
    "a height": ["samples.arrow", "manifest.json"],
    "a reason": ["samples.arrow", "manifest.json"],
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


def test_equal_extractions_have_equal_record_ids(make_cache: Make, uninterrupted: Path, tmp_path: Path) -> None:
    ids = [[json.loads(file.read_bytes())["record_id"] for file in sorted(path.rglob("commits/*/*/*.json"))]
           for path in (uninterrupted, make_cache(tmp_path / "again", **SMALL))]  # fmt: skip
    assert ids[0] == ids[1] and len(set(ids[0])) == 6


def test_record_ids_are_golden_and_know_nothing_of_time_host_and_command() -> None:
    record = {"format_version": 3, "view": 0, "column": "pixels", "shard": 1, "id": "sha256:x", "files": {}, "count": 2, "valid": 1,
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
        == "sha256:a236c4e4baff55e6c307e135076cf12c09d4cbd7b058d4ef2732f576e71f2e0f"
    )


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
    with pytest.raises(ValueError, match="samples.arrow: its rows are not those of the manifest"):
        withdraw_manifest(tmp_path / "c", plan)
    assert (tmp_path / "c/manifest.json").exists()
    write_samples(tmp_path / "c", table)
    withdraw_manifest(tmp_path / "c", plan)
    assert not (tmp_path / "c/manifest.json").exists()
