"""Classes of boxes: the bias and the head restated, RoIAlign on a slope, boxes in views, and boxes that cannot be."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae.probe.data import eval_view
from mrmae.probe.job import ProbeOptions
from mrmae.probe.region import BoxBias, RegionHead, in_view, roi_means
from mrmae.probe.run import probe_features
from mrmae.probe.settings import settings_from

QUICK = (
    "region.width=16",
    "region.heads=2",
    "region.head.epochs=40",
    "region.head.lrs=[0.01]",
    "region.linear.epochs=30",
    "region.linear.lrs=[1.0]",
)


def test_the_head_looks_with_a_bias_by_the_box_s_edges() -> None:
    torch.manual_seed(0)
    head = RegionHead(5, 3, grid=(2, 3), cell=(16.0, 8.0), width=8, heads=2).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, boxes, labels = (
        torch.randn(2, 6, 5).double(),
        torch.tensor([[1.0, 2.0, 20.0, 30.0], [8.0, 0.0, 24.0, 16.0]]).double(),
        torch.tensor([2, 0]),
    )
    loss = torch.nn.functional.cross_entropy(head(x, boxes), labels)
    found = torch.autograd.grad(loss, list(head.parameters()))

    def near(mlp: torch.nn.Sequential, low: torch.Tensor, high: torch.Tensor, centre: float) -> torch.Tensor:
        d = torch.stack([low - centre, high - centre])
        d = torch.sign(d) * torch.log2(d.abs() + 1) / np.log2(8)
        return mlp[2].weight @ torch.clamp(mlp[0].weight @ d + mlp[0].bias, min=0)  # type: ignore[operator, union-attr]

    losses = []
    for tokens, (x1, y1, x2, y2), label in zip(x, boxes, labels):
        tokens = (tokens - tokens.mean(1, keepdim=True)) / (tokens.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        keys, values = tokens @ head.keys.weight.T + head.keys.bias, tokens @ head.values.weight.T + head.values.bias
        parts = []
        for h in range(2):
            at = slice(4 * h, 4 * h + 4)
            logits = torch.stack([
                head.query[h] @ keys[3 * j + i, at] / 2 + near(head.bias.x, x1, x2, (i + 0.5) * 8)[h] + near(head.bias.y, y1, y2, (j + 0.5) * 16)[h]
                for j in range(2) for i in range(3)
            ])  # fmt: skip
            parts.append(torch.softmax(logits, 0) @ values[:, at])
        z = torch.cat(parts)
        z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * head.norm.weight + head.norm.bias
        logits = head.head.weight @ z + head.head.bias
        losses.append(torch.logsumexp(logits, 0) - logits[label])
    plain = sum(losses) / 2
    assert float(abs(plain - loss)) < 1e-10
    for ours, theirs in zip(found, torch.autograd.grad(plain, list(head.parameters()))):  # type: ignore[arg-type]
        assert (ours - theirs).abs().max() < 1e-10


def test_the_bias_of_every_cell_is_in_raster_order() -> None:
    bias = BoxBias(2, (2, 3), (16.0, 8.0))
    found = bias(torch.tensor([[0.0, 0.0, 8.0, 16.0]]))
    assert found.shape == (1, 2, 6)
    wide = found[0, :, :3] - found[0, :, :1]
    assert torch.allclose(found[0, :, 3:] - found[0, :, 3:4], wide, atol=1e-5), (
        "rows differ by a constant: the bias is a sum"
    )


def test_roialign_of_a_slope_is_its_value_in_the_box_s_middle() -> None:
    x = torch.arange(8.0).repeat(8)
    tokens = torch.stack([x, 3 - x], 1)[None].repeat(2, 1, 1)
    boxes = torch.tensor([[8.0, 8.0, 24.0, 16.0], [10.0, 10.0, 20.0, 20.0]])
    found = roi_means(tokens, torch.tensor([0, 1]), boxes, (8, 8), 32)
    centres = boxes[:, ::2].mean(1) / 4 - 0.5
    assert torch.allclose(found, torch.stack([centres, 3 - centres], 1), atol=1e-5)


@pytest.mark.parametrize("height, width", [(60, 100), (90, 70)])
def test_a_box_of_an_image_is_where_the_view_shows_it(height: int, width: int) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    image[20:45, 30:60] = 255
    x1, y1, x2, y2 = in_view((30, 20, 60, 45), width, height, 64) or ()
    rows, columns = np.nonzero(eval_view(image, 64, "bicubic")[..., 0] > 127)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == pytest.approx((x1, y1, x2, y2), abs=1)
    assert in_view((0, 0, 1, 1), width, height, 64) is None


def options(data: Path, out: Path, *sets: str) -> ProbeOptions:
    return ProbeOptions(
        "colours:4:012", [str(data)], ("region",), settings_from([*QUICK, *sets]), out=out, workers=2, batch_size=8
    )


def test_on_mosaics_both_heads_find_the_box_and_the_whole_image_does_not(
    colours: None, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_images(tmp_path / "data", {"train": 24, "test": 8})
    (found,) = probe_features(options(data, tmp_path / "out"), say=lambda _: None)
    aligned, whole, biased = found["rows"]
    assert aligned["name"] == "RoIAlign, linear" and aligned["accuracy"] == 1 and whole["accuracy"] < 0.8
    assert biased["name"].startswith("BoxRPB") and biased["accuracy"] > 0.95 and found["accuracy"] == biased["accuracy"]
    assert (found["n_train"], found["n_test"]) == (72, 24)


def pairs(root: Path) -> Path:
    """Pictures of two squares of different colours, and a table of their boxes and colours."""
    draw, rows = np.random.default_rng(0), ["image,xmin,ymin,xmax,ymax,label"]
    for part, n in (("train", 10), ("test", 4)):
        for i in range(n):
            picture, red = draw.integers(0, 40, (64, 64, 3)).astype(np.uint8), i % 2
            for colour, left in ((red, 6), (1 - red, 36)):
                picture[16:48, left : left + 22, colour] = 220
                rows.append(f"{part}/{i}.png,{left},16,{left + 22},48,{'red' if colour == 0 else 'green'}")
            (root / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / part / f"{i}.png")
    (root / "boxes.csv").write_text("\n".join(rows) + "\n")
    return root


def test_boxes_of_a_table_need_no_classes_of_images(colours: None, tmp_path: Path) -> None:
    data = pairs(tmp_path / "data")
    (found,) = probe_features(options(data, tmp_path / "out", f"region.boxes={data / 'boxes.csv'}"), say=lambda _: None)
    accuracy = [row["accuracy"] for row in found["rows"]]
    assert (
        accuracy[0] == 1
        and accuracy[1] == 0.5
        and accuracy[2] > 0.8
        and (found["n_train"], found["n_test"], found["n_classes"]) == (20, 8, 2)
    )


@pytest.mark.parametrize(
    "row, told",
    [
        ("test/0.png,10,10,65,20,red", r"region.boxes=.*boxes.csv: 'test/0.png': the box \(10.0, 10.0, 65.0, 20.0\) lies outside the image, which has 64 x 64 pixels"),
        ("test/0.png,-1,10,20,20,red", r"'test/0.png' has the box \[-1.0, 10.0, 20.0, 20.0\]; 0 <= x0 < x1"),
        ("test/0.png,30,10,20,20,red", r"'test/0.png' has the box \[30.0, 10.0, 20.0, 20.0\]; 0 <= x0 < x1"),
        ("test/0.png,a,10,20,20,red", r"has the box \['a', '10', '20', '20'\]; four numbers were expected"),
        ("test/0.png,10,10,20,20,", "'test/0.png' has a box without a label"),
        ("test/9.png,1,10,20,20,red", "'test/9.png' is no image of DATA"),
        ("test/0.png,10,10,20,20,blue", "class 'blue' is in the test part alone"),
    ],
)  # fmt: skip
def test_boxes_that_cannot_be_are_refused(colours: None, tmp_path: Path, row: str, told: str) -> None:
    data = pairs(tmp_path / "data")
    with open(data / "boxes.csv", "a") as file:
        file.write(row + "\n")
    with pytest.raises(ValueError, match=told):
        probe_features(options(data, tmp_path / "out", f"region.boxes={data / 'boxes.csv'}"), say=lambda _: None)
