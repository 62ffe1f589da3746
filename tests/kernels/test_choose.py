"""The faster right kernel is chosen; what crashes, hangs, lies or says nothing is said aloud and the reference computes."""

import sys
from typing import Any

import pytest

from mrmae.kernels import choose
from mrmae.kernels.calls import Calls

FAST = {"reference eager": 4e-4, "triton eager": 1e-4, "reference compiled": 2e-4, "triton compiled": 3e-4}
CASES: dict[str, tuple[dict[str, Any], bool, tuple[str, bool]]] = {
    "faster eager": ({"seconds": FAST}, False, ("triton", False)),
    "slower compiled": ({"seconds": FAST}, True, ("torch", False)),
    "as fast": ({"seconds": dict.fromkeys(FAST, 1e-4)}, True, ("torch", False)),
    "wrong": ({"wrong": "output is off"}, False, ("torch", True)),
    "no compiled form, eager run": (
        {"seconds": {k: v for k, v in FAST.items() if k != "triton compiled"}, "not_compiled": "why"},
        False,
        ("triton", False),
    ),
    "no compiled form, compiled run": (
        {"seconds": {k: v for k, v in FAST.items() if k != "triton compiled"}, "not_compiled": "why"},
        True,
        ("torch", True),
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_the_faster_right_one_is_chosen(what: str) -> None:
    found, compiled, (expected, failed) = CASES[what]
    who, why, wrong = choose.decided(found, compiled=compiled)
    assert (who, wrong) == (expected, failed)
    if "seconds" in found and not wrong:
        assert ("0.3 ms against 0.2 compiled" in why) or "0.1 ms against" in why
    if "not_compiled" in found:
        assert "cannot be compiled (why)" in why


# A child answers for each kernel it is asked about, by name. Python without site packages: it begins in 20 ms.
CHILD = """
import json, os, sys, time
asked = json.loads(sys.stdin.readline())
assert asked["seconds"] >= 1 and asked["device"] == "cuda:0" and asked["compiled"]
for kernel in asked["calls"]:
    print(json.dumps({"begun": kernel}), flush=True)
    if kernel == "crashing":
        print("illegal memory access", file=sys.stderr, flush=True)
        os.abort()
    if kernel == "hanging":
        time.sleep(60)
    if kernel == "babbling":
        print("what?", flush=True)
    if kernel == "leaving":
        sys.exit(0)
    print(json.dumps({"done": kernel, "seconds": {"reference eager": 2.0, "triton eager": 1.0}}), flush=True)
"""


def choice_among(*kernels: str, child: str = CHILD) -> choose.Choice:
    calls = Calls({"function": kernel, "tensors": [], "how": {}} for kernel in kernels)
    command = [sys.executable, "-S", "-E", "-c", child]
    return choose.tried_on(calls, "cuda:0", compiled=False, name="a GPU", trial=command, limit_s=0.8, starting_s=20)


def test_what_crashes_hangs_or_babbles_costs_only_itself() -> None:
    choice = choice_among("first", "crashing", "hanging", "babbling", "leaving", "last")
    assert choice.chosen == {"first": "triton", "last": "triton"} | dict.fromkeys(choice.failed, "torch")
    assert choice.failed == ("crashing", "hanging", "babbling", "leaving") and choice.device == "a GPU"
    assert choice.why["crashing"] == "its process ended with -6: illegal memory access"
    assert choice.why["hanging"] == "no answer within 0.8 s"
    assert choice.why["babbling"].startswith("its process gave an answer that cannot be read")
    assert choice.why["leaving"] == "its process ended with 0: it said nothing"
    assert choice.why["first"] == "1e+03 ms against 2e+03 eager"


def test_a_process_that_never_begins_leaves_all_to_the_reference_at_once() -> None:
    choice = choice_among("one", "two", child="import sys; sys.exit('no such device')")
    assert choice.chosen == {"one": "torch", "two": "torch"}
    assert choice.why == dict.fromkeys(("one", "two"), "its process ended with 1: no such device")


def test_calls_of_one_kernel_are_tried_together() -> None:
    child = CHILD.replace("for kernel in", "assert len(asked['calls']['one']) == 2\nfor kernel in")
    assert choice_among("one", "two", "one", child=child).failed == ()


def test_a_key_depends_on_calls_versions_and_source() -> None:
    calls = Calls([{"function": "one"}])
    keys = {choose.key_of(c, about) for c in (calls, [*calls, *calls]) for about in ({"torch": "1"}, {"torch": "2"})}
    assert len(keys) == 4 and choose.key_of(calls, {"torch": "1"}) in keys
    assert len(choose.kernels_hash()) == 64
