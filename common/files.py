"""How every file of a cache, of a run and of a probe reaches the disk, or an object store.

A file appears under its name complete and durable, or not at all; two writers of one name never mix.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mrmae.common.backend import About, Url, file_pieces, files_below
from mrmae.common.leases import expect_held
from mrmae.common.uploads import SINGLE_BYTES, discard, expect_conditions, upload

Chunk = Any  # anything with a buffer: bytes, memoryview, numpy array
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL)
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EISDIR: "a folder lies where this file belongs: move it away",
    errno.ENOTDIR: "a file lies where a folder belongs: move it away",
}
TEMPORARY = ".*.writing"  # glob of what a killed writer leaves behind


@dataclasses.dataclass(frozen=True)
class Published:
    """A file as it was written: its path, size and sha256 (hex), and which file it is: device and inode, at a URL 0 and its version."""

    path: Path
    bytes: int
    sha256: str
    inode: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """What commit records and the manifest say of it."""
        return {"bytes": self.bytes, "sha256": self.sha256}


def is_still(file: Published) -> bool:
    """Whether what lies under the file's name is what was written, and not another writer's."""
    try:
        if isinstance(file.path, Url):
            return file.path.bucket.about(file.path.key) == About(file.bytes, file.inode[1])
        status = file.path.stat()
    except OSError:
        return False
    return (status.st_dev, status.st_ino, status.st_size) == (*file.inode, file.bytes)


def publish(path: Path, content: bytes | Iterable[Chunk], *, replace: bool = False) -> Published:
    """The file's size and sha256, once it lies complete and durable under `path`.

    Written to a temporary name in the same folder, fsynced, linked exclusively (renamed where the file system has no
    hard links), the folder fsynced. replace: take the place of an older file, atomically.
    Raises FileExistsError when `path` exists and `replace` is False; OSError, naming the path and what to do, when the
    disk is full or refuses. Nothing is left behind in either case. At a URL as `upload` does, while this process's claims hold.
    """
    if isinstance(path, Url):
        return publish_object(path, [content] if isinstance(content, bytes) else content, replace=replace)
    with put_in_place(path, replace=replace) as temporary:
        n_bytes, sha256 = write_durably(temporary, [content] if isinstance(content, bytes) else content)
        status = temporary.stat()
    return Published(path, n_bytes, sha256, (status.st_dev, status.st_ino))


def publish_object(path: Path, chunks: Iterable[Chunk], *, replace: bool) -> Published:
    """As `publish`, at a URL: what is larger than one request is gathered in a temporary file of this machine."""
    assert isinstance(path, Url)
    digest, n_bytes = hashlib.sha256(), 0
    with tempfile.SpooledTemporaryFile(max_size=SINGLE_BYTES) as spool:
        try:
            for chunk in chunks:
                digest.update(chunk)
                n_bytes += spool.write(chunk)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise  # of what is read
            raise type(error)(error.errno, f"{path}: its {n_bytes} bytes so far do not fit into {tempfile.gettempdir()}, where they "
                              "wait to be sent; free some space, or set TMPDIR, then run the same command again") from error  # fmt: skip
        there = upload(path, spool, n_bytes, digest.hexdigest(), lambda: expect_held(path), replace=replace)
    return Published(path, n_bytes, digest.hexdigest(), (0, there.version))


def publish_by(path: Path, write: Callable[[Path], object]) -> None:
    """As `publish` with replace, for what only knows how to write a file by its name: `write` fills the temporary one."""
    if isinstance(path, Url):
        with tempfile.TemporaryDirectory() as folder:
            write(aside := Path(folder, path.name))
            publish(path, file_pieces(aside), replace=True)
        return
    with put_in_place(path, replace=True) as temporary:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def put_in_place(path: Path, *, replace: bool) -> Iterator[Path]:
    """A temporary name in the folder of `path`; the file that lies there at the end is put in place, durably.

    Raises as `publish` does.
    """
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.writing"
    try:
        yield temporary
        if replace:
            os.replace(temporary, path)
        else:
            link_exclusively(temporary, path)
        sync_folder(path.parent)
    except FileExistsError:
        raise FileExistsError(f"{path}: this file exists already; each shard has one writer; "
                              "is the same command running twice?") from None  # fmt: skip
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # a disk that turned read-only refuses this, too; the first error says why
            temporary.unlink()


def write_durably(path: Path, chunks: Iterable[Chunk]) -> tuple[int, str]:
    """Bytes and sha256 of the new file, after fsync."""
    digest, n_bytes = hashlib.sha256(), 0
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb", buffering=1 << 20) as file:
        for chunk in chunks:
            digest.update(chunk)
            n_bytes += memoryview(chunk).nbytes
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return n_bytes, digest.hexdigest()


def link_exclusively(temporary: Path, path: Path) -> None:
    """Give the file its final name; FileExistsError when the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(path) from None
        os.rename(temporary, path)


def make_folder(path: Path) -> None:
    """Create the folder and its parents, durably. At a URL there are none: ValueError where its store knows no conditional writes."""
    if isinstance(path, Url):
        path.bucket.forget(path.key)
        return expect_conditions(path)
    if path.is_dir():
        return
    missing = [folder for folder in [path, *path.parents] if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)
    except FileExistsError:  # and no folder: no other writer's name, which is waited for
        raise explained(NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), path) from None
    except OSError as error:
        raise explained(error, path) from error


def users_folder() -> Path | None:
    """Where this user's machine remembers things: $XDG_CACHE_HOME/mrmae, by default below ~/.cache; None without a home, as in containers."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(told) if os.path.isabs(told) else Path.home() / ".cache") / "mrmae"
    except RuntimeError:
        return None


def sync_folder(path: Path) -> None:
    """Make the folder's entries durable; file systems that cannot fsync a folder are taken at their word."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path) -> OSError:
    """The same kind of error, saying which file could not be written and what to do."""
    what = error.strerror or str(error)
    todo = ADVICE.get(error.errno or 0, "check the disk, its space and its permissions")
    return type(error)(error.errno, f"{path}: could not be written: {what}; everything committed so far stays valid; "
                       f"{todo}, then run the same command again")  # fmt: skip


def remove(path: Path) -> None:
    """Remove a file of the cache, if it is there. OSError as in publish; a read-only disk refuses even what is not there."""
    if isinstance(path, Url):
        expect_held(path)
        return discard(path)
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise explained(error, path) from error


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers below `folder`; call it only when nobody is writing."""
    for path in files_below(folder) if isinstance(folder, Url) else folder.rglob(TEMPORARY):
        if path.match(TEMPORARY):
            remove(path)
