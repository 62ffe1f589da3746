"""The extraction as a whole: what lies in the cache, resume, bad images, refusals. Tiny teachers with random weights."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import zarr
from click.testing import CliRunner
from PIL import Image
from processes import ends, forked

from mrmae.common import files
from mrmae.extract import calibration, run
from mrmae.extract import cli as command
from mrmae.extract import pipeline as engine
from mrmae.extract.cli import main
from mrmae.extract.pipeline import ExtractJob
from mrmae.extract.prepare import Images
from mrmae.extract.report import TooManyBad
from mrmae.extract.run import Options, extract_features
from mrmae.extract.teachers.teacher import DEFAULT_TEACHERS, Teacher
from mrmae.shards.cache import open_cache
from mrmae.shards.format.quantiser import DTYPES, dequantise
from mrmae.shards.format.spec import ViewRecipe
from mrmae.shards.store.storage import STORAGES

VIT = "vit=timm:test_vit/random"
CNN = "cnn=timm:test_efficientnet/random"
BASE = {"recipe": ViewRecipe(32), "grid": 4, "batch_size": 4, "shard_samples": 16, "device": "cpu", "workers": 2}


def photos(folder: Path, n: int = 20) -> Path:
    """`n` random images in two classes, of different sizes."""
    draw = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"class {i % 2}" / f"photo-{i:03d} é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = draw.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((40 + i, 60 - i), Image.Resampling.BICUBIC).save(path)
    return folder


def extract(images: Path, cache: Path, *teachers: str, **options: Any) -> dict[str, Any]:
    said: list[str] = options.pop("said", [])
    chosen = Options(images=[images], cache=cache, teachers=teachers or (VIT,), **{**BASE, **options})
    return extract_features(chosen, say=said.append)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache") / "cache"
    extract(folder, cache, VIT, CNN, views=2)
    return cache


def test_cache_holds_every_image_label_and_column(folder: Path, finished: Path) -> None:
    cache = open_cache(finished)
    assert sorted(cache.keys) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert {key.split("/")[0] for key in cache.keys} == set(cache.labels)
    assert set(cache.columns) == {"vit.pre_tail", "cnn.last"} and cache.n_views == 2
    assert cache.columns["vit.pre_tail"].spec.weights == "random"
    assert [file.name for file in finished.glob(".*")] == [".digests"], "no lock or temporary file stays behind"


def test_stored_int8_tokens_are_the_quantised_features(folder: Path, finished: Path) -> None:
    cache = open_cache(finished)
    group = zarr.open_group(finished / "views/1/cnn.last.zarr", mode="r")
    tokens, scale = (torch.from_numpy(np.asarray(group[name][:])) for name in ("tokens", "scale"))
    expected = dequantise(tokens, scale, cache.columns["cnn.last"].quantiser)
    got = cache.read_tokens("cnn.last", cache.numbers, np.ones_like(cache.numbers))
    assert torch.equal(got, expected[torch.from_numpy(cache.numbers)])


def test_the_same_command_again_does_nothing_and_says_so(folder: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.tar")}
    said: list[str] = []
    options = Options(images=[folder], cache=finished, teachers=(VIT, CNN), views=2, **BASE)
    extract_features(options, say=said.append)
    assert "nothing was left to do" in said[-1]
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.tar")}


def test_a_run_stopped_anywhere_ends_in_the_same_manifest(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads((finished / "manifest.json").read_text())
    for stop_after in (0, 1, 3):
        calls = 0
        real = engine.commits.store_column

        def store_column(*args: Any, limit: int = stop_after, real: Any = real, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise OSError(28, "No space left on device")
            real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(engine.commits, "store_column", store_column)
            with pytest.raises(OSError, match="No space left"):
                extract(folder, tmp_path / f"c{stop_after}", VIT, CNN, views=2)
        assert not (tmp_path / f"c{stop_after}/manifest.json").exists()
        assert extract(folder, tmp_path / f"c{stop_after}", VIT, CNN, views=2) == whole


@pytest.mark.parametrize("in_turns", [True, False])
@pytest.mark.parametrize("first", [256, 9])
def test_every_image_is_decoded_once_and_every_view_shown_once(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, in_turns: bool
) -> None:
    monkeypatch.setattr(
        calibration, "CALIBRATION_SAMPLES", first
    )  # the rest of what was decoded with them is used, too
    monkeypatch.setattr(ExtractJob, "in_turns", in_turns)
    decoded: list[int] = []
    shown: list[int] = []
    decode, forward = Images.decoded, Teacher.forward
    monkeypatch.setattr(
        Images, "decoded", lambda self, number, *how: [decoded.append(number), decode(self, number, *how)][1]
    )
    monkeypatch.setattr(Teacher, "forward", lambda self, pixels: [shown.append(len(pixels)), forward(self, pixels)][1])
    extract(folder, tmp_path / "cache", VIT, CNN, views=2)
    n = len(open_cache(finished))
    assert sorted(decoded) == list(range(n)) and sum(shown) == 2 * 2 * n  # two views, two teachers


def test_decoding_in_turns_and_decoding_ahead_make_the_same_cache(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExtractJob, "in_turns", False)  # as on an accelerator; `finished` was made in turns
    assert extract(folder, tmp_path / "cache", VIT, CNN, views=2) == json.loads(
        (finished / "manifest.json").read_text()
    )


def test_kill_during_extraction_leaves_a_state_that_continues(folder: Path, finished: Path, tmp_path: Path) -> None:
    whole, cache = json.loads((finished / "manifest.json").read_text()), tmp_path / "cache"
    real, calls = files.link_exclusively, iter(range(1000))

    def killing(*names: Path) -> None:
        if next(calls) == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)

    def work() -> None:
        files.link_exclusively = killing
        extract(folder, cache, VIT, CNN, views=2)

    assert ends([forked(work)]) == [-signal.SIGKILL]
    assert list(cache.glob("commits/*/*/*.json")) and not (cache / "manifest.json").exists()
    assert extract(folder, cache, VIT, CNN, views=2) == whole


def broken(folder: Path) -> Path:
    """A copy of the photographs with one truncated, one empty and one that is no image, and a bomb."""
    photos(folder, 8)
    whole = next(folder.rglob("photo-000*")).read_bytes()
    (folder / "class 0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "class 0" / "empty.jpg").write_bytes(b"")
    (folder / "class 1" / "text.jpeg").write_bytes(b"not an image at all")
    Image.new("L", (3000, 3000)).save(folder / "class 1" / "bomb.png")
    return folder


def test_bad_images_are_listed_flagged_and_past_the_limit_refused(tmp_path: Path) -> None:
    images = broken(tmp_path / "images")
    with pytest.raises(TooManyBad) as refused:
        extract(images, tmp_path / "c", max_pixels=1_000_000)
    message = str(refused.value)
    assert "4 of 12" in message and "--max-bad to 4" in message
    for name in ("class 0/cut.png", "class 0/empty.jpg", "class 1/text.jpeg", "class 1/bomb.png"):
        assert name in message
    assert "zero bytes" in message and "refused before decoding" in message
    assert not (tmp_path / "c/manifest.json").exists()
    tars = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*.tar")}
    manifest = extract(images, tmp_path / "c", max_pixels=1_000_000, max_bad=4)
    assert tars == {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*.tar")}, "nothing ran again"
    cache = open_cache(tmp_path / "c")
    assert manifest["n_valid"] == len(cache.numbers) == 8 and len(cache) == 12
    bad = cache["class 0/empty.jpg"]
    assert not bad.valid and "zero bytes" in str(bad.reason)


def test_a_folder_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images can be read.*zero bytes"):
        extract(tmp_path / "images", tmp_path / "c")


def test_an_image_changed_since_calibration_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = photos(tmp_path / "images", 4)
    with monkeypatch.context() as patch:
        patch.setattr(run.commits, "create_columns", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(images, tmp_path / "c")
    victim = next(images.rglob("*.png"))
    data = bytearray(victim.read_bytes())
    data[-20] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="its bytes changed since the cache was begun"):
        extract(images, tmp_path / "c")


@pytest.mark.parametrize(
    ("changed", "field"),
    [({"recipe": ViewRecipe(32, seed=1)}, "recipe.seed is 0 there and 1"), ({"views": 1}, "n_views is 2 there and 1"),
     ({"dtype": "float16"}, "dtype is 'int8' there and 'float16'")],
)  # fmt: skip
def test_other_options_are_refused_by_name_and_change_nothing(
    folder: Path, finished: Path, changed: dict[str, Any], field: str
) -> None:
    before, said = {path: path.read_bytes() for path in finished.rglob("*.json")}, list[str]()
    with pytest.raises(ValueError, match=field):
        extract(folder, finished, VIT, CNN, said=said, **{"views": 2, **changed})
    assert not said  # no plan of what will not be done
    assert before == {path: path.read_bytes() for path in finished.rglob("*.json")}


def test_other_images_are_refused_before_a_plan_is_shown(folder: Path, tmp_path: Path) -> None:
    extract(photos(tmp_path / "few", 4), tmp_path / "c")
    said: list[str] = []
    with pytest.raises(ValueError, match="it was begun with 4 images and this command has 20"):
        extract(folder, tmp_path / "c", said=said)
    assert not said


def test_a_forgotten_option_of_the_model_is_one_line_that_names_it(folder: Path, tmp_path: Path) -> None:
    narrow = timm.create_model("test_vit", pretrained=False, embed_dim=32).state_dict()
    torch.save(narrow, tmp_path / "narrow.pth")
    told = CliRunner().invoke(
        main, [str(folder), str(tmp_path / "c"), "--teacher", f"vit=timm:test_vit@{tmp_path}/narrow.pth"]
    )
    assert told.exit_code == 1 and len(told.output.strip().splitlines()) == 1
    assert "with its options (?embed_dim=, ?depth=, ...)" in told.output and not (tmp_path / "c").exists()


def test_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / f"{seed}.pth")
    extract(folder, tmp_path / "c", f"vit=timm:test_vit@{tmp_path / '0.pth'}")
    with pytest.raises(ValueError, match="weights_sha256"):
        extract(folder, tmp_path / "c", f"vit=timm:test_vit@{tmp_path / '1.pth'}")


def test_a_folder_that_is_no_cache_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="this folder is no cache .no plan.json. and holds .thesis.tex"):
        extract(folder, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        extract(folder, tmp_path / "mine/thesis.tex")


def cli(arguments: Sequence[str | Path]) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_dry_run_prints_the_plan_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    code, output = cli(
        [folder, tmp_path / "c", "--teacher", VIT, "--size", "32", "--grid", "4", "--views", "3", "--dry-run"]
    )
    assert code == 0, output
    for word in ("20 images", "2 labels", "3 views", "vit.pre_tail", "RANDOM weights", "are free"):
        assert word in output
    assert not (tmp_path / "c").exists()


def test_cli_errors_are_one_line_without_a_traceback(folder: Path, tmp_path: Path) -> None:
    code, output = cli([folder, tmp_path / "c", "--teacher", VIT, "--size", "33", "--grid", "4"])
    assert code == 1 and "not a multiple of --grid 4" in output and "Traceback" not in output
    (tmp_path / "empty").mkdir()
    code, output = cli([tmp_path / "empty", tmp_path / "c", "--teacher", VIT])
    assert code == 1 and "no images" in output
    code, output = cli([folder, tmp_path / "c", "--teacher", "vit=timm:vit_bse_patch16_224/random"])
    assert code == 1 and "vit_base_patch16_224" in output


def test_files_that_are_no_images_are_counted_aloud(tmp_path: Path) -> None:
    images = photos(tmp_path / "images", 4)
    for name in ("a.pdf", "b.TXT", "c.txt", ".hidden"):
        (images / name).write_bytes(b"x")
    os.mkfifo(images / "p.jpg")
    code, output = cli([images, tmp_path / "c", "--teacher", VIT, "--size", "32", "--grid", "4"])
    assert code == 0 and "3 files that are no images were passed over (.pdf .txt)" in output
    assert "1 name of an image that is no regular file was passed over, unopened: p.jpg (a FIFO)" in output


def test_features_that_codes_cannot_hold_stop_the_run(folder: Path, tmp_path: Path) -> None:
    options = Options(images=[folder], cache=tmp_path / "c", teachers=(VIT, CNN), **BASE)
    with pytest.raises(
        ValueError, match=r"view 0, shard 0: int8 keeps an SNR of \d\d\.\d dB; at least 90 .*--dtype float16"
    ):
        extract_features(dataclasses.replace(options, min_snr=90.0), say=lambda line: None)
    assert list((tmp_path / "c/commits/0/pixels").glob("*.json")), "what is committed stays"
    assert not list((tmp_path / "c/commits").glob("0/*.*/*.json")) and not (tmp_path / "c/manifest.json").exists()
    manifest = extract_features(options, say=lambda line: None)
    assert all(column["quality"]["snr_db"] > 20 for column in manifest["columns"])
    exact = dataclasses.replace(options, cache=tmp_path / "f", dtype="float16", min_snr=290.0)
    extract_features(exact, say=lambda line: None)
    assert engine.too_coarse(-20.0, options) and not engine.too_coarse(-300.0, options)


def test_one_hopeless_teacher_does_not_cost_the_others_their_shard(folder: Path, tmp_path: Path) -> None:
    options = Options(images=[folder], cache=tmp_path / "c", teachers=(VIT, CNN), **BASE)
    manifest = extract_features(dataclasses.replace(options, cache=tmp_path / "whole"), say=lambda line: None)
    snr = {column["name"]: column["quality"]["snr_db"] for column in manifest["columns"]}
    worse, better = sorted(snr, key=lambda name: snr[name])
    between = sum(snr.values()) / 2
    with pytest.raises(ValueError, match=f"{worse}, view 0, shard 0: int8 keeps"):
        extract_features(dataclasses.replace(options, min_snr=between), say=lambda line: None)
    assert (tmp_path / f"c/commits/0/{better}/000000.json").exists()
    assert not (tmp_path / f"c/commits/0/{worse}").exists()


def test_the_command_s_choices_are_those_that_there_are() -> None:
    """The commands name them themselves, so that --help need not wait for torch."""
    assert list(command.DTYPE_NAMES) == list(DTYPES) and list(command.FORMAT_NAMES) == list(STORAGES)
    assert command.TEACHERS_BY_DEFAULT == DEFAULT_TEACHERS == Options.teachers
    loaded = "import sys, mrmae.extract.cli, mrmae.extract.inspect.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0


def test_a_stop_before_anything_was_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "extract_features", killed)
    result = CliRunner().invoke(main, [str(tmp_path), str(tmp_path / "c")])
    assert result.exit_code == 130 and "nothing was written yet" in result.output


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_columns_are_computed_a_view_at_a_time_and_an_image_is_decoded_once(
    extract: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, turns, decoded = engine.extract_shard, list[tuple[int, list[tuple[int, str]]]](), list[int]()
    of_image = Images.decoded
    monkeypatch.setattr(engine, "extract_shard", lambda job, shard, units, *rest: [turns.append((shard, [*units])), real(job, shard, units, *rest)][1])  # fmt: skip
    monkeypatch.setattr(Images, "decoded", lambda self, number, *how: [decoded.append(number), of_image(self, number, *how)][1])  # fmt: skip
    extract(photo_folder, tmp_path / "c", VIT, CNN, views=3, shard_samples=8)
    both = ["cnn.last", "vit.pre_tail"]
    first = [*((view, "pixels") for view in range(3)), *((0, column) for column in both)]
    assert turns == [(shard, [*units]) for shard in range(3) for units in
                     (first, [(1, column) for column in both], [(2, column) for column in both])]  # fmt: skip
    assert sorted(decoded) == [*range(len(decoded))], "once each"
    turns.clear()
    extract(photo_folder, tmp_path / "c", VIT, CNN, views=4, shard_samples=8)
    assert turns == [(shard, [(3, "pixels"), *((3, column) for column in both)]) for shard in range(3)]


def test_what_a_gpu_copies_behind_the_next_batch_is_waited_for_before_it_is_written(
    extract: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, real = list[str](), engine.commit_shard
    monkeypatch.setattr(engine, "arrived", lambda device: order.append(f"waited for {device}"))
    monkeypatch.setattr(engine, "commit_shard", lambda *what: [order.append("wrote"), real(*what)][1])
    extract(photo_folder, tmp_path / "c", VIT, shard_samples=32)
    assert order == ["waited for cpu", "wrote"]
    monkeypatch.undo()
    stream = SimpleNamespace(synchronize=lambda: order.append("synchronised"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: order.append(device) or stream)
    engine.arrived("cpu")
    engine.arrived("cuda:1")
    assert order[2:] == ["cuda:1", "synchronised"]


@pytest.mark.parametrize(
    "units, turns",
    [
        ([], []),
        ([(0, "pixels")], [([(0, "pixels")], (0,), (), (0,))]),
        ([(0, "a"), (0, "pixels"), (1, "pixels")], [([(0, "pixels"), (1, "pixels"), (0, "a")], (0, 1), (0,), (0, 1))]),
        ([(1, "a"), (2, "b"), (2, "a")], [([(1, "a")], (1,), (1,), (1,)), ([(2, "a"), (2, "b")], (2,), (2,), (2,))]),
        ([(1, "a"), (0, "pixels")], [([(0, "pixels"), (1, "a")], (0, 1), (1,), (0, 1))]),
        ([(0, "a"), (1, "a"), (1, "pixels")], [([(1, "pixels"), (0, "a")], (0, 1), (0,), (0,)), ([(1, "a")], (1,), (1,), (1,))]),
    ],
)  # fmt: skip
def test_turns_of_a_shard(units: list[tuple[int, str]], turns: list[Any]) -> None:
    found = engine.turns_of(units)
    assert [([*t.units], t.views, t.shown, t.ends) for t in found] == turns
    assert [t.last for t in found] == [False] * (len(turns) - 1) + [True] * bool(turns)
    assert sorted(view for t in found for view in t.ends) == sorted({view for view, _ in units})
