"""Training in tests: a student of three blocks, on the CPU, without pictures and TensorBoard, options given flat; targets and distances by their formulas."""

import dataclasses
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mrmae.train import loop
from mrmae.train.method import Recipe
from mrmae.train.method.phi_s import phi_s
from mrmae.train.setup import Cadence, Setup


@register_model
def test_vit_of_3(**options: Any) -> VisionTransformer:
    """timm's `test_vit` with half its blocks."""
    return timm.create_model("test_vit", **{"depth": 3} | options)


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


def restated(x: Tensor, value: Tensor, transform: str) -> Tensor:
    """The targets of `value` [b, l, d], by the formulas, from all of the column's tokens [n, l, d]."""
    flat, at = x.flatten(0, 1), x.mean(0)
    left = (x - at).flatten(0, 1)
    return {
        "none": lambda: value,
        "ln0": lambda: F.layer_norm(value, value.shape[-1:], eps=1e-5),
        "l2": lambda: F.normalize(value, dim=-1),
        "channel": lambda: (value - flat.mean(0)) / flat.std(0, correction=0),
        "phi_s": lambda: (value - flat.mean(0)) @ phi_s(torch.cov(flat.T, correction=0)).T,
        "position": lambda: (value - at) / left.std(0, correction=0),
        "position+ln0": lambda: F.layer_norm(value - at, value.shape[-1:], eps=1e-5),
        "position+phi_s": lambda: (value - at) @ phi_s(torch.cov(left.T, correction=0)).T,
    }[transform]()


def distance_of(told: Tensor, goal: Tensor, distance: str) -> Tensor:
    """The mean distance of predictions to targets, by the formulas."""
    if distance == "cosd":
        return 1 - F.cosine_similarity(told, goal, dim=-1).mean()
    error = (told - goal).abs()
    return (error**2 if distance == "mse" else torch.where(error < 1, error**2 / 2, error - 0.5)).mean()


def facet_tail(width: int) -> dict[str, torch.Tensor]:
    """What a block of two heads makes of its input."""
    draw = torch.Generator().manual_seed(3)
    return {
        "layer_norm.weight": torch.rand(width, generator=draw) + 0.5,
        "layer_norm.bias": torch.randn(width, generator=draw),
        "layer_norm.eps": torch.tensor(1e-6),
        "qkv.weight": torch.randn(3 * width, width, generator=draw) / 2,
        "qkv.bias": torch.randn(3 * width, generator=draw),
        "qkv.heads": torch.tensor(2.0),
    }
