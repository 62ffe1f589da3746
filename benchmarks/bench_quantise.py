"""What storing costs real features, by teacher, tap and dtype: python benchmarks/bench_quantise.py [--data-root DIR] [--images 128].

Views of clothing photographs, cut and encoded as extract-features does. The quantiser is calibrated on the first half of the images and
judged on the second. ViTs have random weights and say so: their features know nothing and have no massive channels. Prints a
table for docs/format.md and appends to results/quantise.csv.
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench_extract import decode, images_of
from measure import ROOT, machine
from rows import append

from mrmae.extract.images import list_sources
from mrmae.extract.options import Options
from mrmae.extract.teachers import build_teacher, parse_teacher
from mrmae.shards.format import DTYPES, calibrate, quality, quantise

CNN = "timm:mobilenetv2_100@{root}/weights/mobilenetv2_100_imagenet1k.safetensors?pad_type=same&mean=0.5&std=0.5&interpolation=bilinear"
TEACHERS = (
    *(("mobilenetv2_100", f"{CNN}&tap={tap}") for tap in ("stage_3", "stage_4", "last", "head")),
    ("vit_tiny", "timm:vit_tiny_patch16_224/random"),
    ("vit_base", "timm:vit_base_patch16_224/random"),
)


def rows_of(name: str, text: str, pixels: torch.Tensor) -> list[dict[str, Any]]:
    """One row per dtype."""
    teacher = build_teacher(parse_teacher(f"t={text}"), grid=14, view_size=224, device="cpu", precision="fp32")
    tokens = torch.cat([teacher.forward(part).tokens for part in pixels.split(8)])
    first, second = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    rows = []
    for dtype in DTYPES:
        q = calibrate(first, dtype=dtype)
        found = quality(second, *quantise(second, q), q)
        rows.append({"teacher": name, "weights": teacher.spec.weights, "tap": teacher.spec.tap, "width": teacher.spec.width,
                     "dtype": dtype, "standardised": q.standardised, **found})  # fmt: skip
    return rows


@click.command()
@click.option("--data-root", default=ROOT.parents[1] / "shared", type=click.Path(path_type=Path))
@click.option("--images", default=128, type=click.IntRange(2))
@click.option("--only", default="", help="Teachers whose name holds this.")
@click.option("--out", default=ROOT / "results" / "quantise.csv", type=click.Path(path_type=Path))
def main(data_root: Path, images: int, only: str, out: Path) -> None:
    """Print and append one row per teacher, tap and dtype."""
    with tempfile.TemporaryDirectory() as work:
        folder = images_of(data_root / "data/clothing-small.tar", images, Path(work))
        pixels = torch.from_numpy(
            np.stack(
                decode(
                    list_sources([folder]), range(images), Options([folder], Path(work) / "c", device="cpu").resolved()
                )
            )
        )
    click.echo(
        "| teacher | weights | tap | dtype | standardised | SNR dB | p99.9 of 1 - cos |\n| --- | --- | --- | --- | --- | ---: | ---: |"
    )
    about = machine("cpu")
    for name, text in TEACHERS:
        if only not in name:
            continue
        rows = rows_of(name, text.format(root=data_root), pixels)
        for r in rows:
            click.echo(f"| {r['teacher']} | {r['weights']} | {r['tap']} | {r['dtype']} | {'yes' if r['standardised'] else 'no'} | "
                       f"{r['snr_db']:.1f} | {r['p999_one_minus_cos']:.2g} |")  # fmt: skip
        append(
            out,
            [
                row | {"images": images, "torch": about["torch"], "commit": about["commit"], "date": about["date"]}
                for row in rows
            ],
        )


if __name__ == "__main__":
    main()
