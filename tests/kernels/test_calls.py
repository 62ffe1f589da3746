"""Calls as plain values, and the same calls again."""

import json

import torch

from mrmae.kernels import dispatch
from mrmae.kernels.calls import Calls, remade

B, C, P, D, L = 2, 3, 8, 8, 6
IDS = torch.tensor([[0, 2, 5], [1, 3, 4]])
KERNELS = ["gather_patches", "pixel_loss", "mimic_loss", "embed_tokens"]


def noted_calls() -> Calls:
    """One call of each kernel as a step makes them: slices, expanded factors, a gradient."""
    calls = Calls()
    image = torch.randint(0, 200, (B, 2 * P, 3 * P, C), dtype=torch.uint8)
    one, pred = torch.ones(C), torch.randn(B, 5, C * P * P, requires_grad=True)[:, 2:]
    how = {"patch": P, "scale": one, "shift": one, "channels_last": True, "kernels": calls}
    dispatch.gather_patches(image, IDS, dtype=torch.bfloat16, **how)
    dispatch.pixel_loss(image, pred, IDS, **how)
    codes, scale = torch.randint(-9, 9, (B, L, D), dtype=torch.int8), torch.ones(1, L).expand(B, L)
    student = torch.randn(B, 3, D, requires_grad=True)
    dispatch.mimic_loss(student, codes, IDS, scale=scale, channel_std=torch.ones(D), l=L, kernels=calls)
    dispatch.embed_tokens(student, torch.randn(L, D), torch.randn(D), IDS, kernels=calls)
    product, group = torch.randint(0, 200, (B, L, 2)).to(torch.uint8), torch.tensor([0, 0, 0, 1, 1])
    book = (torch.randn(256, 5), group, torch.randn(5, D), torch.randn(D))
    dispatch.decode_codes(product, IDS, *book, n_rows=B, kernels=calls)
    return calls


def test_a_noted_call_is_made_again_with_the_same_looks_and_other_numbers() -> None:
    calls = noted_calls()
    assert [c["function"] for c in calls] == [*KERNELS, "decode_codes"]
    again = [remade(c, torch.device("cpu"), 0) for c in json.loads(json.dumps(calls))]
    other = Calls()
    for call in again:
        getattr(dispatch, call.function)(*call.tensors, **call.how, kernels=other)
    for c in (*calls, *other):  # numbers may differ, what bounds them not
        for x in (*c["tensors"], *c["how"].values()):
            if isinstance(x, dict) and x.get("dtype") in ("uint8", "int64"):
                assert 0 <= x.pop("most") < (200 if x["dtype"] == "uint8" else L)
    assert list(other) == list(calls)
    ids = again[0].tensors[1]
    assert (ids.diff(dim=1) > 0).all(), "ascending and distinct"
    assert again[2].how["scale"].min() > 0 and again[2].how["scale"].stride(0) == 0
    assert again[1].tensors[1].requires_grad and again[1].tensors[1].storage_offset() == 0


def test_a_noted_call_computes_the_reference() -> None:
    student, codes = torch.randn(B, 3, D), torch.randn(B, L, D)
    assert torch.equal(
        dispatch.mimic_loss(student, codes, IDS, kernels=Calls()),
        dispatch.mimic_loss(student, codes, IDS, kernels="torch"),
    )
