"""Which known names are like a mistyped one: the end of many error messages."""

import difflib
from collections.abc import Iterable

import click

CUTOFF = 0.5  # of difflib's similarity: `vit_bas` finds vit_base, `zzz` finds nothing
TYPO = 0.8  # `--epoch` finds --epochs, `--limit` does not find --flip (0.62) or --init (0.77)


def nearest(word: str, names: Iterable[str], n: int = 3, *, cutoff: float = CUTOFF) -> list[str]:
    """Up to `n` of the names like `word`, the most similar first; none where none is. cutoff: 0 takes what is there."""
    return difflib.get_close_matches(word, list(names), n=n, cutoff=cutoff)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`did you mean x or y?`, or `expected one of ...` with all the names where none is near."""
    names = list(names)
    close = nearest(word, names)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"


def options_like(word: str, options: Iterable[str]) -> list[str]:
    """The options that `word` is a slip of, or an end too short or too long: not those that only share letters with it."""
    options = list(options)
    begun = [option for option in options if option.startswith(word) or word.startswith(f"{option}-")]
    return begun or nearest(word, options, cutoff=TYPO)


class Command(click.Command):
    """A command that answers an unknown option with those that it may be a slip of; click's own answer to --limit is --flip."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's. Raises NoSuchOption, which names what `options_like` finds."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [name for option in self.get_params(ctx) for name in option.opts if name.startswith("--")]
            like = options_like(error.option_name, known)
            raise click.NoSuchOption(error.option_name, possibilities=like, ctx=ctx) from None
