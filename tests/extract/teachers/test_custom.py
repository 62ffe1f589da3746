"""A teacher that a Python function makes: only where that was allowed, and only if it is what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mrmae.extract.inspect.rerun import prepared
from mrmae.extract.teachers.address import parse_teacher
from mrmae.extract.teachers.teacher import build_teacher
from mrmae.shards.cache import open_cache

CODE = """
import torch
from torch import nn
print("IMPORTED")

class Means(nn.Module):
    def __init__(self, width, prefix):
        super().__init__()
        self.prefix, self.proj = prefix, nn.Conv2d(3, width, 8, 8)

    def forward(self, x):
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True)] * self.prefix + [tokens], 1)

def means(width=5, prefix=1, **more):
    return {"module": Means(width, prefix), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3), "patch": 8, "prefix": prefix, **more}

def wrong_tokens():
    return {**means(), "prefix": 2}

def no_dict():
    return Means(4, 0)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)


def build(tmp_path: Path, what: str, **how: Any) -> Any:
    request = parse_teacher(f"own=python:own_{tmp_path.name}:{what}")
    return build_teacher(request, grid=4, view_size=32, device="cpu", precision="fp32", **{"allow_code": True, **how})


def test_its_tokens_are_those_of_its_module_on_the_normalised_view(tmp_path: Path) -> None:
    teacher = build(tmp_path, "means?width=7")
    views = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    found = teacher.forward(views)
    image = (views.double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.3])
    conv = teacher.tower.module.proj.double()
    expected = F.conv2d(image.permute(0, 3, 1, 2), conv.weight, conv.bias, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.tokens.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cls.double(), expected.mean(1), rtol=1e-5, atol=1e-5)
    assert (teacher.spec.library, teacher.spec.width, teacher.spec.prefix_tokens) == ("python", 7, 1)
    assert build(tmp_path, "means?prefix=0").forward(views).cls is None


def test_no_code_runs_unasked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--allow-code was expected"):
        build(tmp_path, "means", allow_code=False)
    assert "IMPORTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "what, message",
    [
        ("wrong_tokens", r"gives \[1, 17, 5\] for 1 images of 32 px; expected \[1, 2 \+ 4 x 4, d\]"),
        ("no_dict", "returned Means; expected a dict"),
        ("missing", "failed .AttributeError"),
        ("means?nonsense=1", "returned .*'nonsense'"),
        ("means?tap=block_1", "decides on weights, tap and activation"),
        ("means?input_size=30", "input_size 30; expected"),
        ("means?interpolation=nearest&prefix=-1", "prefix -1"),
    ],
)
def test_a_function_that_is_no_teacher_is_refused(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, what)


def test_an_address_names_a_function() -> None:
    for text in ("own=python:module", "own=python:a/b:c", "own=python:m:f@file", "own=python:m:"):
        with pytest.raises(ValueError, match="names no function"):
            parse_teacher(text)


def test_a_cache_records_it_and_nobody_runs_it_for_a_cache(
    extract: Any, photo_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = f"own=python:own_{tmp_path.name}:means"
    extract(photo_folder, tmp_path / "c", text, allow_code=True)
    spec = open_cache(tmp_path / "c").columns["own.output"].spec
    assert spec.model.endswith(":means") and len(spec.weights_sha256) == 64
    record = json.loads(next((tmp_path / "c/commits").glob("*/own.output/*.json")).read_text())
    assert "--allow-code" in record["command"]
    with pytest.raises(ValueError, match="--allow-code lets weights run code"):
        prepared((record["command"], record["folder"]), {})
