"""Kernels against their reference on this device: is each right, and how fast is it. `choose.py` runs this as a process of its own:

a kernel that crashes or hangs takes only that process with it. stdin: one JSON object, `device`, `calls` by kernel and `compiled`
(whether to compile, too); stdout: a JSON line before each kernel, and one with what was found.
"""

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mrmae.kernels import dispatch
from mrmae.kernels.calls import Remade, remade

# Relative RMS error against float64, and ten times that of the RMS for a single value: rounding at the store, not more. A reference
# that is further off than this itself (a patch of one colour divides rounding errors by almost nothing) allows twice its own.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
TURNS, ROUND_SECONDS = 7, 0.02
Arm = Callable[[], list[Tensor]]


def outputs_of(call: Remade, kernels: str, function: Callable[..., Tensor]) -> list[Tensor]:
    """What a call gives, and the gradient of each tensor that wants one, for random upstream numbers."""
    out = function(*call.tensors, **call.how, kernels=kernels)
    leaves = [x for x in (*call.tensors, *call.how.values()) if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return [out]
    draw = torch.Generator(out.device).manual_seed(1)
    upstream = torch.randn(out.shape, generator=draw, device=out.device)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def in_float64(call: Remade) -> Remade:
    """The same call with every float in 64 bits; the dtype that is asked for too."""

    def widened(x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return torch.float64
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().double().requires_grad_(x.requires_grad)
        return x

    return Remade(call.function, [widened(x) for x in call.tensors], {k: widened(x) for k, x in call.how.items()})


def distances(ours: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative RMS error, and the worst value's in units of the truth's RMS."""
    off, rms = ours.double() - truth, truth.square().mean().sqrt().clamp_min(1e-30)
    return float(off.square().mean().sqrt() / rms), float(off.abs().max() / rms)


def mismatch(ours: Sequence[Tensor], reference: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """How `ours` differs from the truth by more than rounding and more than the reference does; None where it doesn't."""
    for name, mine, its, exact in zip(["output", *(f"gradient {i}" for i in range(1, 9))], ours, reference, truth):
        if mine.shape != its.shape or mine.dtype != its.dtype:
            return f"{name} is {list(mine.shape)} {mine.dtype}, the reference's {list(its.shape)} {its.dtype}"
        least = ROUNDING[mine.dtype]
        for kind, found, allowed, factor in zip(
            ("RMS", "one value"), distances(mine, exact), distances(its, exact), (1, 10)
        ):
            limit = max(factor * least, 2 * allowed)
            if not found <= limit:  # NaN too
                return f"{name} is off by {found:.2g} ({kind}, relative to float64); at most {limit:.2g} was expected"
    return None


def fault_in(calls: Sequence[Remade], function: Callable[..., Tensor]) -> str | None:
    """What is wrong with the kernel called through `function`; None where nothing is. Every call runs twice, for the same bits."""
    for call in calls:
        ours = outputs_of(call, "triton", function)
        plain = getattr(dispatch, call.function)
        truth = outputs_of(in_float64(call), "torch", plain)
        if wrong := mismatch(ours, outputs_of(call, "torch", plain), truth):
            return wrong
        if not all(torch.equal(a, b) for a, b in zip(ours, outputs_of(call, "triton", function))):
            return "a second call gave other bits"
    return None


def seconds_of_arms(arms: Mapping[str, Arm], device: torch.device, rounds: int = TURNS) -> dict[str, float]:
    """The median seconds of each arm; in every round each takes its turn, as often as fills `ROUND_SECONDS`."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    repeats = {name: 1 for name in arms}
    for turn in range(-2, rounds):  # the first two warm up, and say how often to repeat
        for name, arm in arms.items():
            start = settled_at(device)
            for _ in range(repeats[name]):
                arm()
            seconds = (settled_at(device) - start) / repeats[name]
            repeats[name] = max(1, min(100, int(ROUND_SECONDS / max(seconds, 1e-9))))
            times[name] += [seconds] if turn >= 0 else []
    return {name: statistics.median(values) for name, values in times.items()}


def settled_at(device: torch.device) -> float:
    """The time, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def arm_of(calls: Sequence[Remade], kernels: str, function: Callable[..., Tensor]) -> Arm:
    """Forward and backward of all of a kernel's calls."""
    return lambda: [x for call in calls for x in outputs_of(call, kernels, function)]


def tried(
    calls: Sequence[Mapping[str, Any]],
    device: torch.device,
    compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None,
) -> dict[str, Any]:
    """One kernel's finding: `wrong`, or `seconds` by provider and mode; `not_compiled`, why its compiled form has none.

    compiled: makes a function its compiled one; None: nothing is compiled.
    """
    made = [remade(call, device, seed) for seed, call in enumerate(calls)]
    plain = getattr(dispatch, made[0].function)
    if wrong := fault_in(made, plain):
        return {"wrong": wrong}
    found: dict[str, Any] = {}
    arms = {"reference eager": arm_of(made, "torch", plain), "triton eager": arm_of(made, "triton", plain)}
    if compiled is not None:
        fast = compiled(plain)
        arm_of(made, "torch", fast)()  # what fails here fails in the run, too: it is not the kernel's fault
        arms["reference compiled"] = arm_of(made, "torch", fast)
        try:
            if wrong := fault_in(made, fast):
                return {"wrong": f"compiled, {wrong}"}
            arms["triton compiled"] = arm_of(made, "triton", fast)
        except Exception as error:
            found["not_compiled"] = first_words(error)
    return found | {"seconds": seconds_of_arms(arms, device)}


def first_words(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def tell(out: Any, **values: Any) -> None:
    """One line."""
    out.write(json.dumps(values) + "\n")
    out.flush()


def main() -> None:
    """Try what stdin asks for; the answers are the only thing on stdout."""
    asked = json.loads(sys.stdin.readline())
    signal.alarm(int(asked["seconds"]))  # whoever asked may be gone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = torch.device(asked["device"])
    torch._dynamo.config.recompile_limit = 1024
    for kernel, calls in asked["calls"].items():
        tell(answers, begun=kernel)
        torch.compiler.reset()
        try:
            compiled = (lambda f: torch.compile(f, fullgraph=True, dynamic=False)) if asked["compiled"] else None
            found = tried(calls, device, compiled)
        except Exception as error:
            found = {"wrong": first_words(error)}
        tell(answers, done=kernel, **found)


if __name__ == "__main__":
    main()
