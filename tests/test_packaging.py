"""What a stranger installs: the built wheel holds every module, every recipe and the commands."""

import importlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("common", "extract", "kernels", "probe", "shards", "train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, (file.decode() for file in files)):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "src" / name).write_bytes((ROOT / name).read_bytes())
    # The build backend of this environment: the test needs no network.
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(folder)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=folder / "src", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_every_module_and_recipe(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    for layer in LAYERS:
        kinds = {".py", ".yaml", ".html", ".css", ".js", ".typed"}
        sources = [path for path in (ROOT / layer).rglob("*") if path.suffix in kinds]
        wanted = {f"mrmae/{path.relative_to(ROOT).as_posix()}" for path in sources}
        assert f"mrmae/{layer}/py.typed" in wanted
        assert wanted <= shipped, wanted - shipped
        assert any(name.endswith("__init__.py") for name in wanted), layer


def test_wheel_names_every_command(wheel: zipfile.ZipFile) -> None:
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"extract-features", "train-mrmae", "inspect-cache", "probe-features", "show-features"} == set(scripts)
    for name, where in scripts.items():
        assert f"{name} = {where}" in text
        module, function = where.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_wheel_ships_no_tests_and_no_second_top_level(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mrmae"}
