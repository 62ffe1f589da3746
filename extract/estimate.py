"""What an extraction will do, take and cost, before it does it: images, columns, bytes, space; time, measured on a few images."""

import dataclasses
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mrmae.common.backend import Url
from mrmae.common.files import publish, remove, write_durably
from mrmae.common.progress import counted, human_bytes, human_time
from mrmae.common.uploads import expect_conditions
from mrmae.extract.images import Sources, decoded_as, read_image
from mrmae.extract.made_maps import made_in_words
from mrmae.extract.options import Options
from mrmae.extract.teachers import Teacher
from mrmae.extract.workers import ProcessPart
from mrmae.shards.format import (
    DTYPES,
    BadImage,
    BlockRule,
    Pixels,
    Plan,
    TeacherSpec,
    ViewRecipe,
    decode_view,
    draw_view,
    encode_view,
    key_hash,
    render,
)
from mrmae.shards.order import views_words
from mrmae.shards.store import STORAGES

# Measured on photographs of people, clothes and streets: quality 95, 4:4:4, 224 px. Busy textures take twice as much.
JPEG_SHARE = 0.25
LOSSLESS_SHARE = 0.7  # of the raw bytes: noise does not pack
PROBE_BYTES = 64 << 20
PROBE_IMAGES = 32  # decoded for the estimate, and shown to the teachers in batches


# --- bytes


def sample_bytes(teacher: TeacherSpec, dtype: str, format: str, blocks: int = 1) -> int:
    """Bytes of one sample and view in a column: tokens, scale, CLS, attention, norm, or a map, and what the format adds."""
    l = teacher.grid[0] * teacher.grid[1]
    if teacher.is_map:
        return 2 * l * teacher.width + STORAGES[format].OVERHEAD_BYTES
    stored = DTYPES[dtype]
    parts = [l * stored.token_bytes(teacher.width), 2 * l]
    parts += [2 * l] * stored.scaled + [2 * teacher.width] * teacher.has_cls + [2 * l] * teacher.has_attention
    chunks = len(parts) + (blocks - 1) * (1 + stored.scaled)
    return sum(parts) + STORAGES[format].OVERHEAD_BYTES * chunks


def view_bytes_of(recipe: ViewRecipe) -> int:
    """Estimated bytes of one stored view with its JSON and tar headers."""
    stored = recipe.stored
    of_raw = JPEG_SHARE if stored.extension == "jpg" else LOSSLESS_SHARE
    return int(recipe.size**2 * stored.bands * np.dtype(stored.dtype).itemsize * of_raw) + 2048


def plan_text(cache: Path, plan: Plan, *, labels: int) -> str:
    """The plan as a person reads it. labels: how many different ones its images have."""
    recipe, rule = plan.recipe, plan.token_layout
    total = plan.n_samples * plan.n_views
    rows = [("views", f"{recipe.size} px {recipe.stored.words} (estimate)", view_bytes_of(recipe))]
    for teacher in plan.columns:
        size = sample_bytes(teacher, plan.dtype, plan.format, rule.blocks if rule else 1)
        rows.append((teacher.column, teacher_in_words(teacher, plan.dtype), size))
    per_view = sum(row[2] for row in rows)
    lines = [
        f"{cache}: {counted(plan.n_samples, 'image')}, {counted(labels, 'label')}, {counted(plan.n_views, 'view')} each, "
        f"{counted(plan.n_shards, 'shard')} of {plan.shard_samples}, {plan.format}",
        f"crops of {recipe.crop_scale[0]:g} to {recipe.crop_scale[1]:g} of the area, flip {recipe.flip:g}, "
        f"seed {recipe.seed}",
        *([f"token blocks: {blocks_in_words(rule, plan.grid)}"] if rule and plan.columns else []),
        *(f"  {name:<24} {what:<64} {human_bytes(size):>8}/view {human_bytes(size * total):>8}"
          for name, what, size in rows),
        f"  {'total':<24} {'':<64} {human_bytes(per_view):>8}/view {human_bytes(per_view * total):>8}",
        free_space_text(cache, per_view * total),
    ]  # fmt: skip
    return "\n".join(lines)


def blocks_in_words(blocks: BlockRule, grid: tuple[int, int]) -> str:
    """The rule of the blocks: how many, of how many patches, and what they are good for."""
    n = blocks.rows(grid[0] * grid[1])
    return f"{blocks.blocks} of {n} patches, seed {blocks.seed}; train-mrmae --set mask.sampler=stored_block reads one of them"


def cost_of_choices(plan: Plan) -> str:
    """What other choices would cost: bytes per image and view, and of the whole cache."""
    teachers, blocks = plan.columns, plan.token_layout.blocks if plan.token_layout else 1
    every: dict[str, Sequence[TeacherSpec]] = {f"{dtype}, all teachers": teachers for dtype in DTYPES}
    alone = [t for t in teachers if not t.is_map]
    every |= {f"int8, only {t.column}": [t] for t in alone if len(teachers) > 1} | {"no teachers: views alone": []}
    lines = []
    for name, kept in every.items():
        size = view_bytes_of(plan.recipe) + sum(
            sample_bytes(t, name.partition(",")[0], plan.format, blocks) for t in kept
        )
        whole = "  ".join(
            f"{human_bytes(size * k * plan.n_samples):>8} with {k}" for k in sorted({1, 2, 4, plan.n_views})
        )
        lines.append(f"  {name:<40} {human_bytes(size):>8}/view  {whole}")
    views = f"  training shows one stored view of an image per epoch: {views_words()}; more can be added later"
    return "\n".join([f"choices, by views per image ({plan.format}):", *lines, views, *read_in_blocks(alone)])


def read_in_blocks(teachers: Sequence[TeacherSpec], blocks: int = 4) -> list[str]:
    """What training reads per image of int8 tokens, in raster order and as one of so many token blocks; the view comes on top."""
    l = teachers[0].grid[0] * teachers[0].grid[1] if teachers else 0
    if not l or l % blocks:
        return []
    whole = sum(l * (t.width + 2) for t in teachers)
    return [f"  training reads, beside the view, {human_bytes(whole)} per image of int8 tokens, and {human_bytes(whole // blocks)} with "
            f"--token-layout blocks --blocks {blocks}"]  # fmt: skip


def teacher_in_words(teacher: TeacherSpec, dtype: str) -> str:
    """A column in a few words: model, weights, grid, width, dtype, what else is stored."""
    if teacher.made:
        return f"map, {teacher.model} per patch, {made_in_words(teacher)}"
    if teacher.is_map:
        said = "of the only view" if teacher.resample == "none" else f"of the whole image, by {teacher.resample}"
        said, many = ("of every view", f"{teacher.width} ") if teacher.width > 1 else (said, "")
        return f"map, {many}{teacher.model} per patch, {said}"
    model = f"{teacher.model}/{teacher.tag}" if teacher.tag else teacher.model
    weights = "RANDOM weights" if teacher.weights == "random" else f"{teacher.weights} weights"
    bands = f" of bands {','.join(map(str, teacher.bands))}" if teacher.bands else ""
    extras = "".join([bands, " +cls" * teacher.has_cls, " +attention" * teacher.has_attention])
    h, w = teacher.grid
    resampled = f" (from {teacher.native_grid[0]}x{teacher.native_grid[1]})" if teacher.resample != "none" else ""
    return f"{teacher.library} {model}, {weights}, {h}x{w}x{teacher.width}{resampled} {dtype}{extras}"


def free_space_text(cache: Path, wanted: int) -> str:
    """Free space where the cache will lie, with a warning when it is too little."""
    if isinstance(cache, Url):
        return "free space at a URL is not known"
    folder = next(parent for parent in [cache, *cache.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    warning = "; THIS IS NOT ENOUGH" if wanted > free else ""
    return f"{human_bytes(free)} are free there{warning}"


# --- time


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds per view of every stage, on this machine, and bytes per second to the disk or the store."""

    decode_s: float
    forward_s: Mapping[str, float]
    write_bytes_per_s: float


def measure_rates(sources: Sources, teachers: Mapping[str, Teacher], options: Options) -> Rates:
    """Each stage alone, on images from the canonical order's beginning. ValueError when none of them can be read."""
    began, pixels = time.perf_counter(), []
    for i in range(len(sources))[:PROBE_IMAGES]:
        try:
            pixels.append(one_view(read_image(sources, i), sources[i].key, options))
        except (BadImage, OSError):
            continue
    decode_s = (time.perf_counter() - began) / max(len(pixels), 1) / options.workers
    if not pixels:
        raise ValueError(f"none of the first {PROBE_IMAGES} images can be read; expected photographs; check IMAGES")
    forward = {column: forward_seconds(teacher, pixels, options) for column, teacher in teachers.items()}
    return Rates(decode_s, forward, written_bytes_per_s(options.cache))


def one_view(data: bytes, key: str, options: Options) -> Pixels:
    """A view as a teacher sees it: decoded, cropped, encoded and decoded again."""
    recipe, stored = options.recipe, options.recipe.stored
    with decoded_as(data, stored, max_pixels=options.max_pixels, where=key) as image:
        crop = draw_view(key_hash(key), 0, image.shape[0], image.shape[1], recipe)
        return decode_view(encode_view(render(image, crop, recipe), stored), stored, recipe.size)


def forward_seconds(teacher: Teacher, pixels: Sequence[Pixels], options: Options) -> float:
    """Seconds per view of a teacher's forward at the extraction's batch size, the first batch left out."""
    batch = torch.from_numpy(np.stack([pixels[i % len(pixels)] for i in range(options.batch_size)]))
    teacher.forward(batch)
    began, n = time.perf_counter(), 0
    while n < 2 or (time.perf_counter() - began < 2 and n * len(batch) < PROBE_IMAGES):
        teacher.forward(batch).tokens[:1].cpu()  # waits for the device
        n += 1
    return (time.perf_counter() - began) / (n * len(batch))


def written_bytes_per_s(cache: Path) -> float:
    """Bytes per second, fsync included, into the folder or the store where the cache lies or will lie; nothing stays there."""
    if isinstance(cache, Url):
        expect_conditions(cache)
        return url_bytes_per_s(cache)
    folder = next(parent for parent in [cache, *cache.absolute().parents] if parent.is_dir())
    path = folder / f".probe.{os.getpid()}-{secrets.token_hex(4)}.writing"
    block = np.random.default_rng(0).bytes(1 << 20)
    try:
        began = time.perf_counter()
        n_bytes, _ = write_durably(path, (block for _ in range(PROBE_BYTES >> 20)))
        return n_bytes / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def url_bytes_per_s(cache: Path) -> float:
    """Bytes per second into the store where the cache lies or will lie; nothing stays there."""
    path = cache / f".probe.{secrets.token_hex(4)}.writing"
    content = np.random.default_rng(0).bytes(PROBE_BYTES)
    began = time.perf_counter()
    try:
        publish(path, content)
        return len(content) / (time.perf_counter() - began)
    finally:
        remove(path)


def estimate_text(rates: Rates, teachers: Sequence[TeacherSpec], options: Options, images: int) -> str:
    """Rates, what limits the extraction, how long it takes, and whether a cache is worth it."""
    on_cpu = torch.device(options.device).type == "cpu"
    blocks = rule.blocks if (rule := options.block_rule()) else 1
    view_bytes = view_bytes_of(options.recipe) + sum(
        sample_bytes(teacher, options.dtype, options.format, blocks) for teacher in teachers
    )
    forward_s, write_s = sum(rates.forward_s.values()), view_bytes / rates.write_bytes_per_s
    keeper = "store" if isinstance(options.cache, Url) else "disk"
    stages = {"decoding": rates.decode_s, "the teachers": forward_s, f"the {keeper}": write_s}
    worst = max(stages, key=lambda name: stages[name])
    # On a CPU decoding and teachers share the cores; on an accelerator every stage runs beside the others.
    seconds = max(rates.decode_s + forward_s, write_s) if on_cpu else max(stages.values())
    of = options.part.of * options.part.ranks
    total = seconds * images * options.views / of
    lines = [f"measured: decoding {1 / rates.decode_s:.3g} views/s with {options.workers} threads"]
    lines += [f"          {column} {1 / spent:.3g} views/s" for column, spent in rates.forward_s.items()]
    lines += [
        f"          {keeper} {human_bytes(rates.write_bytes_per_s)}/s = {1 / write_s:.3g} views/s",
        f"estimate: {human_time(total)} for {counted(images * options.views, 'view')}, limited by {worst}, {shared_words(of)}",
        worth_it(forward_s, view_bytes, rates.write_bytes_per_s, total, keeper),
    ]
    return "\n".join(lines)


def time_left(part: ProcessPart, *, views: int, seconds: float, left: float) -> str:
    """How long what is left of a process's part takes, shared by its ranks, and all parts, from the seconds that some views took in one."""
    spent = left * seconds / views / part.ranks
    until = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + spent))
    of = f" of part {part}" if part.of > 1 else ""
    shared = f"with {part.ranks} processes like this one" if part.ranks > 1 else "in this one process"
    every = f"; all {part.of} parts: as long where they run at once, about {human_time(part.of * spent)} one after the other"
    return (f"{counted(views, 'view')} took {seconds:.3g} s: about {human_time(spent)} for the {left:,.0f} that are left{of}, {shared}, "
            f"until {until}{every * (part.of > 1)}")  # fmt: skip


def shared_words(processes: int) -> str:
    """By how many processes the work is shared."""
    if processes == 1:
        return "in this one process; with N like it (torchrun, or --shards I/N on other machines) an Nth"
    return f"with {processes} processes like this one"


def worth_it(forward_s: float, view_bytes: float, bytes_per_s: float, total_s: float, keeper: str) -> str:
    """When this cache is worth making: it must be read at least as fast as the student trains, and more than once. keeper: `disk` or `store`."""
    fed = bytes_per_s / view_bytes
    if forward_s == 0:
        return "verdict:  every teacher is complete already"
    if fed * forward_s <= 1:
        faster = "take a faster disk" if keeper == "disk" else "train from it with --local-cache"
        return (f"verdict:  DO NOT CACHE here: this {keeper} feeds {fed:.3g} views/s (at its write rate), the teachers make "
                f"{1 / forward_s:.3g}; run them online, or {faster}")  # fmt: skip
    return (f"verdict:  worth it for more than one epoch: {human_time(total_s)} once, against the teachers in every epoch; "
            f"this {keeper} feeds a student of up to {fed:.3g} views/s (at its write rate)")  # fmt: skip
