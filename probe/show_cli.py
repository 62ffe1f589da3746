"""`show-features IMAGE... --teacher ...`: a picture of what teachers and a student make of images, in seconds, without a cache."""

import os
import re
from pathlib import Path
from typing import Any

import click

from mrmae.common.errors import in_one_line
from mrmae.common.suggest import Command
from mrmae.extract.cli import device_option, max_pixels_option, precision_option, torchscript_option


def column_and_row(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """`3,5` as numbers."""
    if text is None:
        return None
    if not (found := re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)):
        raise click.BadParameter(f"{text!r} is no place; two whole numbers X,Y were expected, like 3,5")
    return int(found[1]), int(found[2])


@click.command(cls=Command, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--teacher", "teachers", multiple=True, metavar="NAME=LIBRARY:MODEL[/TAG][@FILE][?k=v]",
              help="As extract-features takes it (repeatable).")  # fmt: skip
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Also a student: OUT of train-mrmae, OUT/student, or a checkpoint.",
)
@click.option("--patch", callback=column_and_row, metavar="X,Y",
              help="Similarity to this patch: column and row from 0 at the top left. [default: the middle]")  # fmt: skip
@click.option(
    "--out",
    default="features.png",
    type=click.Path(path_type=Path),
    help="The PNG; an older picture of this command is replaced, nothing else.",
)
@click.option(
    "--size",
    type=click.IntRange(8),
    help="Pixels per side of a view. [default: the student's, else 224]",
)
@click.option(
    "--grid",
    type=click.IntRange(1),
    help="Patches per side. [default: the student's, else 14]",
)
@device_option
@precision_option
@max_pixels_option
@torchscript_option
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
def main(images: tuple[Path, ...], traceback: bool, **options: Any) -> None:
    """Draw what teachers, and a student beside them, make of IMAGES: no cache is made.

    A row per image: the largest centred square, per model its tokens as colours (PCA over all images given), attention (else
    token norms), and the similarity of every patch to one.
    """
    try:
        from mrmae.probe.show import ShowOptions, show_features  # torch takes seconds to import: --help need not wait

        path = show_features(ShowOptions(images, **options), say=click.echo)
    except (ValueError, OSError) as error:
        if traceback:
            raise
        raise click.ClickException(in_one_line(error)) from None
    click.echo(os.fspath(path))


if __name__ == "__main__":
    main()
