"""What is no file of weights is told by its first bytes, before a library sees it."""

import io
import os
import zipfile

import pytest

from mrmae.extract.teachers.weights import load_weights

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 346284714\n"


HUGE = (2**40).to_bytes(8, "little") + b'{"a":{}}' + bytes(64)


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, "x")
    return out.getvalue()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "is empty; .*; copy or download the file again"),
        (
            LFS,
            "is a git-LFS pointer of 134 bytes, in place of 346,284,714; .*; fetch the file itself with git lfs pull",
        ),
        (
            b"\n<!DOCTYPE html><html><title> Sign in </title>",
            "is an HTML page titled 'Sign in': a download's error page",
        ),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is XML that begins with '<.xml"),
        (b'{"error": "Repository not found"}', "is JSON text that begins with"),
        (b'{"abcde{": 1}', "is JSON text that begins with"),  # a brace where safetensors has its own
        ("# Größe\n".encode() * 900, "is a text file that begins with '# Größe"),
        (zipped("photo.jpg"), "is a zip archive that is no checkpoint .it holds 'photo.jpg'.; .*; unpack it"),
        (zipped("a/data.pkl")[:-9], "is a zip archive that is cut off or damaged"),
        (zipped("a/data.pkl"), "cannot be read as a PyTorch checkpoint"),
        (b"\x1f\x8b\x08" + bytes(99), "is a gzip archive; .*; unpack it"),
        (bytes(257) + b"ustar" + bytes(99), "is a tar archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file, as Keras writes"),
        (bytes(9999), "is nothing but zeros at its beginning"),
        (bytes(range(99)), "is no weights: it begins with the bytes 00 01 02"),
        (HUGE, "is safetensors with a header of 1,099,511,627,776 bytes in a file of 80"),
        (b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.", "cannot be read as|needs more than tensors"),
        (b"\x80\x04\x95\x00", "cannot be read as a PyTorch checkpoint .its pickle is cut off, damaged"),
    ],
)
def test_what_is_no_weights_is_named_in_one_line_without_advice_to_trust_it(tmp_path, content, told, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        load_weights(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "weights_only" not in text and len(text) < 400


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth: is no regular file .a pipe or device."):
        load_weights(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is a folder; .*; give the file in it"):
        load_weights(tmp_path)
