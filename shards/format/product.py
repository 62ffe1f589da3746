"""Product codes: a token as a byte for each group of its principal components, and the codebook that tells what the bytes mean.

value = mean + sum over components k of entries[codes[group[k]], k] * basis[k]. Components are in the order of their variance and a group
is a run of them: short where variance is large, long where it is small, so that every byte is spent where it saves most. Product
quantisation (Jegou et al. 2011) after a rotation chosen as in OPQ (Ge et al. 2013, section 3.2), whose groups are of one length.
docs/format.md, "Product codes".
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mrmae.common.backend import exists, read_bytes
from mrmae.common.kmeans import fit_centroids, nearest_ids
from mrmae.shards.format.spec import Array

ENTRIES = 255  # of a group; the 256th code says that nothing was written
UNWRITTEN = 255
FITTED_TOKENS = 1 << 14  # 64 for every entry: three times as many gain 0.06 dB
LLOYD_ROUNDS = 10  # of Lloyd's; 25 gain 0.02 dB at most
LONGEST_GROUP = 64  # components
SCALAR_LOSS = 2.7  # how much worse a group of one component is than theory's best of long ones (Panter and Dite)
DECODED_AT_ONCE = 1 << 14  # tokens
KEPT = 8  # codebooks read, and their copies on a device


@dataclasses.dataclass(frozen=True, eq=False)
class ProductCodebook:
    """What product codes mean. entries: float32 [256, r], the last row NaN; group: int64 [r], which of a token's m codes decides on a component.

    basis: float32 [r, d], orthonormal rows; mean: float32 [d].
    """

    entries: Float[Tensor, "256 r"]
    group: Int64[Tensor, " r"]
    basis: Float[Tensor, "r d"]
    mean: Float[Tensor, " d"]

    @property
    def n_codes(self) -> int:
        """Codes per token, m."""
        return int(self.group[-1]) + 1

    @property
    def runs(self) -> list[slice]:
        """The components of every group."""
        ends = torch.bincount(self.group).cumsum(0).tolist()
        return [slice(a, b) for a, b in zip([0, *ends], ends)]

    def tensors(self) -> dict[str, Tensor]:
        """By name, as files and kernels take them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_bytes(self) -> bytes:
        """The file that holds it."""
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in self.tensors().items()})

    def told(self) -> dict[str, Any]:
        """What a plan says of the file: size and sha256."""
        data = self.to_bytes()
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}  # sorted, as a plan gives it back


def product_path(path: Path, column: str) -> Path:
    """Where the codebook of a column of product codes lies."""
    return path / "codebooks" / f"{column}.safetensors"


@functools.lru_cache(KEPT)
def read_product(file: Path, sha256: str) -> ProductCodebook:
    """The codebook in a file. ValueError where it is missing, or is not the one of this sha256."""
    data = read_bytes(file) if exists(file) else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{file}: {'damaged, its sha256 is not that of the plan' if data else 'missing'}; expected the codebook that the column "
                         "was written with, without which its codes mean nothing; restore it from a copy, or drop the column with inspect-cache "
                         "drop and extract it again")  # fmt: skip
    return ProductCodebook(**safetensors.torch.load(data))


@functools.lru_cache(KEPT)
def on_device(book: ProductCodebook, device: torch.device) -> ProductCodebook:
    """The codebook on a device."""
    return ProductCodebook(**{name: tensor.to(device) for name, tensor in book.tensors().items()})


# --- codes


def product_codes(tokens: Float[Tensor, "b l d"], book: ProductCodebook) -> UInt8[Tensor, "b l m"]:
    """The nearest entry of every group, 0 to 254."""
    book = on_device(book, tokens.device)
    components = (tokens.float() - book.mean) @ book.basis.T
    codes = torch.empty(*tokens.shape[:2], book.n_codes, dtype=torch.uint8, device=tokens.device)
    for code, run in enumerate(book.runs):
        flat = components[..., run].flatten(0, 1)
        codes[..., code] = nearest_ids(flat, book.entries[:ENTRIES, run]).view(tokens.shape[:2])
    return codes


def product_values(codes: UInt8[Tensor, "b l m"], book: ProductCodebook) -> Float[Tensor, "b l d"]:
    """What the codes stand for, float32; NaN where a token holds the sentinel."""
    book = on_device(book, codes.device)
    parts = [  # kernels/reference.py:decoded_rows is the same of some rows
        book.entries.gather(0, part[:, book.group].long()) @ book.basis + book.mean
        for part in torch.split(codes.flatten(0, 1), DECODED_AT_ONCE)
    ]
    return torch.cat(parts).view(*codes.shape[:2], len(book.mean))


# --- calibration


def fit_product(parts: Sequence[Float[Tensor, "_ l d"]], n_codes: int) -> ProductCodebook:
    """The codebook of these features, on the host: a function of them alone, whatever the number of threads."""
    with one_thread():
        tokens = torch.cat([part.flatten(0, 1).cpu() for part in parts]).float()
        mean, basis, variances = principal_components(tokens)
        groups = runs_of_components(variances, min(n_codes, tokens.shape[1]))
        basis = basis[: groups[-1][1]].contiguous()
        chosen = torch.linspace(0, len(tokens) - 1, min(len(tokens), FITTED_TOKENS), dtype=torch.float64).long()
        components = (tokens[chosen] - mean) @ basis.T
        entries = torch.full((ENTRIES + 1, len(basis)), torch.nan)
        for start, end in groups:
            found = fit_centroids(components[:, start:end].contiguous(), ENTRIES, rounds=LLOYD_ROUNDS)
            entries[:ENTRIES, start:end] = found[torch.arange(ENTRIES) % len(found)]
        group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([end - start for start, end in groups]))
    return ProductCodebook(entries, group, basis, mean)


@contextmanager
def one_thread() -> Iterator[None]:
    """While torch computes in one thread, so that sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def principal_components(
    tokens: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """(mean, orthonormal rows, their variances), the largest variance first; float32."""
    mean = tokens.double().mean(dim=0)
    scatter = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float64)
    for part in torch.split(tokens, DECODED_AT_ONCE):
        apart = part.double() - mean
        scatter += apart.T @ apart
    variances, columns = torch.linalg.eigh(scatter / len(tokens))
    return mean.float(), columns.flip(1).T.float().contiguous(), variances.flip(0).clamp(min=0).float()


def runs_of_components(variances: Float[Tensor, " d"], m: int) -> list[tuple[int, int]]:
    """Where each of m groups of components begins and ends: those that leave the least error by theory; the last components may be in none.

    A group of n Gaussian components at 255 entries leaves n * (their geometric mean) * 255^(-2 / n), if that is less than what they are.
    """
    w = np.maximum(variances.double().numpy(), max(float(variances[0]), 1e-30) * 1e-9)
    cost, best = costs_of_runs(w), np.full(len(w) + 1, np.inf)
    best[0], came = 0.0, []
    for _ in range(m):
        total = best[:, None] + cost
        came.append(total.argmin(axis=0))
        best = np.min(total, axis=0)
    left_out = np.append(np.cumsum(w[::-1])[::-1], 0.0)
    end, runs = int((best + left_out).argmin()), []
    for begin in reversed(came):
        runs.append((int(begin[end]), end))
        end = int(begin[end])
    return runs[::-1]


def costs_of_runs(w: Array) -> Array:
    """[d + 1, d + 1]: the error that components i to j leave as a group, infinite where that is none."""
    d = len(w)
    cost = np.full((d + 1, d + 1), np.inf)
    logs, sums = np.append(0.0, np.cumsum(np.log(w))), np.append(0.0, np.cumsum(w))
    for n in range(1, min(LONGEST_GROUP, d) + 1):
        i = np.arange(d + 1 - n)
        error = n * np.exp((logs[i + n] - logs[i]) / n) * math.exp(-2 * math.log(ENTRIES) / n)
        cost[i, i + n] = np.minimum(error * (SCALAR_LOSS if n == 1 else 1.0), sums[i + n] - sums[i])
    return cost
