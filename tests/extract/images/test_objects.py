"""Images at URLs are those of a local folder or tar, byte for byte; what is read once is not read again; stores that stumble."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from stores import others_soak

from mrmae.common import backend
from mrmae.common.backend import About, Unreachable, Url
from mrmae.extract.cli import main
from mrmae.extract.images import objects, patience
from mrmae.extract.images.digest import digest_images
from mrmae.extract.images.list import Sources, list_sources, read_image
from mrmae.extract.images.patience import Unreadable
from mrmae.extract.images.tar_images import KeptIndices
from mrmae.extract.images.tars import read_headers
from mrmae.shards.plans import DIGESTS, TARS

N = 6


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.RETRIES, "backoff", {"init_backoff": timedelta(milliseconds=1), "base": 2})
    monkeypatch.setattr(patience, "WAITS_SECONDS", (0.0, 0.0))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs in two folders, one of them with a name that URLs would escape."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(N):
        path = folder / f"class {i % 2}" / (f"{i}.png" if i else "0 é%20 #~.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40 + i, 50 - i, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def tars(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in two tars, with labels beside them."""
    folder = tmp_path_factory.mktemp("tars")
    files = sorted(photos.rglob("*.png"))
    for part in range(2):
        with tarfile.open(folder / f"photos-{part}.tar", "w") as tar:
            for file in files[part::2]:
                name = file.relative_to(photos).as_posix()
                for member, data in ((name, file.read_bytes()), (f"{name[:-4]}.cls", f"label of {name}".encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def url(store_server: Any, photos: Path, tars: Path) -> str:
    """A bucket with the photographs below photos/ and the tars below tars/."""
    store_server.upload(photos, "many-photos", "photos")
    store_server.upload(tars, "many-photos", "tars")
    for marker in ("photos/", "photos/class 0/"):  # as consoles make them, for folders
        store_server.ask("PUT", f"many-photos/{marker}", b"")
    for other in ("photos/.hidden/x.png", "photos/readme.txt", "photos-of-others/x.png", "top.jpg"):
        store_server.ask("PUT", f"many-photos/{other}", b"1")
    return f"{store_server.scheme}://many-photos"


def content(sources: Sources) -> list[tuple[Any, bytes]]:
    return [(image, read_image(sources, i)) for i, image in enumerate(sources)]


def test_a_prefix_tars_and_a_list_give_what_local_ones_give(
    store: Any, url: str, photos: Path, tars: Path, tmp_path: Path
) -> None:
    local = list_sources([photos])
    far = list_sources([f"{url}/photos/"])
    assert content(far) == content(local) and len(far) == N
    assert far.notes == ("1 file that is no image was passed over (.txt)",)
    lines = [f"{url}/photos/{image.key}" for image in local]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    assert content(list_sources([tmp_path / "list.txt"])) == content(local)
    pattern = "tars/photos-{0..1}.tar"
    far = list_sources([f"{url}/{pattern}"])
    assert content(far) == content(list_sources([tars / "photos-{0..1}.tar"]))
    assert far[0].label == f"label of {far[0].key}"
    assert far.where(0).startswith(f"{url}/tars/photos-") and far.where(0).endswith(f".tar: {far[0].key}")


def of_cache(path: Path) -> dict[str, bytes]:
    """Every file but the commit records, which tell of the command and of seconds."""
    hidden = {DIGESTS, TARS}
    files = [f.relative_to(path) for f in path.rglob("*") if f.is_file() and not hidden & set(f.parts)]
    return {str(f): (path / f).read_bytes() for f in files if "commits" not in f.parts and f.name != "manifest.json"}


@others_soak
@pytest.mark.parametrize("kind", ["tar", pytest.param("prefix", marks=pytest.mark.soak)])
def test_the_cache_is_the_same_and_a_repeated_command_reads_nothing_again(
    store: Any, url: str, photos: Path, tars: Path, tmp_path: Path, extract: Callable[..., dict[str, Any]], kind: str
) -> None:
    near, far = (tars / "photos-0.tar", f"{url}/tars/photos-0.tar") if kind == "tar" else (photos, f"{url}/photos")
    extract(near, tmp_path / "local", shard_samples=4)
    extract(far, tmp_path / "far", shard_samples=4)
    assert of_cache(tmp_path / "far") == of_cache(tmp_path / "local") and len(of_cache(tmp_path / "far")) > 10
    before = store.proxy.requests
    extract(far, tmp_path / "far")
    assert store.proxy.requests - before == 1, "the listing, or a HEAD of the tar"


def test_a_tar_is_hashed_while_it_is_listed_and_kept(store: Any, url: str, tars: Path, tmp_path: Path) -> None:
    kept, local = KeptIndices(tmp_path / "kept"), list_sources([tars / "photos-{0..1}.tar"])
    expected = list(digest_images(local, range(N), tmp_path / "a", workers=1))
    total = sum(file.stat().st_size for file in tars.iterdir())
    for reads in (1, 0):
        before, requests = store.proxy.answer_bytes, store.proxy.requests
        far = list_sources([f"{url}/tars/photos-{{0..1}}.tar"], kept=kept)
        assert list(digest_images(far, range(N), tmp_path / "b", workers=1, kept=kept)) == expected
        assert store.proxy.requests - requests == 2 + 2 * reads, "a HEAD for each, and one piece of each"
        assert reads * total <= store.proxy.answer_bytes - before < reads * total + 10_000
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(file.read_bytes().replace(b"label", b"lapel"))
    assert content(list_sources([f"{url}/tars/photos-{{0..1}}.tar"], kept=kept)) == content(local), "damage is noticed"


def test_of_a_tar_that_is_only_listed_the_headers_pass(store: Any, url: str, tmp_path: Path) -> None:
    """Where nothing is kept, as before a dry run, large images stay where they are; a label is read all the same."""
    with tarfile.open(tmp_path / "large.tar", "w") as tar:
        for i in range(5):
            for name, data in ((f"{i}.png", bytes(400_000 + i)), (f"{i}.cls", f"label {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    store.put(f"{url}/large.tar", (tmp_path / "large.tar").read_bytes())
    before = store.proxy.answer_bytes
    far, near = list_sources([f"{url}/large.tar"]), list_sources([tmp_path / "large.tar"])
    assert store.proxy.answer_bytes - before < 60_000, "of 2 MB"
    assert [(s.key, s.label) for s in far] == [(s.key, s.label) for s in near]
    four = list(far.keys).index("4.png")
    assert far[four].label == "label 4" and read_image(far, four) == bytes(400_004)


@pytest.mark.parametrize("trouble", ["cuts", "refusals"])
def test_a_store_that_stumbles_changes_nothing_and_one_that_stays_away_is_named(
    store: Any, url: str, tars: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    expected = content(list_sources([tars / "photos-0.tar"]))
    setattr(store.proxy, trouble, 6)
    far = list_sources([f"{url}/tars/photos-0.tar"])
    setattr(store.proxy, trouble, 6)
    assert content(far) == expected
    setattr(store.proxy, trouble, 10**9)
    before = store.proxy.requests
    with pytest.raises(Unreachable, match=r"://many-photos/tars/photos-0\.tar: cannot be read: .*same command again"):
        read_image(far, 0)
    assert store.proxy.requests - before == 15, "3 times 5"
    said = CliRunner().invoke(main, [f"{url}/tars/photos-0.tar", "/nonexistent/c", "--dry-run"])
    assert said.exit_code == 1 and "photos-0.tar: cannot be read" in said.output, said.output
    setattr(store.proxy, trouble, 0)


def test_an_object_that_goes_is_recorded_and_one_that_changes_is_an_error(
    store: Any, photos: Path, tars: Path, tmp_path: Path
) -> None:
    url = store.upload(photos, "passing-photos", "p")
    far = list_sources([url])
    store.remove(f"{url}/{far[0].key}")
    store.put(f"{url}/{far[1].key}", b"shorter")
    with pytest.raises(Unreadable, match="no such object"):
        read_image(far, 0)
    assert digest_images(far, [0], tmp_path / "m", workers=1)[0].bytes == 0, "as a file that is gone"
    with pytest.raises(OSError, match=r"://passing-photos/p/.*: could not be read, 3 times: the object has changed"):
        digest_images(far, [1], tmp_path / "m", workers=1)
    tar = (tars / "photos-0.tar").read_bytes()
    store.put(f"{url}/x.tar", tar)
    far = list_sources([f"{url}/x.tar"])
    store.put(f"{url}/x.tar", tar[::-1])
    with pytest.raises(OSError, match=r"x\.tar: .*could not be read, 3 times: the object has changed"):
        read_image(far, 0)
    for cut in (tar[: len(tar) // 2], tar[:-10000], b"", b"\x1f\x8b" + tar):
        store.put(f"{url}/x.tar", cut)
        with pytest.raises(ValueError, match=r"://passing-photos/p/x\.tar: (is not a whole tar|has no end mark)"):
            list_sources([f"{url}/x.tar"])


def test_what_is_not_there_or_no_images_is_said(store: Any, url: str, tmp_path: Path) -> None:
    for given, message in (
        ("/nothing", f"there is no such object, and none below {url}/nothing/"),
        ("/tars/photos-9.tar", r"photos-9\.tar: does not exist"),
        ("/top.jpg", "is one object; expected a plain .tar, or a prefix"),
        ("/tars", r"://many-photos/tars: no images found"),
        ("-not/x", "://many-photos-not/x: cannot be read: .*is the URL right"),
    ):
        with pytest.raises((ValueError, Unreachable), match=message):
            list_sources([url + given])
    with pytest.raises(ValueError, match=r"https://\.\.\.: IMAGES can be a local path or a URL of s3, gs, az, hf"):
        list_sources(["https://host/a/b"])
    text = tmp_path / "list.txt"
    for lines, message in (
        (f"{url}/photos/class 1/1.png\nx.png", "1 of 2 lines are no URLs, first 'x.png'"),
        (f"{url}/photos/class 1/1.png\n{url}/photos/9.png", f"1 of 2 listed objects do not exist, first {url}/photos/9.png"),
        ("s3://a/x.png\ngs://a/x.png", "has URLs of gs and s3; expected one kind"),
    ):  # fmt: skip
        text.write_text(lines)
        with pytest.raises(ValueError, match=message):
            list_sources([text])


def test_no_credentials_stop_the_command_and_record_nothing(
    s3: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.upload(photos, "private-photos", "photos")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    backend.bucket_of.cache_clear()
    words = [
        url,
        str(tmp_path / "c"),
        "--teacher",
        "vit=timm:test_vit/random",
        "--size",
        "32",
        "--grid",
        "4",
    ]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 1 and "s3://private-photos/photos: cannot be read" in said.output, said.output
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said.output and not (tmp_path / "c/plan.json").exists()


@pytest.mark.parametrize("piece_bytes", [100, 511, 512, 1536, 10_240, 1 << 20])
def test_pieces_of_any_size_give_one_index(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """Members and headers that end just where a piece does, or lie across several."""
    tar, asked = tars / "photos-0.tar", list[int]()

    def read(url: str, wanted: About, offset: int) -> bytes:
        asked.append(wanted.size_bytes)
        return tar.read_bytes()[offset : offset + wanted.size_bytes]

    monkeypatch.setattr(objects, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(objects, "read_object", read)
    url, about = Url("s3://bucket/x.tar"), About(tar.stat().st_size, 1)
    found = objects.far_headers(url, about, KeptIndices(), lambda name: name.endswith(".png"), lambda: None)
    plain = read_headers(tar)
    assert {name: member[:4] for name, member in found.items()} == {name: member[:4] for name, member in plain.items()}
    for name, member in found.items():
        data = tar.read_bytes()[member.offset : member.offset + member.size_bytes]
        assert member.sha256 == (hashlib.sha256(data).hexdigest() if name.endswith(".png") else None)
        assert member.text == (data.decode() if name.endswith(".cls") else None)
    assert sum(asked) < about.size_bytes + 20 * piece_bytes, "hardly anything is read twice"
