"""Columns: our shard files are what the zarr v3 specification says, as independent readers see them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr

from mrmae.shards.format.layout import Layout
from mrmae.shards.store.zarr import create_column, read_attributes, shard_path, write_column_shard

LAYOUT = Layout(n=21, l=4, d=6, shard_samples=8, dtype="int8", has_cls=True, has_attention=True)
BAD = 10  # this sample is never written


def arrays(layout: Layout, seed: int = 0) -> dict[str, Any]:
    """Every array of a column, for all samples."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, (shape, dtype) in layout.arrays().items():
        whole = (layout.n, *shape)
        codes = {"int8": rng.integers(-127, 128, whole), "uint8": rng.integers(0, 127, whole)}
        out[name] = codes.get(dtype, rng.normal(size=whole)).astype(dtype)
    return out


def write_column(folder: Path, layout: Layout) -> dict[str, Any]:
    """Write a whole column but for the bad sample; returns what was written."""
    create_column(folder, layout, {"teacher": "x", "column_id": "sha256:x", "view": 3})
    content = arrays(layout)
    valid = np.arange(layout.n) != BAD
    for shard in range(3):
        part = slice(shard * 8, shard * 8 + 8)
        write_column_shard(folder, shard, {name: array[part] for name, array in content.items()}, valid[part])
    return content


@pytest.mark.parametrize("dtype", ["int8", "fp8", "float16", "pq4"])
def test_plain_zarr_reads_every_value_and_sentinels_elsewhere(tmp_path: Path, dtype: str) -> None:
    layout = Layout(**{**LAYOUT.__dict__, "dtype": dtype})
    content = write_column(tmp_path / "x.zarr", layout)
    group = zarr.open_group(tmp_path / "x.zarr", mode="r")
    assert set(group.array_keys()) == set(content) and ("scale" in content) == (dtype in ("int8", "fp8"))
    assert dict(group["tokens"].attrs) == ({"encoding": "e4m3fn"} if dtype == "fp8" else {})
    assert group.attrs["teacher"] == "x"
    for name, expected in content.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.shape == expected.shape and array.dtype == expected.dtype
        assert array.chunks == (1, *expected.shape[1:]) and array.shards == (8, *expected.shape[1:])
        got = np.asarray(array[:])
        good = np.arange(layout.n) != BAD
        assert np.array_equal(got[good], expected[good])
        unwritten = {np.dtype("int8"): -128, np.dtype("uint8"): 255}.get(got.dtype)
        sentinel = np.isnan(got[BAD]) if unwritten is None else got[BAD] == unwritten
        assert sentinel.all()
        for i in (0, 7, 8, 20):
            assert np.array_equal(np.asarray(array[i]), expected[i])


def test_tensorstore_reads_every_value(tmp_path: Path) -> None:
    content = write_column(tmp_path / "x.zarr", LAYOUT)
    for name, expected in content.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "x.zarr" / name)}}
        got = tensorstore.open(spec).result().read().result()
        good = np.arange(LAYOUT.n) != BAD
        assert np.array_equal(got[good], expected[good]), name


def test_a_shard_file_is_byte_for_byte_the_specification(tmp_path: Path) -> None:
    content = write_column(tmp_path, LAYOUT)
    data = shard_path(tmp_path, "tokens", 1, 3).read_bytes()
    chunk = 4 * 6 + 4
    assert len(data) == 32 + 7 * chunk + 8 * 16 + 4, "seal, seven chunks (one is bad), index of eight, its crc32c"
    assert data[:32] == hashlib.sha256(b'["sha256:x",3,"tokens",1]').digest()
    index = np.frombuffer(data[-132:-4], "<u8").reshape(8, 2)
    assert int.from_bytes(data[-4:], "little") == google_crc32c.value(data[-132:-4])
    for row in range(8):
        number = 8 + row
        if number == BAD:
            assert index[row].tolist() == [2**64 - 1] * 2
            continue
        offset, size = (int(n) for n in index[row])
        raw = content["tokens"][number].tobytes()
        assert size == chunk and data[offset : offset + size - 4] == raw
        assert int.from_bytes(data[offset + size - 4 : offset + size], "little") == google_crc32c.value(raw)


def test_the_edge_shard_indexes_a_whole_shard(tmp_path: Path) -> None:
    write_column(tmp_path, LAYOUT)
    data = shard_path(tmp_path, "norm", 2, 2).read_bytes()
    index = np.frombuffer(data[-132:-4], "<u8").reshape(8, 2)
    assert (index[5:] == 2**64 - 1).all() and (index[:5, 1] == 4 * 2 + 4).all()


def test_zarr_writes_the_same_bytes_where_it_writes_all_chunks(tmp_path: Path) -> None:
    """zarr's own encoder, given the same values, makes the same set of chunks and the same metadata opens it."""
    content = write_column(tmp_path / "ours", LAYOUT)
    create_column(tmp_path / "zarr", LAYOUT, {"column_id": "sha256:x"})
    group = zarr.open_group(tmp_path / "zarr", mode="r+")
    tokens = group["tokens"]
    assert isinstance(tokens, zarr.Array)
    tokens[:8] = content["tokens"][:8]
    ours, theirs = (shard_path(tmp_path / name, "tokens", 0, 3).read_bytes() for name in ("ours", "zarr"))
    assert len(ours) == len(theirs) + 32, "the seal"
    assert sorted(chunks_of(ours)) == sorted(chunks_of(theirs))


def chunks_of(data: bytes) -> list[bytes]:
    index = np.frombuffer(data[-132:-4], "<u8").reshape(8, 2)
    return [data[int(offset) : int(offset + size)] for offset, size in index]


def test_metadata_name_their_axes_and_codecs(tmp_path: Path) -> None:
    create_column(tmp_path, LAYOUT, {})
    meta = json.loads((tmp_path / "tokens" / "zarr.json").read_bytes())
    assert meta["fill_value"] == -128 and meta["dimension_names"] == ["sample", "patch", "channel"]
    assert meta["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
    (codec,) = meta["codecs"]
    assert codec["name"] == "sharding_indexed" and codec["configuration"]["index_location"] == "end"
    assert [c["name"] for c in codec["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert [c["name"] for c in codec["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    assert json.loads((tmp_path / "norm" / "zarr.json").read_bytes())["fill_value"] == "NaN"
    assert read_attributes(tmp_path)[0] == LAYOUT
    before = (tmp_path / "zarr.json").read_bytes()
    create_column(tmp_path, LAYOUT, {"other": 1})
    assert (tmp_path / "zarr.json").read_bytes() == before


def test_wrong_arrays_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    create_column(tmp_path, LAYOUT, {})
    good = {name: array[:8] for name, array in arrays(LAYOUT).items()}
    nan = good["norm"].copy()
    nan[3, 1] = np.nan
    sentinel = good["tokens"].copy()
    sentinel[2, 0, 0] = -128
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({**good, "norm": nan}, 8, "1 values of norm are NaN or infinite"),
        ({**good, "tokens": sentinel}, 8, r"1 values of tokens are codes that are no number \(-128\)"),
        ({**good, "cls": good["cls"].astype(np.float32)}, 8, r"cls is float32\[8, 6\]; expected float16\[8, 6\]"),
        ({**good, "scale": good["scale"][:, :3]}, 8, r"scale is float16\[8, 3\]"),
        ({name: good[name] for name in good if name != "cls"}, 8, "expected .*cls"),
        ({**good, "extra": good["norm"]}, 8, "extra"),
        ({name: array[:5] for name, array in good.items()}, 5, "5 rows; the plan says 8"),
    ]
    for content, rows, message in wrong:
        with pytest.raises(ValueError, match=message):
            write_column_shard(tmp_path, 0, content, [True] * rows)
    assert not (tmp_path / "tokens" / "c").exists()
    # a bad row may hold anything: it is not written
    write_column_shard(tmp_path, 0, {**good, "norm": nan}, [i != 3 for i in range(8)])


def test_a_folder_without_a_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a column of a cache"):
        write_column_shard(tmp_path, 0, {}, [])
