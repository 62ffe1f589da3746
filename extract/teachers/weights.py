"""Weights from files: read without running code, unwrapped by stated rules, fitted to a model exactly or not at all."""

import argparse
import hashlib
import json
import pickle
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from mrmae.common.progress import counted
from mrmae.common.suggest import nearest
from mrmae.extract.teachers.tower import StateDict
from mrmae.extract.teachers.weights_file import kind_of

# A checkpoint keeps its tensors under one of these names: MAE `model`, timm and open_clip `state_dict`, DINO `teacher`.
WRAPPERS = ("model", "state_dict", "model_state_dict", "teacher")
# Put before every name by data-parallel and compiled models.
PREFIXES = ("module.", "_orig_mod.")
# Self-distillation checkpoints hold a backbone and a head; the backbone is the model.
BACKBONE = "backbone."
# Parts that a masked autoencoder needs only while it is trained.
TRAINING_ONLY = ("decoder_", "mask_token")
# Numbers beside the weights in OpenAI's archives.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


def load_weights(file: str | Path, *, allow_torchscript: bool = False) -> StateDict:
    """Name -> tensor, on the CPU, from safetensors or a PyTorch checkpoint, unwrapped.

    Pickles are read with weights_only=True (an argparse.Namespace inside is allowed): nothing in them is run.
    allow_torchscript: also read TorchScript archives such as OpenAI's CLIP `.pt`; these can run code, so trust the file.
    Raises ValueError, in one line, where the file is missing, unreadable, of another kind (`kind_of`), or holds no tensors.
    """
    path = Path(file)
    match kind_of(path):
        case "safetensors":
            return unwrap(read_safetensors(path), path)
        case "torchscript":
            return unwrap(read_torchscript(path, allowed=allow_torchscript), path)
        case "checkpoint":
            return unwrap(read_torch_file(path), path)


def read_safetensors(path: Path) -> StateDict:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # beside its own, safetensors lets errors of torch and of the JSON through
        raise ValueError(f"{path}: is not whole safetensors ({first_line(error)}); copy or download it again") from None


def read_torchscript(path: Path, *, allowed: bool) -> StateDict:
    if not allowed:
        raise ValueError(
            f"{path}: is a TorchScript archive, which can run code when it is loaded; expected safetensors or a state "
            "dict; pass --allow-torchscript if you trust the file"
        )
    try:
        weights = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read as TorchScript ({first_line(error)}); copy it again") from None
    return {name: tensor for name, tensor in weights.items() if name not in NOT_WEIGHTS}


def read_torch_file(path: Path) -> object:
    """What a checkpoint holds. ValueError where it needs code to load, naming it, or cannot be read."""
    try:
        with open(path, "rb") as opened, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(opened, map_location="cpu", weights_only=True)  # by path it would go by the suffix
    except pickle.UnpicklingError:  # its text is a page, with the advice to load without this check
        refused = unsafe_names(path)
        reason = "its pickle is cut off, damaged, or no checkpoint"
    except Exception as error:  # damage takes every form
        refused, reason = "", first_line(error)
    if refused:
        raise ValueError(
            f"{path}: needs more than tensors to load ({refused}), which could run code; expected a plain state dict; "
            "ask for the weights as safetensors"
        )
    raise ValueError(f"{path}: cannot be read as a PyTorch checkpoint ({reason}); copy it again")


def unsafe_names(path: Path) -> str:
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged as well; the caller has a message already
        return ""


def first_line(error: Exception) -> str:
    """The beginning of a library's error, short enough to stand inside ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def unwrap(content: object, path: Path) -> StateDict:
    """The tensors of a checkpoint: inside `WRAPPERS`, without `PREFIXES`; only what is under `BACKBONE` if anything is."""
    while isinstance(content, Mapping) and (inside := [k for k in WRAPPERS if isinstance(content.get(k), Mapping)]):
        if len(inside) > 1:
            raise ValueError(
                f"{path}: holds several models, under {' and '.join(inside)}; expected one; save the wanted one alone"
            )
        content = content[inside[0]]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {k: v.detach() for k, v in named if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no named tensors; expected a state dict, alone or under {', '.join(WRAPPERS)}")
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    if any(k.startswith(BACKBONE) for k in tensors):
        tensors = {k.removeprefix(BACKBONE): v for k, v in tensors.items() if k.startswith(BACKBONE)}
    return tensors


def fit_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, where: str, classifier: Collection[str] = ()
) -> None:
    """Load `weights` into `model`: every tensor of it, and no other.

    classifier: names of tensors that may be missing, unexpected or of another shape (they are left as they are).
    Tensors only used in training (`TRAINING_ONLY`) may be there too, and batch counters may be missing.
    Raises ValueError with the first tensor (in the model's order) that does not fit and both shapes.
    """
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in classifier}
    if other := [name for name, tensor in wanted.items() if name in weights and weights[name].shape != tensor.shape]:
        first, alike = other[0], sum(name in weights for name in wanted)
        raise ValueError(
            f"{where}: {first} has shape {list(weights[first].shape)} in the weights; the model has "
            f"{list(wanted[first].shape)}; {len(other)} of {alike} tensors have another shape; choose the model that the "
            "weights were made for, with its options (?embed_dim=, ?depth=, ...)"
        )
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [n for n in weights if n not in wanted and n not in classifier and not n.startswith(TRAINING_ONLY)]
    if missing or extra:
        raise ValueError(
            f"{where}: {listed(missing, 'missing in the weights')}; {listed(extra, 'in the weights only')}; "
            f"choose the model that the weights were made for, with its options{hint(missing, extra)}"
        )
    model.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)


def listed(names: list[str], what: str) -> str:
    """`3 tensors missing in the weights: a, b, c`, at most five of them by name."""
    more = ", ..." if len(names) > 5 else ""
    return f"{counted(len(names), 'tensor')} {what}" + (f": {', '.join(names[:5])}{more}" if names else "")


def hint(missing: list[str], extra: list[str]) -> str:
    """A wrapping prefix, where that alone explains the misfit."""
    for name in extra:
        prefix = name.removesuffix(missing[0]) if missing and name.endswith("." + missing[0]) else ""
        if prefix:
            return f" (the names in the file begin with {prefix!r})"
    return ""


def weights_sha256(weights: Mapping[str, Tensor], *, classifier: Collection[str] = ()) -> str:
    """Hex sha256 of the floating-point tensors as little-endian fp32, in the order of their names.

    Per tensor: one line of canonical JSON `["name",[shape]]`, then its bytes. Integer tensors (batch counters, index
    tables) and `classifier` are left out: they change no feature.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        if name in classifier or not tensor.is_floating_point():
            continue
        digest.update(json.dumps([name, list(tensor.shape)], separators=(",", ":")).encode() + b"\n")
        digest.update(tensor.detach().to("cpu", torch.float32).numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def hinted(name: str, known: Iterable[str]) -> str:
    """`; nearest: a, b, c`, or nothing where no known name is similar."""
    found = nearest(name, known, n=5)
    return f"; nearest: {', '.join(found)}" if found else ""
