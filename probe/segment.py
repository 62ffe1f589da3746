"""Dense features with labels: linear and k-NN segmentation of patch tokens, by masks beside images or on mosaics of labelled tiles."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from mrmae.common.knn import knn_predict
from mrmae.common.pictures import Pictures, Strip, as_bytes, draw_sheet, publish_png
from mrmae.common.progress import counted
from mrmae.probe import report
from mrmae.probe.data import Split, eval_view
from mrmae.probe.job import Outcome, Probing, evenly, headline, model_of
from mrmae.probe.linear import probe_linear
from mrmae.probe.mosaics import mosaic, mosaic_labels, mosaic_mask

VOID = -1  # a pixel that counts for nothing
GREY = (128, 128, 128)
Labelled = tuple[Float[Tensor, "n l d"], Int64[Tensor, "n h w"], Pictures]  # tokens, class of every pixel, pictures


def run_segment(job: Probing, name: str) -> Outcome:
    """mIoU of pixels and of patches, linear and k-NN; a picture of test images, truth and predictions."""
    settings, seed = job.options.settings.segment, job.options.seed
    classes, (train, test) = labelled_parts(job)
    grid, count, side = job.test.grid, len(classes), tuple(test[1].shape[1:])
    patches = [torch.stack([patch_classes(mask, count, grid) for mask in part[1]]) for part in (train, test)]
    found, notes = predicted_patches(job, train[0], patches[0], test[0], count)
    shares = [float((test[1] == i).sum() / (test[1] != VOID).sum().clamp_min(1)) for i in range(count)]
    rows, measures = [], [{"class": each, "share of pixels": share} for each, share in zip(classes, shares)]
    painted = {what: torch.stack([paint(one, grid, side) for one in patch]) for what, patch in found.items()}
    for what, predicted in found.items():
        for of, answer, truth in (("pixels", painted[what], test[1]), ("patches", predicted, patches[1])):
            tables = torch.stack([confusion(a, t, count) for a, t in zip(answer, truth)])
            rows.append(miou_row(f"mIoU of {of}, {what}", tables, seed))
            if of == "pixels":
                for row, value in zip(measures, overlaps(tables.sum(0)).tolist()):
                    row[f"IoU, {what.partition(',')[0]}"] = value
    shown = evenly(len(test[2]), settings.pictures)
    strips = [Strip("image", test[2][shown]), Strip("truth", coloured(test[1][shown], count))]
    strips += [Strip(what, coloured(one[shown], count)) for what, one in painted.items()]
    picture, title = Path("pictures") / f"{name}.png", f"Segmentation: {report.title(job.source.name)}"
    publish_png(job.home / picture, draw_sheet(strips, title=title, notes=[legend(classes)]))
    made = "masks" if settings.masks else f"mosaics of {settings.tiles} x {settings.tiles} tiles"
    many = f"{counted(len(train[0]), 'train image')}, {counted(len(test[0]), 'test image')}, {counted(count, 'class', 'classes')}"
    return {"rows": rows, "measures": measures, "notes": [f"{made}: {many}", *notes], "pictures": [str(picture)], "n_train": len(train[0]),
            "n_test": len(test[0]), "n_classes": count, **headline(rows[0])}, None  # fmt: skip


def predicted_patches(
    job: Probing, train: Float[Tensor, "n l d"], classes: Int64[Tensor, "n l"], test: Float[Tensor, "m l d"], count: int
) -> tuple[dict[str, Int64[Tensor, "m l"]], list[str]]:
    """The class of every test patch, by a linear classifier and by k-NN, each under its name; and what to tell."""
    settings, seed = job.options.settings.segment, job.options.seed
    known = classes != VOID
    drawn = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(known), dtype=torch.bool)
    held[drawn[: round(settings.linear.held_out * len(known))]] = True
    held = held[:, None].expand_as(known)[known]
    tokens, labels, asked = train[known].float(), classes[known], test.float().flatten(0, 1)
    heads, best, notes = probe_linear(tokens, labels, asked, settings.linear, n_classes=count, seed=seed, held=held)
    few = evenly(len(tokens), settings.bank)
    k = min(settings.k, len(few))
    voted = knn_predict(tokens[few], labels[few], asked, ks=[k], temperature=settings.temperature, n_classes=count)[k]
    found = {f"linear, lr {settings.linear.lrs[best]:g} per 256": heads[best], f"{k}-NN": voted}
    return {what: one.view(test.shape[:2]) for what, one in found.items()}, notes


# --- labels


def labelled_parts(job: Probing) -> tuple[list[str], list[Labelled]]:
    """The classes' names, and of both parts tokens, the class of every pixel and the pictures."""
    settings, side, interpolation = job.options.settings.segment, job.source.size, job.source.spec.interpolation
    teacher = model_of(job, "segment", "masks and mosaics are made of whole images")
    if job.data.train.cache or job.data.test.cache:
        raise ValueError(f"DATA {' '.join(job.options.data)}: a cache has crops of images, and masks and mosaics are of whole ones; expected a folder or a tar; "
                         "give the images themselves")  # fmt: skip
    pictures, masks = [], []
    for number, part in enumerate((job.data.train, job.data.test)):
        if settings.masks:
            some = evenly(len(part), settings.images)
            with ThreadPoolExecutor(job.options.workers) as pool:
                cut = functools.partial(
                    image_and_mask,
                    part,
                    folder=settings.masks,
                    side=side,
                    interpolation=interpolation,
                    void=settings.void,
                )
                pairs = list(pool.map(cut, some))
            pictures.append(torch.stack([torch.from_numpy(image) for image, _ in pairs]))
            masks.append(torch.stack([torch.from_numpy(mask) for _, mask in pairs]))
        else:
            ids, classes = mosaic_labels(job.labels[number], settings.tiles, settings.images, seed=job.options.seed)
            pictures.append(torch.stack([mosaic(part, some, side, interpolation) for some in ids]))
            masks.append(torch.stack([mosaic_mask(some, side) for some in classes]))
    names = job.data.classes
    if settings.masks:
        values = sorted({*masks[0].unique().tolist()} - {VOID})  # type: ignore[no-untyped-call]
        if len(values) < 2 or (strange := sorted({*masks[1].unique().tolist()} - {VOID, *values})):  # type: ignore[no-untyped-call]
            told = (
                f"{counted(len(values), 'class', 'classes')}"
                if len(values) < 2
                else f"value {strange[0]} in the test part alone"
            )
            raise ValueError(f"--set segment.masks={settings.masks}: the masks have {told}; expected at least two values in the train part, and no other in the "
                             "test part; check them, or name what is no class by segment.void")  # fmt: skip
        names, masks = [str(value) for value in values], [as_places(mask, values) for mask in masks]
    tokens = [
        torch.cat([teacher.forward(rows).tokens.half().cpu() for rows in torch.split(each, job.options.batch_size)])
        for each in pictures
    ]
    return names, [(found, mask, shown.numpy()) for found, mask, shown in zip(tokens, masks, pictures)]


def as_places(mask: Int64[Tensor, "n h w"], values: Sequence[int]) -> Int64[Tensor, "n h w"]:
    """Values as places in `values`, VOID as it is."""
    found = torch.searchsorted(torch.tensor(list(values)), mask.clamp_min(0))
    return torch.where(mask == VOID, VOID, found)


def image_and_mask(
    part: Split, i: int, *, folder: str, side: int, interpolation: str, void: Sequence[int]
) -> tuple[Any, Any]:
    """The evaluation view of an image, and its mask cut the same way, int64 with VOID. ValueError where there is none that fits."""
    path = mask_path(folder, part.rows[i].key)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such mask, of {part.rows[i].key!r}; expected a PNG of class numbers for every image, under the image's name; add it, or "
                         "choose images with --train-include and --test-include")  # fmt: skip
    try:
        with Image.open(path) as opened:
            if opened.mode not in ("L", "P", "1", "I", "I;16"):
                raise ValueError(
                    f"{path}: is a picture of mode {opened.mode}; expected one number per pixel (grey or palette), the class; convert it"
                )
            values = np.array(opened, np.int64)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); expected a PNG of class numbers; write it again"
        ) from None
    with part.image(i) as image:
        if image.shape[:2] != values.shape:
            raise ValueError(f"{path}: the mask has {values.shape[1]} x {values.shape[0]} pixels, the image {part.rows[i].key!r} {image.shape[1]} x {image.shape[0]}; the "
                             "same was expected; make the mask of this very image")  # fmt: skip
        shown = eval_view(image, side, interpolation)
    kinds, places = np.unique(values, return_inverse=True)
    if len(kinds) > 256:
        raise ValueError(
            f"{path}: has {len(kinds)} different values; class numbers were expected, 256 at most; is it a picture?"
        )
    cut = eval_view(np.repeat(places.reshape(values.shape).astype(np.uint8)[..., None], 3, 2), side, "nearest")[..., 0]
    mask = kinds[cut]
    return shown, np.where(np.isin(mask, list(void)), VOID, mask)


def mask_path(folder: str, key: str) -> Path:
    """FOLDER/KEY with .png for the image's suffix."""
    return Path(folder) / PurePosixPath(key).with_suffix(".png")


def masks_read(job: Probing) -> list[str]:
    """Hashes of the masks that the probe reads, as part of what its result is of."""
    folder = job.options.settings.segment.masks
    return [*digests(folder, (job.data.train, job.data.test))] if folder else []


def digests(folder: str, parts: Sequence[Split]) -> Iterator[str]:
    for part in parts:
        for row in part.rows:
            path = mask_path(folder, row.key)
            yield hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


# --- classes of patches and pixels


def patch_classes(mask: Int64[Tensor, "h w"], n_classes: int, grid: tuple[int, int]) -> Int64[Tensor, "l"]:
    """The class that most pixels of a patch have, of equal ones the first; VOID where none has any."""
    shares = F.adaptive_avg_pool2d(
        F.one_hot(mask.clamp_min(0), n_classes).permute(2, 0, 1).float() * (mask != VOID), grid
    ).flatten(1)
    return torch.where(shares.sum(0) > 0, shares.argmax(0), VOID)


def paint(classes: Int64[Tensor, "l"], grid: tuple[int, int], size: Sequence[int]) -> Int64[Tensor, "h w"]:
    """The class of each patch over its pixels."""
    return F.interpolate(classes.view(1, 1, *grid).double(), tuple(size), mode="nearest-exact")[0, 0].long()


def confusion(predicted: Int64[Tensor, "..."], truth: Int64[Tensor, "..."], n_classes: int) -> Int64[Tensor, "c c"]:
    """How often a class (row) was taken for another (column), where there is a truth."""
    counts: Bool[Tensor, ...] = truth != VOID
    return torch.bincount(truth[counts] * n_classes + predicted[counts], minlength=n_classes**2).view(
        n_classes, n_classes
    )


def overlaps(table: Tensor) -> Float[Tensor, "... c"]:
    """Intersection over union of every class, fp64; NaN of one that is neither there nor predicted."""
    right = table.diagonal(dim1=-2, dim2=-1).double()
    return right / (table.sum(-1) + table.sum(-2) - right)


def miou_row(name: str, tables: Int64[Tensor, "n c c"], seed: int) -> dict[str, Any]:
    """Mean over the classes of their IoU over all images, and its interval over images drawn with replacement."""
    drawn = np.random.default_rng(seed).multinomial(
        len(tables), np.full(len(tables), 1 / len(tables)), report.RESAMPLES
    )
    means = overlaps(
        (torch.from_numpy(drawn).double() @ tables.flatten(1).double()).view(-1, *tables.shape[1:])
    ).nanmean(-1)
    low, high = np.quantile(means.numpy(), [(1 - report.LEVEL) / 2, (1 + report.LEVEL) / 2])
    return {"name": name, "accuracy": float(overlaps(tables.sum(0)).nanmean()), "interval": [float(low), float(high)]}


# --- pictures


def coloured(masks: Int64[Tensor, "n h w"], n_classes: int) -> Pictures:
    """Classes as colours, grey where there is none."""
    palette = colormaps["tab10" if n_classes <= 10 else "tab20"]
    found = as_bytes(torch.from_numpy(palette(masks.numpy() % palette.N)[..., :3]))
    found[masks.numpy() == VOID] = GREY
    return found


def legend(classes: Sequence[str]) -> str:
    """Which colour is which class, in words."""
    words = ("blue", "orange", "green", "red", "purple", "brown", "pink", "grey", "olive", "cyan")
    named = [f"{colour} {name}" for colour, name in zip(words, classes)] if len(classes) <= len(words) else classes
    return f"Classes: {', '.join(named)}. A patch's class is painted over its pixels."
