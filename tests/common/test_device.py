"""What a process tells the system about itself; seen in a process of its own, since it lasts."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from mrmae.common.device import be_a_batch_job

ASKED = """
import ctypes, os
from unittest import mock
from mrmae.common.device import be_a_batch_job
libc, asked = ctypes.CDLL(None), []
told = mock.Mock(mallopt=lambda *what: asked.append((*what, libc.mallopt(*what))))
with mock.patch("ctypes.CDLL", lambda _: told):
    be_a_batch_job("cpu")
print(asked, os.sched_getscheduler(0), sep=";")
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="Linux's and glibc's")
def test_a_batch_job_keeps_its_memory_and_says_so_to_the_scheduler() -> None:
    before = os.sched_getscheduler(0)
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=True, timeout=120)
    asked, scheduler = done.stdout.split(";")
    assert asked == "[(-1, 1073741824, 1), (-3, 33554432, 1)]", "1: glibc took it"
    if before == os.SCHED_OTHER:
        assert int(scheduler) in (os.SCHED_BATCH, os.SCHED_OTHER), "some containers forbid it"


def test_beside_a_gpu_the_process_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: pytest.fail("was changed"))
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_OTHER)
    for device in ("auto", "cuda", "cuda:1"):
        be_a_batch_job(device)
