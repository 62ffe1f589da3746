"""What storing costs real features, by teacher, tap and dtype: python benchmarks/bench_quantise.py [--data-root DIR] [--images 128].

Views of clothing photographs, for Galileo-nano of satellite tiles, cut and encoded as extract-features does. The quantiser is calibrated on
the first half of the images and judged on the second. `loudest`: the root mean square of the channel where it is largest, over the
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

from mrmae.extract.images import list_sources
from mrmae.extract.options import Options
from mrmae.extract.teachers import Teacher, build_teacher, parse_teacher
from mrmae.shards.format import DTYPES, ViewRecipe, calibrate, quality, quantise

CNN = "timm:mobilenetv2_100@{root}/weights/mobilenetv2_100_imagenet1k.safetensors?pad_type=same&mean=0.5&std=0.5&interpolation=bilinear"
DINO = "timm:vit_small_patch14_dinov2@{root}/weights/dinov2s_saliency_finetuned_fp16.safetensors"
GALILEO = (
    "timm:vit_tiny_patch16_224@{root}/weights/galileo_nano_s2rgb_p8.safetensors?embed_dim=128&depth=4&num_heads=8&patch_size=8&class_token=False"
    "&global_pool=&fc_norm=False&mean=-0.306276,-0.177525,-0.160025&std=1.589351,1.328435,1.334842"
)


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


def rows_of(name: str, teacher: Teacher, pixels: torch.Tensor) -> list[dict[str, Any]]:
    """One row per dtype."""
    tokens = torch.cat([teacher.forward(part).tokens for part in pixels.split(8)])
    first, second = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    loudest = channel_ratio(tokens)
    rows = []
    for dtype in DTYPES:
        q = calibrate(first, dtype=dtype)
        found = quality(second, *quantise(second, q), q)
        rows.append({"teacher": name, "weights": teacher.spec.weights, "tap": teacher.spec.tap, "width": teacher.spec.width,
                     "dtype": dtype, "standardised": q.standardised, **found,
                     "loudest": loudest})  # fmt: skip
    return rows


def channel_ratio(tokens: torch.Tensor) -> float:
    """The root mean square of the loudest channel over the median channel's."""
    loud = tokens.flatten(0, 1).double().square().mean(0).sqrt()
    return round(float(loud.max() / loud.median()), 1)


@click.command()
@click.option("--data-root", default=ROOT.parents[1] / "shared", type=click.Path(path_type=Path))
@click.option("--images", default=128, type=click.IntRange(2))
@click.option("--only", default="", help="Teachers whose name holds this.")
@click.option("--out", default=ROOT / "results" / "quantise.csv", type=click.Path(path_type=Path))
def main(data_root: Path, images: int, only: str, out: Path) -> None:
    """Print and append one row per teacher, tap and dtype."""
    click.echo(
        "| teacher | weights | tap | loudest | dtype | standardised | SNR dB | p99.9 of 1 - cos |\n| --- | --- | --- | ---: | --- | --- | ---: | ---: |"
    )
    about = machine("cpu")
    for subject in (subject for subject in SUBJECTS if only in subject.name):
        if (teacher := subject.teacher(data_root)) is None:
            continue
        rows = rows_of(subject.name, teacher, subject.pixels(data_root, images))
        for r in rows:
            click.echo(f"| {r['teacher']} | {r['weights']} | {r['tap']} | {r['loudest']} | {r['dtype']} | {'yes' if r['standardised'] else 'no'} | "
                       f"{r['snr_db']:.1f} | {r['p999_one_minus_cos']:.2g} |")  # fmt: skip
        facts = {"images": images, "torch": about["torch"], "commit": about["commit"], "date": about["date"]}
        append(out, [row | facts for row in rows])


if __name__ == "__main__":
    main()
