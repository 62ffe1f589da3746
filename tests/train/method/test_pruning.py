"""Redundant patches leave the encoder on the way: who, that nothing of them is left, and what a recipe may ask of the others."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe, load_recipe
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.student import without_redundant
from mrmae.train.method.targets import Batch, CacheInfo

MakeRecipe = Callable[..., Recipe]
InfoOf = Callable[[str], CacheInfo]
MakeBatch = Callable[..., Batch]


@pytest.fixture
def made(tiny_recipe: MakeRecipe, info_of_recipe: InfoOf, tiny_batch: MakeBatch) -> tuple[Pretrainer, Batch, Masks]:
    info = info_of_recipe("hybrid-distill")
    model = build_model(tiny_recipe("hybrid-distill"), info, dtype=torch.float64)
    batch = tiny_batch(info)
    return model, batch, draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=16)


def image_of(batch: Batch) -> Tensor:
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((batch.pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def encoded_by_loops(model: Pretrainer, image: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """(final without CLS, [q | k | v] of block 5, who is alive) of one image: before blocks 1, 3, 5 those with the largest cosine leave."""
    vit, alive = model.student, list(range(16))
    x = vit.patch_embed(image[None]).reshape(1, 16, -1)  # type: ignore[operator]
    x = torch.cat([vit.cls_token, x], dim=1) + vit.pos_embed  # type: ignore[list-item]
    for number, block in enumerate(vit.blocks, start=1):
        if number in (1, 3, 5):
            mean = sum(x[0, 1 + i].detach() for i in range(len(alive))) / len(alive)
            cosines = [(float(y @ mean / (y.norm() * mean.norm())), i) for i, y in enumerate(x[0, 1:].detach())]
            kept = sorted(i for _, i in sorted(cosines)[: int(0.7 * len(alive))])
            x, alive = torch.stack([x[0, 0], *(x[0, 1 + i] for i in kept)])[None], [alive[i] for i in kept]
        if number == 5:
            qkv = block.attn.qkv(block.norm1(x))[0, 1:]  # type: ignore[operator,union-attr]
        x = block(x)
    return vit.norm(x)[0, 1:], qkv, alive


def log_softmax_by_heads(qkv: Tensor, names: str) -> Tensor:
    part = dict(zip("qkv", qkv.chunk(3, dim=-1)))
    heads = [[part[name].chunk(2, dim=-1)[h] for name in names] for h in range(2)]
    return torch.stack([F.log_softmax(a @ b.T / a.shape[1] ** 0.5, dim=-1) for a, b in heads])


def test_hybrids_loss_and_gradients_are_the_formulas_on_the_tokens_that_are_left(
    made: tuple[Pretrainer, Batch, Masks],
) -> None:
    model, batch, masks = made
    head, tail, parts = model.heads["clip/clip"], model.info.derived["vit9:qkv_9"].tail, []
    for i, image in enumerate(image_of(batch)):
        final, qkv, alive = encoded_by_loops(model, image)
        assert len(alive) == 4
        stored = {
            name: batch.targets[name]["tokens"][i].double() * batch.targets[name]["scale"][i].double()[:, None]
            for name in ("clip", "vit9")
        }
        goal = F.layer_norm(stored["clip"][alive], (8,), eps=1e-5)
        e = (F.linear(final, head.weight, head.bias) - goal).abs()
        parts.append(torch.where(e < 2, e**2 / 4, e - 1).mean())
        norm = F.layer_norm(
            stored["vit9"][alive], (8,), tail["layer_norm.weight"].double(), tail["layer_norm.bias"].double(), 1e-6
        )
        told = norm @ tail["qkv.weight"].double().T + tail["qkv.bias"].double()
        for names in ("qk", "vv"):
            ours, theirs = log_softmax_by_heads(qkv, names), log_softmax_by_heads(told, names)
            parts.append((theirs.exp() * (theirs - ours)).sum(-1).mean())
    restated, loss = torch.stack(parts).sum() / 2, model(batch, masks)[0]
    assert abs(loss.item() - restated.item()) < 1e-10
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(x, list(named.values())) for x in (loss, restated))
    for name, a, b in zip(named, ours, theirs):
        assert torch.allclose(a, b, atol=1e-10, rtol=1e-8), name


def test_a_patch_that_has_left_influences_nothing(made: tuple[Pretrainer, Batch, Masks]) -> None:
    model, batch, masks = made
    taps, loss = model.taps(batch, masks), model(batch, masks)[0]
    assert taps["final"].ids.shape == taps["qkv5"].ids.shape == (2, 4) and (taps["final"].ids.diff(dim=1) > 0).all()
    poisoned = {name: {**arrays, "scale": arrays["scale"].clone()} for name, arrays in batch.targets.items()}
    for i, alive in enumerate(taps["final"].ids.tolist()):
        for arrays in poisoned.values():
            arrays["scale"][i, [p for p in range(16) if p not in alive]] = torch.nan
    assert model(replace(batch, targets=poisoned), masks)[0].item() == loss.item()
    x = torch.randn(2, 17, 8, dtype=torch.float64, requires_grad=True)
    left, ids = without_redundant(x, torch.arange(16).expand(2, -1), 0.7)
    assert left.shape == (2, 12, 8) and ids.shape == (2, 11)
    left.square().sum().backward()
    gone = torch.ones(2, 17, dtype=torch.bool).scatter(1, torch.cat([ids * 0, ids + 1], dim=1), False)
    assert x.grad is not None and (x.grad[gone] == 0).all() and (x.grad[~gone] != 0).all()
    image = image_of(batch)[0]
    _, _, first = encoded_by_loops(model, image)
    embedded = model.embedded(batch.pixels)[:1]
    out = next(p for p in range(16) if p not in without_redundant(embedded, torch.arange(16)[None], 0.7)[1][0])
    pixels = batch.pixels.clone()
    row, column = out // 4 * 4, out % 4 * 4
    pixels[0, row, column, 0] ^= 1  # so little that the same patches leave
    changed = model.taps(replace(batch, pixels=pixels), masks)["final"]
    assert changed.ids[0].tolist() == first and torch.equal(changed.x, taps["final"].x)


def test_whole_images_lose_nobody(made: tuple[Pretrainer, Batch, Masks]) -> None:
    model, batch, _ = made
    whole = model.student.forward_features(image_of(batch))[:, 1:]  # type: ignore[operator]
    assert torch.allclose(model.tokens(batch.pixels), whole, atol=1e-12)
    assert "before blocks 1, 3, 5 the redundant leave: 11, 7, 4 alive" in model.describe()["mask"]
    prune = load_recipe("hybrid-distill").student.prune
    assert prune is not None and prune.alive(196) == [137, 95, 66]


def test_what_does_not_go_with_pruning_is_refused(tiny_recipe: MakeRecipe, info_of_recipe: InfoOf) -> None:
    for change, said in {
        "terms.clip.positions=all": "tap final holds cls, alive",
        "terms.clip.tap=learned": "final, block<i> or qkv<i> was expected with student.prune",
        "student.prune.before=[5, 1]": "ascending numbers of blocks from 1 were expected",
        "student.prune.keep=1": "0 < keep < 1 was expected",
        "student.decoder={depth: 1}": "null was expected with student.prune",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_recipe("hybrid-distill", [change])
    for change, said in {
        "{before: [7], keep: 0.5}": "blocks from 1 to 6",
        "{before: [1], keep: 0.05}": r"of 16 patches \[0\] alive",
    }.items():
        with pytest.raises(ValueError, match=said):
            build_model(tiny_recipe("hybrid-distill", f"student.prune={change}"), info_of_recipe("hybrid-distill"))
