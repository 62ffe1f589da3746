"""probe-features as a function: source, data, features once, then each probe; what was found before is not computed again."""

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mrmae.common.knn import knn_predict
from mrmae.common.progress import counted
from mrmae.common.versions import versions
from mrmae.probe import attentive, dense, finetune, linear, report
from mrmae.probe.fusion import other_read, run_fusion
from mrmae.probe.job import Outcome, ProbeOptions, Probing, begin_probing, evenly, headline, pictures_of
from mrmae.probe.low_shot import run_low_shot
from mrmae.probe.pools import choose_pool, pools
from mrmae.probe.rank import run_rank
from mrmae.probe.region import boxes_read, run_region
from mrmae.probe.retrieval import captions_of, run_retrieval
from mrmae.probe.segment import masks_read, run_segment
from mrmae.probe.stability import run_stability
from mrmae.probe.zero_shot import prompts_of, run_zero_shot
from mrmae.shards.format import content_id
from mrmae.train.run_page import write_run_page

RESULTS_VERSION = 1  # raise it when the same features and settings give another result


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


def one(job: Probing, probe: str) -> report.Result:
    """The result of one probe, from before or new."""
    settings = dataclasses.asdict(job.options.settings.of(probe))
    id = content_id({"version": RESULTS_VERSION, "probe": probe, "train": job.train.id, "test": job.test.id, "settings": settings,
                     "labels": [row.label for part in (job.data.train, job.data.test) for row in part.rows],
                     "seed": job.options.seed, **({"reads": READS[probe](job)} if probe in READS else {})})  # fmt: skip
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
    predicted, best, notes = linear.probe_linear(
        train, labels, test, settings, n_classes=len(job.data.classes), seed=seed
    )
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
        few = evenly(len(test), settings.pictures)
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
    few = evenly(len(job.data.test), settings.images)
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


RUNNERS: dict[str, Callable[[Probing, str], Outcome]] = {
    "knn": run_knn,
    "linear": run_linear,
    "low-shot": run_low_shot,
    "attentive": run_attentive,
    "fusion": run_fusion,
    "segment": run_segment,
    "region": run_region,
    "finetune": run_finetune,
    "zero-shot": run_zero_shot,
    "retrieval": run_retrieval,
    "dense": run_dense,
    "rank": run_rank,
    "stability": run_stability,
}
# What else a probe reads: it is part of what its result is of.
READS: dict[str, Callable[[Probing], Any]] = {"zero-shot": prompts_of, "retrieval": captions_of, "fusion": other_read,
         "segment": masks_read, "region": boxes_read}  # fmt: skip
