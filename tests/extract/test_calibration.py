"""Extraction into product codes: where the codebook comes from, that every process has the same, and what hangs on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrmae.extract import calibration, pipeline
from mrmae.extract.inspect.compare import compare_live
from mrmae.extract.run import Options
from mrmae.shards import check, drop
from mrmae.shards.cache import open_cache
from mrmae.shards.format import load_plan, plan

VIT, CNN = "vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random"
Extract = Callable[..., dict[str, Any]]


def contents(path: Path) -> dict[str, bytes]:
    """Every file but commit records (they tell the time), by name."""
    files = [file for file in path.rglob("*") if file.is_file() and "commits" not in file.relative_to(path).parts]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files if not file.name.startswith(".")}


@pytest.fixture(scope="module")
def product(extract: Extract, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("product") / "c"
    extract(photo_folder, cache, VIT, CNN, dtype="pq", views=2)
    return cache


def test_other_workers_and_a_stop_at_calibration_give_the_same_bytes(
    extract: Extract, photo_folder: Path, product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the codebooks and the plan that tells of them."""
    real = plan.publish

    def stopping(file: Path, *args: Any, **how: Any) -> Any:
        if file.name == "plan.json" and (tmp_path / "c/codebooks").is_dir():
            raise KeyboardInterrupt
        return real(file, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "publish", stopping)
        with pytest.raises(KeyboardInterrupt):
            extract(photo_folder, tmp_path / "c", VIT, CNN, dtype="pq", views=2, workers=1)
    assert len(list((tmp_path / "c/codebooks").iterdir())) == 2 and not load_plan(tmp_path / "c").quantisers
    extract(photo_folder, tmp_path / "c", VIT, CNN, dtype="pq", views=2, workers=1)
    assert contents(tmp_path / "c") == contents(product)
    assert check.find_problems(product, full=True) == []


def test_shards_after_a_restart_are_coded_by_the_frozen_codebook(
    extract: Extract, photo_folder: Path, product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(product, tmp_path / "c")
    lost = sorted(path.glob("commits/1/vit.*/*.json"))[0]
    lost.unlink()
    monkeypatch.setattr(calibration, "calibrate", None)  # nothing is calibrated again
    extract(photo_folder, path, VIT, CNN, dtype="pq", views=2)
    assert contents(path) == contents(product)


def test_a_grown_and_a_shrunk_cache_keep_the_other_s_codebook(
    extract: Extract, photo_folder: Path, product: Path, tmp_path: Path
) -> None:
    extract(photo_folder, tmp_path / "c", VIT, dtype="pq", views=2)
    extract(photo_folder, tmp_path / "c", VIT, CNN, dtype="pq", views=2)
    assert contents(tmp_path / "c") == contents(product)
    column = next(name for name in open_cache(product).columns if name.startswith("cnn."))
    files = drop.files_of_column(tmp_path / "c", column)
    assert tmp_path / f"c/codebooks/{column}.safetensors" in files
    assert not [file for file in files if file.name.startswith("vit.")]


def test_quality_is_told_and_only_a_hopeless_one_is_refused(
    extract: Extract, photo_folder: Path, product: Path, tmp_path: Path
) -> None:
    told = {c["name"]: c["quality"]["snr_db"] for c in json.loads((product / "manifest.json").read_bytes())["columns"]}
    assert all(2 < snr < 45 for snr in told.values()), told
    with pytest.raises(ValueError, match=r"pq keeps an SNR of .* dB; at least 60 were expected"):
        extract(photo_folder, tmp_path / "c", VIT, dtype="pq", min_snr=60.0)
    options = Options(images=[photo_folder], cache=tmp_path / "d", dtype="pq")
    assert pipeline.too_coarse(1.5, options) and not pipeline.too_coarse(3.0, options)
    assert "--dtype pq" in options.command() and "--min-snr" not in options.command()


def test_the_live_teachers_agree_and_mirrored_ones_do_not(product: Path) -> None:
    cache = open_cache(product)
    assert all(one.good for one in compare_live(cache, 20)), compare_live(cache, 20)
    assert not any(one.good for one in compare_live(cache, 20, mirror=True))


def test_a_computed_map_compares_what_readers_get(
    extract: Extract, photo_folder: Path, product: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(product, tmp_path / "c")
    extract(photo_folder, path, VIT, CNN, dtype="pq", views=2, maps=["parts=kmeans:vit:4"])
    cache = open_cache(path)
    column = next(name for name in cache.columns if name.startswith("vit."))
    vectors = torch.from_numpy(np.load(path / "codebooks/parts.npy"))
    tokens = cache.read_tokens(column, cache.numbers, cache.numbers * 0)
    ids = cache.read_column("parts.map", cache.numbers, cache.numbers * 0, ("map",))["map"]
    assert torch.equal(torch.cdist(tokens, vectors).argmin(-1), ids.long())
    assert check.find_problems(path, full=True) == []
