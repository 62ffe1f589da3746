"""One student per teacher, and a table of what they are worth: the commands of a yaml such as sweeps/quality-captions.yaml.

All features lie in one cache; each student is trained with one teacher's (the recipe's term `mimic`), one without any if the yaml says
how. The same again goes on where it stopped, as each of its commands does.
"""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import yaml

KEYS = {"extract": str, "teachers": dict, "train": str, "without": str, "probe": str}
MODULES = {
    "extract-features": "mrmae.extract.cli",
    "train-mrmae": "mrmae.train.cli",
    "probe-features": "mrmae.probe.cli",
}


@click.command()
@click.argument("sweep", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("images")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, multiple=True, help="Labelled images, as probe-features takes them.")
@click.option("--dry-run", is_flag=True, help="Print the commands only.")
def main(sweep: Path, images: str, out: Path, data: tuple[str, ...], dry_run: bool) -> None:
    """Run the commands of SWEEP on IMAGES, everything in OUT, and end with a table."""
    for words in commands(read_sweep(sweep), images, out, data):
        click.echo("$ " + shlex.join(words))
        if not dry_run and (status := subprocess.call([sys.executable, "-m", MODULES[words[0]], *words[1:]])):
            raise click.ClickException(
                f"{words[0]} ended with {status}; mend what it says, then run the same command again"
            )


def read_sweep(path: Path) -> dict[str, Any]:
    """What a yaml asks for. ClickException where a key is missing, unknown, or not of its kind."""
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    told = {"without": "", **told} if isinstance(told, dict) else {}
    for key, kind in KEYS.items():
        if not isinstance(told.get(key), kind) or set(told) - set(KEYS):
            raise click.ClickException(f"{path}: has the keys {', '.join(map(str, told))}; expected {', '.join(KEYS)}: options of the three commands in "
                                       "a line each, and under teachers NAME: LIBRARY:MODEL...; correct it")  # fmt: skip
    return told


def commands(told: dict[str, Any], images: str, out: Path, data: tuple[str, ...]) -> list[list[str]]:
    """The words of every command, in order."""
    cache, runs = str(out / "cache"), [str(out / name) for name in told["teachers"]]
    asked = [word for name, address in told["teachers"].items() for word in ("--teacher", f"{name}={address}")]
    found = [["extract-features", images, cache, *asked, *shlex.split(told["extract"])]]
    for name, run in zip(told["teachers"], runs):
        found.append(
            ["train-mrmae", cache, run, *shlex.split(told["train"]), "--set", f"terms.mimic.teachers=[{name}]"]
        )
    if told["without"]:
        runs.append(str(out / "without"))
        found.append(["train-mrmae", cache, runs[-1], *shlex.split(told["without"])])
    where = [word for one in data for word in ("--data", one)]
    return [*found, ["probe-features", *runs, *where, *shlex.split(told["probe"]), "--out", str(out / "compared")]]


if __name__ == "__main__":
    main()
