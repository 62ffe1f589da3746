"""Whole shards of a cache that is far away, kept on a disk of this machine: fetched once by all of its processes, verified, bounded.

FOLDER/<name>/ holds the files of one unit (a shard of a column or of the pixels, in one view) as they lie in the cache. The name is a
hash of what the manifest says of these files, so what lies there is of no other cache and of no older one. A unit is fetched into
a temporary folder, compared with size and sha256, then renamed: under its name it is whole. Who is used least recently goes first; a
file that is removed while somebody reads it stays until they close it, as everywhere under POSIX. docs/machines.md, "Object stores".

The table of samples of a cache at a URL is one more unit, named by its URL, size and version.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrmae.common.backend import Unreachable, Url, absolute, exists, file_pieces, locate, size_of
from mrmae.common.files import make_folder
from mrmae.common.progress import bytes_in, human_bytes
from mrmae.shards.claims import Claim, say_once, take
from mrmae.shards.commit import valid_record
from mrmae.shards.format import SAMPLES_FILE, Plan, Unit, Values, content_id, read_samples
from mrmae.shards.manifest import FileFields, Manifest, samples_digests
from mrmae.shards.store import Damaged, unit_files

UNIT_NAME = re.compile(r"[0-9a-f]{64}")
FETCHED = re.compile(r"\.([0-9a-f]{64})\.[0-9a-f-]+\.writing")  # while it is fetched, and what a killed process left
LOCK = re.compile(r"\.[0-9a-f]{64}\.lock")
REMOVED = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f-]+\.gone")
PATIENCE_SECONDS = 900.0  # for another process that fetches the same unit; then it is read where it is
ROOM_SECONDS = 60.0  # for others that make room
PAUSE_SECONDS = 600.0  # nothing is fetched after the disk refused
GLANCE_SECONDS, TOUCH_SECONDS = 0.02, 1.0  # between two looks at a lock; between two notes that a unit is used
TABLE: Unit = (-1, SAMPLES_FILE, -1)  # stands for the table of samples among units
FETCHERS, AHEAD = 8, 2  # units at a time: that a batch waits for, and in the background


@dataclass(frozen=True)
class NearFolder:
    """Where shards are kept near, and how many bytes of them at most. Several runs, of several caches, may share it."""

    folder: Path
    most_bytes: int


@dataclass(frozen=True)
class Promised:
    """What is known of a unit before it is fetched: its folder's name, its bytes, its files by their place in the cache."""

    name: str
    bytes: int
    files: dict[Path, FileFields]


class NotPromised(Exception):
    """What was fetched is not what the cache promises."""


class Ending(Exception):
    """The process ends: what runs in the background stops."""


class NearShards:
    """The units of one cache that lie near, or will. Thread-safe, also between processes; may be pickled.

    fetched, fetched_bytes: units fetched by this process so far, and their bytes.
    """

    def __init__(self, near: NearFolder, path: Path, plan: Plan, manifest: Manifest) -> None:
        self.near, self.path, self.plan, self.manifest = near, path, plan, manifest
        self.folder, self.fetched, self.fetched_bytes = near.folder, 0, 0
        self._promised: dict[Unit, Promised | None] = {}
        self._seen: dict[str, float] = {}  # when it was last known to be there
        self._sizes: dict[str, int] = {}  # of every unit in the folder, this cache's or not
        self._unfit: set[str] = set()  # the store has something else, or nobody gets on with it
        self._paused_until = 0.0
        self._lock = threading.Lock()
        self._todo: deque[Unit] = deque()
        self._ahead = 0  # threads at work on it
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return NearShards, (self.near, self.path, self.plan, self.manifest)

    # --- what is wanted

    def promised(self, unit: Unit) -> Promised | None:
        """What the manifest, or the commit record of an unfinished cache, says of a unit; None where that is not all of its files.

        Where files lie follows from the plan; no name in a file is used as a path.
        """
        if unit not in self._promised:
            places = [file.relative_to(self.path) for file in unit_files(self.path, self.plan, *unit)]
            told = self.manifest.entry(self.plan, unit) or valid_record(self.path, self.plan, *unit) or {}
            files = told.get("files", {})
            whole = (
                set(files) == {place.as_posix() for place in places}
                and min(about["bytes"] for about in files.values()) >= 0
            )
            self._promised[unit] = Promised(
                content_id(files).removeprefix("sha256:"),
                sum(about["bytes"] for about in files.values()),
                {place: files[place.as_posix()] for place in places},
            ) if whole else None  # fmt: skip
        return self._promised[unit]

    def promise(self, unit: Unit, wanted: Promised) -> None:
        """Say what is known of a unit that the manifest does not tell of."""
        self._promised[unit] = wanted

    def window_bytes(self, columns: Collection[str], window: int) -> int:
        """Bytes of the largest so many shards in these columns and all views: what batches read at a time."""
        of_shards = [0] * len(self.plan.ranges)
        for view in range(self.plan.n_views):
            for column in columns:
                for shard in range(len(of_shards)):
                    about = self.promised((view, column, shard))
                    of_shards[shard] += about.bytes if about else 0
        return sum(sorted(of_shards)[-window:])

    # --- what lies there

    def copies(self, units: Collection[Unit]) -> None:
        """Have these units near, those that are not fetched side by side."""
        absent = [unit for unit in units if not self.is_near(unit)]
        if len(absent) < 2:
            return  # `copy` fetches it
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), ThreadPoolExecutor(FETCHERS, "near"))
        list(self._pool[1].map(self.copy, absent))

    def copy(self, unit: Unit, *, wait: bool = True) -> Path | None:
        """The folder that holds a unit's files as a cache does, once they are there; None where they are to be read from afar.

        wait: also for another process that fetches it. Unreachable where a URL does not answer.
        """
        if (wanted := self.promised(unit)) is None or wanted.name in self._unfit:
            return None
        if self.is_near(unit):
            return self.folder / wanted.name
        if wanted.bytes > self.near.most_bytes:
            what = SAMPLES_FILE if unit == TABLE else "a shard"
            self.say(f"{what} has {human_bytes(wanted.bytes)}, more than --local-cache-bytes {self.near.most_bytes}")
            return None
        if time.monotonic() < self._paused_until:
            return None
        try:
            return self.folder / wanted.name if self.fetch(wanted, unit, wait) else None
        except NotPromised as error:
            self._unfit.add(wanted.name)
            self.say(str(error))
        except OSError as error:  # of the near disk
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            self.say(f"cannot be written ({os.strerror(error.errno or 0)})")
        return None

    def is_near(self, unit: Unit) -> bool:
        """Whether a unit is there; then it counts as used now. What it holds is verified by who reads it, at the first look sizes are."""
        if (wanted := self.promised(unit)) is None:
            return False
        folder, now = self.folder / wanted.name, time.monotonic()
        seen = self._seen.get(wanted.name)
        if seen is not None and now - seen < TOUCH_SECONDS:
            return True
        try:
            os.utime(folder, ns=(time.time_ns(),) * 2)  # the kernel's own "now" is some milliseconds coarse
        except FileNotFoundError:
            self._seen.pop(wanted.name, None)
            return False
        except OSError:  # a disk that is read-only by now
            pass
        if seen is None and (why := wrong_sizes(folder, wanted)):
            self.discard(wanted, why)
            return False
        self._seen[wanted.name] = now
        return True

    def spoiled(self, unit: Unit, error: Damaged, inode: int) -> None:
        """Remove a copy that could not be read, unless it is gone or another one is there by now. inode: of the folder that was read."""
        wanted = self.promised(unit)
        assert wanted is not None, "it was there"
        self._seen.pop(wanted.name, None)
        with contextlib.suppress(OSError):
            if (self.folder / wanted.name).stat().st_ino == inode:
                self.discard(wanted, error.what)

    def discard(self, wanted: Promised, why: str) -> None:
        """Remove a damaged copy, aloud."""
        self._seen.pop(wanted.name, None)
        with contextlib.suppress(OSError), self.room() as ours:
            if ours:
                remove_unit(self.folder, wanted.name)
        say_once(f"local cache {self.folder / wanted.name}: damaged: {why}; fetched again")

    def say(self, why: str) -> None:
        """Once: that something is read from afar."""
        say_once(f"local cache {self.folder}: {why}; reading from {self.path}")

    # --- what is fetched

    def fetch(self, wanted: Promised, unit: Unit, wait: bool) -> bool:
        """Whether a unit is there now, fetched by this process or another. OSError of the near disk, NotPromised, Unreachable."""
        lock, end = self.folder / f".{wanted.name}.lock", time.monotonic() + PATIENCE_SECONDS
        while (claim := take(lock)) is None:  # it is gone with its holder, whoever was killed
            if not wait:
                return False
            if time.monotonic() > end:
                self._unfit.add(wanted.name)
                self.say("another process has fetched the same shard for very long")
                return False
            time.sleep(GLANCE_SECONDS)
            if self.is_near(unit):
                return True
        with claim:
            if self.is_near(unit):
                return True
            temporary = self.folder / f".{wanted.name}.{os.getpid()}-{secrets.token_hex(4)}.writing"
            try:
                if why := self.reserve(wanted, temporary):
                    self.say(why)
                    return False
                for place, about in wanted.files.items():
                    download(self.path / place, temporary / place, about)
                name_at_once(temporary, self.folder / wanted.name)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            with self._lock:
                self.fetched, self.fetched_bytes = self.fetched + 1, self.fetched_bytes + wanted.bytes
        return self.is_near(unit)

    def reserve(self, wanted: Promised, temporary: Path) -> str:
        """Why there is no room; empty where there is: then files of the right size lie in `temporary`, so that others count them."""
        with self.room() as ours:
            if not ours:
                self._paused_until = time.monotonic() + PAUSE_SECONDS
                return "another process has made room for very long"
            remove_remains(self.folder, held=wanted.name)
            kept, fetching = self.found()
            left = self.near.most_bytes - wanted.bytes - fetching - sum(n_bytes for _, _, n_bytes in kept)
            if left + sum(n_bytes for _, _, n_bytes in kept) < 0:
                return f"{human_bytes(self.near.most_bytes)} are too few for what is read at a time"
            for _, name, n_bytes in sorted(kept):
                if left >= 0:
                    break
                remove_unit(self.folder, name)
                left += n_bytes
            for place, about in wanted.files.items():
                (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                with open(temporary / place, "xb") as file:
                    file.truncate(about["bytes"])
        return ""

    def found(self) -> tuple[list[tuple[int, str, int]], int]:
        """(when last used, name, bytes) of every unit in the folder, and the bytes of those that are being fetched."""
        kept, fetching = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if UNIT_NAME.fullmatch(entry.name):
                    if entry.name not in self._sizes:
                        self._sizes[entry.name] = bytes_below(entry.path)
                    with contextlib.suppress(FileNotFoundError):
                        kept.append((entry.stat().st_mtime_ns, entry.name, self._sizes[entry.name]))
                elif FETCHED.fullmatch(entry.name):
                    fetching += bytes_below(entry.path)
        return kept, fetching

    @contextlib.contextmanager
    def room(self) -> Iterator[bool]:
        """Whether this process alone makes and takes room in the folder."""
        claim = room_lock(self.folder)
        try:
            yield claim is not None
        finally:
            if claim is not None:
                claim.release()

    # --- ahead of who reads

    def expect(self, units: Sequence[Unit]) -> None:
        """Fetch these in the background, in this order, instead of what was expected before; returns at once."""
        with self._lock:
            self._todo = deque(units)
            while self._todo and self._ahead < AHEAD:
                self._ahead += 1
                threading.Thread(target=self.fetch_ahead, name="ahead").start()

    def fetch_ahead(self) -> None:
        """Fetch what is expected, until there is no more, or the process ends."""
        while True:
            with self._lock:
                if not self._todo or not threading.main_thread().is_alive():
                    self._ahead -= 1
                    return
                unit = self._todo.popleft()
            with contextlib.suppress(Unreachable, Ending, ValueError):  # who needs it will say so
                self.copy(unit, wait=False)


def near_samples(near: NearFolder | None, path: Path, plan: Plan, manifest: Manifest) -> dict[str, Values]:
    """The table of samples; of a cache at a URL that of a copy, where one is or comes near, once its columns are known to be the manifest's.

    What the store says of the object stands for a sha256, which is told nowhere. manifest: empty where the cache is unfinished.
    """
    file = path / SAMPLES_FILE
    if near is None or not isinstance(file, Url) or not exists(file):
        return read_samples(path, plan.numbers)
    shards, about = NearShards(near, path, plan, manifest), file.bucket.about(file.key)
    name = content_id([str(file), *about]).removeprefix("sha256:")
    wanted = Promised(name, about.size_bytes, {Path(SAMPLES_FILE): {"bytes": about.size_bytes, "sha256": ""}})
    shards.promise(TABLE, wanted)
    if (folder := shards.copy(TABLE)) is not None:
        try:
            table = read_samples(path, plan.numbers, folder / SAMPLES_FILE)
            if not manifest or samples_digests(table) == manifest["samples"]:
                return table
            shards.discard(wanted, "its rows are not those of the manifest")
        except ValueError as error:
            shards.discard(wanted, str(error))
    return read_samples(path, plan.numbers)


def wrong_sizes(folder: Path, wanted: Promised) -> str:
    """Which file of a copy is not there, or not of its size; empty for none."""
    for place, about in wanted.files.items():
        try:
            if (size := size_of(folder / place)) != about["bytes"]:
                return f"{place.name} has {size} bytes, not {about['bytes']}"
        except OSError as error:
            return f"{place.name}: {error.strerror}"
    return ""


def name_at_once(temporary: Path, folder: Path) -> None:
    """Give a whole unit its name; where it is there already, as without locks it may be, nothing."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def download(source: Path, target: Path, about: FileFields) -> None:
    """Fill a file of the right size with what lies afar. NotPromised where that has another size or sha256 (if one is told); OSError of the near disk."""
    digest, n_bytes = hashlib.sha256(), 0
    with open(target, "r+b") as file:
        for piece in pieces_from_afar(source):
            if not threading.main_thread().is_alive():
                raise Ending
            digest.update(piece)
            n_bytes += file.write(piece)
    if n_bytes != about["bytes"] or about["sha256"] not in ("", digest.hexdigest()):
        raise NotPromised(f"{source}: its size and sha256 are not those that the cache promises; it is not kept")


def pieces_from_afar(source: Path) -> Iterator[bytes]:
    """The content of a file. NotPromised where it cannot be had; Unreachable."""
    try:
        yield from file_pieces(source)
    except OSError as error:
        raise NotPromised(f"{source}: cannot be fetched ({error.strerror or error})") from None


def room_lock(folder: Path) -> Claim | None:
    """The lock of who makes room; None where others hold it for too long."""
    end = time.monotonic() + ROOM_SECONDS
    while (claim := take(folder / ".room.lock")) is None:
        if time.monotonic() > end:
            return None
        time.sleep(GLANCE_SECONDS)
    return claim


def remove_unit(folder: Path, name: str) -> None:
    """Remove a unit: at once for who looks for it, then its bytes."""
    gone = folder / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.gone"
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder / name, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_remains(folder: Path, held: str = "") -> None:
    """Remove what killed processes left; who fetches holds the lock of that unit. held: the unit whose lock the caller holds."""
    for entry in sorted(folder.iterdir()):
        fetched = FETCHED.fullmatch(entry.name)
        if REMOVED.fullmatch(entry.name) or fetched and fetched[1] == held:
            shutil.rmtree(entry, ignore_errors=True)
        elif fetched and (claim := take(folder / f".{fetched[1]}.lock")) is not None:
            with claim:
                shutil.rmtree(entry, ignore_errors=True)
        elif LOCK.fullmatch(entry.name) and (claim := take(entry)) is not None:
            claim.release()  # with its file


def bytes_below(folder: str) -> int:
    """Bytes of all files below a folder; of what goes meanwhile none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def near_asked(folder: str | Path | None, most_bytes: str | int | None) -> NearFolder | None:
    """What --local-cache and --local-cache-bytes ask for; None where neither is given. ValueError for one of both, or no size."""
    if folder is None and most_bytes is None:
        return None
    if folder is None or most_bytes is None:
        raise ValueError(
            "--local-cache DIR and --local-cache-bytes N belong together; both or none were expected; give the other one"
        )
    try:
        return NearFolder(Path(folder), bytes_in(most_bytes))
    except ValueError as error:
        raise ValueError(f"--local-cache-bytes {error}") from None


def near_folder(near: NearFolder, path: Path) -> NearFolder:
    """The folder, made if it is not there, without what killed processes left. path: of the cache.

    Raises ValueError where it cannot be: written, a folder of this machine, or apart from the cache.
    """
    folder = locate(near.folder, "--local-cache")
    if isinstance(folder, Url):
        raise ValueError(f"--local-cache {folder}: is a URL; a folder on a disk of this machine was expected; give one")
    folder = absolute(folder)
    if not isinstance(path, Url) and (absolute(path) == folder or absolute(path) in folder.parents):
        raise ValueError(
            f"--local-cache {folder}: lies in the cache; a folder apart from it was expected, on a nearer disk; give one"
        )
    try:
        make_folder(folder)
        if (claim := room_lock(folder)) is not None:
            with claim:
                remove_remains(folder)
    except OSError as error:
        raise ValueError(f"--local-cache {folder}: cannot be written ({os.strerror(error.errno or 0)}); a folder on a disk of this machine "
                         "was expected; give one, or leave --local-cache out") from None  # fmt: skip
    return NearFolder(folder, near.most_bytes)
