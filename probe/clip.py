"""Images and texts in the space of one open_clip model."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mrmae.extract.teachers import (
    Origin,
    Teacher,
    TeacherRequest,
    Tower,
    activation_of,
    make_spec,
    parse_teacher,
    weights_sha256,
    without_text,
)
from mrmae.extract.teachers.clip_texts import TextEncoder, encoder_of, load_clip
from mrmae.extract.teachers.open_clip import clip_preprocessing, find_tag
from mrmae.probe.job import Probing
from mrmae.probe.sources import FeatureSource, hashed


def images_and_texts(job: Probing, text: str) -> tuple[Float[Tensor, "n d"], TextEncoder]:
    """Embeddings of the test images as unit vectors, and what makes such ones of texts.

    The source is an open_clip model, or a cache's column of projected CLS tokens; then `text` names the model whose image tower
    made the column. Raises ValueError for any other source, and for a text tower that belongs to another image tower.
    """
    if job.source.kind == "open_clip":
        refuse_other_size(clip_request(job.source.name))
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
    refuse_other_size(request)
    clip = load_clip(request)
    if weights_sha256(clip.visual.state_dict()) != job.source.spec.weights_sha256:
        raise ValueError(f"--set text={text}: its image tower has other weights than the one that made {job.source.name}; texts and images "
                         "would not meet; give the model of that column")  # fmt: skip
    return F.normalize(job.test.pooled()["cls"], dim=1), encoder_of(clip, request, job.options.device)


def clip_request(text: str) -> TeacherRequest:
    """The model that `open_clip:MODEL[/TAG][@FILE][?key=value&...]` asks for."""
    return parse_teacher(f"probe={text}")


def refuse_other_size(request: TeacherRequest) -> None:
    """ValueError for a model that is asked to see images of another size."""
    if request.input_size:
        raise ValueError(
            f"{request.where}: ?input_size={request.input_size}: texts are compared with images of the model's own size; leave it out"
        )


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
