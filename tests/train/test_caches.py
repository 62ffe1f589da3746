"""Caches that are not a finished folder: at a URL, unfinished, or grown since the run began."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from training import train_quietly

from mrmae.probe.cli import main as probe_command
from mrmae.shards import commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format.plan import load_plan
from mrmae.shards.format.samples import Source
from mrmae.shards.plans import Wanted, agree
from mrmae.train import checkpoint
from mrmae.train.cli import main as train_command
from mrmae.train.method.recipe import load_recipe

QUICK = ("student.model=test_vit", "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}", "optim.epochs=1",
         "optim.batch_size=8", "optim.warmup_epochs=0.5")  # fmt: skip


def train(cache: Any, out: Path, name: str = "mr-mae", **options: Any) -> dict[str, Any]:
    return train_quietly(cache, out, load_recipe(name, QUICK), **options)


def weights(out: Path) -> dict[str, Any]:
    return checkpoint.read_checkpoint(checkpoint.list_checkpoints(out / "checkpoints")[-1])["model"]


def facts(out: Path) -> Any:
    return json.loads((out / "run.json").read_text())


@pytest.fixture
def unfinished(make_cache: Callable[..., Path], tmp_path: Path) -> Path:
    """24 images in 3 shards; shard 1 of column b is not committed."""
    path = make_cache(tmp_path / "unfinished", finalise=False)
    (path / "commits/0/b.pre_tail/000001.json").unlink()
    return path


def test_training_and_probing_at_a_url_are_what_they_are_locally(s3: Any, tiny_cache: Path, tmp_path: Path) -> None:
    url = s3.upload(tiny_cache, "train-photos")
    train(tiny_cache, tmp_path / "near")
    train(url, tmp_path / "far")
    near, far = weights(tmp_path / "near"), weights(tmp_path / "far")
    assert all(torch.equal(near[name], far[name]) for name in near) and facts(tmp_path / "far")["cache"] == url
    plan = CliRunner().invoke(
        train_command, [url, str(tmp_path / "far"), "--student", "test_vit", "--batch-size", "8", "--dry-run"]
    )
    assert url in plan.output
    answers = []
    for i, place in enumerate((str(tiny_cache), url)):
        words = [
            f"{place}#a",
            place,
            "--train-include",
            "*0? *",
            "--test-include",
            "*[12]? *",
            "--out",
            str(tmp_path / f"p{i}"),
        ]
        done = CliRunner().invoke(probe_command, words)
        assert done.exit_code == 0, done.output
        (result,) = (tmp_path / f"p{i}" / "results").glob("*.json")
        answers.append(json.loads(result.read_text())["rows"])
    assert answers[0] == answers[1]


def test_an_unfinished_cache_is_trained_on_only_where_asked(unfinished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unfinished .*--allow-partial"):
        train(unfinished, tmp_path / "out")
    result = CliRunner().invoke(
        train_command, [str(unfinished), str(tmp_path / "cli"), "--student", "test_vit", "--allow-partial", "--dry-run",
                        "--batch-size", "8"])  # fmt: skip
    assert "UNFINISHED" in result.output and "16 of 24 images" in result.output, result.output
    train(unfinished, tmp_path / "out", allow_partial=True)
    told = facts(tmp_path / "out")
    assert told["images"] == 16 and told["unfinished_cache"].startswith("16 of 24 images (")
    train(unfinished, tmp_path / "mae", "mae", allow_partial=True)  # reads no column: b may lack what it likes
    assert facts(tmp_path / "mae")["images"] == 24


def test_a_run_on_an_unfinished_cache_continues_with_the_same_images_only(
    unfinished: Path, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    train(unfinished, tmp_path / "out", allow_partial=True)
    assert train(unfinished, tmp_path / "out", allow_partial=True)["finished"]
    record = unfinished / "commits/0/b.pre_tail/000000.json"
    record.rename(unfinished / "aside.json")
    with pytest.raises(
        ValueError, match="16 of 24 images .* then, 8 of 24 images .* now; the same images were expected"
    ):
        train(unfinished, tmp_path / "out", allow_partial=True)
    (unfinished / "aside.json").rename(record)
    whole = make_cache(tmp_path / "whole")
    for name in ("commits/0/b.pre_tail/000001.json", "manifest.json", "samples.parquet"):
        (unfinished / name).write_bytes((whole / name).read_bytes())
    with pytest.raises(ValueError, match="16 of 24 images .* then, all images now"):
        train(unfinished, tmp_path / "out")


def test_probes_of_an_unfinished_cache_say_so(unfinished: Path, tmp_path: Path) -> None:
    words = [
        f"{unfinished}#b",
        str(unfinished),
        "--out",
        str(tmp_path / "p"),
        "--train-include",
        "*0? *",
        "--test-include",
        "*[12]? *",
    ]
    refused = CliRunner().invoke(probe_command, words)
    assert refused.exit_code == 1 and "unfinished" in refused.output
    done = CliRunner().invoke(probe_command, [*words, "--allow-partial"])
    assert done.exit_code == 0 and "UNFINISHED cache: 16 of 24 images" in done.output, done.output


def test_a_run_is_not_continued_on_a_cache_that_has_grown(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c")
    train(path, tmp_path / "out")
    new = Source("class 0/new.png", "class 0", 3, "00")
    agree(path, Wanted(dataclasses.replace(load_plan(path), dataset_id=""), rows=[new], append=True))
    commit.create_columns(path, load_plan(path))
    assert len(open_cache(path, allow_partial=True).numbers) == 24
    with pytest.raises(ValueError, match="images were appended to the cache since this run began: dataset was sha256:"):
        train(path, tmp_path / "out", allow_partial=True)
