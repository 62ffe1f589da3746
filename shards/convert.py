"""A finished cache as another one: in the other format, with another dtype, without some columns. No teacher runs.

Every byte read is verified. Files that stay the same are copied; columns that change only their format keep their ids; where
the dtype changes, values are dequantised and quantised again, and the new id says of which column. docs/format.md, "Converting".
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrmae.common.backend import absolute, exists, expect_utf8, read_bytes, size_of
from mrmae.common.files import Published, publish
from mrmae.shards import claims
from mrmae.shards import commit as commits
from mrmae.shards.cache import Cache
from mrmae.shards.check import verified_blocks
from mrmae.shards.format import (
    CALIBRATION_SAMPLES,
    PIXELS,
    SAMPLES_AT_ONCE,
    Plan,
    Quantiser,
    Unit,
    added_quality,
    calibrate,
    codebook_path,
    commit_path,
    dequantise,
    freeze_quantisers,
    measure,
    quantise,
    read_codebook,
    read_sources,
    stats_path,
    summarise,
    tail_path,
    units,
    write_codebook,
    write_tail,
)
from mrmae.shards.plans import Wanted, agree, look, negotiate
from mrmae.shards.store import Damaged, unit_files

NOT_COPIED = ("files", "quality", "seconds", "command", "folder", "written", "versions", "device")


def converted_plan(cache: Cache, *, format: str | None, dtype: str | None, drop: Sequence[str]) -> Plan:
    """The plan of the new cache, without quantisers. drop: teachers or columns. ValueError for one that is not there."""
    plan = cache.plan
    names = {name for teacher in plan.columns for name in (teacher.name, teacher.column)}
    if unknown := sorted(set(drop) - names):
        raise ValueError(f"--drop {unknown[0]}: {cache.path} has no such teacher or column; it holds "
                         f"{', '.join(sorted(cache.stored))}; name one of them")  # fmt: skip
    plan = plan.without([t.column for t in plan.columns if {t.name, t.column} & set(drop)])
    return dataclasses.replace(plan, quantisers={}, format=format or plan.format, dtype=dtype or plan.dtype)


def convert_cache(
    cache: Cache, out: Path, wanted: Plan, *, about: Mapping[str, Any], progress: Callable[[int], object]
) -> dict[str, Any]:
    """The manifest of the cache at `out`, made of a finished one as converted_plan says. Called again, it continues.

    about: for the commit records: the command that made them and the folder it was given in. progress: called for every
    shard with the bytes that were written. Raises ValueError, naming shard and repair, where the source is damaged.
    """
    for name, text in {"OUT": out, **about}.items():
        expect_utf8(text, name)
    if absolute(cache.path) in [absolute(out), *absolute(out).parents]:
        raise ValueError(f"{out}: is, or lies in, the cache to convert; expected another folder for the new one")
    negotiate(look(out, images=False), Wanted(wanted, extend=False))
    with claims.alone(out):
        return convert_alone(cache, out, wanted, about=about, progress=progress)


def convert_alone(
    cache: Cache, out: Path, wanted: Plan, *, about: Mapping[str, Any], progress: Callable[[int], object]
) -> dict[str, Any]:
    """The same, while nobody else is at work at `out`."""
    rows = read_sources(cache.path)
    commits.refuse_other_samples(cache.path, cache.plan)
    plan = agree(out, Wanted(wanted, rows=rows, extend=False)).plan
    plan = freeze_quantisers(out, plan, converted_quantisers(cache, plan))
    commits.create_columns(out, plan)
    for name in {teacher.tail_name for teacher in plan.columns}:
        if exists(tail_path(cache.path, name)) and not exists(tail_path(out, name)):
            write_tail(out, name, cache.tail(name))
    for spec in plan.columns:
        if spec.made and not exists(codebook_path(out, spec.name)):
            told = cache.plan.quantisers[spec.column].codebook or {}
            write_codebook(out, spec.name, read_codebook(cache.path, spec.name, told.get("sha256", "")))
    for unit in units(plan):
        done = commits.valid_record(out, plan, *unit) is not None
        progress(0 if done else convert_unit(cache, out, plan, unit, about))
    for column, id in plan.ids.items():
        if cache.ids.get(column) == id and exists(moments := stats_path(cache.path, column)):
            publish(stats_path(out, column), read_bytes(moments), replace=True)
    return commits.finalise(out, plan)


def converted_quantisers(cache: Cache, plan: Plan) -> dict[str, Quantiser]:
    """The source's quantisers where the dtype stays, else new ones that name the column they are made from. Maps stay as they are.

    Those that an interrupted call has frozen already are not calibrated again.
    """
    found = {}
    for teacher in plan.columns:
        column = cache.stored[teacher.column]
        frozen = plan.quantisers.get(teacher.column)
        if plan.dtype == cache.dtype or teacher.is_map:
            found[teacher.column] = column.quantiser
        elif frozen is not None and frozen.source == column.id:
            found[teacher.column] = frozen
        else:
            first = cache.numbers[:CALIBRATION_SAMPLES]
            made = calibrate(cache.read_tokens(teacher.column, first, first * 0), dtype=plan.dtype)
            found[teacher.column] = dataclasses.replace(made, source=column.id)
    return found


def convert_unit(cache: Cache, out: Path, plan: Plan, unit: Unit, about: Mapping[str, Any]) -> int:
    """Bytes of the shard that was written and committed."""
    view, column, shard = unit
    record = commits.valid_record(cache.path, cache.plan, *unit)
    if record is None or record["record_id"] != cache.manifest.entry(cache.plan, unit)["record_id"]:
        raise ValueError(f"{commit_path(cache.path, *unit)}: the commit record is missing, or is not the one that was written; "
                         f"run inspect-cache repair {cache.path}")  # fmt: skip
    origin = record.get("extracted") or {name: record[name] for name in NOT_COPIED[2:] if name in record}
    record = {name: value for name, value in record.items() if name not in NOT_COPIED} | {
        "quality": record.get("quality"), "extracted": origin, "written": int(time.time()), **about,
    }  # fmt: skip
    record = {name: value for name, value in record.items() if value is not None}
    same_values = plan.dtype == cache.dtype or column in cache.maps
    if column == PIXELS or (plan.format == cache.plan.format and same_values):
        copy_unit(cache, out, plan, unit, record)
    else:
        arrays, valid, quality = converted_arrays(cache, plan, unit, record.get("quality"))
        commits.store_column(out, plan, view, column, shard, arrays, valid, record["sha256"], record | quality)
    return sum(size_of(file) for file in unit_files(out, plan, *unit))


def copy_unit(cache: Cache, out: Path, plan: Plan, unit: Unit, record: Mapping[str, Any]) -> None:
    """Copy and commit a shard whose files stay as they are, each checked against the manifest's sha256."""
    told = cache.manifest.entry(cache.plan, unit)["files"]

    def copied(file: Path) -> Published:
        name = file.relative_to(cache.path).as_posix()
        try:
            return publish(out / name, verified_blocks(file, told[name]["sha256"]))
        except Damaged as error:
            raise ValueError(cache.shards.repair_text(error, unit)) from None

    files = unit_files(cache.path, cache.plan, *unit)
    commits.store(out, plan, unit, record, lambda: {"files": [copied(file) for file in files]})


def converted_arrays(
    cache: Cache, plan: Plan, unit: Unit, quality: Mapping[str, Any] | None
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any], dict[str, Any]]:
    """(arrays of a shard as the new cache stores them, which of its rows are valid, what changed of its quality)."""
    view, column, shard = unit
    numbers = plan.ranges[shard]
    valid = cache.readable[numbers.start : numbers.stop]
    good = np.arange(numbers.start, numbers.stop)[valid]
    read = cache.read_column(column, good, good * 0 + view, tuple(cache.stored[column].layout.arrays()))
    stored = {name: tensor.numpy() for name, tensor in read.items()}
    changed: dict[str, Any] = {}
    if plan.dtype != cache.dtype and len(good) and column in cache.columns:
        old, new = cache.columns[column].quantiser, plan.quantisers[column]
        codes, scale, cost = requantised(stored.pop("tokens"), stored.pop("scale", None), old, new)
        stored |= {"tokens": codes} if scale is None else {"tokens": codes, "scale": scale}
        changed = {"quality": added_quality(quality, cost) if quality else None}
    arrays = {}
    for name, (shape, dtype) in plan.layout(column).arrays().items():
        arrays[name] = np.zeros((len(valid), *shape), dtype)
        if len(good):
            arrays[name][valid] = stored[name]
    return arrays, valid, changed


def requantised(
    codes: np.ndarray[Any, Any], scale: np.ndarray[Any, Any] | None, old: Quantiser, new: Quantiser
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None, dict[str, float | int]]:
    """(codes, scale) of `new` for what those of `old` stand for, and what that cost; a few samples at a time."""
    parts, measured = [], []
    for start in range(0, len(codes), SAMPLES_AT_ONCE):
        part = slice(start, start + SAMPLES_AT_ONCE)
        step = None if scale is None else torch.from_numpy(scale[part])
        values = dequantise(torch.from_numpy(codes[part]), step, old)
        parts.append(quantise(values, new))
        measured.append(measure(values, *parts[-1], new))
    scales = [made for _, made in parts if made is not None]
    joined = torch.cat(scales).numpy() if scales else None
    return torch.cat([made for made, _ in parts]).numpy(), joined, summarise(measured)
