"""Labels as targets: the losses by their formulas, where labels come from, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from training import train_quietly

from mrmae.shards.cache import open_cache
from mrmae.train.checkpoint import newest_readable
from mrmae.train.labels import read_labels
from mrmae.train.log import read_rows
from mrmae.train.method import Masks, Recipe, build_model, load_recipe
from mrmae.train.method.distances import asl
from mrmae.train.method.targets import Batch, CacheInfo

TERM = "terms.labels={tap: final, positions: pooled, target: labels, distance: bce, weight: 0.1}"
SHORT = ("optim.batch_size=8", "optim.epochs=1", "optim.warmup_epochs=0")


def cost(z: float, has: int, distance: str) -> Tensor:
    """One class, term by term."""
    p = 1 / (1 + torch.exp(-z))
    if distance == "bce":
        return -torch.log(p) if has else -torch.log(1 - p)
    q = torch.maximum(p - 0.05, torch.zeros_like(p))
    return -torch.log(p) if has else -(q**4) * torch.log(1 - q)


@pytest.mark.parametrize("distance", ["bce", "asl", "ce"])
@pytest.mark.parametrize("positions", ["pooled", "cls", "cls+pooled"])
def test_a_term_on_labels_is_its_formula(
    distance: str, positions: str, tiny_recipe: Callable[..., Recipe], tiny_info: Callable[..., CacheInfo],
    tiny_batch: Callable[..., Batch],
) -> None:  # fmt: skip
    classes = 3
    term = f"terms={{mine: {{tap: final, positions: {positions}, target: labels, distance: {distance}}}}}"
    info = tiny_info()
    info = CacheInfo(info.size, info.grid, classes=("a", "b", "c"))
    model = build_model(tiny_recipe("mimic-only", term), info, dtype=torch.float64)
    y = torch.tensor([[0, 1, 0], [1, 0, 0]]) if distance == "ce" else torch.tensor([[0, 1, 1], [0, 0, 0]])
    batch = Batch(torch.arange(2), tiny_batch(tiny_info()).pixels, {}, labels=y.to(torch.uint8))
    keep = torch.arange(4).expand(4, -1) + torch.tensor([0, 3, 5, 12])[:, None]  # two masks of two images
    masks = Masks(keep, keep[:, :0])
    loss, _ = model(batch, masks)
    loss.backward()
    head, weights = model.heads["mine"], [p for p in model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in weights if p.grad is not None]
    final = model.taps(batch, masks)["final"].x
    tokens = {"cls": final[:, 0], "pooled": final[:, 1:].sum(1) / 4}
    costs = []
    for place in positions.split("+"):
        z = tokens[place] @ head.weight.T + head.bias
        for row in range(4):
            has = y[row % 2]
            if distance == "ce":
                costs.append(torch.log(torch.exp(z[row]).sum()) - z[row][has.argmax()])
            else:
                costs.append(
                    torch.stack([cost(z[row, k], int(has[k]), distance) for k in range(classes)]).sum() / classes
                )
    again = torch.stack(costs).sum() / len(costs)
    assert abs(float((loss - again).detach())) < 1e-10
    for one, two in zip(found, torch.autograd.grad(again, weights)):
        assert torch.allclose(one, two, atol=1e-10, rtol=1e-9)


def test_asl_stays_finite_where_logits_are_large() -> None:
    z = torch.tensor([[[80.0, -80.0]]], requires_grad=True)
    asl(z, torch.tensor([[[0.0, 1.0]]])).sum().backward()
    assert torch.isfinite(z.grad).all()  # type: ignore[arg-type]


@pytest.fixture
def cache(make_cache: Callable[..., Path], tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache", n=16, n_views=1, teachers={})


def labels_file(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("key,label\n" + "".join(f"{key},{label}\n" for key, label in rows))
    return path


def test_folders_name_the_classes_a_file_may_and_a_run_keeps_to_its_labels(
    cache: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, opened = tiny_recipe("mae", TERM, *SHORT), open_cache(cache)
    assert train_quietly(cache, tmp_path / "folders", recipe, hold_out=0.3)["finished"]
    facts = json.loads((tmp_path / "folders" / "run.json").read_text())
    assert facts["classes"] == sorted({str(label) for label in opened.labels}) and len(facts["classes"]) > 1
    row = read_rows(tmp_path / "folders" / "log.jsonl", "epoch")[-1]
    assert 0 < row["terms"]["labels"] < 2 and 0 < row["held_out"]["labels"] < 2
    same = labels_file(tmp_path / "same.csv", [*zip(opened.keys, map(str, opened.labels)), ("elsewhere", "other")])
    assert train_quietly(cache, tmp_path / "file", recipe, hold_out=0.3, labels=same)["finished"]
    one, two = (newest_readable(tmp_path / out / "checkpoints") for out in ("folders", "file"))
    assert one is not None and two is not None and one["cache"] == two["cache"]
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    other = labels_file(tmp_path / "other.csv", [(key, "x" if i % 2 else "y") for i, key in enumerate(opened.keys)])
    with pytest.raises(ValueError, match="trained on another cache: labels was sha256:"):
        train_quietly(cache, tmp_path / "file", recipe, hold_out=0.3, labels=other)


def test_several_labels_of_an_image_and_none_are_read_from_rows_and_from_lists(tmp_path: Path) -> None:
    rows = labels_file(tmp_path / "rows.csv", [("a", "cat"), ("b", "dog"), ("a", "dog")])
    assert read_labels(rows) == {"a": ("cat", "dog"), "b": ("dog",)}
    pq.write_table(
        pa.table({"key": ["a", "b", "c"], "label": [["cat", "dog"], ["dog"], []]}), tmp_path / "lists.parquet"
    )
    assert read_labels(tmp_path / "lists.parquet") == {"a": ("cat", "dog"), "b": ("dog",), "c": ()}
    pq.write_table(pa.table({"key": ["a", "b"], "label": [3, 11]}), tmp_path / "numbers.parquet")
    assert read_labels(tmp_path / "numbers.parquet") == {"a": ("3",), "b": ("11",)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("key,class\na,1\n", "its columns are ['key', 'class']; key and label were expected"),
        ("key,label\na,cat\na,cat\n", "'a' has the label 'cat' twice"),
        ("key,label\na,\n", "key 'a' has the label ''; text or an integer was expected"),
        ("key,label\na\n", "key 'a' has the label None"),
        ("key,label\n", "holds no label"),
        ("\xff", "cannot be read as labels"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        read_labels(tmp_path / "labels.csv")
    assert told in str(error.value) and "labels.csv" in str(error.value)


@pytest.mark.parametrize("name", ["absent.csv", "labels.txt", "labels.parquet"])
def test_what_is_no_file_of_labels_is_refused(name: str, tmp_path: Path) -> None:
    if name != "absent.csv":
        (tmp_path / name).write_text("key,label\n")
    with pytest.raises(ValueError, match=f"{name}: cannot be read as labels"):
        read_labels(tmp_path / name)


def test_labels_for_half_the_keys_and_two_where_one_is_asked_are_refused(
    cache: Path, make_cache: Callable[..., Path], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    keys, out = open_cache(cache).keys, tmp_path / "out"
    half = labels_file(tmp_path / "half.csv", [(key, "x") for key in keys[:8]])
    recipe = tiny_recipe("mae", TERM, *SHORT)
    with pytest.raises(ValueError) as error:
        train_quietly(cache, out, recipe, labels=half)
    assert f"--labels {half}: has no label for 8 of 16 images, first {keys[8]!r}; term labels" in str(error.value)
    bare = make_cache(tmp_path / "bare", n=8, n_views=1, teachers={}, labels=False)
    with pytest.raises(ValueError, match="bare: has no label for 8 of 8 images"):
        train_quietly(bare, out, recipe)
    two = labels_file(tmp_path / "two.csv", [(key, label) for key in keys for label in ("x", "y")])
    with pytest.raises(ValueError, match=r"has the labels \['x', 'y'\], like 16 images not exactly one; distance ce"):
        train_quietly(cache, out, tiny_recipe("mae", TERM, "terms.labels.distance=ce", *SHORT), labels=two)
    with pytest.raises(ValueError, match="no term of recipe mae has target labels"):
        train_quietly(cache, out, tiny_recipe("mae", *SHORT), labels=two)
    assert not out.exists() or not any(out.glob("*.json"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("positions=visible", "cls or pooled was expected with target labels"),
        ("distance=mse", "one of bce, asl, ce was expected with target labels"),
        ("transform=ln0", "hog, labels, ids, boxes"),
        ("teachers=[clip]", "none was expected with target labels"),
    ],
)
def test_a_term_that_cannot_be_is_refused(change: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("mae", [TERM, f"terms.labels.{change}"])
    assert told in str(error.value)


def test_distances_of_labels_serve_no_other_target() -> None:
    with pytest.raises(ValueError, match="none of bce, asl, ce was expected with target teachers"):
        load_recipe("mr-mae", ["terms.mimic.distance=bce"])
