"""k-means of tokens, a function of the tokens and a seed: k-means++ seeding, then Lloyd's rounds (Arthur and Vassilvitskii 2007, section 2.2)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

DISTANCES_AT_ONCE = 2**25  # 128 MB of float32


def fit_centroids(
    tokens: Float[Tensor, "n d"],
    k: int,
    *,
    rounds: int,
    seed: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> Float[Tensor, "m d"]:
    """k centroids on the tokens' device, after Lloyd's `rounds`, fewer where nothing moves; as many as tokens differ where these are fewer than k.

    A centroid that lost all its tokens stays.
    """
    centroids = seeded(tokens, k, seed)
    host, before = tokens.cpu(), None
    for _ in range(rounds):
        ids = nearest_ids(tokens, centroids).cpu()
        progress(1)
        if before is not None and torch.equal(ids, before):
            break
        before, counts = ids, torch.bincount(ids, minlength=len(centroids))
        sums = torch.zeros_like(centroids, device="cpu").index_add_(
            0, ids, host
        )  # on the host: its sums have one order
        means = sums / counts.clamp(min=1)[:, None]
        centroids = torch.where((counts > 0)[:, None], means, centroids.cpu()).to(tokens.device)
    return centroids


def seeded(tokens: Float[Tensor, "n d"], k: int, seed: int) -> Float[Tensor, "m d"]:
    """k-means++: each next centroid is a token drawn with the probability of its squared distance to the nearest one so far."""
    draws = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = [min(int(draws[0] * len(tokens)), len(tokens) - 1)]
    apart = torch.full((len(tokens),), torch.inf, device=tokens.device)
    for draw in draws[1:]:
        apart = torch.minimum(apart, (tokens - tokens[chosen[-1]]).square().sum(-1))
        reached = apart.double().cpu().cumsum(0)
        if not reached[-1] > 0:
            break
        chosen.append(int(torch.searchsorted(reached, draw * reached[-1], right=True).clamp(max=len(tokens) - 1)))
    return tokens[chosen]


def nearest_ids(tokens: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"]) -> Int64[Tensor, "n"]:
    """Which centroid is nearest by Euclidean distance."""
    half = centroids.square().sum(-1) / 2
    parts = torch.split(tokens, max(1, DISTANCES_AT_ONCE // len(centroids)))
    return torch.cat([(part @ centroids.T - half).argmax(-1) for part in parts])
