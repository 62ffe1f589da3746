"""Relations among tokens: restated plainly, over the tokens that a term reads, and what they ask of student and cache."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mrmae.train.method.masks import Draw, Masks
from mrmae.train.method.model import Pretrainer, build_model
from mrmae.train.method.recipe import Recipe, load_recipe
from mrmae.train.method.relations import relation_divergence
from mrmae.train.method.samplers import draw_masks
from mrmae.train.method.targets import Batch, CacheInfo

MakeRecipe = Callable[..., Recipe]
InfoOf = Callable[[str], CacheInfo]
MakeBatch = Callable[..., Batch]


def relations_by_loops(qkv: Tensor, relation: str, heads: int) -> Tensor:
    """[h, n, n]: softmax over j of x_i . y_j / sqrt(d_h), head by head, token by token."""
    n, d = qkv.shape[0], qkv.shape[1] // 3
    part = {"q": qkv[:, :d], "k": qkv[:, d : 2 * d], "v": qkv[:, 2 * d :]}
    wide, rows = d // heads, []
    for h in range(heads):
        x, y = (part[name][:, h * wide : (h + 1) * wide] for name in relation)
        scores = torch.stack([torch.stack([(x[i] * y[j]).sum() / wide**0.5 for j in range(n)]) for i in range(n)])
        rows.append(torch.stack([torch.exp(row) / torch.exp(row).sum() for row in scores]))
    return torch.stack(rows)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * weight + bias


def masks_of(model: Pretrainer, batch: Batch) -> Masks:
    return draw_masks(batch, Draw(0, 0), recipe=model.recipe.mask, l=model.info.n_patches)


def told_qkv(model: Pretrainer, batch: Batch, name: str) -> Tensor:
    """[b, 1 + l, 3 d] of the teacher: its stored input through the frozen block's norm and projection."""
    stored, tail = batch.targets[name], {k: v.double() for k, v in model.info.derived[f"{name}:qkv_12"].tail.items()}
    tokens = stored["tokens"].double() * stored["scale"].double()[..., None]
    x = torch.cat([stored["cls"].double()[:, None], tokens], dim=1)
    return norm(x, tail["layer_norm.weight"], tail["layer_norm.bias"]) @ tail["qkv.weight"].T + tail["qkv.bias"]


@pytest.mark.parametrize("positions", ["cls+all", "all"])
def test_tinymims_loss_and_gradients_are_the_formulas(
    tiny_recipe: MakeRecipe, info_of_recipe: InfoOf, tiny_batch: MakeBatch, positions: str
) -> None:
    """The mean over images, heads and tokens of `sum_j R_T log(R_T / R_S)`, for qk and for vv; without CLS, softmax over patches alone."""
    changed = [f"terms.{key}.positions={positions}" for key in ("qk", "vv")]
    info = info_of_recipe("tinymim")
    model = build_model(tiny_recipe("tinymim", "student.drop_path=0", *changed), info, dtype=torch.float64)
    batch = tiny_batch(info)
    masks, first = masks_of(model, batch), int("cls" not in positions)
    loss = model(batch, masks)[0]
    caught: list[Tensor] = []
    hook = model.student.blocks[5].attn.qkv.register_forward_hook(lambda _m, _i, out: caught.append(out))  # type: ignore[union-attr,operator]
    vit, mean, std = (
        model.student,
        torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64),
        torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64),
    )
    vit.forward_features(((batch.pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2))
    hook.remove()
    told, parts = told_qkv(model, batch, "vit12"), []
    for relation in ("qk", "vv"):
        for i in range(2):
            ours, theirs = (relations_by_loops(x[i, first:], relation, 2) for x in (caught[0], told))
            parts.append((theirs * (theirs / ours).log()).sum(-1).mean())
    restated = torch.stack(parts).reshape(2, 2).mean(1).sum()
    assert abs(loss.item() - restated.item()) < 1e-10
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, a, b in zip(
        named, torch.autograd.grad(loss, list(named.values())), torch.autograd.grad(restated, list(named.values()))
    ):
        assert torch.allclose(a, b, atol=1e-10, rtol=1e-8), name


def test_a_relation_is_gathered_before_it_is_normalised() -> None:
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 9, 24, generator=draw, dtype=torch.float64)
    other, some = torch.randn(2, 9, 24, generator=draw, dtype=torch.float64), [0, 3, 4, 8]
    for relation in ("qk", "vv"):
        assert relation_divergence(qkv[:, some], qkv[:, some], relation, heads=4).abs().max() < 1e-14
        few = relation_divergence(qkv[:, some], other[:, some], relation, heads=4)
        whole = relation_divergence(qkv, other, relation, heads=4)
        assert few.shape == (2, 4) and not torch.allclose(few, whole[:, some], rtol=0.05) and (few > 0).all()


def test_in_half_precision_relations_are_fp32() -> None:
    x, y = (torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        rough = relation_divergence(100 * x, 100 * y, "qk", heads=2)
    assert rough.dtype == torch.float32 and torch.equal(rough, relation_divergence(100 * x, 100 * y, "qk", heads=2))
    assert rough.isfinite().all()


def test_what_nothing_reads_of_the_last_block_stays_at_its_start(
    tiny_recipe: MakeRecipe, info_of_recipe: InfoOf
) -> None:
    model = build_model(tiny_recipe("tinymim"), info_of_recipe("tinymim"))
    last = {name for name, p in model.student.blocks[5].named_parameters() if p.requires_grad}
    assert last == {"norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"}
    assert "of its block 6 only queries, keys and values are read" in model.describe()["student"]
    assert all(p.requires_grad for p in model.student.blocks[4].parameters())


def test_what_relations_ask_for_is_refused_where_it_is_not_there(
    tiny_recipe: MakeRecipe, info_of_recipe: InfoOf
) -> None:
    info, recipe = info_of_recipe("tinymim"), tiny_recipe("tinymim")
    with pytest.raises(
        ValueError, match=r"wants tap qkv_12.*extract-features IMAGES CACHE --teacher NAME=LIBRARY:MODEL\?tap=input_12"
    ):
        build_model(recipe, replace(info, derived={}))
    itself = replace(info.teachers["vit12"], width=24, column="vit12.qkv_12")
    with pytest.raises(ValueError, match=r"stores qkv_12 of teacher 'vit12' itself.*--teacher vit12=...\?tap=input_12"):
        build_model(recipe, replace(info, teachers={"vit12": itself}, derived={}))
    heads = replace(
        info.derived["vit12:qkv_12"], tail={**info.derived["vit12:qkv_12"].tail, "qkv.heads": torch.tensor(5.0)}
    )
    with pytest.raises(ValueError, match="in the teacher's 5 heads and the student is 64 channels wide"):
        build_model(recipe, replace(info, derived={"vit12:qkv_12": heads}))
    for change, said in {
        "terms.qk.head=linear": "head is 'linear'; none was expected with distance kl",
        "terms.qk.tap=final": "tap is 'final'; qkv<i> was expected",
        "terms.qk.teacher_tap=block_11": "qkv_<i> was expected with distance kl.qk., from a stored input_<i>",
        "terms.qk.positions=cls": "patches were expected",
        "terms.qk.transform=ln0": "none was expected",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_recipe("tinymim", [change])
