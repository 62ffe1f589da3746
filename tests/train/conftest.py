"""Tiny stand-ins for a cache: two teachers on a small grid, and batches as the cache stores them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from training import facet_tail

from mrmae.shards.stats import Stats
from mrmae.train.method.recipe import Recipe, load_recipe
from mrmae.train.method.targets import NEEDS_STATISTICS, Batch, CacheInfo, GivenBoxes, TeacherInfo

TINY = [
    "student.decoder.depth=1",
    "student.decoder.width=16",
    "student.decoder.heads=2",
    "student.decoder.mlp_ratio=2.0",
]
SHORT = ["student.model=test_vit_of_3", "student.fused_blocks=[1, 2]"]


def make_recipe(name: str, *overrides: str, blocks: int = 6) -> Recipe:
    """A shipped recipe with a student (of 6 blocks or 3) and a decoder for tests, and counts of patches that fit a grid of 4 x 4."""
    recipe = load_recipe(name)
    small = [x for x in TINY if recipe.student.decoder is not None or "decoder" not in x]
    small += ["student.model=test_vit", "student.fused_blocks=[2, 4]"] if blocks == 6 else SHORT
    fewer = 12 // blocks
    if "mcmae" in recipe.student.model:
        small.append("student.model=test_mcmae")
    if recipe.student.decoder is not None and recipe.student.decoder.kind == "taps":
        small.append(f"student.decoder.blocks={[5, 3, 2] if blocks == 6 else [3, 2, 1]}")
    for key, term in recipe.terms.items():
        if term.tap.startswith("placed"):
            small.append(f"terms.{key}.tap=placed{-(-int(term.tap.removeprefix('placed')) // fewer)}")
        if term.tap.startswith("qkv"):
            small.append(f"terms.{key}.tap=qkv{-(-int(term.tap.removeprefix('qkv')) // fewer)}")
    if recipe.student.prune is not None:
        small.append(f"student.prune={{before: {[1, 3, 5] if blocks == 6 else [1, 2]}, keep: 0.7}}")
    if recipe.student.boxes is not None:
        tiny = {
            "most": 2,
            "cells": 4,
            "hide": 8,
            "crop": [8, 12],
            "depth": 1,
            "behind": 1,
            "width": 16,
            "heads": 2,
            "least": 1,
        }
        small += [f"student.boxes.{key}={value}" for key, value in tiny.items()]
    for field in ("n_keep", "n_predict"):
        if (n := getattr(recipe.mask, field) or 0) >= 1:
            small.append(f"mask.{field}={max(2, round(n / 196 * 16))}")
    return load_recipe(name, [*small, *overrides])


def make_info(grid: int = 4, patch: int = 4, channels: int = 3) -> CacheInfo:
    """clip: int8 with standardised channels and a CLS token; dino: float16, wider than it."""
    draw = torch.Generator().manual_seed(5)
    mean, std = torch.randn(8, generator=draw), torch.rand(8, generator=draw) + 0.5
    clip = TeacherInfo(8, mean, std, has_cls=True, has_attention=True, column="clip.pre_tail")
    dino = TeacherInfo(12, has_cls=True, has_attention=True, column="dino.pre_tail", has_scale=False)
    return CacheInfo(grid * patch, (grid, grid), {"clip": clip, "dino": dino}, channels)


def make_batch(info: CacheInfo, b: int = 2, seed: int = 0) -> Batch:
    """`b` random images with everything a cache can hold of both teachers, each with a partner, which only recipes of pairs read."""
    draw, l = torch.Generator().manual_seed(seed), info.n_patches
    targets: dict[str, dict[str, torch.Tensor]] = {}
    for name, teacher in info.teachers.items():
        d = teacher.width
        targets[name] = {
            "tokens": torch.randn(b, l, d, generator=draw).half(),
            "cls": torch.randn(b, d, generator=draw).half(),
            "attention": (torch.rand(b, l, generator=draw) / l).half(),
            "norm": (torch.rand(b, l, generator=draw) * 9 + 1).half(),
        }
        if teacher.has_scale:
            targets[name]["tokens"] = torch.randint(-127, 128, (b, l, d), dtype=torch.int8, generator=draw)
            targets[name]["scale"] = (torch.rand(b, l, generator=draw) * 0.02 + 0.01).half()
    for name, dtype in info.maps.items():
        bits = 1 << torch.randint(0, 11, (b, l), dtype=torch.int32, generator=draw)
        targets[f"map:{name}"] = {"map": bits if dtype == "uint16" else torch.randn(b, l, generator=draw).half()}
    for name, width in info.vectors.items():
        targets[f"map:{name}"] = {"map": torch.randn(b, l, width, generator=draw).half()}
    side = (b, info.size, info.size, info.channels)
    pixels = torch.randint(0, 256, side, dtype=torch.uint8, generator=draw)
    hashes = torch.randint(-(2**62), 2**62, (b,), generator=draw)
    corners = torch.rand(b, 2, 2, 2, generator=draw).sort(dim=2).values * (info.size - 3)
    boxes = GivenBoxes((corners + torch.tensor([[0.0], [3.0]])).flatten(2), (torch.arange(8) * 2).repeat(b, 2, 1))
    labels = (torch.arange(b)[:, None] % 3 == torch.arange(len(info.classes))).to(torch.uint8) if info.classes else None
    batch = Batch(hashes, pixels, targets, boxes=boxes, labels=labels)
    return replace(batch, partner=make_batch(info, b, seed + 1000)) if seed < 1000 else batch


def info_for(name: str) -> CacheInfo:
    """A cache that the shipped recipe `name` can train on: clip and dino, or a column for each tap that its terms name."""
    recipe = load_recipe(name)
    patch = 16 if "mcmae" in recipe.student.model else 8 if any(t.target == "hog" for t in recipe.terms.values()) else 4
    taps = {term.teacher_tap for term in recipe.terms.values() if term.teacher_tap}
    if maps := {term.map: "uint16" for term in recipe.terms.values() if term.map and term.classes}:
        return replace(make_info(4, patch), maps=maps)
    if vectors := {term.map: 16 for term in recipe.terms.values() if term.map}:
        return replace(make_info(4, patch), vectors=vectors)
    if any(term.target == "labels" for term in recipe.terms.values()):
        return replace(make_info(4, patch), classes=("a", "b", "c"))
    if any(term.transform in NEEDS_STATISTICS for term in recipe.terms.values()):
        return with_statistics(make_info(4, patch))
    if recipe.mask.source.startswith("map:"):
        kind = "uint16" if recipe.mask.sampler == "crfr_p" else "float16"
        return replace(make_info(4, patch), maps={recipe.mask.source.removeprefix("map:"): kind})
    if any(term.relation for term in recipe.terms.values()):
        return with_facets(4 * patch, *taps)
    if not taps:
        return make_info(4, patch)
    named = {f"vit{tap.removeprefix('block_')}": tap for tap in sorted(taps)}
    layers = {key: TeacherInfo(8, None, None, True, True, f"{key}.{tap}") for key, tap in named.items()}
    return CacheInfo(4 * patch, (4, 4), layers)


def with_facets(size: int, *taps: str) -> CacheInfo:
    """A cache with clip's last tokens, and a column for each block whose queries, keys and values follow from its stored input."""
    stored = {"clip": TeacherInfo(8, None, None, True, True, "clip.pre_tail")}
    derived = {}
    for tap in (tap for tap in taps if tap.startswith("qkv_")):
        name = f"vit{tap.removeprefix('qkv_')}"
        stored[name] = TeacherInfo(8, None, None, True, True, f"{name}.input_{tap.removeprefix('qkv_')}")
        derived[f"{name}:{tap}"] = replace(
            stored[name], width=24, column=f"{name}.{tap}", source=name, tail=facet_tail(8)
        )
    return CacheInfo(size, (4, 4), stored, derived=derived)


def with_statistics(info: CacheInfo) -> CacheInfo:
    """The same cache with moments of every column and its CLS."""

    def moments(about: TeacherInfo, l: int) -> Stats:
        draw = torch.Generator().manual_seed(about.width)
        return Stats("", 1, torch.randn(l, about.width, generator=draw), torch.eye(about.width))

    known = {
        name: replace(about, stats=replace(moments(about, info.n_patches), cls=moments(about, 1)))
        for name, about in info.teachers.items()
    }
    return replace(info, teachers=known)


@pytest.fixture
def info_of_recipe() -> Callable[[str], CacheInfo]:
    """`info_of_recipe(name)`: a cache that the shipped recipe can train on."""
    return info_for


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """`tiny_recipe(name, *overrides)`: a shipped recipe with a student and a decoder for tests."""
    return make_recipe


@pytest.fixture
def tiny_info() -> Callable[..., CacheInfo]:
    """`tiny_info(grid, patch, channels)`: what a cache with the teachers clip (int8) and dino (float16) would say."""
    return make_info


@pytest.fixture
def tiny_batch() -> Callable[..., Batch]:
    """`tiny_batch(info, b, seed)`: random images and targets as such a cache stores them."""
    return make_batch
