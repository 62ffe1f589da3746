"""Commands that remove or replace something: only what they are for, said beforehand, and never unasked."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from contents import contents

from mrmae.extract.inspect.cli import ask, main

Make = Callable[..., Path]


def inspect(*arguments: Any, **options: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments], **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(params=["zarr", "webdataset"])
def cache(make_cache: Make, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return make_cache(tmp_path / "c", n=4, size=16, grid=2, n_views=1, shard_samples=4, format=request.param)


@pytest.mark.parametrize("name", ["pixels", "a", "0", "..", "../..", "pixels/..", "a.pre_tail/..", "..pre_tail", "a.", ".zarr",
                                  "", "/", "pixels.x", "commits"])  # fmt: skip
def test_drop_removes_columns_of_the_plan_only(cache: Path, name: str) -> None:
    if name == "a":  # the name of a teacher stands for its one column; with a second it says which there are
        name = "c"
    before = contents(cache)
    code, text = inspect("drop", cache, name, "--yes")
    assert code == 1 and "there is no column" in text and "Traceback" not in text
    assert contents(cache) == before


def test_drop_says_what_goes_and_nothing_goes_unasked(cache: Path) -> None:
    before = contents(cache)
    doomed = {name for name in before if "b.pre_tail" in name or "/b/" in name or name == "tail/b.safetensors"}
    n_bytes = sum(len(before[name]) for name in doomed)
    for answer in (None, "y\n"):
        code, text = inspect("drop", cache, "b", input=answer)
        assert code == 1 and f"b.pre_tail in 1 view is {len(doomed)} files, {n_bytes / 1e3:.3g} kB" in text
        assert "there is no terminal to ask at; --yes was expected" in text
        assert contents(cache) == before
    code, text = inspect("drop", cache, "b", "--yes")
    assert code == 0 and "b.pre_tail is gone" in text
    left = contents(cache)
    assert set(before) - set(left) == doomed
    assert {name for name in left if left[name] != before[name]} == {
        "plan.json",
        "manifest.json",
        "manifest/000000.arrow",
    }


def test_drop_removes_what_a_killed_drop_left(cache: Path, tmp_path: Path, make_cache: Make) -> None:
    shutil.copytree(cache, tmp_path / "whole")
    assert inspect("drop", cache, "b", "--yes")[0] == 0
    small = contents(cache)
    for name in ("commits/0/b.pre_tail", "views/0/b.pre_tail.zarr", "views/0/b"):
        if (tmp_path / "whole" / name).exists():
            shutil.copytree(tmp_path / "whole" / name, cache / name)
    assert contents(cache) != small
    assert inspect("drop", cache, "b.pre_tail", "--yes")[0] == 0
    assert contents(cache) == small


@pytest.mark.parametrize("name", ["commits/0/a.pre_tail/000000.json", "tail/a.safetensors", "samples.arrow"])
def test_drop_leaves_a_damaged_cache_as_it_is(cache: Path, name: str) -> None:
    content = (cache / name).read_bytes()
    (cache / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = contents(cache)
    code, text = inspect("drop", cache, "b", "--yes")
    assert code == 1 and f"{name}: " in text
    assert contents(cache) == before


def test_repair_says_what_goes_and_nothing_goes_unasked(cache: Path) -> None:
    (cache / "views/0/pixels/000000.tar").write_bytes(b"")
    before = contents(cache)
    code, text = inspect("repair", cache)
    assert (
        code == 1 and "to be removed: 2 files" in text and "there is no terminal to ask at; --yes was expected" in text
    )
    assert contents(cache) == before
    code, text = inspect("repair", cache, "--yes")
    assert code == 0 and set(before) - set(contents(cache)) == {"manifest.json", "commits/0/pixels/000000.json"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_a_person_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        with pytest.raises(click.Abort):
            ask("Remove it?", False)
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    ask("Remove it?", False)


def test_a_cache_is_not_converted_into_itself(cache: Path) -> None:
    before = contents(cache)
    for out in (cache, cache / "views" / "new"):
        code, text = inspect("convert", cache, out, "--dtype", "float16")
        assert code == 1 and "lies in, the cache to convert" in text
    assert contents(cache) == before


def test_a_picture_takes_the_place_of_pictures_only(cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("mine")
    for file in (mine, cache / "plan.json"):
        before = file.read_bytes()
        code, text = inspect("pictures", cache, "--out", file, "--samples", 1)
        assert code == 1 and "is no PNG" in text and file.read_bytes() == before
    for _ in range(2):
        assert inspect("pictures", cache, "--out", tmp_path / "new.png", "--samples", 1)[0] == 0
