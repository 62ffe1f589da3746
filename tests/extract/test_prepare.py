"""An image is read once and hashed as it is decoded; whoever reads it again later finds the same bytes, or says so."""

import contextlib
import hashlib
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contents import contents_without_records

from mrmae.extract import pipeline, run
from mrmae.extract.images import patience
from mrmae.extract.images.list import Sources, list_sources, read_image
from mrmae.shards import check, commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format import commit_path, dataset_id, grown_id, load_plan, read_samples, read_sources, tar_path
from mrmae.shards.manifest import read_manifest
from mrmae.shards.repair import prepare_repair
from mrmae.shards.store import read_hashes

VIT, CNN = "vit=timm:test_vit/random", "cnn=timm:test_efficientnet/random"
Extract = Callable[..., dict[str, Any]]


class Killed(BaseException):
    """Instead of a kill."""


@pytest.fixture
def images(photo_folder: Path, tmp_path: Path) -> Path:
    """A copy of the photographs, one that is broken and one that leads nowhere among them."""
    folder = Path(shutil.copytree(photo_folder, tmp_path / "images"))
    (folder / "class 0/broken.png").write_bytes(b"no image")
    (folder / "class 0/gone.png").symlink_to("nowhere")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image was read, by key."""
    counts: Counter[str] = Counter()
    real = Sources.read

    def read(sources: Sources, i: int) -> bytes:
        counts[sources[i].key] += 1
        return real(sources, i)

    monkeypatch.setattr(Sources, "read", read)
    return counts


def change(images: Path, key: str) -> tuple[str, str]:
    """Turn a byte of an image over, its length and time as they were: (sha256 before, sha256 after)."""
    file = images / key
    before, times = file.read_bytes(), file.stat()
    after = before[:-1] + bytes([before[-1] ^ 1])
    file.write_bytes(after)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return hashlib.sha256(before).hexdigest(), hashlib.sha256(after).hexdigest()


def killed_after(monkeypatch: pytest.MonkeyPatch, units: int, extract: Callable[[], Any]) -> None:
    """Run the extraction until so many units are committed."""
    real, done = pipeline.commit_unit, [0]

    def commit_unit(*args: Any) -> None:
        if done[0] == units:
            raise Killed
        real(*args)
        done[0] += 1

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "commit_unit", commit_unit)
        extract()


def test_images_are_read_once_and_their_hashes_make_the_data_sets_id(
    extract: Extract, images: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    manifest = extract(images, tmp_path / "c", VIT, CNN, views=2, shard_samples=8)
    rows = read_sources(tmp_path / "c")
    assert reads == {row.key: 1 for row in rows} and len(reads) == 22
    for row in rows:
        file = images / row.key
        data = file.read_bytes() if file.exists() else b""
        assert (row.bytes, row.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["dataset_ids"] == [dataset_id(rows)] == [open_cache(tmp_path / "c").ids["dataset"]]
    reasons = {row.key: reason for row, reason in zip(rows, read_samples(tmp_path / "c")["reason"]) if reason}
    assert (
        set(reasons) == {"class 0/broken.png", "class 0/gone.png"} and "cannot be read" in reasons["class 0/gone.png"]
    )
    hashes = {
        (view, shard): read_hashes(tar_path(tmp_path / "c", view, shard)).tobytes()
        for view in (0, 1)
        for shard in range(3)
    }
    told = b"".join(bytes.fromhex(row.sha256) for row in rows)
    assert [b"".join(hashes[view, shard] for shard in range(3)) for view in (0, 1)] == [told, told]


def test_nothing_is_read_before_a_plan_lies_there_whose_ids_know_no_bytes(
    extract: Extract, images: Path, tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "calibrated", lambda job: (_ for _ in ()).throw(Killed))
    for name in ("a", "b"):
        with pytest.raises(Killed):
            extract(images, tmp_path / name, VIT)
        change(images, next(iter(read_sources(tmp_path / "a"))).key)
    assert not reads and load_plan(tmp_path / "a") == load_plan(tmp_path / "b")
    assert read_samples(tmp_path / "a")["sha256"].array.null_count == 22


@pytest.mark.parametrize("when", ["calibrated", "half of the views committed", "a view more"])
def test_an_image_that_changed_under_its_length_is_refused_with_both_hashes(
    extract: Extract, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def go(views: int) -> None:
        extract(images, tmp_path / "c", VIT, views=views, shard_samples=8, workers=1)

    if when == "a view more":
        go(views=1)
    else:
        killed_after(monkeypatch, 0 if when == "calibrated" else 1, lambda: go(views=2))
    key = next(row.key for row in read_sources(tmp_path / "c") if (images / row.key).exists())
    committed, manifest = commit.committed(tmp_path / "c", load_plan(tmp_path / "c")), tmp_path / "c/manifest.json"
    before, after = change(images, key)
    with pytest.raises(
        ValueError,
        match=rf"{re.escape(key)}: its bytes changed since the cache was begun: its sha256 was {before} and is now {after}",
    ):
        go(views=2)
    assert commit.committed(tmp_path / "c", load_plan(tmp_path / "c")) == committed and not manifest.exists()
    change(images, key)
    go(views=2)
    extract(images, tmp_path / "once", VIT, views=2, shard_samples=8)
    assert contents_without_records(tmp_path / "c") == contents_without_records(tmp_path / "once")


def test_an_image_that_nothing_was_made_of_yet_may_change(
    extract: Extract, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "calibrated", lambda job: (_ for _ in ()).throw(Killed))
        extract(images, tmp_path / "c", VIT, shard_samples=8)
    change(images, next(row.key for row in read_sources(tmp_path / "c") if (images / row.key).exists()))
    for name in ("c", "once"):
        extract(images, tmp_path / name, VIT, shard_samples=8)
    assert contents_without_records(tmp_path / "c").keys() == contents_without_records(tmp_path / "once").keys()
    assert read_manifest(tmp_path / "c") == read_manifest(tmp_path / "once")


def test_appending_compares_what_is_given_again_and_reads_nothing_that_is_new_twice(
    extract: Extract, images: Path, tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, key = tmp_path / "c", "class 1/photo-003 é.png"
    extract(images, cache, VIT, shard_samples=8)
    first = read_manifest(cache)["dataset_ids"]
    shutil.copy(images / key, images / "new.png")
    before, after = change(images, key)
    (cache / ".digests").unlink()
    known = (cache / "manifest.json").read_bytes()
    with pytest.raises(
        ValueError, match=rf"image '{re.escape(key)}' has other bytes .*sha256 was {before} and is now {after}"
    ):
        extract(images, cache, VIT, append=True)
    assert (cache / "manifest.json").read_bytes() == known
    change(images, key)
    (cache / ".digests").unlink()
    reads.clear()
    killed_after(monkeypatch, 0, lambda: extract(images, cache, VIT, append=True))
    assert reads["new.png"] == 1 and set(reads.values()) == {1}
    extract(images, cache, VIT, append=True)
    ids, rows = read_manifest(cache)["dataset_ids"], read_sources(cache)
    assert ids == [*first, grown_id(first[0], dataset_id(rows[24:]))] and rows[24].key == "new.png"
    assert rows[24].sha256 == hashlib.sha256((images / "new.png").read_bytes()).hexdigest()


def test_a_lost_table_of_samples_gets_its_hashes_from_the_pixels(
    extract: Extract, images: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    extract(images, tmp_path / "c", VIT, shard_samples=8)
    whole = contents_without_records(tmp_path / "c")
    (tmp_path / "c/samples.arrow").unlink()
    reads.clear()
    extract(images, tmp_path / "c", VIT)
    assert contents_without_records(tmp_path / "c") == whole and not reads


def test_an_unfinished_cache_knows_what_it_read_and_a_whole_part_of_it_the_data_sets_id(
    extract: Extract, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    killed_after(monkeypatch, 2, lambda: extract(images, cache, VIT, shard_samples=8, workers=1, dtype="float16"))
    part = open_cache(cache, allow_partial=True)
    assert part.ids["dataset"] == load_plan(cache).listing_id and part.unfinished
    assert all(part.table["sha256"][number] for number in part.numbers)
    manifest = extract(images, cache, VIT, dtype="float16")
    (cache / "manifest.json").unlink()
    assert open_cache(cache, views=1).ids["dataset"] == manifest["dataset_ids"][0]


@pytest.mark.parametrize(
    ("view", "column", "folder"), [(1, "pixels", "pixels"), (0, "vit.pre_tail", "vit.pre_tail.zarr")]
)
def test_what_is_made_of_other_bytes_is_named_and_not_finished(
    extract: Extract, images: Path, tmp_path: Path, view: int, column: str, folder: str
) -> None:
    """As two writers on a file system without locks may leave them."""
    for name, times in (("c", 0), ("other", 1)):
        for _ in range(times):
            change(images, "class 0/broken.png")
        extract(images, tmp_path / name, VIT, views=2, shard_samples=32)
    for part in (f"commits/{view}/{column}", f"views/{view}/{folder}"):
        shutil.rmtree(tmp_path / "c" / part)
        shutil.copytree(tmp_path / "other" / part, tmp_path / "c" / part)
    problems = check.find_problems(tmp_path / "c")
    assert [(problem.file, problem.unit) for problem in problems] == [
        (f"commits/{view}/{column}/000000.json", (view, column, 0))
    ]
    assert "other bytes than those that view 0 was made of" in str(problems[0])
    plan = load_plan(tmp_path / "c")
    with pytest.raises(ValueError, match=f"commits/{view}/{column}/000000.json: its images have other bytes"):
        commit.finalise(tmp_path / "c", plan)
    change(images, "class 0/broken.png")
    prepare_repair(tmp_path / "c", problems)
    extract(images, tmp_path / "c", VIT, views=2)
    assert not check.find_problems(tmp_path / "c", full=True)


def test_pixels_that_are_made_again_are_of_the_bytes_that_their_columns_are_of(
    extract: Extract, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else tells of which bytes a shard was made that lost its pixels before the cache was finished."""
    cache, record = tmp_path / "c", re.escape(str(commit_path(tmp_path / "c", 0, "vit.pre_tail", 0)))

    def go() -> None:
        extract(images, cache, VIT, shard_samples=8, workers=1, dtype="float16")

    killed_after(monkeypatch, 2, go)
    (cache / "views/0/pixels/000000.tar").unlink()
    key = next(row.key for row in read_sources(cache) if (images / row.key).exists())
    change(images, key)
    left = commit.committed(cache, load_plan(cache))
    with pytest.raises(
        ValueError,
        match=rf"{record}: this column was made of images with other bytes .* restore the image that changed",
    ):
        go()
    assert commit.committed(cache, load_plan(cache)) == left == {(0, "vit.pre_tail", 0)}
    change(images, key)
    go()
    extract(images, tmp_path / "once", VIT, shard_samples=8, dtype="float16")
    assert contents_without_records(cache) == contents_without_records(tmp_path / "once")


def test_hashes_that_are_not_the_records_are_named(extract: Extract, images: Path, tmp_path: Path) -> None:
    extract(images, tmp_path / "c", VIT, shard_samples=32)
    index = tmp_path / "c/views/0/pixels/000000.index.npz"
    with np.load(index) as arrays:
        held = dict(arrays)
    held["sha256"][3, 5] ^= 1
    np.savez(index, **held)
    record = commit.read_record(commit_path(tmp_path / "c", 0, "pixels", 0))
    assert record is not None and record["files"]["views/0/pixels/000000.index.npz"]["bytes"] == index.stat().st_size
    (problem,) = check.find_problems(tmp_path / "c")
    assert "000000.index.npz: its hashes of images are not those of the commit record" in str(problem)
    with contextlib.suppress(ValueError):
        (tmp_path / "c/manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"000000\.index\.npz: its hashes of images are not those of the commit record"
    ):
        commit.finalise(tmp_path / "c", load_plan(tmp_path / "c"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_bad_from_the_beginning(extract: Extract, images: Path, tmp_path: Path) -> None:
    (images / "class 0/broken.png").chmod(0)
    extract(images, tmp_path / "c", VIT)
    row = next(row for row in read_sources(tmp_path / "c") if row.key == "class 0/broken.png")
    assert (row.bytes, row.sha256) == (0, hashlib.sha256(b"").hexdigest())


def test_a_tar_that_changes_after_it_was_listed_is_an_error(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "WAITS_SECONDS", (0.0, 0.0))
    with tarfile.open(tmp_path / "i.tar", "w") as tar:
        for file in sorted(images.glob("*/photo*")):
            tar.add(file, file.name)
    sources = list_sources([tmp_path / "i.tar"])
    content = (tmp_path / "i.tar").read_bytes()
    assert read_image(sources, 0) in content
    (tmp_path / "i.tar").write_bytes(content[512:] + content[:512])
    os.utime(tmp_path / "i.tar", ns=(1, 1))
    with pytest.raises(
        OSError,
        match=r"i\.tar.*: could not be read, 3 times: the tar has changed since it was listed.*same command again",
    ):
        read_image(sources, 0)


def test_an_image_that_goes_after_it_was_listed_is_an_error(
    extract: Extract, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "calibrated", lambda job: (_ for _ in ()).throw(Killed))
        extract(images, tmp_path / "c", VIT)
    real = run.begin

    def begin(*args: Any) -> Any:
        (images / "class 1/photo-003 é.png").unlink()
        return real(*args)

    monkeypatch.setattr(run, "begin", begin)
    with pytest.raises(OSError, match="photo-003"):
        extract(images, tmp_path / "c", VIT)
