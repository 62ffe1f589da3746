"""What a term can predict: a batch with its cached targets as stored, and what the cache knows about each teacher."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor, nn

from mrmae.kernels import dispatch, reference
from mrmae.shards.format import BlockRule, apply_tail, stored_tap
from mrmae.train.method.phi_s import phi_s
from mrmae.train.method.recipe import TermRecipe, Transform

# How to get what a cache lacks, for the ends of error messages.
ADD = "add the teacher to the cache with extract-features IMAGES CACHE --teacher"
ADD_MAP = "add it to the cache with extract-features IMAGES CACHE --map"
MAP = "map:"  # begins the target names of maps
NEEDS_STATISTICS = ("channel", "phi_s", "position", "position+ln0", "position+phi_s")
Rows = Literal["grid", "visible"]


@dataclass(frozen=True)
class TeacherInfo:
    """One cached column: `value = channel_mean + channel_std * (scale[token] * code)`, missing parts being 0 and 1.

    column: its name in the cache, `<teacher>.<tap>`. has_scale: False for float columns and product codes.
    codebook: of product codes, which mean something else: its tensors by name (shards/format/product.py).
    source, tail: where nothing is stored of this tap, the target whose stored tokens are read, and what makes of them this one's
    (shards/format/tail.py); channel_mean and channel_std are the source's then.
    stats: exact moments of the values (shards/stats.py), for the transforms that need them. online: whether the teacher runs in
    the step.
    """

    width: int
    channel_mean: Any = None
    channel_std: Any = None
    has_cls: bool = False
    has_attention: bool = False
    column: str = ""
    has_scale: bool = True
    source: str | None = None
    tail: Any = None
    stats: Any = None
    online: bool = False
    codebook: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tap(self) -> str:
        """Where in the teacher the column was taken: `pre_tail`, `block_8`."""
        return self.column.rpartition(".")[2]


@dataclass(frozen=True)
class CacheInfo:
    """The part of a cache that decides a model: `size` pixels a side, a grid of patches (rows, columns), the teachers.

    teachers: by target name (`target_names`): the teacher's own, and with its tap where the cache holds several of it.
    derived: likewise, those that follow from stored ones; only a term that names their tap predicts them.
    maps: by name, whether they hold `uint16` (ids, bits) or `float16` (scores); the target name of a map is `map:NAME`. vectors: the maps that
    hold several numbers (float16) per patch, and how many.
    channels, unit: bands of its views, and the number in them that counts as 1. blocks: how the cache cuts tokens into blocks, None for
    raster order. n_views: stored views per image. classes: of the images' labels, where a term predicts them.
    """

    size: int
    grid: tuple[int, int]
    teachers: Mapping[str, TeacherInfo] = field(default_factory=dict)
    channels: int = 3
    blocks: BlockRule | None = None
    n_views: int = 1
    derived: Mapping[str, TeacherInfo] = field(default_factory=dict)
    maps: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    unit: int = 255

    def column(self, target: str) -> str:
        """The cache's column that holds the arrays of a stored target: a teacher's, or a map."""
        return f"{target.removeprefix(MAP)}.map" if target.startswith(MAP) else self.teachers[target].column

    def target(self, name: str) -> TeacherInfo:
        """A target, stored or derived."""
        return self.teachers[name] if name in self.teachers else self.derived[name]

    @property
    def n_patches(self) -> int:
        """Patches in the grid, l."""
        return self.grid[0] * self.grid[1]

    @property
    def patch(self) -> int:
        """Pixels along one side of a patch. Raises ValueError where the grid does not cut the view into whole squares."""
        rows, columns = self.grid
        if rows != columns or rows < 1 or self.size % rows:
            raise ValueError(
                f"cache: a grid of {rows} x {columns} does not cut {self.size} pixels into whole square patches; "
                "a square grid whose side divides the size was expected; extract again with another --size or --grid"
            )
        return self.size // rows


class GivenBoxes(NamedTuple):
    """Boxes of each image of a batch, in pixels of its view (x0, y0, x1, y1), and which cells of each are hidden, ascending; zeros where there is none."""

    at: Float[Tensor, "b m 4"]
    hidden: Int64[Tensor, "b m k"]


@dataclass(frozen=True)
class Batch:
    """b views and what the teachers said about them, as stored: nothing is dequantised before the loss.

    samples: hash of each sample's key. targets: per teacher the arrays a recipe needs: tokens [b, l, d] (int8, float, uint8 bytes of E4M3, or product codes [b, l, m]) with
    scale [b, l], cls [b, d], attention [b, l], norm [b, l]; of a map, as `map:NAME`, its map [b, l], int32 or float16, or [b, l, c], float16.
    rows: `visible` where tokens and scale hold only the rows at `ids_keep`, [v, n_keep, ...], gathered before the copy or read alone.
    epoch: in which it is trained on. labels: 1 for every class of an image, where a term predicts them. boxes: where a term reads them.
    partner: as many other views, each image's partner in its row; None where a recipe pairs nothing.
    """

    samples: Int64[Tensor, " b"]
    pixels: Shaped[Tensor, "b h w c"]
    targets: dict[str, dict[str, Tensor]]
    rows: Rows = "grid"
    epoch: Int64[Tensor, ""] = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    labels: UInt8[Tensor, "b k"] | None = None
    partner: "Batch | None" = None
    boxes: GivenBoxes | None = None

    def change(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor replaced by `change(tensor)`."""
        targets = {t: {name: change(x) for name, x in arrays.items()} for t, arrays in self.targets.items()}
        samples, pixels, epoch = change(self.samples), change(self.pixels), change(self.epoch)
        labels = None if self.labels is None else change(self.labels)
        partner = None if self.partner is None else self.partner.change(change)
        boxes = None if self.boxes is None else GivenBoxes(*map(change, self.boxes))
        return Batch(samples, pixels, targets, self.rows, epoch, labels, partner, boxes)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        return self.change(lambda x: x.to(device, non_blocking=non_blocking))


class TeacherStatistics(nn.Module):
    """Constants of one teacher, as buffers that follow the model to its device; None where the cache has none.

    Per-channel ones are not saved with the weights: they belong to the cache, whose ids a checkpoint records. The matrix of
    `phi_s` is: eigenvectors of equal eigenvalues are not unique, and a head is trained for the ones it saw.
    stat_mean [d], or with `position` [l, d], stat_std and phi are the transform's. cls: the same of the teacher's CLS, a grid of
    one position.
    """

    channel_mean: Tensor | None
    channel_std: Tensor | None
    stat_mean: Tensor | None
    stat_std: Tensor | None
    phi: Tensor | None

    def __init__(
        self, info: TeacherInfo, dtype: torch.dtype, transform: Transform = "none", *, cls: bool = False
    ) -> None:
        super().__init__()
        tail = info.tail or {}
        self.source, self.tap = info.source, info.tap
        self.epsilons = {name: float(value) for name, value in tail.items() if name.endswith((".eps", ".heads"))}
        self.tail_names = [name for name in tail if name not in self.epsilons]
        for i, name in enumerate(self.tail_names):
            self.register_buffer(f"tail_{i}", tail[name].detach().to(dtype), persistent=False)
        norm = next((tail[name] for name in ("layer_norm.weight", "rms_norm.weight") if name in tail), None)
        stored = info.width if norm is None else len(norm)
        constants = {name: constant(info, name, (stored,)) for name in ("channel_mean", "channel_std")}
        self.has_codebook = bool(info.codebook)
        for name, held in info.codebook.items():
            kept = held.to(dtype) if held.is_floating_point() else held
            self.register_buffer(f"codebook_{name}", kept, persistent=False)
        mean, std, phi = transform_constants(info.stats, transform)
        for name, tensor in (constants | {"stat_mean": mean, "stat_std": std}).items():
            self.register_buffer(name, None if tensor is None else tensor.to(dtype), persistent=False)
        self.register_buffer("phi", None if phi is None else phi.to(dtype))
        self.cls = TeacherStatistics(cls_info(info), dtype, transform) if cls else None

    @property
    def tail(self) -> dict[str, Any]:
        """What makes this tap of stored tokens; empty where it is stored itself."""
        return {name: getattr(self, f"tail_{i}") for i, name in enumerate(self.tail_names)} | self.epsilons

    @property
    def codebook(self) -> dict[str, Tensor]:
        """What product codes mean; empty where they are none."""
        names = ("entries", "group", "basis", "mean") if self.has_codebook else ()
        return {name: getattr(self, f"codebook_{name}") for name in names}

    @property
    def decodes(self) -> bool:
        """Whether tokens are more than their codes, scale, mean and deviation: the kernels then get values."""
        return self.has_codebook or bool(self.tail_names) or self.phi is not None

    def codes(self, tokens: Shaped[Tensor, "b l m"]) -> Shaped[Tensor, "b l m"]:
        """Stored tokens as the codes that kernels take: a cache keeps E4M3 numbers as bytes."""
        return tokens.view(torch.float8_e4m3fn) if tokens.dtype == torch.uint8 and not self.has_codebook else tokens

    @property
    def heads(self) -> int:
        """Heads of the block whose q, k and v these are."""
        return int(self.epsilons["qkv.heads"])

    @torch.no_grad()
    def values(
        self,
        codes: Shaped[Tensor, "b l d"],
        ids: Int64[Tensor, "v n"] | None,
        scale: Float[Tensor, "b l"] | None,
        mean: Float[Tensor, " d"] | None,
        std: Float[Tensor, " d"] | None,
        positions: Int64[Tensor, "v n"],
        *,
        like: Float[Tensor, "v n e"],
        kernels: dispatch.Kernels = "torch",
    ) -> Float[Tensor, "v n e"]:
        """The teacher's tokens at `ids` (None: gathered already), behind its tail and under `phi_s` where these apply.

        mean, std: of the codes' channels. positions: where the tokens stand in the grid. In fp32 (fp64 where `like` is).
        """
        work = reference.wide(like, codes)
        with torch.autocast(like.device.type, enabled=False):
            if self.has_codebook:
                values = dispatch.decode_codes(
                    codes, ids, *self.codebook.values(), n_rows=like.shape[0], kernels=kernels
                )
                values = values.to(work)
            else:
                values = reference.dequantised_rows(codes, ids, scale, mean, std, n_rows=like.shape[0], work=work)
            if self.tail_names:
                values = apply_tail(values, self.tail, self.tap)
            if self.phi is None:
                return values
            assert self.stat_mean is not None
            mean = self.stat_mean if self.stat_mean.ndim == 1 else self.stat_mean[positions]
            return (values - mean.to(work)) @ self.phi.to(work).T

    def grid_values(self, arrays: Mapping[str, Tensor], work: torch.dtype) -> Float[Tensor, "b l d"]:
        """`values` of the whole grid."""
        codes, scale = self.codes(arrays["tokens"]), arrays.get("scale")
        positions = torch.arange(codes.shape[1], device=codes.device).expand(len(codes), -1)
        like = torch.empty(*codes.shape[:2], 0, dtype=work, device=codes.device)
        return self.values(codes, None, scale, self.channel_mean, self.channel_std, positions, like=like)

    def pooled(
        self, arrays: Mapping[str, Tensor], work: torch.dtype
    ) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "*one d"] | None]:
        """The mean of `values` over the whole grid, and the transform's mean of it: of all positions where there are several."""
        mean = self.stat_mean
        mean = mean if mean is None or mean.ndim == 1 else mean.mean(dim=0, keepdim=True)
        return self.grid_values(arrays, work).mean(dim=1, keepdim=True), mean

    @torch.no_grad()
    def targets(self, arrays: Mapping[str, Tensor], transform: str, *, pooled: bool = False) -> Float[Tensor, "b l d"]:
        """What the loss compares predictions with, at every position of the grid or `pooled` over it: in fp32, transformed."""
        work, mean = torch.float32, self.stat_mean
        if pooled:
            values, mean = self.pooled(arrays, work)
        else:
            values = self.grid_values(arrays, work)
        if self.phi is not None:
            return values
        positions = torch.arange(values.shape[1], device=values.device).expand(len(values), -1)
        stats = (mean, self.stat_std, positions)
        return reference.mimic_target(
            values, None, None, None, None, *stats, target=transform, n_rows=len(values), work=work
        )


def transform_constants(
    stats: Any, transform: Transform
) -> tuple[Float[Tensor, "*l d"] | None, Float[Tensor, " d"] | None, Float[Tensor, "d d"] | None]:
    """What a transform takes from a column's moments: the mean (one, or one per position), per-channel scales, phi_s's matrix."""
    if transform not in NEEDS_STATISTICS:
        return None, None, None
    centred = transform.startswith("position")
    std = stats.std if transform == "channel" else stats.residual_std if transform == "position" else None
    phi = None
    if transform.endswith("phi_s"):
        phi = phi_s(stats.residual_covariance if centred else stats.covariance)
    return stats.position_mean if centred else stats.mean, std, phi


def cls_info(info: TeacherInfo) -> TeacherInfo:
    """A teacher's CLS as a column of one position: plain floats, as the quantiser describes patch tokens only."""
    stats = None if info.stats is None else info.stats.cls
    return replace(info, channel_mean=None, channel_std=None, has_scale=False, stats=stats, codebook={})


def constant(info: TeacherInfo, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """A field of `info` as a tensor of its own, or None. Raises ValueError for another shape."""
    value = getattr(info, name)
    tensor = None if value is None else torch.as_tensor(value).detach().clone()
    if tensor is not None and tensor.shape != shape:
        raise ValueError(
            f"column {info.column}: {name} has shape {list(tensor.shape)}; {list(shape)} was expected, "
            "one value per channel; check the cache"
        )
    return tensor


def target_names(columns: Iterable[str]) -> dict[str, str]:
    """Target name -> column `<teacher>.<tap>`: the teacher's name where it has one column, else `<teacher>:<tap>`."""
    split = [column.rpartition(".")[::2] for column in columns]
    teachers = [teacher for teacher, _ in split]
    return {
        teacher if teachers.count(teacher) == 1 else f"{teacher}:{tap}": f"{teacher}.{tap}" for teacher, tap in split
    }


def chosen(name: str, term: TermRecipe, info: CacheInfo) -> tuple[str, ...]:
    """The target names a term predicts: of the teachers it names (else of all), those taken at its teacher_tap (else any).

    At a tap that is not stored but follows from what is, the derived targets.
    Raises ValueError when the cache lacks one, saying what it has and how to add it.
    """
    here = [f"{c.column or target}{' (in the step)' * c.online}" for target, c in info.teachers.items()]
    has = ", ".join(here) or "no teacher"
    found: list[str] = []
    for teacher in term.teachers or ("",):
        targets = [t for t in info.teachers if teacher in ("", t, t.partition(":")[0])]
        if not targets and teacher:
            raise ValueError(f"term {name}: wants teacher {teacher!r}; the cache has {has}; {ADD} {teacher}=...")
        if not targets:
            raise ValueError(
                f"term {name}: mimics teachers and the cache has none; at least one was expected; {ADD} NAME=..."
            )
        taken = [t for t in targets if term.teacher_tap in (None, info.teachers[t].tap)]
        taken += [t for t, about in info.derived.items() if about.source in targets and about.tap == term.teacher_tap]
        if not taken:
            raise ValueError(
                f"term {name}: wants tap {term.teacher_tap} of {f'teacher {teacher!r}' if teacher else 'a teacher'}; the cache "
                f"has {has}; a column of that tap was expected; {ADD} NAME=LIBRARY:MODEL?tap={stored_tap(term.teacher_tap or '')}, with a name "
                "of its own for each tap"
            )
        found += taken
    return tuple(dict.fromkeys(found))


def teachers_of(name: str, term: TermRecipe, info: CacheInfo) -> tuple[str, ...]:
    """The target names a term predicts, once it is known that the cache holds what the term needs of them.

    Raises ValueError when the cache lacks one, or what the term needs of it, saying what it has and how to add it.
    """
    teachers = chosen(name, term, info)
    for teacher in teachers:
        column = info.target(teacher)
        if term.at("cls") and not column.has_cls:
            raise ValueError(
                f"term {name}: wants the CLS token of teacher {teacher!r}, which the cache does not hold; a teacher with a "
                f"CLS token was expected; name others with --set terms.{name}.teachers=[...]"
            )
        if term.transform in NEEDS_STATISTICS and column.stats is None:
            raise ValueError(
                f"term {name}: transform {term.transform} wants statistics of teacher {teacher!r}, and none were given; "
                f"run inspect-cache stats on the cache, or use --set terms.{name}.transform=ln0"
            )
    return teachers
