"""A whole open_clip model, text tower and all: texts as vectors of length 1, in one space with its projected image tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.convert import convert_state_dict
from torch import Tensor

from mrmae.extract.teachers.address import TEXT_OPTION, TeacherRequest, without_text
from mrmae.extract.teachers.open_clip import chosen_activation, clip_config, clip_weights, find_tag
from mrmae.extract.teachers.tower import StateDict
from mrmae.extract.teachers.weights import first_line, fit_weights

TEXTS_AT_ONCE = 64
NO_TOWER = (
    "logit_scale",
    "logit_bias",
    "input_resolution",
    "context_length",
    "vocab_size",
)  # tensors beside both towers
TextEncoder = Callable[[Sequence[str]], Float[Tensor, "n d"]]


def load_clip(request: TeacherRequest, *, allow_torchscript: bool = False) -> Any:
    """The whole model with its weights, in evaluation mode, at its own input size.

    Options that begin with `text_` go to the text tower (`?text_layers=1`), the others to the image tower. Raises ValueError where
    open_clip cannot build it (text towers of transformers need that library) and where the weights are those of an image tower alone.
    """
    images = without_text(request)
    config, tag = clip_config(images), find_tag(images)
    vision = {
        **config["vision_cfg"],
        **{key: value for key, value in images.options.items() if key != "embed_dim"},
        "timm_model_pretrained": False,
    }
    own = {key: value for key, value in request.options.items() if key.startswith(TEXT_OPTION)}
    texts = {**config["text_cfg"], **{key.removeprefix(TEXT_OPTION): value for key, value in own.items()}}
    quick_gelu = chosen_activation(images, config, tag)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            clip: Any = open_clip.create_model(
                request.model, load_weights=False, pretrained_text=False, force_quick_gelu=quick_gelu, vision_cfg=vision, text_cfg=texts,
                embed_dim=images.options.get("embed_dim", config["embed_dim"]),
            )  # fmt: skip
    except Exception as error:  # of any library that a text tower is from
        raise ValueError(
            f"{request.where}: open_clip cannot build the whole model ({error}); correct the options, or choose another model"
        ) from None
    weights = clip_weights(images, tag, allow_torchscript=allow_torchscript)
    if weights is not None:
        fit_weights(clip, whole_weights(clip, weights, request), where=request.where)
    return clip.eval().requires_grad_(False)


def whole_weights(clip: Any, weights: StateDict, request: TeacherRequest) -> StateDict:
    """The tensors under the model's names and shapes, as open_clip's own loader brings them there."""
    towers = {name.startswith("visual.") for name in weights if name not in NO_TOWER}
    if towers != {True, False}:
        raise ValueError(
            f"{request.where}: its weights hold an image tower alone; texts need those of a whole CLIP; give @FILE with both"
        )
    weights = dict(convert_state_dict(clip, weights))
    own = clip.state_dict()
    if "positional_embedding" in weights and "positional_embedding" not in own:
        weights = open_clip.model.convert_to_custom_text_state_dict(weights)
    for name in (
        "logit_scale",
        "logit_bias",
    ):  # a number in some files, a vector of one in others; no embedding reads them
        if name in own:
            weights[name] = weights.get(name, own[name]).reshape(own[name].shape)
    return weights


def tokenizer_of(clip: Any, request: TeacherRequest) -> Any:
    """What cuts texts for a model. Raises ValueError where it needs a library, or a download, that is not here."""
    try:
        return open_clip.get_tokenizer(request.model, context_length=getattr(clip, "context_length", None))
    except Exception as error:
        raise ValueError(
            f"{request.where}: its tokenizer cannot be had ({first_line(error)}); install what it names, or choose another model"
        ) from None


def encoder_of(clip: Any, request: TeacherRequest, device: str) -> TextEncoder:
    """Texts to unit vectors, fp32 on the CPU; what is longer than the tower reads is cut there."""
    tokenizer = tokenizer_of(clip, request)
    clip.to(device)

    @torch.no_grad()
    def encoded(texts: Sequence[str]) -> Float[Tensor, "n d"]:
        parts = [texts[at : at + TEXTS_AT_ONCE] for at in range(0, len(texts), TEXTS_AT_ONCE)]
        return torch.cat(
            [clip.encode_text(tokenizer([*part]).to(device), normalize=True).float().cpu() for part in parts]
        )

    return encoded


def text_vectors(
    request: TeacherRequest, prompts: Sequence[str], *, allow_torchscript: bool = False
) -> Float[Tensor, "n d"]:
    """What the text tower makes of each prompt. ValueError like `load_clip`'s, and for a prompt that is longer than it reads."""
    clip = load_clip(request, allow_torchscript=allow_torchscript)
    tokenizer = tokenizer_of(clip, request)
    for prompt in prompts:
        n = len(tokenizer.encode(prompt)) + 2 if hasattr(tokenizer, "encode") else 0
        if n > clip.context_length:
            raise ValueError(f"{request.where}: the prompt {prompt[:60]!r}... has {n} tokens; its text tower reads {clip.context_length}; "
                             "shorten it")  # fmt: skip
    return encoder_of(clip, request, "cpu")(prompts)
