"""The recorded commands that write anew what is damaged in a cache.

What a commit record tells is data of whoever made the cache: only our own programs are named or run, in this process, with the
options that they write down themselves, and nothing that runs code.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mrmae.common.backend import Url, absolute, locate
from mrmae.extract.made_maps import is_made
from mrmae.extract.options import SAID
from mrmae.extract.recorded import told_command, with_folder
from mrmae.shards.check import Problem, plan_and_manifest
from mrmae.shards.commit import read_record
from mrmae.shards.format import Plan, commit_path, units

Given = tuple[str, str]  # a command, and the folder it was given in
MAY_BE_RERUN = {
    "extract-features": ("include", "teacher", "map", "crop-scale", "flip", "size", "seed", "append", *(name.replace("_", "-") for name in SAID)),
    "inspect-cache": ("format", "dtype", "drop"),
}  # fmt: skip


def commands_of(cache: Path, problems: Sequence[Problem]) -> list[Given]:
    """For every part of the cache that has damaged shards its newest command; the newest of all where no shard is damaged.

    They name `cache`, wherever it lay when they were given. Empty where no commit record tells a command.
    """
    plan = plan_and_manifest(cache)[0]
    told = [(when(record), part_number(plan, unit[2]), *command) for unit in units(plan)
            if (record := read_record(commit_path(cache, *unit))) and (command := told_command(record))]  # fmt: skip
    damaged = sorted({part_number(plan, problem.unit[2]) for problem in problems if problem.unit is not None})
    parts = [[row for row in told if row[1] == part] for part in damaged] or [told]
    newest = [max(rows, key=lambda row: row[0]) for rows in parts if rows]
    return list(dict.fromkeys((aimed_at(cache, plan, words, folder), str(folder)) for _, _, words, folder in newest))


def when(record: Mapping[str, Any]) -> float:
    """When a shard was written, as its record says; 0 where it does not."""
    written = record.get("written")
    return written if isinstance(written, int | float) else 0


def part_number(plan: Plan, shard: int) -> int:
    """Which part of a grown cache a shard belongs to."""
    first = plan.ranges[shard].start
    return next(i for i, part in enumerate(plan.parts) if first in part.numbers)


def aimed_at(cache: Path, plan: Plan, words: Sequence[str], folder: Path) -> str:
    """The command with `cache` as its target (its last word before the options), in a form that a grown cache accepts."""
    words = list(words)
    at = next((i for i, word in enumerate(words) if word.startswith("--")), len(words)) - 1
    target = locate(words[at])
    if absolute(target if isinstance(target, Url) else folder / target) != absolute(cache):
        words[at] = str(absolute(cache))
    if plan.appended and words[0] == "extract-features" and "--append" not in words:
        words.append("--append")
    return shlex.join(words)


def prepared(given: Given, programs: Mapping[str, click.Command]) -> tuple[click.Command, dict[str, Any]]:
    """The program of a recorded command and what to call it with, relative paths counted from where it was given.

    programs: by name. ValueError for what is not run here: options that mrmae does not write down, and those that run code.
    """
    text, folder = given
    program, *words = shlex.split(text)
    here = f"{text}: is not run by repair: "
    options = [word for word in words if re.match("-[A-Za-z-]", word)]
    strange = [word for word in options if word.removeprefix("--") not in MAY_BE_RERUN[program]]
    if strange:
        what = (
            "lets weights run code"
            if strange[0] in ("--allow-torchscript", "--allow-code")
            else "is no option that mrmae writes down"
        )
        raise ValueError(f"{here}{strange[0]} {what}; look at it, and run it yourself (nothing was changed)")
    command = programs[program]
    try:
        found = command.make_context(program, words[1:] if program == "inspect-cache" else words).params
    except click.ClickException as error:
        raise ValueError(
            f"{here}{error.format_message()}; correct it, and run it yourself (nothing was changed)"
        ) from None
    return command, from_folder(found, Path(folder))


def from_folder(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The parameters of a command with every relative path counted from `folder`."""
    params = dict(found)
    for name in {"cache", "out"} & set(params):
        place = locate(params[name])
        params[name] = place if isinstance(place, Url) else folder / place
    if "images" in params:
        params["images"] = tuple(image if "://" in image else str(folder / image) for image in params["images"])
        params["teachers"] = tuple(with_folder(text, folder) for text in params["teachers"])
        params["maps"] = tuple(map_with_folder(text, folder) for text in params["maps"])
    return params


def map_with_folder(text: str, folder: Path) -> str:
    """A map's text with its file, if it names one, relative to where the command was given."""
    before, colon, file = text.rpartition(":") if is_made(text) else text.partition("=")
    return text if is_made(text) and file.isdecimal() else f"{before}{colon}{folder / file}"


def refuse_commands(commands: Sequence[Given], programs: Mapping[str, click.Command]) -> None:
    """ValueError where there is no command, or one that is not run here."""
    if not commands:
        raise ValueError(
            "--run: no commit record tells a command; give the extract-features command yourself (nothing was changed)"
        )
    for given in commands:
        prepared(given, programs)


def run_again(commands: Sequence[Given], programs: Mapping[str, click.Command]) -> None:
    """Run the commands that made a cache, in this process."""
    for command, params in [prepared(given, programs) for given in commands]:
        assert command.callback is not None, "our commands do something"
        command.callback(**params)
