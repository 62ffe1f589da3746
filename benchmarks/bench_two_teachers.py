"""A whole extraction with two teachers beside the forward of both alone: python benchmarks/bench_two_teachers.py

    python benchmarks/bench_two_teachers.py --images 8192                     # two random ViT-B/16, this machine's device
    python benchmarks/bench_two_teachers.py --device cpu --images 24 --teacher a=timm:vit_tiny_patch16_224/random

The forward is `Teacher.forward` of both on views that lie in memory, at the extraction's batch size: uint8 in, normalised, tokens out.
The extraction is the command's, from listing the images to the manifest, without building the teachers; its images are JPEGs of blocks and noise in
one folder, each with bytes of its own. Rounds take turns. One row is appended to results/two_teachers.csv, or `--out`.
"""

import io
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench_extract import spent, timed_building
from bench_train import TEACHERS
from measure import ROOT, append, machine
from PIL import Image

from mrmae.extract.options import Options
from mrmae.extract.run import extract_features
from mrmae.extract.teachers import Teacher, build_teacher, parse_teacher
from mrmae.shards.format import ViewRecipe

COLUMNS = (
    "teachers,images,size,batch,precision,forward_ms,extract_ms,ratio,ratio_min,ratio_max,images_per_s,build_s,rounds,load,device,torch,triton,"
    "commit,date"
).split(",")
DISTINCT = 256  # pictures; files differ in bytes behind the picture


def write_images(folder: Path, n: int, side: int) -> None:
    """`n` JPEG files, a little larger than a view."""
    rng = np.random.default_rng(0)
    made: list[bytes] = []
    for _ in range(min(n, DISTINCT)):
        coarse = rng.integers(0, 224, (side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
        pixels = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:side, :side] + rng.integers(
            0, 32, (side, side, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=90)
        made.append(file.getvalue())
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:06d}.jpg").write_bytes(made[i % len(made)] + i.to_bytes(4, "big"))


def forward_seconds(teachers: list[Teacher], n: int, batch: int, size: int) -> float:
    """Seconds for `n` images through all teachers, alone."""
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)

    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def whole() -> None:
        for _ in range(-(-n // batch)):
            for teacher in teachers:
                teacher.forward(on_device)
        settle()

    on_device = pixels.to(next(teachers[0].tower.module.parameters()).device)
    for teacher in teachers:
        teacher.forward(on_device)
    settle()
    return spent(whole)[0] * n / (-(-n // batch) * batch)


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--images", default=4096)
@click.option("--size", default=224)
@click.option("--grid", default=14)
@click.option("--batch-size", type=int, help="[default: 256 on CUDA, 8 elsewhere]")
@click.option("--teacher", "texts", multiple=True, default=TEACHERS)
@click.option("--rounds", default=2)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "results" / "two_teachers.csv")
def main(device: str, images: int, size: int, grid: int, batch_size: int | None, texts: tuple[str, ...], rounds: int, out: Path) -> None:  # fmt: skip
    """Time both in turns, print and append the row."""
    cuda = device.startswith("cuda")
    batch = batch_size or (256 if cuda else 8)
    with tempfile.TemporaryDirectory() as work:
        write_images(Path(work) / "images", images, size * 8 // 7)
        how: dict[str, Any] = {
            "teachers": texts,
            "device": device,
            "batch_size": batch,
            "recipe": ViewRecipe(size),
            "grid": grid,
        }
        resolved = Options([Path(work) / "images"], Path(work) / "none", **how).resolved()
        precision = resolved.precision
        teachers = [
            build_teacher(parse_teacher(t), grid=grid, view_size=size, device=device, precision=precision)
            for t in texts
        ]
        alone, whole, building = [], [], []
        for i in range(rounds):
            alone.append(forward_seconds(teachers, images, batch, size))
            with timed_building() as built:
                options = Options([Path(work) / "images"], Path(work) / f"cache{i}", **how)
                took = spent(lambda options=options: extract_features(options, say=lambda _: None))[0]  # type: ignore[misc]
            building.append(sum(t[0] for t in built))
            whole.append(took - building[-1])
    ratios = [a / b for a, b in zip(whole, alone)]
    row: dict[str, Any] = {"teachers": " ".join(texts), "images": images, "size": size, "batch": batch, "precision": precision,
           "forward_ms": 1e3 * statistics.median(alone) / images, "extract_ms": 1e3 * statistics.median(whole) / images,
           "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "images_per_s": images / statistics.median(whole),
           "build_s": statistics.median(building), "rounds": rounds, "load": f"{os.getloadavg()[0]:.1f}", **machine("cuda" if cuda else "cpu")}  # fmt: skip
    click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    append(out, [row], COLUMNS)


if __name__ == "__main__":
    main()
