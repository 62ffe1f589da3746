"""A plain tar as an index of members: names, offsets and sizes. Nothing is ever extracted to disk."""

import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import IO, NamedTuple

TAR_BLOCK_BYTES = 512
LABEL_BYTES = 4096
ABSURD = (OverflowError, MemoryError)  # what tarfile raises of a header that tells an absurd size


class TarHeader(NamedTuple):
    """What is kept of a tar header (tarfile's own objects are ten times larger).

    special: what it is where that is no regular file. link: name of the member it leads to. text, sha256: of a label and of an
    image, where these were read together with the headers.
    """

    offset: int
    size_bytes: int
    special: str | None
    link: str | None
    text: str | None = None
    sha256: str | None = None


def is_tar(path: Path) -> bool:
    """Whether a file begins as a tar does, whatever its first header tells."""
    try:
        return tarfile.is_tarfile(path)
    except ABSURD:
        return True  # read_headers says what is wrong


def read_headers(path: Path) -> dict[str, TarHeader]:
    """Name -> member. ValueError where the tar is cut, also exactly between two members, or holds a name twice."""
    if plain := plain_headers(path):
        with open(path, "rb") as file:
            refuse_cut(file, plain[1], path)
        return plain[0]
    with open(path, "rb") as file:
        return any_headers(file, path.stat().st_size, path)


def any_headers(
    file: IO[bytes], n_bytes: int, path: PurePath, looked_at: Callable[[str, TarHeader], TarHeader] = lambda _, member: member
) -> dict[str, TarHeader]:  # fmt: skip
    """The same of any tar, wherever it is. looked_at: what is kept of a member, which may read `file` for that."""
    members: dict[str, TarHeader] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                name = info.name.removeprefix("./")
                if name in members and not info.isdir():
                    raise ValueError(f"{path}: holds {name!r} twice; keys must be unique; repack the tar")
                if tar.offset > n_bytes:
                    raise tarfile.ReadError(f"{name!r} reaches behind the end")
                member = TarHeader(info.offset_data, info.size, special_member(info), link_of(info))
                members[name] = looked_at(name, member)
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header: gigabytes for ImageNet
            refuse_cut(file, tar.offset, path)
    except (tarfile.TarError, *ABSURD) as error:
        raise ValueError(
            f"{path}: is not a whole tar ({str(error) or 'a header of absurd size'}); copy it again, or repack it"
        ) from None
    return members


def plain_headers(path: Path) -> tuple[dict[str, TarHeader], int] | None:
    """Name -> member and where the last one ends, of a tar of nothing but regular files with short names, each once; of any other None.

    A fourth of tarfile's time, which for ten million images is five minutes at every start.
    """
    members: dict[str, TarHeader] = {}
    with open(path, "rb", buffering=0) as file:
        descriptor, n_bytes, at = file.fileno(), os.fstat(file.fileno()).st_size, 0
        while len(block := os.pread(descriptor, TAR_BLOCK_BYTES, at)) == TAR_BLOCK_BYTES and block[0]:
            name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape").removeprefix("./")
            try:
                size, checksum = int(block[124:135], 8), int(block[148:154], 8)
            except ValueError:
                return None
            start = at + TAR_BLOCK_BYTES
            at = start + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
            regular = block[156] in b"0\0" and block[257:262] == b"ustar" and not block[345] and not name.endswith("/")
            total = checksum + sum(block[148:156]) - 8 * ord(" ")
            whole = size >= 0 and at <= n_bytes and zlib.adler32(block) & 0xFFFF == (1 + total) % 65521  # the sum, in C
            if not (regular and whole) or name in members:
                return None
            members[name] = TarHeader(start, size, None, None)
    return members, at


def special_member(info: tarfile.TarInfo) -> str | None:
    """What a member is, for a person, where it is no regular file."""
    if info.issparse():
        return "a sparse file"
    if info.isreg():
        return None
    return "a folder" if info.isdir() else "a FIFO" if info.isfifo() else "a device"


def link_of(info: tarfile.TarInfo) -> str | None:
    if info.islnk():
        return os.path.normpath(info.linkname)
    return os.path.normpath(os.path.join(os.path.dirname(info.name), info.linkname)) if info.issym() else None


def file_member(members: dict[str, TarHeader], name: str, path: PurePath) -> TarHeader:
    """The member that holds the bytes of `name` (links lead to another one)."""
    member: TarHeader | None = members[name]
    for _ in range(8):
        if member is None or member.link is None:
            break
        member = members.get(member.link)
    if member is None or member.link is not None:
        raise ValueError(f"{path}: {name!r} is a link that leads to no member of this tar; repack the tar")
    return member


def cls_names(members: dict[str, TarHeader], name: str) -> list[str]:
    """The `.cls` members of an image, the longest stem first: `a.b.jpg` may have `a.b.cls` or, as webdataset groups, `a.cls`."""
    dots = [i for i in range(name.rfind("/") + 1, len(name)) if name[i] == "."]
    stems = [name[:dot] for dot in reversed(dots)]
    return [stem + ".cls" for stem in stems if stem + ".cls" in members]


def cls_texts(
    members: dict[str, TarHeader], name: str, path: PurePath, read: Callable[[int, int], bytes]
) -> dict[str, str]:
    """Texts of the `.cls` members of an image, by their names, the longest first; empty ones are left out.

    read: the bytes at (offset, bytes) of the tar.
    """
    texts = {}
    for cls in cls_names(members, name):
        member = file_member(members, cls, path)
        if member.special:
            continue
        if member.size_bytes > LABEL_BYTES:
            raise ValueError(
                f"{path}: {cls!r} has {member.size_bytes} bytes; a label of at most {LABEL_BYTES} was expected; repack the tar"
            )
        if (text := member.text) is None:
            text = read(member.offset, member.size_bytes).decode("utf-8", "replace").strip()
        texts[cls] = text
    return {cls: text for cls, text in texts.items() if text}


def refuse_cut(file: IO[bytes], end_bytes: int, path: PurePath) -> None:
    """ValueError unless the last member, which ended at `end_bytes`, is followed by zero blocks and nothing else."""
    file.seek(end_bytes)
    block = file.read(TAR_BLOCK_BYTES)
    if len(block) < TAR_BLOCK_BYTES:
        raise ValueError(f"{path}: has no end mark, so it may be cut after a member; copy it again, or repack it")
    while block:
        if block.strip(b"\0"):
            raise ValueError(
                f"{path}: a damaged header or another tar follows the last member, near byte {end_bytes}; "
                "copy it again, or repack it as one tar"
            )
        block = file.read(1 << 20)


def read_range(descriptor: int, offset: int, size_bytes: int, *, where: str) -> bytes:
    """Exactly `size_bytes` bytes from `offset`; OSError naming `where` if the file ends before."""
    parts: list[bytes] = []
    while size_bytes:
        part = os.pread(descriptor, size_bytes, offset)
        if not part:
            raise OSError(
                f"{where}: the file ends {size_bytes} bytes early; it changed since it was listed; list again"
            )
        parts.append(part)
        offset, size_bytes = offset + len(part), size_bytes - len(part)
    return b"".join(parts)
