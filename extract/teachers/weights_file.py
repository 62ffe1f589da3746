"""What a file of weights is, by its first bytes, before any library sees it."""

import re
import stat
import zipfile
from pathlib import Path
from typing import Literal

Kind = Literal["safetensors", "torchscript", "checkpoint"]

FIRST_BYTES = 4096
LONGEST_HEADER = 100_000_000  # bytes of JSON: the limit of the safetensors format
EXPECTED = "weights as safetensors or a PyTorch checkpoint were expected"
AGAIN = "copy or download the file again"
# What other files begin with, and what to do with them.
OTHERS = {
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"BZh": ("a bzip2 archive", "unpack it"),
    b"\xfd7zXZ": ("an xz archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "unpack it"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"\x89HDF": ("an HDF5 file, as Keras writes", "take the weights made for PyTorch"),
    b"GGUF": ("a GGUF file", "take the weights made for PyTorch"),
    b"\x93NUMPY": ("a NumPy array", "take the weights made for PyTorch"),
    b"\x89PNG": ("a PNG image", "correct the path"),
    b"\xff\xd8\xff": ("a JPEG image", "correct the path"),
}


def kind_of(path: Path) -> Kind:
    """How the file's weights are stored. Reads its first bytes and a zip's list of names; nothing in it is loaded or run.

    Raises ValueError, in one line, where it cannot be weights: what it is instead and what to do.
    """
    head, size = first_bytes(path)
    if head[:4] == b"PK\x03\x04":
        return kind_of_zip(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "checkpoint"  # a pickle, as PyTorch wrote before 1.6
    told = what_text(head, size) or what_bytes(head)
    if told is None and head[8:9] == b"{":
        header = int.from_bytes(head[:8], "little")
        if 8 + header <= size and header <= LONGEST_HEADER:
            return "safetensors"
        told = f"safetensors with a header of {header:,} bytes in a file of {size:,}: cut off or damaged", AGAIN
    what, todo = told or (f"no weights: it begins with the bytes {head[:8].hex(' ')}", AGAIN)
    raise ValueError(f"{path}: is {what}; {EXPECTED}; {todo}")


def first_bytes(path: Path) -> tuple[bytes, int]:
    """The beginning of a regular file, and its size. Raises ValueError for anything else, without opening it."""
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise ValueError(f"{path}: is a folder; {EXPECTED}; give the file in it")
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path}: is no regular file (a pipe or device); {EXPECTED}; copy it to a file first")
        with open(path, "rb") as opened:
            return opened.read(FIRST_BYTES), about.st_size
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; expected weights as .safetensors, .pt, .pth or .bin; check the path"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {EXPECTED}; check the path") from None


def kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile has an error of every kind for damage
        raise ValueError(f"{path}: is a zip archive that is cut off or damaged; {EXPECTED}; {AGAIN}") from None
    if any(name.endswith("constants.pkl") for name in names):
        return "torchscript"
    if any(name.endswith("data.pkl") for name in names):
        return "checkpoint"
    held = ", ".join(map(repr, names[:3]))[:200] or "nothing"
    raise ValueError(f"{path}: is a zip archive that is no checkpoint (it holds {held}); {EXPECTED}; unpack it")


def what_text(head: bytes, size: int) -> tuple[str, str] | None:
    """What a text file is, and what to do; None for bytes that are no text."""
    if not size:
        return "empty", AGAIN
    if re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        return None
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if "\ufffd" in text[:-1]:  # the last character may be cut
        return None
    if text.startswith("version https://git-lfs"):
        stands_for = re.search(r"^size (\d{1,18})$", text, re.MULTILINE)
        content = f", in place of {int(stands_for[1]):,}" if stands_for else ""
        return f"a git-LFS pointer of {size:,} bytes{content}", "fetch the file itself with git lfs pull"
    if text[:5].lower() in ("<!doc", "<html", "<head"):
        title = re.search(r"<title>\s*([^<]{1,80})", text, re.IGNORECASE)
        named = f" titled {title[1].strip()!r}" if title else ""
        return f"an HTML page{named}: a download's error page, or a login", "download the file again"
    begins = f"that begins with {text[:40]!r}"
    if text.startswith("<"):
        return f"XML {begins}", "download the file again"
    if text.startswith(("{", "[")):
        return f"JSON text {begins}", "give the file with the weights themselves"
    return f"a text file {begins}", "give the file with the weights themselves"


def what_bytes(head: bytes) -> tuple[str, str] | None:
    """What another known file is, and what to do."""
    if not head.strip(b"\x00"):
        return "nothing but zeros at its beginning: a copy or download that broke off", AGAIN
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    return next((told for begins, told in OTHERS.items() if head.startswith(begins)), None)
