"""A teacher's tail: what no teacher has is refused, by name."""

from pathlib import Path

import pytest
import torch

from mrmae.shards.format import tail


@pytest.mark.parametrize(
    "tensors",
    [
        {"layer_norm.weight": torch.ones(4)},
        {"layer_norm.weight": torch.ones(4), "layer_norm.eps": torch.ones(2)},
        {"layer_norm.weight": torch.ones(2, 2), "layer_norm.eps": torch.tensor(1e-6)},
        {"layer_norm.weight": torch.ones(4), "layer_norm.eps": torch.tensor(1e-6), "proj.weight": torch.ones(3, 5)},
        {},
    ],
)
def test_a_tail_that_no_teacher_has_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tail.write_tail(tmp_path, "a", tensors)
    file = tail.tail_path(tmp_path, "a")
    if not tensors:
        file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match="a.safetensors: no tail of .*run the same extract-features command"):
        tail.read_tail(tmp_path, "a")
