"""The contestants of bench_train.py: one update of each, and a forward pass to count."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from stock_mae import StockMAE
from torch import Tensor, nn

from mrmae.extract.teachers import Teacher
from mrmae.train import batches, loop, optim
from mrmae.train.cost import counted_flops
from mrmae.train.feed import Feed, feed_of
from mrmae.train.method import Draw, build_model, needed_arrays
from mrmae.train.online import online_info, only_needed, with_targets
from mrmae.train.ranks import Ranks, StopRequest
from mrmae.train.run import Run

STOCK, EXPLICIT, ONLINE, CACHED = "stock MAE", "stock MAE, explicit softmax", "MR-MAE online", "MR-MAE cached"
RESIDENT = "MR-MAE cached, resident batch"
TRITON, REFERENCE = "MR-MAE cached, Triton kernels", "MR-MAE cached, reference kernels"


@dataclass
class Arm:
    """One contestant. step: one update. forward: the loss of a batch at hand, for counting. wall_s, waited_s: of all rounds, and of them for the loader."""

    name: str
    step: Callable[[], Any]
    forward: Callable[[], Tensor]
    model: nn.Module
    feed: Feed | None = None
    teachers_flops: int = 0
    seconds: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    waited_s: float = 0.0
    peak_bytes: int | str = ""


def online_run(run: Run, teachers: list[Teacher]) -> Run:
    """The same run with these teachers in the step."""
    named = {teacher.spec.name: teacher for teacher in teachers}
    info = online_info(run.info, named)
    needed = needed_arrays(run.recipe, info)
    model, o = build_model(run.recipe, info).to(run.device), run.recipe.optim
    optimizer = optim.build_optimizer(model, betas=o.betas, decay=o.weight_decay, name=o.name)
    chosen = only_needed(named, needed)
    return replace(run, info=info, needed=needed, model=model, optimizer=optimizer, online=chosen)


def with_kernels(run: Run, kernels: str) -> Run:
    """The same run with its stages forced to "triton" or "torch"."""
    model, o = build_model(run.recipe, run.info, kernels=kernels).to(run.device), run.recipe.optim
    optimizer = optim.build_optimizer(model, betas=o.betas, decay=o.weight_decay, name=o.name)
    return replace(run, model=model, optimizer=optimizer)


def our_arm(name: str, run: Run, feed: Any, *, compile: bool) -> Arm:
    """One update by the trainer's own `step`, with the compiled forward pass (of teachers too) where asked for."""
    if compile:
        fast = {
            n: replace(t, tower=replace(t.tower, features=torch.compile(t.tower.features)))
            for n, t in run.online.items()
        }
        run = replace(run, online=fast)
    state = loop.Loop(feed, None, StopRequest(Ranks()))
    forward = loop.forward_of(replace(run, setup=replace(run.setup, compile=compile)))
    optim.set_lr(run.optimizer, 1e-6)
    loaded = next(feed)
    with counted_flops() as counter:
        whole = with_targets(loaded, run.online, run.needed, model=run.model)
    flops = counter.get_total_flops() // len(whole[0].samples)
    return Arm(name, lambda: loop.step(run, state, forward), lambda: run.model(*whole)[0], run.model, feed, flops)


def stock_arm(name: str, run: Run, feed: Feed, *, compile: bool, fused: bool) -> Arm:
    """One update of stock MAE with AdamW; its masks come from the device's generator, as published."""
    decoder = run.recipe.student.decoder
    assert decoder is not None
    model = StockMAE(run.recipe.student.model, decoder, size=run.info.size, patch=run.info.patch, fused=fused)
    model.to(run.device)
    optimizer = torch.optim.AdamW(optim.parameter_groups(model, decay=0.05), lr=1e-6, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model, dynamic=False) if compile else model
    scale, shift = run.model.scale, run.model.shift

    def image(pixels: Tensor) -> Tensor:
        return (pixels.float() * scale + shift).permute(0, 3, 1, 2).contiguous()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss: Tensor = forward(image(next(feed)[0].pixels))
        loss.backward()
        optimizer.step()
        return loss.detach()

    at_hand = next(feed)[0].pixels
    return Arm(name, step, lambda: model(image(at_hand)), model, feed)


def pixel_feed(run: Run) -> Feed:
    """The same views in the same order, without features."""

    def load(epoch: int, update: int, micro: int) -> batches.Loaded:
        order = batches.numbers_of_epoch(run.cache, run.numbers, seed=run.recipe.seed, epoch=epoch)
        numbers = batches.micro_batch_of(order, update, micro, run.share)
        return batches.load_batch(run.cache, numbers, epoch=epoch, needed={}), Draw(run.recipe.seed, epoch)

    todo = batches.jobs(batches.Position(0, 0), epochs=10**6, updates=run.updates, accum=1)
    return Feed(load, todo, run.device)


def build_arms(run: Run, live: Run, *, compile: bool, others: Mapping[str, Run]) -> list[Arm]:
    """All arms of one mode, their loaders running. others: more runs from the cache, by the arm's name."""
    arms = [stock_arm(STOCK, run, pixel_feed(run), compile=compile, fused=True)]
    if not compile:
        arms.append(stock_arm(EXPLICIT, run, pixel_feed(run), compile=False, fused=False))
    arms.append(our_arm(ONLINE, live, feed_of(live), compile=compile))
    arms += [our_arm(name, one, feed_of(one), compile=compile) for name, one in ({CACHED: run} | dict(others)).items()]
    with feed_of(run) as feed:
        resident = itertools.repeat(next(feed))
    if run.device.type == "cuda":
        arms.append(our_arm(RESIDENT, run, resident, compile=compile))
        for name, kernels in ((TRITON, "triton"), (REFERENCE, "torch")):
            arms.append(our_arm(name, with_kernels(run, kernels), resident, compile=compile))
    return arms
