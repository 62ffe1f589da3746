"""The data set's fingerprint: byte length and sha256 of every encoded image, one pass that a second start continues."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path

from mrmae.common.files import explained, publish, remove
from mrmae.common.progress import Progress
from mrmae.extract.images.list import Sources, Stamp, Unreadable, read_image

Row = tuple[str, int, str]  # key, bytes, sha256 in hex
Line = tuple[str, int, str, int, int]  # a row, and the time and place of the image that it was computed of
CHUNK = 256  # images per round of the pool: bounds what is in memory
LONGEST_LINE = 1 << 16  # characters; a path has 4096 bytes at most


def digest_images(
    sources: Sources, order: Sequence[int], known_rows: Iterable[Row], memory: Path, *, workers: int
) -> list[Row]:
    """(key, bytes, sha256) of the images in `order`; one that is not there, or may not be read, counts as empty.

    known_rows: from before; images whose key and byte length still agree are not read again. memory: a file that keeps
    every row with the time and place of its image; where size, time and place are the same, the image is not read again.
    OSError, naming it, for an image that cannot be read for another reason; what was computed is in `memory`.
    """
    images, remembered = sources.images, dict(remember(memory))
    known = {row[0]: row for row in known_rows}
    for i in order:
        if (line := remembered.get(images[i].key)) and stamp_of(line) == sources.stamp(i):
            known[images[i].key] = line[:3]
    wanted = [i for i in order if not same_size(known.get(images[i].key), images[i].size_bytes)]
    if not wanted:
        return [known[images[i].key] for i in order]
    with (
        Progress("hashing", len(wanted)) as progress,
        ThreadPoolExecutor(workers) as pool,
        open(memory, "ab", buffering=0) as out,
    ):
        for start in range(0, len(wanted), CHUNK):
            part = wanted[start : start + CHUNK]
            for i, row in zip(part, pool.map(lambda i: digest(sources, i), part)):
                known[row[0]] = row
                if (stamp := sources.stamp(i)) is not None:
                    remembered[row[0]] = (*row, *stamp[1:])
                    note(out, remembered[row[0]], memory)
                progress.add()
    tidy(memory, remembered)
    return [known[images[i].key] for i in order]


def digest(sources: Sources, i: int) -> Row:
    """Key, byte length and sha256 of one encoded image."""
    try:
        data = read_image(sources, i)
    except Unreadable:
        data = b""
    return sources.images[i].key, len(data), hashlib.sha256(data).hexdigest()


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


def same_size(row: Row | None, size_bytes: int | None) -> bool:
    """True when the image was digested before and is still as long; changed bytes are noticed when it is decoded."""
    return row is not None and size_bytes is not None and row[1] == size_bytes


def stamp_of(line: Line) -> Stamp:
    """Size, time and place of the image when its line was computed."""
    return line[1], *line[3:]


def remember(memory: Path) -> Iterator[tuple[str, Line]]:
    """The lines of the memory by key, later ones last; one that a kill cut off, or that is no such line, is left out."""
    if memory.is_symlink() or not memory.is_file():
        remove(memory)  # a link, a pipe: nothing that was written here
        return
    with open(memory, encoding="utf-8", errors="replace") as file:
        for text in iter(lambda: file.readline(LONGEST_LINE), ""):
            try:
                checksum, _, line = text.strip().partition(" ")
                key, *rest = json.loads(line)
                whole = int(checksum, 16) == zlib.crc32(line.encode())
            except (ValueError, TypeError, RecursionError):
                continue
            if whole and isinstance(key, str) and [type(value) for value in rest] == [int, str, int, int]:
                yield key, (key, *rest)


def tidy(memory: Path, remembered: Mapping[str, Line]) -> None:
    """Write the memory anew where a kill, damage or images that changed left more in it than one line per image."""
    size = sum(len(in_text(line)) for line in remembered.values())
    if memory.stat().st_size != size:
        publish(memory, b"".join(in_text(line) for line in remembered.values()), replace=True)
