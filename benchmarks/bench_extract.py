"""Extraction against its parts: wall time of extract-features beside the teacher's forward and decoding, each alone.

    python benchmarks/bench_extract.py                                # all cores, MobileNetV2 and a random ViT-B/16: 5 minutes
    python benchmarks/bench_extract.py --threads 1 --case cnn         # one core
    python benchmarks/bench_extract.py --eta --images 1500 --case cnn # the ETA against the truth
    python benchmarks/bench_extract.py --data-root DIR --images 1500 --vit-images 96 --rounds 5

One process on `--threads` cores, with as many PyTorch and decoding threads. The parts are the forward alone, of the bare model on
normalised pixels, at the batch size and memory format that were fastest before the first round; and reading, decoding, cropping,
encoding and decoding again alone. A round is a whole extraction, from listing the images to the manifest, without building the
teacher (its own column); up to twelve times in it everything stops, and the parts are timed on a few images: this machine's speed changes
by a third from one half minute to the next, and so all three see the same of it. The ratio is extraction / (forward + decoding).
`cpu_ratio` is the same of the processor time of the whole process, which other work on the machine disturbs less. Appended to
results/extract.csv.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from measure import ROOT, machine
from rows import append
from torch import Tensor

from mrmae.common.device import keep_memory
from mrmae.common.progress import Progress
from mrmae.extract import asked_teachers
from mrmae.extract.estimate import one_view
from mrmae.extract.images import Sources, list_sources
from mrmae.extract.options import Options
from mrmae.extract.run import extract_features
from mrmae.extract.teachers import Features, Teacher, build_teacher, normalise, parse_teacher

CASES = {
    "cnn": "cnn=timm:mobilenetv2_100@{root}/weights/mobilenetv2_100_imagenet1k.safetensors"
           "?pad_type=same&mean=0.5&std=0.5&interpolation=bilinear",
    "vit": "vit=timm:vit_base_patch16_224/random",
}  # fmt: skip
BATCHES = {"cnn": (2, 4, 8, 16), "vit": (2, 4, 8)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TRIALS = 7  # of every batch size and memory format
TURNS = 12  # of the parts, within one extraction
PIXELS = 256  # views in memory for the forward alone
Spent = tuple[float, float]  # seconds of wall time, and of processor time


def spent(work: Callable[[], Any]) -> Spent:
    """What `work` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


# --- the parts


class Forward:
    """The bare model on normalised pixels, at its best batch size and memory format."""

    def __init__(self, teacher: Teacher, pixels: Tensor, batches: tuple[int, ...]) -> None:
        self.teacher, self.image = teacher, normalise(pixels, teacher.spec)
        choices = list(itertools.product(batches, FORMATS))
        tried = [{choice: self.trial(*choice) for choice in choices} for _ in range(TRIALS)]  # in turns: see above
        self.batch, self.format = min(choices, key=lambda choice: statistics.median(times[choice] for times in tried))

    def use(self, batch: int, format: str) -> None:
        self.batch, self.format = batch, format
        self.teacher.tower.module.to(memory_format=FORMATS[format])  # type: ignore[call-overload]

    def trial(self, batch: int, format: str) -> float:
        """Seconds per image."""
        self.use(batch, format)
        n = max(batch, min(32, len(self.image) // 8) // batch * batch)
        self.pass_over(batch)
        return spent(lambda: self.pass_over(n))[0] / n

    def pass_over(self, n: int) -> None:
        """The forward of `n` images."""
        self.teacher.tower.module.to(memory_format=FORMATS[self.format])  # type: ignore[call-overload]
        with torch.inference_mode():
            for at in range(0, n, self.batch):
                image = self.image[torch.arange(at, min(at + self.batch, n)) % len(self.image)]
                self.teacher.tower.features(image.contiguous(memory_format=FORMATS[self.format]))


def decode(sources: Sources, numbers: Iterable[int], options: Options) -> list[np.ndarray[Any, Any]]:
    """Views of these images as a teacher sees them, by the options' number of threads."""
    with ThreadPoolExecutor(options.workers) as pool:
        return list(pool.map(lambda i: one_view(sources.read(i), sources[i].key, options), numbers))


class Turns:
    """The parts, timed alone whenever an extraction has seen `every` more images; it stands still meanwhile."""

    def __init__(self, forward: Forward, folder: Path, options: Options, n: int) -> None:
        self.forward, self.options = forward, options
        self.sources = list_sources([folder], ())
        self.every = max(1, n // TURNS)
        self.few = max(forward.batch, self.every // 3 // forward.batch * forward.batch)
        self.begin()

    def begin(self) -> None:
        """Forget what was timed."""
        self.seen = self.turns = 0
        self.parts: dict[str, list[Spent]] = {"forward": [], "decode": []}
        self.paused: Spent = (0.0, 0.0)

    def saw(self, n: int) -> None:
        """An extraction is about to show a teacher `n` images."""
        self.seen += n
        if self.seen >= self.every * (self.turns + 1):
            self.turns += 1
            wait_until_idle()
            took = spent(self.take)
            self.paused = (self.paused[0] + took[0], self.paused[1] + took[1])

    def take(self) -> None:
        """Time both parts on a few images, the forward as warm as it is in its place."""
        self.forward.pass_over(self.forward.batch)
        self.parts["forward"].append(spent(lambda: self.forward.pass_over(self.few)))
        places = [(self.turns * self.few + i) % len(self.sources) for i in range(self.few)]
        self.parts["decode"].append(spent(lambda: decode(self.sources, places, self.options)))

    def per_image(self, part: str) -> Spent:
        """Seconds per image of a part, wall and processor."""
        n = len(self.parts[part]) * self.few
        return sum(t[0] for t in self.parts[part]) / n, sum(t[1] for t in self.parts[part]) / n


def wait_until_idle() -> None:
    """Until the other threads have done what they were given."""
    while True:
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.001:
            return


@contextmanager
def timed_building() -> Iterator[list[Spent]]:
    """Inside, the times that extractions spend on building teachers are gathered."""
    times: list[Spent] = []

    def build(*args: Any, **how: Any) -> Teacher:
        made: list[Teacher] = []
        times.append(spent(lambda: made.append(build_teacher(*args, **how))))
        return made[0]

    with mock.patch.object(asked_teachers, "build_teacher", build):
        yield times


def extract(options: Options, turns: Turns) -> tuple[Spent, float]:
    """(A whole extraction without the building and without the turns of its parts, seconds of building)."""
    forward = Teacher.forward

    def counting(self: Teacher, pixels: Tensor) -> Features:
        turns.saw(len(pixels))
        return forward(self, pixels)

    turns.begin()
    with timed_building() as building, mock.patch.object(Teacher, "forward", counting):
        wall, cpu = spent(lambda: extract_features(options, say=lambda _: None))
    apart = [building[0], turns.paused]
    return (wall - sum(t[0] for t in apart), cpu - sum(t[1] for t in apart)), building[0][0]


# --- ETA


def eta_row(case: str, text: str, folder: Path, work: Path) -> dict[str, Any]:
    """How far the ETA that a real run's longest stage showed at 5, 25 and 50 per cent of its time was off, of that time."""
    said: list[tuple[float, float]] = []  # (moment, seconds left)
    add = Progress.add

    def noting(self: Progress, *n: int, **how: int) -> None:
        add(self, *n, **how)
        if self.what == "extracting":
            said.append((time.perf_counter(), self.seconds_left()))

    with mock.patch.object(Progress, "add", noting):
        extract_features(Options([folder], work / f"{case}eta", teachers=(text,), device="cpu"), say=lambda _: None)
    began, end = said[0][0], said[-1][0]
    row: dict[str, Any] = {"teacher": case, "seconds": end - began, "stage": "extracting"}
    for part in (0.05, 0.25, 0.5):
        at, left = next(mark for mark in said if mark[0] >= began + part * (end - began))
        row[f"eta_error_pct_at_{part * 100:.0f}"] = 100 * (left - (end - at)) / (end - began)
    return row


# --- rounds


def images_of(tar: Path, n: int, folder: Path) -> Path:
    """A folder with the first `n` training images of the tar, in canonical order, as they are."""
    sources = list_sources([tar], ("train/*",))
    for i in range(len(sources))[:n]:
        file = folder / sources[i].key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(sources.read(i))
    return folder


def one_case(case: str, text: str, folder: Path, rounds: int, work: Path, threads: int) -> dict[str, Any]:
    """The row of one teacher."""
    options = Options([folder], work / "none", teachers=(text,), device="cpu").resolved()
    sources = list_sources([folder], ())
    n = len(sources)
    pixels = torch.from_numpy(np.stack(decode(sources, range(min(n, PIXELS)), options)))
    teacher = build_teacher(parse_teacher(text), grid=14, view_size=224, device="cpu", precision="fp32")
    turns = Turns(Forward(teacher, pixels, BATCHES[case]), folder, options, n)
    times: dict[str, list[Spent]] = {"forward": [], "decode": [], "extract": []}
    build_s = 0.0
    for i in range(rounds):
        took, build_s = extract(Options([folder], work / f"{case}{i}", teachers=(text,), device="cpu"), turns)
        times["extract"].append((took[0] / n, took[1] / n))
        for part in ("forward", "decode"):
            times[part].append(turns.per_image(part))
    spec = teacher.spec
    ratio, cpu_ratio = ratios(times, 0), ratios(times, 1)
    row = {"teacher": spec.model, "weights": spec.weights, "images": n, "threads": threads, "rounds": rounds,
           "forward_batch": turns.forward.batch, "forward_format": turns.forward.format, "engine_batch": options.batch_size}  # fmt: skip
    row |= {f"{name}_ms": statistics.median(t[0] for t in found) * 1e3 for name, found in times.items()}
    row |= {"build_s": build_s, "ratio": statistics.median(ratio), "ratio_min": min(ratio), "ratio_max": max(ratio)}
    row |= {"cpu_ratio": statistics.median(cpu_ratio), "cpu_ratio_min": min(cpu_ratio), "cpu_ratio_max": max(cpu_ratio)}
    return row


def ratios(times: dict[str, list[Spent]], which: int) -> list[float]:
    """Extraction over the sum of its parts, round by round."""
    return [e[which] / (f[which] + d[which]) for f, d, e in zip(times["forward"], times["decode"], times["extract"])]


@click.command()
@click.option("--data-root", default=ROOT.parents[1] / "shared", type=click.Path(path_type=Path))
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Default: all.")
@click.option("--images", default=512, type=click.IntRange(1), help="For the CNN.")
@click.option("--vit-images", default=64, type=click.IntRange(1), help="For the ViT.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Cores, PyTorch threads, decoding threads; 0: all.")
@click.option("--eta", is_flag=True, help="Instead, hold the ETA of one run per case to the truth: results/eta.csv.")
@click.option("--rounds", default=3, type=click.IntRange(1))
@click.option("--out", default=ROOT / "results" / "extract.csv", type=click.Path(path_type=Path))
def main(data_root: Path, cases: tuple[str, ...], images: int, vit_images: int, threads: int, eta: bool, rounds: int, out: Path) -> None:  # fmt: skip
    """Print and append one row per teacher; exit 1 where a ratio is above 1.05."""
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    keep_memory("cpu")  # as the command does; the parts alone have it too
    rows = []
    for case in cases or CASES:
        with tempfile.TemporaryDirectory() as work:
            n = images if case == "cnn" else vit_images
            folder = images_of(data_root / "data/clothing-small.tar", n, Path(work) / "images")
            text = CASES[case].format(root=data_root)
            rows.append(eta_row(case, text, folder, Path(work)) | {"images": n, "threads": len(cores)} if eta else
                        one_case(case, text, folder, rounds, Path(work), len(cores)))  # fmt: skip
        about = machine("cpu")
        rows[-1] |= {"load": os.getloadavg()[0], **{k: about[k] for k in ("device", "torch", "commit", "date")}}
        click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    append(out.with_name("eta.csv") if eta else out, rows)
    raise SystemExit(any(row.get("ratio", 0) > 1.05 for row in rows))


if __name__ == "__main__":
    main()
