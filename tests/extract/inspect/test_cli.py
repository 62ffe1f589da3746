"""inspect-cache: what it prints is true, what it passes is whole, what it repairs is as it was."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from contents import contents_without_records as contents
from PIL import Image

from mrmae.common import pictures
from mrmae.extract.cli import main as extract_features
from mrmae.extract.inspect.cli import main
from mrmae.extract.inspect.compare import compare_live
from mrmae.shards.cache import open_cache
from mrmae.shards.stats import read_stats

Make = Callable[..., Path]


def inspect(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def copy(extracted: Path, tmp_path: Path) -> Path:
    shutil.copytree(extracted, tmp_path / "copy")
    return tmp_path / "copy"


def flip_byte(file: Path, at: int = 200) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x55
    file.write_bytes(bytes(content))


def test_show_names_columns_weights_quality_and_state(extracted: Path) -> None:
    code, text = inspect("show", extracted)
    assert code == 0
    for word in ("finished", "20 (0 bad), 2 labels", "2 of 32 px", "4 x 4 patches", "vit.pre_tail", "RANDOM weights",
                 "6/6", "+cls +attention", "standardised"):  # fmt: skip
        assert word in text, word
    code, text = inspect("show", extracted, "--json")
    found = json.loads(text)
    assert found["finished"] and found["images"] == 20 and found["shards"] == found["shards_committed"] == 18
    assert found["columns"][1]["arrays"]["tokens"] == [[16, 64], "int8"]
    assert found["columns"][2]["quality"]["snr_db"] > 30
    assert found["bytes"] == sum(c["bytes"] for c in found["columns"])


def test_show_says_how_far_an_unfinished_cache_is(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", n=6, n_views=1, shard_samples=3, bad=(1,), finalise=False)
    (path / "commits/0/b.pre_tail/000001.json").unlink()
    code, text = inspect("show", path)
    assert code == 0 and "UNFINISHED: 5 of 6 shards" in text and "(1 bad)" in text
    assert "bild 001 ü.png: not an image" in text
    code, text = inspect("verify", path)
    assert code == 1 and "unfinished, 5 of 6 shards are committed" in text


def test_a_path_without_a_cache_is_one_line(tmp_path: Path) -> None:
    for command in ("show", "verify", "repair", "stats", "pictures"):
        code, text = inspect(command, tmp_path / "nothing")
        assert code == 1 and "Error: " in text and "no plan.json" in text and "Traceback" not in text, command


def test_a_clean_cache_is_passed_without_a_false_alarm(extracted: Path, make_cache: Make, tmp_path: Path) -> None:
    bad = make_cache(tmp_path / "c", n=6, n_views=1, shard_samples=3, bad=(1,), dtype="float16")
    for path in (extracted, bad):
        for options in ([], ["--full"]):
            code, text = inspect("verify", path, *options)
            assert code == 0 and "as they were written" in text


def test_live_teachers_agree_with_the_cache_and_their_mirror_image_does_not(extracted: Path) -> None:
    code, text = inspect("verify", extracted, "--live", 5)
    assert code == 0 and text.count("good") == 2 and "cls 1.000" in text and "attention 1.000" in text
    code, text = inspect("verify", extracted, "--live", 5, "--mirror")
    assert code == 1 and text.count("FAILS") == 2 and "this failed, as it must" in text


def test_another_live_teacher_is_refused_by_field(extracted: Path) -> None:
    cache = open_cache(extracted)
    with pytest.raises(ValueError, match="interpolation is 'bicubic' there and 'bilinear' in the teacher at hand"):
        compare_live(cache, 1, texts=["vit=timm:test_vit/random?interpolation=bilinear"])
    with pytest.raises(ValueError, match="this cache has no such teacher; it has .'cnn', 'vit'"):
        compare_live(cache, 1, texts=["dino=timm:test_vit/random"])
    code, text = inspect("verify", extracted, "--mirror")
    assert code == 1 and "belong to --live" in text


def test_weights_from_a_file_are_found_again_or_asked_for(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    extract(photo_folder, tmp_path / "c", f"vit=timm:test_vit@{tmp_path / 'w.pth'}")
    assert inspect("verify", tmp_path / "c", "--live", 2)[0] == 0
    for record in tmp_path.glob("c/commits/*/*/*.json"):  # a cache that recorded no command
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "command"}))
    code, text = inspect("verify", tmp_path / "c", "--live", 2)
    assert code == 1 and "--teacher vit=timm:test_vit@FILE" in text
    assert (
        inspect("verify", tmp_path / "c", "--live", 2, "--teacher", f"vit=timm:test_vit@{tmp_path / 'w.pth'}")[0] == 0
    )


def test_one_problem_is_not_called_problems(copy: Path) -> None:
    (copy / "views/0/pixels/000002.tar").unlink()
    assert "1 problem; to repair: inspect-cache repair" in inspect("verify", copy)[1]
    with pytest.raises(ValueError, match="copy: 1 problem; the cache cannot be trusted"):
        open_cache(copy)


def test_verify_lists_every_problem_with_its_shard(copy: Path) -> None:
    flip_byte(copy / "views/1/vit.pre_tail.zarr/tokens/c/1/0/0")
    (copy / "views/0/pixels/000002.tar").unlink()
    (copy / "commits/0/cnn.last/000000.json").unlink()
    code, text = inspect("verify", copy)
    assert code == 1 and "2 problems; to repair: inspect-cache repair" in text
    assert "views/0/pixels/000002.tar (shard 2 of pixels, view 0): cannot be read" in text
    assert "000000.json (shard 0 of cnn.last, view 0): the commit record is missing" in text
    code, text = inspect("verify", copy, "--full")
    assert "3 problems" in text or "4 problems" in text
    assert "tokens/c/1/0/0 (shard 1 of vit.pre_tail, view 1): its sha256 is not" in text


def test_checksums_are_checked_beside_the_hashes(copy: Path) -> None:
    """A shard whose wrong bytes were recorded: only the crc32c knows."""
    file, record = copy / "views/1/vit.pre_tail.zarr/norm/c/0/0", copy / "commits/1/vit.pre_tail/000000.json"
    before = file.read_bytes()
    flip_byte(file, 60)
    old, new = (hashlib.sha256(data).hexdigest() for data in (before, file.read_bytes()))
    record.write_text(record.read_text().replace(old, new))
    (copy / "manifest.json").unlink()
    code, text = inspect("verify", copy, "--full")
    assert code == 1 and "norm/c/0/0 (shard 0 of vit.pre_tail, view 1): the chunk fails its crc32c (sample " in text


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit in a shard": lambda c: flip_byte(c / "views/1/vit.pre_tail.zarr/tokens/c/1/0/0"),
    "a deleted tar": lambda c: (c / "views/0/pixels/000002.tar").unlink(),
    "a deleted record": lambda c: (c / "commits/0/cnn.last/000000.json").unlink(),
    "a damaged tail": lambda c: flip_byte(c / "tail/vit.safetensors", -3),
    "zarr metadata": lambda c: flip_byte(c / "views/0/vit.pre_tail.zarr/tokens/zarr.json", 20),
    "missing zarr metadata": lambda c: (c / "views/1/cnn.last.zarr/zarr.json").unlink(),
    "the plan": lambda c: flip_byte(c / "plan.json", 40),
    "the table of samples": lambda c: (c / "samples.arrow").unlink(),
}


def test_repair_restores_every_byte_and_touches_only_what_is_damaged(extracted: Path, copy: Path) -> None:
    for harm in DAMAGE.values():
        harm(copy)
    times = {file: file.stat().st_mtime_ns for file in (copy / "views").rglob("*") if file.is_file()}
    code, text = inspect("repair", copy, "--dry-run")
    assert code == 0 and "view 1, vit.pre_tail: shards 1" in text and "extract-features" in text
    code, text = inspect("repair", copy, "--yes")
    assert code == 0 and "cd " in text and f" {copy} --" in text.rpartition("extract-features")[2], (
        "a moved cache is the target"
    )
    repaired = open_again(copy, extracted, text)
    assert repaired == contents(extracted)
    kept = [file for file in times if "vit.pre_tail.zarr/attention/c/0/0" in str(file)]
    assert kept and all(file.stat().st_mtime_ns == times[file] for file in kept)
    assert inspect("verify", copy, "--full")[0] == 0 and inspect("repair", copy)[1].endswith("nothing to repair\n")


def test_a_damaged_manifest_is_written_again(extracted: Path, copy: Path) -> None:
    flip_byte(copy / "manifest.json", 40)
    code, text = inspect("repair", copy, "--yes")
    assert code == 0 and "removed 1 file\n" in text
    assert open_again(copy, extracted, text) == contents(extracted)


def test_a_plan_that_is_not_the_shards_is_no_reason_to_remove_them(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    plan = copy / "plan.json"
    plan.write_text(plan.read_text().replace('"interpolation": "bicubic"', '"interpolation": "bilinear"'))
    before = contents(copy)
    code, text = inspect("repair", copy, "--yes")
    assert code == 1 and "18 of 18 commit records are of another plan" in text and "nothing was changed" in text
    assert contents(copy) == before and len(list(copy.glob("commits/*/*/*.json"))) == 18


def open_again(copy: Path, original: Path, text: str) -> dict[str, bytes]:
    """The cache after the printed command has run on the copy instead of the original."""
    words = shlex.split(text.rpartition("extract-features")[2])
    words = [str(copy) if word == str(original) else word for word in words]
    result = CliRunner().invoke(extract_features, words)
    assert result.exit_code == 0, result.output
    return contents(copy)


def test_repair_runs_the_recorded_command(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    extract(photo_folder, tmp_path / "c", device="cpu")
    flip_byte(tmp_path / "c/views/0/vit.pre_tail.zarr/tokens/c/0/0/0")
    before = (tmp_path / "c/views/0/pixels/000000.tar").stat().st_mtime_ns
    code, text = inspect("repair", tmp_path / "c", "--run", "--yes")
    assert code == 0, text
    assert inspect("verify", tmp_path / "c", "--full")[0] == 0
    assert (tmp_path / "c/views/0/pixels/000000.tar").stat().st_mtime_ns == before


def test_diff_names_fields_and_shards(extracted: Path, copy: Path, make_cache: Make, tmp_path: Path) -> None:
    assert inspect("diff", extracted, copy) == (0, f"{extracted} and {copy} hold the same\n")
    a, b = make_cache(tmp_path / "a"), make_cache(tmp_path / "b", dtype="float16", n_views=1)
    code, text = inspect("diff", a, b)
    assert code == 1
    for line in ("dtype: 'int8' | 'float16'", "n_views: 2 | 1", "shards.view 0.a.pre_tail: 3 of 3 shards differ",
                 "shards.view 1.pixels: [[", "columns.a.pre_tail.quantiser.dtype"):  # fmt: skip
        assert line in text, line
    assert "shards.view 0.pixels" not in text, "the pixels are the same"


def test_stats_are_numpys_in_float64(extracted: Path, copy: Path) -> None:
    code, text = inspect("stats", copy)
    assert code == 0 and "640 tokens" in text
    cache = open_cache(copy)
    for column in ("vit.pre_tail", "cnn.last"):
        found = read_stats(cache, column)
        parts = [cache.read_tokens(column, cache.numbers, cache.numbers * 0 + v).flatten(0, 1) for v in range(2)]
        x = torch.cat(parts).double().numpy()
        assert np.allclose(found.mean.numpy(), x.mean(0), rtol=0, atol=1e-12)
        assert np.allclose(found.covariance.numpy(), np.cov(x.T, bias=True), rtol=1e-9, atol=1e-12)
        assert torch.equal(found.variance, found.covariance.diagonal()) and found.n == 640
        assert found.mean.dtype == torch.float64
    with pytest.raises(ValueError, match="there are no moments of this column; run inspect-cache stats"):
        read_stats(open_cache(extracted), "vit.pre_tail")
    assert "no such column" in inspect("stats", copy, "--column", "x.y")[1]
    pinned = open_cache(copy).narrowed(None, 1)
    with pytest.raises(ValueError, match=f"run inspect-cache stats {copy} --views 1$"):
        read_stats(pinned, "vit.pre_tail")
    assert "320 tokens" in inspect("stats", copy, "--views", 1)[1]
    one, n = read_stats(pinned, "vit.pre_tail"), pinned.numbers
    assert torch.allclose(
        one.mean, pinned.read_tokens("vit.pre_tail", n, n * 0).double().flatten(0, 1).mean(0), rtol=0, atol=1e-12
    )
    assert read_stats(cache, "vit.pre_tail").n == 640, "those of both views stay"


def test_pictures_show_the_stored_views(extracted: Path, tmp_path: Path) -> None:
    code, text = inspect("pictures", extracted, "--out", tmp_path / "sheet.png", "--samples", 3)
    assert code == 0 and text.strip() == str(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    step = pictures.CELL + pictures.GAP
    assert sheet.shape[1] == 2 * pictures.MARGIN + 7 * step - pictures.GAP and sheet.shape[0] > 3 * step
    assert (sheet == pictures.RED).all(-1).any(), "the teachers' weights are random"
    cache = open_cache(extracted)
    view = cache.read_pixels(cache.numbers[:1], [0])[0].numpy()
    whole = np.asarray(pictures.enlarged(view)).astype(int)
    x = slice(pictures.MARGIN, pictures.MARGIN + pictures.CELL)
    off = [np.abs(sheet[y : y + pictures.CELL, x] - whole).mean() for y in range(step)]
    assert min(off) == 0, "the first sample's view stands somewhere below the title"
    assert "--view 2: this cache has 2 views" in inspect("pictures", extracted, "--view", 2)[1]


def test_the_zarr_metadata_that_verify_expects_is_zarrs_own(extracted: Path) -> None:
    group: Any = zarr.open_group(extracted / "views/0/vit.pre_tail.zarr", mode="r")
    assert group["tokens"].shape == (20, 16, 64)
