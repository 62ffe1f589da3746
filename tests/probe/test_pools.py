"""What of an image a probe may classify by."""

import pytest
import torch

from mrmae.probe import pools


def test_pools_are_cls_mean_and_both_as_unit_vectors() -> None:
    pooled = {"mean": torch.randn(3, 4), "cls": torch.randn(3, 4)}
    found = pools.pools(pooled)
    assert list(found) == ["mean", "cls", "both"]
    assert torch.allclose(found["both"].norm(dim=1), torch.tensor(2.0).sqrt())
    assert list(pools.pools({"mean": pooled["mean"]})) == ["mean"]
    with pytest.raises(ValueError, match="pool=cls: this source has no CLS"):
        pools.choose_pool({"mean": pooled["mean"]}, "cls")
