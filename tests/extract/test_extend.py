"""Teachers and views are added to a finished cache, and dropped: what was there stays, and the end is as if made at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from contents import contents_without_records as contents

from mrmae.extract import asked_teachers, run
from mrmae.extract.inspect.cli import main
from mrmae.shards.cache import open_cache

Make = Callable[..., Path]
VIT, CNN = "vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random"


def times(path: Path) -> dict[str, int]:
    return {file.relative_to(path).as_posix(): file.stat().st_mtime_ns
            for folder in ("views", "commits") for file in (path / folder).rglob("*") if file.is_file()}  # fmt: skip


def built_only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Fail when another teacher than these is built."""
    real = asked_teachers.build_teacher

    def build(request: Any, **options: Any) -> Any:
        assert request.name in names, f"{request.name} was built, although nothing of it is missing"
        return real(request, **options)

    monkeypatch.setattr(asked_teachers, "build_teacher", build)


def test_teachers_and_views_added_later_make_the_same_cache(
    extract: Any, photo_folder: Path, extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    extract(photo_folder, cache, VIT, shard_samples=8)
    before = times(cache)
    with monkeypatch.context() as patch:
        built_only(patch, "cnn")
        extract(photo_folder, cache, CNN, VIT)  # in any order, and the size of shards need not be repeated
        assert set(open_cache(cache).columns) == {"vit.pre_tail", "cnn.last"}
        after = times(cache)
        assert {name: after[name] for name in before} == before, "what was there is untouched"
        built_only(patch)
        extract(photo_folder, cache, VIT, CNN)
    extract(photo_folder, cache, VIT, CNN, views=2)
    after = times(cache)
    assert {name: after[name] for name in before} == before
    assert contents(cache) == contents(extracted)


def test_an_extension_stopped_anywhere_continues(
    extract: Any, photo_folder: Path, extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    extract(photo_folder, cache, VIT, shard_samples=8)
    for name in ("calibrated", "extract_missing"):
        with monkeypatch.context() as patch:
            patch.setattr(run, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                extract(photo_folder, cache, VIT, CNN, views=2)
        with pytest.raises(ValueError, match="unfinished .*: 6 of 18 shards are committed"):
            open_cache(cache)
    extract(photo_folder, cache, VIT, CNN, views=2)
    assert contents(cache) == contents(extracted)


def test_a_missing_tail_or_shard_builds_its_teacher_again(
    extract: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    extract(photo_folder, cache, VIT, CNN)
    whole = contents(cache)
    (cache / "tail/vit.safetensors").unlink()
    (cache / "views/0/cnn.last.zarr/norm/c/1/0").unlink()
    extract(photo_folder, cache, VIT, CNN)
    assert contents(cache) == whole


def test_what_is_no_addition_is_refused(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    extract(photo_folder, cache, VIT, views=2)
    before = contents(cache)
    refusals: list[tuple[list[str], dict[str, Any], str]] = [
        (
            [CNN],
            {"views": 2},
            "the cache has column vit.pre_tail, which this command does not ask for; .*inspect-cache drop",
        ),
        ([VIT, CNN], {"views": 1}, "n_views is 2 there and 1"),
        ([VIT + "?interpolation=bilinear", CNN], {"views": 2}, r"columns\[0\].interpolation is 'bicubic' there"),
        ([VIT], {"views": 2, "grid": 8}, r"c/plan.json: grid\[0\] is 4 there and 8 in this command"),
    ]
    for teachers, options, message in refusals:
        with pytest.raises(ValueError, match=message):
            extract(photo_folder, cache, *teachers, **options)
    assert contents(cache) == before


def test_a_dropped_column_leaves_the_cache_as_without_it(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    extract(photo_folder, tmp_path / "one", VIT)
    extract(photo_folder, tmp_path / "both", VIT, CNN)
    runner = CliRunner()
    assert runner.invoke(main, ["drop", str(tmp_path / "both"), "cnn"], input="n\n").exit_code == 1
    assert "no column 'x'" in runner.invoke(main, ["drop", str(tmp_path / "both"), "x", "--yes"]).output
    assert set(open_cache(tmp_path / "both").columns) == {"vit.pre_tail", "cnn.last"}
    done = runner.invoke(main, ["drop", str(tmp_path / "both"), "cnn", "--yes"])
    assert done.exit_code == 0 and "cnn.last is gone; it holds vit.pre_tail" in done.output
    assert contents(tmp_path / "both") == contents(tmp_path / "one")
    assert runner.invoke(main, ["verify", str(tmp_path / "both"), "--full"]).exit_code == 0


@pytest.mark.parametrize("at", ["publish", "commits.finalise", "remove_empty"])
def test_a_drop_killed_anywhere_goes_on_with_the_same_words(
    make_cache: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Also where the plan knows the teacher's name no more."""
    whole, cache = (make_cache(tmp_path / name, n=4) for name in ("whole", "killed"))
    assert CliRunner().invoke(main, ["drop", str(whole), "b", "--yes"]).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(f"mrmae.shards.drop.{at}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert CliRunner().invoke(main, ["drop", str(cache), "b", "--yes"]).exit_code == 1
    assert contents(cache) != contents(whole) or at == "remove_empty"
    done = CliRunner().invoke(main, ["drop", str(cache), "b", "--yes"])
    assert done.exit_code == 0 and contents(cache) == contents(whole), done.output
    assert not list(cache.rglob("b.*"))


def test_dropping_from_an_unfinished_cache_keeps_it_unfinished(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", n=6, n_views=1, shard_samples=3, finalise=False)
    (path / "commits/0/a.pre_tail/000001.json").unlink()
    assert CliRunner().invoke(main, ["drop", str(path), "b.pre_tail", "--yes"]).exit_code == 0
    assert not (path / "manifest.json").exists() and not (path / "views/0/b.pre_tail.zarr").exists()
    assert list(json.loads((path / "plan.json").read_text())["quantisers"]) == ["a.pre_tail"]
