"""The images of a tar as columns, and the memory of them: a tar that has not changed is not read again. docs/format.md, section 7.9."""

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa

from mrmae.common.backend import Url, files_below, read_bytes, size_of
from mrmae.common.files import publish
from mrmae.common.progress import counted
from mrmae.extract.images.names import LeftOut, checked_key, parent_label, some, visible, wanted
from mrmae.extract.images.tars import TarHeader, cls_texts, file_member
from mrmae.shards.format import Numbers, signed_hashes

OF_TAR = pa.schema([
    ("key", pa.large_string()), ("label", pa.large_string()), ("bytes", pa.int64()), ("offset", pa.int64()), ("hash", pa.int64()),
    ("sha256", pa.binary(32)),
])  # fmt: skip
CHECKSUM_BYTES = 16  # before the columns, which thus lie as Arrow wants them
RULES = 1  # which members are images, and what their labels are; another number where that changes
SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system: what is younger may change again under the same time
Stamp = tuple[int, ...]  # what changes with a tar: size, times and inode; at a URL size and version


class TarImages(NamedTuple):
    """The images of a tar: a row each, as OF_TAR; sha256 where it was read on the way. left_out: what else is in it."""

    rows: pa.RecordBatch
    left_out: LeftOut


@dataclasses.dataclass(frozen=True)
class KeptIndices:
    """The memory of what is in tars, a file for each; one that is damaged is as none, and said.

    folder: of tars at URLs; near: of those in folders of this machine. None: nowhere.
    alone: held while tars at URLs are read, so that processes do not all read them.
    headers_only: nothing is hashed, so that of tars with large images only the headers need be read.
    read_only: nothing is kept.
    damaged: tars of which the memory could not be used.
    """

    folder: Path | None = None
    near: Path | None = None
    alone: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    headers_only: bool = False
    read_only: bool = False
    damaged: set[str] = dataclasses.field(default_factory=set)

    def file_of(self, tar: PurePath, suffixes: tuple[str, ...]) -> Path | None:
        """Where the images of a tar are kept, if anywhere."""
        folder = self.folder if isinstance(tar, Url) else self.near
        told = "\n".join([name_of(tar), *suffixes])
        return None if folder is None else folder / f"{hashlib.sha256(os.fsencode(told)).hexdigest()[:32]}.arrow"

    def recall(self, tar: PurePath, stamp: Stamp, suffixes: tuple[str, ...]) -> TarImages | None:
        """The images of a tar, where they are kept and it has not changed since."""
        if (file := self.file_of(tar, suffixes)) is None:
            return None
        try:
            if not isinstance(file, Url):
                size_of(file)  # a regular file: a pipe would be waited for
            about, found = parsed_memory(read_bytes(file))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            if isinstance(file, Url) and isinstance(error, OSError):
                raise
            self.damaged.add(str(tar))
            return None
        return found if about == told_of(tar, stamp, suffixes) else None

    def keep(
        self, tar: PurePath, stamp: Stamp, suffixes: tuple[str, ...], found: TarImages, looked_ns: int = 0
    ) -> None:
        """Keep the images of a tar; of this machine not those of one that had changed a moment before it was looked at (`looked_ns`),
        and not where that cannot be written: nobody needs it. At a URL OSError as in publish."""
        if self.read_only or (file := self.file_of(tar, suffixes)) is None:
            return
        content = memory_bytes(told_of(tar, stamp, suffixes), found)
        if isinstance(file, Url):
            publish(file, content, replace=True)
        elif isinstance(tar, Url) or looked_ns - max(stamp[1:3]) > SETTLED_NS:
            with contextlib.suppress(OSError):
                publish(file, content, replace=True)

    def notes(self) -> list[str]:
        """What a person should hear about it."""
        if not self.damaged:
            return []
        one, many = "tar was read again: the memory of it is", "tars were read again: the memory of them is"
        return [
            f"{counted(len(self.damaged), one, many)} damaged, or none of this version: {some(sorted(self.damaged))}"
        ]

    def hashed(self) -> Iterator[list[tuple[str, int, str, int, int]]]:
        """(key, bytes, sha256, version of the tar, offset in it) of what was hashed in tars at URLs, tar by tar."""
        for file in files_below(self.folder) if self.folder is not None else ():
            with contextlib.suppress(ValueError, FileNotFoundError):
                about, (rows, _) = parsed_memory(read_bytes(file))
                table = rows.filter(rows["sha256"].is_valid()).to_pydict()
                columns = (table[name] for name in ("key", "bytes", "sha256", "offset"))
                yield [(key, size, sha256.hex(), about["stamp"][1], at) for key, size, sha256, at in zip(*columns)]


def name_of(tar: PurePath) -> str:
    return str(tar) if isinstance(tar, Url) else os.path.abspath(tar)


def told_of(tar: PurePath, stamp: Stamp, suffixes: tuple[str, ...]) -> dict[str, Any]:
    """What a memory tells of its tar, as JSON has it."""
    return {"rules": RULES, "tar": os.fsencode(name_of(tar)).hex(), "stamp": list(stamp), "suffixes": list(suffixes)}


def stamp_of(tar: Path) -> Stamp:
    """Size, time of the last change of the content and of anything, and inode. A tool that sets the one time back cannot set the other."""
    status = tar.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def memory_bytes(about: dict[str, Any], found: TarImages) -> bytes:
    """A memory: the checksum of what follows, then a stream of Arrow."""
    told = json.dumps({**about, "left_out": dataclasses.asdict(found.left_out)})
    batch, sink = found.rows.replace_schema_metadata({"about": told}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return b"%-16x" % zlib.crc32(content) + content


def parsed_memory(content: bytes) -> tuple[dict[str, Any], TarImages]:
    """The memory that these bytes are, what it tells and the images. ValueError where they are none."""
    try:
        if int(content[:CHECKSUM_BYTES], 16) != zlib.crc32(memoryview(content)[CHECKSUM_BYTES:]):
            raise ValueError("its checksum is another one")
        with pa.ipc.open_stream(pa.py_buffer(content).slice(CHECKSUM_BYTES)) as stream:
            batch = stream.read_next_batch()
        if not batch.schema.equals(OF_TAR):
            raise ValueError("it has other columns")
        batch.validate(full=True)
        if any(batch[name].null_count for name in ("key", "bytes", "offset", "hash")):
            raise ValueError("a row lacks a value")
        about = json.loads(batch.schema.metadata[b"about"])
        suffixes, names = about["left_out"].pop("suffixes"), about.pop("left_out")
        return about, TarImages(batch, LeftOut(Counter(suffixes), **names))
    except (pa.ArrowException, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise ValueError(f"no memory of a tar ({error})") from None


def images_of_tar(
    path: PurePath, members: dict[str, TarHeader], suffixes: tuple[str, ...], read: Callable[[int, int], bytes]
) -> TarImages:
    """The images among the members of a tar, and where their bytes begin. read: the bytes at (offset, bytes)."""
    keys, names, found, texts, left_out = list[str](), list[str | None](), list[TarHeader](), {}, LeftOut()
    labels = [name for name in members if name.lower().endswith(".cls")]
    for name in members:
        if not wanted(name, suffixes):
            continue
        data = file_member(members, name, path)
        if data.special:
            left_out.special += [f"{name} ({data.special})"] if data.special != "a folder" else []
            continue
        label = None
        if labels:
            texts[name] = cls_texts(members, name, path, read)
            label = next(iter(texts[name].values()), None)
        keys.append(checked_key(name, path))
        names.append(label or parent_label(name))
        found.append(data)
    if labels:
        left_out.note_labels([name for name in labels if visible(name)], texts)
    return TarImages(tar_rows(keys, names, found), left_out)


def tar_rows(keys: list[str], labels: list[str | None], members: list[TarHeader]) -> pa.RecordBatch:
    hashes: Numbers = signed_hashes(keys)
    columns = [keys, labels, [m.size_bytes for m in members], [m.offset for m in members], hashes,
               [m.sha256 and bytes.fromhex(m.sha256) for m in members]]  # fmt: skip
    return pa.record_batch([pa.array(values, field.type) for values, field in zip(columns, OF_TAR)], OF_TAR)
