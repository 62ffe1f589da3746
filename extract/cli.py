"""extract-features: photos in, a cache of views and teacher features out."""

from pathlib import Path
from typing import Any

import click

from mrmae.common.errors import in_one_line
from mrmae.common.suggest import Command

# As extract/teachers, shards/format and shards/store have them (tested), which take seconds to import: --help need not wait.
TEACHERS_BY_DEFAULT = ("clip=open_clip:ViT-B-16-quickgelu/openai", "dino=timm:vit_base_patch16_224.dino")
DTYPE_NAMES = ("int8", "fp8", "float16", "pq4", "pq", "pq16")
FORMAT_NAMES = ("zarr", "webdataset")
# What show-features takes too.
device_option = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
precision_option = click.option(
    "--precision",
    default="auto",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="Compute of the teachers; auto: fp16 on CUDA, fp32 elsewhere.",
)
max_pixels_option = click.option(
    "--max-pixels",
    default=178_956_970,
    type=click.IntRange(1),
    help="Larger images are refused undecoded (10 to 18 bytes of memory per pixel).",
)
torchscript_option = click.option(
    "--allow-torchscript", is_flag=True, help="Let @FILE be OpenAI's TorchScript .pt (runs code it holds)."
)


@click.command(cls=Command, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("images", nargs=-1, required=False)
@click.argument("cache", type=click.Path(path_type=Path), required=False)
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    show_default=False,
    help="Keep keys that match (repeatable); * crosses '/': 'train/*' is the whole folder.",
)
@click.option(
    "--limit",
    default=0,
    type=click.IntRange(0),
    help="Take only the first so many images in canonical order, a random sample; 0: all. More later: --append.",
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    default=TEACHERS_BY_DEFAULT,
    metavar="NAME=LIBRARY:MODEL[/TAG][@FILE][?k=v]",
    help="open_clip or timm model (repeatable), or python:module:function. @FILE: local weights. /random: random weights.",
)
@click.option(
    "--map",
    "maps",
    multiple=True,
    metavar="NAME=FILE|text:TEACHER:PROMPTS.txt|kmeans:TEACHER:K",
    show_default=False,
    help="A value per patch (repeatable): from FILE, .npz or .parquet by key, ids, bits or scores, to which crops and flips apply; the largest"
    " cosine of CLIP's projected tokens with the prompts of a text file, one a line; or which of K centroids is nearest to a teacher's token.",
)
@click.option("--views", default=1, type=click.IntRange(1), help="Crops stored per image.")
@click.option("--crop-scale", default=(0.4, 1.0), nargs=2, type=float, help="Share of the image's area in a crop.")
@click.option("--flip", default=0.5, type=click.FloatRange(0, 1), help="Probability that a view is mirrored.")
@click.option("--size", default=224, type=click.IntRange(8), help="Pixels per side of a view.")
@click.option(
    "--grid", default=14, type=click.IntRange(1), help="Patches per side; the student's patch is size / grid."
)
@click.option("--seed", default=0, type=click.IntRange(0), help="Seed of crops and flips.")
@click.option(
    "--encoding",
    default="jpeg95",
    metavar="jpeg95|png|png16|npy:NxDTYPE",
    help="How views are stored. jpeg95, png: RGB as viewers show it. png16: 16-bit gray. npy:14xuint16: a file's 14 bands (TIFF, .npy, PNG) "
    "of uint8, uint16, float16 or float32. All but jpeg95 keep every bit.",
)
@click.option("--dtype", default="int8", type=click.Choice(list(DTYPE_NAMES)),
              help="How features are stored. pq: product codes, a byte for 8 channels (pq4: for 4, pq16: for 16).")  # fmt: skip
@click.option("--format", default="zarr", type=click.Choice(list(FORMAT_NAMES)),
              help="Features as zarr v3 arrays, or as webdataset tars beside the views'.")  # fmt: skip
@click.option(
    "--token-layout",
    default="raster",
    type=click.Choice(["raster", "blocks"]),
    help="blocks: cut each view's tokens at random into --blocks parts; training that shows one part reads only that.",
)
@click.option("--blocks", default=4, type=click.IntRange(2), help="With --token-layout blocks: parts per view.")
@device_option
@precision_option
@click.option("--batch-size", default=0, type=click.IntRange(0), help="Views per forward; 0: 64 on CUDA, 8 on a CPU.")
@click.option(
    "--workers",
    default=0,
    type=click.IntRange(0),
    help="Decoding threads; 0: one per core, four where IMAGES are URLs. Together they hold at most 4 GB of images: more wait.",
)
@click.option("--shard-samples", default=0, type=click.IntRange(0), help="Images per shard; 0: chosen by size.")
@click.option(
    "--shards",
    default="",
    metavar="I/N",
    show_default=False,
    help="Do exactly part I of N (from 0); without: whatever is left, and finish.",
)
@click.option(
    "--engine",
    default="processes",
    type=click.Choice(["processes", "ray"]),
    help="Who does the shards: this process and every other one that runs the same command, or a pool of Ray actors (mrmae[ray]).",
)
@click.option(
    "--ray-workers", default=0, type=click.IntRange(0), help="Actors; 0: one per GPU, or per node without any."
)
@click.option("--ray-cpus", default=1.0, type=click.FloatRange(0), help="CPUs that Ray reserves for an actor.")
@click.option("--ray-gpus", default=-1.0, type=float, help="GPUs of an actor, also a part of one; -1: 1 where there are any.")  # fmt: skip
@click.option("--ray-address", default="", metavar="HOST:PORT", show_default=False,
              help="A running cluster; without it RAY_ADDRESS, else one on this machine while the command runs.")  # fmt: skip
@click.option("--append", is_flag=True, help="Append the IMAGES that are new to CACHE; what it holds stays as it is.")
@click.option("--max-bad", default=-1, type=click.IntRange(-1), help="Unreadable images tolerated; -1: max(3, 0.1 %).")
@click.option("--min-snr", default=None, type=float, metavar="DB",
              help="Stop at a shard whose codes keep less than this of a teacher; 20 without it, 2 of product codes; float16 is not measured by it.")  # fmt: skip
@max_pixels_option
@torchscript_option
@click.option(
    "--allow-code", is_flag=True, help="Let --teacher NAME=python:module:function import and run that function."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan, measure a few images and the disk or store, estimate; leave nothing.",
)
@click.option("--list-teachers", is_flag=False, flag_value="*", default=None, metavar="[PATTERN]", show_default=False,
              help="List the teachers whose names match, with what each gives for --grid, and do nothing else.")  # fmt: skip
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
def main(
    images: tuple[str, ...], cache: Path | None, dry_run: bool, list_teachers: str | None, traceback: bool, engine: str, **options: Any
) -> None:  # fmt: skip
    """Run frozen teachers over IMAGES once and write views and per-patch features to CACHE.

    IMAGES: a folder, tar files (plain or webdataset, {000..009} patterns), or a text file of paths; or at s3://, gs:// and az://
    a prefix with images below it or such tars, or a text file of URLs.
    The same command again continues where it stopped, and shares the work with every other one that runs, on any machine: each
    takes the next shard that nobody has claimed. --shards does exactly one part; the same command without it finishes.
    """
    if list_teachers is not None:
        return say_teachers(list_teachers, options["grid"])
    if cache is None or not images:
        raise click.UsageError(
            "Missing argument 'IMAGES... CACHE': images to read, and the folder of the cache to write."
        )
    from mrmae.common.backend import Unreachable

    pool = {name: options.pop(f"ray_{name}") for name in ("workers", "cpus", "gpus", "address")}
    recipe = {name: options.pop(name) for name in ("size", "crop_scale", "flip", "seed", "encoding")}
    try:
        from mrmae.common.device import keep_memory
        from mrmae.extract.run import Options, extract_features
        from mrmae.shards.format import ViewRecipe

        keep_memory(options["device"])
        chosen = Options(images=images, cache=cache, recipe=ViewRecipe(**recipe), **options)
        if engine == "ray" and not dry_run:
            from mrmae.extract.ray_engine import RayPool, extract_on_ray

            extract_on_ray(chosen, RayPool(**pool), say=click.echo)
        else:
            extract_features(chosen, dry_run=dry_run, say=click.echo)
    except (ValueError, OSError, Unreachable) as error:
        if traceback:
            raise
        raise click.ClickException(in_one_line(error)) from None
    except KeyboardInterrupt:
        there = was_begun(cache)
        what = (
            f"committed shards are kept in {cache}; the same command continues" if there else "nothing was written yet"
        )
        click.echo(f"stopped; {what}", err=True)
        raise SystemExit(130) from None


def was_begun(cache: Path) -> bool:
    """Whether there is a plan; of a URL that does not answer any more, not known."""
    from mrmae.common.backend import Unreachable, exists, locate

    try:
        return exists(locate(cache) / "plan.json")
    except Unreachable:
        return True


def say_teachers(pattern: str, grid: int) -> None:
    """Print the teachers that match."""
    from mrmae.extract.teachers import list_teachers

    try:
        for line in list_teachers(pattern, grid=grid):
            click.echo(line)
    except ValueError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
