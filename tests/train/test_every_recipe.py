"""What holds for every shipped recipe, on photographs: it learns, resumes to the same bits, splits over ranks, compiles, exports."""

import functools
import math
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from training import facet_tail, train_quietly

from mrmae.shards import commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format import plan, stored_tap
from mrmae.shards.format.spec import key_hash
from mrmae.shards.format.tail import write_tail
from mrmae.shards.stats import compute_stats, write_stats
from mrmae.train import checkpoint, loop
from mrmae.train.cost import FLOPS_BESIDE, count_costs, updates_of_law
from mrmae.train.feed import load_masked
from mrmae.train.log import read_rows
from mrmae.train.method.follower import running_statistics
from mrmae.train.method.model import evaluating
from mrmae.train.method.recipe import Recipe, load_recipe, recipe_names
from mrmae.train.online import with_targets
from mrmae.train.ranks import Ranks
from mrmae.train.run import Run, build_run
from mrmae.train.setup import Setup

TILES = Path(__file__).parents[2] / "examples" / "data" / "eurosat.tar"
N = 24
SHORT = (
    "optim.batch_size=8",
    "optim.epochs=2",
    "optim.warmup_epochs=0",
    "optim.min_lr=0.002",
    "optim.lr_per_256=0.064",
)
MAPS = {
    "text": lambda key, view: np.random.default_rng(key_hash(key)).normal(size=16).astype(np.float16),
    "ids": lambda key, view: (np.arange(16) % 4).astype(np.uint16),  # told by the place
    "latents": lambda key, view: np.random.default_rng(key_hash(key) + view).normal(size=(16, 16)).astype(np.float16),
    "parts": lambda key, view: (1 << np.random.default_rng(key_hash(key)).integers(0, 11, 16)).astype(np.uint16),
}
CACHES: dict[tuple[int, int, tuple[str, ...]], Path] = {}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums have the same order, hence the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiles() -> dict[str, bytes]:
    """The first of the embedded photographs."""
    with tarfile.open(TILES) as tar:
        members = [member for member in tar if member.isfile()][: 5 * N : 5]
        return {member.name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]


@pytest.fixture
def tiny_recipe(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Three blocks are enough for what is asked here of every recipe."""
    return functools.partial(tiny_recipe, blocks=3)


@pytest.fixture
def cache_of(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """`cache_of(recipe)`: a cache of photographs with what the recipe needs; clip, and a teacher of one tap, has a norm and a projection."""

    def make(recipe: Recipe) -> Path:
        wide = "mcmae" in recipe.student.model or any(term.target == "hog" for term in recipe.terms.values())
        taps = {term.teacher_tap for term in recipe.terms.values()} - {None, "projected", "post_ln"}
        key = (
            64 if wide else 32,
            1 + recipe.prepare.pair,
            tuple(sorted(stored_tap(tap) for tap in taps if tap)),
        )
        if key not in CACHES:
            CACHES[key] = built(make_cache, tmp_path_factory.mktemp("photographs") / "cache", *key)
        return CACHES[key]

    return make


def built(make_cache: Callable[..., Path], path: Path, size: int, n_views: int, taps: tuple[str, ...]) -> Path:
    """A cache with clip and dino, or with one teacher per tap."""
    told = {"has_cls": True, "has_attention": True}
    teachers = {"clip": {"width": 8, **told}, "dino": {"width": 6, **told}}
    if taps:
        teachers = {
            f"vit{tap.removeprefix('block_')}".removesuffix("pre_tail"): {"width": 8, "tap": tap, **told}
            for tap in taps
        }
    make_cache(path, size=size, images=tiles(), n=N, n_views=n_views, teachers=teachers, maps=MAPS, finalise=False)
    draw = torch.Generator().manual_seed(0)
    tail = {
        "layer_norm.weight": torch.rand(8, generator=draw) + 0.5,
        "layer_norm.bias": torch.randn(8, generator=draw),
        "layer_norm.eps": torch.tensor(1e-5),
        "proj.weight": torch.randn(5, 8, generator=draw),
    }
    for teacher in plan.load_plan(path).columns:
        facets = teacher.tap.startswith("input_")
        if (taps or teacher.name == "clip") and not teacher.is_map:
            write_tail(path, teacher.tail_name, facet_tail(8) if facets else tail)
    commit.finalise(path, plan.load_plan(path))
    cache = open_cache(path)
    for column in cache.columns:
        write_stats(cache, column, compute_stats(cache, column))
    return path


def given(name: str, cache: Path) -> dict[str, Any]:
    """What the recipe wants beside the cache: two boxes in every other image, or labels."""
    if any(term.target == "labels" for term in load_recipe(name).terms.values()):
        rows = [f"{key},class {i % 3}" for i, key in enumerate(open_cache(cache).keys)]
        (cache.parent / "labels.csv").write_text("\n".join(["key,label", *rows, ""]))
        return {"labels": cache.parent / "labels.csv"}
    if load_recipe(name).student.boxes is None:
        return {}
    rows = [f"{key},{x},4,{x + 30},40" for key in open_cache(cache).keys[::2] for x in (2, 20)]
    (cache.parent / "boxes.csv").write_text("\n".join(["key,x0,y0,x1,y1", *rows, ""]))
    return {"boxes": cache.parent / "boxes.csv"}


def bits(out: Path) -> dict[str, Tensor]:
    """Weights and moments of the last state, which the run itself has read with more care and time."""
    state = torch.load(checkpoint.list_checkpoints(out / "checkpoints")[-1], weights_only=False)
    moments = {f"{i}.{k}": v for i, slot in state["optimizer"]["state"].items() for k, v in slot.items()}
    return {**state["model"], **moments, "step": torch.tensor(state["step"])}


@pytest.mark.parametrize("name", recipe_names())
def test_it_learns_photographs_resumes_to_the_same_bits_and_exports(
    name: str,
    cache_of: Callable[[Recipe], Path],
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, cache, step = tiny_recipe(name, *SHORT), cache_of(load_recipe(name)), loop.step
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    more = given(name, cache)
    assert train_quietly(cache, whole, recipe, **more)["finished"]
    losses = [row["loss"] for row in read_rows(whole / "log.jsonl", "epoch")]
    assert losses[-1] < losses[0], losses

    def interrupted(run: Run, *rest: Any) -> Tensor:
        if run.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(run, *rest)

    monkeypatch.setattr(loop, "step", interrupted)
    assert train_quietly(cache, pieces, recipe, **more)["step"] == 5
    monkeypatch.setattr(loop, "step", step)
    assert train_quietly(cache, pieces, recipe, **more)["finished"]
    one, two = bits(whole), bits(pieces)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    if "mcmae" not in recipe.student.model:
        student = timm.create_model(f"local-dir:{whole / 'student'}", pretrained=True).eval()
        assert torch.isfinite(student(torch.zeros(1, 3, *student.patch_embed.img_size))).all()


def run_of(name: str, cache_of: Callable[[Recipe], Path], tiny_recipe: Callable[..., Recipe], out: Path) -> Run:
    cache = cache_of(load_recipe(name))
    return build_run(cache, out, tiny_recipe(name, *SHORT), Ranks(), Setup(device="cpu", **given(name, cache)))


@pytest.mark.parametrize("name", recipe_names())
def test_one_rank_is_two_and_bf16_is_finite(
    name: str,
    cache_of: Callable[[Recipe], Path],
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of(name, cache_of, tiny_recipe, tmp_path)
    costs = count_costs(run)
    beside = sum(costs[key] for key in FLOPS_BESIDE)
    assert costs["forward_flops"] + beside == pytest.approx(2 * products_of(run), rel=1e-9)
    assert (costs["own_flops"] > 0) == any(t.target in ("self", "ema") for t in run.recipe.terms.values())
    assert (costs["sampler_flops"] > 0) == (name == "selective-mae") and costs["teacher_flops"] == 0
    assert costs["feature_bytes"] == bytes_read(run, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = run.model(*seen(run, run.numbers[:8]))
    assert loss.isfinite() and all(part.isfinite() for part in parts.values())
    run.model.double()
    run.model.fill_constants(torch.float64)
    if running_statistics(run.model):  # a batch norm is a function of the whole batch: over ranks in test_ranks.py
        run.model.eval()
    if name == "heuristic":  # telling images of a batch apart is, too
        run.model.terms = tuple(term for term in run.model.terms if term.recipe.target != "views")
        run.model.heads["contrast"].requires_grad_(False)
    whole, (one, two) = seen(run, run.numbers[:8]), (seen(run, run.numbers[at : at + 4]) for at in (0, 4))
    v = run.recipe.mask.masks_per_image
    halves = zip(one[1].ids_keep.chunk(v), two[1].ids_keep.chunk(v))
    assert torch.equal(whole[1].ids_keep, torch.cat([mask for half in halves for mask in half]))
    for parameter in run.model.parameters():
        parameter.grad = None
    (run.model(*whole)[0]).backward()
    together = {key: p.grad for key, p in run.model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in together.values()), [key for key, grad in together.items() if grad is None]
    run.model.zero_grad()
    for half in (one, two):
        (run.model(*half)[0] / 2).backward()
    for key, p in run.model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(together[key], p.grad, atol=1e-11, rtol=1e-8), key  # type: ignore[arg-type]


class Products(TorchFunctionMode):
    """Counts multiply-accumulates where Python calls for them: the shapes of linear layers, convolutions, attention, products."""

    total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func in (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__):
            self.total += out.numel() * args[0].shape[-1]
        elif func in (F.conv2d, torch.conv2d):
            self.total += out.numel() * args[1][0].numel()
        elif func is F.scaled_dot_product_attention:
            self.total += (args[0].numel() + out.numel()) * args[1].shape[-2]
        elif func is torch.einsum:
            letters = {letter: n for name, x in zip(args[0].partition("->")[0].split(","), args[1:])
                       for letter, n in zip(name.replace("...", ""), x.shape)}  # fmt: skip
            whole = args[0].partition("->")[2].replace("...", "")
            self.total += out.numel() * math.prod(n for letter, n in letters.items() if letter not in whole)
        return out


def bytes_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that one image asks of the cache's columns."""
    sizes, read = [], run.cache.shards.read

    def counted(column: str, *rest: Any) -> None:
        sizes.extend(array.nbytes for array in rest[2].values() if column != plan.PIXELS)
        read(column, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(run.cache.shards, "read", counted)
        load_masked(run, run.numbers[:1], epoch=0)
    return sum(sizes)


def products_of(run: Run) -> float:
    """Multiply-accumulates of a step's forward passes on one image, with encoders that give targets and a sampler that compares
    patches, in the mean over the updates of a law."""
    found = []
    with torch.no_grad(), evaluating(run.model):
        with Products() as drawing:
            first = seen_first(run)
        for update in updates_of_law(run, *first):
            with Products() as counted:
                run.model(*update)
            found.append(counted.total)
    return (sum(found) / len(found) + drawing.total) / run.recipe.mask.joined


def seen_first(run: Run) -> Any:
    """The first sample, or as many as share a sequence, as a step of epoch 0 sees it."""
    return with_targets(
        load_masked(run, run.numbers[: run.recipe.mask.joined], epoch=0), run.online, run.needed, model=run.model
    )


def seen(run: Run, numbers: np.ndarray[Any, Any]) -> Any:
    """These samples as a step of epoch 1 sees them."""
    return with_targets(load_masked(run, numbers, epoch=1), run.online, run.needed, model=run.model)


@pytest.mark.soak
@pytest.mark.parametrize("name", recipe_names())
def test_it_compiles_to_one_graph(
    name: str, cache_of: Callable[[Recipe], Path], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = run_of(name, cache_of, tiny_recipe, tmp_path)
    batch = seen(run, run.numbers[:4])
    torch._dynamo.reset()
    loss, _ = torch.compile(run.model, fullgraph=True, backend="eager")(*batch)
    assert loss.item() == pytest.approx(run.model(*batch)[0].item(), rel=1e-6)


def test_the_caches_are_whole() -> None:
    assert all(open_cache(path).numbers.size == N for path in CACHES.values())
