"""What is said of a mistyped name or option: what it may be a slip of, and nothing else."""

import click
import pytest
from click.testing import CliRunner

from mrmae.common.suggest import Command, did_you_mean, nearest, options_like

OPTIONS = ["--flip", "--init", "--batch-size", "--blr", "--epochs", "--seed", "--warmup-epochs"]


@pytest.mark.parametrize(
    "word, meant",
    [
        ("--limit", []),
        ("--epoch", ["--epochs"]),
        ("--batchsize", ["--batch-size"]),
        ("--batch", ["--batch-size"]),
        ("--seed-value", ["--seed"]),
        ("--lr", ["--blr"]),
    ],
)
def test_an_option_is_suggested_only_where_it_may_be_meant(word: str, meant: list[str]) -> None:
    assert options_like(word, OPTIONS) == meant


def test_an_unknown_option_is_answered_with_its_slip_or_without_advice() -> None:
    @click.command(cls=Command)
    @click.option("--flip", default=0)
    def command(flip: int) -> None: ...

    told = {word: CliRunner().invoke(command, [word, "1"]).output for word in ("--limit", "--flipp")}
    assert "No such option" in told["--limit"] and "--flip" not in told["--limit"]
    assert "Did you mean" in told["--flipp"] and "--flip'?" in told["--flipp"]


def test_only_names_that_are_alike_are_suggested() -> None:
    assert nearest("vit_bse", ["resnet50", "vit_base", "vit_tiny"]) == ["vit_base", "vit_tiny"]
    assert nearest("zzz", ["resnet50"]) == [] and nearest("zzz", ["resnet50"], 1, cutoff=0.0) == ["resnet50"]


def test_where_none_is_alike_all_are_named() -> None:
    assert did_you_mean("blokc", ["block", "random"]) == "did you mean block?"
    assert did_you_mean("zzz", ["block", "random"]) == "expected one of block, random"
