"""Plan, commit, resume, manifest: whatever happens, the same command again ends in the same cache."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrmae.common import files as write
from mrmae.shards import commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format import commit_path, plan, samples
from mrmae.shards.format.quantiser import Quantiser
from mrmae.shards.format.samples import Source
from mrmae.shards.format.spec import ViewRecipe
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


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


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
    path = tmp_path / "c"
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import conftest
from mrmae.common import files as write
calls, real = iter(range(1000)), write.link_exclusively
def killing(*names):
    if next(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
write.link_exclusively = killing
conftest.write_synthetic_cache(conftest.Path({str(path)!r}), **{SMALL!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
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


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"size": 32}, r"recipe\.size is 16 there and 32"),
    "grid": ({"grid": 4}, r"grid\[0\] is 2 there and 4"),
    "views": ({"n_views": 2}, r"n_views is 1 there and 2"),
    "shards": ({"shard_samples": 3}, r"shard_samples is 4 there and 3"),
    "dtype": ({"dtype": "float16"}, r"dtype is 'int8' there and 'float16'"),
    "teacher": ({"teachers": {"a": {"width": 9, "has_cls": True, "has_attention": True}}}, r"columns is "),
    "more images": ({"n": 7}, r"begun with 6 images and this command has 7: 0 gone, 1 new, 0 changed \(new is"),
    "fewer images": ({"n": 5}, r"1 gone, 0 new, 0 changed \(gone is 'class 2/bild 005"),
    "changed images": ({"seed": 5}, r"0 gone, 0 new, 5 changed"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_other_options_are_refused_and_change_nothing(make_cache: Make, uninterrupted: Path, what: str) -> None:
    change, message = DIFFERENCES[what]
    before = contents(uninterrupted)
    with pytest.raises(ValueError, match=message):
        make_cache(uninterrupted, **{**SMALL, **change})
    assert contents(uninterrupted) == before


def test_a_folder_of_something_else_is_refused(make_cache: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match="no cache .* holds 'thesis.tex'"):
        make_cache(tmp_path, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / "samples.parquet")
    with pytest.raises(ValueError, match="no cache .* holds 'samples.parquet'"):
        make_cache(tmp_path, **SMALL)
    assert (tmp_path / "samples.parquet").read_text() == "do not touch"


def test_a_path_without_a_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cache here .no plan.json.; run extract-features first"):
        open_cache(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        open_cache(tmp_path)
    (tmp_path / "plan.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99; this mrmae reads 2; extract the cache anew"):
        open_cache(tmp_path)


def test_quantisers_are_frozen_once(uninterrupted: Path) -> None:
    made = plan.load_plan(uninterrupted)
    with pytest.raises(ValueError, match=r"quantisers\..*dtype is 'int8' there and 'float16'"):
        plan.freeze_quantisers(uninterrupted, made, {name: Quantiser("float16") for name in made.quantisers})
    with pytest.raises(ValueError, match="one for every column"):
        plan.freeze_quantisers(uninterrupted, made, {})


def test_a_quantiser_of_another_dtype_is_refused(make_cache: Make, tmp_path: Path) -> None:
    made = plan.load_plan(make_cache(tmp_path / "c", **SMALL))
    fresh = dataclasses.replace(made, quantisers={})
    write.publish(tmp_path / "c/plan.json", plan.readable_json(fresh.to_json()), replace=True)
    with pytest.raises(ValueError, match="a quantiser is of fp8; the cache has int8"):
        plan.freeze_quantisers(tmp_path / "c", fresh, {name: Quantiser("fp8") for name in made.quantisers})


def test_plans_survive_json_and_give_the_same_ids(uninterrupted: Path) -> None:
    made = plan.load_plan(uninterrupted)
    again = dataclasses.replace(made)
    assert again.to_json() == made.to_json() == json.loads((uninterrupted / "plan.json").read_bytes())
    assert again.ids == made.ids and set(made.ids) == {"pixels", "a.pre_tail", "b.pre_tail"}


def test_contradictory_plans_are_refused(uninterrupted: Path) -> None:
    made = plan.load_plan(uninterrupted)
    for change, message in (({"columns": made.columns + made.columns[:1]}, "repeat"), ({"n_views": 0}, "0 views"),
                            ({"grid": (3, 3)}, "one grid")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(made, **change)  # type: ignore[arg-type]


def test_a_plan_of_an_unknown_dtype_is_refused(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int8x' is not known; expected int8, fp8, float16"):
        dataclasses.replace(plan.load_plan(uninterrupted), dtype="int8x")


def test_shard_ranges_and_the_default_size() -> None:
    assert plan.shard_ranges(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert plan.default_shard_samples(100, 150_528) == 64
    assert plan.default_shard_samples(6400, 150_528) == 100
    assert plan.default_shard_samples(1_281_167, 150_528) == 512 * 10**6 // 150_528


def test_the_plans_dataset_id_must_be_that_of_the_images(tmp_path: Path) -> None:
    made = plan.Plan("sha256:0", 1, ViewRecipe(size=8), (2, 2), 1, 1, "int8", ())
    with pytest.raises(ValueError, match="dataset id is not that of these images"):
        agree(tmp_path / "c", Wanted(made, rows=[Source("a", None, 1, "00")]))
