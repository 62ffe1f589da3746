"""extract-features --token-layout blocks: the same features in another order, under another id, checked like any cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mrmae.extract.cli import main
from mrmae.extract.inspect.cli import main as inspect_cache
from mrmae.extract.options import Options
from mrmae.shards.cache import open_cache

VIT, CNN = "vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random"
Extract = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def blocked(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `extracted`, in 4 blocks, by the command line."""
    cache = tmp_path_factory.mktemp("blocked") / "cache"
    words = [str(photo_folder), str(cache), "--teacher", VIT, "--teacher", CNN, "--views", "2", "--size", "32", "--grid", "4",
             "--batch-size", "4", "--device", "cpu", "--workers", "2", "--shard-samples", "8"]  # fmt: skip
    done = CliRunner().invoke(main, [*words, "--token-layout", "blocks"])
    assert done.exit_code == 0, done.output
    assert "token blocks: 4 of 4 patches, seed 0" in done.output
    return cache


def test_blocks_hold_the_same_features(blocked: Path, extracted: Path) -> None:
    a, b = open_cache(blocked), open_cache(extracted)
    assert a.ids["geometry"] == b.ids["geometry"] and a.ids["vit.pre_tail"] != b.ids["vit.pre_tail"]
    for column in a.columns:
        for view in range(2):
            assert torch.equal(*(c.read_tokens(column, a.numbers, a.numbers * 0 + view) for c in (a, b)))


def test_inspect_cache_knows_blocks(blocked: Path, tmp_path: Path) -> None:
    for words, said in (
        (["show", str(blocked)], "token blocks"),
        (["verify", str(blocked), "--full", "--live", "4"], "vit.pre_tail: 4 samples, cosine 0.9999"),
        (["pictures", str(blocked), "--out", str(tmp_path / "x.png")], "x.png"),
    ):
        done = CliRunner().invoke(inspect_cache, words)
        assert done.exit_code == 0 and said in done.output, done.output


def test_a_cache_has_one_layout(blocked: Path, extracted: Path, photo_folder: Path, extract: Extract) -> None:
    how: dict[str, Any] = {"views": 2, "shard_samples": 8}
    with pytest.raises(
        ValueError, match=r"plan.json: token_layout is .*'blocks': 4.* there and '\(absent\)' in this command"
    ):
        extract(photo_folder, blocked, VIT, CNN, **how)
    with pytest.raises(ValueError, match=r"plan.json: token_layout"):
        extract(photo_folder, extracted, VIT, CNN, token_layout="blocks", **how)
    with pytest.raises(ValueError, match=r"token_layout.blocks is 4 there and 2 in this command"):
        extract(photo_folder, blocked, VIT, CNN, token_layout="blocks", blocks=2, **how)
    said: list[str] = []
    extract(photo_folder, blocked, VIT, CNN, token_layout="blocks", say=said.append, **how)
    assert "nothing was left to do" in said[-1]


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    options = Options(images=["x"], cache=tmp_path / "c", blocks=8)
    with pytest.raises(
        ValueError, match="--blocks 8: tokens are stored in raster order; --token-layout blocks was expected"
    ):
        options.resolved()
    with pytest.raises(
        ValueError, match="--blocks 3: do not divide a grid of 196 patches; expected one of 2, 4, 7, 14"
    ):
        Options(images=["x"], cache=tmp_path / "c", token_layout="blocks", blocks=3).resolved()
    said = Options(images=["x"], cache=tmp_path / "c", token_layout="blocks", blocks=7).command()
    assert "--token-layout blocks --blocks 7" in said
