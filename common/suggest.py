"""Which known names are like a mistyped one: the end of many error messages."""

import difflib
from collections.abc import Iterable

CUTOFF = 0.5  # of difflib's similarity: `vit_bas` finds vit_base, `zzz` finds nothing


def nearest(word: str, names: Iterable[str], n: int = 3, *, cutoff: float = CUTOFF) -> list[str]:
    """Up to `n` of the names like `word`, the most similar first; none where none is. cutoff: 0 takes what is there."""
    return difflib.get_close_matches(word, list(names), n=n, cutoff=cutoff)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`did you mean x or y?`, or `expected one of ...` with all the names where none is near."""
    names = list(names)
    close = nearest(word, names)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"
