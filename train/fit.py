"""What a shipped recipe leaves to the size of the data and of the student, and to the bands of the views, where nobody has said otherwise.

Recipes are published for a million images and a ViT-B. On fewer than `SMALL_DATA` images a batch of 2048 is the whole data set or more, and
forty epochs of warm-up are a few updates; behind a narrow student the published decoder is most of the model. Keys that were set, and
whatever is of the published size, stay as they are.
"""

from dataclasses import replace

import torch

from mrmae.shards.cache import Cache
from mrmae.shards.format import Numbers
from mrmae.train import optim
from mrmae.train.method import Recipe, replaced

STILL_BAND = 1e-6  # of a band's mean: a smaller deviation is rounding
SMALL_DATA = 32_768  # images: sixteen batches of the published 2048
LEAST_BATCH, BATCHES = 64, 16
PUBLISHED_WIDTH = 768  # of the student that the decoder of 8 x 512 was published with
BAND_VIEWS, BAND_VIEWS_AT_ONCE = 256, 16  # over which bands are measured, as many as calibrate a teacher's codes
SMALL_LR, STUDY_LR = (
    1e-4,
    1e-3,
)  # below the first a peak is said to be small; docs/evidence.md has trained at the second


def fitted_to_data(recipe: Recipe, n_images: int, parts: int = 1) -> tuple[Recipe, list[str]]:
    """`recipe` with a batch and a warm-up for this many images, and what to tell of it.

    The batch is a power of two, about a sixteenth of the images but at least 64 (of fewer than 128 images half), and a multiple of
    `parts`, processes times micro-batches; the warm-up that of a run of one's own length.
    """
    o = recipe.optim
    usual = {
        "optim.batch_size": fitting_batch(o.batch_size, n_images, parts),
        "optim.warmup_epochs": optim.usual_warmup(o.epochs),
    }
    changed = {
        key: value
        for key, value in usual.items()
        if key in recipe.fit and value != getattr(o, key.partition(".")[2]) and n_images < SMALL_DATA
    }
    told = [
        f"{key} is {value:g} instead of the shipped {getattr(o, key.partition('.')[2]):g}"
        for key, value in changed.items()
    ]
    note = f"small data, {n_images:,} images: {' and '.join(told)}; --set decides otherwise"
    return replaced(recipe, changed), [note] if told else []


def fitting_batch(published: int, n_images: int, parts: int) -> int:
    """A batch for this many images, at most the published one; a multiple of `parts`."""
    most = max(n_images // BATCHES, min(LEAST_BATCH, n_images // 2), 1)
    if most >= published:
        return published
    size = 1 << (most.bit_length() - 1)
    return max(size - size % parts, parts)


def fitted_bands(recipe: Recipe, cache: Cache, numbers: Numbers) -> tuple[Recipe, list[str]]:
    """`recipe` with the mean and standard deviation of the views' bands, and what to tell of it; RGB views have the recipe's own.

    Measured where the recipe lets go of both, on the first views of the first 256 of `numbers`, a random sample that is the same for all
    ranks and every start; the run keeps to them. A band that does not vary has the deviation 1.
    """
    keys = ("prepare.mean", "prepare.std")
    if cache.encoding.as_shown or not set(keys) <= set(recipe.fit):
        return recipe, []
    chosen = numbers[:BAND_VIEWS]
    sums, n = torch.zeros(2, cache.encoding.bands, dtype=torch.float64), 0
    for start in range(0, len(chosen), BAND_VIEWS_AT_ONCE):
        some = chosen[start : start + BAND_VIEWS_AT_ONCE]
        values = cache.read_pixels(some, some * 0).double().flatten(0, 2) / cache.encoding.unit
        sums, n = sums + torch.stack([values.sum(0), values.square().sum(0)]), n + len(values)
    mean = sums[0] / n
    std = (sums[1] / n - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > STILL_BAND * mean.abs(), std, 1.0)
    found = [tuple(float(f"{value:.6g}") for value in row.tolist()) for row in (mean, std)]
    note = (
        f"{cache.encoding.words}: prepare.mean {list(found[0])} and prepare.std {list(found[1])}, measured on {len(chosen)} views, of numbers"
        f" that count {cache.encoding.unit} as 1; --set decides otherwise"
    )
    return replaced(recipe, dict(zip(keys, found))), [note]


def fitted_decoder(recipe: Recipe, width: int, depth: int) -> tuple[Recipe, list[str]]:
    """`recipe` with a decoder for a student of this width and depth, and what to tell of it.

    Two thirds of the student's width, as MAE's 512 behind ViT-B's 768, in heads of 32 channels, and at most two thirds as deep.
    """
    decoder = recipe.student.decoder
    if decoder is None or "student.decoder" not in recipe.fit or width >= PUBLISHED_WIDTH:
        return recipe, []
    channels = max(32, width * decoder.width // PUBLISHED_WIDTH // 32 * 32)
    fitting = replace(
        decoder, depth=max(1, min(decoder.depth, round(depth * 2 / 3))), width=channels, heads=channels // 32
    )
    if fitting == decoder:
        return recipe, []
    note = (
        f"narrow student of {width} channels: a decoder of {fitting.depth} x {fitting.width} instead of the shipped {decoder.depth} x"
        f" {decoder.width}; --set student.decoder=... decides otherwise"
    )
    return replaced(recipe, {"student.decoder": fitting}), [note]


def small_rate_words(recipe: Recipe) -> list[str]:
    """A line where the peak learning rate is small, as the linear rule makes it of a small batch; else none."""
    o = recipe.optim
    peak = optim.base_lr(o.lr_per_256, o.batch_size, o.lr_scale, o.lr_rule)
    if peak >= SMALL_LR:
        return []
    study = STUDY_LR * 256 / o.batch_size
    return [
        f"small learning rate: {peak:.3g} at its peak, as {o.lr_per_256:g} is meant for large batches and this one has"
        f" {o.batch_size}; --blr {study:.2g} would be {STUDY_LR:g}, with which the students of docs/evidence.md were trained"
    ]
