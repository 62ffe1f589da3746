"""Plain yaml values -> frozen dataclasses, strictly: every key and type is checked, nothing is guessed.

Errors name the key, its value and what was expected. Only what recipes use is supported: numbers, strings, bools, Literal
choices, tuples, `T | None`, nested dataclasses and `dict[str, dataclass]`.
"""

import math
import re
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

import yaml

from mrmae.common.suggest import did_you_mean


class UniqueKeys(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's is ten times faster
    """PyYAML's safe loader keeps the last of two equal keys; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of `node`. Raises ConstructorError where a key appears twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def override(values: dict[str, Any], text: str) -> None:
    """Set one dotted key of nested dicts in place from `a.b=value`, the value in yaml."""
    name, equals, value_text = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {text!r}: is not KEY=VALUE; expected e.g. --set optim.lr_per_256=1.0e-3")
    try:
        value = yaml.load(value_text, Loader=UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: the value is not valid yaml ({error}); quote it") from error
    for key in keys[:-1]:
        child = values.setdefault(key, {})
        if child is None:
            child = values[key] = {}
        if not isinstance(child, dict):
            raise ValueError(f"--set {text!r}: {key} is {shown_value(child)}, which has no keys; set {key} itself")
        values = child
    values[keys[-1]] = value


def from_values(kind: Any, values: Any, where: str, at: str = "") -> Any:
    """A dataclass of type `kind` from a mapping. Raises ValueError at the first unknown, missing or mistyped key."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {at or 'the recipe'} is {shown_value(values)}; a mapping of its keys was expected")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            advice = meant_key(kind, str(key)) if not at else None
            raise ValueError(
                f"{where}: {dotted(at, key)} is not a key of a recipe; {advice or did_you_mean(str(key), hints)}"
            )
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    for key in required:
        if key not in values:
            raise ValueError(f"{where}: {dotted(at, key)} is missing; expected {in_words(hints[key])}; add it")
    return kind(**{key: converted(hints[key], value, where, dotted(at, key)) for key, value in values.items()})


def meant_key(kind: Any, word: str) -> str | None:
    """`did you mean mask.ratio?` for `mask_ratio`, `maskratio` or `ratio`, optim.lr_per_256 for `lr`; None where no dotted key is like it."""
    flat = squeezed(word)
    ends = {name: name.split(".") for name in dotted_keys(kind)}
    whole = [name for name, parts in ends.items() if flat in (squeezed("".join(parts[i:])) for i in range(len(parts)))]
    found = whole or [name for name, parts in ends.items() if parts[-1].startswith(f"{word}_")]
    return f"did you mean {' or '.join(found)}?" if found else None


def squeezed(name: str) -> str:
    """The letters and figures alone."""
    return re.sub("[^a-z0-9]", "", name.lower())


def dotted_keys(kind: Any, at: str = "") -> Iterator[str]:
    """The dotted names of all keys inside the dataclass `kind`; of a dict's entries as `terms.NAME.weight`."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = [part for part in (hint, *typing.get_args(hint)) if is_dataclass(part)]
        here = f"{dotted(at, name)}.NAME" if typing.get_origin(hint) is dict else dotted(at, name)
        yield from (dotted_keys(inner[0], here) if inner else [here])


def converted(kind: Any, value: Any, where: str, at: str) -> Any:
    """`value` as the annotated type `kind`. A number like 1e-3, which yaml reads as a string, is a float."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        kinds = [one for one in arguments if one is not type(None)]
        fits = next((one for one in kinds if type(value) is one), kinds[-1])
        return None if value is None else converted(fits, value, where, at)
    if is_dataclass(kind):
        return from_values(kind, value, where, at)
    if origin is dict and isinstance(value, Mapping):
        entries = ((entry_name(key, where, at), inner) for key, inner in value.items() if inner is not None)
        return {key: from_values(arguments[1], inner, where, dotted(at, key)) for key, inner in entries}
    if origin is tuple and isinstance(value, list | tuple):
        inner_kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(inner_kinds) == len(value):
            return tuple(converted(k, v, where, f"{at}[{i}]") for i, (k, v) in enumerate(zip(inner_kinds, value)))
    elif origin is Literal and isinstance(value, str):
        if value in arguments:
            return value
        raise ValueError(f"{where}: {at} is {shown_value(value)}; {did_you_mean(value, arguments)}")
    elif kind is float and (number := finite_float(value)) is not None:
        return number
    elif kind is not float and type(value) is kind:
        return value
    raise ValueError(f"{where}: {at} is {shown_value(value)}; expected {in_words(kind)}")


def finite_float(value: Any) -> float | None:
    """`value` as a finite float, or None where it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def entry_name(value: Any, where: str, at: str) -> str:
    """A key of a `dict[str, ...]`. Names become parts of parameter names and of `--set` keys, so they hold no dots."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", value):
        raise ValueError(f"{where}: {at} has the name {value!r}; expected letters, digits, - and _")
    return value


def in_words(kind: Any) -> str:
    """The annotated type `kind` in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return " or ".join(in_words(one) for one in arguments if one is not type(None)) + ", or null"
    if origin is Literal:
        return one_of(arguments)
    if origin is tuple:
        few = "a list" if arguments[-1] is ... else f"a list of {len(arguments)}"
        return f"{few}, each {in_words(arguments[0])}"
    if origin is dict or is_dataclass(kind):
        return "a mapping"
    return {float: "a finite number", int: "an integer", bool: "true or false", str: "a string"}[kind]


def plain_values(value: Any) -> Any:
    """Tuples become lists, so that yaml and json give the same value back."""
    if isinstance(value, dict):
        return {key: plain_values(inner) for key, inner in value.items()}
    return [plain_values(inner) for inner in value] if isinstance(value, tuple) else value


def dotted_values(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= dotted_values(value, dotted(at, key)) if isinstance(value, dict) else {dotted(at, key): value}
    return result


def dotted(at: str, key: object) -> str:
    """The dotted name of `key` inside `at`."""
    return f"{at}.{key}" if at else str(key)


def shown_value(value: Any) -> str:
    """A value as it should stand in an error."""
    return {dict: "a mapping", type(None): "null"}.get(type(value), repr(value))


def one_of(names: Iterable[str]) -> str:
    """`one of a, b, c`."""
    return "one of " + ", ".join(names)
