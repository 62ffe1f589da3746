"""Byte length and sha256 of encoded images that are hashed alone, one pass that a second start continues, and the memory of what was read.

An extraction hashes an image as it decodes it, and adds to the memory; `--append` and probes read only what the memory does not know.
"""

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path

import numpy as np
import pyarrow as pa

from mrmae.common.files import explained, publish, remove
from mrmae.common.progress import Progress
from mrmae.extract.images.list import UNKNOWN, Sources, read_image
from mrmae.extract.images.objects import THREADS
from mrmae.extract.images.patience import Unreadable
from mrmae.extract.images.tar_images import KeptIndices
from mrmae.shards.format import ROWS_AT_ONCE, Array, Numbers, SourceTable, Values, hash_values

# Key, bytes and sha256 (hex) of an image, and the time and place of the image that they were computed of.
Line = tuple[str, int, str, int, int]
OF_NOTHING = hashlib.sha256(b"").hexdigest()  # of an image that cannot be read
CHUNK = 256  # images per round of the pool: bounds what is in memory
LONGEST_LINE = 1 << 16  # characters; a path has 4096 bytes at most


def digest_images(
    sources: Sources, order: Sequence[int] | Numbers, memory: Path, *, workers: int, kept: KeptIndices | None = None
) -> SourceTable:  # fmt: skip
    """The images in `order`, with size and sha256; one that is not there, or may not be read, counts as empty.

    memory: a file that keeps every row with the time and place of its image; where size, time and place are the same, the image is
    not read again.
    kept: what was learnt of tars at URLs while they were listed.
    OSError, naming it, for an image that cannot be read for another reason; what was computed is in `memory`.
    """
    digests, order = Digests(sources), np.asarray(order, np.int64)
    if kept is not None and sources.far:
        for members in kept.hashed():
            digests.learn_lines(members)
    clean = all([digests.learn_lines(lines).all() for lines in remember(memory)])
    if len(wanted := order[~digests.known[order]]):
        hash_images(digests, wanted, memory, workers)
    if not clean:
        tidy(memory, sources)
    return digests.table(order)


class Digests:
    """Size and sha256 of the images of `sources`, by their place there, where they are `known`."""

    def __init__(self, sources: Sources) -> None:
        self.sources, n = sources, len(sources)
        self.sizes, self.sha256, self.known = np.zeros(n, np.int64), np.zeros((n, 32), np.uint8), np.zeros(n, bool)
        self.remembered = np.zeros(n, bool)  # by a line of the memory

    def learn_lines(self, lines: Sequence[Line | None]) -> Array:
        """What lines of the memory say of images that have not changed since; which lines are worth keeping: these, once, and those of
        other images."""
        rows = np.flatnonzero([line is not None for line in lines])
        told = [line for line in lines if line is not None]
        at = self.sources.places(pa.array([line[0] for line in told], pa.large_string()))
        stamps = np.array([(line[1], *line[3:]) for line in told], np.int64).reshape(-1, 3)
        good = (at >= 0) & (stamps == self.sources.stamps(at)).all(axis=1)
        sha256 = np.frombuffer(b"".join(bytes.fromhex(line[2]) for line in told), np.uint8).reshape(-1, 32)
        self.sizes[at[good]], self.sha256[at[good]], self.known[at[good]] = stamps[good, 0], sha256[good], True
        first = np.zeros(len(told), bool)
        first[np.flatnonzero(good)[np.unique(at[good], return_index=True)[1]]] = True
        keep = np.zeros(len(lines), bool)
        keep[rows] = (at < 0) | first & ~self.remembered[at]
        self.remembered[at[good]] = True
        return keep

    def table(self, order: Numbers) -> SourceTable:
        """The images in this order."""
        at, sources = pa.array(order), self.sources
        columns = {
            "key": sources.keys.array.take(at),
            "label": sources.labels.array.take(at),
            "bytes": pa.array(self.sizes[order]),
        }
        hashes = hash_values(self.sha256[order], np.ones(len(order), bool))
        return SourceTable({**{name: Values(array, name) for name, array in columns.items()}, "sha256": hashes})


def hash_images(digests: Digests, wanted: Numbers, memory: Path, workers: int) -> None:
    """Read and hash these images, noting each in the memory as soon as it is known."""
    sources = digests.sources
    with (
        Progress("hashing", len(wanted)) as progress,
        ThreadPoolExecutor(max(workers, THREADS) if sources.far else workers) as pool,
        open(memory, "ab", buffering=0) as out,
    ):
        for start in range(0, len(wanted), CHUNK):
            part = wanted[start : start + CHUNK].tolist()
            stamps = sources.stamps(np.array(part)).tolist()
            for i, data, (size, *place) in zip(part, pool.map(lambda i: digest(sources, i), part), stamps):
                digests.sizes[i], digests.sha256[i] = data[0], np.frombuffer(data[1], np.uint8)
                if size != UNKNOWN:
                    note(out, (sources.keys[i], data[0], data[1].hex(), *place), memory)
                progress.add()


def digest(sources: Sources, i: int) -> tuple[int, bytes]:
    """Byte length and sha256 of one encoded image."""
    try:
        data = read_image(sources, i)
    except Unreadable:
        data = b""
    return len(data), hashlib.sha256(data).digest()


def remember_hashes(sources: Sources, found: Sequence[tuple[int, str]], memory: Path) -> None:
    """Add to the memory what was read just now. found: places in `sources`, and sha256 in hex. OSError as in publish."""
    stamps = sources.stamps(np.array([i for i, _ in found], np.int64)).tolist()
    lines = [
        (sources.keys[i], size, sha256, *place) for (i, sha256), (size, *place) in zip(found, stamps) if size != UNKNOWN
    ]
    try:
        with open(
            memory, "ab", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        ) as out:
            out.write(b"".join(map(in_text, lines)))
    except OSError as error:
        raise explained(error, memory) from error


def note(out: RawIOBase, line: Line, memory: Path) -> None:
    """Write a line of the memory; the newline comes first, as a kill may have cut off the line before. OSError as in publish."""
    try:
        out.write(in_text(line))
    except OSError as error:
        raise explained(error, memory) from error


def in_text(line: Line) -> bytes:
    """A line of the memory, its checksum first: a hash that damage changed would refuse an image that did not change."""
    text = json.dumps(line).encode()
    return b"\n%08x %s" % (zlib.crc32(text), text)


def remember(memory: Path) -> Iterator[list[Line | None]]:
    """The lines of the memory, many at a time; None for one that a kill cut off, or that is no such line."""
    if memory.is_symlink() or not memory.is_file():
        remove(memory)  # a link, a pipe: nothing that was written here
        return
    with open(memory, encoding="utf-8", errors="replace") as file:
        texts = filter(str.strip, iter(lambda: file.readline(LONGEST_LINE), ""))
        while lines := [line_of(text) for text in itertools.islice(texts, ROWS_AT_ONCE)]:
            yield lines


def line_of(text: str) -> Line | None:
    """The line of a memory that a text is."""
    try:
        checksum, _, line = text.strip().partition(" ")
        key, *rest = json.loads(line)
        whole = int(checksum, 16) == zlib.crc32(line.encode()) and len(bytes.fromhex(rest[1])) == 32
        np.array([rest[0], *rest[2:]], np.int64)
    except (ValueError, TypeError, IndexError, RecursionError, OverflowError):
        return None
    good = whole and isinstance(key, str) and [type(value) for value in rest] == [int, str, int, int]
    return (key, *rest) if good else None


def tidy(memory: Path, sources: Sources) -> None:
    """Write the memory anew without what a kill, damage or images that changed left in it beside a line per image."""

    def lines() -> Iterable[bytes]:
        digests = Digests(sources)
        for several in remember(memory):
            for line, kept in zip(several, digests.learn_lines(several)):
                if line is not None and kept:
                    yield in_text(line)

    publish(memory, lines(), replace=True)
