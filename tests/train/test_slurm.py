"""examples/slurm*.sh with SLURM's commands stubbed, and the Kubernetes job as processes: what is done is kept, work is shared."""

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from mrmae.shards.manifest import read_manifest
from mrmae.train.log import read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
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
    "torchrun": f'#!/bin/sh\nPYTHON_EXEC="$(dirname "$0")/python-of-a-rank" exec {sys.executable} -m torch.distributed.run "$@"\n',
    # The first rank imports all it needs; the others have it. torchrun says -u.
    "python-of-a-rank": f'#!/bin/sh\n[ "$LOCAL_RANK" = 0 ] && exec {sys.executable} "$@"\nshift\nexec WARM "$@"\n',
    "extract-features": '#!/bin/sh\nexec WARM -m mrmae.extract.cli "$@"\n',
}
Submit = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def submit(tmp_path: Path, warm: list[str]) -> Iterator[Submit]:
    """`submit(*arguments, **stubs)`: a script as a job of two processes on one node; its output goes to tmp_path/said.

    array: the task's number and how many there are.
    """
    started: list[subprocess.Popen[bytes]] = []

    def run(
        *arguments: str, job: int = 77, script: str = "slurm.sh", array: tuple[int, int] | None = None, **stubs: str
    ) -> subprocess.Popen[bytes]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in {**STUBS, **stubs}.items():
            text = text.replace("WARM", shlex.join(warm))
            if not (folder / name).exists() or (folder / name).read_text() != text:  # another job may be running it
                (folder / name).write_text(text)
                (folder / name).chmod(0o755)
        environment = {
            **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "ASKED": str(tmp_path / "asked"),
            "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
        }  # fmt: skip
        if array is not None:
            number, of = map(str, array)
            environment |= {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_COUNT": of}
        with open(tmp_path / "said", "w") as said:
            started.append(subprocess.Popen(["bash", str(EXAMPLES / script), *arguments], stdout=said, stderr=said, env=environment,
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


OPTIONS = "--size 32 --grid 4 --teacher vit=timm:test_vit/random --device cpu --shard-samples 4".split()


@pytest.fixture
def images(tiny_images: dict[str, bytes], tmp_path: Path) -> Path:
    for key, data in list(tiny_images.items())[:8]:
        (tmp_path / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / key).write_bytes(data)
    return tmp_path / "images"


def test_tasks_of_an_array_share_an_extraction_and_all_see_it_finished(
    images: Path, tmp_path: Path, submit: Submit
) -> None:
    cache = tmp_path / "the cache"
    tasks = [
        submit(str(images), str(cache), *OPTIONS, script="slurm-extract.sh", array=(number, 2)) for number in (0, 1)
    ]
    assert [task.wait(150) for task in tasks] == [0, 0], (tmp_path / "said").read_text()
    assert read_manifest(cache)["n_valid"] == 8 and not (tmp_path / "asked").exists()


def test_pods_of_a_kubernetes_job_share_an_extraction(images: Path, tmp_path: Path, warm: list[str]) -> None:
    """The example's own words as two processes, with its paths and teacher exchanged for small ones; the first is the installed command."""
    spec = yaml.safe_load((EXAMPLES / "kubernetes-extract.yaml").read_text())["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["completionMode"] == "Indexed" and container["command"] == ["extract-features"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    folder, cache, teacher, *options = container["args"]
    assert {f"/{Path(word).parts[1]}" for word in (folder, cache)} < mounted and teacher == "--teacher"
    words = [str(images), str(tmp_path / "c"), *options[1:], *OPTIONS]
    programs = [[str(Path(sys.executable).with_name("extract-features"))], [*warm, "-m", "mrmae.extract.cli"]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pods = [
        subprocess.Popen(
            [*program, *words], env={**environment, "JOB_COMPLETION_INDEX": str(i)}, stderr=subprocess.DEVNULL
        )
        for i, program in enumerate(programs)
    ]
    try:
        assert [pod.wait(150) for pod in pods] == [0, 0]
    finally:
        for pod in pods:
            pod.kill()
    manifest = read_manifest(tmp_path / "c")
    assert manifest["n_views"] == 2 and manifest["n_valid"] == 8


def test_a_pre_empted_task_is_queued_again_and_one_that_fails_is_not(tmp_path: Path, submit: Submit) -> None:
    busy = '#!/bin/sh\necho "<$*>"\nsleep 60 & wait $!\n'
    job = submit("IMAGES", "CACHE", script="slurm-extract.sh", array=(3, 8), **{"extract-features": busy})
    end = time.monotonic() + 30
    while not (tmp_path / "said").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0 and (tmp_path / "asked").read_text() == "requeue 70_3\n"
    assert (tmp_path / "said").read_text().splitlines()[0] == "<IMAGES CACHE>"
    (tmp_path / "asked").unlink()
    failing = {"extract-features": "#!/bin/sh\nexit 1\n"}
    assert submit("IMAGES", "CACHE", script="slurm-extract.sh", array=(3, 8), **failing).wait(30) == 1
    assert not (tmp_path / "asked").exists()
