"""A few random photographs, and a small cache that extract-features made of them."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae.common.backend import exists, locate
from mrmae.extract.run import Options, extract_features
from mrmae.shards.format.spec import ViewRecipe

VIT = "vit=timm:test_vit/random"
CNN = "cnn=timm:test_efficientnet/random"
SMALL: dict[str, Any] = {"recipe": ViewRecipe(32), "grid": 4, "batch_size": 4, "device": "cpu", "workers": 2}

Extract = Callable[..., dict[str, Any]]


def extract_small(images: Path, cache: Path | str, *teachers: str, **options: Any) -> dict[str, Any]:
    """The manifest of `cache`, extracted with tiny settings."""
    options = {**SMALL, **options}
    cache = locate(cache)
    if not exists(cache / "plan.json"):
        options.setdefault("shard_samples", 16)  # two shards of the photographs
    say = options.pop("say", lambda line: None)
    return extract_features(Options(images=[images], cache=cache, teachers=teachers or (VIT,), **options), say=say)


@pytest.fixture(scope="session")
def extract() -> Extract:
    """The function extract(images, cache, *teachers, **options)."""
    return extract_small


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 random images in two classes, of different sizes."""
    folder, draw = tmp_path_factory.mktemp("photo-folder"), np.random.default_rng(0)
    for i in range(20):
        path = folder / f"class {i % 2}" / f"photo-{i:03d} é.png"
        path.parent.mkdir(exist_ok=True)
        coarse = draw.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((40 + i, 60 - i), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def extracted(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of the photographs: teachers vit (CLS, attention) and cnn, 2 views, shards of 8. Do not change."""
    cache = tmp_path_factory.mktemp("extracted") / "cache"
    extract_small(photo_folder, cache, VIT, CNN, views=2, shard_samples=8)
    return cache


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the libraries keep what they download: nothing yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host has an address."""

    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)
