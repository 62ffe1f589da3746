"""What each probe can be told, with published values as defaults; `--set knn.k=20` changes one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from mrmae.common import strict_yaml

PROBES = (
    "knn",
    "linear",
    "low-shot",
    "attentive",
    "fusion",
    "segment",
    "region",
    "finetune",
    "zero-shot",
    "retrieval",
    "dense",
    "rank",
    "stability",
)
LABEL_FREE = ("retrieval", "dense", "rank", "stability")  # read no label
UNTRAINED_PROBES = ("zero-shot", *LABEL_FREE)  # learn nothing from a train part
Pool = Literal["mean", "cls", "both"]


@dataclasses.dataclass(frozen=True)
class Knn:
    """Weighted k-NN as in DINO (arXiv 2104.14294). k, pool and centre choose the headline; every combination is reported."""

    k: int = 20
    ks: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    temperature: float = 0.07
    pool: Pool = "mean"
    centre: bool = False


@dataclasses.dataclass(frozen=True)
class Linear:
    """BatchNorm without affine + Linear on cached features. lrs: learning rates per 256 images, one head each [ours].

    held_out: share of the train part that chooses the learning rate, before all heads are trained on the whole of it.
    """

    pool: Pool = "mean"
    epochs: int = 90
    batch_size: int = 256
    lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    momentum: float = 0.9
    held_out: float = 0.1


@dataclasses.dataclass(frozen=True)
class LowShot:
    """k-NN and linear on a few labels [ours]: `shares` of every class of the train part, at least one image of each, `draws` times.

    k, temperature and centre as in knn (k at most the images drawn), linear as in linear; pool of both.
    """

    shares: tuple[float, ...] = (0.01, 0.05, 0.1)
    draws: int = 3
    pool: Pool = "mean"
    k: int = 20
    temperature: float = 0.07
    centre: bool = False
    linear: Linear = dataclasses.field(default_factory=Linear)


@dataclasses.dataclass(frozen=True)
class Attentive:
    """Efficient Probing (arXiv 2506.10178): 32 queries, LARS, 90 epochs, blr 0.1.

    blrs beyond 0.1, and a batch of 256 instead of 4096, are for small data [ours]; a held-out part of train chooses.
    pictures: test images whose attention maps are drawn.
    """

    queries: int = 32
    d_out: int = 1
    epochs: int = 90
    warmup_epochs: float = 10.0
    batch_size: int = 256
    blrs: tuple[float, ...] = (0.1, 1.0, 10.0)
    held_out: float = 0.1
    pictures: int = 4


@dataclasses.dataclass(frozen=True)
class Finetune:
    """MAE's published fine-tuning of ViT-B (arXiv 2111.06377, table 9; layer decay and minimum as in its released code).

    ema: decay of the averaged weights that are evaluated, 0 for none. batch_size: images per update; blr is per 256.
    new_head: replace the classifier that a timm model's weights hold; without it, one of another number of classes is refused.
    """

    epochs: int = 100
    batch_size: int = 1024
    micro_batch: int = 64
    blr: float = 5e-4
    min_lr: float = 1e-6
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 5.0
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    crop_scale: tuple[float, float] = (0.08, 1.0)
    ema: float = 0.0
    new_head: bool = False


@dataclasses.dataclass(frozen=True)
class Head:
    """How a small head is trained on frozen tokens [ours]: AdamW, half-cosine; a held-out part of train chooses among lrs.

    Many small updates: of a few hundred examples, ten updates leave a head that attends where it began.
    """

    epochs: int = 60
    batch_size: int = 64
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    warmup_epochs: float = 3.0
    weight_decay: float = 0.05
    held_out: float = 0.1


@dataclasses.dataclass(frozen=True)
class Fusion:
    """SOURCE beside another one: `other`, named as SOURCE is. queries as in X-Former (arXiv 2407.13851); width and heads are ours."""

    other: str = ""
    queries: int = 32
    width: int = 256
    heads: int = 8
    head: Head = dataclasses.field(default_factory=Head)
    linear: Linear = dataclasses.field(default_factory=Linear)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Segmentation of patch tokens, linear and k-NN.

    masks: a folder with KEY.png (class numbers) for every image KEY.jpg, without it mosaics of tiles x tiles labelled images. void: values of
    masks that are no class. images: of each part at most. bank: tokens that vote at most. k, temperature: as in knn.
    """

    masks: str = ""
    void: tuple[int, ...] = (255,)
    tiles: int = 2
    images: int = 500
    bank: int = 20_000
    k: int = 20
    temperature: float = 0.07
    pictures: int = 6
    linear: Linear = dataclasses.field(default_factory=lambda: Linear(epochs=10, batch_size=1024))


@dataclasses.dataclass(frozen=True)
class Region:
    """Classes of boxes: BoxRPB against RoIAlign.

    boxes: a .csv, .tsv or .parquet with image, x1, y1, x2, y2 (pixels) and label; without it, mosaics of tiles x tiles labelled images. images:
    of each part at most.
    """

    boxes: str = ""
    tiles: int = 2
    images: int = 500
    width: int = 256
    heads: int = 8
    head: Head = dataclasses.field(default_factory=Head)
    linear: Linear = dataclasses.field(default_factory=Linear)


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Classes by their names: softmax(100 cos) of image and class text (CLIP, arXiv 2103.00020).

    prompts: a file, .txt with one template per line ({} is the class), or .yaml or .json from class to one or several prompts;
    without one, templates. A class's text is the mean of its prompts. text: the model of the text tower, of a column.
    """

    prompts: str = ""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Images by captions and captions by images: recall among the ks nearest. Equal captions are one.

    captions: a .csv, .tsv or .parquet with a column of image names and one of captions; without one, a .txt beside each image.
    image_column, caption_column: their names; without, those that are usual. text: as in zero_shot.
    """

    captions: str = ""
    image_column: str = ""
    caption_column: str = ""
    ks: tuple[int, ...] = (1, 5, 10)
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Dense:
    """A picture of patch tokens: PCA colours and k-means segments of a few test images.

    clusters: of all images together; parts: of each image alone.
    """

    images: int = 6
    clusters: int = 6
    parts: int = 3


@dataclasses.dataclass(frozen=True)
class Rank:
    """How many directions pooled features use. images: at most so many, evenly spaced over all of DATA."""

    images: int = 10_000


@dataclasses.dataclass(frozen=True)
class Stability:
    """How far tokens move when an image changes a little [ours]. images: test images, evenly spaced; pictures: of them drawn.

    noise: standard deviations, of values in 0..1. jpeg: qualities. blur: standard deviations in pixels. shift: pixels to the
    right and down.
    """

    images: int = 64
    noise: tuple[float, ...] = (0.02, 0.05, 0.1)
    jpeg: tuple[int, ...] = (90, 50, 10)
    blur: tuple[float, ...] = (0.5, 1.0, 2.0)
    shift: tuple[int, ...] = (1, 2, 4)
    pictures: int = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of all probes."""

    knn: Knn = dataclasses.field(default_factory=Knn)
    linear: Linear = dataclasses.field(default_factory=Linear)
    low_shot: LowShot = dataclasses.field(default_factory=LowShot)
    attentive: Attentive = dataclasses.field(default_factory=Attentive)
    fusion: Fusion = dataclasses.field(default_factory=Fusion)
    segment: Segment = dataclasses.field(default_factory=Segment)
    region: Region = dataclasses.field(default_factory=Region)
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    zero_shot: ZeroShot = dataclasses.field(default_factory=ZeroShot)
    retrieval: Retrieval = dataclasses.field(default_factory=Retrieval)
    dense: Dense = dataclasses.field(default_factory=Dense)
    rank: Rank = dataclasses.field(default_factory=Rank)
    stability: Stability = dataclasses.field(default_factory=Stability)

    def of(self, probe: str) -> Any:
        """The settings of one probe; `low-shot` has those of low_shot."""
        return getattr(self, probe.replace("-", "_"))


def settings_from(overrides: Sequence[str]) -> Settings:
    """The defaults with overrides like `knn.k=10` applied. ValueError naming the key, the value and what was expected."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        strict_yaml.override(values, key.replace("-", "_") + equals + value)
    settings: Settings = strict_yaml.from_values(Settings, values, "--set")
    check(settings)
    return settings


POSITIVE = ("k", "temperature", "epochs", "batch_size", "queries", "d_out", "images", "clusters", "parts", "micro_batch", "layer_decay",
            "draws", "tiles", "bank", "width", "heads")  # fmt: skip
LISTS = ("ks", "lrs", "blrs", "shares", "noise", "jpeg", "blur", "shift")  # of numbers above 0
SHARES = ("held_out", "drop_path", "label_smoothing", "ema", "erase")


def check(settings: Settings) -> None:
    """ValueError for values that no probe can use."""
    for key, value in strict_yaml.dotted_values(dataclasses.asdict(settings)).items():
        name = key.rpartition(".")[2]
        if (name in POSITIVE and value <= 0) or (name in LISTS and (not value or min(value) <= 0)):
            raise ValueError(
                f"--set {key}={value}: expected {'numbers' if name in LISTS else 'a number'} above 0; correct it"
            )
        if name in SHARES and not 0 <= value < 1:
            raise ValueError(f"--set {key}={value}: expected 0 <= {name} < 1; correct it")
    if max(settings.low_shot.shares) > 1:
        raise ValueError(
            f"--set low_shot.shares={settings.low_shot.shares}: expected shares of the labels, at most 1; correct it"
        )
    if max(settings.stability.jpeg) > 100:
        raise ValueError(
            f"--set stability.jpeg={settings.stability.jpeg}: expected qualities from 1 to 100; correct it"
        )
