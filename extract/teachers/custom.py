"""A teacher of one's own: a Python function makes it and says how it is fed. Importing it runs its code, so only where that was allowed."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mrmae.extract.teachers.address import INTERPOLATIONS, TeacherRequest
from mrmae.extract.teachers.tower import Origin, Preprocessing, Tower, activation_of
from mrmae.extract.teachers.weights import weights_sha256

NEEDED = ("module", "mean", "std", "patch")
KNOWN = (*NEEDED, "prefix", "interpolation", "input_size")


def build_custom(request: TeacherRequest, *, grid: int, allow_code: bool) -> Tower:
    """The teacher that `python:package.module:function` gives, called with the options behind `?`.

    The function returns a dict: module, an nn.Module from images [b, 3, h, w] to tokens [b, prefix + h / patch * w / patch, d], patches in
    raster order; mean and std of pixels in [0, 1], one per channel; patch, pixels per side; and where they differ: prefix (0; the
    first of them is the CLS token), interpolation ("bicubic"), input_size (grid x patch). ValueError where it does not, naming what.
    """
    if not allow_code:
        raise ValueError(f"{request.where}: runs the code of {request.model}; --allow-code was expected with it, which extract-features takes; "
                         "give it if you trust that code")  # fmt: skip
    told = called(request)
    patch, prefix = int(told["patch"]), int(told.get("prefix", 0))
    side = request.input_size or int(told.get("input_size", grid * patch))
    if patch < 1 or prefix < 0 or side % patch:
        raise ValueError(f"{request.where}: {request.model} says patch {patch}, prefix {prefix} and input_size {side}; expected a patch of at "
                         "least 1 px, a prefix of at least 0, and an input of whole patches; correct the function")  # fmt: skip
    module: nn.Module = told["module"].eval().requires_grad_(False)
    cells = side // patch

    def features(x: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = module(x)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[:2] != (len(x), prefix + cells**2):
            shape = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"{request.where}: its module gives {shape} for {len(x)} images of {side} px; expected "
                             f"[{len(x)}, {prefix} + {cells} x {cells}, d]; correct the module, patch or prefix")  # fmt: skip
        cls = tokens[:, 0] if prefix else None
        return tokens[:, prefix:].transpose(1, 2).reshape(len(x), -1, cells, cells), cls

    return Tower(
        module=module,
        features=features,
        attention_row=None,
        patch=patch,
        input_size=(side, side),
        origin=Origin(request.where, None, preprocessing(request, told), weights_sha256(module.state_dict())),
        activation=activation_of(module),
        prefix_tokens=prefix,
        tap="output",
        tail={},
        attention_backend="none",
    )


def called(request: TeacherRequest) -> Mapping[str, Any]:
    """What the function returned. ValueError where it is not there, fails, or returns something else than such a dict."""
    name, _, function = request.model.partition(":")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            told: Mapping[str, Any] = getattr(importlib.import_module(name), function)(**request.options)
    except Exception as error:  # anything can go wrong in somebody's code
        raise ValueError(f"{request.where}: {request.model} failed ({type(error).__name__}: {error}); expected a function on Python's path "
                         "(PYTHONPATH) that makes a teacher; correct it") from error  # fmt: skip
    if request.tap or request.activation or request.file or request.weights == "random":
        raise ValueError(f"{request.where}: the function alone decides on weights, tap and activation; leave these out, or hand them to it as ?key=value")  # fmt: skip
    lacks = [key for key in NEEDED if not isinstance(told, Mapping) or key not in told]
    if lacks or set(told) - set(KNOWN) or not isinstance(told["module"], nn.Module):
        raise ValueError(f"{request.where}: {request.model} returned {sorted(told) if isinstance(told, Mapping) else type(told).__name__}; expected a "
                         f"dict with an nn.Module as module, {', '.join(NEEDED[1:])}, and perhaps {', '.join(KNOWN[4:])}")  # fmt: skip
    return told


def preprocessing(request: TeacherRequest, told: Mapping[str, Any]) -> Preprocessing:
    """How pixels reach the module: what the address says, else what the function says."""
    mean, std = (
        tuple(float(x) for x in given or own)
        for given, own in ((request.mean, told["mean"]), (request.std, told["std"]))
    )
    chosen = request.interpolation or told.get("interpolation", "bicubic")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or chosen not in INTERPOLATIONS:
        raise ValueError(f"{request.where}: mean {mean}, std {std}, interpolation {chosen!r}; expected three means, three deviations above 0, "
                         f"and one of {', '.join(INTERPOLATIONS)}")  # fmt: skip
    return Preprocessing(mean, std, chosen)
