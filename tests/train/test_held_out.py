"""Images held out are never trained on, their loss is the model's on fixed masks, and k-NN counts votes as the paper says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from training import train_quietly

from mrmae.common.spectrum import entropy_rank, singular_values
from mrmae.train import held_out, loop, pictures
from mrmae.train import run as runs
from mrmae.train.checkpoint import list_checkpoints, read_checkpoint
from mrmae.train.feed import load_masked
from mrmae.train.log import read_rows
from mrmae.train.method.model import build_model, evaluating
from mrmae.train.method.recipe import load_recipe
from mrmae.train.ranks import Ranks
from mrmae.train.run import build_run
from mrmae.train.setup import Cadence, Setup

QUICK = (
    "student.model=test_vit_of_3",
    "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
    "optim.epochs=3",
    "optim.batch_size=4",
    "optim.warmup_epochs=1",
    "optim.lr_per_256=0.1",
)


def _train(cache: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    train_quietly(cache, out, load_recipe("mr-mae", QUICK), **options)
    return read_rows(out / "log.jsonl", "epoch")


@pytest.fixture(scope="module")
def rows(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The epoch rows of a run that holds out a third."""
    return _train(tiny_cache, tmp_path_factory.mktemp("held") / "out", hold_out=0.3, probe_every=2)


def test_every_epoch_tells_the_loss_of_what_is_held_out_and_it_falls(rows: list[dict[str, Any]]) -> None:
    assert [row["held_out"].keys() for row in rows] == [{"loss", "pixels", "mimic/a", "mimic/b"}] * 3
    assert rows[-1]["held_out"]["loss"] < 0.97 * rows[0]["held_out"]["loss"]
    assert ["knn_top1" in row for row in rows] == [False, True, True]  # every two epochs, and at the end
    assert all(row["knn"].keys() == {"k", "bank", "queries"} for row in rows[1:])
    assert all(1 <= row["rankme"] <= min(row["rank"].values()) for row in rows[1:])
    assert all(0 <= row["knn_top1"] <= 1 for row in rows[1:]) and all("memory_mib" in row for row in rows)


def test_held_out_loss_is_the_mean_over_images_on_the_masks_of_epoch_0(tiny_cache: Path) -> None:
    run = build_run(tiny_cache, Path("out"), load_recipe("mr-mae", QUICK), Ranks(), Setup("cpu", hold_out=0.3))
    assert len(run.held_out) % run.share.micro_size, "an uneven last piece is wanted here"
    run.epoch = 2
    batch, masks = load_masked(run, run.held_out, epoch=0)
    assert masks is not None
    with torch.no_grad():
        loss, terms = run.model(batch, masks)
    expected = {"loss": float(loss), **{name: float(term) for name, term in terms.items()}}
    assert held_out.held_out_loss(run) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_what_is_held_out_is_that_of_evaluation_and_modes_come_back(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("mr-mae", [*QUICK, "student.drop_path=0.5"])
    run = build_run(tiny_cache, Path("out"), recipe, Ranks(), Setup("cpu", hold_out=0.3))
    found = held_out.held_out_loss(run)["loss"]
    run.model.student.blocks[1].eval()
    modes = [module.training for module in run.model.modules()]
    whole = load_masked(run, run.held_out, epoch=0)
    assert whole[1] is not None and run.model.training
    with evaluating(run.model), torch.no_grad():
        expected = float(run.model(*whole)[0])
    assert found == pytest.approx(expected, rel=1e-5)
    assert run.model(*whole)[0].item() != pytest.approx(expected, rel=1e-3)  # drop path is on again
    monkeypatch.setattr(run.model, "tokens", lambda _: torch.rand(2) / None)
    with pytest.raises(TypeError):
        held_out.image_features(run, run.numbers[:2])
    assert [module.training for module in run.model.modules()] == modes


class Noisy(nn.Module):
    """Dropout and batch norm around a layer: what uses the random stream, and what remembers batches, in training mode."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = layer, nn.BatchNorm1d(width), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.drop(self.norm(self.layer(x).flatten(0, 1)).reshape(x.shape))
        return out


def test_a_run_that_looks_aside_trains_to_the_same_bits(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(*args: Any, **options: Any) -> Any:
        model = build_model(*args, **options)
        model.student.norm = Noisy(model.student.norm, model.student.embed_dim)
        assert model.decoder is not None
        model.decoder.norm = Noisy(model.decoder.norm, 16)
        return model

    monkeypatch.setattr(runs, "build_model", noisy)
    drawn: list[Path] = []  # what the pictures show is computed; drawing them takes seconds
    monkeypatch.setattr(pictures, "draw_sheet", lambda *_, **__: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(pictures, "publish_png", lambda path, _: drawn.append(path))
    monkeypatch.setattr(loop, "export_student", lambda *_, **__: None)
    recipe, states = load_recipe("mr-mae", [*QUICK, "student.drop_path=0.5"]), []
    for looks in (True, False):
        torch.manual_seed(0)
        if not looks:
            monkeypatch.setattr(loop, "held_out_row", lambda *_: {})
        out = tmp_path / str(looks)
        train_quietly(tiny_cache, out, recipe, hold_out=0.3, probe_every=1 * looks, panels_every=1 * looks)
        states.append(read_checkpoint(list_checkpoints(out / "checkpoints")[-1])["model"])
    assert len(drawn) == 3
    assert "student.norm.norm.running_mean" in states[0]
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]), name


def test_a_run_keeps_what_it_holds_out(tiny_cache: Path, tmp_path: Path) -> None:
    _train(tiny_cache, tmp_path / "out", hold_out=0.3)
    with pytest.raises(ValueError, match="holds out 0.3 of the images and --hold-out is now 0.2"):
        _train(tiny_cache, tmp_path / "out", hold_out=0.2)


def test_features_come_back_in_order_whatever_the_pieces(tiny_cache: Path) -> None:
    run = build_run(tiny_cache, Path("out"), load_recipe("mr-mae", QUICK), Ranks(), Setup("cpu"))
    found = held_out.image_features(run, run.numbers[:7])
    alone = torch.cat([held_out.image_features(run, run.numbers[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_without_labels_or_images_held_out_rankme_stands_alone_and_the_plan_says_so(
    make_cache: Any, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "cache", n=12, n_views=1, labels=False)
    for share, why in ((0.3, "has labels for 0 images"), (0.0, "--hold-out 0.01")):
        setup = Setup("cpu", hold_out=share)
        run = build_run(cache, tmp_path / "out", load_recipe("mr-mae", QUICK), Ranks(), setup, Cadence(probe_every=1))
        assert any(why in note and "RankMe alone" in note for note in run.notes)
        features = held_out.image_features(run, run.numbers)
        assert held_out.probe_student(run) == {
            "rankme": pytest.approx(entropy_rank(singular_values(features)), rel=1e-6),
            "rank": {"images": len(run.numbers), "channels": features.shape[1]},
        }
