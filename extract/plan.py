"""What an extraction will do, before it does it: images, views, columns, bytes, space."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from mrmae.common.progress import human_bytes
from mrmae.shards.format import DTYPES, BlockRule, TeacherSpec, ViewRecipe
from mrmae.shards.store import STORAGES

# Measured on photographs of people, clothes and streets: quality 95, 4:4:4, 224 px. Busy textures take twice as much.
JPEG_BYTES_PER_PIXEL = 0.75


def sample_bytes(teacher: TeacherSpec, dtype: str, format: str, blocks: int = 1) -> int:
    """Bytes of one sample and view in a teacher's column: tokens, scale, CLS, attention, norm, and what the format adds."""
    l = teacher.grid[0] * teacher.grid[1]
    stored = DTYPES[dtype]
    parts = [l * teacher.width * stored.bytes, 2 * l]
    parts += [2 * l] * stored.scaled + [2 * teacher.width] * teacher.has_cls + [2 * l] * teacher.has_attention
    chunks = len(parts) + (blocks - 1) * (1 + stored.scaled)
    return sum(parts) + STORAGES[format].OVERHEAD_BYTES * chunks


def jpeg_bytes(recipe: ViewRecipe) -> int:
    """Estimated bytes of one stored view with its JSON and tar headers."""
    return int(recipe.size**2 * JPEG_BYTES_PER_PIXEL) + 2048


def describe(
    cache: Path,
    recipe: ViewRecipe,
    teachers: Sequence[TeacherSpec],
    *,
    images: int,
    labels: int,
    views: int,
    dtype: str,
    format: str,
    shard_samples: int,
    blocks: BlockRule | None = None,
) -> str:
    """The plan as a person reads it."""
    total = images * views
    shards = -(-images // shard_samples)
    rows = [("views", f"{recipe.size} px JPEG, quality 95 (estimate)", jpeg_bytes(recipe))]
    for teacher in teachers:
        size = sample_bytes(teacher, dtype, format, blocks.blocks if blocks else 1)
        rows.append((teacher.column, about(teacher, dtype), size))
    per_view = sum(row[2] for row in rows)
    lines = [
        f"{cache}: {images} images, {labels} labels, {views} view{'s' * (views > 1)} each, {shards} shards of "
        f"{shard_samples}, {format}",
        f"crops of {recipe.crop_scale[0]:g} to {recipe.crop_scale[1]:g} of the area, flip {recipe.flip:g}, "
        f"seed {recipe.seed}",
        *([f"token blocks: {blocks_in_words(blocks, teachers[0].grid)}"] if blocks and teachers else []),
        *(f"  {name:<24} {what:<64} {human_bytes(size):>8}/view {human_bytes(size * total):>8}"
          for name, what, size in rows),
        f"  {'total':<24} {'':<64} {human_bytes(per_view):>8}/view {human_bytes(per_view * total):>8}",
        space(cache, per_view * total),
    ]  # fmt: skip
    return "\n".join(lines)


def blocks_in_words(blocks: BlockRule, grid: tuple[int, int]) -> str:
    """The rule of the blocks: how many, of how many patches, and what they are good for."""
    n = blocks.rows(grid[0] * grid[1])
    return f"{blocks.blocks} of {n} patches, seed {blocks.seed}; train-mrmae --set mask.sampler=block reads one of them"


def choices(
    recipe: ViewRecipe, teachers: Sequence[TeacherSpec], *, images: int, views: int, format: str, blocks: int
) -> str:
    """What other choices would cost: bytes per image and view, and of the whole cache."""
    every = {f"{dtype}, all teachers": teachers for dtype in DTYPES}
    every |= {f"int8, only {t.column}": [t] for t in teachers if len(teachers) > 1} | {"no teachers: views alone": []}
    lines = []
    for name, kept in every.items():
        size = jpeg_bytes(recipe) + sum(sample_bytes(t, name.partition(",")[0], format, blocks) for t in kept)
        whole = "  ".join(f"{human_bytes(size * k * images):>8} with {k}" for k in sorted({1, 2, views}))
        lines.append(f"  {name:<40} {human_bytes(size):>8}/view  {whole}")
    return "\n".join([f"choices, by views per image ({format}):", *lines, *read_in_blocks(teachers)])


def read_in_blocks(teachers: Sequence[TeacherSpec], blocks: int = 4) -> list[str]:
    """What training reads per image of int8 tokens, in raster order and as one of so many token blocks; the view comes on top."""
    l = teachers[0].grid[0] * teachers[0].grid[1] if teachers else 0
    if not l or l % blocks:
        return []
    whole = sum(l * (t.width + 2) for t in teachers)
    return [f"  training reads, beside the view, {human_bytes(whole)} per image of int8 tokens, and {human_bytes(whole // blocks)} with "
            f"--token-layout blocks --blocks {blocks}"]  # fmt: skip


def about(teacher: TeacherSpec, dtype: str) -> str:
    """A column in a few words: model, weights, grid, width, dtype, what else is stored."""
    model = f"{teacher.model}/{teacher.tag}" if teacher.tag else teacher.model
    weights = "RANDOM weights" if teacher.weights == "random" else f"{teacher.weights} weights"
    extras = "".join([" +cls" * teacher.has_cls, " +attention" * teacher.has_attention])
    h, w = teacher.grid
    resampled = f" (from {teacher.native_grid[0]}x{teacher.native_grid[1]})" if teacher.resample != "none" else ""
    return f"{teacher.library} {model}, {weights}, {h}x{w}x{teacher.width}{resampled} {dtype}{extras}"


def space(cache: Path, wanted: int) -> str:
    """Free space where the cache will lie, with a warning when it is too little."""
    folder = next(parent for parent in [cache, *cache.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    warning = "; THIS IS NOT ENOUGH" if wanted > free else ""
    return f"{human_bytes(free)} are free there{warning}"
