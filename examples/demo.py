"""The whole product on real photographs in a few minutes: views and teacher features, then a trained student.

Photographs: those that come inside scikit-image, cut into overlapping tiles, or `--images FOLDER`. Teachers: CLIP and DINO
where their weights can be had, else the same models with random weights, said loudly. Stop it with Ctrl-C whenever you
like: the same command goes on.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import click
from PIL import Image

# Names of functions of skimage.data whose images are files of the package itself (nothing is downloaded).
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "cell", "clock", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip
REAL = ("clip=open_clip:ViT-B-16-quickgelu/openai", "dino=timm:vit_base_patch16_224.dino")
RANDOM = ("clip=open_clip:ViT-B-16-quickgelu/random", "dino=timm:vit_base_patch16_224.dino/random")
TILES = 3  # per side of a photograph: 9 tiles, each half as wide and high as it, overlapping by half


def write_photographs(folder: Path) -> None:
    """Cut scikit-image's photographs into `folder/NAME/NAME-RC.png`, square tiles of at most 256 px."""
    from skimage import data

    for name in PHOTOGRAPHS:
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        photo.thumbnail((512, 512))
        side = min(photo.size) // 2 + min(photo.size) % 2
        (folder / name).mkdir(parents=True, exist_ok=True)
        for row in range(TILES):
            for column in range(TILES):
                left = (photo.width - side) * column // (TILES - 1)
                top = (photo.height - side) * row // (TILES - 1)
                photo.crop((left, top, left + side, top + side)).save(folder / name / f"{name}-{row}{column}.png")


def must(command: list[str]) -> None:
    """Print the command as one would type it and run it; on failure end the demo with its exit code.

    Ctrl-C reaches the command too, which saves before it ends: wait for it.
    """
    click.secho("\n$ " + shlex.join(command), bold=True)
    process = subprocess.Popen([str(Path(sys.executable).parent / command[0]), *command[1:]])
    stopped = False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            stopped = True
    if stopped:
        click.secho("\nstopped; the same command goes on from here", bold=True)
    if process.returncode or stopped:
        sys.exit(abs(process.returncode) or 130)


def choose_teachers(remembered: Path) -> tuple[str, ...]:
    """CLIP and DINO where their weights are at hand or the hub answers, else random ones, said loudly; kept for next time."""
    from mrmae.extract.teachers import build_teacher, parse_teacher

    reason = "as found the first time"
    if not remembered.exists():
        teachers = REAL
        try:
            for text in REAL:
                build_teacher(parse_teacher(text), grid=14, view_size=224, device="cpu", precision="fp32")
        except (ValueError, OSError) as error:
            teachers, reason = RANDOM, str(error)
        remembered.write_text(json.dumps(teachers))
    teachers = tuple(json.loads(remembered.read_text()))
    if teachers == RANDOM:
        banner = f"""
  !!  No pre-trained teachers: {reason}
  !!  This demo goes on with RANDOM weights: it shows that everything runs, and teaches the student nothing
  !!  that CLIP and DINO know. Features, reports and the student's model card will say "random".
  !!  With a network, delete {remembered.parent} and run it again."""
        click.secho(banner, fg="yellow", bold=True, err=True)
    return teachers


@click.command()
@click.option("--images", type=click.Path(exists=True, path_type=Path), help="A folder of your own images.")
@click.option("--out", default="demo-output", type=click.Path(path_type=Path), show_default=True)
@click.option("--quick", is_flag=True, help="One tile of each photograph and four epochs.")
def main(images: Path | None, out: Path, quick: bool) -> None:
    """Run extract-features and train-mrmae on photographs and say which pictures to open."""
    out.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = out / "photos"
        write_photographs(images)
    chosen = ["--include", "*-11.*"] if quick and images == out / "photos" else []
    teachers = [word for text in choose_teachers(out / "teachers.json") for word in ("--teacher", text)]
    cache, run_folder = out / "cache", out / "run"
    must(["extract-features", str(images), str(cache), *chosen, *teachers, "--batch-size", "9"])
    must([
        "train-mrmae", str(cache), str(run_folder), "--student", "vit_tiny_patch16_224",
        "--epochs", "4" if quick else "40", "--batch-size", "5" if quick else "27", "--blr", "4e-3",
        "--set", "student.decoder.depth=2", "--set", "student.decoder.width=192", "--set", "student.decoder.heads=3",
    ])  # fmt: skip
    click.secho("\nOpen these:", bold=True)
    for picture in [*sorted((run_folder / "panels").glob("*.png"))[-1:], run_folder / "curves.png"]:
        click.echo(f"  {picture}")
    click.echo(f"and load the student: timm.create_model('local-dir:{run_folder / 'student'}', pretrained=True)")


if __name__ == "__main__":
    main()
