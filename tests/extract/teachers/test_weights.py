import argparse
import hashlib
import struct

import pytest
import safetensors.torch
import torch
from torch import nn

from mrmae.extract.teachers.weights import fit_weights, hinted, load_weights, weights_sha256


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in small_model().state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_safetensors_and_checkpoints_give_the_same_tensors(tmp_path, weights):
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "w.pth", "old.pth"):
        assert same(load_weights(tmp_path / name), weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model": w, "args": argparse.Namespace(lr=1.0), "epoch": 3, "optimizer": {"state": {}}},
        lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}, "epoch": 3},
        lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
        lambda w: {
            "student": {"x": torch.zeros(1)},
            "teacher": {f"module.backbone.{k}": v for k, v in w.items()} | {"module.head.mlp.0.weight": torch.zeros(2)},
        },
        lambda w: {"model": {"state_dict": w}},
    ],
    ids=["mae", "data-parallel", "compiled", "dino", "nested"],
)
def test_usual_wrappings_are_taken_off(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "w.pth")
    assert same(load_weights(tmp_path / "w.pth"), weights)


def test_two_models_in_one_file_are_not_chosen_between(tmp_path, weights):
    torch.save({"model": weights, "teacher": weights}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth: holds several models, under model and teacher"):
        load_weights(tmp_path / "w.pth")


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, weights):
    torch.save({"model": weights, "x": Payload()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth: needs more than tensors to load \(.*exec.*could run code"):
        load_weights(tmp_path / "w.pth")


def test_torchscript_needs_permission(tmp_path):
    model = nn.Linear(3, 4)
    torch.jit.trace(model, torch.zeros(1, 3)).save(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="TorchScript archive.*pass --allow-torchscript if you trust the file"):
        load_weights(tmp_path / "clip.pt")
    assert same(load_weights(tmp_path / "clip.pt", allow_torchscript=True), dict(model.state_dict()))


def test_missing_cut_and_foreign_files_are_named(tmp_path, weights):
    with pytest.raises(ValueError, match="absent.pth: no such file"):
        load_weights(tmp_path / "absent.pth")
    for save, name in ((safetensors.torch.save_file, "w.safetensors"), (torch.save, "w.pth")):
        save(weights, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
        with pytest.raises(
            ValueError, match=f"{name}: (is safetensors with a header of|is a zip archive that is cut off)"
        ):
            load_weights(tmp_path / name)
    (tmp_path / "w.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="w.bin: (cannot be read as a PyTorch|holds no named tensors)"):
        load_weights(tmp_path / "w.bin")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth: holds no named tensors"):
        load_weights(tmp_path / "w.pth")


def test_cut_anywhere_weights_are_refused_in_one_line(tmp_path, weights):
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "w.pth", "old.pth"):
        whole = (tmp_path / name).read_bytes()
        for n_bytes in range(0, len(whole), max(1, len(whole) // 25)):
            (tmp_path / "cut").write_bytes(whole[:n_bytes])
            with pytest.raises(ValueError, match="cut: ") as error:
                load_weights(tmp_path / "cut")
            assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_fitting_loads_every_tensor(weights):
    model = small_model()
    fit_weights(model, weights, where="a=timm:x")
    assert same(dict(model.state_dict()), weights)


def test_fitting_allows_decoders_classifiers_and_absent_counters(weights):
    del weights["1.num_batches_tracked"]
    more = {"decoder_blocks.0.weight": torch.zeros(1), "mask_token": torch.zeros(1), "0.bias": torch.zeros(1000)}
    model = small_model()
    before = model[0].bias.detach().clone()
    fit_weights(model, weights | more, where="a=timm:x", classifier={"0.bias"})
    assert torch.equal(model[0].weight, weights["0.weight"]) and torch.equal(model[0].bias, before)


def test_weights_of_another_shape_name_the_first_tensor_and_both_shapes(weights):
    wrong = weights | {"1.weight": torch.zeros(7), "0.bias": torch.zeros(5)}
    with pytest.raises(
        ValueError,
        match=r"a=timm:x: 0.bias has shape \[5\] in the weights; the model has \[4\]; 2 of 7 tensors have another",
    ):
        fit_weights(small_model(), wrong, where="a=timm:x")


def test_missing_and_unexpected_names_are_listed_and_nothing_is_loaded(weights):
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = {f"encoder.{k}": v for k, v in weights.items()}
    with pytest.raises(ValueError, match=r"6 tensors missing.*0.weight, 0.bias.*7 tensors in.*begin with 'encoder.'"):
        fit_weights(model, wrapped, where="x")
    assert same(dict(model.state_dict()), before)


def test_the_sha256_is_of_fp32_values_under_sorted_names():
    weights = {"b": torch.tensor([1.5, -2.0], dtype=torch.float16), "a": torch.tensor(3.0), "n": torch.tensor(7)}
    bytes_hashed = b'["a",[]]\n' + struct.pack("<f", 3.0) + b'["b",[2]]\n' + struct.pack("<2f", 1.5, -2.0)
    assert weights_sha256(weights) == hashlib.sha256(bytes_hashed).hexdigest()
    assert weights_sha256(weights | {"head.weight": torch.zeros(9)}, classifier={"head.weight"}) == weights_sha256(
        weights
    )
    assert weights_sha256({**weights, "b": weights["b"].float()}) == weights_sha256(weights)
    assert weights_sha256({**weights, "b": -weights["b"]}) != weights_sha256(weights)


def test_nearest_names_only_what_is_near():
    assert hinted("resnet5", ["resnet50", "vit"]) == "; nearest: resnet50"
    assert hinted("zzz", ["resnet50"]) == ""
