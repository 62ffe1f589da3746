"""Caches at URLs (s3://, gs://, az://): a path whose reads are range requests, repeated when they fail, and counted.

Through obstore, an optional dependency. Credentials come from the environment (AWS_..., GOOGLE_..., AZURE_...) and appear in
no message. Nothing is ever written to a URL.
"""

import bisect
import errno
import functools
import os
import re
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PosixPath
from typing import Any, NoReturn, TypeVar

import numpy as np

from mrmae.shards.spec import expect_utf8

SCHEMES = ("s3", "gs", "az")
EXTRA = "pip install 'mrmae[s3]'"
TRIES = 5
FIRST_WAIT_SECONDS = 0.2  # doubled with every try
CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "600s"}
# Ranges closer than this, or than one of them is long, are one request: at most about half of it is waste.
GAP_BYTES = 1 << 17
REQUEST_BYTES = 1 << 26  # no request is longer: a lost connection costs no more
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCOUNT_KEY|SAS|CREDENTIAL")
# Where a machine's own role is asked for last.
METADATA = re.compile(r"169\.254\.169\.254|/latest/(api/token|meta-data)")
Place = tuple[int, int]  # offset, bytes
Answer = TypeVar("Answer")


class Unreachable(Exception):
    """A URL that cannot be read now: connection lost, access refused, no credentials. Says what to do."""


def locate(path: str | os.PathLike[str]) -> Path:
    """The path of a cache: local, or a RemotePath for a URL. ValueError for a URL with a user, password or query,
    and where it is not UTF-8."""
    text = os.fspath(path)
    expect_utf8(text, "CACHE")
    found = re.match(rf"({'|'.join(SCHEMES)}):/+([^/]*)(.*)", text, re.DOTALL)
    if not found:
        if unknown := re.match(r"([a-z][a-z0-9+.-]+)://", text):
            raise ValueError(f"{unknown[0]}...: caches are read from local folders and {', '.join(SCHEMES)} URLs; "
                             "copy this one to either")  # fmt: skip
        return Path(path)
    scheme, bucket, key = found.groups()
    if "@" in bucket or "?" in bucket + key:
        raise ValueError(f"{scheme}://...: this URL holds a user, a password or a query; expected {scheme}://BUCKET/PATH, "
                         "and credentials in the environment; take them out of the URL")  # fmt: skip
    if not bucket:
        raise ValueError(f"{scheme}://: has no bucket; expected {scheme}://BUCKET/PATH; correct the URL")
    return RemotePath(f"{scheme}://{bucket}{key}")


class RemotePath(PosixPath):
    """The name of an object, or of a cache's folder, at a URL; reads like a Path, and refuses to write."""

    def __str__(self) -> str:
        return re.sub(rf"^({'|'.join(SCHEMES)}):/", r"\1://", super().__str__())

    @property
    def bucket(self) -> "Bucket":
        """Who answers for this object."""
        return bucket_of(f"{self.parts[0]}//{self.parts[1]}")

    @property
    def key(self) -> str:
        """The object's name in its bucket."""
        return "/".join(self.parts[2:])

    def read_bytes(self) -> bytes:
        """The whole object. FileNotFoundError, or Unreachable."""
        return self.bucket.whole(self.key)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Only its size, from the newest listing where there is one. FileNotFoundError, or Unreachable."""
        return os.stat_result((0o100444, 0, 0, 0, 0, 0, self.bucket.size(self.key), 0, 0, 0))

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def refresh(self) -> None:
        """List what lies below, now: `stat` and `exists` below go by the newest listing."""
        self.bucket.refresh(self.key)

    def resolve(self, strict: bool = False) -> "RemotePath":
        return self

    def absolute(self) -> "RemotePath":
        return self

    def read_only(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(f"{self}: a cache at a URL can only be read; do this with a local copy, and upload that")

    mkdir = unlink = rmdir = rename = replace = touch = write_bytes = write_text = read_only
    iterdir = glob = rglob = read_only


class Bucket:
    """The objects of one bucket, read in ranges. Thread-safe. requests, bytes, retries: what it cost so far."""

    def __init__(self, root: str) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise ValueError(f"{root}: caches at URLs are read with obstore, which is not installed; {EXTRA}") from None
        self.root, self.obstore = root, obstore
        self.requests = self.bytes = self.retries = 0
        self._lock = threading.Lock()
        self._listings: dict[str, dict[str, int]] = {}
        options: Any = {**CLIENT, "allow_http": plain_http_endpoint()}
        try:
            self.store: Any = from_url(root, client_options=options, retry_config={"max_retries": 0})
        except obstore.exceptions.BaseError as error:
            raise Unreachable(f"{root}: {cause(error)}; {advice(root)}") from None

    def ranges(self, key: str, places: Sequence[Place]) -> list[memoryview]:
        """The bytes at each (offset, bytes) of an object, shorter where it ends; neighbours come in one request."""
        spans = merged(places)
        asked: dict[str, Any] = {"starts": [a for a, _ in spans], "ends": [b for _, b in spans], "coalesce": 0}
        parts = self.ask(key, lambda: self.obstore.get_ranges(self.store, key, **asked), requests=len(spans))
        views = [memoryview(part) for part in parts]
        self.count(bytes=sum(len(view) for view in views))
        starts = [start for start, _ in spans]
        at = [bisect.bisect_right(starts, offset) - 1 for offset, _ in places]
        return [views[i][offset - starts[i] :][:n_bytes] for i, (offset, n_bytes) in zip(at, places)]

    def whole(self, key: str) -> bytes:
        """All bytes of an object."""
        data = self.ask(key, lambda: bytes(self.obstore.get(self.store, key).bytes()))
        self.count(bytes=len(data))
        return data

    def size(self, key: str) -> int:
        """Bytes of an object."""
        for folder, sizes in list(self._listings.items()):
            if not folder or key.startswith(f"{folder}/"):  # "": a cache at the bucket's root
                if key not in sizes:
                    raise missing(self.root, key)
                return sizes[key]
        return int(self.ask(key, lambda: self.obstore.head(self.store, key))["size"])

    def refresh(self, folder: str) -> None:
        """List every object below `folder` with its size, as of now."""

        def listed() -> dict[str, int]:
            return {o["path"]: o["size"] for page in self.obstore.list(self.store, folder) for o in page}

        self._listings[folder] = self.ask(folder, listed)

    def ask(self, key: str, what: Callable[[], Answer], *, requests: int = 1) -> Answer:
        """What the bucket answers; asked again, a few times, where the connection or the server fails.

        Raises FileNotFoundError, or Unreachable, which says how often it was tried.
        """
        where = f"{self.root}/{key}"
        for attempt in range(1, TRIES + 1):
            self.count(requests=requests)
            try:
                return what()
            except FileNotFoundError:
                raise missing(self.root, key) from None
            except (self.obstore.exceptions.BaseError, OSError) as error:
                said = cause(error)
            if "status code: 416" in said:  # the range begins behind the end
                raise OSError(errno.EIO, "the object is shorter than it was", where)
            if not passes(said) or attempt == TRIES:
                tried = f" (tried {attempt} times)" if attempt > 1 else ""
                raise Unreachable(f"{where}: cannot be read{tried}: {said}; {advice(said)}") from None
            self.count(retries=1)
            warnings.warn(f"{where}: {said}; asking again, attempt {attempt + 1} of {TRIES}", stacklevel=2)
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("the loop returns or raises")

    def count(self, **more: int) -> None:
        """Add to the counters."""
        with self._lock:
            for name, n in more.items():
                setattr(self, name, getattr(self, name) + n)


@functools.lru_cache
def bucket_of(root: str) -> Bucket:
    """The bucket at `scheme://bucket`, one per process."""
    return Bucket(root)


def merged(places: Sequence[Place]) -> list[Place]:
    """(start, end) of the requests that cover all places: neighbours in one, up to REQUEST_BYTES."""
    spans: list[tuple[int, int]] = []
    for offset, n_bytes in sorted(places):
        start, end = spans[-1] if spans else (0, -GAP_BYTES - n_bytes - 1)
        near = offset - end <= max(GAP_BYTES, n_bytes)
        if near and (offset + n_bytes <= end or offset + n_bytes - start <= REQUEST_BYTES):
            spans[-1] = start, max(end, offset + n_bytes)
        else:
            spans.append((offset, offset + n_bytes))
    return spans


def missing(root: str, key: str) -> FileNotFoundError:
    """The error for an object that is not there."""
    return FileNotFoundError(errno.ENOENT, "no such object", f"{root}/{key}")


def cause(error: Exception) -> str:
    """The first line of an error, without queries and without the values of secret environment variables."""
    line = str(error).partition("\n")[0] or type(error).__name__
    for name, value in os.environ.items():
        if SECRET.search(name.upper()) and len(value) >= 4:
            for form in {value, urllib.parse.quote(value, safe="")}:
                line = line.replace(form, "***")
    return re.sub(r"(https?://)[^/\s]*@", r"\1", re.sub(r"\?[^\s\"')]*", "?...", line))


def passes(said: str) -> bool:
    """Whether asking again may help: not where the server understood and refused, or there are no credentials."""
    status = re.search(r"status code: (\d{3})", said)
    refused = status is not None and status[1].startswith("4") and status[1] not in ("408", "429")
    return not refused and not METADATA.search(said)


def advice(said: str) -> str:
    """What to do about an error."""
    if METADATA.search(said):
        return ("there are no credentials in the environment; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for a public "
                "bucket AWS_SKIP_SIGNATURE=true), then run the same command again")  # fmt: skip
    if re.search(r"status code: 40[13]", said):
        return "the credentials in the environment may not read this; correct them, then run the same command again"
    if "status code: 404" in said:
        return "is the URL right? correct it"
    return "check the network, the endpoint and the URL, then run the same command again, or copy the cache to a local folder"


def plain_http_endpoint() -> bool:
    """Whether the environment names an endpoint without encryption, such as a server on this machine."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return endpoint.startswith("http://")


class RemoteFile:
    """An open object: what was announced with `expect` is read at once, in few requests."""

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._read: dict[Place, memoryview] = {}

    def size(self) -> int:
        return self.path.stat().st_size

    def expect(self, places: Sequence[Place]) -> None:
        """Fetch these (offset, bytes) now; `read` and `read_into` then take them from memory."""
        self._read = dict(zip(places, self.path.bucket.ranges(self.path.key, places)))

    def read(self, n_bytes: int, offset: int) -> bytes:
        """n_bytes at offset, fewer where the object ends."""
        if (offset, n_bytes) not in self._read:
            self.expect([(offset, n_bytes)])
        return bytes(self._read[offset, n_bytes])

    def read_into(self, buffers: Sequence[Any], offset: int) -> int:
        """Fill the buffers from offset; how many bytes there were."""
        flat = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        data, at = np.frombuffer(self.read(sum(len(buffer) for buffer in flat), offset), np.uint8), 0
        for buffer in flat:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(buffer)
        return len(data)


def pieces(path: Path, at_once: int = 1 << 24) -> Iterator[bytes]:
    """The content of a local file or of an object, in order."""
    if not isinstance(path, RemotePath):
        with open(path, "rb") as file:
            while piece := file.read(at_once):
                yield piece
        return
    size = path.stat().st_size
    for offset in range(0, size, at_once):
        yield bytes(path.bucket.ranges(path.key, [(offset, min(at_once, size - offset))])[0])
