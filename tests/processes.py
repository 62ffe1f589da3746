"""Other processes in tests: children of this one, which need import nothing, and holders of locks."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def elsewhere(file: Path, *, shared: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until the end; killed then."""
    script = f"""
from pathlib import Path
from mrmae.shards import claims
claim = claims.take(Path({str(file)!r}), shared={shared})
print("holds", flush=True)
import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def forked(work: Callable[[], object]) -> int:
    """The id of a child that does this and ends with 0, with 1 where it fails."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the parent's threads did not come along
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ends(pids: list[int], seconds: float = 90) -> list[int]:
    """Exit statuses of children; those that hang are killed."""
    codes: dict[int, int] = {}

    def done() -> bool:
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            codes.update({pid: os.waitstatus_to_exitcode(status)} if ended else {})
        return len(codes) == len(pids)

    wait_until(done, seconds)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [codes[pid] for pid in pids]


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
