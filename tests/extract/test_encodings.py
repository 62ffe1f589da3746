"""Paths whose bytes are no UTF-8 are refused in one line, by every command, before anything is read or written."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mrmae.extract.cli import main as extract_cli
from mrmae.extract.inspect.cli import main as inspect_cli
from mrmae.extract.run import Options, extract_features
from mrmae.probe.cli import main as probe_cli
from mrmae.probe.job import ProbeOptions
from mrmae.probe.run import probe_features
from mrmae.shards.cache import open_cache
from mrmae.train.cli import main as train_cli
from mrmae.train.loop import train
from mrmae.train.method.recipe import load_recipe

LATIN = os.fsdecode(b"caf\xe9")
SHOWN = r"b'[^']*caf\\xe9[^']*'"


def nothing_done(*_: Any, **__: Any) -> None:
    raise AssertionError("slow work began before the paths were checked")


@pytest.fixture(autouse=True)
def slow_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("mrmae.extract.run.list_sources", "mrmae.train.run.open_needed", "mrmae.probe.job.open_source",
                  "mrmae.shards.convert.agree"):  # fmt: skip
        monkeypatch.setattr(place, nothing_done)


@pytest.mark.parametrize(
    "main, words, named",
    [
        (extract_cli, [f"/{LATIN}", "OUT/new"], "IMAGES"),
        (extract_cli, ["CACHE", f"OUT/{LATIN}"], "CACHE"),
        (extract_cli, ["CACHE", "OUT/new", "--include", LATIN], "--include"),
        (extract_cli, ["CACHE", "OUT/new", "--teacher", f"a=timm:vit@{LATIN}"], "--teacher"),
        (inspect_cli, ["show", LATIN], "CACHE"),
        (inspect_cli, ["convert", "CACHE", f"OUT/{LATIN}"], "OUT"),
        (inspect_cli, ["pictures", "CACHE", "--out", f"OUT/{LATIN}.png"], "--out"),
        (train_cli, [LATIN, "OUT/run"], "CACHE"),
        (train_cli, ["CACHE", f"OUT/{LATIN}"], "OUT"),
        (train_cli, ["CACHE", f"OUT/{LATIN}", "--dry-run"], "OUT"),
        (train_cli, ["CACHE", "OUT/run", "--init", LATIN], "--init"),
        (probe_cli, [LATIN, "CACHE"], "SOURCE"),
        (probe_cli, ["CACHE#a", LATIN], "DATA"),
        (probe_cli, ["CACHE#a", "CACHE", "--out", LATIN], "--out"),
    ],
)
def test_every_command_names_the_path_and_shows_its_bytes(
    tiny_cache: Path, tmp_path: Path, main: Any, words: list[str], named: str
) -> None:
    given = [word.replace("CACHE", str(tiny_cache)).replace("OUT", str(tmp_path)) for word in words]
    result = CliRunner().invoke(main, given)
    assert result.exit_code in (1, 2), result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]

    assert re.search(rf"{named} {SHOWN}: these bytes are not UTF-8", line), line
    assert not list(tmp_path.iterdir())


def test_the_functions_refuse_them_too(tiny_cache: Path, tmp_path: Path) -> None:
    strange = tmp_path / LATIN
    with pytest.raises(ValueError, match=rf"IMAGES {SHOWN}"):
        extract_features(Options([strange], tmp_path / "new"))
    with pytest.raises(ValueError, match=rf"CACHE {SHOWN}"):
        open_cache(strange)
    with pytest.raises(ValueError, match=rf"OUT {SHOWN}"):
        train(tiny_cache, strange, load_recipe("mr-mae"))
    with pytest.raises(ValueError, match=rf"--out {SHOWN}"):
        probe_features(ProbeOptions(f"{tiny_cache}#a", [str(tiny_cache)], out=strange))


def test_the_folder_a_command_is_given_in_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LATIN).mkdir()
    monkeypatch.chdir(tmp_path / LATIN)
    with pytest.raises(ValueError, match=rf"the working folder {SHOWN}"):
        extract_features(Options(["photos"], Path("new")))
