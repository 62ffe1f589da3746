"""How long an extraction will take and what limits it, measured on a few images before it starts."""

import dataclasses
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mrmae.common.files import write_durably
from mrmae.common.progress import human_bytes, human_time
from mrmae.extract.images import Sources, decoded, read_image
from mrmae.extract.options import Options
from mrmae.extract.plan import jpeg_bytes, sample_bytes
from mrmae.extract.teachers import Teacher
from mrmae.shards.format import (
    BadImage,
    Pixels,
    TeacherSpec,
    canonical_order,
    decode_jpeg,
    draw_view,
    encode_jpeg,
    key_hash,
    render,
)

PROBE_BYTES = 64 << 20
IMAGES = 32  # decoded for the forecast, and shown to the teachers in batches


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds per view of every stage, on this machine, and bytes per second to disk."""

    decode_s: float
    forward_s: Mapping[str, float]
    write_bytes_per_s: float


def measure_rates(sources: Sources, teachers: Mapping[str, Teacher], options: Options) -> Rates:
    """Each stage alone, on images from the canonical order's beginning. ValueError when none of them can be read."""
    began, pixels = time.perf_counter(), []
    for i in canonical_order([image.key for image in sources])[:IMAGES]:
        try:
            pixels.append(one_view(read_image(sources, i), sources[i].key, options))
        except (BadImage, OSError):
            continue
    decode_s = (time.perf_counter() - began) / max(len(pixels), 1) / options.workers
    if not pixels:
        raise ValueError(f"none of the first {IMAGES} images can be read; expected photographs; check IMAGES")
    forward = {column: forward_seconds(teacher, pixels, options) for column, teacher in teachers.items()}
    return Rates(decode_s, forward, write_rate(options.cache))


def one_view(data: bytes, key: str, options: Options) -> Pixels:
    """A view as a teacher sees it: decoded, cropped, encoded and decoded again."""
    with decoded(data, max_pixels=options.max_pixels) as image:
        crop = draw_view(key_hash(key), 0, image.shape[0], image.shape[1], options.recipe)
        return decode_jpeg(encode_jpeg(render(image, crop, options.recipe)))


def forward_seconds(teacher: Teacher, pixels: Sequence[Pixels], options: Options) -> float:
    """Seconds per view of a teacher's forward at the extraction's batch size, the first batch left out."""
    batch = torch.from_numpy(np.stack([pixels[i % len(pixels)] for i in range(options.batch_size)]))
    teacher.forward(batch)
    began, n = time.perf_counter(), 0
    while n < 2 or (time.perf_counter() - began < 2 and n * len(batch) < IMAGES):
        teacher.forward(batch).tokens[:1].cpu()  # waits for the device
        n += 1
    return (time.perf_counter() - began) / (n * len(batch))


def write_rate(cache: Path) -> float:
    """Bytes per second, fsync included, into the folder where the cache lies or will lie; nothing stays there."""
    folder = next(parent for parent in [cache, *cache.absolute().parents] if parent.is_dir())
    path = folder / f".probe.{os.getpid()}-{secrets.token_hex(4)}.writing"
    block = np.random.default_rng(0).bytes(1 << 20)
    try:
        began = time.perf_counter()
        n_bytes, _ = write_durably(path, (block for _ in range(PROBE_BYTES >> 20)))
        return n_bytes / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def forecast(rates: Rates, teachers: Sequence[TeacherSpec], options: Options, images: int) -> str:
    """Rates, what limits the extraction, how long it takes, and whether a cache is worth it."""
    on_cpu = torch.device(options.device).type == "cpu"
    blocks = rule.blocks if (rule := options.block_rule()) else 1
    view_bytes = jpeg_bytes(options.recipe) + sum(
        sample_bytes(teacher, options.dtype, options.format, blocks) for teacher in teachers
    )
    forward_s, write_s = sum(rates.forward_s.values()), view_bytes / rates.write_bytes_per_s
    stages = {"decoding": rates.decode_s, "the teachers": forward_s, "the disk": write_s}
    worst = max(stages, key=lambda name: stages[name])
    # On a CPU decoding and teachers share the cores; on an accelerator every stage runs beside the others.
    seconds = max(rates.decode_s + forward_s, write_s) if on_cpu else max(stages.values())
    total = seconds * images * options.views
    lines = [f"measured: decoding {1 / rates.decode_s:.3g} views/s with {options.workers} threads"]
    lines += [f"          {column} {1 / spent:.3g} views/s" for column, spent in rates.forward_s.items()]
    lines += [
        f"          disk {human_bytes(rates.write_bytes_per_s)}/s = {1 / write_s:.3g} views/s",
        f"estimate: {human_time(total)} for {images * options.views} views, limited by {worst}",
        verdict(forward_s, view_bytes, rates.write_bytes_per_s, total),
    ]
    return "\n".join(lines)


def verdict(forward_s: float, view_bytes: float, bytes_per_s: float, total_s: float) -> str:
    """When this cache is worth making: it must be read at least as fast as the student trains, and more than once."""
    fed = bytes_per_s / view_bytes
    if forward_s == 0:
        return "verdict:  every teacher is complete already"
    if fed * forward_s <= 1:
        return (f"verdict:  DO NOT CACHE here: this disk feeds {fed:.3g} views/s (at its write rate), the teachers make "
                f"{1 / forward_s:.3g}; run them online, or take a faster disk")  # fmt: skip
    return (f"verdict:  worth it for more than one epoch: {human_time(total_s)} once, against the teachers in every epoch; "
            f"this disk feeds a student of up to {fed:.3g} views/s (at its write rate)")  # fmt: skip
