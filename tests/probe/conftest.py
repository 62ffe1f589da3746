"""Tiny labelled images and a tiny trained student for the probes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import train_quietly

from mrmae.extract.teachers import Origin, Preprocessing, Teacher, TeacherRequest, Tower, make_spec
from mrmae.probe.sources import FeatureSource, hashed
from mrmae.train.method.recipe import load_recipe

QUICK = (
    "student.model=test_vit",
    "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
    "student.fused_blocks=[2, 4]",
    "optim.epochs=2",
    "optim.warmup_epochs=1",
    "optim.batch_size=8",
)
COLOURS = {"azure": (40, 90, 220), "brick": (200, 60, 40), "moss": (60, 160, 50)}


def write_images(root: Path, counts: dict[str, int], size: int = 40, seed: int = 0) -> Path:
    """root/<part>/<class>/<part>-N.png: noise around the colour of the class. counts: images per class, by part."""
    draw = np.random.default_rng(seed)
    for part, count in counts.items():
        for name, colour in COLOURS.items():
            for i in range(count):
                noise = draw.normal(0, 25, (size + i % 3, size + 4, 3))
                path = root / part / name / f"{part}-{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (3 classes of 8) and test/ (3 classes of 4). Do not change it."""
    return write_images(tmp_path_factory.mktemp("images"), {"train": 8, "test": 4})


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    """The function that writes labelled images: make_images(root, {"train": 8, "test": 4})."""
    return write_images


@pytest.fixture(scope="session")
def trained(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a student of 32 px trained on `tiny_cache` for two epochs. Probes may write OUT/probes."""
    out = tmp_path_factory.mktemp("runs") / "out"
    torch.manual_seed(0)
    train_quietly(tiny_cache, out, load_recipe("mr-mae", QUICK))
    return out


def colour_source(text: str, **_: object) -> FeatureSource:
    """`colours:GRID:CHANNELS`: a model of 32 px whose tokens are the mean colour of each patch, of these channels and their negatives."""
    grid, channels = int(text.split(":")[1]), [int(c) for c in text.split(":")[2]]

    def features(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        found = torch.nn.functional.avg_pool2d(x[:, channels], 32 // grid)
        return torch.cat([found, 1 - found], 1), None

    origin = Origin(
        text, None, Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic"), text.encode().hex().ljust(64, "0")
    )
    tower = Tower(module=torch.nn.Identity(), features=features, attention_row=None, patch=32 // grid, input_size=(32, 32), origin=origin,
                  activation="none", prefix_tokens=0, tap="colours", tail={}, attention_backend="none")  # fmt: skip
    spec = make_spec(
        TeacherRequest("probe", "view", "colours", "file"),
        tower,
        features(torch.zeros(1, 3, 32, 32))[0],
        False,
        grid,
        "fp32",
    )
    return FeatureSource(text, "student", hashed(spec), Teacher(spec, {}, tower, torch.device("cpu")))


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are `colours:GRID:CHANNELS`, for the length of a test."""
    for place in ("mrmae.probe.job.open_source", "mrmae.probe.fusion.open_source"):
        monkeypatch.setattr(place, colour_source)
