"""The data set's fingerprint: byte length and sha256 of every encoded image, one pass that a second start continues."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mrmae.extract.images import Sources
from mrmae.extract.progress import Progress

Row = tuple[str, int, str]  # key, bytes, sha256 in hex
CHUNK = 256  # images per round of the pool: bounds what is in memory


def digest_images(
    sources: Sources, order: Sequence[int], known_rows: Iterable[Row], spool: Path, *, workers: int
) -> list[Row]:
    """(key, bytes, sha256) of the images in `order`; an image that cannot be read counts as empty.

    known_rows: from before; images whose key and byte length still agree are not read again. spool: a JSONL file where
    rows are kept until the pass is complete.
    """
    known = {row[0]: row for row in [*known_rows, *read_spool(spool)]}
    images = sources.images
    wanted = [i for i in order if not same_size(known.get(images[i].key), images[i].size_bytes)]
    if not wanted:
        return [known[images[i].key] for i in order]
    with Progress("hashing", len(wanted)) as progress, ThreadPoolExecutor(workers) as pool, open(spool, "a") as out:
        for start in range(0, len(wanted), CHUNK):
            for row in pool.map(lambda i: digest(sources, i), wanted[start : start + CHUNK]):
                known[row[0]] = row
                out.write(json.dumps(row) + "\n")
                progress.add()
            out.flush()
    return [known[images[i].key] for i in order]


def digest(sources: Sources, i: int) -> Row:
    """Key, byte length and sha256 of one encoded image."""
    try:
        data = sources.read(i)
    except OSError:
        data = b""
    return sources.images[i].key, len(data), hashlib.sha256(data).hexdigest()


def same_size(row: Row | None, size_bytes: int | None) -> bool:
    """True when the image was digested before and is still as long; changed bytes are noticed when it is decoded."""
    return row is not None and size_bytes is not None and row[1] == size_bytes


def read_spool(spool: Path) -> Iterator[Row]:
    """The rows of the spool; a line that a kill cut off is left out."""
    for line in spool.read_text().splitlines() if spool.exists() else []:
        try:
            key, size, sha = json.loads(line)
        except ValueError:
            continue
        yield key, size, sha
