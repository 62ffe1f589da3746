"""What the panels show is what the tensors say."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from training import train_quietly

from mrmae.common.pictures import Strip
from mrmae.train import loop, pictures
from mrmae.train.method import load_recipe, patch_targets
from mrmae.train.ranks import Ranks
from mrmae.train.run import Run, build_run
from mrmae.train.setup import Setup

GRID = (4, 3)
SIZE = (32, 24)
QUICK = (
    "student.model=test_vit_of_3",
    "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}",
    "optim.epochs=2",
    "optim.batch_size=8",
    "optim.warmup_epochs=1",
    "optim.lr_per_256=0.1",
)


def _pixels(b: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (b, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_masked_view_hides_exactly_the_patches_not_kept() -> None:
    view = pictures.masked_view(_pixels(), torch.tensor([[0, 5], [1, 11]]), GRID)
    for b, keep in enumerate([(0, 5), (1, 11)]):
        for patch in range(12):
            i, j = divmod(patch, 3)
            cell = view[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            true = _pixels()[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy()
            assert (cell == (true if patch in keep else 128)).all()


def test_curves_are_written(tmp_path: Path) -> None:
    rows = [
        {"epoch": e, "terms": {"pixels": 1 / e, "mimic/clip": None}, "lr": 1e-4, "knn_top1": 0.5, "rankme": 3.5}
        for e in (1, 2, 3)
    ]
    pictures.draw_curves(tmp_path / "curves.png", rows, title="mr-mae", note="random weights")
    pictures.draw_curves(tmp_path / "none.png", [{"epoch": 1, "terms": {}, "lr": 0.0}], title="nothing counted")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 400 and len(image.convert("RGB").getcolors(10**7) or []) > 50


def test_a_term_has_its_baselines_as_dashed_lines_within_its_axis() -> None:
    figure, axis = plt.subplots()
    rows = [
        {"epoch": e, "terms": {"mimic/gal": 0.4 - 0.01 * e}, "held_out": {"mimic/gal": 0.41}, "resumed": [5] * (e == 2)}
        for e in (1, 2, 3)
    ]
    pictures.draw_term(axis, rows, "mimic/gal", "#0072b2", {"constant": 0.476, "position": 0.282, "images": 300.0})
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert set(lines) == {
        "training",
        "mean of a continued epoch",
        "held out",
        "one constant: 0.476",
        "one per position: 0.282",
    }
    mark = lines["mean of a continued epoch"]
    assert mark.get_xydata().tolist() == [[2, pytest.approx(0.38)]] and mark.get_markerfacecolor() == "white"
    assert lines["one constant: 0.476"].is_dashed() and not lines["training"].is_dashed()
    low, high = axis.get_ylim()
    assert low == 0 and high > 0.476
    pictures.finish_axis(axis, 3)
    assert axis.get_xlim()[0] == 0 and all(tick == int(tick) for tick in axis.get_xticks())
    plt.close(figure)


def test_curves_are_drawn_with_the_baselines_that_stand_in_run_json(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(loop, "draw_curves", lambda path, rows, **how: told.update(how))
    for facts in ({"baselines": {"pixels": {"patch_mean": 0.9}}}, {}):
        (tmp_path / "run.json").write_text(json.dumps(facts))
        loop.draw_run_curves(built(tiny_cache, tmp_path, "mae"), tmp_path / "log.jsonl")
        assert told["baselines"] == facts.get("baselines")


# ---- panels


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Strip]]:
    """The columns of every panel that is drawn, by heading, instead of the picture."""
    found: list[dict[str, Strip]] = []

    def draw(strips: list[Strip], **_: Any) -> Image.Image:
        found.append({strip.heading: strip for strip in strips})
        assert len(found[-1]) == len(strips)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(pictures, "draw_sheet", draw)
    return found


def built(cache: Path, out: Path, name: str = "mr-mae", *overrides: str) -> Run:
    own = [x for x in QUICK if name != "mimic-only" or "decoder" not in x]
    return build_run(cache, out, load_recipe(name, [*own, *overrides]), Ranks(), Setup("cpu"))


def test_a_prediction_has_its_teachers_colours_and_the_mean_at_a_position_is_grey(
    tiny_cache: Path, tmp_path: Path, shown: list[dict[str, Strip]]
) -> None:
    run = built(tiny_cache, tmp_path, "mr-mae", "terms.mimic.transform=ln0")
    whole = pictures.whole_grids(run, run.cache.numbers)
    for term in run.model.terms[:2]:
        assert term.teacher is not None
        targets = patch_targets(term, run.model.statistics[term.name], whole)
        run.model.heads[term.name] = Says(targets[:5])
        pictures.draw_run_panels(run, 1)
        assert np.array_equal(
            shown[-1][f"{term.teacher}, predicted"].pictures, shown[-1][f"teacher {term.teacher}"].pictures
        )
        assert shown[-1][f"teacher {term.teacher}"].pictures.std() > 40
        run.model.heads[term.name] = Says(targets.mean(0).expand(5, -1, -1))
        pictures.draw_run_panels(run, 1)
        assert np.abs(shown[-1][f"{term.teacher}, predicted"].pictures.astype(int) - 128).max() <= 1


class Says(torch.nn.Module):
    """A head that says always the same."""

    def __init__(self, what: torch.Tensor) -> None:
        super().__init__()
        self.what = what

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.what


def test_teachers_have_the_same_colours_in_every_epoch_and_predictions_have_not(
    tiny_cache: Path, tmp_path: Path, shown: list[dict[str, Strip]]
) -> None:
    train_quietly(tiny_cache, tmp_path / "out", load_recipe("mr-mae", QUICK), panels_every=1)
    first, second = shown
    for name in ("view", "seen by the student", "teacher a", "teacher b"):
        assert np.array_equal(first[name].pictures, second[name].pictures), name
    for name in ("a, predicted", "b, predicted", "student", "prediction alone"):
        assert not np.array_equal(first[name].pictures, second[name].pictures), name
    assert first["reconstruction"].warning == "BRIGHTNESS AND CONTRAST ARE THE TRUE PATCH'S"
    assert first["teacher a"].warning == "RANDOM WEIGHTS"


def test_a_decoders_predictions_stand_where_patches_are_hidden(
    tiny_cache: Path, tmp_path: Path, shown: list[dict[str, Strip]]
) -> None:
    run = built(tiny_cache, tmp_path, "mimic-masked")
    pictures.draw_run_panels(run, 1)
    white = (shown[0]["a, predicted"].pictures == 255).all(-1)
    seen = shown[0]["seen by the student"].pictures.reshape(5, 4, 8, 4, 8, 3)
    hidden = (seen == 128).all((2, 4, 5))
    assert hidden.sum() == 5 * 12 and not white[hidden].any() and white[~hidden].all()


def test_one_head_behind_encoder_and_decoder_speaks_of_every_patch_and_of_several_masks_the_first_is_drawn(
    tiny_cache: Path, tmp_path: Path, shown: list[dict[str, Strip]]
) -> None:
    own = ["student.decoder.width=64", "terms.mimic.tap=final+decoder", "terms.mimic.positions=visible+predicted"]
    run = built(tiny_cache, tmp_path, "mr-mae", *own, "mask.masks_per_image=2")
    pictures.draw_run_panels(run, 1)
    assert {len(strip.pictures) for strip in shown[0].values()} == {5}
    assert not (shown[0]["a, predicted"].pictures == 255).all(-1).any()


def test_a_teacher_that_no_term_predicts_is_marked(
    tiny_cache: Path, tmp_path: Path, shown: list[dict[str, Strip]]
) -> None:
    pictures.draw_run_panels(built(tiny_cache, tmp_path, "mr-mae", "terms.mimic.teachers=[a]"), 1)
    assert shown[0]["teacher b"].warning == "NOT USED by mr-mae RANDOM WEIGHTS" and "b, predicted" not in shown[0]
    pictures.draw_run_panels(built(tiny_cache, tmp_path, "mae"), 1)
    assert {f"teacher {x}" for x in "ab"} < set(shown[1]) and not any("predicted" in name for name in shown[1])
