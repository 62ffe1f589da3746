"""Every kernel against stock eager MAE operations, compiled stock, and the restructured reference, eager and compiled.

    python benchmarks/bench_kernels.py                    # this machine's device, default batch sizes
    python benchmarks/bench_kernels.py --device cpu -n 16 --threads 1
    python benchmarks/bench_kernels.py --threads 1 --replace    # all rows of this device again, instead of the older ones

All providers of a stage start from the same uint8 views or cached codes and run in one process, so a row means something beside the other
rows of its run only. Rows are appended to benchmarks/results/kernels.csv, or `--out`. The last stage is the share of a step: forward and
backward of the two transformers of ViT-B/16 MAE, which no kernel here touches.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from measure import append, copy_row, machine, moved_bytes, peak_bytes, saved_bytes, size, time_ms
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mrmae.kernels import dispatch, ids

SIDE, PATCH, L, K, D, D_T = 224, 16, 196, 49, 768, 768
M, P = L - K, 3 * PATCH**2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Inputs = dict[str, Any]


# The stock operations: MAE's formulas on the whole grid, in the order a plain implementation applies them.


def stock_image(x: Inputs) -> Tensor:
    """uint8 views to the normalised fp32 image that stock MAE starts from."""
    image = x["image"].permute(0, 3, 1, 2).float().div(255)
    return (image - x["mean"][:, None, None]) / x["std"][:, None, None]


def patchify(image: Tensor) -> Tensor:
    """Whole grid, (c, p, q): the order of the convolution's weight."""
    n, c, h, w = image.shape
    return (
        image.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * PATCH**2)
    )


def pick(rows: Tensor, at: Tensor) -> Tensor:
    return torch.gather(rows, 1, at[..., None].expand(-1, -1, rows.shape[2]))


def stock_patches(x: Inputs) -> Tensor:
    return pick(patchify(stock_image(x)), x["keep"]).to(torch.bfloat16)


def stock_embed(x: Inputs) -> Tensor:
    """Positions on the whole grid before tokens are dropped, then the class token."""
    kept = pick(x["all_tokens"] + x["position"], x["keep"])
    return torch.cat([x["cls_row"].expand(kept.shape[0], 1, -1), kept], dim=1)


def stock_pixel(x: Inputs) -> Tensor:
    """Predictions and targets of the whole grid, then the masked mean."""
    target = patchify(stock_image(x))
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (var + 1e-6) ** 0.5
    loss = ((x["all_pred"] - target) ** 2).mean(-1)
    return (loss * x["masked"]).sum() / x["masked"].sum()


def stock_mimic(x: Inputs) -> Tensor:
    """Dequantise and normalise the whole grid, then gather the visible rows."""
    value = x["codes"].float() * x["scale"].float()[..., None] * x["channel_std"] + x["channel_mean"]
    return F.mse_loss(x["student"].float(), pick(F.layer_norm(value, (D_T,)), x["keep"]))


# Ours, through the public door.


def pixel_arguments(x: Inputs, kernels: str) -> dict[str, Any]:
    return {"patch": PATCH, "scale": x["factor"], "shift": x["shift"], "channels_last": True, "kernels": kernels}


def our_patches(x: Inputs, kernels: str) -> Tensor:
    return dispatch.gather_patches(x["image"], x["keep"], dtype=torch.bfloat16, **pixel_arguments(x, kernels))


def our_embed(x: Inputs, kernels: str) -> Tensor:
    return dispatch.embed_tokens(x["tokens"], x["position"], x["cls_row"], x["keep"], kernels=kernels)


def our_pixel(x: Inputs, kernels: str) -> Tensor:
    return dispatch.pixel_loss(x["image"], x["pred"], x["hidden"], **pixel_arguments(x, kernels)).mean()


def our_mimic(x: Inputs, kernels: str) -> Tensor:
    quantiser = {k: x[k] for k in ("scale", "channel_mean", "channel_std")}
    return dispatch.mimic_loss(x["student"], x["codes"], x["keep"], **quantiser, l=L, kernels=kernels).mean()


@dataclass(frozen=True)
class Stage:
    """One kernel: its stock twin, our function, the tensors each differentiates, and what must cross the bus at least."""

    stock: Callable[[Inputs], Tensor]
    ours: Callable[[Inputs, str], Tensor]
    stock_leaf: str | None
    our_leaf: str | None
    minimal: Callable[[Inputs, str], int]


def touched_sectors(x: Inputs, at: Tensor) -> int:
    """Bytes of the 32-byte sectors under the patches at `at`: the least a scattered uint8 gather can read."""
    row = 3 * SIDE
    rows = (at[..., None] // (SIDE // PATCH) * PATCH + torch.arange(PATCH, device=at.device)) * row
    start = rows + (at[..., None] % (SIDE // PATCH)) * PATCH * 3
    start = start + torch.arange(at.shape[0], device=at.device)[:, None, None] * (row * SIDE)
    return int((((start + 3 * PATCH - 1) // 32 - start // 32 + 1) * 32).sum())


def patches_bytes(x: Inputs, mode: str) -> int:
    return touched_sectors(x, x["keep"]) + size(x["keep"]) + x["keep"].numel() * P * 2


def embed_bytes(x: Inputs, mode: str) -> int:
    """Forward reads tokens and positions once and writes fp32; backward reads that gradient and writes the tokens'."""
    out = x["tokens"].shape[0] * (K + 1) * D * 4
    return out + size(x["tokens"]) + (0 if mode == "backward" else size(x["position"], x["cls_row"], x["keep"]))


def pixel_bytes(x: Inputs, mode: str) -> int:
    read = touched_sectors(x, x["hidden"]) + size(x["pred"], x["hidden"])
    return read + (size(x["pred"]) if mode == "backward" else x["hidden"].numel() * 12)


def mimic_bytes(x: Inputs, mode: str) -> int:
    rows = x["keep"].numel()
    read = rows * (D_T + 2) + size(x["student"], x["keep"])
    return read + (size(x["student"]) if mode == "backward" else rows * 4)


STAGES = {
    "gather_patches": Stage(stock_patches, our_patches, None, None, patches_bytes),
    "embed_tokens": Stage(stock_embed, our_embed, "all_tokens", "tokens", embed_bytes),
    "pixel_loss": Stage(stock_pixel, our_pixel, "all_pred", "pred", pixel_bytes),
    "mimic_loss": Stage(stock_mimic, our_mimic, "student", "student", mimic_bytes),
}


def make_inputs(n: int, device: str, seed: int) -> Inputs:
    """One batch: uint8 views, int8 codes, masks, and the tensors of both worlds."""
    g = torch.Generator(device).manual_seed(seed)
    keep, hidden = ids.random_ids(torch.arange(n, device=device) + seed * n, L, K, seed=0, epoch=0)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    all_tokens, all_pred = normal(n, L, D), normal(n, L, P)
    x = {
        "image": torch.randint(0, 256, (n, SIDE, SIDE, 3), generator=g, dtype=torch.uint8, device=device),
        "mean": mean, "std": std, "factor": 1 / (255 * std), "shift": -mean / std, "keep": keep, "hidden": hidden,
        "masked": torch.zeros(n, L, device=device).scatter_(1, hidden, 1.0),
        "all_tokens": all_tokens, "tokens": pick(all_tokens, keep), "all_pred": all_pred, "pred": pick(all_pred, hidden),
        "position": normal(L, D, dtype=torch.float32), "cls_row": normal(D, dtype=torch.float32),
        "student": normal(n, K, D_T),
        "codes": torch.randint(-127, 128, (n, L, D_T), generator=g, dtype=torch.int8, device=device),
        "scale": torch.rand(n, L, generator=g, device=device).half() / 100,
        "channel_mean": normal(D_T, dtype=torch.float32), "channel_std": normal(D_T, dtype=torch.float32).abs() + 0.5,
    }  # fmt: skip
    return x | {name: x[name].requires_grad_() for name in ("all_tokens", "tokens", "all_pred", "pred", "student")}


# Measurements, on top of measure.py.


def forward_and_backward(call: Callable[[Inputs], Tensor], leaf: str | None) -> Callable[[Inputs], Any]:
    def step(x: Inputs) -> Any:
        out = call(x)
        return (out,) if leaf is None else (out, *torch.autograd.grad(out, x[leaf], upstream(out)))

    return step


def upstream(out: Tensor) -> Tensor:
    return torch.ones_like(out) if out.ndim == 0 else torch.full_like(out, 0.5)


def exact(call: Callable[[Inputs], Tensor], x: Inputs) -> Tensor:
    """The stock operations on float64 copies of the inputs."""
    return call({k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in x.items()})


def relative_error(out: Tensor, truth: Tensor) -> float:
    return float((out.detach().double() - truth.double()).norm() / truth.double().norm())


def providers(
    stage: Stage, device: str, compiled: bool
) -> Iterator[tuple[str, Callable[[Inputs], Tensor], str | None]]:
    """Name, function and differentiated tensor of everything that computes a stage."""
    yield "stock eager", stage.stock, stage.stock_leaf
    if compiled:
        yield "stock compiled", torch.compile(stage.stock, fullgraph=True, dynamic=False), stage.stock_leaf
    yield "reference eager", lambda x: stage.ours(x, "torch"), stage.our_leaf
    if compiled:
        reference = torch.compile(lambda x: stage.ours(x, "torch"), fullgraph=True, dynamic=False)
        yield "reference compiled", reference, stage.our_leaf
    if device == "cuda":
        yield "triton", lambda x: stage.ours(x, "triton"), stage.our_leaf


def measure(
    stage: Stage, call: Callable[[Inputs], Tensor], leaf: str | None, mode: str, batches: list[Inputs], device: str, budget_s: float
) -> dict[str, Any]:  # fmt: skip
    """One row's numbers; backward is timed alone, on graphs built beforehand."""
    step = forward_and_backward(call, leaf if mode == "backward" else None)
    if mode == "backward":
        outs = [call(x) for x in batches]

        def run(i: int) -> Any:
            out, x = outs[i % len(outs)], batches[i % len(outs)]
            return torch.autograd.grad(out, x[leaf], upstream(out), retain_graph=True)
    else:

        def run(i: int) -> Any:
            with torch.no_grad() if leaf is None else nullcontext():
                return call(batches[i % len(batches)])

    p20, p50, p80 = time_ms(run, device, budget_s)
    first = tree_leaves(run(0))
    same = all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, tree_leaves(run(0))))
    minimal = stage.minimal(batches[0], mode)
    return {
        "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "gb_per_s": minimal / p50 / 1e6, "minimal_bytes": minimal,
        "peak_bytes": peak_bytes(step, batches[0], device), "repeatable": int(same),
    }  # fmt: skip


def stage_rows(
    name: str, n: int, device: str, *, compiled: bool, budget_s: float, first: bool
) -> Iterator[dict[str, Any]]:
    """Rows of one stage at one batch size. Bytes and errors do not depend on n: they are taken at the first one."""
    stage, batches = STAGES[name], [make_inputs(n, device, seed) for seed in range(3 if device == "cuda" else 1)]
    truth = exact(stage.stock, batches[0]).detach() if first else None
    for provider, call, leaf in providers(stage, device, compiled):
        eager = "compiled" not in provider and provider != "triton"
        moved = {}
        if eager and first:
            forward = moved_bytes(forward_and_backward(call, None), batches[0])
            moved = {"forward": forward}
            if leaf:
                moved["backward"] = moved_bytes(forward_and_backward(call, leaf), batches[0]) - forward
        for mode in ("forward", "backward") if leaf else ("forward",):
            row = {"kernel": name, "provider": provider, "mode": mode, "shape": f"n{n}"}
            row |= measure(stage, call, leaf, mode, batches, device, budget_s)
            row["moved_bytes"] = moved.get(mode, "")
            if mode == "forward":
                row["saved_bytes"] = saved_bytes(call, batches[0])
                row["error"] = relative_error(call(batches[0]), truth) if truth is not None else ""
            yield row


def transformer_row(n: int, device: str, budget_s: float) -> dict[str, Any]:
    """Forward and backward of encoder (12 x 768 on 50 tokens) and decoder (8 x 512 on 197): the rest of a step, bf16 autocast."""

    def blocks(depth: int, width: int, heads: int) -> torch.nn.Module:
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        return torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).to(device)

    encoder, decoder = blocks(12, D, 12), blocks(8, 512, 16)
    x, y = torch.randn(n, K + 1, D, device=device), torch.randn(n, L + 1, 512, device=device)

    def run(_: int) -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = encoder(x).float().square().mean() + decoder(y).float().square().mean()
        loss.backward()

    p20, p50, p80 = time_ms(run, device, budget_s)
    row = {"kernel": "transformers of the step", "provider": "torch eager bf16", "mode": "step", "shape": f"n{n}"}
    return row | {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def report(rows: list[dict[str, Any]]) -> None:
    """The short table: one line per stage, mode and provider, the ratio to the compiled reference (or eager) beside it."""
    click.echo(f"{'kernel':<26}{'mode':<10}{'shape':<8}{'provider':<20}{'ms':>9}{'GB/s':>9}{'% copy':>8}{'vs ref':>8}")
    for _, group in itertools.groupby(rows, lambda r: (r["kernel"], r["mode"], r["shape"])):
        members = list(group)
        base = [r["p50_ms"] for p in ("reference compiled", "reference eager") for r in members if r["provider"] == p]
        for r in members:
            ratio = f"{base[0] / r['p50_ms']:.2f}x" if base else ""
            speed, share = (f"{r[k]:.0f}" if k in r else "" for k in ("gb_per_s", "pct_copy"))
            click.echo(
                f"{r['kernel']:<26}{r['mode']:<10}{r['shape']:<8}{r['provider']:<20}{r['p50_ms']:>9.3f}{speed:>9}{share:>8}{ratio:>8}"
            )


def losers(rows: list[dict[str, Any]]) -> list[str]:
    """Where Triton is slower than the compiled reference, which `--kernels auto` then takes."""
    speed = {(r["kernel"], r["mode"], r["shape"], r["provider"]): r["p50_ms"] for r in rows}
    found = []
    for (*case, provider), ms in speed.items():
        compiled = speed.get((*case, "reference compiled"))
        if provider == "triton" and compiled is not None and ms > compiled:
            found.append(f"{' '.join(case)}: {ms:.3f} ms against {compiled:.3f} ms")
    return found


@click.command()
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: CUDA where there is a GPU."
)
@click.option(
    "-n", "sizes", type=int, multiple=True, help="Images per batch; repeatable. Default 64 256 1024 on CUDA, 8 on CPU."
)
@click.option("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's choice.")
@click.option("--compiled/--no-compiled", default=True, help="Also measure the compiled providers.")
@click.option("--budget-s", default=0.5, help="Seconds of repetitions per row.")
@click.option("--replace", is_flag=True, help="Drop older rows of the same device.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent / "results/kernels.csv",
    help="CSV to append to.",
)
def main(
    device: str, sizes: tuple[int, ...], threads: int, compiled: bool, budget_s: float, replace: bool, out: Path
) -> None:
    """Measure every kernel and append the rows to a CSV; the table comes last."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if threads:
        torch.set_num_threads(threads)
    sizes = sizes or ((64, 256, 1024) if device == "cuda" else (8,))
    rows = [copy_row(device, budget_s)]
    append(out, [rows[0] | machine(device)], instead_of=("device",) if replace else ())
    for name, n in itertools.product(STAGES, sizes):
        torch.compiler.reset()  # one function for all shapes and providers: else the compiler gives up after eight
        for row in stage_rows(name, n, device, compiled=compiled, budget_s=budget_s, first=n == sizes[0]):
            rows.append(row | {"pct_copy": 100 * row["gb_per_s"] / rows[0]["gb_per_s"]})
            click.echo(f"{name} {n} {row['provider']} {row['mode']}", err=True)
            append(out, [rows[-1] | machine(device)])  # at once: a run that is cut short keeps what it has
    rows.append(transformer_row(sizes[0] if device == "cuda" else 2, device, budget_s))
    append(out, [rows[-1] | machine(device)])
    report(rows)
    for line in losers(rows):
        click.echo(f"slower than the compiled reference: {line}")


if __name__ == "__main__":
    main()
