"""The codebook of a computed map: the vectors that it compares tokens with, centroids or prompts, as a plain .npy in the cache."""

import hashlib
import io
from pathlib import Path

import numpy as np

from mrmae.common.backend import exists, read_bytes
from mrmae.common.files import publish
from mrmae.shards.format.spec import Array, TeacherSpec
from mrmae.shards.format.tail import tail_path


def codebook_path(path: Path, name: str) -> Path:
    """Where the codebook of the map of this name lies."""
    return path / "codebooks" / f"{name}.npy"


def kept_path(path: Path, spec: TeacherSpec) -> Path:
    """What is kept once beside a column, if anything is: a teacher's tail, or a computed map's codebook."""
    return codebook_path(path, spec.name) if spec.is_map else tail_path(path, spec.tail_name)


def write_codebook(path: Path, name: str, vectors: Array) -> None:
    """Store float32 [k, d] as the codebook of a map, replaced if there."""
    publish(codebook_path(path, name), as_npy(vectors), replace=True)


def codebook_sha256(vectors: Array) -> str:
    """The sha256 of the file that holds float32 [k, d]."""
    return hashlib.sha256(as_npy(vectors)).hexdigest()


def as_npy(vectors: Array) -> bytes:
    """float32 [k, d] as a .npy."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(vectors, "<f4"), allow_pickle=False)
    return out.getvalue()


def read_codebook(path: Path, name: str, sha256: str) -> Array:
    """float32 [k, d]. ValueError where the file is missing, or is not the one of this sha256."""
    file = codebook_path(path, name)
    data = read_bytes(file) if exists(file) else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{file}: {'damaged, its sha256 is not that of the plan' if data else 'missing'}; expected the vectors that map "
                         f"{name} was begun with; restore it, or run the same extract-features command again")  # fmt: skip
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), np.float32)
