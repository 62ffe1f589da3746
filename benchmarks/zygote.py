"""Commands in forks of this process, which imports everything once; each fork ends as an interpreter does.

A job is a line of JSON on stdin: the command's words and where its stdout and stderr go; its status (negative for a signal, 124
where it was killed for its time) is the answer, a line. A fork leaves the loop and runs the command at this module's top level,
so that threads, exit handlers and the destructors of libraries have their turn: nothing is cut short.
"""

import gc
import importlib
import json
import os
import select
import signal
import sys
from pathlib import Path

MAINS = {"extract-features": "mrmae.extract.cli", "inspect-cache": "mrmae.extract.inspect.cli",
         "train-mrmae": "mrmae.train.cli", "probe-features": "mrmae.probe.cli", "show-features": "mrmae.probe.show_cli"}  # fmt: skip
LATE = ("extract.inspect.compare", "extract.inspect.pictures", "extract.run", "extract.teachers.open_clip",
        "extract.teachers.timm", "probe.run", "probe.show", "train.loop")  # fmt: skip
JEMALLOC = "jemalloc_bg_thd"  # of an allocator that Arrow brings and does not use; it forks well
SECONDS = 300  # of one run, at most


def import_everything() -> None:
    """Import what commands need. RuntimeError where that started a thread, which would be missing in a fork."""
    for module in (*MAINS.values(), *(f"mrmae.{name}" for name in LATE)):
        importlib.import_module(module)
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    if len(threads) - threads.count(JEMALLOC) != 1:
        raise RuntimeError(f"threads after imports: {threads}; expected only the first; set OPENBLAS_NUM_THREADS=1")


def words_of_next() -> list[str]:
    """The words of a job, in the fork that is to run it; this process itself ends with its input."""
    for line in iter(sys.stdin.readline, ""):
        words, *files = json.loads(line)
        if not (pid := os.fork()):
            for target, file in enumerate((os.devnull, *files)):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), target)
            return list(words)
        print(status_of(pid), flush=True)
    raise SystemExit


def status_of(pid: int) -> int:
    """Wait for a fork."""
    watch = os.pidfd_open(pid)
    in_time, _, _ = select.select([watch], [], [], SECONDS)
    os.close(watch)
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if in_time else 124


if __name__ == "__main__":
    import_everything()
    gc.freeze()  # nor are imports collected in every fork: 0.5 s of a CPU instead of 1.7
    sys.argv = words_of_next()
    sys.modules[MAINS[sys.argv[0]]].main()
