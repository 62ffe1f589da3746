"""How long it takes to open caches of 1,000 shards, for bench_cache.py."""

import statistics
import time
from pathlib import Path
from typing import Any

from mrmae.shards import commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format import (
    PIXELS,
    Plan,
    Quantiser,
    TeacherSpec,
    Unit,
    View,
    ViewRecipe,
    plan,
    samples,
    units,
)
from mrmae.shards.manifest import write_manifest
from mrmae.shards.store import PixelRow, index_path, read_index, unit_files, write_pixel_tar

SHARDS = 1000


def rows(work: Path, repeats: int = 3) -> list[dict[str, Any]]:
    """Seconds to open: 1,000 shards of 16 samples, and of 1,280 samples, as many as ImageNet has."""
    found = []
    for n in (16 * SHARDS, 1280 * SHARDS):
        path = hollow_cache(work / f"open{n}", n)
        seconds = [seconds_to_open(path) for _ in range(repeats)]
        found.append({"what": f"open {SHARDS} shards, {n} samples", "reader": "mrmae zarr", "value": statistics.median(seconds),
                      "unit": "s", "low": min(seconds), "high": max(seconds), "goal_s": 2})  # fmt: skip
    return found + index_rows(work)


def index_rows(work: Path, n: int = 3400, repeats: int = 21) -> list[dict[str, Any]]:
    """Milliseconds to read the sidecar of a pixel tar of n samples, and its kilobytes."""
    tar = work / "index" / "000000.tar"
    rows = [
        PixelRow(
            i,
            f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG",
            None,
            View(0, 0, 8, 8, False, 8, 8),
            b"jpeg",
            sha256=f"{i:064x}",
        )
        for i in range(n)
    ]
    write_pixel_tar(tar, rows)
    ms = []
    for _ in range(repeats):
        began = time.process_time()
        read_index(tar)
        ms.append(1e3 * (time.process_time() - began))
    what = {"what": f"index of a tar, {n} samples", "reader": "mrmae webdataset"}
    return [{**what, "value": statistics.median(ms), "unit": "ms", "low": min(ms), "high": max(ms)},
            {**what, "value": index_path(tar).stat().st_size / 1e3, "unit": "KB"}]  # fmt: skip


def seconds_to_open(path: Path) -> float:
    began = time.perf_counter()
    open_cache(path)
    return time.perf_counter() - began


def hollow_cache(path: Path, n: int) -> Path:
    """A cache whose metadata are whole and whose shard files are sparse, of the size that the manifest tells."""
    keys = sorted(
        f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(n)
    )  # the order of keys is not checked when opening
    from bench_cache import teacher

    spec: TeacherSpec = teacher()
    made = Plan("sha256:" + "0" * 64, n, ViewRecipe(size=28), spec.grid, 1, n // SHARDS, "int8", (spec,),
                {spec.column: Quantiser("int8")})  # fmt: skip
    table = {"key": keys, "label": [key[:9] for key in keys], "bytes": [110_000] * n, "sha256": [f"{i:064x}" for i in range(n)],
             "height": [375] * n, "width": [500] * n, "valid": [True] * n, "reason": [None] * n}  # fmt: skip
    samples.write_samples(path, table)
    rows = samples.read_samples(path)
    (path / "plan.json").write_bytes(plan.readable_json(made.to_json()))
    commit.create_columns(path, made)
    records = {unit: hollow_shard(path, made, unit) for unit in units(made)}
    write_manifest(path, made, records, rows)
    return path


def hollow_shard(path: Path, made: Plan, unit: Unit) -> dict[str, Any]:
    """A commit record of files of zeros that take no space."""
    files = {}
    for file in unit_files(path, made, *unit):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as content:
            content.truncate(1 << 20 if unit[1] == PIXELS else 150_000 * made.shard_samples)
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": "0" * 64}
    return {"files": files, "count": made.shard_samples, "valid": made.shard_samples, "record_id": "sha256:" + "0" * 64}
