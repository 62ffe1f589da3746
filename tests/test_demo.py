"""`make demo`: what it carries, what it runs, and what it says on its page; and how `make` tells of a failed installation."""

import importlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def examples() -> Iterator[Callable[[str], Any]]:
    """Imports a file of examples/."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))


def test_the_embedded_data_are_what_their_script_makes(
    examples: Callable[[str], Any], real_file: Callable[[str], Path]
) -> None:
    make = examples("make_data")
    assert make.tiles_tar(real_file("data/eurosat-rgb.tar")) == (make.DATA / make.TILES).read_bytes()
    made = make.half_weights(real_file("weights/galileo_nano_s2rgb_p8.safetensors"))
    assert made == (make.DATA / make.TEACHER).read_bytes()


def test_tiles_are_chosen_by_their_names_alone_and_equally_from_every_class(examples: Callable[[str], Any]) -> None:
    make = examples("make_data")
    names = [f"{part}/{label}/{label}_{i}.jpg" for part in ("train", "test") for label in "ab" for i in range(90)]
    chosen = make.chosen_tiles(names)
    assert chosen == make.chosen_tiles(names[::-1])
    for part, n in make.PER_CLASS.items():
        for label in "ab":
            assert sum(name.startswith(f"{part}/{label}/") for name in chosen) == n


def test_the_embedded_teacher_gives_the_features_of_its_fp32_weights(
    examples: Callable[[str], Any], real_file: Callable[[str], Path]
) -> None:
    import torch

    from mrmae.extract.teachers import build_teacher, parse_teacher

    address = examples("demo").GALILEO
    half, _, options = address.partition("@")[2].partition("?")
    whole = real_file("weights/galileo_nano_s2rgb_p8.safetensors")
    pixels = torch.randint(256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for file in (ROOT / "examples" / "data" / Path(half).name, whole):
        text = f"{address.partition('@')[0]}@{file}?{options}"
        how: dict[str, Any] = {"grid": 8, "view_size": 64, "device": "cpu", "precision": "fp32"}
        found.append(build_teacher(parse_teacher(text), **how).forward(pixels).tokens)
    assert found[0].shape == (8, 64, 128)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 2e-3


@pytest.fixture(scope="module")
def few_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the embedded images: six of each class to train on, two to test on."""
    path, left = tmp_path_factory.mktemp("tiles") / "tiles.tar", {"train": 6, "test": 2}
    taken: dict[str, int] = {}
    with tarfile.open(ROOT / "examples" / "data" / "eurosat.tar") as old, tarfile.open(path, "w") as new:
        for member in old:
            group = member.name.rpartition("/")[0]
            taken[group] = taken.get(group, 0) + 1
            if taken[group] <= left[group.partition("/")[0]]:
                new.addfile(member, old.extractfile(member))
    return path


def run_here(command: list[str], name: str, out: Path, state: dict[str, Any]) -> None:
    """In place of a process per command, which would import torch eight times."""
    from mrmae.extract.cli import main as extract_features
    from mrmae.probe.cli import main as probe_features
    from mrmae.probe.show_cli import main as show_features
    from mrmae.train.cli import main as train_mrmae

    known = {"extract-features": extract_features, "train-mrmae": train_mrmae, "probe-features": probe_features,
             "show-features": show_features}  # fmt: skip
    known[command[0]].main(command[1:], standalone_mode=False)
    state["took"][name] = [2.0, 1.0]


@pytest.fixture(scope="module")
def made(
    examples: Callable[[str], Any], few_tiles: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Result]:
    """Runs the demo on few images for an epoch, the first time it is called, in one folder: `.out`."""
    demo, out = examples("demo"), tmp_path_factory.mktemp("demo") / "out"

    def run(*words: str) -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv("OMP_NUM_THREADS", "1")
            for name, value in {"TILES": few_tiles, "QUICK_EPOCHS": 1, "run": run_here}.items():
                patch.setattr(demo, name, value)
            return CliRunner().invoke(demo.main, ["--out", str(out), *words])

    run.out = out  # type: ignore[attr-defined]
    return run


def test_the_demo_ends_with_a_page_of_what_it_measured_and_says_so_again(
    examples: Callable[[str], Any], made: Any
) -> None:
    first = made("--quick")
    assert first.exit_code == 0, first.output
    text, found = (made.out / "index.html").read_text(), examples("demo_page").comparison(made.out)
    assert (found["n_train"], found["n_test"], found["n_classes"]) == (60, 20, 10)
    assert {row["kind"] for row in found["rows"]} == {"given", "pixels", "untrained"}
    for row in found["rows"][:3]:
        assert f"{100 * row['accuracy']:.1f}" in text, row
    assert "All is done" in made("--quick").output
    other = made()
    assert other.exit_code and "holds a demo with quick true, not false" in other.output


def test_a_browser_shows_the_demo_s_page(made: Any, open_page: Callable[..., Any]) -> None:
    made("--quick")
    with open_page(made.out / "index.html") as page:
        assert page.locator(".plot svg.main-svg").count() >= 4
        assert page.locator("figure.slider").count() == 2
        assert page.locator("h1").inner_text() == "mrmae: what the demo has measured"


def test_what_has_ended_well_is_not_run_again_and_what_failed_is(
    examples: Callable[[str], Any], tmp_path: Path
) -> None:
    demo = examples("demo")
    state: dict[str, Any] = {"took": {}, "done": []}
    with pytest.raises(SystemExit):
        demo.run(["python", "-c", "raise SystemExit(3)"], "step", tmp_path, state)
    assert state["done"] == [] and state["took"]["step"][0] > 0
    mark = tmp_path / "mark"
    for _ in range(2):
        demo.run(["python", "-c", f"open({str(mark)!r}, 'a').write('x')"], "step", tmp_path, state)
    assert mark.read_text() == "x" and state["done"] == ["step"]
    assert json.loads((tmp_path / "demo.json").read_text()) == state


def test_differences_are_read_either_way_round_and_the_verdict_follows_the_interval(
    examples: Callable[[str], Any],
) -> None:
    page = examples("demo_page")
    pair = {"a": "x", "b": "y", "difference": 0.02, "interval": [-0.01, 0.06]}
    found = {"differences": [pair], "n_test": 100}
    assert page.difference(found, "x", "y") == pytest.approx((2, -1, 6))
    assert page.difference(found, "y", "x") == pytest.approx((-2, -6, 1))
    accuracies = {"mr-mae": (52.0, 45.0, 60.0), "mae": (50.0, 41.0, 58.0)}
    assert page.verdict(accuracies, (2, -1, 6), found).endswith(
        "+2.0 points (-1.0 to +6.0); the interval holds zero, so neither is ahead."
    )
    assert page.verdict(accuracies, (-3, -5, -1), found).endswith(
        "-3.0 points (-5.0 to -1.0); the interval excludes zero."
    )


def test_photographs_get_the_hub_s_teachers_or_the_demo_s_own_said_aloud(
    examples: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, ran = examples("demo"), []
    monkeypatch.setattr(demo, "run", lambda command, *_: ran.append(command))
    photos = tmp_path / "photos"
    photos.mkdir()
    for teachers, reason in (([demo.GALILEO], "no network"), (list(demo.HUB), "")):
        monkeypatch.setattr(demo, "choose_teachers", lambda found=(teachers, reason): found)
        out = tmp_path / ("hub" if not reason else "own")
        made = CliRunner().invoke(demo.main, ["--images", str(photos), "--out", str(out)], catch_exceptions=False)
        assert ("SATELLITE IMAGES only" in made.output) == bool(reason)
        assert [word for word in ran[-2] if "timm:" in word or "open_clip:" in word] == teachers
        assert "--batch-size" not in ran[-1], "a folder may be smaller than any batch: the run's own default fits it"
        assert json.loads((out / "demo.json").read_text())["teachers"] == teachers


@pytest.mark.skipif(not shutil.which("make"), reason="NO MAKE: GNU make is not installed")
def test_a_failed_installation_is_one_line_that_names_the_error_and_the_log(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "-c*) ;;\n"
        '*venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;\n'
        '*editable*) echo "Collecting torch"; echo "ERROR: No matching distribution found for torch"; echo "[notice] noise"; exit 1;;\n'
        "*) echo noise;;\n"
        "esac\n"
    )
    fake.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    made = subprocess.run(["make", f"PYTHON={fake}", "test"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode
    first = made.stderr.splitlines()[0]
    assert first == ("installing into .venv failed: ERROR: No matching distribution found for torch;"
                     " all output is in .venv/install.log")  # fmt: skip
    assert "noise" not in made.stdout + made.stderr
    assert "Collecting torch" in (tmp_path / ".venv" / "install.log").read_text()
