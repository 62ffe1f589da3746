"""A whole open_clip model, text tower and all: images and texts in one space."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.convert import convert_state_dict
from torch import Tensor

from mrmae.extract.teachers import (
    Origin,
    Teacher,
    TeacherRequest,
    Tower,
    activation_of,
    fit_weights,
    make_spec,
    parse_teacher,
    weights_sha256,
)
from mrmae.extract.teachers.open_clip import chosen_activation, clip_config, clip_preprocessing, clip_weights, find_tag
from mrmae.probe.job import Probing
from mrmae.probe.sources import TEXT_OPTION, FeatureSource, hashed, without_text

TEXTS_AT_ONCE = 64
Encoder = Callable[[Sequence[str]], Float[Tensor, "n d"]]


def images_and_texts(job: Probing, text: str) -> tuple[Float[Tensor, "n d"], Encoder]:
    """Embeddings of the test images as unit vectors, and what makes such ones of texts.

    The source is an open_clip model, or a cache's column of projected CLS tokens; then `text` names the model whose image tower
    made the column. Raises ValueError for any other source, and for a text tower that belongs to another image tower.
    """
    if job.source.kind == "open_clip":
        clip = load_clip(clip_request(job.source.name))
        source = embedding_source(
            clip, clip_request(job.source.name), device=job.options.device, precision=job.options.precision
        )
        images = dataclasses.replace(job.test, source=source).pooled()["mean"]
        return F.normalize(images, dim=1), encoder_of(clip, clip_request(job.source.name), job.options.device)
    if job.source.column is None or job.source.spec.tap != "projected" or not job.source.spec.has_cls:
        raise ValueError(f"SOURCE {job.source.name}: its features are not in a space with texts; expected open_clip:MODEL/TAG, or a column of "
                         "projected tokens with CLS, CACHE#TEACHER.projected")  # fmt: skip
    if not text.startswith("open_clip:"):
        raise ValueError(f"--set zero_shot.text or retrieval.text={text}: a column does not keep its text tower; expected the model that made "
                         "it, as open_clip:MODEL/TAG or open_clip:MODEL@FILE?activation=...")  # fmt: skip
    request = clip_request(text)
    clip = load_clip(request)
    if weights_sha256(clip.visual.state_dict()) != job.source.spec.weights_sha256:
        raise ValueError(f"--set text={text}: its image tower has other weights than the one that made {job.source.name}; texts and images "
                         "would not meet; give the model of that column")  # fmt: skip
    return F.normalize(job.test.pooled()["cls"], dim=1), encoder_of(clip, request, job.options.device)


def clip_request(text: str) -> TeacherRequest:
    """The model that `open_clip:MODEL[/TAG][@FILE][?key=value&...]` asks for."""
    return parse_teacher(f"probe={text}")


def load_clip(request: TeacherRequest) -> Any:
    """The whole model with its weights, in evaluation mode, at its own input size.

    Options that begin with `text_` go to the text tower (`?text_layers=1`), the others to the image tower. Raises ValueError where
    open_clip cannot build it (text towers of transformers need that library) and where the weights are those of an image tower alone.
    """
    images = without_text(request)
    config, tag = clip_config(images), find_tag(images)
    if images.input_size:
        raise ValueError(
            f"{request.where}: ?input_size={images.input_size}: texts are compared with images of the model's own size; leave it out"
        )
    vision = {
        **config["vision_cfg"],
        **{key: value for key, value in images.options.items() if key != "embed_dim"},
        "timm_model_pretrained": False,
    }
    texts = {
        **config["text_cfg"],
        **{
            key.removeprefix(TEXT_OPTION): value
            for key, value in request.options.items()
            if key.startswith(TEXT_OPTION)
        },
    }
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
    weights = clip_weights(images, tag, allow_torchscript=False)
    if weights is not None:
        fit_weights(clip, whole_weights(clip, weights, request), where=request.where)
    return clip.eval().requires_grad_(False)


def whole_weights(clip: Any, weights: dict[str, Tensor], request: TeacherRequest) -> dict[str, Tensor]:
    """The tensors under the model's names and shapes, as open_clip's own loader brings them there."""
    if not any(name.startswith("visual.") for name in weights):
        raise ValueError(
            f"{request.where}: the weights hold no text tower; expected those of a whole CLIP; images alone are probed with k-NN"
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


def embedding_source(clip: Any, request: TeacherRequest, *, device: str, precision: str) -> FeatureSource:
    """The image embedding as one token: what texts are compared with."""
    images = without_text(request)
    size = clip.visual.image_size
    side = (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def features(x: Tensor) -> tuple[Tensor, None]:
        return clip.encode_image(x)[:, :, None, None], None

    origin = Origin(
        request.where, request.tag, clip_preprocessing(images, find_tag(images)), weights_sha256(clip.state_dict())
    )
    tower = Tower(
        module=clip, features=features, attention_row=None, patch=None, input_size=side, origin=origin, activation=activation_of(clip.visual),
        prefix_tokens=0, tap="embedding", tail={}, attention_backend="none",
    )  # fmt: skip
    with torch.no_grad():
        spec = make_spec(request, tower, features(torch.zeros(1, 3, *side))[0], False, 1, precision)
    clip.to(device)
    return FeatureSource(request.where, "open_clip", hashed(spec), Teacher(spec, {}, tower, torch.device(device)))


def encoder_of(clip: Any, request: TeacherRequest, device: str) -> Encoder:
    """Texts to unit vectors, fp32 on the CPU. Raises ValueError where the model's tokenizer needs a library that is not here."""
    try:
        tokenizer = open_clip.get_tokenizer(request.model, context_length=getattr(clip, "context_length", None))
    except Exception as error:
        raise ValueError(
            f"{request.where}: its tokenizer cannot be had ({error}); install what it names, or choose another model"
        ) from None
    clip.to(device)

    @torch.no_grad()
    def encoded(texts: Sequence[str]) -> Float[Tensor, "n d"]:
        parts = [texts[at : at + TEXTS_AT_ONCE] for at in range(0, len(texts), TEXTS_AT_ONCE)]
        return torch.cat(
            [clip.encode_text(tokenizer([*part]).to(device), normalize=True).float().cpu() for part in parts]
        )

    return encoded
