"""A kernel is tried: stand-ins on the CPU that are right, lie, differ from call to call, fail, or fail to compile."""

import io
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mrmae.kernels import dispatch, mimic, reference, trial
from mrmae.kernels.calls import Calls

B, N, D, L = 2, 3, 8, 6
CPU = torch.device("cpu")
counter = itertools.count()


def right(student: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return reference.mimic_loss(student, codes, *rest[:-3], target=rest[-3], distance=rest[-2], beta=rest[-1])


def failing(*_: Any) -> Tensor:
    raise RuntimeError("illegal instruction\nand more")


def lying_backward(*arguments: Any) -> Tensor:
    class Lie(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 1.001

    return Lie.apply(right(*arguments))  # type: ignore[no-any-return, no-untyped-call]


STAND_INS: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "right": (right, None),
    "one value of many is wrong": (
        lambda *a: right(*a) + torch.eye(N)[:B] * 0.01,
        r"output is off by .* \(RMS, relative to float64\)",
    ),
    "wrong gradient": (lying_backward, r"gradient 1 is off by 0.001 \(RMS"),
    "not a number": (lambda *a: right(*a) * float("nan"), r"output is off by nan"),
    "another dtype": (lambda *a: right(*a).double(), r"torch.float64, the reference's \[2, 3\] torch.float32"),
    "other bits each time": (lambda *a: right(*a) * (1 + 1e-7 * (next(counter) % 2)), "a second call gave other bits"),
    "failing": (failing, "RuntimeError: illegal instruction$"),
}


def mimic_calls() -> Calls:
    """A call as a run makes it."""
    calls = Calls()
    student = torch.randn(B, N, D, requires_grad=True)
    codes, ids = torch.randint(-9, 9, (B, L, D), dtype=torch.int8), torch.tensor([[0, 2, 5], [1, 3, 4]])
    dispatch.mimic_loss(student, codes, ids, channel_std=torch.ones(D), l=L, kernels=calls)
    return calls


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Puts a function in the place of the mimic kernel, on the CPU."""
    monkeypatch.setattr(dispatch, "use_triton", lambda where, kernels, *_: kernels == "triton")
    return lambda function: monkeypatch.setattr(mimic, "mimic_loss", function)


@pytest.mark.parametrize("what", STAND_INS)
def test_a_kernel_that_is_not_right_is_told_from_one_that_is(what: str, stand_in: Any) -> None:
    function, message = STAND_INS[what]
    stand_in(function)
    found = tell_all({"mimic_loss": mimic_calls()}, compiled=False)[1]
    if message is None:
        assert set(found["seconds"]) == {"reference eager", "triton eager"} and min(found["seconds"].values()) > 0
    else:
        assert "seconds" not in found
        assert re.search(message, found["wrong"]), found


def tell_all(calls: dict[str, Any], *, compiled: bool) -> list[dict[str, Any]]:
    """What the process answers, without the process."""
    asked = json.dumps({"device": "cpu", "calls": calls, "compiled": compiled, "seconds": 50}) + "\n"
    out, patch = io.StringIO(), pytest.MonkeyPatch()
    with patch.context() as now:
        now.setattr(sys, "stdin", io.StringIO(asked))
        now.setattr(os, "dup2", lambda *_: None)
        now.setattr(os, "fdopen", lambda *_: out)
        now.setattr(signal, "alarm", lambda _: None)
        now.setattr(trial, "ROUND_SECONDS", 0.0)
        trial.main()
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_what_cannot_be_compiled_is_said_and_the_eager_kernel_still_timed(stand_in: Any) -> None:
    stand_in(right)
    made = mimic_calls()

    def compiler(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compiled(*tensors: Tensor, kernels: str, **how: Any) -> Tensor:
            if kernels == "triton":
                raise RuntimeError("no such instruction")
            return function(*tensors, kernels=kernels, **how)

        return compiled

    found = trial.tried(made, CPU, compiler)
    assert set(found["seconds"]) == {"reference eager", "triton eager", "reference compiled"}
    assert found["not_compiled"] == "RuntimeError: no such instruction"
    assert set(trial.tried(made, CPU, lambda f: f)["seconds"]) == {
        f"{who} {mode}" for who in ("reference", "triton") for mode in ("eager", "compiled")
    }


def test_each_arm_takes_its_turn() -> None:
    seen: list[str] = []
    arms: dict[str, trial.Arm] = {name: lambda name=name: seen.append(name) or [] for name in "ab"}  # type: ignore[misc]
    times = trial.seconds_of_arms(arms, CPU, rounds=3)
    assert [name for name, _ in itertools.groupby(seen)] == ["a", "b"] * 5 and set(times) == {"a", "b"}


def test_a_patch_of_one_colour_is_no_mistake() -> None:
    """Where the reference itself is far from float64, a kernel may be as far."""
    truth = [torch.ones(100, dtype=torch.float64)]
    off, same = [torch.full((100,), 1.00002)], [torch.full((100,), 1.000015)]
    assert trial.mismatch(off, [torch.ones(100)], truth) is not None
    assert trial.mismatch(off, same, truth) is None


STAND_IN = """
import sys, torch
from mrmae.kernels import dispatch, reference, mimic, pixels, trial
dispatch.use_triton = lambda where, kernels, *_: kernels == "triton"
torch.compile = lambda function, **_: function
def crash(*_):
    import os
    os.abort()
pixels.embed_tokens = crash
trial.ROUND_SECONDS = 0.0
trial.main()
"""


@pytest.mark.soak
def test_a_crash_in_a_process_of_its_own_costs_that_kernel_only(tmp_path: Path) -> None:
    from mrmae.kernels.choose import tried_on

    (tmp_path / "stand_in.py").write_text(STAND_IN)
    calls = mimic_calls()
    dispatch.embed_tokens(
        torch.randn(B, N, D), torch.randn(L, D), torch.randn(D), torch.zeros(B, N).long(), kernels=calls
    )
    calls.reverse()  # the one that crashes comes first
    choice = tried_on(
        calls, "cpu", compiled=True, name="a stand-in", trial=[sys.executable, str(tmp_path / "stand_in.py")]
    )
    assert choice.failed == ("embed_tokens",) and choice.why["embed_tokens"].startswith("its process ended with -6")
    assert " eager" in choice.why["mimic_loss"] and set(choice.chosen) == {"embed_tokens", "mimic_loss"}
