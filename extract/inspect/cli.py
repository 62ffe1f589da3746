"""inspect-cache: look into a cache, check it, repair it, compare it with another."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mrmae.common.backend import Unreachable, Url, exists, expect_utf8, locate, size_of
from mrmae.common.errors import in_one_line
from mrmae.common.progress import Progress, counted, human_bytes
from mrmae.common.suggest import Command
from mrmae.extract.cli import DTYPE_NAMES, FORMAT_NAMES
from mrmae.extract.cli import main as extract_command

if TYPE_CHECKING:  # commands import what they need: --help need not wait for torch
    from mrmae.shards.cache import Cache
    from mrmae.shards.check import Problem


def folder_or_url(text: str) -> Path:
    """The path of a cache on the command line."""
    try:
        return locate(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def out_or_url(text: str) -> Path:
    """The path of a new one."""
    try:
        return locate(text, "OUT")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def band_numbers(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """`3,2,1` as numbers."""
    try:
        return None if text is None else tuple(int(word) for word in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} are no bands; whole numbers from 1 with commas were expected, like 3,2,1"
        ) from None


CACHE = click.argument("cache", type=folder_or_url, metavar="CACHE")
YES = click.option("--yes", is_flag=True, help="Do not ask: for scripts.")
SHOWN_PROBLEMS = 100


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look into a cache that extract-features wrote, check it, repair it, compare it with another.

    A picture of images that are in no cache: show-features.
    """


main.command_class = Command


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend is said in a line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, Unreachable) as error:
        raise click.ClickException(in_one_line(error)) from None


@main.command()
@CACHE
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def show(cache: Path, as_json: bool) -> None:
    """Print what CACHE holds: images, views, columns, their quality and size."""
    from mrmae.extract.inspect.show import description, print_description
    from mrmae.shards.format import load_plan

    with one_line_errors():
        found = description(cache)
        if as_json:
            click.echo(json.dumps(found, indent=1, ensure_ascii=False))
            return
        wide = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False)
        print_description(found, load_plan(cache), wide)


@main.command()
@CACHE
@click.option("--full", is_flag=True, help="Also hash every file and check every checksum.")
@click.option("--live", default=0, type=click.IntRange(0), help="Compute so many samples again with the teachers.")
@click.option("--mirror", is_flag=True, help="With --live, a control: teachers see mirrored views; this must fail.")
@click.option("--teacher", "teachers", multiple=True, metavar="NAME=LIBRARY:MODEL[/TAG][@FILE]",
              help="With --live: where a teacher's weights are, if not where they were.")  # fmt: skip
@click.option("--device", default="cpu", help="With --live: cpu, cuda, ...")
@click.option("--allow-torchscript", is_flag=True, help="Let @FILE be OpenAI's TorchScript .pt (runs code it holds).")
def verify(
    cache: Path, full: bool, live: int, mirror: bool, teachers: tuple[str, ...], device: str, allow_torchscript: bool
) -> None:
    """Check CACHE; exit 1 and list every problem if something is wrong."""
    from mrmae.shards.cache import open_cache
    from mrmae.shards.check import find_problems

    with one_line_errors():
        if (mirror or teachers) and not live:
            raise ValueError("--mirror and --teacher belong to --live N; say how many samples to compute again")
        problems = find_problems(cache, full=full)
        report(cache, problems)
        if problems:
            raise SystemExit(1)
        checked = "sizes, sha256, checksums and metadata" if full else "names, sizes and ids (--full also reads all)"
        click.echo(f"{cache}: {checked} are as they were written")
        if live and not verified_live(open_cache(cache), live, teachers, device, mirror, allow_torchscript):
            raise SystemExit(1)


def list_problems(problems: "list[Problem]") -> None:
    """Print the first problems, and how many more there are."""
    for problem in problems[:SHOWN_PROBLEMS]:
        click.echo(str(problem))
    if len(problems) > SHOWN_PROBLEMS:
        click.echo(f"... and {len(problems) - SHOWN_PROBLEMS} more")


def report(cache: Path, problems: "list[Problem]") -> None:
    """Print the problems and how to repair them."""
    list_problems(problems)
    if problems:
        click.echo(
            f"{cache}: {counted(len(problems), 'problem')}; to repair: inspect-cache repair {shlex.quote(str(cache))}"
        )


def verified_live(
    cache: "Cache", n: int, teachers: tuple[str, ...], device: str, mirror: bool, allow_torchscript: bool
) -> bool:
    """Print the comparison with live teachers; True where every column is within its limit."""
    from mrmae.extract.inspect.compare import compare_live  # imports the teachers' libraries

    found = compare_live(cache, n, texts=teachers, device=device, mirror=mirror, allow_torchscript=allow_torchscript)
    for column in found:
        extra = "".join(f", {name} {value:.6f}" for name in ("cls", "attention")
                        if (value := getattr(column, name)) is not None)  # fmt: skip
        click.echo(f"{column.column}: {counted(column.samples, 'sample')}, cosine {column.cosine:.6f} (lowest {column.lowest:.6f})"
                   f", SNR {column.snr_db:.1f} dB{extra}: {'good' if column.good else 'FAILS'}, {column.limit}")  # fmt: skip
    if mirror:
        click.echo("the teachers saw mirrored views: " + ("this failed, as it must" if not any(c.good for c in found)
                   else "a column PASSED: it cannot tell left from right, so its comparison proves nothing"))  # fmt: skip
    return all(column.good for column in found)


@main.command()
@CACHE
@click.option("--run", is_flag=True, help="Also run the recorded command, in this process.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@YES
def repair(cache: Path, run: bool, dry_run: bool, yes: bool) -> None:
    """Find everything that is wrong in CACHE, remove the commit records of damaged shards, print what writes them anew."""
    from mrmae.extract.inspect.rerun import commands_of, refuse_commands, run_again
    from mrmae.shards.check import find_problems
    from mrmae.shards.repair import files_to_remove, prepare_repair

    with one_line_errors():
        problems = find_problems(cache, full=True)
        if not problems:
            click.echo(f"{cache}: nothing to repair")
            return
        doomed = files_to_remove(cache, problems)
        report_damage(problems)
        click.echo(f"to be removed: {files_in_words(doomed)}: records of damaged shards, and what is written again from others"
                   + (", and plan.json is written anew from manifest.json" * any(p.file == "plan.json" for p in problems)))  # fmt: skip
        commands = commands_of(cache, problems)
        if run:
            refuse_commands(commands, programs())
            click.echo(f"then to be run:{in_lines(commands)}")
        if not dry_run:
            ask(f"Remove this from {cache}{' and run that' * run}?", yes)
            click.echo(f"removed {counted(len(prepare_repair(cache, problems)), 'file')}")
        if not run:
            click.echo("to write them anew, run" + (f":{in_lines(commands)}" if commands else
                       " the extract-features command that made this cache"))  # fmt: skip
        elif not dry_run:
            run_again(commands, programs())
            left = find_problems(cache, full=True)
            report(cache, left)
            raise SystemExit(1 if left else 0)


def programs() -> dict[str, click.Command]:
    """What a recorded command may be of, by its first word."""
    return {"extract-features": extract_command, "inspect-cache": convert}


def in_lines(commands: Sequence[tuple[str, str]]) -> str:
    """Commands to be copied, each with the folder it was given in."""
    return "".join(f"\n  cd {shlex.quote(folder)}\n  {command}" for command, folder in commands)


def ask(question: str, yes: bool) -> None:
    """Go on only where a person, or --yes, says so. ValueError where there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask at; --yes was expected; look at what is said above, then add it (nothing "
                         "was changed)")  # fmt: skip
    click.confirm(question, abort=True)


def files_in_words(files: Sequence[Path]) -> str:
    """How many files, and how large."""
    return f"{counted(len(files), 'file')}, {human_bytes(sum(map(size_of, files)))}"


def report_damage(problems: "list[Problem]") -> None:
    """Print the problems and, per column, the shards to be written again."""
    from mrmae.shards.repair import damaged_shards

    list_problems(problems)
    for column, shards in damaged_shards(problems).items():
        click.echo(f"{column}: shards {', '.join(map(str, shards))}")


@main.command()
@click.argument("a", type=folder_or_url, metavar="A")
@click.argument("b", type=folder_or_url, metavar="B")
def diff(a: Path, b: Path) -> None:
    """List every field by which caches A and B differ; exit 1 where there is one."""
    from mrmae.extract.inspect.show import difference_line, differences

    with one_line_errors():
        found = list(differences(a, b))
    for field, ours, theirs in found:
        click.echo(difference_line(field, ours, theirs))
    if found:
        raise SystemExit(1)
    click.echo(f"{a} and {b} hold the same")


@main.command()
@CACHE
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="TEACHER.TAP",
    help="Only these, also TEACHER.post_ln and .projected; default: all stored.",
)
@click.option("--views", type=click.IntRange(1), help="Of the first N views alone, for runs with prepare.views=N.")
@click.option("--images", type=click.IntRange(1), help="Of the first N images alone, for runs with prepare.images=N.")
def stats(cache: Path, columns: tuple[str, ...], views: int | None, images: int | None) -> None:
    """Compute exact means, at each position, and covariances of CACHE's columns (float64) and store them beside it.

    Those of other views or images that were computed before stay.
    """
    from mrmae.shards.cache import open_cache
    from mrmae.shards.format import load_plan
    from mrmae.shards.stats import compute_stats, write_stats

    with one_line_errors():
        load_plan(cache)
        if not exists(cache / "manifest.json"):
            raise ValueError(
                f"{cache}: is not finished, and moments are of all its images; run extract-features to its end first"
            )
        opened = open_cache(cache).narrowed(None, views, images)
        if unknown := sorted(set(columns) - {*opened.columns, *opened.derived}):
            raise ValueError(f"--column {unknown[0]}: this cache has no such column; it has {sorted(opened.columns)}, and from "
                             f"their tails follow {sorted(opened.derived)}")  # fmt: skip
        for name in columns or tuple(opened.columns):
            with Progress(name, len(opened.numbers) * opened.n_views, "views") as progress:
                moments = compute_stats(opened, name, progress=progress.add)
            path = write_stats(opened, name, moments)
            click.echo(f"{name}: {moments.n} tokens, |mean| {moments.mean.norm():.4g}, std per channel "
                       f"{moments.variance.min().sqrt():.3g} to {moments.variance.max().sqrt():.3g}, {moments.position_share:.0%} of the variance is position alone; "
                       f"{path} ({moments.id[:19]})")  # fmt: skip


@main.command()
@CACHE
@click.argument("column", metavar="TEACHER.TAP")
@YES
def drop(cache: Path, column: str, yes: bool) -> None:
    """Remove a teacher's column from CACHE; everything else stays as it is."""
    from mrmae.shards.drop import columns_called, drop_column, files_of_column, orphaned_words
    from mrmae.shards.format import load_plan

    with one_line_errors():
        plan = load_plan(cache)
        named = columns_called(cache, column)
        if len(named) > 1:
            raise ValueError(f"{cache}: teacher {column} has {len(named)} columns: {', '.join(named)}; name one")
        column = named[0] if named else column
        click.echo(f"{cache}: {column} in {counted(plan.n_views, 'view')} is {files_in_words(files_of_column(cache, column))}, which go; "
                   "plan.json and manifest.json are written anew; only the teacher can compute it again")  # fmt: skip
        for words in orphaned_words(plan, [column]):
            click.echo(f"  {words}")
        ask(f"Remove {column}?", yes)
        left = drop_column(cache, column)
    click.echo(f"{cache}: {column} is gone; it holds {', '.join(left) or 'no teacher'}")


@main.command()
@CACHE
@click.argument("out", type=out_or_url)
@click.option("--format", type=click.Choice(FORMAT_NAMES), help="How columns are stored; default: as in CACHE.")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), help="Quantise the stored values again; default: as in CACHE.")
@click.option("--drop", multiple=True, metavar="TEACHER[.TAP]", help="Leave a teacher or one of its columns out.")
def convert(cache: Path, out: Path, format: str | None, dtype: str | None, drop: tuple[str, ...]) -> None:
    """Write finished CACHE to OUT in another format or dtype, or without some teachers; the same command continues."""
    from mrmae.shards.cache import open_cache
    from mrmae.shards.convert import convert_cache, converted_plan
    from mrmae.shards.drop import orphaned_words
    from mrmae.shards.format import units

    words = ["inspect-cache", "convert", os.fspath(cache), os.fspath(out)]
    words += [w for name, value in (("--format", format), ("--dtype", dtype)) if value for w in (name, value)]
    about = {"command": shlex.join(words + [w for name in drop for w in ("--drop", name)]), "folder": os.getcwd()}
    with one_line_errors():
        opened = open_cache(cache)
        wanted = converted_plan(opened, format=format, dtype=dtype, drop=drop)
        for note in orphaned_words(
            wanted, {spec.column for spec in opened.plan.columns} - {spec.column for spec in wanted.columns}
        ):
            click.echo(note)
        total = sum(1 for _ in units(wanted))
        with Progress("converting", total, "shards") as progress:
            manifest = convert_cache(opened, out, wanted, about=about, progress=lambda n: progress.add(1, bytes=n))
    click.echo(f"{out}: {counted(manifest['n_valid'], 'image')}, {', '.join(c['name'] for c in manifest['columns']) or 'no teacher'}, "
               f"{wanted.dtype} in {wanted.format}")  # fmt: skip
    for column in manifest["columns"]:
        if source := column["quantiser"].get("source"):
            click.echo(f"  {column['name']}: requantised from {source[:19]}, SNR at least {column['quality']['snr_db']:.1f} dB "
                       "in the worst shard, counted from the teacher")  # fmt: skip


@main.command()
@CACHE
@click.option("--out", type=click.Path(path_type=Path), help="The PNG; default: CACHE/pictures.png.")
@click.option("--samples", default=8, type=click.IntRange(1), help="Rows of the sheet.")
@click.option("--view", default=0, type=click.IntRange(0), help="Which view.")
@click.option(
    "--bands",
    callback=band_numbers,
    metavar="R,G,B",
    help="Which bands of the view are red, green and blue, or one as gray, from 1, stretched; default: RGB views as they are, else the first three.",
)
@click.option(
    "--boxes",
    type=click.Path(path_type=Path),
    help="Boxes by key, as train-mrmae takes them; images with boxes are shown.",
)
def pictures(
    cache: Path, out: Path | None, samples: int, view: int, bands: tuple[int, ...] | None, boxes: Path | None
) -> None:
    """Draw a contact sheet of CACHE: view, every teacher's tokens as colours (PCA), attention or token norms, the maps, and boxes."""
    from mrmae.extract.boxes import read_box_file
    from mrmae.extract.inspect.pictures import write_sheet
    from mrmae.shards.cache import open_cache

    with one_line_errors():
        expect_utf8(out or "", "--out")
        opened = open_cache(cache, allow_partial=True)
        if view >= opened.n_views:
            raise ValueError(f"--view {view}: this cache has {counted(opened.n_views, 'view')}, numbered from 0")
        if opened.unfinished:
            click.echo(f"UNFINISHED cache: {opened.unfinished} are committed; only these can be shown")
        if out is None and isinstance(cache, Url):
            raise ValueError(f"{cache}: a picture is written to a folder; say with --out where it goes")
        given = None if boxes is None else read_box_file(boxes)
        path = write_sheet(opened, samples, out or cache / "pictures.png", view=view, bands=bands, boxes=given)
    click.echo(f"{os.fspath(path)}")


@main.command(name="report")
@CACHE
@click.option("--out", type=click.Path(path_type=Path), help="The HTML file; default: CACHE/report.html.")
@click.option("--samples", default=8, type=click.IntRange(1), help="Rows of the contact sheet.")
def write_report(cache: Path, out: Path | None, samples: int) -> None:
    """Write what CACHE holds as one HTML page: images, labels, columns and their quality, pictures, times."""
    from mrmae.common.page import write_document
    from mrmae.extract.inspect.cache_page import cache_page

    with one_line_errors():
        expect_utf8(out or "", "--out")
        if out is None and isinstance(cache, Url):
            raise ValueError(f"{cache}: a page is written to a folder; say with --out where the page goes")
        path = write_document(out or cache / "report.html", cache_page(cache, rows=samples))
    click.echo(f"{os.fspath(path)}")


if __name__ == "__main__":
    main()
