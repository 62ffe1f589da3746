"""examples/slurm.sh with SLURM's commands stubbed: pre-emption saves the run and queues it again, an error does not."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mrmae.train.log import read_rows

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
RECIPE = (
    "student.model=test_vit",
    "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
    "optim.epochs=5000",
    "optim.batch_size=4",
    "optim.warmup_epochs=1",
)
STUBS = {
    "srun": '#!/bin/sh\nexec "$@"\n',
    "scontrol": '#!/bin/sh\n[ "$1" = show ] && echo localhost && echo other || echo "$*" >> "$ASKED"\n',
    "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
}
Submit = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """`submit(*arguments, **stubs)`: the script as a job of two processes on one node; its output goes to tmp_path/said."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str, job: int = 77, **stubs: str) -> subprocess.Popen[bytes]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in {**STUBS, **stubs}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        environment = {
            **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "ASKED": str(tmp_path / "asked"),
            "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
        }  # fmt: skip
        with open(tmp_path / "said", "w") as said:
            started.append(subprocess.Popen(["bash", str(SCRIPT), *arguments], stdout=said, stderr=said, env=environment,
                                            start_new_session=True))  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """A port in 30000 to 39999 that nobody listens on now."""
    for port in random.sample(range(30000, 40000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("localhost", port))
            return port
    raise AssertionError("no free port")


def test_a_pre_empted_job_saves_its_run_and_is_queued_again(tiny_cache: Path, tmp_path: Path, submit: Submit) -> None:
    out = tmp_path / "out"
    sets = [word for text in RECIPE for word in ("--set", text)]
    number = free_port() - 30000  # the job's number decides on its port
    job = submit(
        str(tiny_cache), str(out), *sets, "--device", "cpu", "--panels-every", "0", "--log-every", "1", job=number
    )
    end = time.monotonic() + 150
    while len(read_rows(out / "log.jsonl")) < 3 and job.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    status = job.wait(120)
    text = (tmp_path / "said").read_text()
    assert status == 0 and (tmp_path / "asked").read_text() == f"requeue {number}\n", text
    assert "= 2 processes x 1 micro-batch x 2" in text, text
    assert "stopped by SIGUSR1 after update" in text and "torchrun --nproc-per-node N" in text, text
    assert list((out / "checkpoints").glob("step-*.pt")), text


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_that_ends_by_itself_is_not_queued_again(tmp_path: Path, submit: Submit, status: int) -> None:
    job = submit(
        "CACHE", "OUT DIR", "--epochs", "3", torchrun=f'#!/bin/sh\nfor word; do echo "<$word>"; done\nexit {status}\n'
    )
    assert job.wait(30) == status and not (tmp_path / "asked").exists()
    words = (tmp_path / "said").read_text().splitlines()
    assert words[words.index("<-m>") :] == ["<-m>", "<mrmae.train.cli>", "<CACHE>", "<OUT DIR>", "<--epochs>", "<3>"]
    told = {
        name: words[words.index(f"<--{name}>") + 1] for name in ("nnodes", "nproc-per-node", "rdzv-endpoint", "rdzv-id")
    }
    assert told == {"nnodes": "<1>", "nproc-per-node": "<2>", "rdzv-endpoint": "<localhost:30077>", "rdzv-id": "<77>"}
