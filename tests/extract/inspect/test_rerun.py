"""repair --run: a recorded command is data; only ours is shown and run, from anywhere, and nothing that runs code."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from contents import contents

from mrmae.extract.inspect.cli import main as inspect_cache
from mrmae.extract.recorded import told_command
from mrmae.extract.teachers.address import parse_teacher

Make = Callable[..., Path]


def repair(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(inspect_cache, ["repair", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def damaged(make_cache: Make, tmp_path: Path) -> Callable[[str], Path]:
    """A cache with a damaged shard, whose records tell the given command."""

    def make(command: str) -> Path:
        path = make_cache(tmp_path / "c", n=4, size=16, grid=2, n_views=1, shard_samples=4)
        for file in path.glob("commits/*/*/*.json"):
            about = {"command": command.replace("CACHE", str(path)), "folder": str(tmp_path), "written": 1}
            file.write_text(json.dumps({**json.loads(file.read_bytes()), **about}))
        (path / "views/0/pixels/000000.tar").write_bytes(b"")
        return path

    return make


@pytest.mark.parametrize("option", ["--allow-torchscript", "--dry-run", "--traceback", "-h", "--help", "--shards 0/2", "--max-bad=3",
                                    "--nonsense"])  # fmt: skip
def test_a_recorded_option_that_mrmae_does_not_write_is_refused_and_nothing_changed(
    damaged: Callable[[str], Path], option: str
) -> None:
    path = damaged(f"extract-features photos CACHE --teacher x=timm:test_vit/random {option}")
    before = contents(path)
    code, text = repair(path, "--run", "--yes")
    assert code == 1 and f"{option.split()[0]} " in text and "run it yourself (nothing was changed)" in text
    assert contents(path) == before


@pytest.mark.parametrize("command", [
    "rm -rf CACHE", "python evil.py CACHE", "inspect-cache drop CACHE x", "extract-features", "extract-features CACHE", "'", "",
    "extract-features 'a\nrm -rf b' CACHE", "extract-features '\x1b[2J' CACHE", "inspect-cache convert CACHE",
])  # fmt: skip
def test_what_is_no_command_of_ours_is_neither_shown_nor_run(damaged: Callable[[str], Path], command: str) -> None:
    path = damaged(command)
    before = contents(path)
    code, text = repair(path, "--dry-run")
    assert code == 0 and "the extract-features command that made this cache" in text
    assert "rm -rf" not in text and "evil" not in text and "\x1b" not in text
    code, text = repair(path, "--run", "--yes")
    assert code == 1 and "no commit record tells a command" in text and contents(path) == before


@pytest.mark.parametrize("record", [None, [], {}, {"command": None, "folder": "/"}, {"command": 5, "folder": "/"},
                                    {"command": "extract-features a b", "folder": "relative"}])  # fmt: skip
def test_records_that_tell_nothing_tell_nothing(record: object) -> None:
    assert told_command(record) is None


def test_the_command_is_run_from_anywhere_and_nothing_of_its_folder_is_imported(
    extract: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for folder in (there, elsewhere):
        folder.mkdir()
    (there / "photos").symlink_to(photo_folder)
    torch.save(timm.create_model("test_vit").state_dict(), there / "w.pth")
    monkeypatch.chdir(there)
    extract("photos", Path("c"), "vit=timm:test_vit@w.pth")
    whole = {name: data for name, data in contents(there / "c").items() if not name.startswith("commits/")}
    (there / "click.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (there / "c/views/0/vit.pre_tail.zarr/tokens/c/0/0/0").write_bytes(b"")
    monkeypatch.chdir(elsewhere)
    code, text = repair(there / "c")
    assert code == 1 and "--yes was expected" in text
    code, text = repair(there / "c", "--run", "--yes")
    assert code == 0, text
    assert f"cd {shlex.quote(str(there))}\n  extract-features photos c --teacher vit=timm:test_vit@w.pth" in text
    assert {name: data for name, data in contents(there / "c").items() if not name.startswith("commits/")} == whole
    assert not (tmp_path / "executed").exists() and not list(elsewhere.iterdir())


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_a_models_options_name_no_place_of_weights(key: str) -> None:
    with pytest.raises(
        ValueError, match=f"x=timm:test_vit: .{key}= names a place of weights; .*give weights with /TAG or @FILE"
    ):
        parse_teacher(f"x=timm:test_vit?{key}=w.pth")
