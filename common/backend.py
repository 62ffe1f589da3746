"""Where caches and images are read: folders of this machine, object stores (s3://, gs://, az://) through obstore, the Hub (hf://).

A Url is the name of an object and reads nothing: what reads asks here, and gets the same of both. obstore asks again where a
connection is lost, and joins neighbouring ranges. Credentials come from the environment (AWS_..., GOOGLE_..., AZURE_...) and
appear in no message. Writing is in files.py and uploads.py.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import stat
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mrmae.common.hub_files import HubFiles

SCHEMES = ("s3", "gs", "az", "hf")
INSTALL = "pip install 'mrmae[s3]'"
RETRIES: Any = {"max_retries": 4}
CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "600s"}
# For small objects that are worth nothing later: the last of several attempts ends within half a lease.
QUICK = {"connect_timeout": "5s", "read_timeout": "10s", "timeout": "10s"}
QUICK_RETRIES: Any = {"retry_timeout": timedelta(seconds=15)}
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCOUNT_KEY|SAS|CREDENTIAL")
# Where a machine's own role is asked for last.
MACHINE_ROLES = re.compile(
    r"169\.254\.169\.254|/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity|/msi\?|Account must be specified"
)
CREDENTIALS = {
    "GCS": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or run `gcloud auth application-default login` (for a public "
           "bucket GOOGLE_SKIP_SIGNATURE=true)",
    "MicrosoftAzure": "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN (for a public container "
                      "AZURE_SKIP_SIGNATURE=true)",
    "": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for a public bucket AWS_SKIP_SIGNATURE=true)",
}  # fmt: skip
COPY_SETTING = "AWS_COPY_IF_NOT_EXISTS"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
Place = tuple[int, int]  # offset, bytes
Answer = TypeVar("Answer")


class Unreachable(Exception):
    """A URL that cannot be read now: connection lost, access refused, no credentials. Says what to do."""


class About(NamedTuple):
    """Size of an object, and a number that stands for what is in it: another one as soon as it was written again."""

    size_bytes: int
    version: int


class Url(PurePosixPath):
    """The name of an object, or of a folder, at a URL."""

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


def expect_utf8(path: str | os.PathLike[str], what: str) -> None:
    """ValueError, naming `what` and showing the bytes, where a path or text from the command line is not UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {os.fsencode(path)!r}: these bytes are not UTF-8, as everything is that a cache or a run "
                         "records; expected a path in UTF-8; rename that file or folder, or make a link to it")  from None  # fmt: skip


def locate(path: str | os.PathLike[str], what: str = "CACHE") -> Path:
    """The path of a cache or of images: local, or a Url. what: as a message calls it. ValueError for a URL with a user, password or query, and where it is not UTF-8.

    A Url is called a Path here: it has a Path's names, and to read is the backend's.
    """
    text = os.fspath(path)
    expect_utf8(text, what)
    found = re.match(rf"({'|'.join(SCHEMES)}):/+([^/]*)(.*)", text, re.DOTALL)
    if not found:
        if unknown := re.match(r"([a-z][a-z0-9+.-]+)://", text):
            raise ValueError(f"{unknown[0]}...: {what} can be a local path or a URL of {', '.join(SCHEMES)}; "
                             "copy this one to either")  # fmt: skip
        return Path(path)
    scheme, bucket, key = found.groups()
    if "@" in bucket or "?" in bucket + key:
        raise ValueError(f"{scheme}://...: this URL holds a user, a password or a query; expected {scheme}://BUCKET/PATH, "
                         "and credentials in the environment; take them out of the URL")  # fmt: skip
    if not bucket:
        raise ValueError(f"{scheme}://: has no bucket; expected {scheme}://BUCKET/PATH; correct the URL")
    return Url(f"{scheme}://{bucket}{key}")  # type: ignore[return-value]


def read_bytes(path: Path) -> bytes:
    """All of a file. FileNotFoundError, other OSErrors, or Unreachable."""
    if not isinstance(path, Url):
        return path.read_bytes()
    bucket, key = path.bucket, path.key
    return bucket.ask(key, lambda: bytes(bucket.obstore.get(bucket.store, key).bytes()))


def size_of(path: Path) -> int:
    """Bytes of a regular file, at a URL by the newest listing. OSError for what is none: a link, a folder, a device."""
    if isinstance(path, Url):
        return path.bucket.size(path.key)
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return about.st_size


def exists(path: Path) -> bool:
    """Whether there is such a file."""
    if not isinstance(path, Url):
        return path.exists()
    with contextlib.suppress(FileNotFoundError):
        return path.bucket.size(path.key) >= 0
    return False


def refresh(path: Path) -> None:
    """At a URL, list what lies below, now: sizes go by the newest listing."""
    if isinstance(path, Url):
        path.bucket.refresh(path.key)


def absolute(path: Path) -> Path:
    """The path with every link and `..` resolved."""
    return path if isinstance(path, Url) else path.resolve()


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, in order of their names; at a URL as of now. Empty where there is no such folder."""
    if isinstance(folder, Url):
        return sorted(locate(f"{folder.bucket.root}/{key}") for key, _ in folder.bucket.below(folder.key))
    return sorted(file for file in folder.rglob("*") if not file.is_dir())


class Bucket:
    """The objects of one bucket. Thread-safe."""

    def __init__(self, root: str) -> None:
        self.root, self._listings = root, dict[str, dict[str, int]]()
        if root.startswith("hf:"):
            self.obstore: Any = HubFiles(root)
            self.store: Any = None
            return
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise ValueError(f"{root}: URLs are read with obstore, which is not installed; {INSTALL}") from None
        self.obstore = obstore
        options: Any = {**CLIENT, "allow_http": plain_http_endpoint(root)}
        quick: Any = {**options, **QUICK}
        retries: Any = {**RETRIES, **QUICK_RETRIES}
        # S3 copies on a condition only as an upload in parts; some stores of its kind by a header, which the environment may name.
        config: Any = (
            {"copy_if_not_exists": "multipart"} if root.startswith("s3:") and COPY_SETTING not in os.environ else None
        )
        self.store = self.ask("", lambda: from_url(root, config=config, client_options=options, retry_config=RETRIES))
        self.quick: Any = self.ask("", lambda: from_url(root, client_options=quick, retry_config=retries))

    def ranges(self, key: str, places: Sequence[Place]) -> list[memoryview]:
        """The bytes at each (offset, bytes) of an object, shorter where it ends."""
        starts, ends = [a for a, _ in places], [a + n for a, n in places]
        parts = self.ask(key, lambda: self.obstore.get_ranges(self.store, key, starts=starts, ends=ends))
        return [memoryview(part) for part in parts]

    def get(self, key: str, place: Place | None = None) -> tuple[bytes, About]:
        """An object, or the bytes at a place of it, shorter where it ends; and what it is at that moment."""
        options = {} if place is None else {"options": {"range": (place[0], sum(place))}}

        def got() -> tuple[bytes, About]:
            answer = self.obstore.get(self.store, key, **options)
            return bytes(answer.bytes()), about(answer.meta)

        return self.ask(key, got)

    def about(self, key: str) -> About:
        """What an object is now. FileNotFoundError."""
        return self.ask(key, lambda: about(self.obstore.head(self.store, key)))

    def below(self, folder: str) -> list[tuple[str, About]]:
        """Every object below a folder, with its name in the bucket."""
        return self.ask(folder, lambda: [(o["path"], about(o)) for page in self.obstore.list(self.store, folder) for o in page
                                         if o["path"] != folder])  # fmt: skip

    def size(self, key: str) -> int:
        """Bytes of an object."""
        for folder, sizes in list(self._listings.items()):
            if not folder or key.startswith(f"{folder}/"):  # "": a cache at the bucket's root
                if key not in sizes:
                    raise self.missing(key)
                return sizes[key]
        return int(self.ask(key, lambda: self.obstore.head(self.store, key))["size"])

    def refresh(self, folder: str) -> None:
        """List every object below `folder` with its size, as of now."""

        def listed() -> dict[str, int]:
            return {o["path"]: o["size"] for page in self.obstore.list(self.store, folder) for o in page}

        self._listings[folder] = self.ask(folder, listed)

    def forget(self, key: str) -> None:
        """Leave no listing in memory that tells of an object, as it is about to be written."""
        for folder in [folder for folder in list(self._listings) if not folder or f"{key}/".startswith(f"{folder}/")]:
            self._listings.pop(folder, None)

    def ask(self, key: str, what: Callable[[], Answer]) -> Answer:
        """What the store answers. FileNotFoundError, OSError for bytes that the object does not have, or Unreachable."""
        where = f"{self.root}/{key}".rstrip("/")
        try:
            return what()
        except FileNotFoundError:
            raise self.missing(key) from None
        except (self.obstore.exceptions.BaseError, OSError) as error:
            said = cause(error)
            if "status code: 416" not in said:
                raise Unreachable(f"{where}: cannot be read: {said}; {advice(said)}") from None
        except (ValueError, OverflowError) as error:
            raise OSError(errno.EINVAL, str(error), where) from None
        except BaseException as error:  # obstore panics where one of two joined ranges begins behind the end
            if not str(error).startswith("range start"):
                raise
        raise OSError(errno.EIO, "the object is shorter than it was", where)

    def missing(self, key: str) -> FileNotFoundError:
        """The error for an object that is not there."""
        return FileNotFoundError(errno.ENOENT, "no such object", f"{self.root}/{key}")


def about(meta: Any) -> About:
    """Size and version of an object, by its ETag (which some stores quote in one answer and not in another), else by its time."""
    told = (meta["e_tag"] or "").strip('"') or str(meta["last_modified"])
    return About(meta["size"], int.from_bytes(hashlib.sha256(told.encode()).digest()[:6]))


@functools.lru_cache
def bucket_of(root: str) -> Bucket:
    """The bucket at `scheme://bucket`, one per process."""
    return Bucket(root)


def cause(error: Exception) -> str:
    """The first line of an error and the store's own word for it, without queries and without the values of secret environment variables."""
    line = str(error).partition("\n")[0] or type(error).__name__
    if code := re.search(r"<Code>(\w+)</Code>", str(error)):  # of an answer in XML, which may have lines
        line = f"{line.partition('<?xml')[0].rstrip(': ')}: {code[1]}"
    for name, value in os.environ.items():
        if SECRET.search(name.upper()) and len(value) >= 4:
            for form in {value, urllib.parse.quote(value, safe="")}:
                line = line.replace(form, "***")
    return re.sub(r"(https?://)[^/\s]*@", r"\1", re.sub(r"\?[^\s\"')]*", "?...", line))


def advice(said: str) -> str:
    """What to do about an error."""
    if found := no_credentials(said):
        return found
    if re.search(r"status code: 40[13]", said):
        return "the credentials in the environment may not read this; correct them, then run the same command again"
    if re.search(r"\b40[13] Client Error|GatedRepo", said):
        return "set HF_TOKEN, or run `hf auth login`, as one who may read this, then run the same command again"
    if "status code: 404" in said:
        return "is the URL right? correct it"
    if "invalid path" in said:
        return "names of objects without empty parts, . and .. were expected; rename it, or give a prefix that it is not below"
    return "check the network, the endpoint and the URL, then run the same command again, or copy it to a local folder"


def no_credentials(said: str) -> str:
    """What to do where an error comes of a lack of credentials; empty where it does not."""
    if not MACHINE_ROLES.search(said):
        return ""
    todo = next(todo for store, todo in CREDENTIALS.items() if store in said)
    return f"there are no credentials in the environment; {todo}, then run the same command again"


def plain_http_endpoint(root: str) -> bool:
    """Whether the environment may name an endpoint without encryption, such as a server on this machine, for the bucket at `root`.

    Google's endpoint may stand in the file of a service account; without one the client's own is https.
    """
    return root.startswith("gs:") or any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)


class RemoteFile:
    """An open object: what was announced with `expect` is read at once, in few requests."""

    def __init__(self, path: Url) -> None:
        self.path = path
        self._read: dict[Place, memoryview] = {}

    def size(self) -> int:
        return self.path.bucket.size(self.path.key)

    def expect(self, places: Sequence[Place]) -> None:
        """Fetch these (offset, bytes) now, neighbours in one request; `read` and `read_into` then take them from memory."""
        self._read = dict(zip(places, self.path.bucket.ranges(self.path.key, places)))

    def read(self, n_bytes: int, offset: int) -> bytes:
        """n_bytes at offset, fewer where the object ends."""
        if (offset, n_bytes) not in self._read:
            self.expect([(offset, n_bytes)])
        return bytes(self._read[offset, n_bytes])

    def read_into(self, buffers: Sequence[Any], offset: int, n_bytes: int) -> int:
        """Fill the buffers, n_bytes in all, from offset; how many bytes there were."""
        flat = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        data, at = np.frombuffer(self.read(n_bytes, offset), np.uint8), 0
        for buffer in flat:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(buffer)
        return len(data)


def file_pieces(path: Path, at_once: int = 1 << 24) -> Iterator[bytes]:
    """The content of a local file or of an object, in order."""
    if not isinstance(path, Url):
        with open(path, "rb") as file:
            while piece := file.read(at_once):
                yield piece
        return
    size = size_of(path)
    for offset in range(0, size, at_once):
        yield bytes(path.bucket.ranges(path.key, [(offset, min(at_once, size - offset))])[0])
