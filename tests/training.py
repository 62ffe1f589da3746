"""Training in tests: on the CPU, without pictures and TensorBoard, options given flat."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from mrmae.train import loop
from mrmae.train.method import Recipe
from mrmae.train.setup import Cadence, Setup


def train_quietly(
    cache: Path | str, out: Path | str, recipe: Recipe, console: Console | None = None, **options: Any
) -> dict[str, Any]:
    """The summary of `train`. options: fields of Setup and Cadence."""
    options = {"device": "cpu", "panels_every": 0, "tensorboard": False, "page": False} | options
    setup, cadence = (
        kind(**{field.name: options.pop(field.name) for field in dataclasses.fields(kind) if field.name in options})
        for kind in (Setup, Cadence)
    )
    assert not options, f"no options of a run: {options}"
    return loop.train(cache, out, recipe, setup, cadence, console)
