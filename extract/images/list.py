"""Where the images are: folders, tars and lists become one list of (key, label), read as encoded bytes from any thread.

Nothing is decoded and nothing is extracted to disk here: a tar is indexed once, then its members are read by offset.
"""

import errno
import fnmatch
import functools
import os
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple, NoReturn, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from braceexpand import braceexpand

from mrmae.common.backend import About, Url, locate
from mrmae.common.progress import counted
from mrmae.extract.images.names import FRAMES, SUFFIXES, LeftOut, checked_key, is_image, parent_label, visible
from mrmae.extract.images.objects import is_url, objects_below, objects_named, read_object, read_tars
from mrmae.extract.images.patience import FACTS, Unreadable, patiently
from mrmae.extract.images.tar_images import KeptIndices, TarImages, images_of_tar, stamp_of
from mrmae.extract.images.tars import is_tar, read_headers, read_range
from mrmae.shards.format import ROWS_AT_ONCE, Numbers, SourceTable, Values, nulls, signed_hashes

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class SourceImage(NamedTuple):
    """One image. key: path below the root (or the tar member's name), POSIX separators, with extension."""

    key: str
    label: str | None
    size_bytes: int | None


class ImagePlace(NamedTuple):
    """Where an image's bytes are: a whole file or object (offset None), or a part of a tar.

    mtime_ns: of the file or the tar, when it was listed; at a URL the version of the object.
    """

    path: str
    offset: int | None
    mtime_ns: int | None = None


ListedImage = tuple[SourceImage, ImagePlace]
UNKNOWN = -(2**63)  # a size, time or offset that there is none of
PLACES = ("bytes", "version", "offset", "root")  # numbers of a listed image; version: a file's time
AS_LISTED = pa.schema([("key", pa.large_string()), ("label", pa.large_string()), ("hash", pa.int64()), *((name, pa.int64()) for name in PLACES)])  # fmt: skip
ROWS_TOGETHER = 1 << 20
LARGE = pa.system_memory_pool()  # gives large columns back at once, which Arrow's own keeps for a while


class Listed:
    """Images as they are found, gathered into columns: a million objects take a gigabyte.

    n, sample: how many there were, and one's key, before --include chose.
    """

    def __init__(self, include: Sequence[str] = ()) -> None:
        self.include, self.n, self.sample = include, 0, ""
        self.rows: list[tuple[Any, ...]] = []  # not in the columns yet: key, label, and the four PLACES
        self.parts: list[pa.RecordBatch] = []  # as AS_LISTED
        self.few: list[pa.RecordBatch] = []  # not joined yet: each may hold the whole file that it was read of
        self.n_few = 0
        self.roots: dict[str, int] = {}

    def add(self, image: SourceImage, place: ImagePlace) -> None:
        """One more. Of a whole file the path without its key is kept."""
        self.n, self.sample = self.n + 1, self.sample or image.key
        if not matches(image.key, self.include):
            return
        root = self.root(place.path if place.offset is not None else place.path.removesuffix(image.key))
        places = (UNKNOWN if value is None else value for value in (image.size_bytes, place.mtime_ns, place.offset))
        self.rows.append((image.key, image.label, *places, root))
        if len(self.rows) == ROWS_AT_ONCE:
            self.gather()

    def add_tar(self, path: str, version: int, rows: pa.RecordBatch) -> None:
        """Those of a tar. version: its time, or that of an object."""
        self.gather()
        self.n, self.sample = self.n + len(rows), self.sample or next(iter(rows["key"][:1].to_pylist()), "")
        if self.include:
            rows = rows.filter(pa.array([matches(key, self.include) for key in rows["key"].to_pylist()], pa.bool_()))
        if len(rows):
            versions, roots = (np.full(len(rows), value, np.int64) for value in (version, self.root(path)))
            self.keep([rows["key"], rows["label"], rows["hash"], rows["bytes"], versions, rows["offset"], roots])

    def root(self, path: str) -> int:
        return self.roots.setdefault(path, len(self.roots))

    def gather(self) -> None:
        """Make columns of the rows."""
        if self.rows:
            keys, labels, *places = zip(*self.rows)
            self.rows = []
            self.keep([keys, labels, signed_hashes(keys), *places])

    def keep(self, columns: Sequence[Any]) -> None:
        """Keep columns as AS_LISTED has them; those of several tars are joined, so that nothing else of what was read of them stays."""
        self.few.append(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, AS_LISTED)], AS_LISTED))
        self.n_few += len(self.few[-1])
        if self.n_few >= ROWS_TOGETHER:
            self.join()

    def join(self) -> None:
        self.parts += pa.Table.from_batches(self.few, AS_LISTED).combine_chunks(memory_pool=LARGE).to_batches()
        self.few, self.n_few = [], 0

    def columns(self) -> tuple[dict[str, Values], Numbers, list[str]]:
        """Keys, labels and hashes, numbers [images, 4], all in canonical order, and the roots. ValueError where a key occurs twice.

        One column after the other is put in order, so that one at a time is in memory twice.
        """
        self.gather()
        self.join()
        unordered = dict(zip(AS_LISTED.names, pa.Table.from_batches(self.parts, AS_LISTED).columns))
        self.parts = []
        hashes = unordered.pop("hash").to_numpy()
        order = np.argsort(hashes.view(np.uint64))  # in a third of a stable sort's time; what is equal is ordered below
        hashes, found = hashes[order], {}
        if len(same := np.flatnonzero(hashes[1:] == hashes[:-1])):
            same = np.union1d(same, same + 1)
            rows = pa.array(order[same])
            equal = pa.table({"hash": hashes.view(np.uint64)[same], "key": unordered["key"].take(rows), "row": rows})
            equal = equal.sort_by([(name, "ascending") for name in equal.column_names])
            keys, order[same] = equal["key"], equal["row"].to_numpy()
            if len(twice := np.flatnonzero(pc.equal(keys[1:], keys[:-1]).to_numpy())):
                at, key = int(twice[0]), keys[int(twice[0])].as_py()
                refuse_twice(key, *(self.path(key, unordered, row) for row in equal["row"][at : at + 2].to_pylist()))
        for name in ("key", "label"):
            joined = pa.concat_arrays(unordered.pop(name).chunks, memory_pool=LARGE)
            found[name] = pc.take(joined, pa.array(order), memory_pool=LARGE)
            del joined
        numbers = np.empty((len(order), len(PLACES)), np.int64)
        for i, name in enumerate(PLACES):
            numbers[:, i] = unordered.pop(name).to_numpy()[order]
        found["hash"] = pa.array(hashes)
        return {name: Values(array, name) for name, array in found.items()}, numbers, list(self.roots)

    def path(self, key: str, columns: Mapping[str, pa.ChunkedArray], row: int) -> str:
        """Where an image lies: its file, or its tar."""
        root: str = list(self.roots)[columns["root"][row].as_py()]
        return root if columns["offset"][row].as_py() != UNKNOWN else root + key


def refuse_twice(key: str, one: str, other: str) -> NoReturn:
    """ValueError for two images that have one key."""
    raise ValueError(f"{key!r}: two images have this key, in {one} and {other}; keys must be unique "
                     "(a key is the path below the root); give one common parent folder, or rename")  # fmt: skip


class Sources:
    """The listed images, in canonical order. `read(i)` gives the encoded bytes of image i and may be called from any thread.

    keys, labels, hashes (of the keys, signed): of every image. notes: what a person should hear about the listing.
    """

    def __init__(
        self, columns: Mapping[str, Values], numbers: Numbers, roots: Sequence[str], notes: Sequence[str] = ()
    ) -> None:
        self.keys, self.labels, self.notes, self._columns = columns["key"], columns["label"], tuple(notes), columns
        self.hashes: Numbers = columns["hash"].numpy()
        self._numbers, self._roots = numbers, roots

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> SourceImage:
        size_bytes = int(self._numbers[i, 0])
        return SourceImage(self.keys[i], self.labels[i], None if size_bytes == UNKNOWN else size_bytes)

    def __iter__(self) -> Iterator[SourceImage]:
        for key, label, size in zip(self.keys, self.labels, self._numbers[:, 0]):
            yield SourceImage(key, label, None if size == UNKNOWN else int(size))

    def stamps(self, at: Numbers) -> Numbers:
        """Size, time of the last change and offset (-1: a whole file) of these images when they were listed, [n, 3]; of one that could
        not be looked at, size and time are UNKNOWN. As long as they stay, so do its bytes."""
        stamps = self._numbers[at, :3]
        stamps[stamps[:, 2] == UNKNOWN, 2] = -1
        return stamps

    @functools.cached_property
    def rows(self) -> SourceTable:
        """The images as a plan begins with them: unread, and empty where their size is not known."""
        sizes = self._numbers[:, 0]
        columns = {"key": self.keys, "label": self.labels, "bytes": Values(pa.array(np.where(sizes == UNKNOWN, 0, sizes)), "bytes"),
                   "sha256": Values(nulls(len(self), pa.binary(32)), "sha256")}  # fmt: skip
        return SourceTable(columns, self._columns["hash"])

    def places(self, keys: pa.Array) -> Numbers:
        """Where these keys are among the images, -1 where they are not."""
        if keys.equals(self.keys.array):
            return np.arange(len(self))
        wanted = signed_hashes(Values(keys, "key")).view(np.uint64)
        at = np.minimum(np.searchsorted(self.hashes.view(np.uint64), wanted), len(self) - 1)
        same = pc.equal(self.keys.array.take(pa.array(at)), keys).to_numpy(zero_copy_only=False)
        return np.where(same, at, -1)

    def first(self, n: int) -> "Sources":
        """The first `n` images in canonical order, a random sample; all of them where n is 0 or there are no more."""
        if not 0 < n < len(self):
            return self
        note = f"{n:,} of {len(self):,} images are taken (--limit): the first in canonical order, a random sample"
        at = pa.array(np.arange(n))  # copies: the others need not stay in memory
        columns = {name: Values(values.array.take(at), name) for name, values in self._columns.items()}
        return Sources(columns, self._numbers[:n].copy(), self._roots, [*self.notes, note])

    def place(self, i: int) -> ImagePlace:
        """Where image i lies."""
        _, mtime_ns, offset, root = self._numbers[i].tolist()
        path = self._roots[root] + self.keys[i] * (offset == UNKNOWN)
        return ImagePlace(path, None if offset == UNKNOWN else offset, None if mtime_ns == UNKNOWN else mtime_ns)

    def where(self, i: int) -> str:
        """A person's name for the place of image i: its file, or its tar and member."""
        place = self.place(i)
        return place.path if place.offset is None else f"{place.path}: {self.keys[i]}"

    @functools.cached_property
    def far(self) -> bool:
        """Whether some are at URLs: who reads these waits most of the time."""
        return any(map(is_url, self._roots))

    def read(self, i: int) -> bytes:
        """Encoded bytes of image i. OSError where the file is gone, no regular file any more or shorter than when it was listed.

        Of an object also where it has changed; Unreachable where its store does not answer.
        """
        place, size_bytes = self.place(i), int(self._numbers[i, 0])
        if is_url(place.path):
            return read_object(place.path, About(size_bytes, place.mtime_ns or 0), place.offset)
        # A descriptor per read: no shared file position, no limit on the number of tars, and the object can be pickled.
        with open(place.path, "rb", buffering=0, opener=open_regular) as file:
            if place.offset is None:
                return file.readall()
            if os.fstat(file.fileno()).st_mtime_ns != place.mtime_ns:  # other bytes may lie at the offset
                raise OSError(errno.EIO, "the tar has changed since it was listed", place.path)
            return read_range(file.fileno(), place.offset, size_bytes, where=self.where(i))


def read_image(sources: Sources, i: int) -> bytes:
    """Encoded bytes of image i, read again where the disk or the network stumbled. Raises as `patiently`."""
    return patiently(lambda: sources.read(i), lambda: sources.where(i))


def list_sources(
    images: Sequence[str | os.PathLike[str]], include: Sequence[str] = (), suffixes: tuple[str, ...] = SUFFIXES,
    kept: KeptIndices | None = None,
) -> Sources:  # fmt: skip
    """Every image of the given folders, tars, brace patterns, lists and URLs, in canonical order.

    images: a folder (searched recursively), a `.tar` (plain or webdataset: the label of `a.b.jpg` is in
    `a.b.cls`, else in `a.cls`), a pattern such as `train-{000..009}.tar`, a text file with one path or one URL per line
    (paths relative to the text file), or the URL of a prefix, a `.tar` or a pattern.
    include: shell patterns on the whole key; `*` also crosses `/`, so `train/*` is the whole subtree. Any may match.
    suffixes: what images are called.
    kept: the memory of tars; None: there is none, and of tars at URLs only headers are read.
    The label is the parent folder's name, None directly below the root. Hidden files, `__MACOSX` and, in folders and
    tars, files without an image suffix are passed over, and so is what is no regular file, whatever its name.
    Raises ValueError for a missing path, no images, two images with one key, and tars that are compressed or damaged;
    OSError or Unreachable for what cannot be read.
    """
    kept = kept or KeptIndices(headers_only=True)
    left_out, listed = LeftOut(), Listed(include)
    list_all(expand(images), listed, left_out, suffixes, kept)
    if not listed.n:
        there = "".join(f"\n  {note}" for note in left_out.notes())
        raise ValueError(
            f"{joined(images)}: no images found; expected files ending in {' '.join(suffixes)}; check the path{there}"
        )
    if not listed.roots:
        raise ValueError(
            f"--include {' '.join(include)}: matches none of the {counted(listed.n, 'image')}; "
            f"keys look like {listed.sample!r}; correct the pattern"
        )
    columns, numbers, roots = listed.columns()
    frames = notes_on_frames(columns["key"]) if suffixes == SUFFIXES else []  # where bands are kept, pages are bands
    return Sources(columns, numbers, roots, [*left_out.notes(), *frames, *kept.notes()])


def expand(images: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths and URLs themselves, brace patterns expanded. An existing path is never taken for a pattern."""
    paths: list[Path] = []
    for image in images:
        text = os.fspath(image)
        paths += [Path(text)] if os.path.exists(text) else [locate(p, "IMAGES") for p in braceexpand(text)]
    for path in paths:
        if not isinstance(path, Url) and not path.exists():
            raise ValueError(f"{path}: does not exist; expected a folder, a .tar or a text file of paths; check IMAGES")
    return paths


def list_all(
    paths: Sequence[Path], listed: Listed, left_out: LeftOut, suffixes: tuple[str, ...], kept: KeptIndices
) -> None:
    """Gather the images of all paths; tars at URLs are read side by side."""
    tars = read_tars([path for path in paths if is_far_tar(path)], kept, suffixes)
    for path in paths:
        if is_far_tar(path):
            add_tar(path, tars[path][0].version, tars[path][1], listed, left_out)
        elif not isinstance(path, Url) and path.is_file() and holds_tar(path):
            add_tar(path, *read_tar(path, suffixes, kept), listed, left_out)
        else:
            for image, place in list_one(path, left_out, suffixes):
                listed.add(image, place)


def add_tar(path: PurePath, version: int, found: TarImages, listed: Listed, left_out: LeftOut) -> None:
    listed.add_tar(str(path), version, found.rows)
    left_out.add(found.left_out)


def is_far_tar(path: PurePath) -> TypeGuard[Url]:
    return isinstance(path, Url) and path.suffix.lower() == ".tar"


def list_one(root: Path, left_out: LeftOut, suffixes: tuple[str, ...]) -> Iterable[ListedImage]:
    if isinstance(root, Url):
        return list_prefix(root, left_out, suffixes)
    if root.is_dir():
        return walk(root, left_out, suffixes)
    if kind := special_kind(root.stat().st_mode):
        raise ValueError(f"{root}: is {kind}; expected a folder, a .tar or a text file of paths; check IMAGES")
    return read_list(root)


def holds_tar(path: Path) -> bool:
    """Whether a file is a tar. ValueError for a compressed one."""
    with open(path, "rb") as file:
        head = file.read(8)
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: is compressed with {name}; images are read by offset; unpack it to a plain .tar")
    return bool(head) and is_tar(path)


def matches(key: str, include: Sequence[str]) -> bool:
    return not include or any(fnmatch.fnmatchcase(key, pattern) for pattern in include)


def special_kind(mode: int) -> str | None:
    """What a file is that is neither a regular file nor a folder, for a person; None for these two."""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device"}
    return kinds.get(stat.S_IFMT(mode))


def open_regular(path: str, flags: int) -> int:
    """A descriptor of a regular file, for `open(opener=)`; Unreadable for anything else, without waiting for a FIFO's writer."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    if kind := special_kind(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable(errno.EINVAL, f"is {kind} and was a regular file when it was listed", path)
    return descriptor


def notes_on_frames(keys: Values) -> list[str]:
    """That only first frames are taken, where there may be more."""
    ends, kinds = pc.value_counts(pc.utf8_slice_codeunits(keys.array, -max(map(len, FRAMES)))), Counter[str]()
    for end, n in zip(ends.field(0).to_pylist(), ends.field(1).to_pylist()):
        kinds[next((suffix for suffix in FRAMES if end.lower().endswith(suffix)), "")] += n
    several = [f"{kinds[suffix]} {suffix}" for suffix in FRAMES if kinds[suffix]]
    return [f"of files with several frames or pages the first is taken ({', '.join(several)})"] if several else []


# --- folders


def walk(root: Path, left_out: LeftOut, suffixes: tuple[str, ...]) -> Iterator[ListedImage]:
    """Images below `root`; other files are noted in `left_out`.

    Links to files and folders are followed, except into one of their own ancestors (a loop). A dangling link stays in
    the list: reading it fails, and the caller reports it like any unreadable image.
    """
    stack = [(str(root), "", frozenset([identity(os.stat(root))]))]
    while stack:
        folder, prefix, ancestors = stack.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                key = prefix + entry.name
                if not visible(entry.name):
                    continue
                if is_folder(entry):
                    inside = identity(entry.stat())
                    if inside not in ancestors:
                        stack.append((entry.path, key + "/", ancestors | {inside}))
                elif not is_image(entry.name, suffixes):
                    left_out.note_other(entry.name)
                elif (status := status_of(entry)) and (kind := special_kind(status.st_mode)):
                    left_out.special.append(f"{key} ({kind})")
                else:
                    if status is not None and not may_read(entry.path, status):
                        status = None
                    image = SourceImage(checked_key(key, root), parent_label(key), status.st_size if status else None)
                    yield image, ImagePlace(entry.path, None, status.st_mtime_ns if status else None)


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        if error.errno not in FACTS:
            raise
        return False


def may_read(path: str, status: os.stat_result) -> bool:
    """Whether this user may read a file; one that everybody may is not asked for."""
    return bool(status.st_mode & stat.S_IROTH) or os.access(path, os.R_OK)


def status_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What a link leads to, or the file itself; None for a link that leads nowhere or may not be followed."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in FACTS:
            raise
        return None


# --- prefixes


def list_prefix(root: Url, left_out: LeftOut, suffixes: tuple[str, ...]) -> Iterator[ListedImage]:
    """Images below a prefix, as `walk` finds them below a folder."""
    for url, about in objects_below(root):
        key = url.removeprefix(str(root)).lstrip("/")
        if not visible(key):
            continue
        if is_image(key, suffixes):
            yield far_image(key, url, about)
        else:
            left_out.note_other(PurePosixPath(key).name)


def far_image(key: str, url: str, about: About) -> ListedImage:
    return SourceImage(key, parent_label(key), about.size_bytes), ImagePlace(url, None, about.version)


# --- lists


def read_list(path: Path) -> Iterator[ListedImage]:
    """Images named in a text file. Keys are relative to the file's folder, or to the images' common folder outside it or at URLs."""
    try:
        lines = [line.strip("\r\n") for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}: is neither a folder, a tar nor a UTF-8 text file of paths; to use one image, give its folder "
            "and --include"
        ) from None
    if any("://" in line for line in lines):
        for name, url, about in objects_named(path, [line for line in lines if line.strip()]):
            yield far_image(name, url, about)
        return
    base = os.path.abspath(path.parent)
    files = [os.path.normpath(os.path.join(base, line)) for line in lines if line.strip()]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        what = "are no regular files" if os.path.exists(missing[0]) else "do not exist"
        raise ValueError(
            f"{path}: {len(missing)} of {len(files)} listed files {what}, first {missing[0]}; "
            f"paths are relative to {base}; correct the list"
        )
    if not all(file.startswith(base + os.sep) for file in files):
        base = os.path.commonpath([os.path.dirname(file) for file in files])
    for file in files:
        key = checked_key(os.path.relpath(file, base).replace(os.sep, "/"), path)
        status = os.stat(file)
        size_bytes = status.st_size if may_read(file, status) else None
        yield SourceImage(key, parent_label(key), size_bytes), ImagePlace(file, None, status.st_mtime_ns)


# --- tars


def read_tar(path: Path, suffixes: tuple[str, ...], kept: KeptIndices) -> tuple[int, TarImages]:
    """Time and images of a plain or webdataset tar, without extracting: names are only keys, whatever they contain.

    ValueError where the tar is cut (also exactly between two members), or another tar is appended to it.
    """
    looked_ns, stamp = time.time_ns(), stamp_of(path)
    if (found := kept.recall(path, stamp, suffixes)) is None:
        members = read_headers(path)
        with open(path, "rb", buffering=0) as file:
            read = functools.partial(read_range, file.fileno(), where=str(path))
            found = images_of_tar(path, members, suffixes, read)
        kept.keep(path, stamp, suffixes, found, looked_ns)
    return stamp[1], found


def joined(images: Sequence[str | os.PathLike[str]]) -> str:
    return " ".join(os.fspath(image) for image in images) or "IMAGES"
