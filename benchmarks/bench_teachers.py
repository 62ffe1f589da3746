"""What tokens and attention maps of real teachers are like: python benchmarks/bench_teachers.py [--data-root DIR] [--images 32].

The subjects of bench_quantise.py, and DINOv2-S/14 beside the same model with random weights. Weights that are not there are said and left
out. Per teacher, over all tokens of all images:

    loudest, loudest_centred   root mean square of the loudest channel over the median channel's, with and without the channels' means
    long_tokens, longest       share of tokens whose norm is above twice the median norm (registers take such tokens); the longest, in medians
    attention_quarter          share of the CLS attention on the quarter of the patches that has most: 0.25 is uniform. That quarter is what
                               focused mimicking shows the student, and the share is its weight in a loss with `focus: true`
    attention_on_long          share of the CLS attention on long tokens, over their share: above 1 they attract it
    regrid_cos, regrid_attention   with the grid of the cache (positions interpolated, patch 14 at 196 px) against the model's native 37 x 37
                               (518 px) resampled to that grid: mean cosine of tokens, both centred, and mean correlation of attention

Prints a table for docs/format.md and appends to results/teachers.csv.
"""

from pathlib import Path
from typing import Any

import click
import torch
from bench_quantise import DINO, SUBJECTS, Subject, channel_ratio
from measure import ROOT, machine
from rows import append
from torch import Tensor

from mrmae.extract.teachers import Features, Teacher

RANDOM = Subject("vit_small_dinov2", "timm:vit_small_patch14_dinov2/random")
LONG = 2.0  # medians


def features_of(teacher: Teacher, pixels: Tensor) -> Features:
    """Of all images."""
    parts = [teacher.forward(part) for part in pixels.split(8)]

    def joined(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    return Features(*(joined(name) for name in ("tokens", "cls", "attention", "norm")))


def measures(found: Features) -> dict[str, float]:
    """What one pass of a teacher shows."""
    tokens, norm = found.tokens, found.tokens.norm(dim=-1)
    long = norm > LONG * norm.median()
    told = {
        "loudest": channel_ratio(tokens),
        "loudest_centred": channel_ratio(tokens - tokens.mean((0, 1))),
        "long_tokens": float(long.double().mean()),
        "longest": float(norm.max() / norm.median()),
    }
    if found.attention is not None:
        share = found.attention / found.attention.sum(1, keepdim=True)
        quarter = share.sort(descending=True).values[:, : share.shape[1] // 4]
        told["attention_quarter"] = float(quarter.sum(1).mean())
        if long.any():
            told["attention_on_long"] = float(share[long].sum() / len(share) / long.double().mean())
    return told


def regridded(found: Features, native: Features) -> dict[str, float]:
    """How near the cache's grid comes to the native one."""
    centred = [x.tokens - x.tokens.mean((0, 1)) for x in (found, native)]
    told = {"regrid_cos": float(torch.cosine_similarity(*centred, dim=-1).mean())}
    if found.attention is not None and native.attention is not None:
        maps = [x - x.mean(1, keepdim=True) for x in (found.attention, native.attention)]
        told["regrid_attention"] = float(torch.cosine_similarity(*maps, dim=1).mean())
    return told


@click.command()
@click.option("--data-root", default=ROOT.parents[1] / "shared", type=click.Path(path_type=Path))
@click.option("--images", default=32, type=click.IntRange(2))
@click.option("--only", default="", help="Teachers whose name holds this.")
@click.option("--out", default=ROOT / "results" / "teachers.csv", type=click.Path(path_type=Path))
def main(data_root: Path, images: int, only: str, out: Path) -> None:
    """Print and append one row per teacher and tap."""
    about = machine("cpu")
    facts = {"images": images, "torch": about["torch"], "commit": about["commit"], "date": about["date"]}
    for subject in (subject for subject in (*SUBJECTS, RANDOM) if only in subject.name):
        if (teacher := subject.teacher(data_root)) is None:
            continue
        pixels = subject.pixels(data_root, images)
        found = features_of(teacher, pixels)
        told = measures(found)
        if teacher.spec.tap == "pre_tail" and subject.address in (f"{DINO}?tap=pre_tail", RANDOM.address):
            more = ("&" if "?" in subject.address else "?") + "input_size=518"
            native = subject.teacher(data_root, more)
            assert native is not None
            told |= regridded(found, features_of(native, pixels))
        row = {"teacher": subject.name, "weights": teacher.spec.weights, "tap": teacher.spec.tap}
        row |= {name: round(value, 4) for name, value in told.items()}
        click.echo(" | ".join(f"{name} {value}" for name, value in row.items()))
        append(out, [row | facts])


if __name__ == "__main__":
    main()
