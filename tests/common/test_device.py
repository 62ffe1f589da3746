"""What a process tells the system about itself; seen in a process of its own, since it lasts."""

import platform
import subprocess
import sys

import pytest
import timm
import torch

from mrmae.common.device import keep_memory, without_numbers

ASKED = """
import ctypes
from unittest import mock
from mrmae.common.device import keep_memory
libc, asked = ctypes.CDLL(None), []
told = mock.Mock(mallopt=lambda *what: asked.append((*what, libc.mallopt(*what))))
with mock.patch("ctypes.CDLL", lambda _: told):
    keep_memory("cpu")
print(asked)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="Linux's and glibc's")
def test_a_process_on_a_cpu_keeps_its_memory(warm: list[str]) -> None:
    done = subprocess.run([*warm, "-c", ASKED], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[(-1, 1073741824, 1), (-3, 33554432, 1)]", "1: glibc took it"


def test_beside_a_gpu_the_process_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("was changed"))
    for device in ("auto", "cuda", "cuda:1"):
        keep_memory(device)


def test_a_model_without_numbers_has_the_shapes_of_one_with_and_is_frozen_as_that() -> None:
    def built() -> dict[str, tuple[torch.Size, bool]]:
        model = timm.create_model("vit_tiny_patch16_224")
        model.patch_embed.requires_grad_(False)
        model.cls_token.data.squeeze_(0)
        return {name: (x.shape, x.requires_grad) for name, x in model.named_parameters()}

    with without_numbers():
        hollow = built()
        assert torch.zeros(2, 3).t_().shape == (3, 2)
    assert hollow == built() and not hollow["patch_embed.proj.bias"][1]
