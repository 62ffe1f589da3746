"""Pixel tars: plain USTAR for everyone, byte-reproducible, indexed for us."""

import hashlib
import io
import json
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from PIL import Image

from mrmae.shards.format.plan import PIXELS
from mrmae.shards.format.spec import encoding_of
from mrmae.shards.format.views import View, decode_view, encode_view
from mrmae.shards.store import tar
from mrmae.shards.store.reader import Damaged
from mrmae.shards.store.tar import PixelRow, index_path, parse_row, read_index, write_pixel_tar

JPEG = encoding_of("jpeg95")
KEYS = ["a/1.2.840.10008 x.jpg", "ü" * 120 + ".png", "bad.jpg", "c.tar/d.png"]


def rows() -> list[PixelRow]:
    out = []
    for i, key in enumerate(KEYS):
        pixels = np.full((8, 8, 3), 40 * i, np.uint8)
        good = key != "bad.jpg"
        view = View(i, 2, 8, 9, i % 2 == 0, 20, 30)
        out.append(PixelRow(5 + i, key, f"label {i}" if i else None, view if good else None,
                            encode_view(pixels, JPEG) if good else None, None if good else "truncated", f"{i:064x}"))  # fmt: skip
    return out


def test_plain_tarfile_reads_the_members_as_ustar(tmp_path: Path) -> None:
    write_pixel_tar(tmp_path / "000000.tar", rows())
    with tarfile.open(tmp_path / "000000.tar", format=tarfile.USTAR_FORMAT) as tar:
        members = tar.getmembers()
        names = [member.name for member in members]
        assert names == ["000000005.jpg", "000000005.json", "000000006.jpg", "000000006.json", "000000007.json",
                         "000000008.jpg", "000000008.json"]  # fmt: skip
        assert all((m.mtime, m.uid, m.gid, m.uname, m.mode) == (0, 0, 0, "", 0o644) for m in members)
        assert not any(m.pax_headers for m in members)
        file = tar.extractfile("000000006.jpg")
        assert file is not None and file.read() == rows()[1].stored


def test_plain_webdataset_reads_every_row(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_pixel_tar(tmp_path / "000000.tar", rows())
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["json"]["key"] for sample in samples] == KEYS
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(5, 9)]
    for sample, row in zip(samples, rows()):
        assert ("jpg" in sample) == (row.stored is not None)
        if row.stored is not None:
            assert np.array_equal(sample["jpg"], decode_view(row.stored, JPEG, 8))


def test_the_json_holds_what_replays_the_view(tmp_path: Path) -> None:
    write_pixel_tar(tmp_path / "000000.tar", rows())
    with tarfile.open(tmp_path / "000000.tar") as tar:
        file = tar.extractfile("000000006.json")
        assert file is not None
        content = file.read()
    jpeg = rows()[1].stored
    assert json.loads(content) == {
        "number": 6, "key": KEYS[1], "label": "label 1", "valid": True, "reason": None, "crop": [1, 2, 8, 9],
        "flip": False, "source": [20, 30], "crc32c": google_crc32c.value(jpeg),
    }  # fmt: skip
    assert parse_row(content) == PixelRow(6, KEYS[1], "label 1", View(1, 2, 8, 9, False, 20, 30), None)


def test_the_sidecar_finds_every_member(tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    record = write_pixel_tar(path, rows())
    tar, index = path.read_bytes(), read_index(path)
    assert index.keys == KEYS and index.tables["jpg"][2].tolist() == [-1, -1, -1]
    for i, row in enumerate(rows()):
        for table, content in ((index.tables["jpg"], row.stored), (index.tables["json"], None)):
            offset, size, crc = table[i].tolist()
            if offset >= 0:
                assert google_crc32c.value(tar[offset : offset + size]) == crc
                assert content is None or tar[offset : offset + size] == content
    about = json.loads(np.load(index_path(path))["about"].tobytes())
    assert about["tar"] == {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
    assert record["files"][0].to_json() == about["tar"]
    assert (record["count"], record["valid"], record["first"], record["last"]) == (4, 3, KEYS[0], KEYS[-1])
    assert record["bad"] == {"7": "truncated"}
    assert record["heights"] == [20, 20, 0, 20] and record["widths"] == [30, 30, 0, 30]


def test_equal_rows_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pixel_tar(tmp_path / name / "000000.tar", rows())
    for name in ("000000.tar", "000000.index.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # golden: the container's bytes, apart from JPEG bytes that depend on the encoder
    plain = [PixelRow(0, "k", "l", View(0, 0, 1, 1, False, 1, 1), b"jpeg", sha256="00" * 32),
             PixelRow(1, "z", None, None, None, "r", "01" * 32)]  # fmt: skip
    write_pixel_tar(tmp_path / "c" / "000000.tar", plain)
    digest = hashlib.sha256((tmp_path / "c" / "000000.tar").read_bytes()).hexdigest()
    assert digest == "956a9019b784cf28d517f6dacc4d92b243625e7bf5496865da7acefda7efefb2"


def test_gaps_and_disorder_are_refused(tmp_path: Path) -> None:
    for wrong in (rows()[::-1], rows()[::2]):
        with pytest.raises(ValueError, match="not one range of samples"):
            write_pixel_tar(tmp_path / "000000.tar", wrong)
    assert not list(tmp_path.iterdir())


def test_damaged_sidecars_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    write_pixel_tar(path, rows())
    whole = index_path(path).read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (whole.index(b"jpg"), len(whole) // 2)]
    for content in (b"", b"{}", whole[:200], whole[:-30], *flipped):
        index_path(path).write_bytes(content)
        with pytest.raises(ValueError, match="000000.index.npz: missing or damaged"):
            read_index(path)


@pytest.mark.parametrize("case", ["a bomb", "more than there is", "objects", "floats", "a key that is none"])
def test_a_hostile_sidecar_is_refused_before_it_takes_memory(tmp_path: Path, case: str) -> None:
    path = tmp_path / "000000.tar"
    write_pixel_tar(path, rows())
    arrays = dict(np.load(index_path(path)))
    save = np.savez_compressed if case == "a bomb" else np.savez
    if case == "a bomb":
        arrays["members"] = np.zeros((1 << 20, 2, 3), np.int64)
    elif case == "objects":
        arrays["members"] = arrays["members"].astype(object)
    elif case == "floats":
        arrays["members"] = arrays["members"].astype(float)
    elif case == "a key that is none":
        arrays["about"] = np.frombuffer(arrays["about"].tobytes().replace(b'"bad.jpg"', b"[1]"), np.uint8)
    save(index_path(path), **arrays)
    if case == "more than there is":
        with zipfile.ZipFile(index_path(path)) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(index_path(path), "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content.replace(b"(4, 2, 3)", b"(99999999999, 2, 3)").replace(b" " * 10 + b"\n", b"\n", 1)
                                 if name == "members.npy" else content)  # fmt: skip
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="000000.index.npz: missing or damaged"):
            read_index(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_stored_pixels_open_in_pillow() -> None:
    jpeg = rows()[1].stored
    assert jpeg is not None
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize("size", [0, 1, 511, 88_213, 8**11 - 1])
@pytest.mark.parametrize("name", ["000000000.jpg", "123456789.attention.npy"])
def test_a_header_is_tarfiles_own(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert tar.header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_views_are_decoded_into_their_buffers_and_what_is_another_shards_is_damage(tmp_path: Path) -> None:
    path, of = tmp_path / "000000.tar", {"geometry_id": "sha256:1", "view": 0, "shard": 0}
    write_pixel_tar(path, rows(), of)
    shard, buffers = tar.open_pixels(path, of, KEYS, JPEG), [np.zeros((8, 8, 3), np.uint8) for _ in range(2)]
    shard.read([3, 1], {PIXELS: buffers})
    for buffer, row in zip(buffers, (rows()[3], rows()[1])):
        assert (
            row.stored is not None
            and np.array_equal(buffer, decode_view(row.stored, JPEG, 8))
            and shard.crop(row.number - 5) == row.view
        )
    with pytest.raises(Damaged, match="there is no such member") as caught:
        shard.read([1, 2], {PIXELS: buffers})
    assert caught.value.row == 2
    with pytest.raises(Damaged, match="its index belongs to"):
        tar.open_pixels(path, of | {"shard": 1}, KEYS, JPEG)
    with pytest.raises(Damaged, match="keys of its index are not those of samples.arrow"):
        tar.open_pixels(path, of, KEYS[::-1], JPEG)


def test_threads_that_disturb_each_others_headers_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pixel_tar(tmp_path / "000000.tar", rows())
    real, calls = np.load, []

    def disturbed(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) < 3:
            raise SystemError("AST constructor recursion depth mismatch (before=66, after=63)")
        return real(*args, **options)

    monkeypatch.setattr(tar.np, "load", disturbed)
    assert read_index(tmp_path / "000000.tar").keys == KEYS and len(calls) == 3
