"""The fast road: read chunks of shard files straight into a batch buffer and verify each one's crc32c.

It reads the same spec-valid files that any zarr v3 client reads. Files are opened per call (about 10 us), so there is
no descriptor to share, to run out of, or to lose at a fork. Objects at URLs are read the same way, all chunks of a call
in as few range requests as their places allow (backend.py).
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from mrmae.common.backend import Place, RemoteFile, Url
from mrmae.shards.format import Array

ABSENT = 2**64 - 1  # in a zarr shard's index: this chunk was never written
NOT_WAITING: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux: a read that fails where it would wait for the disk
PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a link is refused, a FIFO does not hang


class Damaged(ValueError):
    """A file that is missing, short or altered. row: the sample within the shard, None for the whole file."""

    def __init__(self, path: Path, row: int | None, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path, self.row, self.what = path, row, what


class LocalFile:
    """An open file of the disk."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, PLAIN)

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def expect(self, places: Sequence[Place]) -> None:
        """Have the disk fetch these (offset, bytes) side by side where they do not lie in memory, as the last one tells."""
        if len(places) < 2 or NOT_WAITING is None:
            return
        # A file system without such reads, or places that are none: the reads themselves will say what is wrong.
        with contextlib.suppress(OSError, OverflowError):
            try:
                os.preadv(self.descriptor, [bytearray(1)], sum(places[-1]) - 1, NOT_WAITING)
            except BlockingIOError:
                for offset, n_bytes in places:
                    os.posix_fadvise(self.descriptor, offset, n_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, n_bytes: int, offset: int) -> bytes:
        """n_bytes at offset, fewer where the file ends."""
        parts, end = [], min(offset + n_bytes, self.size())
        while offset < end and (part := os.pread(self.descriptor, end - offset, offset)):
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def read_into(self, buffers: Sequence[Any], offset: int, n_bytes: int) -> int:
        """Fill the buffers, n_bytes in all, from offset; how many bytes there were. A call may give fewer (2 GiB at most)."""
        got = more = os.preadv(self.descriptor, buffers, offset)
        while more and got < n_bytes:
            got += (more := os.preadv(self.descriptor, behind(buffers, got), offset + got))
        return got


def behind(buffers: Sequence[Any], got: int) -> list[memoryview]:
    """What is left of the buffers once their first `got` bytes are filled."""
    left = []
    for buffer in buffers:
        view = memoryview(buffer)
        if got < view.nbytes:
            left.append(view.cast("B")[got:])
        got = max(0, got - view.nbytes)
    return left


File = LocalFile | RemoteFile


class ShardFile:
    """One zarr shard file with `blocks` chunks per sample. Thread-safe; seal and index are read and verified once."""

    def __init__(self, path: Path, shard_samples: int, seal: bytes, blocks: int = 1) -> None:
        self.path, self.shard_samples, self.seal, self.blocks = path, shard_samples, seal, blocks
        self._index: Array | None = None

    def read(self, rows: Sequence[int], out: Sequence[Array], blocks: Sequence[int] | None = None) -> None:
        """Read the samples at `rows` of the shard into the contiguous arrays `out`, verified.

        blocks: the chunk of each sample to read; None: all of them, one behind the other.
        Raises Damaged, naming the row, where a chunk is absent, short or fails its crc32c.
        """
        with opened(self.path) as file:
            index = self.index(file)
            found = index[list(rows)] if blocks is None else index[list(rows), list(blocks)][:, None]
            places: list[list[Place]] = [[(at, n) for at, n in chunks] for chunks in found.tolist()]
            file.expect([place for chunks in places for place in chunks if place[0] != ABSENT])
            for row, chunks, array in zip(rows, places, out):
                for place, chunk in zip(chunks, [array] if len(chunks) == 1 else array.reshape(len(chunks), -1)):
                    self.read_chunk(file, row, place, chunk)

    def index(self, file: File) -> Array:
        """Offset and bytes of every chunk, uint64 [shard_samples, blocks, 2]."""
        if self._index is None:
            n_bytes = 16 * self.shard_samples * self.blocks + 4
            start = file.size() - n_bytes
            if isinstance(file, RemoteFile) and start >= 0:
                file.expect([(start, n_bytes), (0, len(self.seal))])
            data = file.read(n_bytes, start) if start >= 0 else b""
            if len(data) != n_bytes:
                raise Damaged(self.path, None, "the file is too short for its index")
            if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise Damaged(self.path, None, "the index fails its crc32c")
            if file.read(len(self.seal), 0) != self.seal:
                raise Damaged(self.path, None, "its seal says that it is another shard, or is damaged")
            index = np.frombuffer(data[:-4], "<u8").reshape(-1, self.blocks, 2)
            refuse_outside(self.path, index, start)
            self._index = index
        return self._index

    def read_chunk(self, file: File, row: int, place: Place, out: Array) -> None:
        """Read and verify one chunk."""
        offset, n_bytes = place
        if offset == ABSENT:
            raise Damaged(self.path, row, "this sample was never written")
        if n_bytes != out.nbytes + 4:
            raise Damaged(self.path, row, f"the chunk has {n_bytes} bytes; expected {out.nbytes + 4}")
        crc = bytearray(4)
        got = file.read_into([out, crc], offset, n_bytes)
        if got != n_bytes:
            raise Damaged(self.path, row, f"the file ends within the chunk ({got} of {n_bytes} bytes)")
        if google_crc32c.value(out) != int.from_bytes(crc, "little"):
            raise Damaged(self.path, row, "the chunk fails its crc32c")


def refuse_outside(path: Path, index: Array, end: int) -> None:
    """Damaged where a chunk of a shard's index does not lie before `end`, where the index begins."""
    offsets, sizes, end_at = index[..., 0], index[..., 1], np.uint64(end)
    outside = (offsets != ABSENT) & ((offsets > end_at) | (sizes > end_at - np.minimum(offsets, end_at)))
    if outside.any():
        row, block = np.argwhere(outside)[0]
        raise Damaged(path, int(row), f"its index places a chunk of {sizes[row, block]} bytes at {offsets[row, block]}, "
                                      f"outside the {end} bytes before the index")  # fmt: skip


def read_members(path: Path, rows: Sequence[int], table: Array) -> Iterator[bytes]:
    """The member of each row of a tar in turn, verified by its crc32c.

    table: (offset, bytes, crc32c) of every row, from the sidecar. Raises Damaged, naming the row.
    """
    with opened(path) as file:
        file.expect([(offset, n_bytes) for offset, n_bytes, _ in table[list(rows)].tolist() if offset >= 0])
        for row in rows:
            offset, n_bytes, crc = (int(n) for n in table[row])
            if offset < 0:
                raise Damaged(path, row, "there is no such member")
            content = file.read(n_bytes, offset)
            if len(content) != n_bytes:
                raise Damaged(path, row, f"the file ends within the member ({len(content)} of {n_bytes} bytes)")
            if google_crc32c.value(content) != crc:
                raise Damaged(path, row, "the member fails its crc32c")
            yield content


@contextmanager
def opened(path: Path) -> Iterator[File]:
    """A file to read from. Raises Damaged when it cannot be opened or read; Unreachable where a URL does not answer."""
    try:
        file = RemoteFile(path) if isinstance(path, Url) else LocalFile(path)
    except OSError as error:
        raise Damaged(path, None, f"cannot be opened ({error.strerror})") from None
    try:
        yield file
    except OSError as error:
        raise Damaged(path, None, f"cannot be read ({error.strerror})") from None
    finally:
        if isinstance(file, LocalFile):
            os.close(file.descriptor)
