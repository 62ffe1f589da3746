"""JSON of a cache as it must be: what is read has the types that its writer gave it, so that nothing behind has to ask.

Types are annotations: int, float, bool, str, `T | None`, list, tuple, `dict[str, T]`, Any, dataclasses and typed dicts. Keys that a
type does not know are left to who reads them.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrmae.common.backend import read_bytes, size_of
from mrmae.common.errors import shortened

INTEGERS = range(-(2**63), 2**64)
DEPTH = 50  # of lists and objects in each other; a cache's own have seven
WORDS = {int: "an integer of 64 bits", float: "a finite number", bool: "true or false", str: "Unicode text"}


def read_json(file: Path, kind: Any, most_bytes: int) -> Any:
    """The JSON value of type `kind` in a file. OSError, or ValueError where it has more bytes, or holds another value."""
    if (n_bytes := size_of(file)) > most_bytes:
        raise ValueError(f"{n_bytes} bytes; at most {most_bytes} were expected")
    return parsed(read_bytes(file), kind)


def parsed(content: bytes, kind: Any) -> Any:
    """The JSON value of type `kind` that the bytes hold. ValueError says where in it another one is."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("lists or objects lie too deep in each other") from None
    expect_kind(value, kind)
    return value


def expect_kind(value: Any, kind: Any, at: str = "", depth: int = DEPTH) -> None:
    """ValueError unless a JSON value is of the annotated type `kind`. at: its place, for the error."""
    origin, arguments, has_fields = anatomy(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else expect_kind(value, arguments[0], at, depth)
    if depth == 0:
        raise ValueError(f"{shortened(at, 200)}: lists or objects lie too deep in each other")
    if kind is Any:
        kind = plain_kind(value)
        origin, arguments, has_fields = anatomy(kind)
    if has_fields:
        expect_fields(value, kind, at, depth)
    elif origin is dict:
        expect_shape(isinstance(value, dict), at, value, "an object")
        for key, inner in value.items():
            expect_shape(is_text(key), at, key, "names in Unicode")
            expect_kind(inner, arguments[1], f"{at}.{key}", depth - 1)
    elif origin in (list, tuple):
        expect_shape(isinstance(value, list), at, value, "a list")
        if origin is list and arguments[0] is int and are_integers(value):
            return  # sizes of a shard's images: thousands in each of thousands of records
        fixed = origin is tuple and arguments[-1] is not ...
        expect_shape(not fixed or len(value) == len(arguments), at, value, f"a list of {len(arguments)}")
        for i, inner in enumerate(value):
            expect_kind(inner, arguments[i] if fixed else arguments[0], f"{at}[{i}]", depth - 1)
    else:
        expect_shape(is_plain(value, kind), at, value, WORDS.get(kind, "null"))


@functools.cache
def anatomy(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Origin and arguments of an annotation, and whether it has fields: asked thousands of times where a cache's records are read."""
    has_fields = dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)
    return typing.get_origin(kind), typing.get_args(kind), has_fields


def plain_kind(value: Any) -> Any:
    """The type of any JSON value."""
    return dict[str, Any] if isinstance(value, dict) else list[Any] if isinstance(value, list) else type(value)


def is_plain(value: Any, kind: Any) -> bool:
    """Whether a value is a number, text, truth or null of that type."""
    if kind is float:
        return type(value) in (int, float) and abs(value) < 2**1000 and math.isfinite(value)
    if type(value) is not kind:
        return False
    return value in INTEGERS if kind is int else is_text(value) if kind is str else True


def are_integers(values: list[Any]) -> bool:
    """Whether all are integers of 64 bits."""
    return not values or (set(map(type, values)) == {int} and min(values) in INTEGERS and max(values) in INTEGERS)


def is_text(value: str) -> bool:
    """Whether text is Unicode: JSON can hold halves of a character, which no file name and no hash can."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def expect_shape(true: bool, at: str, value: Any, wanted: str) -> None:
    """ValueError unless `true`."""
    if not true:
        text = ascii(value)
        at = shortened(at.lstrip(".") or "the whole", 200)
        raise ValueError(f"{at} is {text if len(text) < 80 else text[:70] + '...'}; expected {wanted}")


@functools.cache
def hints(kind: Any) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Types of the fields of a dataclass or typed dict, and the names that must be there."""
    if typing.is_typeddict(kind):
        return typing.get_type_hints(kind), kind.__required_keys__
    must = (f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING)
    return typing.get_type_hints(kind), frozenset(must)


def expect_fields(value: Any, kind: Any, at: str, depth: int) -> None:
    """ValueError unless the fields of a dataclass or typed dict are there and of their types."""
    expect_shape(isinstance(value, dict), at, value, "an object")
    known, must = hints(kind)
    for name in sorted(must - set(value)):
        raise ValueError(f"{shortened(at.lstrip('.') or 'it', 200)} has no {name!r}")
    for name, inner in known.items():
        if name in value:
            expect_kind(value[name], inner, f"{at}.{name}", depth - 1)
