"""Does the cache hold what its teachers say? A few samples computed again and compared with what is stored."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.extract.recorded import recorded_teachers
from mrmae.extract.teachers import Features, Teacher, TeacherRequest, build_teacher, parse_teacher
from mrmae.shards.cache import Cache, Column
from mrmae.shards.format import NOT_HASHED, Numbers, TeacherSpec, compare_specs, plain

COSINE = {"float16": 0.9999, "int8": 0.9998, "fp8": 0.999, **dict.fromkeys(("pq4", "pq", "pq16"), 0.9999)}
FAITHFUL_SNR_DB = (
    40.0  # above it a column must reach its cosine; below it (fp8: always), the SNR it had when it was written
)
SNR_MARGIN_DB = 1.0
AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One column against its live teacher: over all tokens the mean and lowest cosine, and the SNR in dB.

    cls, attention: mean cosine of these arrays, None where they are not stored. good: within the limits.
    """

    column: str
    samples: int
    cosine: float
    lowest: float
    snr_db: float
    cls: float | None
    attention: float | None
    limit: str
    good: bool


def compare_live(
    cache: Cache, n: int, *, texts: Sequence[str] = (), device: str = "cpu", mirror: bool = False,
    allow_torchscript: bool = False,
) -> list[Comparison]:  # fmt: skip
    """Every column against its teacher on n samples spread over the cache, on the stored views.

    texts: teachers as --teacher names them, where the recorded ones cannot be built; only of these a file may be TorchScript. mirror: the control, the teacher
    sees mirrored views; it must not pass. ValueError where a teacher is another one than the cache's, naming the field.
    """
    given = {request.name: request for request in map(parse_teacher, texts)}
    if unknown := sorted(set(given) - {column.spec.name for column in cache.columns.values()}):
        raise ValueError(f"--teacher {unknown[0]}=...: this cache has no such teacher; it has {sorted(cache.teachers)}")
    if not len(cache.numbers):
        raise ValueError(f"{cache.path}: no sample can be read; expected at least one to compare")
    numbers = cache.numbers[np.linspace(0, len(cache.numbers) - 1, min(n, len(cache.numbers))).astype(int)]
    found = []
    for name, column in cache.columns.items():
        request = given.get(column.spec.name) or recorded_request(cache, name)
        request = dataclasses.replace(request, tap=column.spec.tap)  # a teacher may have several columns
        teacher = build_teacher(request, grid=cache.grid[0], view_size=cache.size, device=device,
                                precision=column.spec.precision, views=cache.encoding,
                                allow_torchscript=allow_torchscript and column.spec.name in given)  # fmt: skip
        compare_teachers(column.spec, teacher.spec, f"{cache.path}: {name}")
        found.append(compare_column(cache, name, teacher, numbers, mirror=mirror))
    return found


def recorded_request(cache: Cache, column: str) -> TeacherRequest:
    """The teacher as the extracting command asked for it; from the spec where no commit record tells."""
    spec = cache.columns[column].spec
    for text in recorded_teachers(cache.path, column):
        request = parse_teacher(text)
        if request.name == spec.name:
            return request
    if spec.weights == "file":
        raise ValueError(f"{cache.path}: the weights of {spec.name} came from a file that is not recorded; "
                         f"give them with --teacher {spec.name}={spec.library}:{spec.model}@FILE")  # fmt: skip
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in spec.model_options.items()}
    return TeacherRequest(spec.name, spec.library, spec.model, spec.weights, spec.tag, tap=spec.tap, options=options,
                          bands=spec.bands, levels=spec.levels)  # fmt: skip


def compare_teachers(stored: TeacherSpec, live: TeacherSpec, where: str) -> None:
    """ValueError naming the first field by which the teachers differ, apart from what changes no number.

    The attention backend follows from the device and may differ.
    """
    ignored = {*NOT_HASHED, "attention_backend"}
    old, new = ({k: v for k, v in plain(spec).items() if k not in ignored} for spec in (stored, live))
    try:
        compare_specs(old, new, where)
    except ValueError as error:
        message = str(error).partition(" in this command;")[0]
        raise ValueError(f"{message} in the teacher at hand; it is not the one that filled this column; "
                         "give the right one with --teacher") from None  # fmt: skip


def compare_column(cache: Cache, name: str, teacher: Teacher, numbers: Numbers, *, mirror: bool) -> Comparison:
    """One column against its teacher on these samples' views, views taking turns."""
    views = np.arange(len(numbers), dtype=np.int64) % cache.n_views
    column, live, stored = cache.columns[name], [], []
    for start in range(0, len(numbers), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        pixels = cache.read_pixels(numbers[part], views[part])
        live.append(teacher.forward(pixels.flip(2) if mirror else pixels))
        stored.append(cache.read_tokens(name, numbers[part], views[part]))
    x, y = torch.cat([f.tokens.cpu() for f in live]).flatten(0, 1), torch.cat(stored).flatten(0, 1)
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    snr = signal_to_noise(x, y)
    extra = {array: mean_cosine(cache, name, array, numbers, views, live) for array in ("cls", "attention")}
    good, limit = verdict(cache, name, column, float(cosine.mean()), snr)
    return Comparison(
        name, len(numbers), float(cosine.mean()), float(cosine.min()), snr, **extra, limit=limit, good=good
    )


def signal_to_noise(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """SNR of y against x in dB, about x's channel mean."""
    signal = (x.double() - x.double().mean(0)).square().sum()
    noise = (x.double() - y.double()).square().sum().clamp_min(1e-300)
    return float(10 * (signal / noise).log10())


def mean_cosine(
    cache: Cache, name: str, array: str, numbers: Numbers, views: Numbers, live: Sequence[Features]
) -> float | None:
    """Mean cosine of CLS vectors or attention rows; None where they are not stored."""
    if array not in cache.columns[name].layout.arrays():
        return None
    x = torch.cat([getattr(f, array).cpu() for f in live]).double()
    y = cache.read_column(name, numbers, views, (array,))[array].double()
    return float(torch.nn.functional.cosine_similarity(x, y, dim=-1).mean())


def verdict(cache: Cache, name: str, column: Column, cosine: float, snr: float) -> tuple[bool, str]:
    """(within the limit, the limit in words)."""
    written = recorded_snr(cache, name)
    dtype = "int8" if column.quantiser.source and column.quantiser.dtype == "float16" else column.quantiser.dtype
    if dtype != "float16" and written is not None and written < FAITHFUL_SNR_DB:
        limit = min(written, FAITHFUL_SNR_DB) - SNR_MARGIN_DB
        return snr >= limit, f"SNR >= {limit:.1f} dB"
    limit = COSINE[dtype]
    return cosine >= limit, f"cosine >= {limit}"


def recorded_snr(cache: Cache, name: str) -> float | None:
    """The SNR of the column's worst shard, as the manifest has it."""
    columns: list[dict[str, Any]] = cache.manifest.get("columns", [])
    quality = next((column["quality"] for column in columns if column["name"] == name), None)
    return quality["snr_db"] if quality else None
