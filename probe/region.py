"""Classes of boxes from tokens of the whole image: attention with a bias by box (BoxRPB), against RoIAlign and a linear head."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mrmae.common.progress import counted
from mrmae.common.tables import keys_by_name
from mrmae.extract.boxes import read_box_file
from mrmae.probe import report
from mrmae.probe.data import Split
from mrmae.probe.heads import probe_head
from mrmae.probe.job import Outcome, Probing, evenly, headline, model_of
from mrmae.probe.linear import probe_linear
from mrmae.probe.mosaics import mosaic, mosaic_boxes, mosaic_labels

HIDDEN = 512  # of the MLPs that make a bias
ROI_SIDE = 7
Boxes = tuple[
    Float[Tensor, "n l d"], Int64[Tensor, "m"], Float[Tensor, "m 4"], Int64[Tensor, "m"]
]  # tokens, image, box in view px, class


class BoxBias(nn.Module):
    """`bias[h, j, i] = MLP_x([x1 - cx, x2 - cx])_h + MLP_y([y1 - cy, y2 - cy])_h` of a box, in pixels, and the cell centre ((i + .5) s, (j + .5) s).

    MLP = Linear(2, 512), ReLU, Linear(512, heads, no bias); distances as sign(d) log2(|d| + 1) / log2(8). Plain-DETR (arXiv 2308.01904).
    """

    def __init__(self, heads: int, grid: tuple[int, int], cell: tuple[float, float]) -> None:
        super().__init__()
        self.x, self.y = (
            nn.Sequential(nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, heads, bias=False)) for _ in range(2)
        )
        self.columns: Tensor
        self.rows: Tensor
        self.register_buffer("columns", (torch.arange(grid[1]) + 0.5) * cell[1], persistent=False)
        self.register_buffer("rows", (torch.arange(grid[0]) + 0.5) * cell[0], persistent=False)

    def forward(self, boxes: Float[Tensor, "m 4"]) -> Float[Tensor, "m h l"]:
        """The bias of every head for every cell, in raster order."""
        x1, y1, x2, y2 = boxes.unbind(1)
        wide = self.x(
            scaled(torch.stack([x1[:, None] - self.columns, x2[:, None] - self.columns], -1))
        )  # [m, columns, h]
        tall = self.y(scaled(torch.stack([y1[:, None] - self.rows, y2[:, None] - self.rows], -1)))
        return (tall[:, :, None] + wide[:, None]).flatten(1, 2).transpose(1, 2)  # type: ignore[no-any-return]


def scaled(d: Tensor) -> Tensor:
    """Distances in pixels, far ones drawn together."""
    return d.sign() * (d.abs() + 1).log2() / 3


class RegionHead(nn.Module):
    """One learned query per head looks at all tokens of the image, with the box's bias on its logits; then LayerNorm and a linear classifier.

    That a box is a bias and nothing else is Plain-DETR's; the learned query in place of a decoder's is ours.
    """

    def __init__(
        self, d: int, n_classes: int, *, grid: tuple[int, int], cell: tuple[float, float], width: int, heads: int
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(heads, width // heads))
        self.keys, self.values = nn.Linear(d, width), nn.Linear(d, width)
        self.bias, self.norm, self.head = BoxBias(heads, grid, cell), nn.LayerNorm(width), nn.Linear(width, n_classes)

    def forward(self, x: Float[Tensor, "m l d"], boxes: Float[Tensor, "m 4"]) -> Float[Tensor, "m c"]:
        """Logits of every box, of the image whose tokens stand beside it."""
        x = F.layer_norm(x, x.shape[-1:])
        keys, values = (part(x).unflatten(-1, self.query.shape) for part in (self.keys, self.values))  # [m, l, h, e]
        weights = (
            torch.einsum("he,mlhe->mhl", self.query, keys) * self.query.shape[1] ** -0.5 + self.bias(boxes)
        ).softmax(-1)
        logits: Tensor = self.head(self.norm(torch.einsum("mhl,mlhe->mhe", weights, values).flatten(1)))
        return logits


def run_region(job: Probing, name: str) -> Outcome:
    """BoxRPB, RoIAlign and a linear head, and the mean of the whole image, which does not know the box. BoxRPB is the headline."""
    settings, seed, grid = job.options.settings.region, job.options.seed, job.test.grid
    classes, parts, notes = boxes_of_parts(job)
    side = job.source.size
    cell = (side / grid[0], side / grid[1])
    if settings.width % settings.heads:
        raise ValueError(
            f"--set region.heads={settings.heads}: do not share a width of {settings.width}; expected a divisor; change region.width or region.heads"
        )
    (train, test), truth, rows = parts, parts[1][3], []
    aligned = [roi_means(x, image, boxes, grid, side) for x, image, boxes, _ in parts]
    whole = [x.float().mean(1)[image] for x, image, _, _ in parts]
    for what, (fit, asked) in {"RoIAlign, linear": aligned, "whole image, linear (knows no box)": whole}.items():
        heads, best, told = probe_linear(fit, train[3], asked, settings.linear, n_classes=len(classes), seed=seed)
        rows.append(report.row(what, heads[best], truth, seed=seed))
    predicted, lr, more = probe_head(
        lambda: RegionHead(train[0].shape[-1], len(classes), grid=grid, cell=cell, width=settings.width, heads=settings.heads),
        [train[0][train[1]], train[2]], train[3], [test[0][test[1]], test[2]], settings.head, seed=seed, device=job.options.device,
    )  # fmt: skip
    rows.append(report.row(f"BoxRPB, lr {lr:g}", predicted, truth, seed=seed))
    return {"rows": rows, "notes": [*notes, *dict.fromkeys([*told, *more])], "n_train": len(train[3]), "n_test": len(truth), "n_classes": len(classes),
            **headline(rows[-1])}, None  # fmt: skip


def roi_means(
    tokens: Float[Tensor, "n l d"],
    image: Int64[Tensor, "m"],
    boxes: Float[Tensor, "m 4"],
    grid: tuple[int, int],
    side: int,
) -> Float[Tensor, "m d"]:
    """The mean of RoIAlign's 7 x 7 samples of every box (boxes in pixels of the view, which is square)."""
    from torchvision.ops import roi_align  # type: ignore[import-untyped]  # takes a second to import

    found = []
    for number, x in enumerate(tokens):
        own = boxes[image == number] / side * torch.tensor([grid[1], grid[0], grid[1], grid[0]])
        if len(own):
            found.append(roi_align(x.float().T.reshape(1, -1, *grid), [own], ROI_SIDE, aligned=True).mean((2, 3)))
    return torch.cat(found)


# --- boxes


def boxes_of_parts(job: Probing) -> tuple[list[str], list[Boxes], list[str]]:
    """The classes' names, both parts' tokens and boxes (in the order of their images), and what to say about them."""
    settings, side, interpolation = job.options.settings.region, job.source.size, job.source.spec.interpolation
    teacher = model_of(job, "region", "boxes are of whole images")
    if job.data.train.cache or job.data.test.cache:
        raise ValueError(f"DATA {' '.join(job.options.data)}: a cache has crops of images, and boxes are of whole ones; expected a folder or a tar; give the "
                         "images themselves")  # fmt: skip
    names, notes, found = job.data.classes, [], []
    listed = read_boxes(job) if settings.boxes else {}
    if settings.boxes:
        names = sorted({label for rows in listed.values() for _, label in rows})
    for number, part in enumerate((job.data.train, job.data.test)):
        if settings.boxes:
            some, image, boxes, labels, cut = viewed_boxes(
                part, listed, side, names, settings.images, f"--set region.boxes={settings.boxes}"
            )
            pixels = torch.stack([torch.from_numpy(part.pixels(i, side, interpolation)) for i in some])
            notes += [
                f"{counted(cut, 'box', 'boxes')} of the {part.name} part lie outside the view's centred square by their middle and are left out"
            ] * (cut > 0)
        else:
            ids, classes = mosaic_labels(job.labels[number], settings.tiles, settings.images, seed=job.options.seed)
            pixels = torch.stack([mosaic(part, each, side, interpolation) for each in ids])
            image = torch.arange(len(ids)).repeat_interleave(settings.tiles**2)
            boxes, labels = mosaic_boxes(settings.tiles, side).repeat(len(ids), 1), classes.flatten()
        tokens = torch.cat(
            [teacher.forward(rows).tokens.half().cpu() for rows in torch.split(pixels, job.options.batch_size)]
        )
        found.append((tokens, image, boxes, labels))
    if len(set(found[0][3].tolist())) < 2 or (strange := sorted(set(found[1][3].tolist()) - set(found[0][3].tolist()))):
        told = (
            f"class {names[strange[0]]!r} is in the test part alone"
            if len(set(found[0][3].tolist())) > 1
            else "the train part has boxes of one class alone"
        )
        raise ValueError(
            f"--probe region: {told}; expected at least two classes in the train part, and no other in the test part; correct the boxes or the parts"
        )
    made = "boxes" if settings.boxes else f"mosaics of {settings.tiles} x {settings.tiles} tiles, each a box"
    return (
        names,
        found,
        [
            f"{made}: {len(found[0][3])} train and {len(found[1][3])} test boxes of {counted(len(names), 'class', 'classes')}",
            *notes,
        ],
    )


def read_boxes(job: Probing) -> dict[str, list[tuple[tuple[float, ...], str]]]:
    """(box in pixels of the image, class) by the image's key. ValueError for a table that cannot be read, and for what is no box."""
    where = f"--set region.boxes={job.options.settings.region.boxes}"
    given = read_box_file(Path(job.options.settings.region.boxes), where)
    if lacking := [name for name, labels in given.labels.items() if None in labels]:
        raise ValueError(
            f"{where}: {lacking[0]!r} has a box without a label; a class for every box was expected; correct the file"
        )
    found = defaultdict[str, list[tuple[tuple[float, ...], str]]](list)
    every = [row.key for part in (job.data.train, job.data.test) for row in part.rows]
    for name, key in zip(given.corners, keys_by_name(list(given.corners), every, where)):
        found[key] += [(tuple(box), str(label)) for box, label in zip(given.corners[name].tolist(), given.labels[name])]
    return dict(found)


def viewed_boxes(
    part: Split,
    listed: Mapping[str, Sequence[tuple[tuple[float, ...], str]]],
    side: int,
    names: Sequence[str],
    most: int,
    where: str,
) -> tuple[list[int], Int64[Tensor, "m"], Float[Tensor, "m 4"], Int64[Tensor, "m"], int]:
    """Images of a part that have boxes, and their boxes in pixels of the evaluation view; how many have their middle outside of it.

    Boxes are cut at the view's edge. where: how messages name the boxes. ValueError for a box outside its image.
    """
    some: list[int] = []
    image: list[int] = []
    boxes: list[tuple[float, ...]] = []
    labels: list[int] = []
    cut = 0
    have = [i for i, row in enumerate(part.rows) if listed.get(row.key)]
    if not have:
        raise ValueError(
            f"{where}: no image of the {part.name} part has a box; expected some; correct the boxes or the parts"
        )
    for i in (have[at] for at in evenly(len(have), most)):
        with part.image(i) as picture:
            height, width = picture.shape[:2]
        own = []
        for box, label in listed[part.rows[i].key]:
            if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
                raise ValueError(f"{where}: {part.rows[i].key!r}: the box {tuple(round(v, 1) for v in box)} lies outside the image, which has {width} x {height} pixels; expected "
                                 "0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height, in pixels of the image as a viewer shows it; correct it")  # fmt: skip
            inside = in_view(box, width, height, side)
            if inside is None:
                cut += 1
            else:
                own.append((inside, label))
        image += [len(some)] * len(own)
        boxes += [box for box, _ in own]
        labels += [names.index(label) for _, label in own]
        some += [i] if own else []
    if not boxes:
        raise ValueError(
            f"--probe region: no box of the {part.name} part lies in the view's centred square; expected some; give others"
        )
    return some, torch.tensor(image), torch.tensor(boxes), torch.tensor(labels), cut


def in_view(box: Sequence[float], width: int, height: int, side: int) -> tuple[float, ...] | None:
    """A box of an image in pixels of its evaluation view (as `data.eval_view` cuts it), None where its middle is outside."""
    short = round(side * 256 / 224)
    scale = short / min(height, width)
    h, w = max(short, round(height * scale)), max(short, round(width * scale))
    top, left = round((h - side) / 2), round((w - side) / 2)
    x1, y1, x2, y2 = (
        box[0] * w / width - left,
        box[1] * h / height - top,
        box[2] * w / width - left,
        box[3] * h / height - top,
    )
    if not (0 <= (x1 + x2) / 2 < side and 0 <= (y1 + y2) / 2 < side):
        return None
    return tuple(min(max(value, 0.0), float(side)) for value in (x1, y1, x2, y2))


def boxes_read(job: Probing) -> str:
    """A hash of the boxes' file, as part of what the result is of."""
    file = Path(job.options.settings.region.boxes)
    return hashlib.sha256(file.read_bytes()).hexdigest() if job.options.settings.region.boxes and file.is_file() else ""
