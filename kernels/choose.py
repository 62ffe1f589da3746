"""Which kernels a run takes on a device: each is tried against the reference in a process of its own, and the faster right one wins.

Nothing that a kernel does (a wrong number, another number the second time, a failing compilation, a crash, no answer) stops the run:
it is said, and the reference computes.
"""

import contextlib
import functools
import hashlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mrmae.kernels.calls import Calls

LIMIT_SECONDS = 120.0  # for one kernel, with its compilations
STARTING_SECONDS = 60.0  # for Python, torch and the device
TRIAL = (sys.executable, "-m", "mrmae.kernels.trial")


class NoAnswer(RuntimeError):
    """A trial takes too long."""


@dataclass(frozen=True)
class Choice:
    """Who computes each kernel of a run, why, and on which device that was found. failed: the kernels of these names went wrong."""

    device: str
    chosen: dict[str, str]
    why: dict[str, str] = field(default_factory=dict)
    failed: tuple[str, ...] = ()


def decided(found: Mapping[str, Any], *, compiled: bool) -> tuple[str, str, bool]:
    """("triton" or "torch", why, whether the kernel went wrong) from what a trial found, for a run that is compiled or is not."""
    if "wrong" in found:
        return "torch", found["wrong"], True
    seconds, mode = found["seconds"], "compiled" if compiled else "eager"
    other = "eager" if compiled else "compiled"
    if f"triton {mode}" not in seconds:
        return "torch", f"cannot be compiled ({found.get('not_compiled', 'not tried')})", True
    why = f"{_against(seconds, mode)} {mode}"
    if f"triton {other}" in seconds:
        why += f", {_against(seconds, other)} {other}"
    elif "not_compiled" in found:
        why += f"; cannot be compiled ({found['not_compiled']})"
    faster = seconds[f"triton {mode}"] < seconds[f"reference {mode}"]
    return "triton" if faster else "torch", why, False


def _against(seconds: Mapping[str, float], mode: str) -> str:
    """`0.12 ms against 0.3`."""
    return f"{1e3 * seconds[f'triton {mode}']:.3g} ms against {1e3 * seconds[f'reference {mode}']:.3g}"


def tried_on(
    calls: Calls,
    device: str,
    *,
    compiled: bool,
    name: str,
    trial: Sequence[str] = TRIAL,
    limit_s: float = LIMIT_SECONDS,
    starting_s: float = STARTING_SECONDS,
) -> Choice:
    """The choice for these calls on `device` (cuda:N), which is called `name`. compiled: whether the run is compiled."""
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for call in calls:
        by_kernel.setdefault(call["function"], []).append(call)
    found: dict[str, dict[str, Any]] = {}
    while left := {kernel: of for kernel, of in by_kernel.items() if kernel not in found}:
        found |= one_process({"device": device, "compiled": True, "calls": left}, trial, limit_s, starting_s)
    verdicts = {kernel: decided(of, compiled=compiled) for kernel, of in found.items()}
    return Choice(
        name,
        {kernel: who for kernel, (who, _, _) in verdicts.items()},
        {kernel: why for kernel, (_, why, _) in verdicts.items()},
        tuple(kernel for kernel, (_, _, wrong) in verdicts.items() if wrong),
    )


def one_process(
    asked: dict[str, Any], trial: Sequence[str], limit_s: float, starting_s: float
) -> dict[str, dict[str, Any]]:
    """What one process found, up to the kernel that ended it: of at least one kernel, of all where it never began."""
    kernels = list(asked["calls"])
    asked = asked | {"seconds": int(starting_s + limit_s * len(kernels)) + 1}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryFile() as errors, child(trial, errors) as process:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.close()
        at = None
        try:
            for line in lines_within(process.stdout, starting_s, limit_s):
                told = json.loads(line)
                at = told.get("begun", at)
                if "done" in told:
                    found[told.pop("done")] = told
            process.wait(timeout=limit_s)
            why = f"its process ended with {process.returncode}: {last_line(errors)}"
        except NoAnswer as error:
            why = str(error)
        except subprocess.TimeoutExpired:
            why = "its process does not end"
        except (ValueError, AttributeError) as error:
            why = f"its process gave an answer that cannot be read ({error})"
    unanswered = [kernel for kernel in kernels if kernel not in found]
    ended = unanswered if at is None else unanswered[:1]
    return found | {kernel: {"wrong": why} for kernel in ended}


@contextlib.contextmanager
def child(command: Sequence[str], errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards, whatever it does."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a device that is stuck keeps its process
            process.wait(timeout=5)
        for pipe in (process.stdin, process.stdout) if process.poll() is not None else ():
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


def lines_within(stream: IO[bytes], first_s: float, each_s: float) -> Iterator[bytes]:
    """The lines of a stream. Raises NoAnswer where the first or a further one takes longer than that."""
    lines: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    limit = first_s
    try:
        while (line := lines.get(timeout=limit)) is not None:
            yield line
            limit = each_s
    except queue.Empty:
        raise NoAnswer(f"no answer within {limit:g} s") from None


def last_line(errors: IO[bytes]) -> str:
    """The last line that a process wrote to stderr."""
    errors.seek(0)
    text = errors.read().decode(errors="replace").strip()
    return text.splitlines()[-1][:200] if text else "it said nothing"


@functools.cache
def kernels_hash() -> str:
    """Of the source of the kernels and their reference: another text may be faster, or wrong."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key_of(calls: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Hash of all that a choice depends on: the calls, and what `about` says of device, versions and mode."""
    return hashlib.sha256(json.dumps([list(calls), dict(about)], sort_keys=True).encode()).hexdigest()
