"""show-features: what the picture shows is what the models say, and what cannot be shown is said in a line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mrmae.common.pictures import Strip, as_bytes, draw_sheet, heat, pca_rgb
from mrmae.extract.teachers import build_teacher, parse_teacher
from mrmae.probe import show
from mrmae.probe.show_cli import main

VIT = "vit=timm:test_vit/random"


def run(*words: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def two(images: Path) -> list[Path]:
    return sorted((images / "test").rglob("*.png"))[:5:4]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Strip]:
    """The columns of the last picture, by heading."""
    found: dict[str, Strip] = {}

    def draw(strips: list[Strip], **how: Any) -> Image.Image:
        found.clear()
        found.update({strip.heading: strip for strip in strips})
        return draw_sheet(strips, **how)

    monkeypatch.setattr(show, "draw_sheet", draw)
    return found


def test_a_picture_shows_each_model_on_the_same_views_and_no_cache_is_made(
    two: list[Path], trained: Path, tmp_path: Path, shown: dict[str, Strip], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = run(*two, "--teacher", VIT, "--teacher", "cnn=timm:test_resnet/random", "--student", trained)
    assert (
        code == 0 and text.splitlines()[-1] == "features.png" and "the student's teachers have RANDOM weights" in text
    )
    assert [path.name for path in tmp_path.iterdir()] == ["features.png"]
    assert list(shown) == ["view", *(f"{model}{what}" for model, whats in (
        ("vit.pre_tail", ("", ", attention", ", similarity")), ("cnn.last", ("", ", norm", ", similarity")),
        ("student.post_ln", ("", ", attention", ", similarity"))) for what in whats)]  # fmt: skip
    assert shown["view"].captions == [path.name for path in two]
    views = torch.from_numpy(np.stack([show.whole_view(path, 32, 10**6) for path in two]))  # the student's 32 px, 4 x 4
    teacher = build_teacher(parse_teacher(VIT), grid=4, view_size=32, device="cpu", precision="fp32")
    found = teacher.forward(views)
    assert found.attention is not None
    assert np.array_equal(shown["vit.pre_tail"].pictures, as_bytes(pca_rgb(found.tokens, (4, 4))))
    assert np.array_equal(shown["vit.pre_tail, attention"].pictures, heat(found.attention, (4, 4)))
    assert shown["vit.pre_tail"].warning == "RANDOM WEIGHTS" and shown["student.post_ln"].warning == ""


def test_similarity_is_highest_at_the_patch_that_is_framed(
    two: list[Path], tmp_path: Path, shown: dict[str, Strip]
) -> None:
    words = [*two, "--teacher", VIT, "--size", 32, "--grid", 4, "--out", tmp_path / "a.png"]
    for patch, at in ((["--patch", "3,1"], (1, 3)), ([], (2, 2))):
        assert run(*words, *patch)[0] == 0
        for picture, caption in zip(
            shown["vit.pre_tail, similarity"].pictures, shown["vit.pre_tail, similarity"].captions
        ):
            cells = picture.reshape(4, 50, 4, 50, 3)[:, 25, :, 25, 0]
            assert np.unravel_index(cells.argmax(), (4, 4)) == at and (cells == 255).sum() == 1
            assert caption.endswith("white 1")
        outline = (shown["view"].pictures[0] == 255).all(-1)
        assert outline[at[0] * 50 + 20 : at[0] * 50 + 30, at[1] * 50 - 1].all()


def test_a_view_is_the_largest_square_in_the_middle(tmp_path: Path) -> None:
    stripes = np.zeros((30, 90, 3), np.uint8)
    stripes[:, 30:60] = (250, 10, 10)
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert (show.whole_view(tmp_path / "a.png", 30, 10**6) == (250, 10, 10)).all()


REFUSED: dict[str, tuple[list[str], str]] = {
    "no model": (["ONE"], "show-features: no model is named; .* give --teacher NAME=LIBRARY:MODEL, --student RUN, or both"),
    "no such image": (["nowhere.jpg", "--teacher", VIT], "nowhere.jpg: does not exist; an image file was expected; check IMAGES"),
    "a folder": (["FOLDER", "--teacher", VIT], "is a folder; image files were expected; give .*/\\*.jpg or the like"),
    "no image": (["TEXT", "--teacher", VIT], "a.txt: not an image in a known format; first bytes b'a lette.*'; an image was expected"),
    "a patch outside": (["ONE", "--teacher", VIT, "--size", "32", "--grid", "4", "--patch", "4,0"],
                        r"--patch 4,0: is outside the grid of 4 x 4 patches; 0,0 \(top left\) to 3,3 were expected"),
    "no patch": (["ONE", "--teacher", VIT, "--patch", "3"], "'3' is no place; two whole numbers X,Y were expected, like 3,5"),
    "no grid": (["ONE", "--teacher", VIT, "--size", "33", "--grid", "4"], "--size 33: is not a multiple of --grid 4"),
    "no such run": (["ONE", "--student", "nowhere"], "--student nowhere: does not exist; expected OUT of train-mrmae, OUT/student"),
    "a run without checkpoint": (["ONE", "--student", "FOLDER"], "holds no student and no checkpoint; expected OUT .*; train first"),
    "the image itself": (["ONE", "--teacher", VIT, "--out", "ONE"], "--out .*: is one of the IMAGES; a new name was expected"),
    "no PNG": (["ONE", "--teacher", VIT, "--out", "TEXT"], "a.txt: is there and is no PNG"),
    "too many": (["ONE"] * 65 + ["--teacher", VIT], "IMAGES: 65 were given; at most 64 fit a picture; .* inspect-cache pictures"),
    "no such model": (["ONE", "--teacher", "a=timm:vit_nothing"], "timm has no model"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shown_is_said_in_a_line(two: list[Path], tmp_path: Path, what: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("a letter")
    places = {"ONE": str(two[0]), "FOLDER": str(tmp_path / "folder"), "TEXT": str(tmp_path / "a.txt")}
    before = two[0].read_bytes()
    code, text = run(*(places.get(word, word) for word in ["--out", str(tmp_path / "x.png"), *REFUSED[what][0]]))
    assert code != 0 and re.search(REFUSED[what][1], text) and "Traceback" not in text, text
    assert two[0].read_bytes() == before and not (tmp_path / "x.png").exists()


def test_a_student_that_does_not_load_is_named_as_the_option(two: list[Path], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "student", tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").write_bytes(b"<html>")
    code, text = run(two[0], "--student", tmp_path, "--out", tmp_path / "x.png")
    assert code == 1 and f"--student {tmp_path / 'student'}: does not load" in text


def test_help_waits_for_no_library() -> None:
    loaded = "import sys, mrmae.probe.show_cli; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'open_clip')))"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0
