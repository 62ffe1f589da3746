"""`train-mrmae CACHE OUT`: train a student on a cache of teacher features. The same command again continues."""

import dataclasses
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import click

from mrmae.common.errors import in_one_line
from mrmae.common.suggest import Command

SHORTHANDS = {
    "student": "student.model",
    "mean": "prepare.mean",
    "std": "prepare.std",
    "epochs": "optim.epochs",
    "batch_size": "optim.batch_size",
    "blr": "optim.lr_per_256",
    "warmup_epochs": "optim.warmup_epochs",
    "mask_ratio": "mask.ratio",
    "seed": "seed",
    "precision": "optim.precision",
}


def listed_recipes(context: click.Context, _: click.Parameter, name: str) -> str:
    """`--recipe list`: what there is; any other name as it is."""
    if name == "list" and not context.resilient_parsing:
        from mrmae.train.method import recipe_summaries

        in_columns(context, recipe_summaries())
    return name


def shown_recipe(context: click.Context, _: click.Parameter, name: str | None) -> None:
    """`--show-recipe NAME`: its yaml."""
    if name is not None and not context.resilient_parsing:
        from mrmae.train.method import recipe_text

        try:
            click.echo(recipe_text(name), nl=False)
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        context.exit()


def listed_students(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """`--list-students`: usual ones; the cache sets image and patch size."""
    if wanted and not context.resilient_parsing:
        from mrmae.train.method import usual_students

        in_columns(context, usual_students())


def in_columns(context: click.Context, about: dict[str, str]) -> None:
    """Print names and what they are, and stop."""
    width = max(map(len, about))
    for name, text in about.items():
        click.echo(f"{name:<{width}}  {text}")
    context.exit()


@click.command(
    cls=Command,
    context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@click.argument("cache")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", default="mr-mae", metavar="NAME|FILE", is_eager=True, callback=listed_recipes,
              help="A shipped recipe or a yaml file: the whole method. `list` prints the shipped ones.")  # fmt: skip
@click.option("--show-recipe", metavar="NAME", is_eager=True, expose_value=False, callback=shown_recipe,
              help="Print a recipe's yaml, which says of each line whether it is published or inferred, and stop.")  # fmt: skip
@click.option("--list-students", is_flag=True, is_eager=True, expose_value=False, callback=listed_students,
              help="Print names for --student with their sizes, and stop.")  # fmt: skip
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe; repeatable.")
@click.option(
    "--student", metavar="NAME", help="A timm ViT; size and patch come from the cache. [recipe: student.model]"
)
@click.option(
    "--mean", nargs=3, type=float, metavar="R G B", help="Of the student's input, 0..1. [recipe: prepare.mean]"
)
@click.option("--std", nargs=3, type=float, metavar="R G B", help="Likewise. [recipe: prepare.std]")
@click.option("--epochs", type=int, help="Passes over the cache. [recipe: optim.epochs]")
@click.option("--batch-size", type=int, help="Images per update, over all processes. [recipe: optim.batch_size]")
@click.option("--blr", type=float, help="Peak learning rate per 256 images of a batch. [recipe: optim.lr_per_256]")
@click.option(
    "--warmup-epochs",
    type=float,
    help="Linear warm-up. With --epochs alone: a tenth of them, at most 40. [recipe: optim.warmup_epochs]",
)
@click.option("--mask-ratio", type=float, help="Share of patches hidden. [recipe: mask.ratio]")
@click.option("--seed", type=int, help="Of initial weights, order and masks. [recipe: seed]")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="[recipe: optim.precision]")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--compile", is_flag=True, help="torch.compile the forward pass.")
@click.option(
    "--kernels",
    type=click.Choice(["auto", "triton", "torch"]),
    default="auto",
    help="Who computes the losses; auto tries Triton on the GPU and takes the faster one that is right.",
)
@click.option("--workers", type=click.IntRange(1), help="Reading and decoding threads. [default: cores - 1, at most 8]")
@click.option("--accum", type=click.IntRange(1), default=1, help="Micro-batches per update: same result, less memory.")
@click.option(
    "--online", is_flag=True, help="Run the teachers in the step instead of reading their features: the baseline."
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="NAME=LIBRARY:MODEL[/TAG][@FILE]",
    help="A teacher to run in the step, as for extract-features; repeatable. [default with --online: the cache's own]",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="Classes by key, for terms with target labels: a .csv or .parquet of key and label. [default: the folders' names]",
)
@click.option(
    "--boxes",
    type=click.Path(path_type=Path),
    help="Boxes by key, for terms on boxes: a .parquet or .csv of key, x0, y0, x1, y1 in pixels of the image.",
)
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Share of the images, by hash of their keys, that is not trained on; its loss is logged every epoch.",
)
@click.option(
    "--probe-every",
    type=click.IntRange(0),
    default=0,
    help="Epochs per RankMe of the student's features and, of labelled images held out, k-NN accuracy; 0 for none.",
)
@click.option(
    "--allow-partial", is_flag=True, help="Train on what is committed of an unfinished cache (said aloud, recorded)."
)
@click.option(
    "--init", type=click.Path(path_type=Path), help="Begin from a checkpoint of MAE or MCMAE, or a timm ViT's weights."
)
@click.option(
    "--export",
    type=click.Choice(["mae", "transformers", "onnx"]),
    multiple=True,
    help="Write OUT/published.pth (for MAE's scripts), OUT/transformers or OUT/student.onnx too; repeatable.",
)
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Pairs of images, two keys a row (.csv or .parquet), for a recipe that pairs them. [default: two stored views of each image]",
)
@click.option(
    "--local-cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep whole shards of a CACHE that is far away in this folder on a near disk, shared by all processes of the machine.",
)
@click.option(
    "--local-cache-bytes", metavar="N", help="At most so much there, e.g. 200GB; the least recently used go first."
)
@click.option(
    "--save-minutes", type=click.FloatRange(0), default=10.0, help="Save this often, beside every epoch's end."
)
@click.option("--keep", type=click.IntRange(1), default=3, help="Checkpoints kept.")
@click.option("--log-every", type=click.IntRange(1), default=20, help="Updates per log row.")
@click.option("--panels-every", type=click.IntRange(0), help="Epochs per picture, 0 for none. [default: ten per run]")
@click.option("--wandb", metavar="PROJECT", help="Log to Weights & Biases too (pip install 'mrmae[wandb]').")
@click.option(
    "--dry-run", is_flag=True, help="Print the resolved plan, time ten micro-batches, and stop; nothing is written."
)
def main(cache: str, out: Path, recipe: str, sets: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Train a student on CACHE (from extract-features; a folder or an s3://, gs:// or az:// URL); all goes to the folder OUT.

    Ends with OUT/student (load it with timm), OUT/report.html, OUT/curves.png and OUT/panels. The same command again continues a run that was
    stopped or killed; more --epochs than before may be asked for. Several GPUs: torchrun --nproc-per-node N -m mrmae.train.cli
    CACHE OUT.
    """
    from mrmae.common.backend import Unreachable, locate
    from mrmae.common.device import keep_memory
    from mrmae.train import loop, ranks, rehearsal  # torch takes seconds to import: --help need not wait
    from mrmae.train.method import load_recipe
    from mrmae.train.setup import Cadence, Setup

    keep_memory(options["device"])
    given = {name: options.pop(name) for name in SHORTHANDS}
    try:
        place = locate(cache)
        resolved = load_recipe(recipe, [*overrides(given, sets), *sets])
        setup = Setup(**of_kind(Setup, options), command=same_command())
        cadence = Cadence(**of_kind(Cadence, options))
        if dry_run:
            for line in rehearsal.dry_run(place, out, resolved, setup, cadence):
                click.echo(line)
            return
        summary = loop.train(place, out, resolved, setup, cadence)
    except (ValueError, OSError, Unreachable, loop.Diverged, ranks.OtherRankFailed) as error:
        raise click.ClickException(
            in_one_line(error)
        ) from error  # a process group with a dead member is not taken leave of
    ranks.leave_ranks()
    if not summary["finished"]:
        sys.exit(128 + signal.Signals[summary["stopped"]])


def of_kind(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are fields of this dataclass."""
    return {field.name: options[field.name] for field in dataclasses.fields(kind) if field.name in options}


def overrides(given: dict[str, Any], sets: tuple[str, ...]) -> list[str]:
    """The shorthands that were given, as KEY=VALUE; a run length of one's own brings a warm-up that fits it."""
    from mrmae.train.optim import usual_warmup

    found = [f"{SHORTHANDS[name]}={_yaml(value)}" for name, value in given.items() if value is not None]
    chosen = {text.partition("=")[0].strip() for text in [*found, *sets]}
    if given["epochs"] is not None and "optim.warmup_epochs" not in chosen:
        found.append(f"optim.warmup_epochs={usual_warmup(given['epochs'])}")
    return found


def _yaml(value: Any) -> str:
    return "[" + ", ".join(map(repr, value)) + "]" if isinstance(value, tuple) else str(value)


def same_command() -> str:
    """What to type to continue."""
    from torch.distributed import is_torchelastic_launched

    name = "torchrun --nproc-per-node N -m mrmae.train.cli" if is_torchelastic_launched() else "train-mrmae"
    return f"{name} {shlex.join(sys.argv[1:])}"


if __name__ == "__main__":
    main()
