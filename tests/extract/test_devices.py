"""What a process tells the system about itself."""

import os
import platform
import resource
import sys

import pytest
import torch

from mrmae.extract.devices import be_a_batch_job

STEPS, MEGABYTES = 20, 8


def faults_of_steps() -> int:
    """Pages that the system had to give for tensors that come and go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(STEPS):
        torch.ones(MEGABYTES << 18).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_batch_job_keeps_the_memory_of_its_tensors() -> None:
    be_a_batch_job("cpu")
    faults_of_steps()
    assert faults_of_steps() < STEPS * (MEGABYTES << 8) / 10, "of as many pages as the tensors have, 4 KiB each"


@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_BATCH is Linux's")
def test_a_batch_job_says_so_to_the_scheduler() -> None:
    before = os.sched_getscheduler(0)
    be_a_batch_job("cpu")
    assert os.sched_getscheduler(0) == (os.SCHED_BATCH if before == os.SCHED_OTHER else before)


def test_beside_a_gpu_the_process_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: pytest.fail("was changed"))
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_OTHER)
    for device in ("auto", "cuda", "cuda:1"):
        be_a_batch_job(device)
