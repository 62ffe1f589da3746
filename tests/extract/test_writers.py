"""Writers of one cache do not meet: every shard has one writer, changes of the whole wait for nobody else, and no wait is without end."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from contents import contents_without_records as contents
from processes import elsewhere, ends, forked, wait_until

from mrmae.extract import pipeline as engine
from mrmae.extract import run
from mrmae.extract import workers as ranks
from mrmae.extract.inspect.cli import main
from mrmae.shards import check, claims
from mrmae.shards import commit as commits
from mrmae.shards.check import Problem
from mrmae.shards.format.plan import load_plan
from mrmae.shards.repair import prepare_repair

VIT = "vit=timm:test_vit/random"
OPTIONS: dict[str, Any] = {"shard_samples": 4}  # five shards of the photographs


def locks(path: Path) -> list[str]:
    return sorted(file.name for file in path.rglob(".*lock"))


@pytest.fixture(scope="module")
def made(extract: Any, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("alone") / "c"
    extract(photo_folder, cache, VIT, **OPTIONS)
    return cache


@pytest.fixture
def begun(extract: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is planned and calibrated; nothing is committed."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "extract_missing", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(photo_folder, tmp_path / "c", VIT, **OPTIONS)
    return tmp_path / "c"


def test_overlapping_parts_and_a_finishing_command_make_the_same_cache(
    extract: Any, begun: Path, made: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three real processes with the same shards to do."""
    real = commits.clear
    monkeypatch.setattr(commits, "clear", lambda *unit: [time.sleep(0.05), real(*unit), time.sleep(0.05)])
    pids = []
    for shards in ("0/1", "0/1", ""):

        def work(shards: str = shards) -> None:
            wait_until((tmp_path / "go").exists)
            extract(photo_folder, begun, VIT, shards=shards, **OPTIONS)

        pids.append(forked(work))
    (tmp_path / "go").touch()
    assert ends(pids) == [0, 0, 0]
    assert not check.find_problems(begun, full=True) and contents(begun) == contents(made) and not locks(begun)


def test_a_claimed_shard_comes_last_and_is_done_when_its_writer_dies(
    extract: Any, photo_folder: Path, begun: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, order = commits.store_column, []
    monkeypatch.setattr(engine.commits, "store_column", lambda *a: [order.append(a[4]), real(*a)][1])
    with elsewhere(claims.shard_lock(begun, 1)) as process:
        threading.Thread(target=lambda: [wait_until(lambda: len(order) == 4), process.kill()]).start()
        extract(photo_folder, begun, VIT, **OPTIONS)
    assert order == [0, 2, 3, 4, 1] and contents(begun) == contents(made) and not locks(begun)


def test_a_shard_that_another_committed_meanwhile_is_not_computed(
    extract: Any, photo_folder: Path, begun: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process does shard 2 after this one has made its list."""
    real, shown = engine.extract_shard, []

    def unfinished(job: Any, shards: Any) -> Any:
        todo = listed(job, shards)
        monkeypatch.setattr(engine, "unfinished", listed)
        extract(photo_folder, begun, VIT, shards="2/5", **OPTIONS)
        return todo

    listed = engine.unfinished
    monkeypatch.setattr(engine, "unfinished", unfinished)
    monkeypatch.setattr(engine, "extract_shard", lambda *a: [shown.append(a[1]), real(*a)][1])
    extract(photo_folder, begun, VIT, **OPTIONS)
    assert len(shown) == 5, "every shard once"
    assert contents(begun) == contents(made)


def test_the_cache_is_not_changed_while_somebody_writes_shards(made: Path, extract: Any, photo_folder: Path) -> None:
    before = contents(made)
    problem = Problem("tail/vit.safetensors", "as if it were damaged")
    with elsewhere(made / ".lock", shared=True) as process:
        with pytest.raises(ValueError, match=f"process {process.pid} on .* is at work on this cache"):
            prepare_repair(made, [problem])
        done = CliRunner().invoke(main, ["drop", str(made), "vit", "--yes"])
        assert done.exit_code == 1 and f"process {process.pid} on " in done.output, done.output
        assert "is at work on this cache" in done.output.splitlines()[-1]
        extract(photo_folder, made, VIT, **OPTIONS)  # writers of shards do not exclude each other
    with (
        elsewhere(made / ".lock") as process,
        pytest.raises(ValueError, match=f"process {process.pid} on .* is at work on this cache"),
    ):
        extract(photo_folder, made, VIT, **OPTIONS)
    extract(photo_folder, made, VIT, **OPTIONS)
    assert contents(made) == before and not locks(made)


def test_one_process_converts_to_a_folder(made: Path, tmp_path: Path) -> None:
    with elsewhere(tmp_path / "out/.lock") as process:
        done = CliRunner().invoke(main, ["convert", str(made), str(tmp_path / "out"), "--format", "webdataset"])
    assert done.exit_code == 1 and f"process {process.pid} on " in done.output
    assert CliRunner().invoke(main, ["convert", str(made), str(tmp_path / "out")]).exit_code == 0
    assert not check.find_problems(tmp_path / "out", full=True) and not locks(tmp_path / "out")


def test_a_planner_that_dies_is_replaced(
    extract: Any, photo_folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(ranks, "SAY_AFTER_SECONDS", 0.0)
    cache = tmp_path / "c"
    with elsewhere(cache / ".planning.lock") as process:
        threading.Thread(target=lambda: [time.sleep(1), process.kill()]).start()
        assert extract(photo_folder, cache, VIT, shards="1/2", **OPTIONS) == {}
    said = capsys.readouterr().err
    assert "waiting for another process that plans" in said and f"process {process.pid} on " in said
    extract(photo_folder, cache, VIT, **OPTIONS)
    assert contents(cache) == contents(made)


def test_the_second_planner_waits_for_the_first(
    extract: Any, photo_folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command twice at once: one plans and calibrates, the other finds it done; one finishes, so does the other."""
    real = run.calibrated

    def calibrated(job: Any) -> Any:
        with open(tmp_path / "seen", "a") as file:
            file.write(f"{bool(job.plan.quantisers)} ")
        time.sleep(0.5)
        return real(job)

    monkeypatch.setattr(run, "calibrated", calibrated)
    pids = [forked(lambda: extract(photo_folder, tmp_path / "c", VIT, **OPTIONS)) for _ in range(2)]
    assert ends(pids) == [0, 0] and (tmp_path / "seen").read_text() in ("False ", "False True ")
    assert contents(tmp_path / "c") == contents(made)


def test_shards_that_nobody_commits_end_the_wait_by_name(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(ranks, "SAY_AFTER_SECONDS", 0.0)
    with elsewhere(claims.shard_lock(begun, 3)) as process:
        threading.Thread(target=lambda: [time.sleep(1), process.kill()]).start()
        with pytest.raises(ValueError, match=r"10 shards are not committed yet: shard 0 of pixels, view 0; .* and 5 more, since .*"
                           "; nobody is at work on it.*same command again"):  # fmt: skip
            ranks.wait_for_shards(begun, load_plan(begun))
    assert f"process {process.pid} on " in capsys.readouterr().err
    monkeypatch.setattr(ranks, "LONGEST_SECONDS", 0.3)
    with (
        elsewhere(claims.shard_lock(begun, 3)),
        pytest.raises(ValueError, match="process .* is at work on it, and this has waited"),
    ):
        ranks.wait_for_shards(begun, load_plan(begun))


def test_a_plan_that_grew_meanwhile_is_not_finished_by_the_older_command(
    extract: Any, photo_folder: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.wait_for_shards

    def meanwhile(*args: Any) -> None:
        real(*args)
        monkeypatch.setattr(run, "wait_for_shards", real)
        extract(photo_folder, begun, VIT, views=2)

    monkeypatch.setattr(run, "wait_for_shards", meanwhile)
    with pytest.raises(ValueError, match="another command has extended or changed this cache meanwhile"):
        extract(photo_folder, begun, VIT, **OPTIONS)
    assert not check.find_problems(begun, full=True)


def test_a_file_system_without_locks_is_said_once(
    extract: Any, photo_folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(claims, "said", set())
    extract(photo_folder, tmp_path / "c", VIT, **OPTIONS)
    assert capsys.readouterr().err.count("this file system has no locks (No locks available)") == 1
    assert contents(tmp_path / "c") == contents(made) and not locks(tmp_path / "c")
