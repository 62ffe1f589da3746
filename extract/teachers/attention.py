"""The CLS row of the last block's attention, from a forward that keeps its fused kernel."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def checked_attention(
    attention: nn.Module | None, features: Callable[[Tensor], object], size: tuple[int, int]
) -> Callable[[], Tensor] | None:
    """A function giving the CLS row of `attention` after each `features`, proved on one image; None where it is not exact.

    features: image [b, 3, h, w] at `size` -> anything; runs `attention` once. CPU, fp32.
    """
    row = watch_attention(attention) if attention is not None else None
    if attention is None or row is None:
        return None
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return row if attention_is_exact(attention, row, lambda: features(noise)) else None


def watch_attention(attention: nn.Module) -> Callable[[], Tensor] | None:
    """A function that, after a forward, gives the mean over heads of softmax_j(q_cls . k_j / sqrt(d_h)) [b, tokens].

    Works from q and k of the same forward, so the module keeps its fused kernel. None for modules whose q and k it does
    not know.
    """
    if isinstance(attention, nn.MultiheadAttention):
        return watch_multihead(attention)
    names = next((pair for pair in (("q_norm", "k_norm"), ("ln_q", "ln_k")) if hasattr(attention, pair[0])), None)
    if names is None or not hasattr(attention, "scale"):
        return None
    seen: dict[str, Any] = {}
    for key, name in zip("qk", names):
        getattr(attention, name).register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
    attention.register_forward_pre_hook(lambda _m, _a, kw: seen.update(rope=kw.get("rope")), with_kwargs=True)

    def row() -> Tensor:
        q, k, rope = seen["q"], seen["k"], seen["rope"]
        seen.clear()
        if rope is not None:  # only patches are rotated, so q of CLS is not
            k = rotate_patches(attention, k, rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return softmax_row(q[:, :, :1], k, float(attention.scale))  # type: ignore[arg-type]

    return row


def watch_multihead(attention: nn.MultiheadAttention) -> Callable[[], Tensor] | None:
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return None
    seen: dict[str, Tensor] = {}
    attention.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))

    def row() -> Tensor:
        x, d, heads = seen.pop("x"), attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        q = F.linear(x[:, :1], weight[:d], bias[:d]).reshape(len(x), 1, heads, -1).transpose(1, 2)
        k = F.linear(x, weight[d : 2 * d], bias[d : 2 * d]).reshape(*x.shape[:2], heads, -1).transpose(1, 2)
        return softmax_row(q, k, attention.head_dim**-0.5)

    return row


def softmax_row(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[b, tokens] in fp32 from q [b, heads, 1, d_h] and k [b, heads, tokens, d_h]."""
    with torch.autocast(q.device.type, enabled=False):
        return ((q.float() * scale) @ k.float().transpose(-2, -1)).softmax(-1).mean(1)[:, 0]


def rotate_patches(attention: nn.Module, k: Tensor, rope: Tensor) -> Tensor:
    from timm.layers.pos_embed_sincos import (
        apply_rot_embed_cat,
    )  # only timm's modules have rope; open_clip alone need not load it here

    prefix = int(attention.num_prefix_tokens)  # type: ignore[arg-type]
    half = bool(getattr(attention, "rotate_half", False))
    return torch.cat([k[:, :, :prefix], apply_rot_embed_cat(k[:, :, prefix:], rope, half=half)], dim=2)


def attention_is_exact(attention: nn.Module, row: Callable[[], Tensor], run: Callable[[], object]) -> bool:
    """Whether `row` gives what the module itself computes in `run`, by the module's own slow path, on the CPU in fp32.

    Biases, masks, cosine attention and whatever else a library invents show up here; the caller then declares none.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = attention.register_forward_pre_hook(lambda _m, args, kw: calls.append((args, kw)), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    ours = row()
    theirs = slow_row(attention, *calls[-1])
    return theirs is not None and theirs.shape == ours.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def slow_row(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """CLS row of the module's own attention matrix, mean over heads [b, tokens], or None where it never makes one."""
    if isinstance(attention, nn.MultiheadAttention):
        kwargs = kwargs | {"need_weights": True, "average_attn_weights": True}
        return attention(*args, **kwargs)[1][:, 0]  # type: ignore[no-any-return]
    fused = next((name for name in ("fused_attn", "use_fsdpa") if hasattr(attention, name)), None)
    dropout = getattr(attention, "attn_drop", None)
    if fused is None or not isinstance(dropout, nn.Module):
        return None
    seen: list[Tensor] = []
    hook = dropout.register_forward_hook(lambda _m, _i, out: seen.append(out))
    before = getattr(attention, fused)
    setattr(attention, fused, False)
    try:
        attention(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):  # open_clip's slow path is broken for some options
        return None
    finally:
        setattr(attention, fused, before)
        hook.remove()
    return seen[0].mean(1)[:, 0] if seen and seen[0].ndim == 4 else None
