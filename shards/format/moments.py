"""A file of a column's moments: float64 tensors, what they are of, and a seal over both."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mrmae.shards.format.shape import parsed
from mrmae.shards.format.spec import canonical_json


def stats_path(path: Path, column: str) -> Path:
    """Where a column's moments lie."""
    return path / "stats" / f"{column}.safetensors"


def seal_of(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Sha256 of what a file of moments says: its tensors with names, types and shapes, and what they are of."""
    told = {name: text for name, text in about.items() if name != "sha256"}
    return hashlib.sha256(canonical_json(told) + safetensors.torch.save(dict(tensors))).hexdigest()


def sealed_moments(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """The file: safetensors, with `about` and its seal as metadata."""
    return safetensors.torch.save(dict(tensors), {**about, "sha256": seal_of(tensors, about)})


def opened_moments(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of moments, and what they are of. ValueError where it is no such file, or not as it was written."""
    try:
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        tensors, about = safetensors.torch.load(data), parsed(header, dict[str, dict[str, Any]])["__metadata__"]
        seal = seal_of(tensors, about)
    except (ValueError, safetensors.SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"it cannot be read: {error}") from None
    if seal != about.get("sha256"):
        raise ValueError(
            f"it is not as it was written: its sha256 is {seal}, and {about.get('sha256', 'none')} stands in it"
        )
    return tensors, about
