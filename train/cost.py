"""What a step costs per image: operations, bytes from storage, memory; counted on one image, or as many as share a sequence."""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mrmae.common.progress import human_bytes
from mrmae.train import batches
from mrmae.train.feed import load_masked
from mrmae.train.method import Batch, Draw, Masks, Pretrainer, buckets, draw_masks, draw_of, evaluating
from mrmae.train.online import with_targets
from mrmae.train.report import feature_bytes
from mrmae.train.run import Run

BACKWARD = 2  # the backward pass of a matrix product is two of its size
FLOPS_BESIDE = {
    "teacher_flops": "teachers in the step",
    "own_flops": "targets of the student or its copy",
    "sampler_flops": "the sampler",
}
STATE_BYTES = 16  # per parameter: fp32 weight, gradient, and AdamW's two moments


def count_costs(run: Run) -> dict[str, float]:
    """What a step costs per image, in numbers: FLOP, bytes read, memory; and the parameters that are trained.

    encoder_flops: of the student alone on a whole image. forward_flops: of a step, without FLOPS_BESIDE: teacher_flops, of teachers in it;
    own_flops, of the student or its copy giving targets; sampler_flops, of a sampler that compares patches.
    """
    whole, teachers = teacher_flops(run)
    with evaluating(run.model):  # a batch norm learns nothing from an image that is only counted
        return counted_costs(run, whole, teachers)


def counted_costs(run: Run, whole: tuple[Batch, Masks], teachers: float) -> dict[str, float]:
    """`count_costs` of one image as a step sees it. teachers: what those in the step and the sampler took together."""
    updates = updates_of_law(run, *whole)
    own = statistics.mean(own_flops(run.model, *update) for update in updates)
    forward = statistics.mean(student_flops(run.model, *update) for update in updates) - own
    sampler = sampler_flops(run.model, whole[0], draw_of(run.recipe, run.info, 0))
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for t in run.online.values() for p in t.tower.module.parameters())
    frozen += sum(p.nbytes for p in run.model.follower.parameters()) if run.model.follower is not None else 0
    return {
        "parameters": parameters,
        "encoder_flops": encoder_flops(run, whole[0]),
        "forward_flops": forward,
        "teacher_flops": teachers - sampler,
        "own_flops": own,
        "sampler_flops": sampler,
        "step_flops": (1 + BACKWARD) * forward + teachers + own,
        "feature_bytes": feature_bytes(run),
        "view_bytes": view_bytes(run),
        "state_bytes": STATE_BYTES * parameters + frozen,
        "saved_bytes": max(saved_bytes(run, *update) for update in updates),
    }


def cost_facts(run: Run) -> dict[str, str]:
    """FLOPs, bytes and memory per image of this run, in words, for the plan."""
    cost, micro = count_costs(run), run.share.micro_size
    features, view, state, saved = (cost[f"{name}_bytes"] for name in ("feature", "view", "state", "saved"))
    beside = "".join(f", {what} {cost[key] / 1e9:.3g}" for key, what in FLOPS_BESIDE.items() if cost[key])
    return {
        "operations": f"{cost['step_flops'] / 1e9:.3g} GFLOP per image and step (forward {cost['forward_flops'] / 1e9:.3g},"
        f" x 3 with backward{beside}), {cost['step_flops'] * run.recipe.optim.batch_size / 1e12:.3g} TFLOP per update",
        "bytes read": f"{human_bytes(features + view)} per image: features {human_bytes(features)}, view {human_bytes(view)}",
        "memory": f"about {human_bytes(state + micro * saved)} per process: weights, gradients and moments {human_bytes(state)},"
        f" kept for backward {human_bytes(saved)} per image x {micro}",
    }


def updates_of_law(run: Run, batch: Batch, masks: Masks) -> list[tuple[Batch, Masks]]:
    """The image under every number of visible patches that a law of the ratio draws, equally often; else as it is."""
    recipe, l = run.recipe.mask, run.info.n_patches
    if recipe.law == "fixed":
        return [(batch, masks)]
    each = [replace(recipe, law="fixed", n_keep=n_keep) for n_keep in buckets(recipe, l)]
    return [(batch, draw_masks(batch, draw_of(run.recipe, run.info, 0), recipe=one, l=l)) for one in each]


def teacher_flops(run: Run) -> tuple[tuple[Batch, Masks], float]:
    """One image as a step sees it, and the FLOPs of the teachers that run in the step on it, with those of `sampler_flops`."""
    loaded = batches.tensors_of(
        load_masked(run, run.numbers[: run.recipe.mask.joined], epoch=0), lambda t: t.to(run.device)
    )
    with counted_flops() as counter:
        whole = with_targets(loaded, run.online, run.needed, model=run.model)
    return whole, counter.get_total_flops() / len(whole[0].samples)


@contextlib.contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """A counter of FLOPs (two per multiply-accumulate): matrix products, attention, convolutions.

    PyTorch's fused inference path of nn.MultiheadAttention (open_clip's towers) is one operation that it does not know.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # torch 2.11 does not count its fused attention on a CPU; written out, attention is two products everywhere
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def student_flops(model: Pretrainer, batch: Batch, masks: Masks) -> float:
    """FLOPs of the forward pass on one image.

    With its graph: without one the counter fails at a module that is given a view of a parameter (CAE's mask token).
    """
    with counted_flops() as counter:
        model(batch, masks)
    return counter.get_total_flops() / len(batch.samples)


def sampler_flops(model: Pretrainer, batch: Batch, draw: Draw) -> float:
    """FLOPs of the embeddings that sampler `similarity` compares, and of comparing them."""
    if model.recipe.mask.sampler != "similarity":
        return 0.0
    with counted_flops() as counter:
        with_targets((batch, draw), {}, {}, model=model)
    return counter.get_total_flops() / len(batch.samples)


def own_flops(model: Pretrainer, batch: Batch, masks: Masks) -> float:
    """FLOPs of the encoders in the step that give targets, without a gradient."""
    with counted_flops() as counter:
        model.own_targets(batch, masks)
    return counter.get_total_flops() / len(batch.samples)


def encoder_flops(run: Run, batch: Batch) -> float:
    """FLOPs of the student alone on one whole image."""
    with counted_flops() as counter:
        run.model.tokens(batch.pixels)
    return counter.get_total_flops() / len(batch.pixels)


def saved_bytes(run: Run, batch: Batch, masks: Masks) -> float:
    """Bytes that the forward pass on one image keeps for backward, beside the weights, in the run's precision."""
    weights = {p.untyped_storage().data_ptr() for p in [*run.model.parameters(), *run.model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16", cache_enabled=False):
            loss, _ = run.model(batch, masks)
    del loss  # alive until here, so that no storage is counted under an address used twice
    return sum(kept.values()) / len(batch.samples)


def view_bytes(run: Run) -> float:
    """Mean bytes of the stored views read per image, one or a pair, from the index of the first shard."""
    shard = run.cache.shards.pixels(0, int(run.numbers[0]) // run.cache.shard_samples)
    sizes = shard.index.tables[run.cache.encoding.extension][:, 1]
    return float(sizes[sizes > 0].mean()) * (1 + run.recipe.prepare.pair)
