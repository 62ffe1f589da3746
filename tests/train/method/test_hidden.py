"""What the encoder sees of hidden patches: nothing, a mask token, or nothing is hidden. Losses restated with timm's own forward pass."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae.train.method.masks import Draw, Masks, counts
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe, load_recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.targets import Batch, CacheInfo

MakeRecipe = Callable[..., Recipe]
MakeInfo = Callable[..., CacheInfo]
MakeBatch = Callable[..., Batch]
STILL = "student.drop_path=0"


def masks_of(model: Pretrainer, batch: Batch) -> Masks:
    return draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=model.info.n_patches)


def image_of(model: Pretrainer, batch: Batch) -> Tensor:
    """[b, c, h, w], as MAE normalises it."""
    mean, std = (
        torch.tensor(x, dtype=torch.float64)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (batch.pixels.permute(0, 3, 1, 2).double() / 255 - mean) / std


def gradients(model: Pretrainer, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def assert_same(model: Pretrainer, batch: Batch, masks: Masks, restated: Tensor) -> None:
    loss = model(batch, masks)[0]
    assert abs(loss.item() - restated.item()) < 1e-10
    ours, theirs = gradients(model, loss), gradients(model, restated)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-10, rtol=1e-8) for name in theirs)


def smooth(e: Tensor, beta: float) -> Tensor:
    return torch.where(e.abs() < beta, e**2 / (2 * beta), e.abs() - beta / 2)


def norm0(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize("n_predict", [6, 3])
def test_mask_tokens_stand_for_embeddings_of_all_hidden_patches(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch, n_predict: int
) -> None:
    """MaskDistill: `x = e (1 - w) + m w`, then positions; smooth-L1 at predicted patches. Hidden ones that nobody predicts are mask tokens, too."""
    few = [f"mask.n_predict={n_predict}", "terms.mimic.teachers=[dino]", STILL]
    info = tiny_info()
    model = build_model(tiny_recipe("maskdistill", *few), info, dtype=torch.float64)
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    vit, l, rows = model.student, info.n_patches, torch.arange(2)[:, None]
    w = torch.ones(2, l, 1, dtype=torch.float64)
    w[rows, masks.ids_keep] = 0
    x = vit.patch_embed(image_of(model, batch)).reshape(2, l, -1) * (1 - w) + model.mask_token * w
    x = vit.norm(vit.blocks(torch.cat([vit.cls_token.expand(2, -1, -1), x], dim=1) + vit.pos_embed))[:, 1:]
    head = model.heads["mimic/dino"]
    error = F.linear(x, head.weight, head.bias) - norm0(batch.targets["dino"]["tokens"].double())
    assert_same(model, batch, masks, smooth(error, 1.0)[rows, masks.ids_predict].mean())


def test_nothing_hidden_is_timms_forward_pass_and_a_loss_on_every_token(
    tiny_recipe: MakeRecipe, info_of_recipe: Callable[[str], CacheInfo], tiny_batch: MakeBatch
) -> None:
    """FD: smooth-L1 with beta 2 between a Linear of CLS and all patches and the layer-normalised tokens behind the teacher's norm."""
    info = info_of_recipe("fd")
    model = build_model(tiny_recipe("fd", STILL), info, dtype=torch.float64)
    batch = tiny_batch(info)
    (name,) = info.teachers
    stored = batch.targets[name]
    tokens = (
        stored["tokens"].double() * stored["scale"].double()[..., None]
        if "scale" in stored
        else stored["tokens"].double()
    )
    target, head = torch.cat([stored["cls"].double()[:, None], tokens], dim=1), model.heads[f"distil/{name}"]
    out = F.linear(model.student.forward_features(image_of(model, batch)), head.weight, head.bias)
    masks = masks_of(model, batch)
    assert masks.ids_keep.tolist() == [list(range(16))] * 2 and masks.ids_predict.shape == (2, 0)
    loss = model(batch, masks)[0]
    restated = smooth(out - norm0(target), 2.0).mean()
    assert abs(loss.item() - restated.item()) < 1e-10
    ours, theirs = gradients(model, loss), gradients(model, restated)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-10, rtol=1e-8) for key in theirs)


def test_pixels_of_hidden_patches_do_not_reach_the_encoder_that_has_mask_tokens(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    model = build_model(tiny_recipe("maskdistill", STILL), info)
    batch = tiny_batch(info, 1)
    masks = masks_of(model, batch)
    before = model.taps(batch, masks)["final"]
    assert torch.equal(before.ids, torch.cat([masks.ids_keep, masks.ids_predict], dim=1))
    for places, same in ((masks.ids_predict[0], True), (masks.ids_keep[0], False)):
        cells = batch.pixels.clone().unflatten(1, (4, 4)).unflatten(3, (4, 4))  # [b, row, p, column, q, c]
        for i in places.tolist():
            cells[:, i // 4, :, i % 4] ^= 255
        changed = replace(batch, pixels=cells.flatten(3, 4).flatten(1, 2))
        assert torch.equal(model.taps(changed, masks)["final"].x, before.x) == same


def test_a_decoder_behind_mask_tokens_reads_visible_patches(
    tiny_recipe: MakeRecipe, tiny_info: MakeInfo, tiny_batch: MakeBatch
) -> None:
    info = tiny_info()
    model = build_model(tiny_recipe("mr-mae", "student.hidden=replace", "terms.mimic.positions=cls+all"), info)
    batch = tiny_batch(info)
    masks = masks_of(model, batch)
    taps = model.taps(batch, masks)
    seen = taps["final"]._replace(x=taps["final"].x[:, :5], ids=masks.ids_keep)
    assert taps["final"].x.shape[1] == 17
    assert torch.equal(taps["decoder"].x, model.decoder(seen, masks.ids_predict, {}).x)  # type: ignore[misc]


def test_what_does_not_go_with_hidden_is_refused(tiny_recipe: MakeRecipe, tiny_info: MakeInfo) -> None:
    for wrong, said in {
        ("fd", "mask.ratio=0.5"): "mask.ratio is 0.5; 0 was expected with student.hidden none",
        ("fd", "student.hidden=drop"): "mask.ratio is 0.0; 0 < ratio < 1 was expected",
        ("fd", "mask.sampler=beit"): "mask.sampler is 'beit'; 'random' was expected with student.hidden none",
        ("fd", "terms.distil.positions=predicted"): "tap final holds cls, pooled, visible, all, alive",
        ("maskdistill", "student.hidden=drop"): "tap final holds cls, pooled, visible, alive",
    }.items():
        with pytest.raises(ValueError, match=said.replace("(", r"\(")):
            load_recipe(wrong[0], [wrong[1]])
    with pytest.raises(ValueError, match="student.hidden is replace.*--set student.hidden=drop"):
        build_model(tiny_recipe("mr-mcmae", "student.hidden=replace"), tiny_info(4, 16))
    assert counts(load_recipe("fd").mask, 196) == (196, 0)
