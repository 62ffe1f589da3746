"""extract-features and inspect-cache work on columns in tars as on zarr: the same ids and numbers, the same repairs."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from contents import contents_without_records

from mrmae.extract import pipeline as engine
from mrmae.extract.cli import main as extract_features
from mrmae.extract.inspect.cli import main
from mrmae.shards.cache import open_cache
from mrmae.shards.plans import DIGESTS
from mrmae.shards.stats import read_stats

VIT = "vit=timm:test_vit/random"
CNN = "cnn=timm:test_efficientnet/random"
OPTIONS: dict[str, Any] = {"views": 2, "shard_samples": 8, "format": "webdataset"}


def inspect(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def contents(path: Path) -> dict[str, bytes]:
    """All files but the commit records and the memory of hashes, which tell the time."""
    return {name: data for name, data in contents_without_records(path).items() if name != DIGESTS}


@pytest.fixture(scope="module")
def tars(extract: Any, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache `extracted`, with its columns in tars."""
    cache = tmp_path_factory.mktemp("tars") / "cache"
    extract(photo_folder, cache, VIT, CNN, **OPTIONS)
    return cache


def test_extraction_stores_the_same_numbers_under_the_same_ids(extracted: Path, tars: Path) -> None:
    one, other = open_cache(extracted), open_cache(tars)
    assert one.ids == other.ids
    for name, column in one.columns.items():
        for array in column.layout.arrays():
            a, b = (c.read_column(name, c.numbers, c.numbers * 0 + 1, (array,))[array] for c in (one, other))
            assert np.array_equal(a, b), (name, array)


def test_an_interrupted_run_parts_and_added_teachers_make_the_same_bytes(
    extract: Any, photo_folder: Path, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    real, calls = engine.commits.store_column, iter(range(100))

    def full(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine.commits, "store_column", full)
        with pytest.raises(OSError, match="No space left"):
            extract(photo_folder, cache, VIT, **{**OPTIONS, "views": 1})
    extract(photo_folder, cache, VIT, shards="1/2", **{**OPTIONS, "views": 1})
    extract(photo_folder, cache, VIT, **{**OPTIONS, "views": 1})
    with pytest.raises(ValueError, match="format is 'webdataset' there and 'zarr' in this command"):
        extract(photo_folder, cache, VIT, CNN)
    assert open_cache(cache).columns.keys() == {"vit.pre_tail"}
    extract(photo_folder, cache, VIT, CNN, **OPTIONS)
    assert contents(cache) == contents(tars)


def test_repair_restores_every_byte(tars: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tars, copy)
    tar = copy / "views/1/vit/pre_tail/000001.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    (copy / "views/0/cnn/last/000002.index.npz").unlink()
    (copy / "views/0/vit/pre_tail/column.json").write_text("{}")
    code, text = inspect("repair", copy, "--yes")
    assert code == 0 and "view 1, vit.pre_tail: shards 1" in text and "view 0, cnn.last: shards 2" in text
    words = shlex.split(text.rpartition("extract-features")[2])
    assert words[words.index("--format") + 1] == "webdataset"
    result = CliRunner().invoke(extract_features, [str(copy) if word == str(tars) else word for word in words])
    assert result.exit_code == 0, result.output
    assert contents(copy) == contents(tars) and inspect("verify", copy, "--full")[0] == 0


def test_inspect_cache_says_the_same_of_both_formats(extracted: Path, tars: Path, tmp_path: Path) -> None:
    code, text = inspect("show", tars)
    assert code == 0 and "shards of 8, int8 in webdataset" in text and "6/6" in text
    code, text = inspect("verify", tars, "--full", "--live", 3)
    assert code == 0 and text.count("good") == 2
    assert inspect("verify", tars, "--live", 3, "--mirror")[0] == 1
    code, text = inspect("diff", extracted, tars)
    assert code == 1 and "format: 'zarr' | 'webdataset'" in text and "quantiser" not in text and ".id:" not in text
    sheets, moments = [], []
    for i, path in enumerate((extracted, tars)):
        shutil.copytree(path, here := tmp_path / str(i) / "cache")  # the sheet says the name
        assert inspect("pictures", here)[0] == inspect("stats", here)[0] == 0
        sheets.append((here / "pictures.png").read_bytes())
        moments.append(read_stats(open_cache(here), "vit.pre_tail"))
    assert sheets[0] == sheets[1] and moments[0].id == moments[1].id
    assert np.array_equal(moments[0].covariance, moments[1].covariance)
    assert inspect("drop", here, "cnn", "--yes")[0] == 0 and inspect("verify", here, "--full")[0] == 0


def test_convert_verifies_live_repairs_itself_and_is_not_extracted_into(
    extract: Any, photo_folder: Path, extracted: Path, tars: Path, tmp_path: Path
) -> None:
    out, half = tmp_path / "out", tmp_path / "half"
    code, text = inspect("convert", extracted, out, "--format", "webdataset")
    assert code == 0 and f"{out}: 20 images, vit.pre_tail, cnn.last, int8 in webdataset" in text
    assert contents(out) == contents(tars), "as if it had been extracted so"
    assert inspect("verify", out, "--full", "--live", 2)[0] == 0, "the teachers of the source's command are found"
    code, text = inspect("convert", out, half, "--dtype", "float16", "--drop", "cnn")
    assert code == 0 and "vit.pre_tail: requantised from sha256:" in text and "counted from the teacher" in text
    assert "requantised" in inspect("show", half)[1] and '"source": "sha256:' in inspect("show", half, "--json")[1]
    assert inspect("verify", half, "--live", 2)[0] == 0 and inspect("verify", half, "--live", 2, "--mirror")[0] == 1
    with pytest.raises(ValueError, match="vit.pre_tail was made by inspect-cache convert"):
        extract(photo_folder, half, VIT, CNN, **{**OPTIONS, "dtype": "float16"})
    whole = contents(half)
    (half / "views/0/vit/pre_tail/000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="has shards missing; only that can write them"):
        extract(photo_folder, half, VIT, **{**OPTIONS, "dtype": "float16"})
    code, text = inspect("repair", half, "--run", "--yes")
    assert code == 0 and f"inspect-cache convert {out} {half} --dtype float16 --drop cnn" in text
    assert contents(half) == whole


def test_fp8_goes_through_extraction_and_inspection(extract: Any, photo_folder: Path, tmp_path: Path) -> None:
    extract(photo_folder, tmp_path / "c", VIT, **{**OPTIONS, "views": 1, "dtype": "fp8"})
    code, text = inspect("verify", tmp_path / "c", "--full", "--live", 4)
    assert code == 0 and "SNR >= 3" in text, text
    assert inspect("verify", tmp_path / "c", "--live", 4, "--mirror")[0] == 1
    code, text = inspect("stats", tmp_path / "c")
    assert code == 0 and "320 tokens" in text
    assert inspect("pictures", tmp_path / "c")[0] == 0 and "fp8 in webdataset" in inspect("show", tmp_path / "c")[1]
