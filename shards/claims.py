"""Who is at work in a cache: locks of the file system, which end with the process that holds them. docs/format.md, "Several processes".

At a URL, where there are no locks, each is a lease (common/leases.py) that its holder renews, and a shared one is an object per holder.

The cache's own lock is shared by all who write shards, and held alone by who removes or replaces what the others go by. The
plan's is held by who hashes, plans, calibrates or finalises, a shard's by its one writer. In a folder no lease and no clock: the
kernel knows who lives. A lock file is removed by the last who holds it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import secrets
import socket
import sys
import time
from collections.abc import Container, Iterator
from pathlib import Path

from mrmae.common import leases
from mrmae.common.backend import Url, files_below, locate
from mrmae.common.files import explained, make_folder
from mrmae.common.leases import Lease, Seen, look_at, take_lease
from mrmae.common.uploads import discard

CACHE_LOCK, PLAN_LOCK = ".lock", ".planning.lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # the file system has none
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
MOST_WATCHED = 20  # of those who share a lock at a URL: hundreds of processes start at once
SHOWN = 200  # characters of what a lock file says
said: set[str] = set()  # what was said about file systems, once per process


@dataclasses.dataclass(frozen=True)
class Claim:
    """A lock that this process holds until `release`, from any thread; other threads that ask for it are refused, too.

    descriptor: of its opened file; at a URL the lease.
    """

    file: Path
    descriptor: int | Lease

    def release(self) -> None:
        """Give the lock back; its file goes with the last who holds it."""
        if isinstance(self.descriptor, Lease):
            return self.descriptor.release()
        with contextlib.suppress(OSError):  # others share it, or the disk turned read-only
            if locked(self.descriptor, fcntl.LOCK_EX) and is_at(self.file, self.descriptor):
                self.file.unlink()
        os.close(self.descriptor)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def shard_lock(path: Path, shard: int) -> Path:
    """The file whose lock the writer of a shard holds, for all views and columns."""
    return path / "commits" / f".{shard:06d}.lock"


def take(file: Path, *, shared: bool = False) -> Claim | None:
    """The lock of this file, which is made for it; None where someone else holds it.

    Where the file system knows no locks, everybody gets them, aloud. OSError where the file cannot be made. At a URL also None where it
    is not known yet whether a holder lives: ask again.
    """
    if isinstance(file, Url):
        return take_far(file, shared=shared)
    make_folder(file.parent)
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError(
                    f"{file}: is a link; expected the lock file of a command, or nothing; delete it"
                ) from None
            raise explained(error, file) from error
        try:
            if not locked(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                os.close(descriptor)
                return None
            if is_at(file, descriptor):
                with contextlib.suppress(OSError):  # a full disk: the lock is ours even so
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, who().encode(), 0)
                return Claim(file, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that the holder before has removed meanwhile


def take_far(file: Url, *, shared: bool) -> Claim | None:
    """The lock of this name at a URL. Who shares it makes an object of his own, and then looks whether someone holds it alone; who
    wants it alone takes it, and then looks who shares it. So one of two sees the other."""
    folder = file.parent.parent if file.parent.name == "commits" else file.parent
    if shared and living(file):
        return None
    path = shared_folder(file) / secrets.token_hex(8) if shared else file
    lease = take_lease(path, folder, who().strip())
    if lease is None:
        return None
    if living(file) if shared else file.name == CACHE_LOCK and living_shares(file):  # nobody shares the others
        lease.release()
        return None
    return Claim(locate(str(file)), lease)


def shared_folder(file: Url) -> Url:
    """Where those who share a lock at a URL have an object each."""
    return file.with_name(f"{file.name}.shared")


def living(path: Url) -> Seen | None:
    """Who holds the lease at `path`, unless it is known that he does not live."""
    seen = look_at(path)
    return None if seen is None or seen.dead else seen


def living_shares(file: Url, only: Container[str] | None = None) -> list[Seen]:
    """Who shares a lock at a URL, of these objects; what the dead have left there is removed."""
    found = []
    for path in far_objects(shared_folder(file)):
        if only is not None and str(path) not in only:
            continue
        if (seen := look_at(path)) is not None and seen.dead:
            discard(path)
        elif seen is not None:
            found.append(seen)
    return found


def far_objects(folder: Url) -> list[Url]:
    """The objects below a folder at a URL."""
    return [path for path in files_below(locate(str(folder))) if isinstance(path, Url)]


def locked(descriptor: int, kind: int) -> bool:
    """Whether the lock was had, without waiting; also where the file system has none."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        if error.errno not in NO_LOCKS:
            raise
        say_once(f"this file system has no locks ({error.strerror}): give every shard one writer, and change a cache only while "
                 "nobody else is at work on it")  # fmt: skip
    return True


def is_at(file: Path, descriptor: int) -> bool:
    """Whether the opened file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except OSError:
        return False


def held_by(file: Path) -> str | None:
    """Who holds the lock of this file, as they wrote it there; None where nobody does."""
    if isinstance(file, Url):
        return seen.holder if (seen := living(file)) else None
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:  # also where there are no locks: then the file says that someone had begun
        return holder_told(descriptor)
    finally:
        os.close(descriptor)


def holder_told(descriptor: int) -> str:
    """What the holder wrote into the lock file, fit to be printed."""
    text = os.pread(descriptor, SHOWN, 0).decode(errors="replace").partition("\n")[0]
    return "".join(c for c in text if c.isprintable()) or "another process"


def who() -> str:
    """This process, for those who wait for it."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"


def say_once(text: str) -> None:
    """Print to stderr what was not printed before."""
    if text not in said:
        said.add(text)
        print(text, file=sys.stderr, flush=True)


def at_work(path: Path) -> Claim:
    """A share of the cache, for who writes shards. ValueError, naming them, where someone changes it as a whole."""
    return whole(path, shared=True)


def alone(path: Path) -> Claim:
    """The cache for oneself, for who removes or replaces what others go by. ValueError where someone is at work on it."""
    return whole(path, shared=False)


def whole(path: Path, *, shared: bool) -> Claim:
    """The lock of the cache as a whole. ValueError where someone else has it."""
    claim = (
        patiently_taken(path / CACHE_LOCK, shared=shared)
        if isinstance(path, Url)
        else take(path / CACHE_LOCK, shared=shared)
    )
    if claim is None:
        raise ValueError(f"{path}: {last_at_work(path)} is at work on this cache; expected nobody; wait for its end, or stop it, "
                         "then run the same command again (nothing was changed)")  # fmt: skip
    return claim


def patiently_taken(file: Url, *, shared: bool) -> Claim | None:
    """The lock of this name at a URL, once it is known that those who had it do not live; None as soon as one is seen to."""
    for path in far_objects(shared_folder(file))[:MOST_WATCHED]:
        look_at(path)  # it is watched from now on: the dead can be told from the living when this process ends
    began = leases.clock()
    while (claim := take_far(file, shared=shared)) is None:
        others = [seen for seen in (living(file), *([] if shared else living_shares(file))) if seen]
        if any(seen.renewed for seen in others) or leases.clock() - began > 2 * leases.LEASE_SECONDS:
            return None
        if others:
            say_once(f"{file.parent}: {others[0].holder} was at work on this cache; waiting for up to {leases.LEASE_SECONDS:g} seconds, to see whether "
                     "it still is")  # fmt: skip
        leases.pause(min(1.0, leases.LEASE_SECONDS / 20))
    return claim


def last_at_work(path: Path) -> str:
    """Who took the cache's lock last, even a shared one."""
    if isinstance(path, Url):
        others = (living(path / CACHE_LOCK), *living_shares(path / CACHE_LOCK))
        return next((seen.holder for seen in others if seen), "another process")
    try:
        descriptor = os.open(path / CACHE_LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return "another process"
    try:
        return holder_told(descriptor)
    finally:
        os.close(descriptor)


def writers(path: Path) -> Iterator[str]:
    """Those who write a shard just now."""
    for file in shard_locks(path):
        if (holder := held_by(file)) is not None:
            yield holder


def shard_locks(path: Path) -> list[Path]:
    """The lock files of shards that are there."""
    if isinstance(path, Url):
        return [file for file in files_below(path / "commits") if file.match(".*.lock")]
    return sorted((path / "commits").glob(".*.lock"))


def remove_locks(path: Path) -> None:
    """Remove the lock files that killed writers of shards left; those that are held stay, and at a URL those not known to be dead yet."""
    if isinstance(path, Url):
        living_shares(path / CACHE_LOCK, only=leases.watched)
    for file in shard_locks(path):
        if (claim := take(file)) is not None:
            claim.release()
