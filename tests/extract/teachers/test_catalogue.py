"""Which teachers there are, and that those which the docs name are what the docs say of them."""

import re
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

from mrmae.extract.cli import main
from mrmae.extract.teachers.address import parse_teacher
from mrmae.extract.teachers.catalogue import known_teachers, list_teachers
from mrmae.extract.teachers.teacher import build_teacher

PAGE = (Path(__file__).parents[3] / "docs" / "teachers.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| [^|]+ \| `((?:timm|open_clip):[^`]+)` \| (\d+) px \| (\d+) x (\d+) of (\d+)(, resampled)? \| ([^|]+), (\w+) \|",
    re.MULTILINE,
)
ROWS = ROW.findall(PAGE)
STATISTICS = {
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0, 1": ((0.0,) * 3, (1.0,) * 3),
    "0.5, 0.5": ((0.5,) * 3, (0.5,) * 3),
}


def test_every_teacher_of_the_page_is_known() -> None:
    known = set(known_teachers())
    assert len(ROWS) >= 19 and not [row[0] for row in ROWS if row[0] not in known]


@pytest.mark.parametrize("address", ["timm:test_vit", "timm:test_efficientnet", "open_clip:RN50"])
def test_what_a_list_says_is_what_the_teacher_gives(address: str) -> None:
    tag = {"timm:test_vit": ".r160_in1k", "timm:test_efficientnet": ".r160_in1k", "open_clip:RN50": "/yfcc15m"}[address]
    (line,) = list_teachers(address + tag, grid=5)
    spec = build_teacher(
        parse_teacher(f"t={address}/random"), grid=5, view_size=32, device="cpu", precision="fp32"
    ).spec
    told = rf"{re.escape(address + tag)}  (patch 16|feature map), runs at {spec.input_size[0]} px: {spec.native_grid[0]} x {spec.native_grid[1]} "
    assert re.match(told + rf"tokens of {spec.width}(, resampled to 5 x 5)?(, [\w.-]+)?$", line), line
    assert ("resampled" in line) == (spec.resample != "none")


def test_a_list_is_searched_by_a_part_of_a_name_or_a_glob() -> None:
    done = CliRunner().invoke(main, ["--list-teachers"])
    assert (
        done.exit_code == 0
        and "timm:vit_base_patch16_224.dino\n" in done.output
        and "teachers; with a pattern" in done.output
    )
    done = CliRunner().invoke(main, ["--list-teachers", "Test_ViT.", "--grid", "7"])
    assert done.exit_code == 0 and "runs at 112 px: 7 x 7 tokens of 64" in done.output, done.output
    done = CliRunner().invoke(main, ["--list-teachers", "no such thing"])
    assert done.exit_code == 1 and "neither timm nor open_clip knows" in done.output
    for words in ([], ["only-images"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2 and "Missing argument 'IMAGES... CACHE'" in done.output


@pytest.mark.soak
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_teacher_of_the_page_loads_from_a_file_of_its_names_and_shapes(row: tuple[str, ...], tmp_path: Path) -> None:
    """The library's own constructor makes the file; nothing may be missing or left over but a classifier."""
    address, side, height, width, channels, resampled, statistics, interpolation = row
    library, _, name = address.partition(":")
    if library == "timm":
        model = timm.create_model(name)
    else:
        model = open_clip.create_model(name.partition("/")[0])
    weights = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    del model, weights
    request = parse_teacher(f"t={address}@{tmp_path / 'w.safetensors'}")
    teacher = build_teacher(request, grid=14, view_size=224, device="cpu", precision="fp32")
    spec = teacher.spec
    assert (spec.input_size[0], *spec.native_grid, spec.width) == (int(side), int(height), int(width), int(channels))
    assert (spec.resample != "none") == bool(resampled) and spec.interpolation == interpolation
    assert (spec.mean, spec.std) == STATISTICS[statistics]
    tokens = teacher.forward(torch.zeros(1, 224, 224, 3, dtype=torch.uint8)).tokens
    assert tokens.shape == (1, 196, int(channels)) and tokens.isfinite().all()
