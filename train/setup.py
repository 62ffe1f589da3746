"""Where and how a run computes and what it does beside training, and whether that fits the recipe and the cache."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mrmae.common.backend import Url, expect_utf8
from mrmae.common.progress import counted, human_bytes
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import PIXELS
from mrmae.shards.near import NearFolder, near_asked
from mrmae.shards.order import WINDOW
from mrmae.train import batches, optim
from mrmae.train.batches import Share
from mrmae.train.method import CacheInfo, Optim, Recipe, counts, map_columns, needed_arrays


@dataclass(frozen=True)
class Setup:
    """Where and how a run computes: what is not part of its recipe.

    device: auto, cpu, cuda or cuda:N. kernels: auto (measured on the device), triton or torch. compile: torch.compile the forward pass. accum:
    micro-batches per update in each process. workers: reading and decoding threads, None chooses.
    hold_out: share of the images not trained on; their loss is logged every epoch.
    online: run the teachers in the step instead of reading their features; `teachers`, as for extract-features, says which
    (and that they do), none: the cache's own.
    init: a checkpoint of MAE, MCMAE or a timm ViT to begin from. export: of elsewhere.EXPORTS, what to write
    beside the student.
    labels: a file of labels by key, for terms that predict them; None: those that the cache keeps.
    boxes: a file of boxes by key, for terms that read them.
    allow_partial: train on an unfinished cache's committed images; a later start must find the same ones.
    pairs: a list of pairs of keys, for a recipe that pairs images. command: what to type to continue, for the last line and for OUT.
    local_cache: a folder on a near disk in which whole shards of a cache that is far away are kept, local_cache_bytes of them at most.
    Raises ValueError for text that is not UTF-8: what a run writes down is.
    """

    device: str = "auto"
    kernels: str = "auto"
    compile: bool = False
    accum: int = 1
    workers: int | None = None
    hold_out: float = 0.0
    online: bool = False
    teachers: tuple[str, ...] = ()
    init: str | Path | None = None
    export: tuple[str, ...] = ()
    labels: str | Path | None = None
    boxes: str | Path | None = None
    allow_partial: bool = False
    command: str | None = None
    pairs: str | Path | None = None
    local_cache: str | Path | None = None
    local_cache_bytes: str | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "export", tuple(self.export))
        object.__setattr__(self, "teachers", tuple(self.teachers))
        for name in ("init", "labels", "boxes", "local_cache"):
            object.__setattr__(self, name, None if (path := getattr(self, name)) is None else str(path))
        object.__setattr__(self, "online", self.online or bool(self.teachers))
        teachers = [("--teacher", text) for text in self.teachers]
        object.__setattr__(self, "pairs", None if self.pairs is None else str(self.pairs))
        for name, text in [
            ("--init", self.init or ""),
            ("--labels", self.labels or ""),
            ("--pairs", self.pairs or ""),
            ("--boxes", self.boxes or ""),
            ("--local-cache", self.local_cache or ""),
            *teachers,
            ("the command", self.command or ""),
        ]:
            expect_utf8(text, name)
        self.near()

    def near(self) -> NearFolder | None:
        """Where shards are kept near; None where none are. ValueError for one of both options, and for a size that is none."""
        return near_asked(self.local_cache, self.local_cache_bytes)


@dataclass(frozen=True)
class Cadence:
    """What a run does beside training, and how often.

    save_minutes: at least this often, beside every epoch's end. keep: checkpoints kept. log_every: updates per log row.
    panels_every: epochs per picture, 0 for none, None for ten per run. probe_every: epochs per RankMe and, of labelled images held
    out, k-NN accuracy; 0 for none. tensorboard: write OUT/tensorboard. page: write OUT/report.html at the end of the run, or of a start that is stopped. wandb: a Weights & Biases project to log to.
    """

    save_minutes: float = 10.0
    keep: int = 3
    log_every: int = 20
    panels_every: int | None = None
    probe_every: int = 0
    tensorboard: bool = True
    page: bool = True
    wandb: str | None = None


SETUP, CADENCE = Setup(), Cadence()  # what is not said


def open_needed(path: Path, recipe: Recipe, setup: Setup, *, files: bool = True) -> Cache:
    """The cache; with allow_partial an unfinished one too, with the samples that are committed in all that the recipe reads.

    One that is being extended is finished for a run whose columns, views and images it has (`prepare`). files: as of `open_cache`.
    """
    known, views, images = recipe.prepare.columns, recipe.prepare.views, recipe.prepare.images
    near = setup.near()
    threads = setup.workers or (None if isinstance(path, Url) and near is None else batches.default_workers())
    maps = map_columns(recipe)
    asked = None if known is None else [*known, *maps]
    cache = open_cache(
        path,
        allow_partial=setup.allow_partial,
        columns=asked,
        views=views,
        images=images,
        threads=threads,
        files=files,
        near=near,
    )
    if cache.unfinished is None:
        return cache
    info = batches.cache_info(cache.narrowed(known, views, images))
    columns = maps if setup.online else [info.column(target) for target in needed_arrays(recipe, info)]
    cache = open_cache(
        path, allow_partial=True, columns=columns, views=views, images=images, threads=threads, near=near
    )
    if cache.unfinished is not None and not len(cache.numbers):
        raise ValueError(f"{path}: of this unfinished cache no shard is committed in the pixels and {', '.join(columns) or 'them'}"
                         " in every view that plan.json tells of; at least one was expected; let extract-features run on")  # fmt: skip
    return cache


def refuse_small_near(cache: Cache, columns: Collection[str]) -> None:
    """ValueError where less is kept near than batches read at a time: shards would be fetched again for every batch.

    columns: that are read, beside the pixels.
    """
    if cache.local is None or not cache.manifest:
        return
    window, most = cache.local.window_bytes((PIXELS, *columns), WINDOW), cache.local.near.most_bytes
    if window > most:
        raise ValueError(f"--local-cache-bytes {most}: a window of {min(WINDOW, len(cache.plan.ranges))} shards, from which batches are mixed, has {human_bytes(window)} of what "
                         f"this run reads; at least that was expected, and twice to fetch the next ones ahead; give more, or leave "
                         "--local-cache out")  # fmt: skip


def check_fit(recipe: Recipe, info: CacheInfo, share: Share, n_samples: int) -> None:
    """Raise ValueError where mask, batch or schedule do not fit, before any teacher is built."""
    counts(recipe.mask, info.n_patches)
    batches.check_share(share, n_samples, recipe.mask.joined)
    check_schedule(recipe.optim)


def check_schedule(o: Optim) -> None:
    """Raise ValueError where a run would never reach its peak learning rate, or would rise from there to its end."""
    if o.warmup_epochs >= o.epochs:
        raise ValueError(
            f"optim.warmup_epochs: is {o.warmup_epochs:g} in a run of {counted(o.epochs, 'epoch')}, which would never reach its learning"
            f" rate; less than optim.epochs was expected; set optim.warmup_epochs={optim.usual_warmup(o.epochs)}"
        )
    peak = optim.base_lr(o.lr_per_256, o.batch_size, o.lr_scale, o.lr_rule)
    if o.min_lr > peak:
        raise ValueError(
            f"optim.min_lr: is {o.min_lr:g}, above the peak learning rate {peak:.3g} = {o.lr_per_256:g} x {o.batch_size} / 256; at"
            " most that was expected; give a larger batch, a higher --blr, or --set optim.min_lr=0"
        )
