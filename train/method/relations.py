"""Relations of tokens within a block, and how far a student's are from a teacher's: TinyMIM's target instead of features.

Queries, keys and values are gathered at the tokens that a term reads before anything is normalised: a softmax over a subset is no slice
of a softmax over the grid. Maps behind a softmax are never stored.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.kernels import reference


def relation_divergence(
    student: Float[Tensor, "v n 3*d"], teacher: Float[Tensor, "v n 3*e"], relation: str, *, heads: int
) -> Float[Tensor, "v n"]:
    """`sum_j R_T log(R_T / R_S)` of every token i, the mean over heads; the teacher has no gradient.

    student, teacher: [q | k | v] of all heads. relation: `qk`, R = softmax_j(q_i . k_j / sqrt(d_h)), or `vv`, v for both, d_h each
    model's own channels per head. Both in `heads` heads; in fp32 (fp64 for double). TinyMIM, arXiv 2301.01296.
    """
    work = reference.wide(student)
    with torch.autocast(student.device.type, enabled=False):
        ours = log_relation(student.to(work), relation, heads)
        theirs = log_relation(teacher.detach().to(work), relation, heads)
        return (theirs.exp() * (theirs - ours)).sum(dim=-1).mean(dim=1)


def log_relation(qkv: Float[Tensor, "v n 3*d"], relation: str, heads: int) -> Float[Tensor, "v h n n"]:
    """The logarithm of a relation, over the tokens given."""
    parts = {name: x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for name, x in zip("qkv", qkv.chunk(3, dim=-1))}
    one, other = (parts[name] for name in relation)
    scores: Tensor = one @ other.transpose(-2, -1) * one.shape[-1] ** -0.5
    return scores.log_softmax(dim=-1)
