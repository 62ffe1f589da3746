"""What storing costs real features, by teacher, tap and dtype: python benchmarks/bench_quantise.py [--data-root DIR] [--images 128].

    python benchmarks/bench_quantise.py --images 320 --trials     # product codes, and other codes of as many bytes

Views of clothing photographs, for Galileo-nano of satellite tiles, cut and encoded as extract-features does. The quantiser is calibrated on
the first half of the images, of more than 128 on all but 64, and judged on the others. `loudest`: the root mean square of the channel where it is largest, over the
median channel's: massive channels are above 10. A ViT with random weights stands beside the trained ones and says so. Weights that
are not there are said and left out. Prints a table for docs/format.md and appends to results/quantise.csv.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from bench_extract import decode, images_of
from measure import ROOT, machine
from rows import append

from mrmae.common.kmeans import fit_centroids, nearest_ids
from mrmae.extract.images import list_sources
from mrmae.extract.options import Options
from mrmae.extract.teachers import Teacher, build_teacher, parse_teacher
from mrmae.shards.format import DTYPES, Quantiser, ViewRecipe, calibrate, dequantise, quality, quantise
from mrmae.shards.format.product import ENTRIES, FITTED_TOKENS, LLOYD_ROUNDS, principal_components

CNN = "timm:mobilenetv2_100@{root}/weights/mobilenetv2_100_imagenet1k.safetensors?pad_type=same&mean=0.5&std=0.5&interpolation=bilinear"
DINO = "timm:vit_small_patch14_dinov2@{root}/weights/dinov2s_saliency_finetuned_fp16.safetensors"
GALILEO = (
    "timm:vit_tiny_patch16_224@{root}/weights/galileo_nano_s2rgb_p8.safetensors?embed_dim=128&depth=4&num_heads=8&patch_size=8&class_token=False"
    "&global_pool=&fc_norm=False&mean=-0.306276,-0.177525,-0.160025&std=1.589351,1.328435,1.334842"
)


JUDGED = 64  # images at most, of more than twice as many
TRIED_BESIDE = "pq"
MOST_RESIDUAL = 16  # codebooks of whole tokens: each takes seconds to fit


class Subject(NamedTuple):
    """A teacher, and the images that it is shown."""

    name: str
    address: str
    tar: str = "clothing-small.tar"
    size: int = 224
    grid: int = 14

    def teacher(self, root: Path, more: str = "") -> Teacher | None:
        """Built; None, said aloud, where its weights are not there."""
        text = self.address.format(root=root)
        if "@" in text and not (file := Path(text.partition("@")[2].partition("?")[0])).is_file():
            click.echo(f"LEFT OUT: {self.name}: {file} is not there", err=True)
            return None
        request = parse_teacher(f"t={text}{more}")
        return build_teacher(request, grid=self.grid, view_size=self.size, device="cpu", precision="fp32")

    def pixels(self, root: Path, n: int) -> torch.Tensor:
        """Views [n, h, w, 3] of training images."""
        with tempfile.TemporaryDirectory() as work:
            folder = images_of(root / "data" / self.tar, n, Path(work))
            options = Options(
                [folder], Path(work) / "c", device="cpu", recipe=ViewRecipe(self.size), grid=self.grid
            ).resolved()
            return torch.from_numpy(np.stack(decode(list_sources([folder]), range(n), options)))


SUBJECTS = (
    *(Subject("mobilenetv2_100", f"{CNN}&tap={tap}") for tap in ("stage_3", "stage_4", "last", "head")),
    *(Subject("dinov2s_saliency", f"{DINO}?tap={tap}") for tap in ("block_6", "pre_tail")),
    Subject("galileo_nano", GALILEO, "eurosat-rgb.tar", 64, 8),
    Subject("vit_tiny", "timm:vit_tiny_patch16_224/random"),
)


def rows_of(name: str, teacher: Teacher, pixels: torch.Tensor, *, trials: bool = False) -> list[dict[str, Any]]:
    """One row per dtype. trials: also of codes that no cache has, of as many bytes as `pq`."""
    tokens = torch.cat([teacher.forward(part).tokens for part in pixels.split(8)])
    at = max(len(tokens) // 2, len(tokens) - JUDGED)
    first, second = tokens[:at], tokens[at:]
    about = {"teacher": name, "weights": teacher.spec.weights, "tap": teacher.spec.tap, "width": teacher.spec.width}
    loudest, width, rows = channel_ratio(tokens), teacher.spec.width, []
    for dtype, stored in DTYPES.items():
        q = calibrate(first, dtype=dtype)
        codes, scale = quantise(second, q)
        found = {"standardised": q.standardised, **quality(second, codes, scale, q), "loudest": loudest}
        sizes = {"bytes_per_token": stored.token_bytes(width) + 2 * stored.scaled}
        rows.append(
            {**about, "dtype": dtype, **found, **sizes, "one_minus_cos": apart(second, dequantise(codes, scale, q))}
        )
        for trial, function in TRIALS.items() if trials and dtype == TRIED_BESIDE else ():
            if function is residual and stored.codes(width) > MOST_RESIDUAL:
                continue
            values = function(first, second, stored.codes(width))
            found = {
                "standardised": False,
                **quality(second, values.half(), None, Quantiser("float16")),
                "loudest": loudest,
            }
            sizes = {"bytes_per_token": stored.token_bytes(width)}
            rows.append({**about, "dtype": trial, **found, **sizes, "one_minus_cos": apart(second, values)})
    return rows


def apart(x: torch.Tensor, y: torch.Tensor) -> float:
    """The mean of 1 - cos over all tokens."""
    return float(f"{1 - torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean():.4g}")


# --- codes that lost: of m bytes per token, fitted to `first`; what they make of `second`


def equal_channels(first: torch.Tensor, second: torch.Tensor, m: int) -> torch.Tensor:
    """Product quantisation as it is usual: groups of as many neighbouring channels each, no rotation."""
    d = first.shape[-1]
    size = -(-d // m)
    groups = [range(start, min(start + size, d)) for start in range(0, d, size)]
    return grouped(first, second, first.flatten(0, 1).mean(0), torch.eye(d), groups)


def equal_components(first: torch.Tensor, second: torch.Tensor, m: int) -> torch.Tensor:
    """OPQ's parametric solution (Ge et al. 2013, section 3.2): as many components each, the products of variances balanced."""
    mean, basis, variances = principal_components(first.flatten(0, 1))
    groups: list[list[int]] = [[] for _ in range(m)]
    size, logs = -(-len(mean) // m), [0.0] * m
    for k, variance in enumerate(variances.clamp(min=1e-12).log().tolist()):
        of = min((g for g in range(m) if len(groups[g]) < size), key=logs.__getitem__)
        groups[of].append(k)
        logs[of] += variance
    return grouped(first, second, mean, basis, groups)


def grouped(
    first: torch.Tensor, second: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor, groups: list[Any]
) -> torch.Tensor:
    """Product codes of these groups of components."""
    x, y = (((tokens - mean) @ basis.T).flatten(0, 1) for tokens in (some(first), second))
    values = torch.zeros_like(y)
    for group in map(list, groups):
        centroids = fit_centroids(x[:, group].contiguous(), ENTRIES, rounds=LLOYD_ROUNDS)
        values[:, group] = centroids[nearest_ids(y[:, group].contiguous(), centroids)]
    return (values @ basis + mean).view(second.shape)


def residual(first: torch.Tensor, second: torch.Tensor, m: int) -> torch.Tensor:
    """Residual quantisation: m codebooks of whole tokens, each of what those before it left."""
    mean = first.flatten(0, 1).mean(0)
    x, y = (some(first) - mean).flatten(0, 1), (second - mean).flatten(0, 1)
    left = y.clone()
    for _ in range(m):
        centroids = fit_centroids(x, ENTRIES, rounds=LLOYD_ROUNDS)
        x = x - centroids[nearest_ids(x, centroids)]
        left = left - centroids[nearest_ids(left, centroids)]
    return (y - left + mean).view(second.shape)


def int8_components(first: torch.Tensor, second: torch.Tensor, m: int) -> torch.Tensor:
    """The m - 2 largest components in int8 with a scale of two bytes, the others left out."""
    mean, basis, variances = principal_components(first.flatten(0, 1))
    kept = max(m - 2, 1)
    x = (second - mean) @ basis[:kept].T / variances[:kept].sqrt()
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return ((x / step).round() * step * variances[:kept].sqrt()) @ basis[:kept] + mean


def some(tokens: torch.Tensor) -> torch.Tensor:
    """[1, n, d]: as many tokens, evenly spaced, as a codebook is fitted to."""
    flat = tokens.flatten(0, 1)
    return flat[torch.linspace(0, len(flat) - 1, min(len(flat), FITTED_TOKENS), dtype=torch.float64).long()][None]


TRIALS = {
    "equal groups of channels": equal_channels,
    "equal groups of components": equal_components,
    "residual": residual,
    "int8 of components": int8_components,
}


def channel_ratio(tokens: torch.Tensor) -> float:
    """The root mean square of the loudest channel over the median channel's."""
    loud = tokens.flatten(0, 1).double().square().mean(0).sqrt()
    return round(float(loud.max() / loud.median()), 1)


@click.command()
@click.option("--data-root", default=ROOT.parents[1] / "shared", type=click.Path(path_type=Path))
@click.option("--images", default=128, type=click.IntRange(2))
@click.option("--only", default="", help="Teachers whose name or address holds this.")
@click.option("--trials", is_flag=True, help="Also codes that no cache has, of as many bytes as pq.")
@click.option("--out", default=ROOT / "results" / "quantise.csv", type=click.Path(path_type=Path))
def main(data_root: Path, images: int, only: str, trials: bool, out: Path) -> None:
    """Print and append one row per teacher, tap and dtype."""
    click.echo(
        "| teacher | weights | tap | loudest | dtype | standardised | SNR dB | p99.9 of 1 - cos | bytes | mean 1 - cos |\n| --- | --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: |"
    )
    about = machine("cpu")
    for subject in (s for s in SUBJECTS if only in f"{s.name} {s.address}"):
        if (teacher := subject.teacher(data_root)) is None:
            continue
        rows = rows_of(subject.name, teacher, subject.pixels(data_root, images), trials=trials)
        for r in rows:
            click.echo(f"| {r['teacher']} | {r['weights']} | {r['tap']} | {r['loudest']} | {r['dtype']} | {'yes' if r['standardised'] else 'no'} | "
                       f"{r['snr_db']:.1f} | {r['p999_one_minus_cos']:.2g} | {r['bytes_per_token']} | {r['one_minus_cos']:.2g} |")  # fmt: skip
        facts = {"images": images, "torch": about["torch"], "commit": about["commit"], "date": about["date"]}
        append(out, [row | facts for row in rows])


if __name__ == "__main__":
    main()
