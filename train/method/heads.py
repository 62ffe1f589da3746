"""From the student's width to a target's: one head per term, dropped after training.

Which head MR-MAE uses is not published; one Linear is what its sibling code uses.
"""

from torch import nn

from mrmae.train.method.student import LN_EPS


def none(width: int, out: int) -> nn.Module:
    """The tokens as they are. Raises ValueError where the target has another width."""
    if width != out:
        raise ValueError(
            f"head none: tokens of width {width} and a target of {out}; equal widths were expected; use head linear"
        )
    return nn.Identity()


def linear(width: int, out: int) -> nn.Module:
    """One Linear."""
    return nn.Linear(width, out)


def ln_linear(width: int, out: int) -> nn.Module:
    """LayerNorm, Linear."""
    return nn.Sequential(nn.LayerNorm(width, eps=LN_EPS), nn.Linear(width, out))


def linear_ln(width: int, out: int) -> nn.Module:
    """Linear, LayerNorm."""
    return nn.Sequential(nn.Linear(width, out), nn.LayerNorm(out, eps=LN_EPS))


def mlp(width: int, out: int) -> nn.Module:
    """Linear, GELU, Linear; as wide inside as the student."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))


def mlp3_ln(width: int, out: int) -> nn.Module:
    """[Linear, LayerNorm, GELU] twice, Linear, LayerNorm without affine, all 512 wide; then Linear: DMJD's visible branch."""
    wide = 512
    first = (nn.Linear(width, wide), nn.LayerNorm(wide, eps=LN_EPS), nn.GELU())
    second = (nn.Linear(wide, wide), nn.LayerNorm(wide, eps=LN_EPS), nn.GELU())
    last = (nn.Linear(wide, wide), nn.LayerNorm(wide, eps=LN_EPS, elementwise_affine=False), nn.Linear(wide, out))
    return nn.Sequential(*first, *second, *last)


HEADS = {
    "none": none,
    "linear": linear,
    "ln_linear": ln_linear,
    "linear_ln": linear_ln,
    "mlp": mlp,
    "mlp3_ln": mlp3_ln,
}
