"""Processes that need not import torch and timm: forked from one that has imported them, and done nothing else.

`python warm.py serve NAME OWNER` is that process, with one thread and the imports of benchmarks/zygote.py; it ends when the process OWNER does. NAME is a socket's.
`python warm.py NAME -m MODULE|-c CODE|FILE ARGUMENTS...` is what `python -m MODULE ARGUMENTS...` would be, with its own
folder, environment and open files, but for the imports. Signals are passed on, and it ends as the forked process does; where it is
killed, so is that. Linux's only, like everything here that forks.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ask(name: str, words: list[str]) -> int:
    """Have the words run, and wait: the exit status, or the negative number of the signal that ended it."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"\0{name}")
    asked = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
    files = array.array("i", (0, 1, 2))
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # none is lost before the process is there
    server.sendmsg([len(asked).to_bytes(4)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    server.sendall(asked)
    told = server.makefile("r")
    pid = int(told.readline())
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    return int(told.readline())


def serve(name: str, owner: int) -> None:
    """Fork for whoever asks, until the owner ends. Says when it is ready."""
    importlib.import_module("torch.utils.tensorboard")
    sys.path.append(str(BENCHMARKS))
    importlib.import_module("zygote").import_everything()
    sys.path.remove(str(BENCHMARKS))
    gc.collect()
    gc.freeze()
    wakes, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"\0{name}")
    listening.listen(64)
    print("ready", flush=True)
    watched = selectors.DefaultSelector()
    alive = os.pidfd_open(owner)
    for file in (wakes, listening, alive):
        watched.register(file, selectors.EVENT_READ)
    clients: dict[int, socket.socket] = {}
    while True:
        for key, _ in watched.select():
            if key.fileobj == alive:
                for pid in clients:
                    os.kill(pid, signal.SIGKILL)
                return
            if key.fileobj is listening:
                client, _ = listening.accept()
                pid = forked_for(client)
                clients[pid] = client
                watched.register(client, selectors.EVENT_READ, pid)
            elif key.fileobj == wakes:
                os.read(wakes, 4096)
                ended(clients, watched)
            elif key.data in clients:  # the client is gone
                os.kill(key.data, signal.SIGKILL)
                watched.unregister(key.fileobj)


def ended(clients: dict[int, socket.socket], watched: selectors.BaseSelector) -> None:
    """Tell the clients of processes that have ended how they did."""
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        client = clients.pop(pid)
        if client in watched.get_map():
            watched.unregister(client)
            with contextlib.suppress(OSError):  # it is gone
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        client.close()


def forked_for(client: socket.socket) -> int:
    """The id of a process that runs what a client asks for."""
    size, ancillary, *_ = client.recvmsg(4, socket.CMSG_SPACE(12))
    files = array.array("i", ancillary[0][2] if ancillary else b"")
    asked = bytearray()
    while len(asked) < int.from_bytes(size) and (more := client.recv(1 << 20)):
        asked += more
    if pid := os.fork():
        for file in files:
            os.close(file)
        with contextlib.suppress(OSError):  # it is gone, which is noticed where its end is read
            client.sendall(f"{pid}\n".encode())
        return pid
    code = 1
    try:
        words, folder, environment = json.loads(asked)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *PASSED_ON):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for to, file in enumerate(files):
            os.dup2(file, to)
        os.closerange(3, 1 << 16)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = ran(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ran(words: list[str]) -> int:
    """Run as `python WORDS...` does; the exit status."""
    import atexit
    import runpy
    import threading
    import warnings

    warnings.filterwarnings(
        "ignore", category=RuntimeWarning, module="runpy"
    )  # that a module to run is imported already
    kind, *rest = words
    try:
        if kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(kind))
            runpy.run_path(kind, run_name="__main__")
        return 0
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # as a process ends: other threads first, then what was registered
        atexit._run_exitfuncs()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    elif (code := ask(sys.argv[1], sys.argv[2:])) < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    else:
        sys.exit(code)
