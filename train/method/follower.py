"""A copy of the student whose weights follow it, update by update: the teacher of terms with target `ema`."""

import copy
from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrmae.train.method.heads import PredictorHead
from mrmae.train.method.mcmae import MaskedConvViT


class Follower(nn.Module):
    """The student's encoder and its heads' projectors, without gradients, always in evaluation mode.

    Batch norms therefore use running statistics, which follow the student's like weights do; their integer counters do not.
    """

    def __init__(self, student: VisionTransformer | MaskedConvViT, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        found = {name: head.projector for name, head in heads.items() if isinstance(head, PredictorHead)}
        self.student: VisionTransformer | MaskedConvViT = copy.deepcopy(student)
        self.projectors = copy.deepcopy(nn.ModuleDict(found))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Follower":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, heads: Mapping[str, nn.Module], momentum: float) -> None:
        """Every weight and running statistic becomes `momentum * own + (1 - momentum) * the student's`."""
        own, others = floats_of(self.student), floats_of(student)
        once = {id(projector): (name, projector) for name, projector in self.projectors.items()}  # terms may share one
        for name, projector in once.values():
            own += floats_of(projector)
            others += floats_of(heads[name].get_submodule("projector"))
        if momentum == 0:
            torch._foreach_copy_(own, others)
        else:
            torch._foreach_lerp_(own, others, 1 - momentum)


def floats_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that are no counters."""
    return [x.detach() for x in [*module.parameters(), *module.buffers()] if x.is_floating_point()]


def running_statistics(module: nn.Module) -> list[Tensor]:
    """What batch norms keep of the batches they have seen."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm1d)]
    return [x for norm in norms for x in norm.buffers() if x.is_floating_point()]
