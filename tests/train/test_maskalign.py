"""MaskAlign: five teacher layers, mixed student blocks, CLS among the tokens, hashed drop-path, and how taps find columns."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae.train.method.drop_path import path_factors, path_keys
from mrmae.train.method.masks import Draw, Masks, saliency
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.student import encode_vit
from mrmae.train.method.taps import Mix, first_weights
from mrmae.train.method.targets import Batch, CacheInfo, TeacherInfo, target_names
from mrmae.train.method.terms import bind_terms, needed_arrays
from mrmae.train.optim import parameter_groups

MakeRecipe = Callable[..., Recipe]
MakeBatch = Callable[..., Batch]
InfoOf = Callable[[str], CacheInfo]


def masks_of(model: Pretrainer, batch: Batch) -> Masks:
    return draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=model.info.n_patches)


# ---- dynamic alignment


def test_the_alignment_starts_as_the_identity_plus_a_hundredth() -> None:
    rows = torch.stack([Mix(i, 12).weight for i in range(1, 13)])
    assert torch.equal(rows, torch.eye(12) + 0.01)
    assert torch.equal(first_weights(13, 12), torch.full((12,), 1 / 12))  # a teacher deeper than the student


def test_a_mix_at_the_identity_is_no_mix() -> None:
    outputs = {i: torch.randn(2, 3, 8) for i in range(1, 5)}
    for row in range(1, 5):
        mix = Mix(row, 4)
        with torch.no_grad():
            mix.weight.copy_(torch.eye(4)[row - 1])
        assert torch.equal(mix(outputs, torch.nn.Identity()), outputs[row])
    mixed = Mix(2, 4)(outputs, torch.nn.Identity())
    expected = 0.01 * sum(outputs.values()) + outputs[2]
    assert torch.allclose(mixed, expected, atol=1e-6)


def test_the_alignment_is_trained_and_not_decayed(tiny_recipe: MakeRecipe, info_of_recipe: InfoOf) -> None:
    model = build_model(tiny_recipe("maskalign"), info_of_recipe("maskalign"))
    rows = {id(p) for name, p in model.named_parameters() if name.startswith("fusions.mix")}
    groups = parameter_groups(model, decay=0.05)
    kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}  # type: ignore[attr-defined]
    assert len(rows) == 5 and rows <= kept


def test_the_final_norm_is_not_trained(tiny_recipe: MakeRecipe, info_of_recipe: InfoOf) -> None:
    model = build_model(tiny_recipe("maskalign"), info_of_recipe("maskalign"))
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {"student.pos_embed", "student.norm.weight", "student.norm.bias"}


# ---- the loss


def restated(model: Pretrainer, batch: Batch, masks: Masks) -> Tensor:
    """The mean over five layers of twice smooth-L1, over CLS and visible tokens together, in float64."""
    depth = len(model.student.blocks)
    scale, shift = model.scale, model.shift
    _, blocks, *_ = encode_vit(
        model.student, batch.pixels, masks.ids_keep, scale=scale, shift=shift, keep_blocks=range(1, depth + 1)
    )  # type: ignore[arg-type]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(8, 13):
        w = model.fusions[f"mix{i}"].weight
        mixed = sum(w[j - 1] * blocks[j] for j in range(1, depth + 1))
        raw, info = batch.targets[f"vit{i}"], model.info.teachers[f"vit{i}"]
        tokens = raw["tokens"].double() * raw["scale"].double()[..., None]
        kept = torch.stack([image[ids] for image, ids in zip(tokens, masks.ids_keep)])
        goal = torch.cat([raw["cls"].double()[:, None], kept], dim=1)
        goal = F.layer_norm(goal, (info.width,), eps=1e-5)
        head = model.heads[f"layer{i}/vit{i}"]
        error = (F.linear(mixed, head.weight, head.bias) - goal).abs()  # type: ignore[arg-type]
        total = total + 0.2 * 2 * torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    return total


def test_the_loss_equals_its_restatement(
    tiny_recipe: MakeRecipe, info_of_recipe: InfoOf, tiny_batch: MakeBatch
) -> None:
    info = info_of_recipe("maskalign")
    recipe = tiny_recipe("maskalign", "student.drop_path=0")
    model = build_model(recipe, info, dtype=torch.float64)
    for fusion in model.fusions.values():
        fusion.weight.data += 0.1 * torch.randn(6)  # type: ignore[operator]
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    assert (masks.ids_keep.shape, masks.ids_predict.shape) == ((2, 4), (2, 0)) and model.decoder is None
    assert set(needed_arrays(recipe, info)["vit9"]) == {"tokens", "scale", "cls", "attention"}
    assert model(batch, masks)[0].item() == pytest.approx(restated(model, batch, masks).item(), rel=1e-12)
    rows = torch.arange(2)[:, None]
    visible = {
        name: {k: v[rows, masks.ids_keep] if k in ("tokens", "scale") else v for k, v in arrays.items()}
        for name, arrays in batch.targets.items()
    }
    gathered = replace(batch, targets=visible, rows="visible")
    assert model(gathered, masks)[0].item() == model(batch, masks)[0].item()


def test_one_map_five_times_is_that_map(info_of_recipe: InfoOf, tiny_batch: MakeBatch) -> None:
    batch = tiny_batch(info_of_recipe("maskalign"))
    one = batch.targets["vit8"]["attention"]
    same = {name: {"attention": one} for name in batch.targets}
    assert torch.allclose(saliency(same, "mean", 16), saliency(same, "vit8", 16), atol=1e-15)


# ---- drop-path


def test_dropped_paths_follow_the_linear_law_and_keep_the_mean() -> None:
    samples = torch.arange(4000)
    factors = path_factors(samples, torch.tensor(3), path_keys(5, 0), rows=len(samples), rate=0.4)
    assert factors.shape == (4000, 5, 2)
    for i, p in enumerate([0.0, 0.1, 0.2, 0.3, 0.4]):
        dropped = (factors[:, i] == 0).double().mean(0)
        assert dropped.tolist() == pytest.approx([p, p], abs=0.03)
        assert factors[:, i].max().item() == pytest.approx(1 / (1 - p))
    flat = path_factors(samples, torch.tensor(3), path_keys(5, 0), rows=len(samples), rate=0.4, law="constant")
    assert torch.equal(flat[:, 4], factors[:, 4])
    assert (flat == 0).double().mean(0).flatten().tolist() == pytest.approx([0.4] * 10, abs=0.03)
    both = (factors[:, 4] == 0).all(dim=1).double().mean().item()
    assert both == pytest.approx(0.16, abs=0.03)  # the two branches of a block are dropped independently


def test_dropped_paths_depend_on_seed_epoch_sample_and_number_of_the_mask_only() -> None:
    samples = torch.tensor([3, 9, -4])

    def draw(s: Tensor, epoch: int = 0, rows: int = 3, seed: int = 0) -> Tensor:
        return path_factors(s, torch.tensor(epoch), path_keys(64, seed), rows=rows, rate=0.5)

    whole = draw(samples)
    assert torch.equal(draw(samples[1:2], rows=1), whole[1:2])  # not on the batch
    twice = draw(samples, rows=6)  # rows v * b + i
    assert torch.equal(twice[:3], whole) and not any(torch.equal(a, b) for a, b in zip(twice[3:], whole))
    assert not torch.equal(whole[0], whole[2]) and not torch.equal(draw(samples, seed=1), whole)
    assert not torch.equal(draw(samples, epoch=1), whole)  # also where the mask is the same again


def test_drop_path_is_for_training_only_and_reaches_the_loss(
    tiny_recipe: MakeRecipe, info_of_recipe: InfoOf, tiny_batch: MakeBatch
) -> None:
    info = info_of_recipe("maskalign")
    model = build_model(tiny_recipe("maskalign", "student.drop_path=0.9"), info)
    plain = build_model(tiny_recipe("maskalign", "student.drop_path=0"), info)
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    training = model(batch, masks)[0].item()
    assert training == model(batch, masks)[0].item() and training != plain(batch, masks)[0].item()
    assert model.eval()(batch, masks)[0].item() == plain(batch, masks)[0].item()
    assert torch.equal(model.train().tokens(batch.pixels), plain.tokens(batch.pixels))


def test_kept_paths_leave_the_block_as_timms(
    tiny_recipe: MakeRecipe, info_of_recipe: InfoOf, tiny_batch: MakeBatch
) -> None:
    model = build_model(tiny_recipe("maskalign"), info_of_recipe("maskalign"), dtype=torch.float64)
    batch, ones = tiny_batch(model.info), torch.ones(2, 6, 2)
    keep = torch.tensor([[0, 3], [1, 2]])
    whole, same, *_ = model.encode(batch.pixels, keep)[0], model.encode(batch.pixels, keep, paths=ones)[0]
    assert (whole - same).abs().max() < 1e-12
    ones[0, :, :] = 0
    nothing = model.encode(batch.pixels, keep, paths=ones)[1]
    assert torch.equal(nothing[1][0], nothing[6][0]) and not torch.equal(nothing[1][1], nothing[6][1])


# ---- taps find columns


def test_taps_find_columns_under_one_name_each_or_under_one_teacher(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("maskalign")
    columns = [f"clip.block_{i}" for i in range(8, 13)]
    assert target_names(["clip.pre_tail", "dino.pre_tail"]) == {"clip": "clip.pre_tail", "dino": "dino.pre_tail"}
    names = target_names(columns)
    assert names == {f"clip:block_{i}": f"clip.block_{i}" for i in range(8, 13)}
    one = CacheInfo(16, (4, 4), {t: TeacherInfo(8, None, None, True, True, column) for t, column in names.items()})
    assert [term.name for term in bind_terms(recipe, one)] == [f"layer{i}/clip:block_{i}" for i in range(8, 13)]
    assert set(build_model(recipe, one).heads) == {f"layer{i}/clip:block_{i}" for i in range(8, 13)}
    named = tiny_recipe("maskalign", *(f"terms.layer{i}.teachers=[clip]" for i in range(8, 13)))
    assert bind_terms(named, one)[0].teacher == "clip:block_8"


def test_several_teachers_share_each_layers_weight_and_other_taps_are_left_alone(
    tiny_recipe: MakeRecipe, info_of_recipe: InfoOf
) -> None:
    layers = dict(info_of_recipe("maskalign").teachers)
    layers |= {f"dino{i}": TeacherInfo(12, None, None, True, True, f"dino{i}.block_{i}") for i in range(8, 13)}
    layers["clip"] = TeacherInfo(8, None, None, True, True, "clip.pre_tail")
    terms = bind_terms(tiny_recipe("maskalign"), CacheInfo(16, (4, 4), layers))
    assert {(t.name, t.weight) for t in terms} == {
        (f"layer{i}/{name}{i}", 0.1) for i in range(8, 13) for name in ("vit", "dino")
    }


def test_a_cache_without_the_wanted_taps_is_named_with_how_to_add_them(tiny_recipe: MakeRecipe) -> None:
    clip = CacheInfo(16, (4, 4), {"clip": TeacherInfo(8, None, None, True, True, "clip.pre_tail")})
    with pytest.raises(ValueError) as error:
        build_model(tiny_recipe("maskalign"), clip)
    assert "term layer8: wants tap block_8 of a teacher; the cache has clip.pre_tail; " in str(error.value)
    assert "extract-features IMAGES CACHE --teacher NAME=LIBRARY:MODEL?tap=block_8" in str(error.value)
    bare = CacheInfo(16, (4, 4), {f"v{i}": TeacherInfo(8, column=f"v{i}.block_{i}") for i in range(8, 13)})
    with pytest.raises(ValueError, match="layer8: wants the CLS token of teacher 'v8'"):
        build_model(tiny_recipe("maskalign"), bare)
