"""Hollow data for bench_scale.py: tars of images that are one block of zeros each, and a cache whose metadata are whole.

Files of shards are sparse, of the sizes that their records tell; only the shards that an epoch begins with hold data.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from synthetic import codes, pixel_row

from mrmae.extract.images import Sources
from mrmae.extract.images.list import Listed
from mrmae.extract.images.tar_images import OF_TAR
from mrmae.shards import commit
from mrmae.shards.format import (
    PIXELS,
    Array,
    Numbers,
    Plan,
    Quantiser,
    Source,
    TeacherSpec,
    Unit,
    Values,
    ViewRecipe,
    canonical_json,
    commit_path,
    load_plan,
    plan,
    read_samples,
    samples,
    signed_hashes,
    units,
)
from mrmae.shards.manifest import write_manifest
from mrmae.shards.order import EpochOrder
from mrmae.shards.store import digest_of_hashes, unit_files

SHARD = 3400  # samples: what 512 MB of int8 tokens of a ViT-B hold
IN_TAR, BLOCK, CLASSES = 20_000, 512, 1000
WINDOW = 8  # shards that an epoch begins with
EMPTY_SHA256 = "076a27c79e5ace2a3d47f9dd2e83e4ff6ea8872b3c2218f66c92b89b55f36560"  # of a block of zeros


def teacher() -> TeacherSpec:
    """A teacher of few and narrow tokens: what is measured does not depend on their size."""
    return TeacherSpec(
        name="t", library="synthetic", model="random codes", weights="random", tag=None, weights_sha256="0" * 64,
        activation=None, input_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", antialias=True,
        tap="pre_tail", prefix_tokens=1, native_grid=(2, 2), grid=(2, 2), resample="none", width=8,
        has_cls=True, has_attention=True, precision="fp32", attention_backend="none",
    )  # fmt: skip


def asked_plan(n: int) -> Plan:
    """What a command would ask for: one view, one teacher, shards as of a ViT-B."""
    spec = teacher()
    return Plan("", n, ViewRecipe(size=32), spec.grid, 1, SHARD, "int8", (spec,))


def name_of(i: int) -> str:
    """A name as ImageNet's are."""
    return f"n{i % CLASSES:08d}/n{i % CLASSES:08d}_{i}.JPEG"


def write_tars(folder: Path, n: int) -> list[Path]:
    """Tars of n images of one block, by numpy: tarfile takes minutes for a million."""
    folder.mkdir(parents=True)
    tars = []
    for start in range(0, n, IN_TAR):
        numbers = range(start, min(start + IN_TAR, n))
        blocks = np.zeros((2 * len(numbers) + 2, BLOCK), np.uint8)
        blocks[: 2 * len(numbers) : 2] = headers([name_of(i) for i in numbers])
        tars.append(folder / f"{start // IN_TAR:06d}.tar")
        blocks.tofile(tars[-1])
    return tars


def headers(names: list[str]) -> Array:
    """USTAR headers of regular files of one block."""
    rows = np.zeros((len(names), BLOCK), np.uint8)
    rows[:, :100] = np.array([name.encode() for name in names], "S100").view(np.uint8).reshape(-1, 100)
    for at, text in ((100, b"0000644\0"), (108, b"0000000\0"), (116, b"0000000\0"), (124, b"%011o\0" % BLOCK),
                     (136, b"%011o\0" % 0), (148, b" " * 8), (156, b"0"), (257, b"ustar\x0000")):  # fmt: skip
        rows[:, at : at + len(text)] = np.frombuffer(text, np.uint8)
    sums = np.array([b"%06o\0 " % total for total in rows.sum(axis=1, dtype=np.int64)], "S8")
    rows[:, 148:156] = sums.view(np.uint8).reshape(-1, 8)
    return rows


def keys_of(numbers: Numbers) -> Values:
    """Names like ImageNet's, all of one length, made by numpy."""
    text = np.frombuffer(b"n00000000/n00000000_000000000.JPEG", np.uint8)
    rows = np.tile(text, (len(numbers), 1))
    for first, digits, value in ((1, 8, numbers % CLASSES), (11, 8, numbers % CLASSES), (20, 9, numbers)):
        for i in range(digits):
            rows[:, first + digits - 1 - i] += (value // 10**i % 10).astype(np.uint8)
    offsets = np.arange(0, rows.size + 1, len(text), np.int64)
    return Values(
        pa.Array.from_buffers(pa.large_string(), len(numbers), [None, pa.py_buffer(offsets), pa.py_buffer(rows)]), "key"
    )


def listed_images(n: int) -> Sources:
    """n images as listing gives them, of one block each, but that no tar is there."""
    listed = Listed()
    for start in range(0, n, IN_TAR):
        keys = keys_of(np.arange(start, min(start + IN_TAR, n)))
        columns = [keys.array, pc.utf8_slice_codeunits(keys.array, 0, 9), np.full(len(keys), BLOCK), (2 * np.arange(len(keys)) + 1) * BLOCK,
                   signed_hashes(keys), pa.nulls(len(keys), pa.binary(32))]  # fmt: skip
        listed.add_tar(f"{start // IN_TAR:06d}.tar", 0, pa.record_batch([pa.array(c) for c in columns], OF_TAR))
    return Sources(*listed.columns())


def write_shards(path: Path) -> None:
    """Calibrate, and commit all shards of a planned cache."""
    spec = teacher()
    given = {spec.column: Quantiser("int8", np.zeros(8, np.float32), np.ones(8, np.float32), standardised=True)}
    made = plan.freeze_quantisers(path, load_plan(path), given)
    commit.create_columns(path, made)
    keys = read_samples(path, made.numbers)["key"]
    order = EpochOrder(made.n_samples, SHARD, seed=0, epoch=0)
    whole = set(np.unique(order[: WINDOW * SHARD] // SHARD).tolist())
    for unit in units(made):
        if unit[2] in whole:
            write_whole(path, made, unit, keys)
        else:
            write_hollow(path, made, unit, keys)


def write_whole(path: Path, made: Plan, unit: Unit, keys: Any) -> None:
    """A shard with data, by the real writers."""
    view, column, shard = unit
    rng, numbers = np.random.default_rng(shard), made.ranges[shard]
    if column == PIXELS:
        rows = [pixel_row(number, Source(keys[number], None, 0, EMPTY_SHA256), made.recipe, rng) for number in numbers]
        commit.store_pixels(path, made, view, shard, rows)
        return
    arrays = codes(len(numbers), made.teacher(column), rng)
    quality = {"snr_db": 40.0, "p999_one_minus_cos": 0.0, "zero_tokens": 0}
    of, valid = digest_of_hashes([EMPTY_SHA256] * len(numbers)), np.ones(len(numbers), bool)
    commit.store_column(path, made, view, column, shard, arrays, valid, of, {"quality": quality})


def write_hollow(path: Path, made: Plan, unit: Unit, keys: Any) -> None:
    """A shard of sparse files of true sizes, and its commit record."""
    view, column, shard = unit
    numbers = made.ranges[shard]
    n, files = len(numbers), {}
    hashes = np.tile(np.frombuffer(bytes.fromhex(EMPTY_SHA256), np.uint8), (n, 1))
    for file in unit_files(path, made, *unit):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as content:
            if file.name.endswith(".index.npz") and column == PIXELS:
                np.savez(
                    content, about=np.zeros(40 * n, np.uint8), members=np.zeros((n, 2, 3), np.int64), sha256=hashes
                )
            else:
                content.truncate(2048 * n)
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": EMPTY_SHA256}
    about: dict[str, Any] = {"sha256": hashlib.sha256(hashes).hexdigest()}
    if column == PIXELS:
        about |= {
            "first": keys[numbers[0]],
            "last": keys[numbers[-1]],
            "heights": [375] * n,
            "widths": [500] * n,
            "bad": {},
        }
    else:
        about["quality"] = {"snr_db": 40.0, "p999_one_minus_cos": 0.0, "zero_tokens": 0}
    record = {"format_version": plan.FORMAT_VERSION, "view": view, "column": column, "shard": shard, "id": made.ids[column],
              "files": files, "count": n, "valid": n, **about}  # fmt: skip
    record["record_id"] = commit.record_id(record)
    file = commit_path(path, *unit)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(canonical_json(record) + b"\n")


def write_finished(path: Path, n: int) -> None:
    """A finished cache of samples without labels whose keys are in no order, column by column through files: for sizes that no memory holds."""
    columns = path.parent / "columns"
    columns.mkdir()
    kinds = {"offsets": ((n + 1,), np.int64), "text": ((n, 34), np.uint8), "hash": ((n,), np.int64), "bytes": ((n,), np.int64), "sha256": ((n, 32), np.uint8),
             "height": ((n,), np.int32), "width": ((n,), np.int32)}  # fmt: skip
    held: dict[str, Any] = {
        k: np.lib.format.open_memmap(columns / k, "w+", dtype, shape) for k, (shape, dtype) in kinds.items()
    }
    for start in range(0, n, 1 << 20):
        rows = slice(start, min(start + (1 << 20), n))
        keys = keys_of(np.arange(rows.start, rows.stop))
        held["text"][rows] = np.frombuffer(keys.array.buffers()[2], np.uint8).reshape(-1, 34)
        held["hash"][rows] = signed_hashes(keys)
        held["offsets"][rows.start : rows.stop + 1] = np.arange(rows.start, rows.stop + 1) * 34
    held["bytes"][:], held["height"][:], held["width"][:] = 110_000, 375, 500
    text = pa.Array.from_buffers(
        pa.large_string(), n, [None, pa.py_buffer(held["offsets"]), pa.py_buffer(held["text"])]
    )
    sha256 = pa.Array.from_buffers(pa.binary(32), n, [None, pa.py_buffer(held["sha256"])])
    table: dict[str, Any] = {
        "key": text,
        "sha256": sha256,
        **{name: pa.array(held[name]) for name in ("hash", "bytes", "height", "width")},
    }
    table |= {name: pa.nulls(n, pa.large_string()) for name in ("label", "reason")} | {
        "valid": pa.array(np.ones(n, bool))
    }
    samples.write_samples(path, table)
    made = dataclasses.replace(asked_plan(n), listing_id=f"sha256:{0:064d}")
    (path / "plan.json").write_bytes(plan.readable_json(made.to_json()))
    write_shards(path)
    made, kept = load_plan(path), ("count", "valid", "record_id", "files")
    records = {
        unit: {name: record[name] for name in kept}
        for unit in units(made)
        if (record := commit.valid_record(path, made, *unit))
    }
    write_manifest(path, made, records, read_samples(path))
