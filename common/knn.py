"""Weighted k-nearest-neighbour classification by cosine similarity (DINO, arXiv 2104.14294), for many k in one pass."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

TEST_CHUNK = 256
TRAIN_CHUNK = 65_536  # similarities of a chunk: 64 MB


def knn_predict(
    train: Float[Tensor, "n d"], labels: Int64[Tensor, "n"], test: Float[Tensor, "m d"], *,
    ks: Sequence[int], temperature: float, n_classes: int, centre: bool = False,
) -> dict[int, Int64[Tensor, "m"]]:  # fmt: skip
    """The predicted class of every test row, for each k: the largest sum of exp(cos / T) over the k nearest train rows.

    centre: subtract the train part's mean from both first. Memory is bounded by chunks of both parts.
    Computed where `train` is, returned on the CPU.
    Raises ValueError for a k above the number of train rows.
    """
    if max(ks) > len(train):
        raise ValueError(
            f"k-NN: k = {max(ks)} of {len(train)} train images; expected at most all of them; lower knn.ks"
        )
    mean = train.mean(0) if centre else torch.zeros_like(train[0])
    train, test = F.normalize(train - mean, dim=1), F.normalize(test - mean, dim=1)
    predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
    for rows in torch.split(test, TEST_CHUNK):
        cosine, ids = nearest_rows(rows, train, max(ks))
        weights = ((cosine - 1) / temperature).exp()  # the common factor exp(1 / T) would overflow at small T
        for k in ks:
            votes = rows.new_zeros(len(rows), n_classes).scatter_add_(1, labels[ids[:, :k]], weights[:, :k])
            predicted[k].append(votes.argmax(1))
    return {k: torch.cat(parts).cpu() for k, parts in predicted.items()}


def nearest_rows(
    rows: Float[Tensor, "m d"], train: Float[Tensor, "n d"], k: int
) -> tuple[Float[Tensor, "m k"], Int64[Tensor, "m k"]]:
    """Cosine and index of the k nearest train rows, nearest first; both inputs are unit vectors."""
    cosine, ids = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for first in range(0, len(train), TRAIN_CHUNK):
        found = rows @ train[first : first + TRAIN_CHUNK].T
        both = torch.cat([cosine, found], 1)
        index = torch.cat(
            [ids, torch.arange(first, first + found.shape[1], device=rows.device).expand(len(rows), -1)], 1
        )
        cosine, at = both.topk(min(k, both.shape[1]), dim=1)
        ids = index.gather(1, at)
    return cosine, ids
