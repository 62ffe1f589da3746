"""The tail of a teacher, its final norm and projection: the taps behind it follow from `pre_tail` and are never stored twice."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae.common.backend import exists, read_bytes
from mrmae.common.files import publish
from mrmae.shards.format.spec import TeacherSpec

BEHIND = ("post_ln", "projected")  # taps that follow from `pre_tail` and a tail
LAYER_TAP = re.compile(
    r"block_\d+"
)  # taps that a tail may be applied to likewise: `block_7_post_ln`, `block_7_projected`
Tail = Mapping[str, Any]  # tensors; epsilons may be numbers


def has_norm(tail: Tail) -> bool:
    """Whether a tail has a final norm, without which nothing follows from it."""
    return "layer_norm.weight" in tail or "rms_norm.weight" in tail


def taps_behind(tail: Tail) -> tuple[str, ...]:
    """The taps that follow from `pre_tail` by this tail."""
    if not has_norm(tail):
        return ()
    return BEHIND if "proj.weight" in tail else BEHIND[:1]


def stored_tap(tap: str) -> str:
    """The tap to extract for one that a recipe names: `block_7` for `block_7_projected`, any other as it is."""
    block = LAYER_TAP.match(tap)
    return block[0] if block else tap


def derived_specs(specs: Sequence[TeacherSpec], tail_of: Callable[[str], Tail]) -> dict[str, tuple[TeacherSpec, str]]:
    """(spec, stored column it follows from) of every column that is not stored and need not be, by name.

    tail_of: a teacher's tail by its name, empty where there is none.
    """
    stored, found = {spec.column for spec in specs}, {}
    for source in (spec for spec in specs if spec.tap == "pre_tail" or LAYER_TAP.fullmatch(spec.tap)):
        tail, before = tail_of(source.name), "" if source.tap == "pre_tail" else f"{source.tap}_"
        for tap in taps_behind(tail):
            width = source.width if tap == "post_ln" else len(tail["proj.weight"])
            spec = dataclasses.replace(source, tap=before + tap, width=width)
            found[spec.column] = (spec, source.column)
    return {name: about for name, about in found.items() if name not in stored}


def apply_tail(tokens: Tensor, tail: Tail, tap: str) -> Tensor:
    """Tokens at `post_ln` or `projected` (or `block_7_projected`), from tokens at `pre_tail` (`block_7`) [..., d] in fp32.

    ValueError where the tail does not define that tap.
    """
    tap = tap.removeprefix(f"{stored_tap(tap)}_")
    if tap not in taps_behind(tail):
        raise ValueError(f"tap {tap!r} does not follow from this tower's tail ({', '.join(tail) or 'empty'}); "
                         "expected post_ln with a norm, or projected with a norm and a projection")  # fmt: skip
    at = {key: value.to(tokens.device, tokens.dtype) for key, value in tail.items() if not key.endswith(".eps")}
    d = tokens.shape[-1:]
    if "layer_norm.weight" in at:
        eps = float(tail["layer_norm.eps"])
        tokens = F.layer_norm(tokens, d, at["layer_norm.weight"], at.get("layer_norm.bias"), eps)
    else:
        tokens = F.rms_norm(tokens, d, at["rms_norm.weight"], float(tail["rms_norm.eps"]))
    return F.linear(tokens, at["proj.weight"], at.get("proj.bias")) if tap == "projected" else tokens


def write_tail(path: Path, teacher: str, tensors: Mapping[str, Tensor]) -> None:
    """Store a teacher's final norm and projection beside the cache; replaced if there."""
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    publish(tail_path(path, teacher), data, replace=True)


def keep_tail(path: Path, teacher: str, tensors: Mapping[str, Tensor]) -> None:
    """Store a teacher's tail, unless it is there with these numbers; what is damaged is replaced."""
    try:
        there = read_tail(path, teacher)
    except ValueError:
        there = {}
    if there.keys() != tensors.keys() or not all(same(there[name], tensors[name].detach().cpu()) for name in there):
        write_tail(path, teacher, tensors)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one type and equal numbers."""
    return a.dtype == b.dtype and torch.equal(a, b)


def read_tail(path: Path, teacher: str) -> dict[str, Tensor]:
    """A teacher's tail; empty where the cache has none."""
    file = tail_path(path, teacher)
    return parse_tail(file, read_bytes(file)) if exists(file) else {}


def parse_tail(file: Path, data: bytes, width: int | None = None) -> dict[str, Tensor]:
    """The tensors that a tail's file holds. ValueError where it holds none, or such as no tail behind `width` channels has."""
    todo = "delete it and run the same extract-features command again"
    try:
        tail: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file}: no tail of a teacher ({error}); {todo}") from None
    if what := misshapen({name: tuple(tensor.shape) for name, tensor in tail.items()}, width):
        raise ValueError(f"{file}: no tail of this teacher ({what}); {todo}")
    return tail


def misshapen(shapes: Mapping[str, tuple[int, ...]], width: int | None) -> str:
    """Which tensor of a tail is missing or of a shape that no norm or projection of `width` channels has; empty for none."""
    norm = "rms_norm" if "rms_norm.weight" in shapes else "layer_norm"
    d = width or int(math.prod(shapes.get(f"{norm}.weight", (0,))))
    out = shapes.get("proj.weight", (0,))[:1]
    expected = {
        f"{norm}.weight": (d,),
        f"{norm}.bias": (d,),
        f"{norm}.eps": (),
        "proj.weight": (*out, d),
        "proj.bias": out,
    }
    if f"{norm}.weight" in shapes and f"{norm}.eps" not in shapes:
        return f"{norm}.eps is missing"
    wrong = (name for name in expected if name in shapes and shapes[name] != expected[name])
    return next((f"{name} is {list(shapes[name])}; expected {list(expected[name])}" for name in wrong), "")


def tail_path(path: Path, teacher: str) -> Path:
    """Where a teacher's tail lies."""
    return path / "tail" / f"{teacher}.safetensors"
