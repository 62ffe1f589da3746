"""GPU tests are skipped without a GPU."""

import pytest
import torch


@pytest.fixture(autouse=True)
def need_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
