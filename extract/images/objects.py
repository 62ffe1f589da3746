"""Images in object stores: what lies below a prefix, the objects that a list names, tars by ranges.

A tar's index is in its headers, all over it; so all of it passes once, its images are hashed on the way, and what was learnt is kept.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

from mrmae.common.backend import About, Bucket, Url, bucket_of, locate
from mrmae.common.progress import Progress
from mrmae.extract.images.names import wanted
from mrmae.extract.images.patience import Unreadable, patiently
from mrmae.extract.images.tar_images import KeptIndices, TarImages, images_of_tar
from mrmae.extract.images.tars import LABEL_BYTES, TarHeader, any_headers

THREADS = 16  # requests under way at once where nothing is decoded; each waits for the network most of its time
PIECE_BYTES = 8 << 20  # of a tar per request
HEADERS_BYTES = (
    4096  # where only headers are read, and lie further apart than what passes while a request is under way:
)
REQUEST_BYTES = 256 << 10  # 20 ms at 12 MB/s, each of sixteen
FoundObject = tuple[str, About]  # URL, size and version


def bucket_and_key(url: str) -> tuple[Bucket, str]:
    """Who answers for an object, and its name there; of names that a Url would tidy, too."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return bucket_of(f"{scheme}://{bucket}"), key


def is_url(path: str) -> bool:
    return "://" in path


def read_object(url: str, wanted: About, offset: int | None = None) -> bytes:
    """An object, or as many bytes of it as are wanted, from `offset`. OSError where it is not what it was when it was listed."""
    if offset is not None and not wanted.size_bytes:
        return b""
    bucket, key = bucket_and_key(url)
    data, now = bucket.get(key, None if offset is None else (offset, wanted.size_bytes))
    if len(data) != wanted.size_bytes or (offset is not None and now.version != wanted.version):
        raise OSError(errno.EIO, f"the object has changed since it was listed (it has {now.size_bytes} bytes now, of which {len(data)} "
                      f"came, and {wanted.size_bytes} were expected)", url)  # fmt: skip
    return data


# --- prefixes and lists


def objects_below(root: Url) -> Iterator[FoundObject]:
    """Every object below a prefix, without the empty ones that stand for folders. ValueError where there is none."""
    found = root.bucket.below(root.key)
    if not found:
        if about_if_there(str(root)) is None:
            raise ValueError(f"{root}: there is no such object, and none below {root}/; expected a .tar or a prefix; check IMAGES")  # fmt: skip
        raise ValueError(f"{root}: is one object; expected a plain .tar, or a prefix with images below it; a list of URLs is read from a "
                         "local text file")  # fmt: skip
    for key, about in found:
        if about.size_bytes or "." in key.rpartition("/")[2]:
            yield f"{root.bucket.root}/{key}", about


def objects_named(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, str, About]]:
    """(key, URL, about) of the objects that the lines of the list `path` name; keys are relative to their common folder.

    ValueError for lines that are no URLs of one kind of store, and for objects that are not there.
    """
    if local := [line for line in lines if "://" not in line]:
        raise ValueError(f"{path}: {len(local)} of {len(lines)} lines are no URLs, first {local[0]!r}; expected URLs alone, or paths "
                         "alone; make a list of each and give both")  # fmt: skip
    urls = [str(locate(line, "IMAGES")) for line in lines]
    schemes, names = {url.partition("://")[0] for url in urls}, [url.partition("://")[2] for url in urls]
    if len(schemes) > 1:
        raise ValueError(
            f"{path}: has URLs of {' and '.join(sorted(schemes))}; expected one kind; make a list of each and give both"
        )
    with Progress("looking at objects", len(urls)) as progress, ThreadPoolExecutor(THREADS) as pool:
        abouts = []
        for about in pool.map(about_if_there, urls):
            abouts.append(about)
            progress.add()
    missing = [url for url, about in zip(urls, abouts) if about is None]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(urls)} listed objects do not exist, first {missing[0]}; correct the list"
        )
    base = os.path.commonpath([os.path.dirname(name) for name in names])
    for name, url, found in zip(names, urls, abouts):
        assert found is not None
        yield name[len(base) :].lstrip("/"), url, found


def about_if_there(url: str) -> About | None:
    bucket, key = bucket_and_key(url)
    try:
        return patiently(lambda: bucket.about(key), lambda: url)
    except Unreadable:
        return None


# --- tars


class ObjectFile:
    """An object as tarfile reads one, forwards, in pieces. passed: called for each 8 MB. skips: what lies between headers is not wanted."""

    def __init__(self, url: Url, about: About, passed: Callable[[], None], *, skips: bool = False) -> None:
        self.url, self.about, self.passed, self.skips = url, about, passed, skips
        self._at = self._start = self._end = self._passed = 0
        self._piece = b""

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def read(self, n: int) -> bytes:
        """n bytes, fewer where the object ends."""
        parts = []
        while n > 0 and self._at < self.about.size_bytes:
            if not self._start <= self._at < self._start + len(self._piece):
                self._fetch()
            part = self._piece[self._at - self._start :][:n]
            parts.append(part)
            self._at, n = self._at + len(part), n - len(part)
            self._end = self._at
        return b"".join(parts)

    def _fetch(self) -> None:
        far = self.skips and (not self._at or self._at - self._end > REQUEST_BYTES)  # from what was read before
        start, wanted = self._at, HEADERS_BYTES if far else PIECE_BYTES
        piece = About(min(wanted, self.about.size_bytes - start), self.about.version)
        self._piece = b""  # not two at once
        self._piece = patiently(lambda: read_object(str(self.url), piece, start), lambda: str(self.url))
        self._start = start
        while self._passed <= start // PIECE_BYTES:
            self._passed += 1
            self.passed()


def read_tars(urls: Sequence[Url], kept: KeptIndices, suffixes: tuple[str, ...]) -> dict[Url, tuple[About, TarImages]]:
    """What each tar is now, and its images, as they are kept or else read side by side."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda url: about_if_there(str(url)), urls))
        if gone := [url for url, about in zip(urls, found) if about is None]:
            raise ValueError(
                f"{gone[0]}: does not exist ({len(gone)} of {len(urls)} tars at URLs do not); check IMAGES"
            )
        abouts, tars = {url: about for url, about in zip(urls, found) if about is not None}, dict[Url, TarImages]()

        def learn() -> list[Url]:
            """Those that are not kept, of those not known yet."""
            todo = [url for url in abouts if url not in tars]
            there = pool.map(lambda url: kept.recall(url, abouts[url], suffixes), todo)
            tars.update({url: images for url, images in zip(todo, there) if images is not None})
            return [url for url in todo if url not in tars]

        if learn():
            with kept.alone():
                todo = learn()  # another process may have read some meanwhile
                pieces = sum(-(-abouts[url].size_bytes // PIECE_BYTES) for url in todo)
                with Progress("reading tars", pieces, "x 8 MB") as progress:
                    passed = Passed(progress)
                    try:
                        tars |= zip(
                            todo, pool.map(lambda url: read_far_tar(url, abouts[url], kept, suffixes, passed), todo)
                        )
                    finally:  # one cannot be read, or the command is stopped: the others need not go on to their ends
                        passed.stopped = True
                        pool.shutdown(cancel_futures=True)
    return {url: (abouts[url], tars[url]) for url in abouts}


class Passed:
    """Counts pieces; raises InterruptedError at the next one once it is `stopped`."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.stopped = progress, False

    def __call__(self) -> None:
        if self.stopped:
            raise InterruptedError("reading was stopped")
        self.progress.add()


def read_far_tar(
    url: Url, about: About, kept: KeptIndices, suffixes: tuple[str, ...], passed: Callable[[], None]
) -> TarImages:
    """Read a tar once and keep its images. ValueError as read_headers; OSError or Unreachable where it cannot be read."""
    members = far_headers(url, about, kept, lambda name: wanted(name, suffixes), passed)

    def read(offset: int, size_bytes: int) -> bytes:
        return read_object(str(url), About(size_bytes, about.version), offset)

    found = images_of_tar(url, members, suffixes, read)
    kept.keep(url, about, suffixes, found)
    return found


def far_headers(
    url: Url, about: About, kept: KeptIndices, hashed: Callable[[str], bool], passed: Callable[[], None]
) -> dict[str, TarHeader]:
    """Name -> member, with texts of labels. hashed: of which members the sha256 is wanted, by name, if of any. Raises as read_far_tar."""
    file = ObjectFile(url, about, passed, skips=kept.headers_only)

    def looked_at(name: str, member: TarHeader) -> TarHeader:
        """With the text of a label, or the hash of an image."""
        if member.special:
            return member
        file.seek(member.offset)
        if name.lower().endswith(".cls") and member.size_bytes <= LABEL_BYTES:
            return member._replace(text=file.read(member.size_bytes).decode("utf-8", "replace").strip())
        if kept.headers_only or not hashed(name):
            return member
        digest, left = hashlib.sha256(), member.size_bytes
        while left > 0:
            digest.update(file.read(min(left, PIECE_BYTES)))
            left -= PIECE_BYTES
        return member._replace(sha256=digest.hexdigest())

    return any_headers(cast(IO[bytes], file), about.size_bytes, url, looked_at)
