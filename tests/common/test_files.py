"""The write function: complete or absent, exclusive, and clear when the disk is full."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from mrmae.common import files as write
from mrmae.common.files import publish, publish_by, remove_leftovers


def test_a_published_file_has_its_size_and_hash(tmp_path: Path) -> None:
    chunks = [b"abc", np.arange(5, dtype="<u8"), memoryview(b"xyz")]
    whole = b"abc" + np.arange(5, dtype="<u8").tobytes() + b"xyz"
    out = publish(tmp_path / "new" / "folder" / "file", chunks)
    assert out.path.read_bytes() == whole
    assert (out.bytes, out.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert [file.name for file in out.path.parent.iterdir()] == ["file"]


def test_a_taken_name_is_refused_and_kept(tmp_path: Path) -> None:
    publish(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError, match="each shard has one writer"):
        publish(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1
    publish(tmp_path / "file", b"third", replace=True)
    assert (tmp_path / "file").read_bytes() == b"third" and len(list(tmp_path.iterdir())) == 1


def test_what_lies_in_the_way_is_to_be_moved_away(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file/x", "file/x/y"):
        with pytest.raises(
            NotADirectoryError, match="could not be written: Not a directory; .*a file lies .* move it away"
        ):
            publish(tmp_path / name, b"")
    with pytest.raises(OSError, match="folder: could not be written: Is a directory; .*a folder lies .* move it away"):
        publish(tmp_path / "folder", b"", replace=True)


def test_of_many_writers_exactly_one_wins(tmp_path: Path) -> None:
    won: list[int] = []

    def write(i: int) -> None:
        try:
            publish(tmp_path / "file", bytes([i]) * 100_000)
            won.append(i)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and (tmp_path / "file").read_bytes() == bytes(won) * 100_000


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("code,todo", [(errno.ENOSPC, "free some space"), (errno.EACCES, "permissions")])
def test_a_full_or_forbidden_disk_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool, code: int, todo: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    if replace:
        (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"file: could not be written: .*stays valid; .*{todo}") as caught:
        publish(tmp_path / "file", b"x" * 1000, replace=replace)
    assert caught.value.errno == code
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([b"before"] if replace else [])


def test_a_really_full_disk_is_reported() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC, "the errno that the injected fault imitates"


def test_renaming_takes_over_where_links_are_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(_: object, __: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    publish(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        publish(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / ".000001.tar.123-abcd.writing").write_bytes(b"half")
    (tmp_path / "views" / "000001.tar").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [file.name for file in (tmp_path / "views").iterdir()] == ["000001.tar"]


def test_a_file_filled_by_name_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "log"
    publish_by(path, lambda aside: aside.write_text("old"))

    def full(aside: Path) -> None:
        aside.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="log: could not be written: No space left.*free some space"):
        publish_by(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_turns_read_only_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses to remove, too: even the temporary file, even what is not there."""

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(write, "link_exclusively", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    for act in (lambda: write.publish(tmp_path / "a", b"x"), lambda: write.remove(tmp_path / "a")):
        with pytest.raises(
            OSError, match="a: could not be written: Read-only .*; everything committed so far stays valid"
        ):
            act()
