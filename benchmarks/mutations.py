"""One file of a cache changed at random, in structure and in values, as damage and as an attacker would: used by soak_fuzz.py.

JSON stays JSON, an Arrow file stays a table, and tars, safetensors and zarr shards keep headers that can be read; other mutations
change bytes, or put a link, a FIFO, a folder or nothing where the file was. A mutation may be forged: ids and hashes that
cover the file are computed anew, so that it survives the first checks.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from mrmae.shards.commit import record_id
from mrmae.shards.format import Unit, Values, content_id, load_plan, read_samples
from mrmae.shards.manifest import samples_digests
from mrmae.shards.shard_table import shard_tables, write_shard_tables

Rng = np.random.Generator
FILES = {  # which files, how often
    "manifest.json": 4,
    "manifest/*.arrow": 3,
    "plan.json": 5,
    "samples.arrow": 4,
    "commits/*/*/*.json": 5,
    "views/**/zarr.json": 2,
    "views/**/column.json": 2,
    "views/**/*.index.npz": 3,
    "views/**/*.tar": 2,
    "views/**/c/*/*": 1,
    "views/**/c/*/*/*": 1,
    "tail/*.safetensors": 2,
    "stats/*.safetensors": 1,
}
NUMBERS = (-1, 0, 1, 2, 3, 255, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**9, 10**10, 10**30, -(2**63), 10**5000,
           0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"))  # fmt: skip
WORDS = ("", "x", "0", "-1", "1e9", ".", "..", "../victim.txt", "../../victim.txt", "/dev/zero", "/dev/stdin", "a\0b", "a\nb", "\ud800",
         "\x1b[2J", "a/b", "x" * 100_000, "é" * 300, "--allow-torchscript", "{}", "%s%n", "$(touch marker)")  # fmt: skip
PLANTED = (".digests", ".lock", ".planning.lock", "commits/.000000.lock", "commits/.000001.lock", "pictures.png")
ROWS = 3_000_000  # of a table that takes a few KB, as it is compressed


@dataclasses.dataclass(frozen=True)
class Mutation:
    """What was done to which file. same: whoever reads the file as it is meant to be read finds the same values."""

    file: str
    how: str
    forged: bool
    same: bool

    def __str__(self) -> str:
        return f"{self.file}: {self.how}{', hashes made to fit' * self.forged}{', the same values' * self.same}"


def mutate(cache: Path, outside: Path, rng: Rng) -> Mutation:
    """Change one file of the cache. outside: a folder that links may lead to; it holds victim.txt."""
    globs = {glob: found for glob in FILES if (found := sorted(file for file in cache.glob(glob) if file.is_file()))}
    glob = pick(rng, list(globs), [FILES[glob] for glob in globs])
    file = globs[glob][int(rng.integers(len(globs[glob])))]
    name = file.relative_to(cache).as_posix()
    kind = pick(rng, ["content", "bytes", "place", "folder", "planted"], [62, 19, 10, 5, 4])
    if kind == "planted":
        return Mutation(*plant(cache, outside, rng), False, True)
    if kind == "place":
        return Mutation(name, replace(file, outside, rng), False, False)
    if kind == "folder":
        return Mutation(*divert(cache, file, outside, rng), False, True)
    before = file.read_bytes()
    how, after = (CONTENT[suffix(file)] if kind == "content" else any_bytes)(before, outside, rng)
    file.write_bytes(after)
    forged = kind == "content" and rng.random() < 0.4 and forge(cache, name)
    return Mutation(name, how, forged, same_values(name, before, after))


def pick(rng: Rng, what: list[Any], weights: list[int] | None = None) -> Any:
    """One of these at random."""
    share = None if weights is None else np.array(weights) / sum(weights)
    return what[int(rng.choice(len(what), p=share))]


def suffix(file: Path) -> str:
    """The kind of a file; a zarr shard has no suffix."""
    return file.suffix if file.suffix in CONTENT else "shard"


def short(value: Any) -> str:
    """A value in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:30] + f"... ({len(text)})"


# --- JSON


def mutate_json(before: bytes, outside: Path, rng: Rng) -> tuple[str, bytes]:
    """One to three edits of values and of structure, or of the text itself."""
    value, said = json.loads(before), []
    for _ in range(pick(rng, [1, 2, 3], [8, 1, 1])):
        if value:  # the edit before may have left nothing
            said.append(edit(value, outside, rng))
    text = json.dumps(value)
    if rng.random() < 0.06:
        what, text = edit_text(text, rng)
        said.append(what)
    return "; ".join(said), text.encode()


def edit(value: Any, outside: Path, rng: Rng) -> str:
    """Change something somewhere in nested JSON: the deeper a level, the less often."""
    holder, key, path = value, None, ""
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = keys[int(rng.integers(len(keys)))]
        path += f"/{key}"
        if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.3:
            break
        holder = holder[key]
    what = pick(rng, ["set", "delete", "rename", "repeat", "swap", "wrap"], [12, 3, 2, 1, 1, 1])
    before = holder[key]
    if what == "set":
        holder[key] = wild(before, outside, rng)
        return f"{path} = {short(holder[key])}"
    if what == "wrap":
        holder[key] = pick(rng, [[before], {"x": before}, [before] * 1000])
    elif what == "swap":
        other = keys[int(rng.integers(len(keys)))]
        holder[key], holder[other] = holder[other], before
        return f"{path} swapped with {other!r}"
    elif what == "delete":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(int(rng.integers(len(holder) + 1)), before if what == "repeat" else None)
    else:
        holder[pick(rng, list(WORDS))] = before
        if what == "rename":
            del holder[key]
    return f"{path} {what}"


def wild(before: Any, outside: Path, rng: Rng) -> Any:
    """Another value: near the old one, of another type, or absurd."""
    kind = pick(rng, ["near", "number", "word", "path", "plain", "nested"], [4, 4, 3, 1, 2, 1])
    if kind == "near":
        if isinstance(before, bool) or before is None:
            return not before
        if isinstance(before, int | float):
            return pick(rng, [before + 1, before - 1, -before, before * 1000, float(before), str(before)])
        if isinstance(before, str):
            return pick(rng, [before + "x", before[:-1], before.upper(), before[::-1], "../" + before])
        return pick(rng, [[], {}, list(before)[:-1], list(before) * 2])
    choices = {
        "number": list(NUMBERS), "word": list(WORDS), "path": [str(outside / "victim.txt"), str(outside), "/etc/passwd"],
        "plain": [None, True, False, [], {}, [[]], {"a": 1}, [None]], "nested": [nested(50), nested(900), [0] * 100_000],
    }  # fmt: skip
    return pick(rng, choices[kind])


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def edit_text(text: str, rng: Rng) -> tuple[str, str]:
    """What JSON's text can hold and a parsed value cannot."""
    at = text.find('"', int(rng.integers(len(text))))
    match pick(rng, ["twice", "deep", "mark", "code", "array"]):
        case "twice":
            return "a key twice", text[:1] + text[1 : text.find(",") + 1] + text[1:]
        case "deep":
            return "100,000 brackets", text[: max(at, 1)] + "[" * 100_000 + text[max(at, 1) :]
        case "mark":
            return "a byte order mark", "\ufeff" + text
        case "code":
            return "another value behind it", text + text
    return "in a list", f"[{text}]"


# --- samples.arrow, and the tables of shards


def mutate_arrow(before: bytes, outside: Path, rng: Rng) -> tuple[str, bytes]:
    """Another table."""
    table = table_of(before)
    name = pick(rng, list(table.column_names), [4] + [1] * (table.num_columns - 1))
    at, values = table.column_names.index(name), table[name].to_pylist()
    row, what = int(rng.integers(len(values))), pick(rng, list(TABLES), list(TABLES.values()))
    if what == "value":
        kind = table.schema.field(name).type
        bits = kind.bit_width if pa.types.is_integer(kind) else 0
        numbers = [n for n in (*NUMBERS, values[row]) if isinstance(n, int) and abs(n) < 2 ** (bits - 1)]
        words = [word for word in WORDS if word != "\ud800"] + [str(outside / "victim.txt")]
        digests = [bytes(32), b"\xff" * 32] if pa.types.is_fixed_size_binary(kind) else words
        values[row] = pick(rng, numbers if bits else [True, False] if pa.types.is_boolean(kind) else digests)
        table = table.set_column(at, table.schema.field(name), pa.array(values, kind))
        what = f"row {row} = {short(values[row])}"
    elif what == "null":
        values[row] = None
        table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    elif what == "type":
        as_text = [None if value is None else str(value)[:1000] for value in values]
        new = pick(rng, [as_text, [[value] for value in values], [float(i) for i in range(len(values))]])
        table = table.set_column(at, name, pa.array(new))
    elif what == "gone":
        table = table.remove_column(at)
    elif what == "order":
        table = table.take(rng.permutation(len(values)))
    elif what == "rows twice":
        table = pa.concat_tables([table, table])
    elif what == "no rows":
        table = table.slice(0, 0)
    elif what == "one row less":
        table = table.slice(0, len(values) - 1)
    elif what == "hashes":
        name = "hash" if "hash" in table.column_names else "sha256"
        at, hashes = table.column_names.index(name), table[name].to_pylist()
        table = table.set_column(at, name, pa.array([*hashes[1:], hashes[0]], table.schema.field(name).type))
    elif what == "bomb":
        table = pa.table([pa.repeat(pa.scalar(None, field.type), ROWS) for field in table.schema], table.schema)
    elif what == "long text":
        long = pa.array(["x" * min(2**26, 2**30 // len(values))] * len(values)).dictionary_encode()
        name = "reason" if "reason" in table.column_names else "column"
        table = table.set_column(table.column_names.index(name), name, long.cast(pa.large_string()))
    out = io.BytesIO()
    packed = pa.ipc.IpcWriteOptions(compression="zstd" if what in ("bomb", "long text") or rng.random() < 0.3 else None)
    with pa.ipc.new_file(out, table.schema, options=packed) as writer:
        writer.write_table(table.combine_chunks())
    return f"{name}: {what}", out.getvalue()


TABLES = {"value": 10, "null": 3, "type": 3, "gone": 2, "order": 2, "rows twice": 1, "no rows": 1, "one row less": 1, "hashes": 4,
          "bomb": 1, "long text": 1}  # fmt: skip


# --- headers


def mutate_tar(before: bytes, outside: Path, rng: Rng) -> tuple[str, bytes]:
    """A field of a member's header, its checksum made to fit or not."""
    starts, at = [], 0
    while before[at : at + 1] not in (b"", b"\0"):
        starts.append(at)
        at += 512 + -(-int(before[at + 124 : at + 135], 8) // 512) * 512
    at, content = pick(rng, starts), bytearray(before)
    field, start, n = pick(rng, [("name", 0, 100), ("size", 124, 12), ("type", 156, 1), ("link", 157, 100)])
    choices = {
        "name": [b"../victim.txt", str(outside / "victim.txt").encode()[:99], b"", b"\xff\xfe", b"000000000.exe"],
        "size": [b"77777777777", b"00000000000", b"-0000000001", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"99999999999"],
        "type": [b"1", b"2", b"3", b"5", b"x", b"L", b"S", b"g"],
        "link": [b"/etc/passwd", b"../victim.txt"],
    }
    new = pick(rng, choices[field])
    content[at + start : at + start + n] = new.ljust(n, b"\0")[:n]
    if rng.random() < 0.7:
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return f"header at {at}: {field} {new!r}"[:120], bytes(content)


def mutate_safetensors(before: bytes, outside: Path, rng: Rng) -> tuple[str, bytes]:
    """Another length of the header, or another header."""
    (n,) = struct.unpack("<Q", before[:8])
    if rng.random() < 0.3:
        length = pick(rng, [0, 1, n - 1, n + 1, 10**8, 2**31, 2**63, 2**64 - 1])
        return f"header of {length} bytes", struct.pack("<Q", length) + before[8:]
    how, header = mutate_json(before[8 : 8 + n], outside, rng)
    return how, struct.pack("<Q", len(header)) + header + before[8 + n :]


def mutate_shard(before: bytes, outside: Path, rng: Rng) -> tuple[str, bytes]:
    """A number of a zarr shard's index, its crc32c made to fit."""
    entries = 0
    while google_crc32c.value(before[-4 - 16 * entries : -4]) != int.from_bytes(before[-4:], "little"):
        entries += 1
    index = bytearray(before[-4 - 16 * entries : -4])
    at = 8 * int(rng.integers(2 * entries))
    number = pick(rng, [0, 1, 31, len(before), 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
    index[at : at + 8] = struct.pack("<Q", number)
    crc = int(google_crc32c.value(bytes(index))).to_bytes(4, "little")
    return f"index: number {at // 8} is {number}", before[: -4 - 16 * entries] + bytes(index) + crc


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def mutate_npz(before: bytes, outside: Path, rng: Rng) -> tuple[str, bytes]:
    """Another place of a member, other keys, or arrays of other shapes, types and sizes; the checksums of the archive fit."""
    arrays = dict(np.load(io.BytesIO(before)))
    places, what = (
        arrays["members"],
        pick(rng, ["place", "about", "shape", "type", "object", "gone", "packed"], [4, 4, 1, 1, 1, 1, 1]),
    )
    if what == "place":
        at = tuple(int(rng.integers(n)) for n in places.shape)
        places[at] = pick(rng, [-2, -1, 0, 1, 511, 2**31, 2**62, 2**63 - 1, -(2**63)])
        what = f"members[{', '.join(map(str, at))}] = {places[at]}"
    elif what == "about":
        what, about = mutate_json(arrays["about"].tobytes(), outside, rng)
        arrays["about"] = np.frombuffer(about, np.uint8)
    elif what == "shape":
        arrays["members"] = pick(rng, [places[:1], places[..., :2], places.ravel(), np.zeros((0, 2, 3), "<i8")])
    elif what == "type":
        arrays["members"] = places.astype(pick(rng, ["<f8", ">i8", "<i4", "<U9"]))
    elif what == "object":
        arrays["members"] = np.array([Touch(outside / "RAN")], object)
    elif what == "gone":
        del arrays[pick(rng, ["about", "members"])]
    out = io.BytesIO()
    if what == "packed":
        np.savez_compressed(out, **arrays | {"members": np.zeros((10**7, 2, 3), "<i8")})
    else:
        np.savez(out, **arrays)
    return what, out.getvalue()


CONTENT: dict[str, Callable[[bytes, Path, Rng], tuple[str, bytes]]] = {
    ".json": mutate_json,
    ".arrow": mutate_arrow,
    ".npz": mutate_npz,
    ".tar": mutate_tar,
    ".safetensors": mutate_safetensors,
    "shard": mutate_shard,
}


# --- bytes and places


def any_bytes(before: bytes, outside: Path, rng: Rng) -> tuple[str, bytes]:
    """Bits, a cut, bytes more, zeros, nothing, or a pickle that runs code."""
    a, b = sorted(int(n) for n in rng.integers(0, len(before) + 1, 2))
    match pick(rng, ["flip", "cut", "insert", "zeros", "empty", "noise", "pickle"], [6, 3, 2, 2, 1, 1, 1]):
        case "flip":
            content = bytearray(before)
            places = rng.integers(0, 8 * len(before), pick(rng, [1, 1, 1, 2, 8, 64])).tolist()
            for place in places:
                content[place // 8] ^= 1 << place % 8
            return f"{len(places)} bits flipped, the first at {places[0]}", bytes(content)
        case "cut":
            return f"cut at {a}", before[:a]
        case "insert":
            return f"32 bytes inserted at {a}", before[:a] + rng.bytes(32) + before[a:]
        case "zeros":
            return f"zeros from {a} to {b}", before[:a] + bytes(b - a) + before[b:]
        case "empty":
            return "empty", b""
        case "pickle":
            return "a pickle that runs code", pickle.dumps(Touch(outside / "RAN"))
    return "noise", rng.bytes(len(before))


def replace(file: Path, outside: Path, rng: Rng) -> str:
    """Put something else where the file was."""
    what = pick(rng, ["link to its copy", "link to a victim", "endless link", "circle", "FIFO", "folder", "gone"])
    before = file.read_bytes()
    file.unlink()
    if what == "link to its copy":
        (outside / "copy").write_bytes(before)
        file.symlink_to(outside / "copy")
    elif what == "link to a victim":
        file.symlink_to(outside / "victim.txt")
    elif what == "endless link":
        file.symlink_to("/dev/zero")
    elif what == "circle":
        file.symlink_to(file.name)
    elif what == "FIFO":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    return f"replaced: {what}" if what != "gone" else what


def plant(cache: Path, outside: Path, rng: Rng) -> tuple[str, str]:
    """Put something where a command will want to write: a lock, a spool, a picture."""
    name = pick(rng, list(PLANTED))
    file = cache / name
    if not file.exists():
        file.write_bytes(b"planted")
    if rng.random() < 0.3:
        how, after = any_bytes(file.read_bytes(), outside, rng)
        file.write_bytes(after)
        return name, how
    return name, replace(file, outside, rng)


def divert(cache: Path, file: Path, outside: Path, rng: Rng) -> tuple[str, str]:
    """Move a folder that holds the file out of the cache and leave a link to it."""
    folders = [folder for folder in file.parents if cache in folder.parents]
    folder = pick(rng, folders or [cache / "views", cache / "commits"])
    shutil.move(folder, outside / "diverted")
    folder.symlink_to(outside / "diverted")
    return folder.relative_to(cache).as_posix(), "a folder, replaced by a link to it outside"


# --- hashes that fit


def forge(cache: Path, name: str) -> bool:
    """Compute anew what covers the file: sizes and sha256 in records and manifest, the manifest's id. False: not possible."""
    try:
        manifest = json.loads((cache / "manifest.json").read_bytes()) if (cache / "manifest.json").exists() else None
        records = {file: json.loads(file.read_bytes()) for file in cache.glob("commits/*/*/*.json")}
        about = summary(cache / name)
        changed = [record for file, record in records.items() if cover_record(cache, file, record, name, about)]
        if manifest is not None:
            cover(cache, name, manifest, about)
            if changed:
                cover_shards(cache, manifest, {unit_of(record): record for record in records.values()})
            manifest["manifest_id"] = content_id({key: v for key, v in manifest.items() if key != "manifest_id"})
            (cache / "manifest.json").write_text(json.dumps(manifest))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError, MemoryError):
        return False
    return True


def summary(file: Path) -> dict[str, Any]:
    """Size and sha256, as records and manifest hold them."""
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def cover_record(cache: Path, file: Path, record: dict[str, Any], name: str, about: dict[str, Any]) -> bool:
    """Have a commit record fit what a file now is, where it is of that file or is that file; whether it is."""
    if name not in record.get("files", {}) and file != cache / name:
        return False
    if name in record.get("files", {}):
        record["files"][name] = about
    record["record_id"] = record_id(record)
    file.write_text(json.dumps(record))
    return True


def cover(cache: Path, name: str, manifest: dict[str, Any], about: dict[str, Any]) -> None:
    """Have the manifest say of a file what it now is."""
    if name == "plan.json":
        plan = json.loads((cache / name).read_bytes())
        manifest.update({key: value for key, value in plan.items() if key not in ("columns", "quantisers")})
    elif name == "samples.arrow":
        manifest["samples"] = samples_digests(read_samples(cache))
    elif name.startswith("manifest/"):
        table = table_of((cache / name).read_bytes())
        manifest["shards"][0] = {key: Values(table[key].combine_chunks(), key).digest for key in table.column_names}
    for column in manifest["columns"]:
        if column["tail"] and column["tail"]["file"] == name:
            column["tail"].update(about)


def cover_shards(cache: Path, manifest: dict[str, Any], records: dict[Unit, Any]) -> None:
    """Have the manifest and its tables of shards say what these records do."""
    tables = shard_tables(load_plan(cache), records)
    write_shard_tables(cache, tables)
    manifest["shards"] = [table.digests for table in tables]


def unit_of(record: dict[str, Any]) -> Unit:
    """The unit of work that a commit record is of."""
    return record["view"], record["column"], record["shard"]


NOT_VERIFIED = (
    "seconds",
    "versions",
    "device",
    "command",
    "folder",
    "written",
    "extracted",
)  # what a record tells beside its shard
VERIFIED = ("zarr_format", "node_type", "attributes", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value",
            "codecs")  # fmt: skip


def same_values(name: str, before: bytes, after: bytes) -> bool:
    """Whether a changed file still says the same, as docs/format.md understands it."""
    if before == after:
        return True
    if name.startswith("stats/"):
        return True  # verified when they are read
    try:
        if name.endswith(".arrow"):
            return bool(table_of(before).equals(table_of(after)))
        if name.endswith(".npz"):
            old, new = np.load(io.BytesIO(before)), np.load(io.BytesIO(after))
            return set(old) == set(new) and all(np.array_equal(old[key], new[key]) for key in old)
        if not name.endswith(".json"):
            return False
        old, new = json.loads(before), json.loads(after)
        return bool(meant(name, old) == meant(name, new) and type(old) is type(new))
    except Exception:  # it cannot be read, in one of a hundred ways
        return False


def table_of(content: bytes) -> pa.Table:
    return pa.ipc.open_file(content).read_all()


def meant(name: str, value: Any) -> Any:
    """The part of a JSON file that verification is about."""
    if name.startswith("commits/"):
        return {key: inner for key, inner in value.items() if key not in NOT_VERIFIED}
    return {key: value.get(key) for key in VERIFIED} if name.endswith("zarr.json") else value
