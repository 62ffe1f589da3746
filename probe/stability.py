"""How far patch tokens move when an image changes a little: noise, JPEG, blur, and a shift of the picture."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from mrmae.common.pictures import Pictures, Strip, draw_sheet, heat, publish_png, ranges
from mrmae.extract.teachers import Teacher
from mrmae.probe import report
from mrmae.probe.data import shown_images
from mrmae.probe.job import Outcome, Probing, evenly, model_of
from mrmae.probe.settings import Stability

CHANGES = {
    "noise": "noise, std {:g} of 0..1",
    "jpeg": "JPEG, quality {:g}",
    "blur": "blur, std {:g} px",
    "shift": "shift, {:g} px",
}
ALONG = "shift of one patch, tokens followed"


def run_stability(job: Probing, name: str) -> Outcome:
    """Relative shift of tokens under every change of a few test images, and a picture of where they move most."""
    teacher = model_of(job, "stability", "images are changed")
    settings, seed = job.options.settings.stability, job.options.seed
    few = evenly(len(job.data.test), settings.images)
    with ThreadPoolExecutor(job.options.workers) as pool:
        pixels = shown_images(job.data.test, few, job.source.size, job.source.spec.interpolation, pool)
    before = tokens_of(teacher, pixels, job.options.batch_size)
    rows, middles, strips = [], [], [Strip("image", pixels[: settings.pictures].numpy())]
    for kind, words in CHANGES.items():
        for strength in getattr(settings, kind):
            changed = torch.from_numpy(changed_images(pixels.numpy(), kind, strength, seed=seed))
            after = tokens_of(teacher, changed, job.options.batch_size)
            rows.append({"change": words.format(strength), **moved(before, after)})
        middles.append(rows[-1 - len(getattr(settings, kind)) // 2])
        strips += shown_change(words.format(strength), changed, relative_shift(before, after), job.test.grid, settings)
    along = moved_along(teacher, pixels, before, job)
    picture = Path("pictures") / f"{name}.png"
    notes = [
        "Tokens that move: |t' - t| / |t| of every patch, under the strongest change of each kind; each map from its lowest to its highest."
    ]
    publish_png(
        job.home / picture, draw_sheet(strips, title=f"Stability: {report.title(job.source.name)}", notes=notes)
    )
    told = [f"{row['change']} {row['tokens']:.3f}" for row in [*middles, *along]]
    return {"measures": [*rows, *along], "told": [f"relative shift of tokens: {', '.join(told)}"], "pictures": [str(picture)], "n_images": len(few),
            "headline": "relative shift of tokens", "accuracy": None, "interval": None}, None  # fmt: skip


def tokens_of(teacher: Teacher, pixels: UInt8[Tensor, "b h w 3"], batch_size: int) -> Float[Tensor, "b l d"]:
    """Patch tokens, fp32 on the CPU."""
    return torch.cat([teacher.forward(rows).tokens.cpu() for rows in torch.split(pixels, batch_size)])


def relative_shift(before: Float[Tensor, "b l d"], after: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
    """|t' - t| / |t| of every token."""
    shift: Tensor = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
    return shift


def moved(before: Float[Tensor, "b l d"], after: Float[Tensor, "b l d"]) -> dict[str, Any]:
    """How far tokens moved: relative to their own length, and to what images differ by.

    against content: root of sum |t' - t|^2 over sum |t - mean over the images at its position|^2. What all images share is not in it;
    two unrelated images differ by 1.41. None of a single image. pooled: relative shift of the mean of an image's tokens.
    """
    content = (before - before.mean(0)).square().sum()
    against = float(((after - before).square().sum() / content.clamp_min(1e-30)).sqrt()) if len(before) > 1 else None
    pooled = relative_shift(before.mean(1, keepdim=True), after.mean(1, keepdim=True))
    return {
        "tokens": float(relative_shift(before, after).mean()),
        "against content": against,
        "pooled": float(pooled.mean()),
    }


def moved_along(
    teacher: Teacher, pixels: UInt8[Tensor, "b h w 3"], before: Float[Tensor, "b l d"], job: Probing
) -> list[dict[str, Any]]:
    """The same for a picture shifted by one patch, every token against the one that saw the same pixels; none where it cannot be."""
    (rows, columns), side = job.test.grid, pixels.shape[1]
    if rows != columns or rows < 2 or side % rows:
        return []
    changed = torch.from_numpy(changed_images(pixels.numpy(), "shift", side // rows, seed=0))
    after = tokens_of(teacher, changed, job.options.batch_size).reshape(len(before), rows, columns, -1)[:, 1:, 1:]
    there = before.reshape(len(before), rows, columns, -1)[:, :-1, :-1]
    return [{"change": ALONG, **moved(there.flatten(1, 2), after.flatten(1, 2))}]


def changed_images(
    pixels: UInt8[np.ndarray[Any, Any], "b h w 3"], kind: str, strength: float, *, seed: int
) -> Pictures:
    """Every image changed: `noise` drawn by (seed, place in the batch), `jpeg`, `blur`, or `shift` right and down, edges repeated."""
    return np.stack([changed_image(image, kind, strength, (seed, i)) for i, image in enumerate(pixels)])


def changed_image(
    image: UInt8[np.ndarray[Any, Any], "h w 3"], kind: str, strength: float, seed: Sequence[int]
) -> Pictures:
    if kind == "noise":
        noise = np.random.default_rng(list(seed)).normal(0, 255 * strength, image.shape)
        return np.asarray((image + noise).round().clip(0, 255), np.uint8)
    if kind == "shift":
        far = int(strength)
        return np.pad(image, ((far, 0), (far, 0), (0, 0)), mode="edge")[: image.shape[0], : image.shape[1]]
    picture = Image.fromarray(image)
    if kind == "blur":
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(strength)), np.uint8)
    coded = io.BytesIO()
    picture.save(coded, "JPEG", quality=int(strength))
    return np.asarray(Image.open(coded).convert("RGB"), np.uint8)


def shown_change(
    words: str, changed: Tensor, shift: Float[Tensor, "b l"], grid: tuple[int, int], settings: Stability
) -> list[Strip]:
    """The changed pictures, and beside them how far each token moved."""
    few = shift[: settings.pictures]
    return [
        Strip(words, changed[: settings.pictures].numpy()),
        Strip("tokens moved", heat(few, grid), captions=ranges(few)),
    ]
