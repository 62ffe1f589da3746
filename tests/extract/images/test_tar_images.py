"""A tar that has not changed is not read again; whatever else lies in the memory of it, the listing is that of the tar as it is."""

import io
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrmae.extract.images import list as listing
from mrmae.extract.images import tar_images
from mrmae.extract.images.list import Sources, list_sources
from mrmae.extract.images.names import BAND_SUFFIXES
from mrmae.extract.images.tar_images import KeptIndices
from mrmae.shards.format import signed_hashes
from mrmae.shards.plans import TARS

FILES = {"a/x.jpg": b"x" * 700, "a/x.cls": b"7", "b/y.gif": b"yy", "b/p.jpg": b"", "b/z.npy": b"z", "readme.txt": b"", "lost.cls": b"1"}  # fmt: skip


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar, written in place: its inode stays."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(content.getvalue())
    return path


def told(sources: Sources) -> tuple[Any, ...]:
    """All that a listing tells."""
    places = [sources.place(i) for i in range(len(sources))]
    return list(sources), places, sources.hashes.tolist(), sources.notes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tars whose headers were read. A tar may be remembered as soon as it is written."""
    names, real = list[str](), listing.read_headers
    monkeypatch.setattr(listing, "read_headers", lambda path: names.append(path.name) or real(path))
    monkeypatch.setattr(tar_images, "SETTLED_NS", -(10**12))
    return names


@pytest.fixture
def kept(tmp_path: Path) -> KeptIndices:
    return KeptIndices(near=tmp_path / "kept")


def test_an_unchanged_tar_is_read_once_and_listed_alike(tmp_path: Path, reads: list[str], kept: KeptIndices) -> None:
    tars = [write_tar(tmp_path / "0.tar", FILES), write_tar(tmp_path / "1.tar", {"é/1.jpg": b"1"})]
    plain = told(list_sources(tars))
    assert [told(list_sources(tars, kept=kept)) for _ in range(3)] == [plain] * 3
    assert reads == ["0.tar", "1.tar"] * 2, "without a memory, and once with"
    assert plain[2] == signed_hashes([image.key for image in plain[0]]).tolist() and len(plain[3]) == 3
    assert told(list_sources(tars, ["b/*"], kept=kept)) == told(list_sources(tars, ["b/*"]))
    assert sorted(list_sources(tars, (), BAND_SUFFIXES, kept).keys) == ["a/x.jpg", "b/p.jpg", "b/y.gif", "b/z.npy", "é/1.jpg"]  # fmt: skip
    with pytest.raises(ValueError, match=r"--include c/\*: matches none of the 4 images; keys look like 'a/x.jpg'"):
        list_sources(tars, ["c/*"], kept=kept)


def renamed(tar: Path) -> None:
    """Another key, of the same length, in the same place of the same file, its time set back."""
    status = tar.stat()
    with open(tar, "r+b") as file:
        file.write(tar.read_bytes().replace(b"a/x", b"c/x").replace(header_sum(b"a"), header_sum(b"c")))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (tar.stat().st_size, tar.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def header_sum(letter: bytes) -> bytes:
    info = tarfile.TarInfo(letter.decode() + "/x.jpg")
    info.size = 700
    return info.tobuf(tarfile.USTAR_FORMAT)[148:156]


def replaced(tar: Path) -> None:
    """Another file of the same size and time, moved to its name."""
    status, other = tar.stat(), tar.with_suffix(".new")
    other.write_bytes(tar.read_bytes())
    renamed(other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(tar)


def relabelled(tar: Path) -> None:
    write_tar(tar, FILES | {"a/x.cls": b"8"})


def grown(tar: Path) -> None:
    write_tar(tar, FILES | {"c/new.jpg": b"new"})


def shrunk(tar: Path) -> None:
    write_tar(tar, {"b/y.gif": b"yy"})


@pytest.mark.parametrize("change", [renamed, replaced, relabelled, grown, shrunk])
def test_a_tar_that_changed_is_read_again(
    tmp_path: Path, reads: list[str], kept: KeptIndices, change: Callable[[Path], None]
) -> None:
    tar = write_tar(tmp_path / "0.tar", {**FILES, "a/x.jpg": b"x" * 700})
    if change in (renamed, replaced):
        write_tar(tar, {"a/x.jpg": b"x" * 700, "b/y.gif": b"yy"})
    before = told(list_sources([tar], kept=kept))
    change(tar)
    now = told(list_sources([tar], kept=kept))
    assert reads == ["0.tar"] * 2 and now == told(list_sources([tar])) and now[0] != before[0]
    assert told(list_sources([tar], kept=kept)) == now and len(reads) == 3, "the new one is remembered"
    assert len(list((tmp_path / "kept").iterdir())) == 1, "and the old one is gone"


def test_a_tar_that_changed_a_moment_ago_is_not_remembered(
    tmp_path: Path, reads: list[str], kept: KeptIndices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within the same tick of the file system's clock."""
    tar = write_tar(tmp_path / "0.tar", FILES)
    monkeypatch.setattr(tar_images, "SETTLED_NS", 10**12)
    for _ in range(2):
        list_sources([tar], kept=kept)
    assert len(reads) == 2 and not (tmp_path / "kept").exists()


def test_the_moment_is_the_one_before_a_tar_is_read(
    tmp_path: Path, kept: KeptIndices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large tar takes longer than a file system's clock ticks; meanwhile it may have changed under the same time."""
    tar, passed, real, headers = write_tar(tmp_path / "0.tar", FILES), [0], time.time_ns, listing.read_headers
    monkeypatch.setattr(time, "time_ns", lambda: real() + sum(passed))
    monkeypatch.setattr(listing, "read_headers", lambda path: passed.append(10**11) or headers(path))
    list_sources([tar], kept=kept)
    assert not (tmp_path / "kept").exists()
    list_sources([tar], kept=kept)
    assert (tmp_path / "kept").exists(), "by now it is old"


def test_what_cannot_be_remembered_or_may_not_be_is_read(tmp_path: Path, reads: list[str]) -> None:
    """A cache of somebody else, a full disk, a dry run."""
    tar = write_tar(tmp_path / "0.tar", FILES)
    (tmp_path / "kept").write_text("a file where a folder is wanted")
    expected = told(list_sources([tar]))
    assert told(list_sources([tar], kept=KeptIndices(near=tmp_path / "kept")))[:3] == expected[:3]
    assert told(list_sources([tar], kept=KeptIndices(near=tmp_path / "dry", read_only=True))) == expected
    assert len(reads) == 3 and not (tmp_path / "dry").exists()


def test_a_memory_made_by_other_rules_is_not_taken(
    tmp_path: Path, reads: list[str], kept: KeptIndices, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(tmp_path / "0.tar", FILES)
    for rules in (1, 2, 2):
        monkeypatch.setattr(tar_images, "RULES", rules)
        list_sources([tar], kept=kept)
    assert len(reads) == 2


def lines_of(content: bytes) -> bytes:
    return b"\n%08x %s\n" % (0, content[:40])


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: b"", lambda content: content.replace(b"a/x", b"c/x"), lines_of,
    lambda content: b"%-16x" % 0, lambda content: b"f" * 4000,
])  # fmt: skip
def test_a_damaged_memory_is_said_and_made_anew(
    tmp_path: Path, reads: list[str], kept: KeptIndices, damage: Callable[[bytes], bytes]
) -> None:
    tar = write_tar(tmp_path / "0.tar", FILES)
    expected = told(list_sources([tar], kept=kept))
    (memory,) = (tmp_path / "kept").iterdir()
    whole = memory.read_bytes()
    memory.write_bytes(damage(whole))
    found = list_sources([tar], kept=kept)
    assert told(found)[:3] == expected[:3] and memory.read_bytes() == whole
    assert f"1 tar was read again: the memory of it is damaged, or none of this version: {tar}" in found.notes


def test_a_memory_of_other_columns_of_another_tar_or_a_pipe_is_not_taken(
    tmp_path: Path, reads: list[str], kept: KeptIndices
) -> None:
    tars = [write_tar(tmp_path / f"{i}.tar", {f"{i}.jpg": b"1"}) for i in range(2)]
    expected = told(list_sources(tars, kept=kept))
    first, second = sorted((tmp_path / "kept").iterdir())
    first.write_bytes(second.read_bytes())
    assert told(list_sources(tars, kept=kept)) == expected and len(reads) == 3
    about, found = tar_images.parsed_memory(second.read_bytes())
    second.write_bytes(tar_images.memory_bytes(about, found._replace(rows=found.rows.drop_columns(["hash"]))))
    assert told(list_sources(tars, kept=kept))[:3] == expected[:3] and len(reads) == 4
    second.unlink()
    os.mkfifo(second)
    assert told(list_sources(tars, kept=kept))[:3] == expected[:3] and second.is_file()


def test_a_repeated_extraction_reads_no_header_and_finds_what_changed(
    extract: Any, photo_folder: Path, tmp_path: Path, reads: list[str]
) -> None:
    images = sorted(photo_folder.rglob("*.png"))
    files = {image.relative_to(photo_folder).as_posix(): image.read_bytes() for image in images}
    tar, cache, said = write_tar(tmp_path / "i.tar", files), tmp_path / "c", list[str]()
    extract(tar, cache)
    manifest = (cache / "manifest.json").read_bytes()
    for commits in (False, True):
        if commits:
            (cache / "commits/0/pixels/000001.json").unlink()
            (cache / "manifest.json").unlink()
        extract(tar, cache)
    assert reads == ["i.tar"] and (cache / "manifest.json").read_bytes() == manifest
    assert len(list((cache / TARS).iterdir())) == 1
    write_tar(tar, {name: data for name, data in files.items() if name != "class 0/photo-000 é.png"})
    with pytest.raises(ValueError, match="1 gone, 0 new, 0 changed .gone is 'class 0/photo-000 é.png'"):
        extract(tar, cache)
    write_tar(tar, {**files, "class 1/new.png": files["class 0/photo-000 é.png"]})
    with pytest.raises(ValueError, match="0 gone, 1 new, 0 changed .new is 'class 1/new.png'"):
        extract(tar, cache)
    write_tar(tar, {**files, "class 0/photo-000 é.png": files["class 1/photo-001 é.png"] + b"0"})
    with pytest.raises(ValueError, match="0 gone, 0 new, 1 changed"):
        extract(tar, cache)
    write_tar(tar, {**files, "class 0/photo-000 é.cls": b"other"})
    with pytest.raises(
        ValueError, match="the label of 'class 0/photo-000 é.png' is 'class 0' there and 'other' in IMAGES"
    ):
        extract(tar, cache)
    write_tar(tar, files)
    extract(tar, cache, say=said.append)
    assert len(reads) == 6 and "complete before" in said[-1]
