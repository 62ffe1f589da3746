"""Teachers that run inside the step, on the same views, instead of being read from the cache: `--online`.

No feature has to be stored, at the price of a forward pass of every teacher per image and epoch. It is the baseline that the
cache is measured against, and the road for one short run or a slow disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mrmae.extract.teachers import Teacher, TeacherRequest, build_teacher, parse_teacher
from mrmae.shards.cache import Cache
from mrmae.shards.format import TeacherSpec, column_id, compare_specs, derived_specs
from mrmae.train.method import Batch, CacheInfo, Draw, Masks, Pretrainer, TeacherInfo, draw_masks, partner_targets

NOT_COMPARED = ("weights", "tag", "precision", "attention_backend")  # where weights come from and how they are computed


def build_teachers(cache: Cache, texts: Sequence[str], *, device: torch.device) -> dict[str, Teacher]:
    """The teachers to run in the step, by name, on `device`.

    texts: as `extract-features --teacher` takes them; none: the cache's own, rebuilt from their specs. A teacher whose name
    the cache knows must be that teacher.
    Raises ValueError where one cannot be built, is another than the cache's, or there is none.
    """
    specs = [spec for spec in cache.plan.columns if not spec.is_map]
    requests = [parse_teacher(text) for text in texts] or [request_of(spec, cache) for spec in specs]
    cached = {spec.name: spec for spec in specs}
    if not requests:
        raise ValueError(
            f"--online: {cache.path} names no teacher to run; at least one was expected; give --teacher NAME=LIBRARY:MODEL"
        )
    teachers: dict[str, Teacher] = {}
    for request in requests:
        if request.name in teachers:
            raise ValueError(f"--teacher {request.name}=...: stands twice; a name was expected once; rename one")
        known = cached.get(request.name)
        precision = known.precision if known else "fp16" if device.type == "cuda" else "fp32"  # as extract-features
        teacher = build_teacher(
            request, grid=cache.grid[0], view_size=cache.size, device=device, precision=precision, views=cache.encoding
        )
        if known:
            check_same(known, teacher.spec, cache)
        teachers[request.name] = teacher
    return teachers


def request_of(spec: TeacherSpec, cache: Cache) -> TeacherRequest:
    """What to ask for to get the cached teacher again. Raises ValueError where its weights came from a file."""
    if spec.weights == "file":
        raise ValueError(
            f"--online: teacher {spec.name!r} of {cache.path} was loaded from a file, and a cache keeps no paths; its weights"
            f" were expected again; give --teacher {spec.name}={spec.library}:{spec.model}@FILE"
        )
    return TeacherRequest(
        name=spec.name,
        library=spec.library,
        model=spec.model,
        weights=spec.weights,
        tag=spec.tag,
        tap=spec.tap,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        input_size=spec.input_size[0],
        bands=spec.bands,
        levels=spec.levels,
        options=dict(spec.model_options),
    )


def check_same(cached: TeacherSpec, built: TeacherSpec, cache: Cache) -> None:
    """Raise ValueError where a teacher is another than the cache's of that name, naming the field and both values."""
    same = {name: getattr(cached, name) for name in NOT_COMPARED}
    compare_specs(cached, replace(built, **same), f"{cache.path}, teacher {cached.name}")


def online_info(info: CacheInfo, teachers: Mapping[str, Teacher]) -> CacheInfo:
    """What the student needs to know of teachers in the step, and of what follows from them by their tails: plain floats, no stored codes."""
    told = {}
    for name, teacher in teachers.items():
        spec, cached = teacher.spec, info.teachers.get(name, TeacherInfo(teacher.spec.width))
        told[name] = replace(
            cached,
            channel_mean=None,
            channel_std=None,
            has_cls=spec.has_cls,
            has_attention=spec.has_attention,
            column=spec.column,
            has_scale=False,
            online=True,
            codebook={},
        )
    tails = {teacher.spec.tail_name: teacher.tail for teacher in teachers.values()}
    derived = {
        f"{spec.name}:{spec.tap}": replace(told[name], width=spec.width, column=column, source=name, tail=teacher.tail)
        for name, teacher in teachers.items()
        for column, (spec, _) in derived_specs([teacher.spec], tails.__getitem__).items()
    }
    return replace(info, teachers=told, derived=derived)


def online_ids(cache: Cache, teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """An id per teacher of the numbers it gives on these views, for checkpoints."""
    geometry = cache.ids["geometry"]
    return {f"online teacher {name}": column_id(teachers[name].spec, geometry, {}) for name in sorted(teachers)}


def only_needed(teachers: Mapping[str, Teacher], needed: Mapping[str, set[str]]) -> dict[str, Teacher]:
    """The teachers that training reads, without the attention row where nobody reads it."""
    chosen = {name: teacher for name, teacher in teachers.items() if needed.get(name)}
    return {
        name: teacher
        if "attention" in needed[name]
        else replace(teacher, tower=replace(teacher.tower, attention_row=None))
        for name, teacher in chosen.items()
    }


def teach(batch: Batch, teachers: Mapping[str, Teacher], needed: Mapping[str, set[str]]) -> Batch:
    """The same batch with what the teachers say about its views now: whole grids, fp32, on the batch's device; maps stay."""
    targets: dict[str, dict[str, Tensor]] = {}
    for name, teacher in teachers.items():
        found = teacher.forward(batch.pixels)
        targets[name] = {array: getattr(found, array) for array in sorted(needed[name])}
    return replace(batch, targets=batch.targets | targets)


def with_targets(
    loaded: tuple[Batch, Masks | Draw],
    teachers: Mapping[str, Teacher],
    needed: Mapping[str, set[str]],
    *,
    model: Pretrainer,
) -> tuple[Batch, Masks]:
    """The batch and masks a step trains on: as loaded, or completed by the teachers and the student in the step."""
    batch, masks = loaded
    if isinstance(masks, Masks):
        return batch, masks
    if teachers:
        partner = batch.partner
        if partner is not None and partner_targets(model.recipe):
            partner = teach(partner, teachers, needed)
        batch = replace(teach(batch, teachers, needed), partner=partner)
    mask = model.recipe.mask
    embedded = model.embedded(batch.pixels) if mask.sampler == "similarity" else None
    return batch, draw_masks(batch, masks, recipe=mask, l=model.info.n_patches, embedded=embedded)
