"""Pictures of patch tokens: PCA colours, k-means segments, and where the queries of an attentive probe look."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from matplotlib import colormaps
from torch import Tensor

from mrmae.common.kmeans import fit_centroids, nearest_ids
from mrmae.common.pictures import Pictures, Strip, as_bytes, content_rgb, draw_sheet, pca_rgb, publish_png

DRAWN_ROUNDS = 50


def kmeans(x: Float[Tensor, "n d"], k: int, *, seed: int) -> Int64[Tensor, "n"]:
    """Cluster of every row, numbered by falling size. Raises ValueError for more clusters than rows."""
    if k > len(x):
        raise ValueError(f"dense.clusters={k}: more clusters than {len(x)} tokens; expected at most that; lower it")
    x = x.double()
    at = nearest_ids(x, fit_centroids(x, k, rounds=DRAWN_ROUNDS, seed=seed))
    rank = torch.bincount(at, minlength=k).argsort(descending=True, stable=True).argsort()
    return rank[at]


def segments(tokens: Float[Tensor, "b l d"], grid: tuple[int, int], k: int, *, seed: int) -> Pictures:
    """k-means of all tokens together as colours, uint8 [b, *grid, 3]; one colour means one cluster everywhere.

    Tokens are layer-normalised and made unit vectors first, so that clusters follow directions.
    """
    flat = F.normalize(F.layer_norm(tokens.float(), tokens.shape[-1:]), dim=-1).flatten(0, 1)
    found = kmeans(flat, k, seed=seed).numpy()
    palette = colormaps["tab10" if k <= 10 else "tab20"]
    return as_bytes(torch.from_numpy(palette(found % palette.N)[:, :3].reshape(len(tokens), *grid, 3)))


def draw_dense(
    path: Path, pictures: UInt8[Tensor, "b h w 3"], tokens: Float[Tensor, "b l d"], grid: tuple[int, int], *,
    clusters: int, parts: int, seed: int, title: str,
) -> None:  # fmt: skip
    """Write one PNG: image, PCA colours, k-means segments of all images together and of each alone; a row per image."""
    tokens = tokens.float()
    each = [segments(one, grid, parts, seed=seed) for one in torch.split(tokens, 1)]
    columns = [
        Strip("image", pictures.numpy()),
        Strip("PCA", as_bytes(pca_rgb(tokens, grid)), "one colour means the same in every row"),
        Strip("PCA, content", as_bytes(content_rgb(tokens, grid)), "without the mean over the images at each position"),
        Strip(f"k-means, k = {clusters}", segments(tokens, grid, clusters, seed=seed), "of all images together"),
        Strip(f"k-means, k = {parts}", np.concatenate(each), "of each image alone: colours differ by row"),
    ]
    publish_png(
        path,
        draw_sheet(columns, title=title, notes=["PCA and first k-means: over the patch tokens of all these images."]),
    )


def draw_attention(
    path: Path, pictures: UInt8[Tensor, "b h w 3"], attention: Float[Tensor, "b m l"], grid: tuple[int, int], *, title: str,
    shown_images: int = 6,
) -> None:  # fmt: skip
    """Write one PNG: image, mean attention of all queries, and of the `shown` queries that are most concentrated."""
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(-1).mean(0)
    chosen = entropy.argsort()[:shown_images].tolist()
    columns = [Strip("image", pictures.numpy()), Strip("mean of queries", attention_heat(attention.mean(1), grid))]
    peaks = (attention.amax(-1) * attention.shape[-1]).mean(0)  # over what uniform attention would give
    columns += [
        Strip(f"query {i}", attention_heat(attention[:, i], grid), f"peak {peaks[i]:.1f} x uniform") for i in chosen
    ]
    note = (f"Each map from its own minimum (dark) to its own maximum (yellow); the {len(chosen)} of {attention.shape[1]} queries "
            "with the lowest entropy.")  # fmt: skip
    publish_png(path, draw_sheet(columns, title=title, notes=[note]))


def attention_heat(weights: Float[Tensor, "b l"], grid: tuple[int, int]) -> Pictures:
    """Weights as colours, uint8 [b, *grid, 3], each image from its own minimum to its own maximum."""
    low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    scaled = ((weights - low) / (high - low).clamp_min(1e-12)).reshape(-1, *grid).numpy()
    return as_bytes(torch.from_numpy(colormaps["viridis"](scaled)[..., :3]))
