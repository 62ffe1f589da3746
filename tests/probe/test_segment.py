"""Segmentation: labels of patches and pixels, mIoU by hand, masks that do not fit, and colours that a patch cannot mistake."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae.probe.job import ProbeOptions
from mrmae.probe.mosaics import mosaic_boxes, mosaic_labels, mosaic_mask
from mrmae.probe.run import probe_features
from mrmae.probe.segment import VOID, confusion, miou_row, overlaps, paint, patch_classes
from mrmae.probe.settings import settings_from

QUICK = ("segment.linear.epochs=60", "segment.linear.batch_size=64", "segment.linear.lrs=[0.3, 3.0]", "segment.k=5")


def options(data: Path, out: Path, *sets: str) -> ProbeOptions:
    return ProbeOptions(
        "colours:4:012", [str(data)], ("segment",), settings_from([*QUICK, *sets]), out=out, workers=2, batch_size=8
    )


def test_every_image_is_in_one_mosaic_and_its_class_fills_its_cell() -> None:
    labels = torch.arange(11) % 3
    ids, classes = mosaic_labels(labels, 2, 500, seed=0)
    assert ids.shape == (2, 4) and len(ids.unique()) == 8 and torch.equal(classes, labels[ids])
    mask = mosaic_mask(torch.tensor([5, 6, 7, 8]), 7)
    for (x1, y1, x2, y2), wanted in zip(mosaic_boxes(2, 7).int().tolist(), (5, 6, 7, 8)):
        assert (mask[y1:y2, x1:x2] == wanted).all()
    assert sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in mosaic_boxes(3, 32).tolist()) == 32 * 32
    with pytest.raises(ValueError, match="11 images make no mosaic of 4 x 4; expected at least 16"):
        mosaic_labels(labels, 4, 500, seed=0)


def test_a_patch_has_the_class_of_most_of_its_pixels_and_paints_them() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2], [VOID, VOID, 2, VOID], [VOID, VOID, VOID, VOID]])
    assert patch_classes(mask, 3, (2, 2)).tolist() == [0, 1, VOID, 2]
    painted = paint(torch.tensor([0, 1, 2, 1]), (2, 2), (5, 4))
    assert painted[0].tolist() == [0, 0, 1, 1] and painted[4].tolist() == [2, 2, 1, 1]


def test_miou_is_that_of_counting_by_hand() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, VOID])
    table = confusion(torch.tensor([0, 0, 1, 1, 2, 2]), truth, 4)
    assert table.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    found = overlaps(table)
    assert found[:3].tolist() == pytest.approx([2 / 3, 1 / 3, 0]) and found[3].isnan()
    row = miou_row("x", torch.stack([table, table]), 0)
    assert row["accuracy"] == pytest.approx(1 / 3) and row["interval"] == pytest.approx([1 / 3, 1 / 3])


def test_colours_are_told_apart_on_mosaics(colours: None, images: Path, tmp_path: Path) -> None:
    (found,) = probe_features(options(images, tmp_path), say=lambda _: None)
    assert [row["name"].partition(",")[0] for row in found["rows"]] == ["mIoU of pixels", "mIoU of patches"] * 2
    assert [row["accuracy"] for row in found["rows"]] == pytest.approx([1.0] * 4) and (
        found["n_train"],
        found["n_test"],
    ) == (6, 3)
    assert found["measures"][0]["class"] == "azure" and found["measures"][0]["IoU, linear"] == pytest.approx(1)
    assert Image.open(tmp_path / found["pictures"][0]).width > 600


def with_masks(root: Path, make: Callable[..., Path], *, beside: bool) -> tuple[Path, Path]:
    """Images without classes, the left half of one colour; their masks say which half, 255 is void."""
    masks = root / ("data" if beside else "masks")
    draw = np.random.default_rng(0)
    for part, n in (("train", 6), ("test", 3)):
        for i in range(n):
            picture = draw.integers(0, 60, (40, 48, 3)).astype(np.uint8)
            mask = np.full((40, 48), 7, np.uint8)
            picture[:, :24, 0], mask[:, :24], mask[:2] = 220, 3, 255
            for folder, array, suffix in ((root / "data", picture, "jpg"), (masks, mask, "png")):
                (folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / part / f"{i}.{suffix}")
    return root / "data", masks


@pytest.mark.parametrize("beside", [True, False])
def test_masks_are_cut_as_their_images_are(
    colours: None, make_images: Callable[..., Path], tmp_path: Path, beside: bool
) -> None:
    data, masks = with_masks(tmp_path, make_images, beside=beside)
    how: dict[str, Any] = {"train_include": ["train/*.jpg"], "test_include": ["test/*.jpg"]}
    asked = options(data, tmp_path / "out", f"segment.masks={masks}")
    (found,) = probe_features(ProbeOptions(**{**vars(asked), **how}), say=lambda _: None)
    assert [row["class"] for row in found["measures"]] == ["3", "7"]
    assert found["rows"][0]["accuracy"] > 0.95 and found["rows"][2]["accuracy"] > 0.95 and found["n_test"] == 3
    Image.fromarray(np.full((40, 48), 3, np.uint8)).save(masks / "test" / "0.png")
    (again,) = probe_features(ProbeOptions(**{**vars(asked), **how}), say=lambda _: None)
    assert again["id"] != found["id"], "another mask is another result"


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda path: Image.new("L", (48, 41)).save(path), "the mask has 48 x 41 pixels, the image 'test/0.jpg' 48 x 40; the same was expected"),
        (lambda path: Image.new("RGB", (48, 40)).save(path), "is a picture of mode RGB; expected one number per pixel"),
        (lambda path: path.unlink(), "there is no such mask, of 'test/0.jpg'"),
        (lambda path: path.write_bytes(b"x"), "cannot be read"),
        (lambda path: Image.new("L", (48, 40), 9).save(path), "the masks have value 9 in the test part alone"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(
    colours: None, make_images: Callable[..., Path], tmp_path: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    data, masks = with_masks(tmp_path, make_images, beside=False)
    spoil(masks / "test" / "0.png")
    with pytest.raises(ValueError, match=told):
        probe_features(options(data, tmp_path / "out", f"segment.masks={masks}"), say=lambda _: None)
