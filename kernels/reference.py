"""Plain PyTorch of every kernel: the CPU path, the definition of correct, and the baseline under `torch.compile`.

Restructured, not stock: patches are gathered before they are normalised, so nothing is computed for patches nobody reads.
Images are [b, c, h, w] views of any strides; `dispatch.py` turns [b, h, w, c] into one. All arithmetic is fp32, or fp64 when an
input is fp64. A batch of ids may be a multiple of the batch of images (several masks per image): row i reads image i mod b.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

NORM_PIX_EPS = 1e-6  # MAE's norm_pix_loss
LN_EPS = 1e-5
UNIT_EPS = 1e-12  # added to the squared norm: a zero vector has a finite direction and gradient


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: fp64 when any tensor is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def rows_of(n_rows: int, n_images: int, device: torch.device) -> Int64[Tensor, "n_rows 1"]:
    """Image index of each row of a batch: row i reads image i mod n_images."""
    return (torch.arange(n_rows, device=device) % n_images)[:, None]


def pick_patches(
    image: Shaped[Tensor, "b c h w"], ids: Int64[Tensor, "v n"], patch: int
) -> Shaped[Tensor, "v n c p p"]:
    """The patches at grid indices `ids`, as stored; only their pixels are read."""
    b, c, h, w = image.shape
    grid = image.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    rows = rows_of(ids.shape[0], b, image.device)
    return grid[rows, ids // (w // patch), ids % (w // patch)]


def gather_patches(
    image: Shaped[Tensor, "b c h w"],
    ids: Int64[Tensor, "v n"],
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    *,
    patch: int,
    dtype: torch.dtype,
) -> Float[Tensor, "v n P"]:
    """`image * scale + shift` of the patches at `ids`, flattened (c, p, q): the order of a patch-embed weight `[d, c, p, q]`."""
    work = wide(image, scale)
    factor, offset = (x.to(work)[:, None].expand(-1, patch * patch).flatten() for x in (scale, shift))
    # Transposed to (c, p, q) as stored, then normalised in place: the gather made a fresh tensor.
    return pick_patches(image, ids, patch).flatten(2).to(work).mul_(factor).add_(offset).to(dtype)


def embed_tokens(
    tokens: Float[Tensor, "v k d"],
    position: Float[Tensor, "l d"],
    cls_row: Float[Tensor, " d"],
    ids: Int64[Tensor, "v k"],
) -> Float[Tensor, "v k+1 d"]:
    """[cls_row | tokens + position[ids]], in the wider of the two dtypes: the residual stream stays fp32 under autocast."""
    first = cls_row.expand(tokens.shape[0], 1, -1)
    placed = tokens + position[ids]
    return torch.cat([first.to(placed.dtype), placed], dim=1)


def centre(x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
    """x minus its mean, and the mean. The variance is then a sum of squares: torch.var_mean takes 3x longer on CPU."""
    mean = x.mean(dim=-1, keepdim=True)
    return x - mean, mean


def pixel_target(
    image: Shaped[Tensor, "b c h w"],
    ids: Int64[Tensor, "v m"],
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    *,
    patch: int,
    norm_pix: bool,
    work: torch.dtype,
    biased: bool = False,
) -> tuple[Float[Tensor, "v m P"], Float[Tensor, "2 v m"]]:
    """What pixel_loss predicts, (c, p, q) values per patch, and the mean and 1 / std that were taken out.

    `(x - mean) / sqrt(var + 1e-6)` over all p*p*c values of a patch, variance unbiased unless `biased`; x itself without norm_pix.
    MAE section 3, "Reconstruction target" (arXiv 2111.06377); MAE's (p, q, c) order is a fixed permutation of the values.
    """
    x = gather_patches(image, ids, scale, shift, patch=patch, dtype=work)
    if not norm_pix:
        return x, torch.stack([x.new_zeros(ids.shape), x.new_ones(ids.shape)])
    centred, mean = centre(x)
    rstd = torch.rsqrt(centred.square().sum(dim=-1, keepdim=True) / (x.shape[-1] - (not biased)) + NORM_PIX_EPS)
    return centred * rstd, torch.stack([mean, rstd])[..., 0]


def pixel_loss(
    image: Shaped[Tensor, "b c h w"],
    pred: Float[Tensor, "v m P"],
    ids: Int64[Tensor, "v m"],
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    *,
    patch: int,
    norm_pix: bool,
    biased: bool = False,
) -> Float[Tensor, "v m"]:
    """Mean squared error of each predicted patch against its (normalised) pixels."""
    work = wide(image, pred, scale)
    target, _ = pixel_target(image, ids, scale, shift, patch=patch, norm_pix=norm_pix, work=work, biased=biased)
    return (pred.to(work) - target).square().mean(dim=-1)


def pixel_loss_backward(
    grad: Float[Tensor, "v m"],
    image: Shaped[Tensor, "b c h w"],
    pred: Float[Tensor, "v m P"],
    ids: Int64[Tensor, "v m"],
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    *,
    patch: int,
    norm_pix: bool,
) -> Float[Tensor, "v m P"]:
    """Gradient of `pixel_loss` in pred, written out: `2 g (pred - t) / P`. Autograd of `pixel_loss` gives the same."""
    work = wide(image, pred, scale)
    target, _ = pixel_target(image, ids, scale, shift, patch=patch, norm_pix=norm_pix, work=work)
    return ((pred.to(work) - target) * (grad.to(work)[..., None] * (2 / pred.shape[2]))).to(pred.dtype)


def dequantised_rows(
    codes: Shaped[Tensor, "b l d"],
    ids: Int64[Tensor, "v n"] | None,
    scale: Float[Tensor, "b l"] | None,
    channel_mean: Float[Tensor, " d"] | None,
    channel_std: Float[Tensor, " d"] | None,
    *,
    n_rows: int,
    work: torch.dtype,
) -> Float[Tensor, "v n d"]:
    """`channel_mean + channel_std * (scale * code)` at `ids`; without ids, `codes` and `scale` are already gathered."""
    if ids is not None or n_rows != codes.shape[0]:
        rows = rows_of(n_rows, codes.shape[0], codes.device)
        at = (rows, ids) if ids is not None else (rows[:, 0],)
        codes, scale = codes[at], None if scale is None else scale[at]
    value = codes.to(work)
    if scale is not None:
        value = value * scale.to(work)[..., None]
    if channel_std is not None:
        value = value * channel_std.to(work)
    return value if channel_mean is None else value + channel_mean.to(work)


def decoded_rows(
    codes: UInt8[Tensor, "b l m"],
    ids: Int64[Tensor, "v n"] | None,
    entries: Float[Tensor, "256 r"],
    group: Int64[Tensor, " r"],
    basis: Float[Tensor, "r d"],
    mean: Float[Tensor, " d"],
    *,
    n_rows: int,
    work: torch.dtype,
) -> Float[Tensor, "v n d"]:
    """`mean + entries[codes[group[k]], k] @ basis` at `ids`: product codes; without ids, `codes` are already gathered."""
    components = code_components(codes, ids, entries.to(work), group, n_rows=n_rows)
    return components @ basis.to(work) + mean.to(work)


def code_components(
    codes: UInt8[Tensor, "b l m"],
    ids: Int64[Tensor, "v n"] | None,
    entries: Float[Tensor, "256 r"],
    group: Int64[Tensor, " r"],
    *,
    n_rows: int,
) -> Float[Tensor, "v n r"]:
    """`entries[codes[group[k]], k]` at `ids`; without ids, `codes` are already gathered."""
    if ids is not None or n_rows != codes.shape[0]:
        rows = rows_of(n_rows, codes.shape[0], codes.device)
        codes = codes[(rows, ids) if ids is not None else (rows[:, 0],)]
    at = codes[..., group].long().flatten(0, 1)
    return entries.gather(0, at).view(*codes.shape[:2], len(group))


def unit(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """x divided by its length."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + UNIT_EPS)


def layer_norm(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """LayerNorm over channels without affine parameters: biased variance, eps 1e-5."""
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS)


def mimic_target(
    codes: Shaped[Tensor, "b l d"],
    ids: Int64[Tensor, "v n"] | None,
    scale: Float[Tensor, "b l"] | None,
    channel_mean: Float[Tensor, " d"] | None,
    channel_std: Float[Tensor, " d"] | None,
    stat_mean: Float[Tensor, "*l d"] | None,
    stat_std: Float[Tensor, " d"] | None,
    positions: Int64[Tensor, "v n"] | None = None,
    *,
    target: str,
    n_rows: int,
    work: torch.dtype,
) -> Float[Tensor, "v n d"]:
    """The teacher tokens at `ids`, dequantised and normalised as `target` says; `positions` are their rows of `stat_mean`."""
    y = dequantised_rows(codes, ids, scale, channel_mean, channel_std, n_rows=n_rows, work=work)
    if target in ("channel", "position", "position+ln0"):
        assert stat_mean is not None
        y = y - (stat_mean if target == "channel" else stat_mean[positions]).to(work)
    if target in ("ln0", "position+ln0"):
        return layer_norm(y)
    if target == "l2":
        return unit(y)
    if target in ("channel", "position"):
        assert stat_std is not None
        return y / stat_std.to(work)
    return y


def mimic_loss(
    student: Float[Tensor, "v n d"],
    codes: Shaped[Tensor, "b l d"],
    ids: Int64[Tensor, "v n"] | None,
    scale: Float[Tensor, "b l"] | None = None,
    channel_mean: Float[Tensor, " d"] | None = None,
    channel_std: Float[Tensor, " d"] | None = None,
    stat_mean: Float[Tensor, "*l d"] | None = None,
    stat_std: Float[Tensor, " d"] | None = None,
    positions: Int64[Tensor, "v n"] | None = None,
    *,
    target: str,
    distance: str,
    beta: float,
) -> Float[Tensor, "v n"]:
    """Distance of each student token to the teacher token of the same patch: mse, smooth-L1(beta) or 1 - cosine.

    Smooth-L1 is `e^2 / (2 beta)` inside |e| < beta, `|e| - beta / 2` outside. The criterion and the target normalisation of
    MR-MAE (arXiv 2303.05475) are not published; which pair a recipe uses is its own choice.
    """
    work = wide(student, codes)
    stats = (scale, channel_mean, channel_std, stat_mean, stat_std, positions)
    y = mimic_target(codes, ids, *stats, target=target, n_rows=student.shape[0], work=work)
    x = student.to(work)
    if distance == "cosd":
        return 1 - (unit(x) * unit(y)).sum(dim=-1)
    if distance == "mse":
        return (x - y).square().mean(dim=-1)
    return F.smooth_l1_loss(x, y, reduction="none", beta=beta).mean(dim=-1)


def mimic_loss_backward(
    grad: Float[Tensor, "v n"],
    student: Float[Tensor, "v n d"],
    codes: Shaped[Tensor, "b l d"],
    ids: Int64[Tensor, "v n"] | None,
    scale: Float[Tensor, "b l"] | None = None,
    channel_mean: Float[Tensor, " d"] | None = None,
    channel_std: Float[Tensor, " d"] | None = None,
    stat_mean: Float[Tensor, "*l d"] | None = None,
    stat_std: Float[Tensor, " d"] | None = None,
    positions: Int64[Tensor, "v n"] | None = None,
    *,
    target: str,
    distance: str,
    beta: float,
) -> Float[Tensor, "v n d"]:
    """Gradient of `mimic_loss` in student, written out. Autograd of `mimic_loss` gives the same."""
    work = wide(student, codes)
    stats = (scale, channel_mean, channel_std, stat_mean, stat_std, positions)
    y = mimic_target(codes, ids, *stats, target=target, n_rows=student.shape[0], work=work)
    x, g = student.to(work), grad.to(work)[..., None]
    if distance == "cosd":
        length = torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + UNIT_EPS)
        y = unit(y)
        slope = (x * y).sum(dim=-1, keepdim=True) * length.pow(3) * x - length * y
    elif distance == "mse":
        slope = (x - y) * (2 / x.shape[2])
    else:
        slope = ((x - y) / beta).clamp(-1, 1) / x.shape[2]
    return (g * slope).to(student.dtype)
