"""Frozen teachers: uint8 views in, patch tokens, CLS, attention and token norms out, with a spec that says exactly how."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from mrmae.extract.teachers.address import CHANNELS, TeacherRequest
from mrmae.extract.teachers.custom import build_custom
from mrmae.extract.teachers.tower import StateDict, Tower
from mrmae.extract.teachers.weights import first_line
from mrmae.shards.format import Encoding, TeacherSpec, encoding_of

DEFAULT_TEACHERS = ("clip=open_clip:ViT-B-16-quickgelu/openai", "dino=timm:vit_base_patch16_224.dino")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Features:
    """What a teacher makes of a batch of views, all fp32 on its device; l patches in raster order, without prefix tokens.

    attention: last block, from CLS, mean over heads, softmax over all tokens, patches kept (sums to less than 1).
    norm: length of each token.
    """

    tokens: Float[Tensor, "b l d"]
    cls: Float[Tensor, "b d"] | None
    attention: Float[Tensor, "b l"] | None
    norm: Float[Tensor, "b l"]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen image tower on a device. tail: its final norm and projection, for `apply_tail` (fp32, CPU)."""

    spec: TeacherSpec
    tail: StateDict
    tower: Tower
    device: torch.device

    @torch.no_grad()  # not inference_mode: online training keeps these tensors for its backward
    def forward(self, pixels: Shaped[Tensor, "b h w c"]) -> Features:
        """Features of views of any one size, RGB or bands; resized and normalised here, in fp32, as `spec` says."""
        spec = self.spec
        image = normalise(pixels.to(self.device, non_blocking=True), spec)
        if self.tower.patch is None:
            image = image.contiguous(memory_format=torch.channels_last)
        with computing(self.device, spec.precision):
            found, cls = self.tower.features(image)
            row = self.tower.attention_row() if self.tower.attention_row else None
        height, width = found.shape[-2:]
        tokens = to_grid(found.float(), spec.grid).flatten(2).transpose(1, 2).contiguous()
        if row is not None:
            row = row[:, spec.prefix_tokens :].reshape(-1, 1, height, width)
            # Resampling keeps the mean; the sum over patches is what must stay.
            row = to_grid(row, spec.grid).flatten(1) * (height * width / (spec.grid[0] * spec.grid[1]))
        return Features(tokens, None if cls is None else cls.float(), row, tokens.norm(dim=-1))


def build_teacher(
    request: TeacherRequest, *, grid: int, view_size: int, device: str | torch.device, precision: str,
    allow_torchscript: bool = False, allow_code: bool = False, views: Encoding | None = None,
) -> Teacher:  # fmt: skip
    """The asked-for teacher on `device`, for views of `view_size` px and a grid x grid student.

    views: how they are stored, of which the teacher sees the bands that it asks for; None: RGB.
    ViTs get an input of grid x patch pixels; other maps are resampled bilinearly to the grid. precision: fp32, or bf16 or
    fp16 by autocast; the outputs are fp32. Raises ValueError with the reason and what to change.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; expected {', '.join(PRECISIONS)}; correct --precision")
    bands, levels = bands_seen(request, views or encoding_of("png"))
    try:
        tower = build_tower(request, grid=grid, allow_torchscript=allow_torchscript, allow_code=allow_code)
        with torch.no_grad():
            found, cls = tower.features(torch.zeros(1, CHANNELS, *tower.input_size))
    except RuntimeError as error:
        advice = ("teachers see three, red, green and blue or the bands that ?bands= names; choose one of three, without ?in_chans="
                  if "in_chans" in request.options else "correct what stands behind ?, or choose another model")  # fmt: skip
        raise ValueError(
            f"{request.where}: cannot be run on an image of {CHANNELS} channels ({first_line(error)}); {advice}"
        ) from None
    target = torch.device(device)
    tower.module.to(target)
    if tower.patch is None:  # convolutions are a third faster so; the bits are those of this memory format, always
        tower.module.to(memory_format=torch.channels_last)
    spec = make_spec(request, tower, found, cls is not None, grid, precision)
    return Teacher(dataclasses.replace(spec, bands=bands, levels=levels), tower.tail, tower, target)


def build_tower(request: TeacherRequest, *, grid: int, allow_torchscript: bool, allow_code: bool) -> Tower:
    """The model of the library that is asked for, on the CPU."""
    if request.library == "python":
        return build_custom(request, grid=grid, allow_code=allow_code)
    if request.library == "timm":
        from mrmae.extract.teachers.timm import build_timm  # each library takes seconds to import

        return build_timm(request, grid=grid, allow_torchscript=allow_torchscript)
    from mrmae.extract.teachers.open_clip import build_open_clip

    return build_open_clip(request, grid=grid, allow_torchscript=allow_torchscript)


def bands_seen(
    request: TeacherRequest, views: Encoding
) -> tuple[tuple[int, ...], tuple[float, float]] | tuple[None, None]:
    """(bands, levels) of a teacher on such views; (None, None) where it sees RGB as it is. ValueError for bands that are not there.

    What goes without saying: a single band is red, green and blue; three are, in their order; levels are the dtype's whole range, and 0
    to 1 of floats.
    """
    if views.as_shown and request.bands is None and request.levels is None:
        return None, None
    bands = request.bands
    if bands is None and views.bands in (1, CHANNELS):
        bands = (1,) * CHANNELS if views.bands == 1 else tuple(range(1, CHANNELS + 1))
    if bands is None or max(bands) > views.bands:
        wrong = "sees red, green and blue" if bands is None else f"asks for band {max(bands)}"
        raise ValueError(f"{request.where}: {wrong}, and the views have {views.words}; which of them it sees was expected; add "
                         "?bands=3,2,1 (counted from 1), and &levels=LOW,HIGH for what is dark and bright")  # fmt: skip
    return bands, request.levels or (0.0, float(views.unit))


def prompt_vectors(
    request: TeacherRequest, prompts: Sequence[str], *, allow_torchscript: bool = False
) -> Float[Tensor, "n d"]:
    """What the text tower beside an image tower of open_clip makes of each prompt; see `text_vectors`."""
    from mrmae.extract.teachers.clip_texts import text_vectors

    return text_vectors(request, prompts, allow_torchscript=allow_torchscript)


def make_spec(
    request: TeacherRequest, tower: Tower, found: Tensor, has_cls: bool, grid: int, precision: str
) -> TeacherSpec:
    native_grid = (int(found.shape[-2]), int(found.shape[-1]))
    seen = tower.origin.preprocessing
    return TeacherSpec(
        name=request.name,
        library=request.library,
        model=request.model,
        weights=request.weights,
        tag=tower.origin.tag,
        weights_sha256=tower.origin.weights_sha256,
        activation=tower.activation,
        input_size=tower.input_size,
        mean=seen.mean,
        std=seen.std,
        interpolation=seen.interpolation,
        antialias=seen.interpolation != "nearest",
        tap=tower.tap,
        prefix_tokens=tower.prefix_tokens,
        native_grid=native_grid,
        grid=(grid, grid),
        resample="none" if native_grid == (grid, grid) else "bilinear",
        width=int(found.shape[1]),
        has_cls=has_cls,
        has_attention=tower.attention_row is not None,
        precision=precision,
        attention_backend=tower.attention_backend,
        model_options=plain_options(request),
    )


def plain_options(request: TeacherRequest) -> dict[str, object]:
    """The constructor's options as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in request.options.items()}


def as_seen(pixels: Shaped[Tensor, "b h w c"], spec: TeacherSpec) -> Float[Tensor, "b h w 3"]:
    """The three channels that a teacher sees of views, fp32, 0 to 255: its bands, stretched from its levels and cut there."""
    values = pixels.float()
    if spec.bands is None or spec.levels is None:
        return values
    low, high = spec.levels
    chosen = values[..., [band - 1 for band in spec.bands]]
    return chosen.sub_(low).mul_(255 / (high - low)).clamp_(0, 255)


def normalise(pixels: Shaped[Tensor, "b h w c"], spec: TeacherSpec) -> Float[Tensor, "b 3 height width"]:
    """The views at the teacher's input size, (x / 255 - mean) / std of what `as_seen` gives.

    Resized in fp32 with PIL's kernels (antialiased) and clamped to 0..255 as a decoder would, but not rounded.
    """
    image = as_seen(pixels, spec).permute(0, 3, 1, 2)
    height, width = spec.input_size
    if tuple(image.shape[-2:]) != (height, width):
        mode = "nearest-exact" if spec.interpolation == "nearest" else spec.interpolation
        image = F.interpolate(image, spec.input_size, mode=mode, antialias=spec.antialias).clamp(0, 255)
    # By whole rows: constants of three values make loops of three on a CPU, many times as slow.
    rows = image.permute(0, 2, 3, 1).reshape(len(pixels), height, width * 3)
    mean, std = (torch.tensor(v, device=rows.device).repeat(width) for v in (spec.mean, spec.std))
    return rows.div_(255).sub_(mean).div_(std).view(-1, height, width, 3).permute(0, 3, 1, 2)


def to_grid(found: Float[Tensor, "b d gh gw"], grid: tuple[int, int]) -> Float[Tensor, "b d h w"]:
    """A map resampled to the grid: bilinear, corners not aligned, antialiased where it shrinks; as it is where it fits."""
    height, width = found.shape[-2:]
    if (height, width) == grid:
        return found
    shrinks = (
        height > grid[0] or width > grid[1]
    )  # where it grows, antialiasing changes nothing and takes 20 times as long
    return F.interpolate(found, grid, mode="bilinear", align_corners=False, antialias=shrinks)


@contextlib.contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """The teacher's arithmetic: autocast, or true fp32 (cuDNN would use TF32 for the patch embedding: 1e-3 off)."""
    dtype = PRECISIONS[precision]
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
