"""The tail of a teacher, its final norm and projection: the taps behind it follow from `pre_tail` and are never stored twice.

Likewise what a block makes of its input, `input_9`: by its first norm and one projection its queries, keys and values, `qkv_9`, and each of them, `q_9`,
`k_9`, `v_9`, of all heads. Blocks are counted from 1.
"""

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
from mrmae.shards.format.spec import FACET_TAP, TeacherSpec

BEHIND = ("post_ln", "projected")  # taps that follow from `pre_tail` and a tail
FACETS = ("qkv", "q", "k", "v")  # what follows from a block's input: all three, and each
LAYER_TAP = re.compile(
    r"block_\d+"
)  # taps that a tail may be applied to likewise: `block_7_post_ln`, `block_7_projected`
Tail = Mapping[str, Any]  # tensors; epsilons may be numbers


def has_norm(tail: Tail) -> bool:
    """Whether a tail has a final norm, without which nothing follows from it."""
    return "layer_norm.weight" in tail or "rms_norm.weight" in tail


def taps_behind(tail: Tail) -> tuple[str, ...]:
    """The taps that follow from `pre_tail` by this tail; from a block's input its facets."""
    if not has_norm(tail):
        return ()
    if "qkv.weight" in tail:
        return FACETS
    return BEHIND if "proj.weight" in tail else BEHIND[:1]


def stored_tap(tap: str) -> str:
    """The tap to extract for one that a recipe names: `block_7` for `block_7_projected`, `input_9` for `qkv_9`, any other as it is."""
    if facet := FACET_TAP.fullmatch(tap):
        return f"input_{facet[2]}"
    block = LAYER_TAP.match(tap)
    return block[0] if block else tap


def derived_specs(specs: Sequence[TeacherSpec], tail_of: Callable[[str], Tail]) -> dict[str, tuple[TeacherSpec, str]]:
    """(spec, stored column it follows from) of every column that is not stored and need not be, by name.

    tail_of: a tail by its name (`tail_name`), empty where there is none.
    """
    stored, found = {spec.column for spec in specs}, {}
    for source in (spec for spec in specs if is_source(spec.tap)):
        tail = tail_of(source.tail_name)
        for tap in taps_behind(tail):
            name, width = derived_tap(source.tap, tap), source.width * (3 if tap == "qkv" else 1)
            spec = dataclasses.replace(
                source, tap=name, width=len(tail["proj.weight"]) if tap == "projected" else width
            )
            found[spec.column] = (spec, source.column)
    return {name: about for name, about in found.items() if name not in stored}


def is_source(tap: str) -> bool:
    """Whether other taps may follow from a stored one."""
    return tap == "pre_tail" or bool(LAYER_TAP.fullmatch(tap)) or tap.startswith("input_")


def derived_tap(source: str, tap: str) -> str:
    """The name of a tap that follows: `post_ln` from `pre_tail`, `block_7_post_ln` from `block_7`, `qkv_9` from `input_9`."""
    if tap in FACETS:
        return f"{tap}_{source.removeprefix('input_')}"
    return tap if source == "pre_tail" else f"{source}_{tap}"


def apply_tail(tokens: Tensor, tail: Tail, tap: str) -> Tensor:
    """Tokens at `post_ln` or `projected` (or `block_7_projected`), from tokens at `pre_tail` (`block_7`) [..., d] in fp32.

    Likewise `qkv_9` [..., 3 d], `q_9`, `k_9` or `v_9` from `input_9`. ValueError where the tail does not define that tap.
    """
    facet = FACET_TAP.fullmatch(tap)
    tap = facet[1] if facet else tap.removeprefix(f"{stored_tap(tap)}_")
    if tap not in taps_behind(tail):
        raise ValueError(f"tap {tap!r} does not follow from this tower's tail ({', '.join(tail) or 'empty'}); "
                         "expected post_ln with a norm, or projected with a norm and a projection")  # fmt: skip
    at = {
        key: value.to(tokens.device, tokens.dtype)
        for key, value in tail.items()
        if not key.endswith((".eps", ".heads"))
    }
    d = tokens.shape[-1:]
    if "layer_norm.weight" in at:
        eps = float(tail["layer_norm.eps"])
        tokens = F.layer_norm(tokens, d, at["layer_norm.weight"], at.get("layer_norm.bias"), eps)
    else:
        tokens = F.rms_norm(tokens, d, at["rms_norm.weight"], float(tail["rms_norm.eps"]))
    if facet:
        tokens = F.linear(tokens, at["qkv.weight"], at.get("qkv.bias"))
        return tokens if tap == "qkv" else tokens.chunk(3, dim=-1)["qkv".index(tap)]
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
        "qkv.weight": (3 * d, d),
        "qkv.bias": (3 * d,),
        "qkv.heads": (),
    }
    for wanted, there in (
        (f"{norm}.eps", f"{norm}.weight"),
        ("qkv.heads", "qkv.weight"),
        ("layer_norm.weight", "qkv.weight"),
    ):
        if there in shapes and wanted not in shapes:
            return f"{wanted} is missing"
    wrong = (name for name in expected if name in shapes and shapes[name] != expected[name])
    return next((f"{name} is {list(shapes[name])}; expected {list(expected[name])}" for name in wrong), "")


def tail_path(path: Path, teacher: str) -> Path:
    """Where a teacher's tail lies."""
    return path / "tail" / f"{teacher}.safetensors"
