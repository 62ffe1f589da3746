"""k-means ends where it must, from the same tokens the same, and does not mind tokens that are equal."""

import torch

from mrmae.common.kmeans import fit_centroids, nearest_ids


def test_lloyd_ends_where_every_centroid_is_the_mean_of_its_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = 10 * torch.randn(4, 3, generator=generator)
    tokens = (middles[:, None] + 0.1 * torch.randn(4, 50, 3, generator=generator)).flatten(0, 1)
    centroids = fit_centroids(tokens, 4, rounds=20)
    ids = nearest_ids(tokens, centroids)
    means = torch.stack([tokens[ids == i].mean(0) for i in range(4)])
    assert torch.allclose(centroids, means, atol=1e-5) and torch.bincount(ids).tolist() == [50] * 4
    assert torch.equal(fit_centroids(tokens, 4, rounds=20), centroids)
    apart = torch.cdist(tokens.double(), centroids.double()).argmin(1)
    assert torch.equal(apart, ids)


def test_there_are_no_more_centroids_than_different_tokens() -> None:
    tokens = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(100, 1)
    assert sorted(fit_centroids(tokens, 3, rounds=20).flatten().tolist()) == [0, 1]
