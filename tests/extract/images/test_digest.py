"""Images are read once: a disk that stumbles changes nothing, and what size and time say is unchanged is not read again."""

import errno
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mrmae.extract import run
from mrmae.extract.images import patience
from mrmae.extract.images.digest import digest_images, note
from mrmae.extract.images.list import Sources, list_sources
from mrmae.shards.cache import open_cache
from mrmae.shards.format.spec import ViewRecipe

VIT, CNN = "vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random"
Reading = Callable[[Sources, int], bytes]


def photos(folder: Path, first: int, n: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(first, first + n):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image was read, by key."""
    counts: Counter[str] = Counter()
    real: Reading = Sources.read

    def read(sources: Sources, i: int) -> bytes:
        counts[sources[i].key] += 1
        return real(sources, i)

    monkeypatch.setattr(Sources, "read", read)
    monkeypatch.setattr(patience, "WAITS_SECONDS", (0.0, 0.0))
    return counts


def failing(monkeypatch: pytest.MonkeyPatch, key: str, code: int, times: int) -> None:
    """Reading this image fails with this error so many times."""
    real, left = Sources.read, [times]

    def read(sources: Sources, i: int) -> bytes:
        if sources[i].key == key and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), sources.where(i))
        return real(sources, i)

    monkeypatch.setattr(Sources, "read", read)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_one_read_error_is_not_an_empty_image(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    sources = list_sources([photos(tmp_path / "images", 0, 3)])
    expected = digest_images(sources, range(3), tmp_path / "a", workers=2)
    failing(monkeypatch, "001.png", code, 2)
    assert digest_images(sources, range(3), tmp_path / "b", workers=2) == expected and expected[1].bytes > 0


def test_an_error_that_stays_stops_hashing_and_keeps_what_was_hashed(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, memory = list_sources([photos(tmp_path / "images", 0, 6)]), tmp_path / ".digests"
    with monkeypatch.context() as patch:
        failing(patch, "003.png", errno.EIO, 99)
        with pytest.raises(
            OSError, match=r"003.png: could not be read, 3 times: Input/output error; .* same command again"
        ):
            digest_images(sources, range(6), memory, workers=1)
    before = Counter(reads)
    digest_images(sources, range(6), memory, workers=1)
    lines = [json.loads(line.partition(" ")[2]) for line in memory.read_text().splitlines() if line]
    assert reads["003.png"] == before["003.png"] + 1 and sum((reads - before).values()) < 6, "some were kept"
    assert sorted(line[0] for line in lines) == [f"{i:03d}.png" for i in range(6)]


def test_one_read_error_while_decoding_is_no_bad_image(
    extract: Any, tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photos(tmp_path / "images", 0, 4)
    with monkeypatch.context() as patch:
        patch.setattr(run, "calibrated", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(images, tmp_path / "c", VIT)
    failing(monkeypatch, "002.png", errno.EIO, 2)
    assert extract(images, tmp_path / "c", VIT)["n_valid"] == 4


def test_what_is_not_there_or_not_allowed_is_a_fact(tmp_path: Path, reads: Counter[str]) -> None:
    images = photos(tmp_path / "images", 0, 1)
    (images / "gone.png").symlink_to("nowhere")
    (images / "loop.png").symlink_to("loop.png")
    sources = list_sources([images])
    rows = digest_images(sources, range(3), tmp_path / "memory", workers=1)
    assert sorted((row.key, row.bytes > 0) for row in rows) == [
        ("000.png", True),
        ("gone.png", False),
        ("loop.png", False),
    ]
    assert reads == {"000.png": 1, "gone.png": 1, "loop.png": 1}, "a fact is not asked for twice"


def test_appending_reads_only_what_is_new_and_a_repetition_nothing(
    extract: Any, tmp_path: Path, reads: Counter[str]
) -> None:
    images, cache = photos(tmp_path / "images", 0, 8), tmp_path / "c"
    extract(images, cache, VIT, shard_samples=8)
    assert reads == {f"{i:03d}.png": 1 for i in range(8)}, "hashed as they are decoded"
    photos(images, 8, 3)
    reads.clear()
    extract(images, cache, VIT, append=True)
    assert reads == {f"{i:03d}.png": 1 for i in (8, 9, 10)}
    reads.clear()
    extract(images, cache, VIT, append=True)
    assert not reads
    os.utime(images / "002.png", ns=(1, 1))
    extract(images, cache, VIT, append=True)
    assert reads == {"002.png": 1}, "touched: read once"
    extract(images, cache, VIT, append=True)
    assert reads == {"002.png": 1}, "and remembered"


def test_a_cache_that_remembers_no_times_reads_once_and_remembers(
    extract: Any, tmp_path: Path, reads: Counter[str]
) -> None:
    images, cache = photos(tmp_path / "images", 0, 4), tmp_path / "c"
    extract(images, cache, VIT)
    (cache / ".digests").unlink()
    reads.clear()
    for _ in range(2):
        extract(images, cache, VIT, append=True)
        assert reads == {f"{i:03d}.png": 1 for i in range(4)}


def test_a_remembered_hash_that_damage_changed_is_computed_again(tmp_path: Path, reads: Counter[str]) -> None:
    sources, memory = list_sources([photos(tmp_path / "images", 0, 4)]), tmp_path / "m"
    expected = digest_images(sources, range(4), memory, workers=1)
    sha256 = expected[2].sha256
    memory.write_text(memory.read_text().replace(sha256, sha256[::-1]))
    reads.clear()
    assert digest_images(sources, range(4), memory, workers=1) == expected and reads == {"002.png": 1}


def test_options_are_refused_before_an_image_is_read(extract: Any, tmp_path: Path, reads: Counter[str]) -> None:
    images, cache = photos(tmp_path / "images", 0, 4), tmp_path / "c"
    extract(images, cache, VIT)
    (cache / ".digests").unlink()
    photos(images, 4, 2)
    reads.clear()
    wrong: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("recipe.flip is 0.5 there and 0.0", (VIT,), {"recipe": ViewRecipe(32, flip=0.0)}),
        ("dtype is 'int8' there", (VIT,), {"dtype": "fp8"}),
        ("columns.0..tap is|which this command does not ask for", (CNN,), {}),
        ("normalise.*there|mean.* there and", (VIT + "?mean=0.1",), {}),
    ]
    for message, teachers, options in wrong:
        with pytest.raises(ValueError, match=message):
            extract(images, cache, *teachers, append=True, **options)
    with pytest.raises(ValueError, match="4 images and this command has 6: 0 gone, 2 new, 0 changed"):
        extract(images, cache, VIT)
    assert not reads


def test_images_in_a_tar_are_known_by_its_time_and_their_place(tmp_path: Path, reads: Counter[str]) -> None:
    images, tar = photos(tmp_path / "images", 0, 3), tmp_path / "images.tar"
    with tarfile.open(tar, "w") as file:
        for image in sorted(images.iterdir()):
            file.add(image, image.name)
    rows = [digest_images(list_sources([tar]), range(3), tmp_path / "m", workers=1) for _ in range(2)]
    assert rows[0] == rows[1] and sum(reads.values()) == 3
    os.utime(tar, ns=(1, 1))
    assert digest_images(list_sources([tar]), range(3), tmp_path / "m", workers=1) == rows[0]
    assert sum(reads.values()) == 6


def test_a_damaged_memory_costs_reading_again_and_nothing_else(tmp_path: Path, reads: Counter[str]) -> None:
    sources, memory = list_sources([photos(tmp_path / "images", 0, 4)]), tmp_path / "m"
    expected = digest_images(sources, range(4), memory, workers=1)
    whole = memory.read_bytes()
    reads.clear()
    for damage in (
        whole[:-5],
        b'{"a": 1}\nnull\n' + whole[:-5] + b"\xff\n[[[[",
        whole[:-5] + b"\n[1,2,3,4,5]\n" + b"[" * 99999,
        whole[:-5] + b"\n%08x %s" % (zlib.crc32(far := b'["a", 9223372036854775808, "%s", 1, 1]' % (b"0" * 64)), far),
    ):
        memory.write_bytes(damage)
        assert digest_images(sources, range(4), memory, workers=1) == expected
        assert memory.read_bytes() == whole, "one line per image again"
    assert reads == {sources.keys[3]: 4}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    memory.unlink()
    memory.symlink_to(elsewhere)
    assert digest_images(sources, range(4), memory, workers=1) == expected
    assert elsewhere.read_bytes() == b"mine" and not memory.is_symlink()


def test_a_folder_in_the_place_of_the_memory_is_named_with_what_to_do(tmp_path: Path) -> None:
    sources, memory = list_sources([photos(tmp_path / "images", 0, 2)]), tmp_path / ".digests"
    memory.mkdir()
    with pytest.raises(
        OSError, match=r"\.digests: could not be written: Is a directory; .*a folder lies where .*: move it away"
    ):
        digest_images(sources, range(2), memory, workers=1)


def test_the_memory_is_no_content_of_the_cache(extract: Any, tmp_path: Path) -> None:
    images, cache = photos(tmp_path / "images", 0, 3), tmp_path / "c"
    cache.mkdir()
    (cache / ".digests").write_text("")
    extract(images, cache, VIT)
    (cache / ".digests").unlink()
    assert len(open_cache(cache).numbers) == 3


def test_a_full_disk_while_hashing_is_told_with_what_to_do(tmp_path: Path) -> None:
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(OSError, match="m: could not be written: .*free some space"),
    ):
        note(full, ("a.png", 1, "00", 1, -1), tmp_path / "m")
