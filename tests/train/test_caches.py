"""Caches that are not a finished folder: at a URL, unfinished, or grown since the run began."""

import dataclasses
import io
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from stores import others_soak
from training import train_quietly

from mrmae.common.progress import human_bytes
from mrmae.extract.inspect.cli import main as inspect_command
from mrmae.extract.run import Options, extract_features
from mrmae.probe.cli import main as probe_command
from mrmae.shards import commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format.plan import load_plan
from mrmae.shards.format.samples import Source
from mrmae.shards.format.spec import ViewRecipe
from mrmae.shards.plans import Wanted, agree
from mrmae.train import checkpoint, loop
from mrmae.train.cli import main as train_command
from mrmae.train.log import read_rows
from mrmae.train.method.recipe import load_recipe
from mrmae.train.rehearsal import dry_run
from mrmae.train.setup import Setup

QUICK = ("student.model=test_vit_of_3", "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}", "optim.epochs=1",
         "optim.batch_size=8", "optim.warmup_epochs=0.5")  # fmt: skip
SMALL_RUN = [word for text in QUICK for word in ("--set", text)]


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


@others_soak
def test_training_and_probing_at_a_url_are_what_they_are_locally(store: Any, tiny_cache: Path, tmp_path: Path) -> None:
    url = store.upload(tiny_cache, "train-photos")
    train(tiny_cache, tmp_path / "near")
    train(url, tmp_path / "far")
    near, far = weights(tmp_path / "near"), weights(tmp_path / "far")
    assert all(torch.equal(near[name], far[name]) for name in near) and facts(tmp_path / "far")["cache"] == url
    plan = CliRunner().invoke(train_command, [url, str(tmp_path / "far"), *SMALL_RUN, "--dry-run"])
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


@others_soak
def test_training_through_a_local_cache_is_the_same_and_fetches_once(
    store: Any, tiny_cache: Path, tmp_path: Path
) -> None:
    url, folder = store.upload(tiny_cache, "near-photos"), tmp_path / "shards"
    train(tiny_cache, tmp_path / "plain")
    expected = weights(tmp_path / "plain")
    read, console = [], Console(file=io.StringIO())
    for workers in (1, 3):
        before = store.proxy.answer_bytes
        train(
            url, tmp_path / f"{workers}", console=console, local_cache=folder, local_cache_bytes="1MB", workers=workers
        )
        read.append(store.proxy.answer_bytes - before)
        found = weights(tmp_path / f"{workers}")
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    files = [file for file in folder.rglob("*") if file.is_file()]
    kept = sum(file.stat().st_size for file in files if file.name != "samples.arrow")
    assert [file.name for file in files].count("samples.arrow") == 1
    said = re.findall(r"kept near  (\d+) shards? fetched by this process, (.*)\n", console.file.getvalue())  # type: ignore[attr-defined]
    assert said == [("18", human_bytes(kept)), ("0", "0 B")], "2 views of 3 shards of 2 columns and the pixels"
    assert 100_000 < kept < 1_000_000 and read[0] - read[1] >= kept, (read, kept)
    words = [url, str(tmp_path / "cli"), *SMALL_RUN, "--dry-run", "--local-cache", str(folder)]
    plan = CliRunner().invoke(train_command, [*words, "--local-cache-bytes", "1.5 MB"])
    assert f"whole shards in {folder}, at most 1.5 MB" in plan.output, plan.output
    for given, message in (
        (["--local-cache-bytes", "60kB"], "a window of 3 shards, .* has .* kB"),
        ([], "belong together"),
    ):
        refused = CliRunner().invoke(train_command, [*words, *given])
        assert refused.exit_code == 1 and re.search(message, refused.output), refused.output


def test_an_unfinished_cache_is_trained_on_only_where_asked(unfinished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unfinished .*--allow-partial"):
        train(unfinished, tmp_path / "out")
    result = CliRunner().invoke(
        train_command, [str(unfinished), str(tmp_path / "cli"), *SMALL_RUN, "--allow-partial", "--dry-run"]
    )
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
    (unfinished / "manifest").mkdir()
    for name in ("commits/0/b.pre_tail/000001.json", "manifest.json", "manifest/000000.arrow", "samples.arrow"):
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


def stop_before(update: int, patch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the update that follows so many."""
    step = loop.step

    def stopped(run: Any, *rest: Any) -> Any:
        if run.step == update:
            signal.raise_signal(signal.SIGTERM)
        return step(run, *rest)

    patch.setattr(loop, "step", stopped)


def test_a_run_goes_on_with_the_images_it_began_with_while_others_are_appended(
    make_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_cache(tmp_path / "c")
    train(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_before(0, patch)
        assert train(path, tmp_path / "out")["step"] == 1
    new = Source("class 0/new.png", "class 0", 3, "00" * 32)
    agree(path, Wanted(dataclasses.replace(load_plan(path), listing_id=""), rows=[new], append=True))
    commit.create_columns(path, load_plan(path))
    assert len(open_cache(path, allow_partial=True).numbers) == 24
    with pytest.raises(ValueError, match="this cache is unfinished"):
        train(path, tmp_path / "new")
    assert train(path, tmp_path / "out")["finished"]
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    first = load_recipe("mr-mae", [*QUICK, "prepare.images=16"])
    told = "\n".join(dry_run(make_cache(tmp_path / "d"), tmp_path / "none", first, Setup(device="cpu")))
    assert "d: 16 images x 2 views" in told and "images: the run keeps to 16 of 24 (prepare.images)" in told


def test_a_tar_given_as_cache_is_told_what_a_cache_is(tmp_path: Path) -> None:
    (tmp_path / "photos.tar").write_bytes(b"a tar of photographs")
    told = f"is a file; a cache is a folder that extract-features makes of images; make one with extract-features {tmp_path}"
    for command, words in (
        (train_command, [str(tmp_path / "photos.tar"), str(tmp_path / "out")]),
        (inspect_command, ["show", str(tmp_path / "photos.tar")]),
        (inspect_command, ["verify", str(tmp_path / "photos.tar")]),
        (probe_command, [f"{tmp_path}/photos.tar#clip", str(tmp_path)]),
    ):
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 1 and told in result.output, result.output


def test_damage_met_while_training_names_the_command_that_repairs(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "c", n=8, n_views=1)
    shard = cache / "views/0/a.pre_tail.zarr/tokens/c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 0x55
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"crc32c.*inspect-cache repair {cache} finds all that is damaged"):
        train(cache, tmp_path / "out")


# ---- a cache gets another view, another tap and another teacher

SMALL = load_recipe(
    "mr-mae", [*QUICK, "optim.epochs=2", "optim.batch_size=4"]
)  # two updates per epoch, of eight images


def extract(images: Path, cache: Path, teachers: tuple[str, ...], views: int) -> None:
    how: dict[str, Any] = {"grid": 4, "device": "cpu", "workers": 1, "views": views, "teachers": teachers}
    extract_features(Options([images], cache, recipe=ViewRecipe(32), **how), say=lambda _: None)


@pytest.fixture(scope="module")
def grown(tiny_images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache of eight images with one view and one teacher, and the same one after it got more of both."""
    root = tmp_path_factory.mktemp("grown")
    for key, data in list(tiny_images.items())[:8]:
        (root / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / key).write_bytes(data)
    extract(root / "images", root / "small", ("vit=timm:test_vit/random",), 1)
    shutil.copytree(root / "small", root / "grown")
    more = ("vit=timm:test_vit/random?tap=pre_tail,block_2", "cnn=timm:test_convnext/random")
    extract(root / "images", root / "grown", more, 2)
    return root / "small", root / "grown"


@pytest.fixture(scope="module")
def begun(grown: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on the cache as it was first."""
    out = tmp_path_factory.mktemp("begun") / "out"
    train_quietly(grown[0], out, SMALL)
    return out


def said(cache: Path, out: Path, recipe: Any) -> str:
    """What a run says, until its end."""
    console = Console(file=io.StringIO(), width=250)
    train_quietly(cache, out, recipe, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def assert_same_weights(out: Path, other: Path) -> None:
    one, two = weights(out), weights(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_goes_on_with_what_it_began_with_though_its_cache_has_grown_or_is_growing(
    grown: tuple[Path, Path], begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = grown
    with monkeypatch.context() as patch:
        stop_before(2, patch)
        assert train_quietly(small, tmp_path / "out", SMALL)["stopped"] == "SIGTERM"
    growing = tmp_path / "growing"
    shutil.copytree(large, growing)
    (growing / "manifest.json").unlink()
    next(growing.glob("commits/1/cnn.*/000000.json")).unlink()
    told = "\n".join(dry_run(growing, tmp_path / "out", SMALL, Setup(device="cpu")))
    assert "continuing from epoch 2, update 1 of 2 (3 of 4 are done)" in told and "growing: 8 images x 1 view" in told
    for part in (
        ": not among the run's columns (prepare.columns); column ",
        "column vit.block_2: not",
        "the first 1 of 2 (prepare.views)",
    ):
        assert part in told, told
    assert "continuing from epoch 2, update 1 of 2" in said(growing, tmp_path / "out", SMALL)
    assert_same_weights(tmp_path / "out", begun)
    rows = [read_rows(out / "log.jsonl", "epoch") for out in (tmp_path / "out", begun)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row.get("resumed") for row in rows[0]] == [None, [1]] and "resumed" not in rows[1][1]
    told = "\n".join(dry_run(large, tmp_path / "out", SMALL, Setup(device="cpu")))
    assert "this run is finished: all 2 epochs are done, nothing is left to train" in told
    again = said(large, tmp_path / "out", SMALL)
    assert "this run is finished" in again and "finished: 2 epochs, before this start" in again
    assert_same_weights(tmp_path / "out", begun)


def test_a_new_run_takes_all_that_the_cache_has_and_the_old_runs_recipe_what_it_had(
    grown: tuple[Path, Path], begun: Path, tmp_path: Path
) -> None:
    told = said(grown[1], tmp_path / "new", SMALL)
    assert (
        "8 images x 2 views" in told
        and "terms.mimic (names no teacher: all there are)" in told
        and "not read" not in told
    )
    assert facts(tmp_path / "new")["teachers"].keys() == {"vit:pre_tail", "vit:block_2", "cnn"}
    train_quietly(grown[1], tmp_path / "old", load_recipe(str(begun / "recipe.yaml")))
    assert_same_weights(tmp_path / "old", begun)
    one = load_recipe("mr-mae", [*QUICK, "prepare.views=1", "terms.mimic.teachers=[cnn]"])
    told = "\n".join(dry_run(grown[1], tmp_path / "none", one, Setup(device="cpu")))
    assert "8 images x 1 view," in told and "column vit.block_2: no term of this recipe asks for it" in told
    assert "terms.mimic (names it)" in told


def test_views_and_columns_that_are_not_there_are_refused(
    grown: tuple[Path, Path], begun: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="grown: 3 views of every image are wanted and 2 are stored"):
        train_quietly(grown[1], tmp_path / "out", load_recipe("mr-mae", [*QUICK, "prepare.views=3"]))
    with pytest.raises(ValueError, match="grown: 9 images are wanted and 8 are stored"):
        train_quietly(grown[1], tmp_path / "out", load_recipe("mr-mae", [*QUICK, "prepare.images=9"]))
    with pytest.raises(ValueError, match="there is no column 'dino.pre_tail'; it holds vit.pre_tail, "):
        train_quietly(grown[1], tmp_path / "out", load_recipe("mr-mae", [*QUICK, "prepare.columns=[dino.pre_tail]"]))
    with pytest.raises(ValueError, match="another recipe: prepare.views was 1 and is now 2"):
        train_quietly(
            grown[1], begun, load_recipe("mr-mae", [*QUICK, "optim.epochs=2", "optim.batch_size=4", "prepare.views=2"])
        )
    assert not (tmp_path / "out").exists()
