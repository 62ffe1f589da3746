"""Boxes: where they land after crop and flip, what MoM's head makes of them by its formulas, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from training import train_quietly

from mrmae.extract.boxes import on_view, read_box_file
from mrmae.extract.inspect.pictures import BOX_COLOUR, contact_sheet
from mrmae.shards.cache import open_cache
from mrmae.shards.format import View
from mrmae.train.batches import boxes_seen
from mrmae.train.method import GivenBoxes, Masks, Recipe, build_model
from mrmae.train.method.targets import Batch, CacheInfo
from mrmae.train.ranks import Ranks
from mrmae.train.run import build_run
from mrmae.train.setup import Setup

SHORT = ("optim.batch_size=8", "optim.epochs=1", "optim.warmup_epochs=0")


def boxes_file(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    columns = dict(zip(("key", "x0", "y0", "x1", "y1", "label"), zip(*rows)))
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


def test_boxes_are_moved_cut_dropped_scaled_and_mirrored_with_the_view() -> None:
    view = View(top=20, left=10, height=40, width=80, flip=False, source_height=100, source_width=200)
    boxes = np.array([[10, 20, 50, 40], [0, 0, 30, 30], [90, 20, 99, 40], [85, 55, 200, 100], [0, 60, 200, 100]], float)
    at, which = on_view(boxes, view, 160)  # 2 px across and 4 down per pixel of the image
    assert which.tolist() == [0, 1, 3]  # one to the right of the crop and one below it are not there
    assert at.tolist() == [[0, 0, 80, 80], [0, 0, 40, 40], [150, 140, 160, 160]]
    mirrored, _ = on_view(boxes, replace(view, flip=True), 160)
    assert mirrored.tolist() == [[80, 0, 160, 80], [120, 0, 160, 40], [0, 140, 10, 160]]


def test_boxes_land_on_what_they_frame(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    """A red rectangle in every image and its box: in every stored view the box holds the red pixels, and nothing else does."""
    draw, images, rows, red = np.random.default_rng(0), {}, [], (230, 20, 20)
    for i in range(12):
        height, width = int(draw.integers(60, 120)), int(draw.integers(60, 120))
        x0, y0 = int(draw.integers(0, width - 30)), int(draw.integers(0, height - 30))
        x1, y1 = x0 + int(draw.integers(14, 30)), y0 + int(draw.integers(14, 30))
        pixels = np.full((height, width, 3), 90, np.uint8)
        pixels[y0:y1, x0:x1] = red
        Image.fromarray(pixels).save(tmp_path / "one.png")
        images[f"a/{i}.png"] = (tmp_path / "one.png").read_bytes()
        rows.append((f"a/{i}.png", x0, y0, x1, y1))
    cache = open_cache(make_cache(tmp_path / "cache", size=64, n=12, n_views=3, teachers={}, images=images))
    boxes, flips = read_box_file(boxes_file(tmp_path / "boxes.parquet", rows)), set()
    boxes.refuse_unfit(cache, cache.numbers)
    for number in cache.numbers:
        for v in range(3):
            view = cache.read_crop(int(number), v)
            at, which = boxes.seen(cache.keys[number], view, cache.size)
            pixels = cache.read_pixels([number], [v])[0].float()
            is_red = (pixels[..., 0] > 160) & (pixels[..., 1] < 60)
            flips.add(view.flip)
            if len(which) == 0:
                assert is_red.sum() < 64
                continue
            x0, y0, x1, y1 = at[0]
            inside = torch.zeros(64, 64, dtype=torch.bool)
            inside[max(0, round(y0) - 2) : round(y1) + 2, max(0, round(x0) - 2) : round(x1) + 2] = True
            core = is_red[int(y0 + 2.999) : int(y1 - 2), int(x0 + 2.999) : int(x1 - 2)]
            assert not (is_red & ~inside).any() and core.all()
    assert flips == {True, False}
    sheet = np.asarray(contact_sheet(cache, 3, boxes=boxes))
    assert (np.abs(sheet.astype(int) - BOX_COLOUR).max(-1) < 60).sum() > 300  # drawn, then made smaller


# ---- MoM's head


def roi(grid: Tensor, box: Tensor, cells: int, scale: float) -> Tensor:
    """RoIAlign of one box, sample by sample: [d, cells, cells] of [d, h, w]."""
    d, h, w = grid.shape
    x0, y0, x1, y1 = (float(v) * scale for v in box)
    across, down = max(x1 - x0, 1.0) / cells, max(y1 - y0, 1.0) / cells
    n_x, n_y = int(np.ceil(max(x1 - x0, 1.0) / cells)), int(np.ceil(max(y1 - y0, 1.0) / cells))
    out = []
    for row in range(cells):
        for column in range(cells):
            total = torch.zeros(d, dtype=grid.dtype)
            for i in range(n_y):
                for j in range(n_x):
                    y = min(max(y0 + (row + (i + 0.5) / n_y) * down, 0.0), h - 1.0)
                    x = min(max(x0 + (column + (j + 0.5) / n_x) * across, 0.0), w - 1.0)
                    top, left = int(y), int(x)
                    for at_y, share_y in ((top, 1 - (y - top)), (min(top + 1, h - 1), y - top)):
                        for at_x, share_x in ((left, 1 - (x - left)), (min(left + 1, w - 1), x - left)):
                            total = total + grid[:, at_y, at_x] * (share_y * share_x)
            out.append(total / (n_x * n_y))
    return torch.stack(out, dim=1).reshape(d, cells, cells)


def transformer(block: Any, x: Tensor, heads: int) -> Tensor:
    """One pre-norm block on [n, d]."""
    h = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (block.attn.qkv.weight @ h.T + block.attn.qkv.bias[:, None]).T.chunk(3, dim=1)
    parts = []
    for one in range(heads):
        at = slice(one * x.shape[1] // heads, (one + 1) * x.shape[1] // heads)
        parts.append(torch.softmax(q[:, at] @ k[:, at].T / (x.shape[1] // heads) ** 0.5, dim=1) @ v[:, at])
    x = x + torch.cat(parts, dim=1) @ block.attn.proj.weight.T + block.attn.proj.bias
    h = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)
    h = F.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def normed(norm: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def test_mom_is_its_formula_with_gradients(
    tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo], tiny_batch: Callable[..., Batch]
) -> None:
    info = tiny_info(4, 8)
    info = CacheInfo(info.size, info.grid)
    recipe = tiny_recipe("mom", "student.boxes.least=4")
    asked = recipe.student.boxes
    assert asked is not None
    model = build_model(recipe, info, dtype=torch.float64)
    at = torch.zeros(2, asked.most, 4)
    at[0, 0], at[0, 1], at[1, 0] = (
        torch.tensor(box) for box in ([3.5, 2.0, 20.25, 30.0], [0.0, 5.0, 3.0, 32.0], [9.0, 7.0, 31.0, 16.5])
    )
    cells, draw = asked.cells**2, torch.Generator().manual_seed(3)
    hidden = torch.stack(
        [torch.randperm(cells, generator=draw)[: asked.hide].sort().values for _ in range(2 * asked.most)]
    )
    batch = replace(tiny_batch(tiny_info(4, 8)), boxes=GivenBoxes(at, hidden.view(2, asked.most, -1)))
    everything = torch.arange(16).expand(2, -1)
    masks = Masks(everything, everything[:, :0])
    loss, _ = model(batch, masks)
    loss.backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in weights if p.grad is not None]
    assert len(found) == len(weights)

    final, head, boxes = model.taps(batch, masks)["final"].x, model.heads["boxes"], model.boxes
    assert boxes is not None
    of_image = []
    for image in range(2):
        grid = final[image, 1:].T.reshape(-1, 4, 4)
        picture = batch.pixels[image].double().permute(2, 0, 1) / 255
        error, weight = torch.zeros((), dtype=torch.float64), 0.0
        for m in range(asked.most):
            box, away = at[image, m].double(), hidden.view(2, asked.most, -1)[image, m].tolist()
            if (box[2:] - box[:2]).min() < 4:
                continue  # not there, or 3 px wide
            x = roi(grid, box, asked.cells, 1 / 8).flatten(1).T
            x = F.elu(x @ boxes.project[0].weight.T + boxes.project[0].bias)
            x = x @ boxes.project[2].weight.T + boxes.project[2].bias
            x = normed(boxes.embed[2], normed(boxes.embed[0], x) @ boxes.embed[1].weight.T + boxes.embed[1].bias)
            shown = [cell for cell in range(cells) if cell not in away]
            seen = (x + boxes.unit_places[0])[shown]
            for block in boxes.blocks:
                seen = transformer(block, seen, asked.heads)
            behind = torch.empty_like(x)
            behind[shown] = normed(boxes.norm, seen)
            behind[away] = boxes.unit_hidden[0].expand(len(away), -1)
            behind = behind + boxes.unit_places_behind[0]
            for block in boxes.behind:
                behind = transformer(block, behind, asked.heads)
            told = normed(boxes.norm_behind, behind) @ head.weight.T + head.bias
            crop = crop_of(picture, box, asked.crop)
            side = (asked.crop[0] // asked.cells, asked.crop[1] // asked.cells)
            for cell in away:
                row, column = divmod(cell, asked.cells)
                goal = crop[:, row * side[0] : (row + 1) * side[0], column * side[1] : (column + 1) * side[1]].flatten()
                error, weight = error + ((told[cell] - goal) ** 2).mean(), weight + 1
        of_image.append(error / weight)
    again = asked_weight(recipe) * (of_image[0] + of_image[1]) / 2
    assert abs(float((loss - again).detach())) < 1e-10
    for one, two in zip(found, torch.autograd.grad(again, weights)):
        assert torch.allclose(one, two, atol=1e-10, rtol=1e-8)


def crop_of(picture: Tensor, box: Tensor, crop: tuple[int, int]) -> Tensor:
    """A box resized, each pixel the mean of bilinear samples across it; the middle of pixel 0 lies at 0.5."""
    c, h, w = picture.shape
    (height, width), (x0, y0, x1, y1) = crop, (float(v) - 0.5 for v in box)
    n_x, n_y = int(np.ceil((x1 - x0) / width)), int(np.ceil((y1 - y0) / height))
    out = torch.zeros(c, height, width, dtype=picture.dtype)
    for row in range(height):
        for column in range(width):
            for i in range(n_y):
                for j in range(n_x):
                    y = min(max(y0 + (row + (i + 0.5) / n_y) * (y1 - y0) / height, 0.0), h - 1.0)
                    x = min(max(x0 + (column + (j + 0.5) / n_x) * (x1 - x0) / width, 0.0), w - 1.0)
                    top, left = int(y), int(x)
                    below, right = min(top + 1, h - 1), min(left + 1, w - 1)
                    upper = picture[:, top, left] * (1 - x + left) + picture[:, top, right] * (x - left)
                    lower = picture[:, below, left] * (1 - x + left) + picture[:, below, right] * (x - left)
                    out[:, row, column] += (upper * (1 - y + top) + lower * (y - top)) / (n_x * n_y)
    return out


def asked_weight(recipe: Recipe) -> float:
    return recipe.terms["boxes"].weight


# ---- a run


@pytest.fixture
def cache(make_cache: Callable[..., Path], tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache", n=16, n_views=2, teachers={})


def test_boxes_and_hidden_cells_are_those_of_seed_epoch_and_sample(
    cache: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    opened, recipe = open_cache(cache), tiny_recipe("mom", *SHORT, "student.boxes.most=3")
    rows = [(key, i, i, i + 9, i + 12, "it") for key in opened.keys[::2] for i in range(5)]
    file = boxes_file(tmp_path / "boxes.parquet", rows)
    run = build_run(cache, tmp_path / "out", recipe, Ranks(), Setup(device="cpu", boxes=file))
    assert run.boxes is not None
    whole = boxes_seen(opened, opened.numbers, run.boxes, recipe, epoch=1)
    alone = [boxes_seen(opened, opened.numbers[i : i + 1], run.boxes, recipe, epoch=1) for i in range(16)]
    assert torch.equal(whole.at, torch.cat([one.at for one in alone]))
    assert torch.equal(whole.hidden, torch.cat([one.hidden for one in alone]))
    assert (whole.hidden.diff(dim=2) > 0).all() and not torch.equal(
        whole.hidden, boxes_seen(opened, opened.numbers, run.boxes, recipe, epoch=3).hidden
    )
    assert not whole.at[1::2].any() and (whole.at[::2].any(dim=2).sum(1) <= 3).all() and whole.at.any()
    assert train_quietly(cache, tmp_path / "out", recipe, boxes=file, hold_out=0.3)["finished"]
    other = boxes_file(tmp_path / "other.parquet", rows[1:])
    with pytest.raises(ValueError, match="trained on another cache: boxes was sha256:"):
        train_quietly(cache, tmp_path / "out", recipe, boxes=other, hold_out=0.3)


def test_a_box_outside_its_image_and_other_keys_are_refused(
    cache: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, keys, file, out = (
        tiny_recipe("mom", *SHORT),
        open_cache(cache).keys,
        tmp_path / "boxes.parquet",
        tmp_path / "out",
    )
    boxes_file(file, [(keys[0], 0, 0, 5, 5), (keys[3], 2, 3, 4000, 9)])
    with pytest.raises(ValueError) as error:
        train_quietly(cache, out, recipe, boxes=file)
    assert f"--boxes {file}: {keys[3]!r} has the box [2.0, 3.0, 4000.0, 9.0], and the image is" in str(error.value)
    boxes_file(file, [("else/where.png", 0, 0, 5, 5)])
    with pytest.raises(ValueError, match="has no box for any of the 16 images"):
        train_quietly(cache, out, recipe, boxes=file)
    with pytest.raises(ValueError, match="term boxes: reads boxes, which no cache holds; .* give --boxes FILE"):
        train_quietly(cache, out, recipe)
    with pytest.raises(ValueError, match="no term of recipe mae reads boxes"):
        train_quietly(cache, out, tiny_recipe("mae", *SHORT), boxes=file)
    assert not out.exists() or not any(out.glob("*.json"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("key,x0,y0,x1\na,1,2,3\n", "key, x0, y0, x1 and y1 were expected"),
        ("key,x0,y0,x1,y1\na,1,2,3,wide\n", "'a' has the box ['1', '2', '3', 'wide']; four numbers"),
        ("key,x0,y0,x1,y1\na,5,2,3,9\n", "'a' has the box [5.0, 2.0, 3.0, 9.0]; 0 <= x0 < x1"),
        ("key,x0,y0,x1,y1\na,-1,2,3,9\n", "'a' has the box [-1.0, 2.0, 3.0, 9.0]"),
        ("key,x0,y0,x1,y1\na,nan,2,3,9\n", "'a' has the box [nan, 2.0, 3.0, 9.0]"),
        ("key,x0,y0,x1,y1\n,1,2,3,9\n", "key '' was found"),
        ("key,x0,y0,x1,y1\n", "is empty"),
    ],
)
def test_a_wrong_file_of_boxes_is_named_with_what_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        read_box_file(tmp_path / "boxes.csv")
    assert told in str(error.value) and "boxes.csv" in str(error.value)


def test_boxes_need_a_student_that_sees_everything(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="none was expected with student.boxes"):
        tiny_recipe("mom", "student.hidden=drop", "mask.ratio=0.5")
