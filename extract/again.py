"""The recorded commands that write anew what is damaged in a cache."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mrmae.shards.commit import commit_path, units
from mrmae.shards.plan import Plan
from mrmae.shards.trust import Problem, read_record, trusted

Given = tuple[str, str]  # a command, and the folder it was given in


def commands_of(cache: Path, problems: Sequence[Problem]) -> list[Given]:
    """For every part of the cache that has damaged shards its newest command; the newest of all where no shard is damaged.

    They name `cache`, wherever it lay when they were given. Empty where no commit record tells a command.
    """
    plan = trusted(cache)[0]
    told = [(record.get("written", 0), part_of(plan, unit[2]), str(record["command"]), str(record["folder"]))
            for unit in units(plan) if (record := read_record(commit_path(cache, *unit)))
            and record.get("command") and record.get("folder")]  # fmt: skip
    damaged = sorted({part_of(plan, problem.unit[2]) for problem in problems if problem.unit is not None})
    parts = [[row for row in told if row[1] == part] for part in damaged] or [told]
    newest = [max(rows, key=lambda row: row[0]) for rows in parts if rows]
    return list(dict.fromkeys((aimed_at(cache, plan, command, folder), folder) for _, _, command, folder in newest))


def part_of(plan: Plan, shard: int) -> int:
    """Which part of a grown cache a shard belongs to."""
    first = plan.ranges[shard].start
    return next(i for i, part in enumerate(plan.parts) if first in part.numbers)


def aimed_at(cache: Path, plan: Plan, command: str, folder: str) -> str:
    """The command with `cache` as its target (its last word before the options), in a form that a grown cache accepts."""
    words = shlex.split(command)
    at = next((i for i, word in enumerate(words) if word.startswith("--")), len(words)) - 1
    if Path(folder, words[at]).resolve() != cache.resolve():
        words[at] = str(cache.resolve())
    if plan.appended and words[0] == "extract-features" and "--append" not in words:
        words.append("--append")
    return shlex.join(words)


def run_again(commands: Sequence[Given]) -> None:
    """Run the commands that made a cache. ValueError where there is none or one fails."""
    if not commands:
        raise ValueError("--run: no commit record tells the command; run it yourself")
    for command, folder in commands:
        program, *words = shlex.split(command)
        module = "mrmae.extract.inspect" if program == "inspect-cache" else "mrmae.extract.cli"
        if code := subprocess.run([sys.executable, "-m", module, *words], cwd=folder).returncode:
            raise ValueError(f"{command}: ended with code {code}; see above; mend that and run it again")
