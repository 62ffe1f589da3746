"""What a probe is given: its options, an opened source, both parts of DATA, and where features and results lie."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from mrmae.common.backend import expect_utf8
from mrmae.extract.options import Options as ExtractOptions
from mrmae.extract.teachers import Teacher
from mrmae.probe.data import Data, open_data, shared_with, shown_images
from mrmae.probe.features import PooledFeatures, refuse_foreign_column
from mrmae.probe.settings import LABEL_FREE, PROBES, UNTRAINED_PROBES, Settings
from mrmae.probe.sources import FeatureSource, open_source
from mrmae.shards.commit import known_hashes
from mrmae.shards.format import SourceTable, content_id, dataset_ids, load_plan, read_sources
from mrmae.shards.near import NearFolder, near_asked


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """What probe-features can be told. out: None for OUT/probes of a student's run, else probes/NAME here."""

    source: str
    data: Sequence[str]
    probes: Sequence[str] = ("knn",)
    settings: Settings = dataclasses.field(default_factory=Settings)
    out: Path | None = None
    train_include: Sequence[str] = ()
    test_include: Sequence[str] = ()
    size: int = 0
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 0
    workers: int = 0
    allow_shared: bool = False
    allow_partial: bool = False
    local_cache: Path | None = None
    local_cache_bytes: str | int | None = None

    @property
    def near(self) -> NearFolder | None:
        """Where shards of a cache that is far away are kept. ValueError as of near_asked."""
        return near_asked(self.local_cache, self.local_cache_bytes)

    def resolved(self) -> "ProbeOptions":
        """The same with device, precision, batch size and workers chosen. ValueError for what cannot be."""
        how = ExtractOptions([], Path(), device=self.device, precision=self.precision, batch_size=self.batch_size,
                             workers=self.workers).resolved()  # fmt: skip
        return dataclasses.replace(
            self, device=how.device, precision=how.precision, batch_size=how.batch_size, workers=how.workers
        )


@dataclasses.dataclass(frozen=True)
class Probing:
    """Everything a probe reads. notes: what a person should hear before anything is computed."""

    options: ProbeOptions
    source: FeatureSource
    data: Data
    train: PooledFeatures
    test: PooledFeatures
    home: Path
    say: Callable[[str], None]
    notes: Sequence[str] = ()

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Class indices of both parts."""
        return self.data.labels(self.data.train), self.data.labels(self.data.test)


def begin_probing(options: ProbeOptions, say: Callable[[str], None], data: Data | None = None) -> Probing:
    """The job, checked: nothing is computed yet but digests of the images. data: where DATA was opened before."""
    if unknown := [name for name in options.probes if name not in PROBES]:
        raise ValueError(f"--probe {unknown[0]}: unknown; expected {', '.join(PROBES)}")
    given = [("SOURCE", options.source), *(("DATA", text) for text in options.data), ("--out", options.out or "")]
    for name, text in given:
        expect_utf8(text, name)
    source = open_source(options.source, size=options.size, device=options.device, precision=options.precision,
                         allow_partial=options.allow_partial, near=options.near)  # fmt: skip
    home = options.out or (source.home / "probes" if source.home else Path("probes") / folder_name(options.source))
    labelled = any(reads_labels(probe, options.settings) for probe in options.probes)
    data = data or open_data(options.data, home, train_include=options.train_include, test_include=options.test_include,
                     workers=options.workers, partial=needed_columns(source) if options.allow_partial else None,
                             divided=in_two_parts(options.probes), labelled=labelled, near=options.near)  # fmt: skip
    notes = refuse_shared(source, data, allowed=options.allow_shared or not labelled)
    notes += [f"{part.name} views are stored at {part.cache.size} px and resized to the model's {source.size} px"
              for part in (data.train, data.test) if part.cache and not source.column and part.cache.size != source.size]  # fmt: skip
    parts = []
    for part in (data.train, data.test):
        refuse_foreign_column(source, part)
        parts.append(PooledFeatures(source, part, home, options.batch_size, options.workers, say))
    return Probing(options, source, data, parts[0], parts[1], home, say, (*source.notes, *data.notes, *notes))


def needed_columns(source: FeatureSource) -> list[str]:
    """The stored columns that a source reads."""
    if source.column is None:
        return []
    cache, column = source.column
    return [cache.derived[column].source if column in cache.derived else column]


def in_two_parts(probes: Sequence[str]) -> bool:
    """Whether any of these probes learns from a train part."""
    return any(probe not in UNTRAINED_PROBES for probe in probes)


def folder_name(source: str) -> str:
    """A readable folder name for a source."""
    return (
        re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.partition("?")[0]).name).strip("-.")
        + "-"
        + content_id(source)[7:13]
    )


def refuse_shared(source: FeatureSource, data: Data, *, allowed: bool) -> list[str]:
    """What to say about images that the student was pre-trained on and that are in the test part; ValueError unless allowed."""
    if source.cache is None:
        return []
    try:
        plan, rows = load_plan(source.cache), read_sources(source.cache)
        rows = SourceTable({**rows.columns, "sha256": known_hashes(source.cache, plan, rows)})
        known = dict(zip(dataset_ids(plan, rows), (part.numbers.stop for part in plan.parts)))
        known |= {
            part.listing_id: part.numbers.stop for part in plan.parts
        }  # of a run on a part of an unfinished cache
        same = source.cache_dataset in known
        shared = shared_with(data.test, rows[: known[str(source.cache_dataset)]]) if same else []
    except ValueError:
        same = False
    if not same:
        return [f"the student's cache is not at {source.cache} any more: whether it held test images is not known"]
    if shared and not allowed:
        raise ValueError(f"DATA: {len(shared)} of {len(data.test)} test images are in the student's own cache {source.cache} (same "
                         f"key or same bytes), first {shared[0]!r}; expected images it never saw; choose others with "
                         "--test-include, or pass --allow-shared to measure on seen images")  # fmt: skip
    return (
        [f"{len(shared)} of {len(data.test)} test images were seen in pre-training (without labels)"] if shared else []
    )


Outcome = tuple[dict[str, Any], Tensor | None]  # what goes into the result; predicted classes of the test part


def headline(row: dict[str, Any]) -> dict[str, Any]:
    """The row that stands for a probe."""
    return {"headline": row["name"], "accuracy": row["accuracy"], "interval": row["interval"]}


def pictures_of(job: Probing, positions: Sequence[int]) -> Tensor:
    """What the source was shown of these test images."""
    with ThreadPoolExecutor(job.options.workers) as pool:
        return shown_images(job.data.test, positions, job.source.size, job.source.spec.interpolation, pool)


def evenly(n: int, count: int) -> list[int]:
    """`count` positions of n, evenly spaced, all of them where there are fewer."""
    return list(range(n))[:: max(1, n // max(count, 1))][:count]


def model_of(job: Probing, probe: str, why: str) -> Teacher:
    """The source's model. ValueError for a column, with the probe that needs the model and why."""
    if job.source.teacher is None:
        raise ValueError(f"SOURCE {job.source.name}: a column has the tokens of stored views only, and --probe {probe} needs a model ({why}); give the "
                         "model itself, as timm:NAME or a student")  # fmt: skip
    return job.source.teacher


def reads_labels(probe: str, settings: Settings) -> bool:
    """Whether a probe needs the class of every image: not where masks or boxes say what is where."""
    told = {"segment": settings.segment.masks, "region": settings.region.boxes}
    return probe not in LABEL_FREE and not told.get(probe)
