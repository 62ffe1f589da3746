import argparse
import hashlib
import http.server
import io
import os
import socket
import struct
import threading
import time
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from mrmae.extract.teachers import hub
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


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 346284714\n"
HUGE = (2**40).to_bytes(8, "little") + b'{"a":{}}' + bytes(64)


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, "x")
    return out.getvalue()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "is empty; .*; copy or download the file again"),
        (
            LFS,
            "is a git-LFS pointer of 134 bytes, in place of 346,284,714; .*; fetch the file itself with git lfs pull",
        ),
        (
            b"\n<!DOCTYPE html><html><title> Sign in </title>",
            "is an HTML page titled 'Sign in': a download's error page",
        ),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is XML that begins with '<.xml"),
        (b'{"error": "Repository not found"}', "is JSON text that begins with"),
        (b'{"abcde{": 1}', "is JSON text that begins with"),  # a brace where safetensors has its own
        ("# Größe\n".encode() * 900, "is a text file that begins with '# Größe"),
        (zipped("photo.jpg"), "is a zip archive that is no checkpoint .it holds 'photo.jpg'.; .*; unpack it"),
        (zipped("a/data.pkl")[:-9], "is a zip archive that is cut off or damaged"),
        (zipped("a/data.pkl"), "cannot be read as a PyTorch checkpoint"),
        (b"\x1f\x8b\x08" + bytes(99), "is a gzip archive; .*; unpack it"),
        (bytes(257) + b"ustar" + bytes(99), "is a tar archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file, as Keras writes"),
        (bytes(9999), "is nothing but zeros at its beginning"),
        (bytes(range(99)), "is no weights: it begins with the bytes 00 01 02"),
        (HUGE, "is safetensors with a header of 1,099,511,627,776 bytes in a file of 80"),
        (b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.", "cannot be read as|needs more than tensors"),
        (b"\x80\x04\x95\x00", "cannot be read as a PyTorch checkpoint .its pickle is cut off, damaged"),
    ],
)
def test_what_is_no_weights_is_named_in_one_line_without_advice_to_trust_it(tmp_path, content, told, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        load_weights(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "weights_only" not in text and len(text) < 400


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth: is no regular file .a pipe or device."):
        load_weights(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is a folder; .*; give the file in it"):
        load_weights(tmp_path)


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


# --- the hub


def fetch(**how):
    given = {"repository": "o/r", "names": ["m.safetensors", "m.bin"], "url": None, "local_hint": "a=timm:x@FILE"}
    return hub.fetch_weights("a=timm:x", **(given | how))


@pytest.fixture
def hub_at(monkeypatch):
    def use(port):
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}")  # fmt: skip

    return use


@pytest.fixture
def server(hub_at):
    """A hub on this machine; its files by address, and a repository `o/gated` that it keeps to itself."""

    class Answer(http.server.BaseHTTPRequestHandler):
        files = {"/o/r/resolve/main/m.bin": b"weights", "/w.pth": b"more"}

        def do_HEAD(self):
            content = self.files.get(self.path)
            self.send_response(200 if content else 404)
            self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "EntryNotFound")
            self.send_header("X-Repo-Commit", "c0ffee")
            self.send_header("ETag", '"etag"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD() or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        hub_at(server.server_port)
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_first_name_that_the_hub_has_is_downloaded_else_the_url(empty_cache, server):
    assert fetch().read_bytes() == b"weights"
    assert fetch(repository="o/none", url=f"{server}/w.pth") == empty_cache / "torch" / "checkpoints" / "w.pth"


def test_what_the_hub_says_is_one_line(empty_cache, server):
    with pytest.raises(ValueError, match="o/none: Entry Not Found for url.*; expected a network.*a=timm:x@FILE"):
        fetch(repository="o/none")
    with pytest.raises(ValueError, match="o/gated: Cannot access gated repo.*w.pth: HTTP Error 404") as error:
        fetch(repository="o/gated", url=f"{server}/no/w.pth")
    assert "\n" not in str(error.value)


def test_a_host_that_does_not_answer_gives_one_error_in_time(empty_cache, hub_at, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        port = silent.getsockname()[1]
        hub_at(port)
        monkeypatch.setattr(hub, "LOOK_SECONDS", 0.3)
        start = time.monotonic()
        with pytest.raises(ValueError, match="a=timm:x: the weights are not in the local cache.*pass a local file"):
            fetch(url=f"http://127.0.0.1:{port}/w.pth")
        assert 0.6 <= time.monotonic() - start < 3


def test_offline_mode_asks_no_host(empty_cache, no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; pass a local file instead: a=timm:x@FILE"):
        fetch()


def test_cached_files_are_found_without_a_network(empty_cache, no_network):
    target = empty_cache / "torch" / "checkpoints" / "w.pth"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"x")
    assert fetch(url="https://example.com/a/w.pth") == target
    snapshot = empty_cache / "hub" / "models--o--r" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    (snapshot / "m.bin").write_bytes(b"y")
    assert fetch() == snapshot / "m.bin"
