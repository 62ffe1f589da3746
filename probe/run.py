"""probe-features as a function: source, data, features once, then each probe; what was found before is not computed again."""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrmae.common.backend import expect_utf8
from mrmae.common.knn import knn_predict
from mrmae.common.progress import counted
from mrmae.common.versions import versions
from mrmae.extract.options import Options as ExtractOptions
from mrmae.probe import attentive, dense, finetune, linear, report
from mrmae.probe.data import Data, open_data, shared_with, shown_images
from mrmae.probe.features import PooledFeatures, refuse_foreign_column
from mrmae.probe.pools import choose_pool, pools
from mrmae.probe.settings import Settings
from mrmae.probe.sources import FeatureSource, open_source
from mrmae.shards.format import content_id, load_plan
from mrmae.train.run_page import write_run_page

RESULTS_VERSION = 1  # raise it when the same features and settings give another result


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


def probe_features(options: ProbeOptions, *, say: Callable[[str], None] = print) -> list[report.Result]:
    """One result per probe asked for, each also as JSON in OUT/results, all together in OUT/results.md.

    say: receives notes and results, line by line; progress goes to stderr. The same options again compute nothing.
    Raises ValueError and OSError for what a user can mend.
    """
    job = begin_probing(options.resolved(), say)
    for note in job.notes:
        say(f"note: {note}")
    found = [one(job, probe) for probe in options.probes]
    tell_run_page(job)
    return found


def tell_run_page(job: Probing) -> None:
    """Draw the page of the probed run anew, with its results, where it has one; a page that fails is a note."""
    run = job.source.home
    if run is None or job.home != run / "probes" or not (run / "report.html").exists():
        return
    if drawn(run / "report.html", lambda: write_run_page(run), job.say):
        job.say(f"they are in {run / 'report.html'}, too")


def drawn(path: Path, draw: Callable[[], object], say: Callable[[str], None]) -> bool:
    """Whether the page at `path` could be drawn; a note where it could not: no result is lost for a page."""
    try:
        draw()
    except Exception as error:
        say(f"note: {path} could not be drawn: {' '.join(str(error).split())}")
        return False
    return True


def begin_probing(options: ProbeOptions, say: Callable[[str], None], data: Data | None = None) -> Probing:
    """The job, checked: nothing is computed yet but digests of the images. data: where DATA was opened before."""
    if unknown := [name for name in options.probes if name not in RUNNERS]:
        raise ValueError(f"--probe {unknown[0]}: unknown; expected {', '.join(RUNNERS)}")
    given = [("SOURCE", options.source), *(("DATA", text) for text in options.data), ("--out", options.out or "")]
    for name, text in given:
        expect_utf8(text, name)
    source = open_source(options.source, size=options.size, device=options.device, precision=options.precision,
                         allow_partial=options.allow_partial)  # fmt: skip
    home = options.out or (source.home / "probes" if source.home else Path("probes") / folder_name(options.source))
    data = data or open_data(options.data, home, train_include=options.train_include, test_include=options.test_include,
                     workers=options.workers, partial=needed_columns(source) if options.allow_partial else None)  # fmt: skip
    notes = refuse_shared(source, data, allowed=options.allow_shared)
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
        known = {part.dataset_id: part.numbers.stop for part in load_plan(source.cache).parts}
        same = source.cache_dataset in known
        shared = shared_with(data.test, source.cache, known[str(source.cache_dataset)]) if same else []
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


def one(job: Probing, probe: str) -> report.Result:
    """The result of one probe, from before or new."""
    settings = dataclasses.asdict(getattr(job.options.settings, probe))
    id = content_id({"version": RESULTS_VERSION, "probe": probe, "train": job.train.id, "test": job.test.id, "settings": settings,
                     "labels": [row.label for part in (job.data.train, job.data.test) for row in part.rows],
                     "seed": job.options.seed})  # fmt: skip
    found = report.load_result(job.home, probe, id)
    if found is None:
        began = time.monotonic()
        made, predicted = RUNNERS[probe](job, f"{probe}-{id[7:19]}")
        notes = [*job.notes, *made.pop("notes", [])]
        found = {"probe": probe, "id": id, "source": job.options.source, "data": " ".join(job.options.data),
                 "n_train": len(job.data.train), "n_test": len(job.data.test), "n_classes": len(job.data.classes),
                 "view": job.test.view, "settings": settings, "seed": job.options.seed, "notes": notes,
                 "seconds": round(time.monotonic() - began, 2), "versions": versions(), "rows": [], "pictures": [], **made}  # fmt: skip
        for note in found["notes"][len(job.notes) :]:
            job.say(f"note: {note}")
        report.save_result(job.home, found, predicted)
    job.say(report.line(found))
    return found


Outcome = tuple[dict[str, Any], Tensor | None]  # what goes into the result; predicted classes of the test part


def headline(row: dict[str, Any]) -> dict[str, Any]:
    """The row that stands for a probe."""
    return {"headline": row["name"], "accuracy": row["accuracy"], "interval": row["interval"]}


def run_knn(job: Probing, name: str) -> Outcome:
    """k-NN for every pooling, with and without centring, and every k that fits."""
    settings, (labels, truth) = job.options.settings.knn, job.labels
    train, test = (
        {name: x.to(job.options.device) for name, x in part.pooled().items()} for part in (job.train, job.test)
    )
    choose_pool(train, settings.pool)
    fitting = [k for k in sorted({*settings.ks, settings.k}) if k <= len(labels)] or [len(labels)]
    chosen = settings.k if settings.k in fitting else fitting[-1]
    notes = (
        [f"k = {settings.k} of {len(labels)} train images: {chosen} is reported instead"]
        if chosen != settings.k
        else []
    )
    rows, predictions = {}, {}
    for pool, vectors in pools(train).items():
        for centre in (False, True):
            found = knn_predict(vectors, labels.to(job.options.device), choose_pool(test, pool), ks=fitting, centre=centre,
                                    temperature=settings.temperature, n_classes=len(job.data.classes))  # fmt: skip
            for k, predicted in found.items():
                label = f"{k}-NN, {pool}{', centred' if centre else ''}"
                rows[pool, centre, k] = report.row(label, predicted, truth, seed=job.options.seed)
                predictions[pool, centre, k] = predicted
    at = (settings.pool, settings.centre, chosen)
    return {"rows": list(rows.values()), "notes": notes, **headline(rows[at])}, predictions[at]


def run_linear(job: Probing, name: str) -> Outcome:
    """Linear heads for every learning rate; a held-out part of train chooses which one is the headline."""
    settings, (labels, truth), seed = job.options.settings.linear, job.labels, job.options.seed
    train, test = (choose_pool(part.pooled(), settings.pool).to(job.options.device) for part in (job.train, job.test))
    held = linear.hold_out(labels, settings.held_out, seed=seed)
    labels, held = labels.to(train.device), held.to(train.device)
    how: dict[str, Any] = {"lrs": settings.lrs, "n_classes": len(job.data.classes), "epochs": settings.epochs,
                           "batch_size": settings.batch_size, "momentum": settings.momentum, "seed": seed}  # fmt: skip
    if bool(held.any()):
        fit, choose = linear.standardise(train[~held], train[held])
        heads = linear.train_heads(fit, labels[~held], **how)
        predicted, loss = linear.predict_linear(*heads, choose), linear.cross_entropy(*heads, choose, labels[held])
        best, notes = linear.choose_head(predicted, loss, labels[held].cpu()), []
    else:
        best = len(settings.lrs) // 2
        notes = [f"one train image per class: none can be held out: lr {settings.lrs[best]:g} is the headline unseen"]
    train, test = linear.standardise(train, test)
    predicted = linear.predict_linear(*linear.train_heads(train, labels, **how), test)
    rows = [
        report.row(f"linear, {settings.pool}, lr {lr:g} per 256", p, truth, seed=seed)
        for lr, p in zip(settings.lrs, predicted)
    ]
    return {"rows": rows, "notes": notes, **headline(rows[best])}, predicted[best]


def run_attentive(job: Probing, name: str) -> Outcome:
    """Efficient Probing on cached tokens (no augmentation); a held-out part of train chooses the learning rate."""
    settings, (labels, truth), seed = job.options.settings.attentive, job.labels, job.options.seed
    free = 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    train, test = (part.tokens(limit_bytes=free / 2) for part in (job.train, job.test))
    how: dict[str, Any] = {
        "n_classes": len(job.data.classes), "epochs": settings.epochs, "warmup_epochs": settings.warmup_epochs, "seed": seed,
        "batch_size": settings.batch_size, "queries": settings.queries, "d_out": settings.d_out, "device": job.options.device,
    }  # fmt: skip
    held, best, notes = linear.hold_out(labels, settings.held_out, seed=seed), 0, []
    if len(settings.blrs) > 1 and bool(held.any()):
        logits = [attentive.probe_scores(attentive.train_probe(train[~held], labels[~held], blr=blr, **how), train[held],
                                         job.options.device) for blr in settings.blrs]  # fmt: skip
        loss = torch.stack([torch.nn.functional.cross_entropy(x, labels[held]) for x in logits])
        best = linear.choose_head(torch.stack([x.argmax(1) for x in logits]), loss, labels[held])
    elif len(settings.blrs) > 1:
        notes = [f"one train image per class: none can be held out: blr {settings.blrs[0]:g} is used"]
    probe = attentive.train_probe(train, labels, blr=settings.blrs[best], **how)
    predicted = attentive.probe_scores(probe, test, job.options.device).argmax(1)
    row = report.row(
        f"EP (cached, no aug), {settings.queries} queries, blr {settings.blrs[best]:g}", predicted, truth, seed=seed
    )
    with torch.no_grad():
        few = list(range(len(test)))[:: max(1, len(test) // max(settings.pictures, 1))][: settings.pictures]
        looked = probe.cpu().attention(test[few].float())
    picture = Path("pictures") / f"{name}.png"
    dense.draw_attention(
        job.home / picture,
        pictures_of(job, few),
        looked,
        job.test.grid,
        title=f"Efficient Probing on {report.title(job.source.name)}",
    )
    parameters = sum(p.numel() for p in probe.parameters())
    return {
        "rows": [row],
        "notes": notes,
        "pictures": [str(picture)],
        "parameters": parameters,
        **headline(row),
    }, predicted


def run_dense(job: Probing, name: str) -> Outcome:
    """PCA colours and k-means segments of a few test images spread over the part."""
    settings = job.options.settings.dense
    few = list(range(len(job.data.test)))[:: max(1, len(job.data.test) // settings.images)][: settings.images]
    part = dataclasses.replace(job.data.test, rows=[job.data.test.rows[i] for i in few], image=lambda i: job.data.test.image(few[i]),
                               numbers=None if job.data.test.numbers is None else job.data.test.numbers[few])  # fmt: skip
    with ThreadPoolExecutor(job.options.workers) as pool:
        tokens, _ = dataclasses.replace(job.test, part=part).forward(range(len(few)), pool)
    picture = Path("pictures") / f"{name}.png"
    dense.draw_dense(job.home / picture, pictures_of(job, few), tokens, job.test.grid, clusters=settings.clusters, parts=settings.parts,
                     seed=job.options.seed, title=f"Patch tokens: {report.title(job.source.name)}")  # fmt: skip
    return {"pictures": [str(picture)], "headline": "picture", "accuracy": None, "interval": None}, None


def run_finetune(job: Probing, name: str) -> Outcome:
    """Fine-tuning; its state is kept in OUT/finetune until it has ended."""
    settings, truth = job.options.settings.finetune, job.labels[1]
    predicted, notes = finetune.finetune(job.source, job.data, settings, folder=job.home / "finetune" / name, say=job.say,
                                         seed=job.options.seed, device=job.options.device, workers=job.options.workers)  # fmt: skip
    row = report.row(f"fine-tuned, {counted(settings.epochs, 'epoch')}", predicted, truth, seed=job.options.seed)
    return {"rows": [row], "notes": notes, **headline(row)}, predicted


def pictures_of(job: Probing, positions: Sequence[int]) -> Tensor:
    """What the source was shown of these test images."""
    with ThreadPoolExecutor(job.options.workers) as pool:
        return shown_images(job.data.test, positions, job.source.size, job.source.spec.interpolation, pool)


RUNNERS: dict[str, Callable[[Probing, str], Outcome]] = {
    "knn": run_knn,
    "linear": run_linear,
    "attentive": run_attentive,
    "finetune": run_finetune,
    "dense": run_dense,
}
