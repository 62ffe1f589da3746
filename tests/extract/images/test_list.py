import io
import os
import pickle
import socket
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from mrmae.extract.images import list as listing
from mrmae.extract.images import tars
from mrmae.extract.images.list import Unreadable, list_sources, read_image
from mrmae.shards.format import canonical_order, signed_hashes


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def keys(sources) -> list[str]:
    return sorted(image.key for image in sources)


def test_a_folder_gives_keys_labels_and_bytes_in_canonical_order(tmp_path):
    write_files(tmp_path, {"b/two words.JPG": b"2", "a/ünï/日本.png": b"11", "top.webp": b"", "a/notes.txt": b"x"})
    sources = list_sources([tmp_path])
    expected = [("a/ünï/日本.png", "ünï", 2, b"11"), ("b/two words.JPG", "b", 1, b"2"), ("top.webp", None, 0, b"")]
    order = canonical_order([key for key, *_ in expected])
    assert order != [0, 1, 2]
    assert [(*image, sources.read(i)) for i, image in enumerate(sources)] == [expected[i] for i in order]
    assert sources.places(pa.array(["top.webp", "gone", "a/ünï/日本.png"], pa.large_string())).tolist() == [order.index(2), -1, order.index(0)]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_order_is_canonical_however_many_rows_are_joined_and_the_first_are_copies(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(listing, "ROWS_TOGETHER", rows)
    monkeypatch.setattr(listing, "ROWS_AT_ONCE", rows)
    write_files(tmp_path, {f"{i}/{i}.jpg": bytes([i]) for i in range(40)})
    write_tar(tmp_path / "more.tar", {f"{i}.jpg": bytes([i]) for i in range(40, 60)})
    write_tar(tmp_path / "most.tar", {f"{i}.jpg": bytes([i]) for i in range(60, 80)})
    sources = list_sources([tmp_path, tmp_path / "more.tar", tmp_path / "most.tar"])
    names = list(sources.keys)
    assert len(names) == 80 and canonical_order(names) == list(range(80))
    first = sources.first(30)
    for some in (sources, first):
        assert [some.read(i) for i in range(len(some))] == [bytes([int(Path(key).stem)]) for key in some.keys]
    assert list(first.keys) == names[:30] and len(pickle.dumps(first)) < len(pickle.dumps(sources)) / 2


def test_keys_with_one_hash_are_ordered_by_key(tmp_path, monkeypatch):
    """As no two are known, hashes of two bits stand for them."""
    monkeypatch.setattr(listing, "signed_hashes", lambda keys: signed_hashes(keys) & 3)
    write_files(tmp_path, {f"{i}.jpg": bytes([i]) for i in range(40)})
    sources = list_sources([tmp_path])
    found = [(int(signed_hashes([key])[0]) & 3, key) for key in sources.keys]
    assert found == sorted(found) and len({hash for hash, _ in found}) == 4
    assert [sources.read(i)[0] for i in range(40)] == [int(key.removesuffix(".jpg")) for _, key in found]


def test_hidden_files_and_resource_copies_are_passed_over(tmp_path):
    files = {".DS_Store": b"", "a/._x.jpg": b"", ".git/x.jpg": b"", "__MACOSX/a/x.jpg": b"", "a/x.jpg": b"1"}
    assert keys(list_sources([write_files(tmp_path / "folder", files)])) == ["a/x.jpg"]
    assert keys(list_sources([write_tar(tmp_path / "x.tar", files)])) == ["a/x.jpg"]


def test_linked_folders_are_followed_but_loops_are_not(tmp_path):
    root = write_files(tmp_path / "root", {"a/x.jpg": b"1"})
    write_files(tmp_path / "outside", {"y.jpg": b"2"})
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "linked").symlink_to(tmp_path / "outside")
    assert keys(list_sources([root])) == ["a/x.jpg", "linked/y.jpg"]


def test_a_dangling_link_stays_listed_and_fails_when_read(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    sources = list_sources([tmp_path])
    assert sources[0].size_bytes is None
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        sources.read(0)


def test_what_is_no_regular_file_is_passed_over_aloud_and_never_opened(tmp_path):
    """A FIFO that is opened waits for its writer without end."""
    root = write_files(tmp_path / "root", {"a/x.jpg": b"1", "c.txt": b""})
    os.mkfifo(root / "a" / "p.jpg")
    (root / "a" / "link.png").symlink_to(root / "a" / "p.jpg")
    (root / "null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(root / "s.jpg"))
    sources = list_sources([root])
    assert keys(sources) == ["a/x.jpg"] and sources.read(0) == b"1"
    said = " ".join(sources.notes)
    assert "4 names of images that are no regular files were passed over, unopened: " in said and " and 1 more" in said
    with pytest.raises(ValueError, match="p.jpg: is a FIFO; expected a folder"):
        list_sources([root / "a" / "p.jpg"])
    listed = write_files(tmp_path, {"list.txt": f"{root}/a/x.jpg\n{root}/a/p.jpg\n".encode()}) / "list.txt"
    with pytest.raises(ValueError, match="1 of 2 listed files are no regular files, first .*p.jpg"):
        list_sources([listed])


def test_links_to_images_are_read_and_a_file_that_became_a_fifo_is_an_error(tmp_path):
    root = write_files(tmp_path / "root", {"x.jpg": b"1"})
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "y.jpg").symlink_to(root / "x.jpg")
    sources = list_sources([tmp_path / "links"])
    assert [(image.key, image.size_bytes) for image in sources] == [("y.jpg", 1)] and sources.read(0) == b"1"
    os.remove(root / "x.jpg")
    os.mkfifo(root / "x.jpg")
    with pytest.raises(Unreadable, match="is a FIFO and was a regular file when it was listed: .*y.jpg"):
        read_image(sources, 0)


def test_members_that_are_no_regular_files_are_passed_over_aloud(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"1"})
    with tarfile.open(path, "a") as tar:
        for name, kind in [("p.jpg", tarfile.FIFOTYPE), ("d.png", tarfile.CHRTYPE), ("folder.jpg", tarfile.DIRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    sources = list_sources([path])
    assert keys(sources) == ["a.jpg"] and "p.jpg (a FIFO), d.png (a device)" in " ".join(sources.notes)


def test_every_format_that_decodes_is_listed_whatever_the_case_of_its_suffix(tmp_path):
    names = "a.JPG a.jpeg a.jpe a.jfif a.png a.apng a.webp a.Avif a.tif a.TIFF a.gif a.BMP a.ppm a.pgm a.pbm a.pnm"
    sources = list_sources([write_files(tmp_path, dict.fromkeys([*names.split(), "a.pdf", "a.heic"], b""))])
    assert sorted(keys(sources)) == sorted(names.split())
    assert "2 files that are no images were passed over (.heic .pdf)" in sources.notes
    assert any(
        "the first is taken (1 .gif, 1 .apng, 1 .webp, 1 .avif, 1 .tif, 1 .tiff)" in note for note in sources.notes
    )


def test_include_matches_the_whole_key_and_crosses_folders(tmp_path):
    write_files(tmp_path, {"train/a/x.jpg": b"", "train/b/y.png": b"", "test/a/x.jpg": b"", "train.jpg": b""})
    assert keys(list_sources([tmp_path], ["train/*"])) == ["train/a/x.jpg", "train/b/y.png"]
    assert keys(list_sources([tmp_path], ["*.png", "test/*"])) == ["test/a/x.jpg", "train/b/y.png"]
    with pytest.raises(ValueError, match=r"--include val/\*: matches none of the 4 images; keys look like"):
        list_sources([tmp_path], ["val/*"])


def test_an_empty_folder_and_a_missing_path_are_named(tmp_path):
    with pytest.raises(ValueError, match="no images found; expected files ending in .jpg"):
        list_sources([tmp_path])
    with pytest.raises(ValueError, match="absent: does not exist"):
        list_sources([tmp_path / "absent"])


def test_a_key_in_two_places_is_refused_and_both_are_named(tmp_path):
    one, two = write_files(tmp_path / "one", {"x.jpg": b""}), write_files(tmp_path / "two", {"x.jpg": b""})
    with pytest.raises(ValueError, match=r"'x.jpg': two images have this key, in .*one.x.jpg and .*two.x.jpg"):
        list_sources([one, two])
    assert len(list_sources([tmp_path])) == 2


def test_a_name_that_is_not_unicode_is_named(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb"):
        pass
    with pytest.raises(ValueError, match="not valid UTF-8; keys are UTF-8; rename"):
        list_sources([tmp_path])


def test_a_tar_is_read_by_offset_and_never_extracted(tmp_path):
    long = "d" * 120 + "/1.2.840.jpg"
    files = {"./a/x.jpg": b"x" * 700, "../../up.jpg": b"up", "/abs.jpg": b"abs", long: b"long", "日本/ü.png": b"u"}
    path = write_tar(tmp_path / "x.tar", files)
    sources = list_sources([path])
    read = {image.key: sources.read(i) for i, image in enumerate(sources)}
    assert read == {"a/x.jpg": b"x" * 700, "../../up.jpg": b"up", "/abs.jpg": b"abs", long: b"long", "日本/ü.png": b"u"}
    assert os.listdir(tmp_path) == ["x.tar"]


def test_links_inside_a_tar_lead_to_their_bytes(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a/x.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"xyz"))
        for name, kind, target in [
            ("b/hard.jpg", tarfile.LNKTYPE, "a/x.jpg"),
            ("b/soft.jpg", tarfile.SYMTYPE, "../a/x.jpg"),
        ]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    sources = list_sources([path])
    assert [sources.read(i) for i in range(3)] == [b"xyz"] * 3
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "nothing.jpg"
        tar.addfile(link)
    with pytest.raises(ValueError, match="'c.jpg' is a link that leads to no member"):
        list_sources([path])


def test_a_webdataset_tar_takes_its_labels_from_cls_members(tmp_path):
    files = {"000.jpg": b"0", "000.cls": b"7\n", "001.jpg": b"1", "n/002.seg.png": b"2", "n/002.cls": b"cat"}
    sources = list_sources([write_tar(tmp_path / "x.tar", files)])
    assert sorted((i.key, i.label) for i in sources) == [("000.jpg", "7"), ("001.jpg", None), ("n/002.seg.png", "cat")]


@pytest.mark.parametrize("image, members, expected", [
    ("IMG 1.0.jpg", {"IMG 1.0.cls": "b"}, "b"),  # cameras and slide scanners put dots into names
    ("v1.2/IMG 1.0.jpg", {"v1.2/IMG 1.0.cls": "b", "v1.cls": "no"}, "b"),
    ("7.seg.png", {"7.cls": "a"}, "a"),  # as webdataset groups: at the first dot
    ("7.8.seg.png", {"7.8.cls": "a"}, "a"),
    ("7.8.png", {"7.cls": "a", "7.8.cls": "b"}, "b"),
    ("7.8.png", {"7.cls": "a", "7.8.cls": " "}, "a"),
    ("n/7.png", {"7.cls": "a"}, "n"),
])  # fmt: skip
def test_the_label_of_a_tars_image_has_the_longest_stem(tmp_path, image, members, expected):
    files = {image: b"", **{name: text.encode() for name, text in members.items()}}
    assert list_sources([write_tar(tmp_path / "x.tar", files)])[0].label == expected


def test_labels_that_match_nothing_or_more_than_one_image_are_said_aloud(tmp_path):
    files = dict.fromkeys(["a.jpg", "b.0.jpg", "b.jpg", "c.1.jpg", "d.jpg"], b"")
    labels = {"b.cls": b"1", "c.cls": b"2", "c.1.cls": b"3", "lost.cls": b"4", "d.cls": b" \n"}
    notes = list_sources([write_tar(tmp_path / "x.tar", files | labels)]).notes
    said = {note.partition(": ")[2]: note for note in notes}
    assert said["lost.cls, d.cls"].startswith("2 labels (.cls) are empty or belong to no image")
    assert said["a.jpg, d.jpg"].startswith("2 images have no label (.cls) in a tar that has some")
    assert said["c.1.jpg"].startswith("1 image has several labels (.cls) that differ")
    assert said["b.0.jpg, b.jpg"].startswith("2 images share their label (.cls)")
    assert len(notes) == 4
    assert not list_sources([write_tar(tmp_path / "y.tar", {"a/x.jpg": b"", "a/y.jpg": b""})]).notes
    with pytest.raises(ValueError, match="'a.cls' has 5000 bytes; a label of at most 4096"):
        list_sources([write_tar(tmp_path / "z.tar", {"a.jpg": b"", "a.cls": bytes(5000)})])


def test_a_brace_pattern_names_many_tars(tmp_path):
    for i in range(11):
        write_tar(tmp_path / f"{i:03}.tar", {f"{i}/x.jpg": b"%d" % i})
    sources = list_sources([f"{tmp_path}/{{000..010}}.tar"])
    assert {image.key: sources.read(i) for i, image in enumerate(sources)} == {
        f"{i}/x.jpg": b"%d" % i for i in range(11)
    }
    with pytest.raises(ValueError, match="011.tar: does not exist"):
        list_sources([f"{tmp_path}/{{000..011}}.tar"])
    literal = write_files(tmp_path / "{a,b}", {"x.jpg": b""})
    assert keys(list_sources([literal])) == ["x.jpg"]


@pytest.mark.parametrize("cut", [-1, -512, 1536, 700])
def test_a_cut_tar_is_refused_even_between_two_members(tmp_path, cut):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    whole = path.read_bytes()[: 512 * 6 + 1024]  # two headers, two times two blocks, the end mark
    path.write_bytes(whole)
    assert len(list_sources([path])) == 2
    path.write_bytes(whole[:cut] if cut > 0 else whole[: 512 * 6 + (0 if cut == -512 else 100)])
    with pytest.raises(ValueError, match="x.tar: (has no end mark|is not a whole tar)"):
        list_sources([path])


@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"S", b"5"])
@pytest.mark.parametrize("size", [2**30, 2**62, 2**63 - 1, 2**63, 2**80])
def test_a_member_of_absurd_size_is_damage(tmp_path, kind, size):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"a" * 600, "b.jpg": b"b"})
    data = bytearray(path.read_bytes())
    data[124:136], data[156:157], data[148:156] = b"\x80" + size.to_bytes(11, "big"), kind, b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(ValueError, match="x.tar: "):
        list_sources([path])


def test_joined_compressed_and_repeating_tars_are_refused(tmp_path):
    one = write_tar(tmp_path / "one.tar", {"a.jpg": b"a"})
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one.read_bytes() * 2)
    with pytest.raises(ValueError, match="another tar follows the last member, near byte 1024"):
        list_sources([joined])
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(one, "a.jpg")
    with pytest.raises(ValueError, match="compressed with gzip"):
        list_sources([tmp_path / "x.tar.gz"])
    with tarfile.open(one, "a") as tar:
        tar.add(joined, "a.jpg")
    with pytest.raises(ValueError, match="holds 'a.jpg' twice"):
        list_sources([one])


def test_a_tar_that_shrank_after_listing_is_an_error_when_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"a" * 600})
    sources = list_sources([path])
    then = path.stat()
    os.truncate(path, 600)
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))  # else it is refused for its time
    with pytest.raises(OSError, match=r"x.tar: a.jpg: the file ends 512 bytes early"):
        sources.read(0)


def test_a_list_gives_keys_relative_to_itself_or_to_the_common_folder(tmp_path):
    photos = write_files(tmp_path / "photos", {"a/x.jpg": b"1", "b/y z.jpg": b"2"})
    beside = write_files(photos, {"list.txt": b"a/x.jpg\nb/../b/y z.jpg\r\n\n"}) / "list.txt"
    assert sorted((i.key, i.label) for i in list_sources([beside])) == [("a/x.jpg", "a"), ("b/y z.jpg", "b")]
    away = write_files(tmp_path / "lists", {"l.txt": f"{photos}/a/x.jpg\n{photos}/b/y z.jpg".encode()}) / "l.txt"
    assert keys(list_sources([away])) == ["a/x.jpg", "b/y z.jpg"]
    beside.write_text("a/x.jpg\nc/gone.jpg\n")
    with pytest.raises(ValueError, match="1 of 2 listed files do not exist, first .*c/gone.jpg"):
        list_sources([beside])
    with pytest.raises(ValueError, match="neither a folder, a tar nor"):
        list_sources([write_files(tmp_path, {"x.bin": b"\xff\xfe\x00"}) / "x.bin"])


def test_reading_works_from_many_threads_and_from_a_pickle(tmp_path):
    files = {f"{i:03}.jpg": bytes([i]) * (100 + i) for i in range(100)}
    sources = pickle.loads(pickle.dumps(list_sources([write_tar(tmp_path / "x.tar", files)])))
    with ThreadPoolExecutor(8) as pool:
        assert dict(zip(sources.keys, pool.map(sources.read, range(100)))) == files


@pytest.mark.parametrize("name, train, test", [("clothing-small", 1500, 372), ("eurosat-rgb", 10000, 2000)])
def test_the_data_sets_list_completely(name, train, test, real_file):
    path = real_file(f"data/{name}.tar")
    sources = list_sources([path], ["train/*"])
    assert len(sources) == train and len(list_sources([path])) == train + test
    assert len({image.label for image in sources}) == 10
    assert sources.read(0)[:2] == b"\xff\xd8"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name", ["n/b.jpg", "./c.jpg", "ü.jpg", "d" * 90 + "/" + "e" * 90 + ".jpg", "folder", "link.jpg"]
)
def test_headers_read_at_a_glance_are_those_that_tarfile_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: int, name: str
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        for member, size in (("a.jpg", 700), (name, 0 if name in ("folder", "link.jpg") else 512), ("z.jpg", 0)):
            info = tarfile.TarInfo(member)
            info.size = size
            info.type = {"folder": tarfile.DIRTYPE, "link.jpg": tarfile.SYMTYPE}.get(member, tarfile.REGTYPE)
            info.linkname = "a.jpg" * (member == "link.jpg")
            tar.addfile(info, io.BytesIO(bytes(size)))
    plain, found = tars.plain_headers(tmp_path / "x.tar"), tars.read_headers(tmp_path / "x.tar")
    assert (plain is not None) == (name in ("n/b.jpg", "./c.jpg") or name == "ü.jpg" and format != tarfile.PAX_FORMAT)
    monkeypatch.setattr(tars, "plain_headers", lambda path: None)
    assert tars.read_headers(tmp_path / "x.tar") == found
