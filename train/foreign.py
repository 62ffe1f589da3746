"""Weights under the names others publish: facebookresearch/mae, Alpha-VL/ConvMAE (MCMAE), and any timm ViT.

The encoder's names are theirs already. A published decoder is `decoder_embed, mask_token, decoder_pos_embed, decoder_blocks.N,
decoder_norm, decoder_pred`; the rows of its prediction layer are (p, q, c), ours (c, p, q), weight and bias alike.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from mrmae.common.progress import counted
from mrmae.extract.teachers import listed, load_weights
from mrmae.train.checkpoint import save_tensors
from mrmae.train.method import POSITION_TABLES, MaskDecoder, MaskedConvViT, Pretrainer

Weights = dict[str, Tensor]
DECODER = {"decoder_embed": "embed", "mask_token": "mask_token", "decoder_blocks": "blocks", "decoder_norm": "norm"}
PREDICTION, DECODER_POSITIONS = "decoder_pred", "decoder_pos_embed"
CLASSIFIER = re.compile(r"(head|fc_norm|head_drop)\.")  # what fine-tuning added
MAE_NAMES = re.compile(
    r"(cls_token|pos_embed|patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))(\.|$)"
)
SAME_POSITIONS = 1e-4  # largest difference between two roundings of the same sin-cos table


# ---- theirs to ours


def init_from(model: Pretrainer, file: str | Path, *, decoder: bool | None = None) -> list[str]:
    """Fill `model` with the weights in `file`; returns what was loaded and what was not, a line per fact.

    file: a checkpoint of facebookresearch/mae or Alpha-VL/ConvMAE, with or without its decoder, or a timm ViT's state dict
    (safetensors or PyTorch, unpickled without running code). Positions of another grid are interpolated.
    decoder: True wants the decoder too, False leaves it, None takes it where file and model both have one.
    Raises ValueError naming the first tensor that does not fit, with both shapes; the model is then unchanged.
    """
    weights, where = load_weights(file), f"--init {file}"
    encoder, notes = encoder_weights(model, weights, where)
    chosen, more = decoder_weights(model, weights, decoder, where)
    wanted = dict(model.named_parameters())
    given = {**encoder, **chosen}
    if other := [name for name, value in given.items() if value.shape != wanted[name].shape]:
        raise ValueError(
            f"{where}: {other[0].partition('.')[2]} has shape {list(given[other[0]].shape)} in the file; this recipe's has "
            f"{list(wanted[other[0]].shape)}; {len(other)} of {len(given)} tensors have another shape; choose the student.model "
            "(and student.decoder) that the weights were made for"
        )
    with torch.no_grad():
        for name, value in given.items():
            wanted[name].copy_(value)
    return [f"{where}: encoder loaded ({len(encoder)} tensors)", *notes, *more]


def encoder_weights(model: Pretrainer, weights: Mapping[str, Tensor], where: str) -> tuple[Weights, list[str]]:
    """The student's parameters found in `weights`, under our names, and what to say about them."""
    convolutions = isinstance(model.student, MaskedConvViT)
    if convolutions != ("patch_embed1.proj.weight" in weights):
        held = "a plain ViT" if convolutions else "MCMAE's student"
        raise ValueError(
            f"{where}: holds {held}; {model.recipe.student.model} was expected; set student.model to what the file holds"
        )
    mine = set(model.student.state_dict())
    optional = {"norm.weight", "norm.bias"} if "fc_norm.weight" in weights else set()
    if convolutions:
        optional |= {name for name in mine if name.startswith("stage")}
    not_ours = ("decoder_", "mask_token", *(("cls_token",) if convolutions else ()))  # ConvMAE-v2 carries both tokens
    given = {n: x for n, x in weights.items() if not n.startswith(not_ours) and not CLASSIFIER.match(n)}
    given, cut = without_blocks(given, model)
    missing, extra = sorted(mine - optional - set(given)), sorted(set(given) - mine)
    if missing or extra:
        raise ValueError(
            f"{where}: {listed(missing, 'missing in the file')}; {listed(extra, 'in the file only')}; every tensor of "
            f"{model.recipe.student.model} and no other was expected; set student.model to what the file holds"
        )
    notes = [f"--init: {name} keeps its initial values, the file has none" for name in sorted(optional - set(given))]
    given["pos_embed"], said = fitted_positions(given["pos_embed"], model, where)
    return {f"student.{name}": x for name, x in given.items()}, notes + cut + said


def without_blocks(given: Weights, model: Pretrainer) -> tuple[Weights, list[str]]:
    """The file's weights without the blocks that the student leaves out because nothing reads them, and what to say about it."""
    kept, blocks = len(model.student.blocks), "blocks3" if isinstance(model.student, MaskedConvViT) else "blocks"
    left = {f"{blocks}.{i}" for i in range(kept, kept + model.blocks_cut)}
    said = (
        [f"--init: the file's last {counted(model.blocks_cut, 'block')} left out, no term reads more"] if left else []
    )
    return {name: x for name, x in given.items() if ".".join(name.split(".")[:2]) not in left}, said


def fitted_positions(positions: Tensor, model: Pretrainer, where: str) -> tuple[Tensor, list[str]]:
    """The file's positions for this grid, interpolated (bicubic) where theirs is another, and what to say about them."""
    grid, prefix = model.info.grid, model.student.num_prefix_tokens
    side = math.isqrt(positions.shape[1] - prefix) if positions.ndim == 3 else 0
    if side < 1 or side * side != positions.shape[1] - prefix:
        raise ValueError(
            f"{where}: pos_embed has shape {list(positions.shape)}; [1, {prefix} + patches of a square grid, width] was "
            "expected; choose weights with absolute positions and the student's own prefix tokens"
        )
    said = []
    if (side, side) != grid:
        fitted = resample_abs_pos_embed(positions.double(), list(grid), [side, side], num_prefix_tokens=prefix)
        positions = fitted.to(positions.dtype)
        said.append(f"--init: positions interpolated from {side} x {side} to {grid[0]} x {grid[1]} patches")
    elif not is_table(positions, model):
        said.append("--init: positions are the file's own, not sin-cos; they stay fixed while training")
    return positions, said


def decoder_weights(
    model: Pretrainer, weights: Mapping[str, Tensor], wanted: bool | None, where: str
) -> tuple[Weights, list[str]]:
    """The decoder's and the prediction layer's parameters found in `weights`, under our names, and what to say about them."""
    head, in_file = prediction_head(model), f"{PREDICTION}.weight" in weights
    if wanted and not (in_file and head):
        lacks = "the file has none" if not in_file else "the recipe has no decoder with a linear pixel head"
        raise ValueError(f"{where}: the decoder was asked for and {lacks}; both were expected; load the encoder alone")
    if wanted is False or not in_file or not head:
        return {}, ["--init: the decoder starts anew"] if model.decoder is not None else []
    assert model.decoder is not None
    theirs = {name: x for name, x in weights.items() if name.split(".")[0] in DECODER}
    found = {f"decoder.{DECODER[n.split('.')[0]]}{n[len(n.split('.')[0]) :]}": x for n, x in theirs.items()}
    if f"{PREDICTION}.bias" not in weights:
        raise ValueError(f"{where}: has {PREDICTION}.weight and no bias; both were expected; load the encoder alone")
    for part in ("weight", "bias"):
        found[f"heads.{head}.{part}"] = reordered(weights[f"{PREDICTION}.{part}"], model, to_cpq, where)
    mine = {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    missing, extra = sorted(mine - set(found)), sorted(n for n in found if n.startswith("decoder.") and n not in mine)
    if missing or extra:
        raise ValueError(
            f"{where}: {listed(missing, 'of the decoder missing in the file')}; {listed(extra, 'in the file only')}; the "
            f"decoder of the recipe was expected; set student.decoder to the file's, or load the encoder alone"
        )
    said = "--init: decoder loaded, rows of its prediction layer reordered from (p, q, c)"
    positions, prefix = weights.get(DECODER_POSITIONS), model.student.num_prefix_tokens
    if positions is not None and positions.shape[1] != model.info.n_patches + prefix:
        said += "; its fixed sin-cos positions are this grid's"
    elif positions is not None and not is_table(positions, model):
        raise ValueError(
            f"{where}: {DECODER_POSITIONS} is not the fixed sin-cos table; MAE's was expected; load the encoder alone"
        )
    return found, [said]


def is_table(positions: Tensor, model: Pretrainer) -> bool:
    """Whether positions [1, prefix + l, d] are the recipe's fixed table of this grid."""
    table = POSITION_TABLES[model.recipe.student.positions](model.info.grid, positions.shape[2])
    table = table[1 - model.student.num_prefix_tokens :]
    return positions.shape[1:] == table.shape and bool((positions[0].double() - table).abs().max() < SAME_POSITIONS)


def prediction_head(model: Pretrainer) -> str | None:
    """The name of the one-Linear pixel head behind a decoder like MAE's, if there is one."""
    if not isinstance(model.decoder, MaskDecoder):
        return None
    names = [
        term.name
        for term in model.terms
        if term.recipe.target == "pixels" and isinstance(model.heads[term.name], nn.Linear)
    ]
    return names[0] if names else None


# ---- ours to theirs


def check_plain(model: Pretrainer, where: str) -> None:
    """Raise ValueError for a student that has parts which MAE's ViT does not have, or no CLS token."""
    surplus = [name for name in model.student.state_dict() if not MAE_NAMES.match(name)]
    other = f"{surplus[0]}, which MAE's ViT does not" if surplus else ""
    if not model.student.num_prefix_tokens:
        other = "no CLS token, which MAE's ViT does"
    if other:
        raise ValueError(
            f"{where}: {model.recipe.student.model} has {other}; a plain ViT like "
            "vit_base_patch16_224 was expected; use OUT/student, which timm loads"
        )


def published_weights(model: Pretrainer) -> Weights:
    """The state dict in the published layout, on the CPU: encoder, and the decoder where it has a linear pixel head.

    A plain ViT gives MAE's names, MCMAE's student those of ConvMAE. Raises ValueError for a ViT with parts MAE does not have.
    """
    if not isinstance(model.student, MaskedConvViT):
        check_plain(model, "--export mae")
    weights = dict(model.student.state_dict())
    head = prediction_head(model)
    if model.decoder is not None and head:
        theirs = {ours: name for name, ours in DECODER.items()}
        for name, x in model.decoder.named_parameters():
            first, _, rest = name.partition(".")
            weights[theirs[first] + (f".{rest}" if rest else "")] = x
        prefix = model.student.num_prefix_tokens
        table = torch.cat([torch.zeros_like(model.decoder.position[:1]), model.decoder.position])[1 - prefix :]
        weights[DECODER_POSITIONS] = table[None]
        for part, x in model.heads[head].named_parameters():
            weights[f"{PREDICTION}.{part}"] = reordered(x, model, to_pqc, "--export mae")
    return {name: x.detach().cpu().contiguous().clone() for name, x in weights.items()}


def export_published(model: Pretrainer, path: str | Path) -> Path:
    """Write `{"model": published_weights}` with torch.save: what the fine-tuning scripts of MAE and ConvMAE load.

    Raises OSError naming the file when the disk is full or not writable.
    """
    weights = published_weights(model)
    save_tensors(Path(path), {"model": weights})
    return Path(path)


def reordered(rows: Tensor, model: Pretrainer, order: Callable[..., Tensor], where: str) -> Tensor:
    """A prediction layer's weight or bias with its rows in the other order. Raises ValueError for another patch size."""
    patch, channels = model.info.patch, model.info.channels
    if rows.shape[0] != patch**2 * channels:
        raise ValueError(
            f"{where}: {PREDICTION} predicts {rows.shape[0]} values; {patch**2 * channels} = {patch} x {patch} x {channels} "
            "were expected, the cache's patches; load the encoder alone"
        )
    return order(rows, patch, channels)


def to_cpq(rows: Tensor, patch: int, channels: int) -> Tensor:
    """Rows in (p, q, c) order, MAE's, as (c, p, q)."""
    return rows.reshape(patch, patch, channels, -1).permute(2, 0, 1, 3).reshape(rows.shape)


def to_pqc(rows: Tensor, patch: int, channels: int) -> Tensor:
    """Rows in (c, p, q) order as MAE's (p, q, c)."""
    return rows.reshape(channels, patch, patch, -1).permute(1, 2, 0, 3).reshape(rows.shape)
