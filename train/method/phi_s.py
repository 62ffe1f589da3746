"""PHI-S: a rotation and one scale that give every channel of a teacher the same variance (RADIO; formula only).

`phi_s(x) = H U^T (x - mean) / sqrt(mean eigenvalue)`, U the eigenvectors of the covariance, H an orthonormal Hadamard matrix.
Distances between tokens keep their proportions, which per-channel scaling does not.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def phi_s(covariance: Float[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The matrix `H U^T / sqrt(mean eigenvalue)`; the sign of every eigenvector is fixed by its largest entry.

    Raises ValueError for widths without a Hadamard matrix here, and for a covariance without any variance.
    """
    values, vectors = torch.linalg.eigh(covariance.detach().double().cpu())
    if not values.mean() > 0:
        raise ValueError(
            "phi_s: the covariance has no variance; features that vary were expected; check the cache's column"
        )
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    rotation: Tensor = hadamard(len(values)) @ (vectors * largest.sign()).T
    scaled: Tensor = rotation / values.mean().sqrt()
    return scaled


def hadamard(n: int) -> Float64[Tensor, "n n"]:
    """An orthonormal matrix whose entries are all +-1 / sqrt(n), from Paley's and Sylvester's constructions.

    Covers the widths of common teachers (192, 384, 768, 1024, 1280, 1408, ...). Raises ValueError for the others.
    """
    core, doublings = n, 0
    while (matrix := paley(core)) is None:
        if core % 2 or core < 2:
            raise ValueError(
                f"phi_s: {n} channels have no Hadamard matrix here; a multiple of 4 like 192, 384, 768 or 1024 was expected; "
                "use transform channel or ln0"
            )
        core, doublings = core // 2, doublings + 1
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


def paley(n: int) -> Float64[Tensor, "n n"] | None:
    """A Hadamard matrix of +-1 of order n = 1, n = q + 1 (q prime, 3 mod 4) or n = 2 (q + 1) (q prime, 1 mod 4), else None."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 4 == 0 and is_prime(n - 1):  # then n - 1 is 3 mod 4
        return bordered(n - 1, -1.0) + torch.eye(n, dtype=torch.float64)
    q = n // 2 - 1
    if n % 4 == 0 and q % 4 == 1 and is_prime(q):
        sign, swap = (
            torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(),
            torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double(),
        )
        return torch.kron(bordered(q, 1.0), sign) + torch.kron(torch.eye(q + 1, dtype=torch.float64), swap)
    return None


def bordered(q: int, corner: float) -> Float64[Tensor, "q+1 q+1"]:
    """Jacobsthal's matrix of the quadratic residues mod q, with a border of ones (the column times `corner`)."""
    index = torch.arange(q)
    residue = torch.full((q,), -1.0, dtype=torch.float64)
    residue[(index * index) % q] = 1.0
    residue[0] = 0.0
    whole = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    whole[0, 1:], whole[1:, 0] = 1.0, corner
    whole[1:, 1:] = residue[(index[:, None] - index) % q]
    return whole


def is_prime(n: int) -> bool:
    """True for primes, by trial division."""
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
