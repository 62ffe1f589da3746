"""The study's pure parts: every arm is well-formed, every command parses, and the report follows from the CSV rows."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import study_mimic

    yield study_mimic
    sys.path.remove(str(BENCHMARKS))


def test_arms_are_named_once_and_read_known_caches(study: Any) -> None:
    arms = study.study_arms
    names = [arm["name"] for arm in arms.ARMS]
    assert len(names) == len(set(names))
    for arm in arms.ARMS:
        assert arm["cache"] in arms.CACHES
        trained = arm["source"].removeprefix("WORK/")
        assert trained == arm["source"] or names.index(trained) < names.index(arm["name"])
        assert all(epoch < arm["epochs"] for epoch in arm["curve"])
    grown = [smaller for _, _, _, smaller in arms.CACHES.values() if smaller]
    assert set(grown) <= set(arms.CACHES)


def test_every_command_parses(study: Any) -> None:
    from mrmae.extract.cli import main as extract_features
    from mrmae.probe.cli import main as probe_features
    from mrmae.probe.settings import settings_from
    from mrmae.train.cli import main as train_mrmae
    from mrmae.train.cli import overrides
    from mrmae.train.method.recipe import load_recipe

    known: dict[str, click.Command] = {
        "extract-features": extract_features,
        "train-mrmae": train_mrmae,
        "probe-features": probe_features,
    }
    arms = study.study_arms
    every = [arms.extraction(arm["cache"]) for arm in arms.ARMS]
    every += [command for arm in arms.ARMS for command in arms.commands(arm)]
    for name, *words in every:
        given = known[name].make_context(name, words).params
        if name == "train-mrmae":
            shorthands = {short: given[short] for short in sys.modules["mrmae.train.cli"].SHORTHANDS}  # type: ignore[attr-defined]
            load_recipe(given["recipe"], [*overrides(shorthands, given["sets"]), *given["sets"]])
        if name == "probe-features":
            settings_from(given["sets"])


def test_a_list_shows_a_cache_before_the_arm_that_reads_it(study: Any) -> None:
    lines = study.listed([arm for arm in study.ARMS if arm["name"] == "views-2"])
    assert lines[0].startswith("# cache eurosat-k2\nextract-features DATA/eurosat-rgb.tar")
    assert lines[2].startswith("train-mrmae WORK/caches/eurosat-k2 WORK/views-2")


def row(arm: str, seed: int, right: Any, packed: Any, probe: str = "knn") -> dict[str, Any]:
    right = np.array(right, bool)
    return {"part": "1", "arm": arm, "recipe": arm.rpartition("-")[0], "seed": seed, "epoch": 10, "probe": probe,
            "accuracy": f"{right.mean():.4f}", "low": "0", "high": "1", "n_train": 8, "n_test": len(right), "right": packed(right)}  # fmt: skip


def test_the_report_follows_from_the_rows(study: Any, tmp_path: Path) -> None:
    report = study.study_report
    truth = {("mr-mae-s0", 0): [1, 1, 1, 0, 1, 1, 1, 1, 1, 1], ("mae-s0", 0): [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]}
    rows = [row(arm, seed, right, report.packed) for (arm, seed), right in truth.items()]
    study.merge(tmp_path / "study_mimic.csv", rows, study.KEY)
    study.merge(tmp_path / "study_mimic.csv", rows[:1], study.KEY)
    study.merge(
        tmp_path / "study_cost.csv", [{"arm": "mae-s0", "what": "train", "cpu_s": 60, "wall_s": 90}], ("arm", "what")
    )
    assert len(report.read(tmp_path / "study_mimic.csv")) == 2, "a row of the same key is replaced"
    (tmp_path / "evidence.md").write_text("before\n<!-- claims -->\n<!-- /claims -->\nafter\n")
    report.write(tmp_path, tmp_path)
    study.study_plots.draw(tmp_path, tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| `mr-mae` − `mae` | +40.0 (" in text
    assert (tmp_path / "pictures" / "study_curves.png").exists()


def test_right_and_wrong_survive_the_file(study: Any) -> None:
    right = np.arange(13) % 3 == 0
    assert (study.study_report.unpacked(row("x-s0", 0, right, study.study_report.packed)) == right).all()


def test_a_paired_interval_is_narrow_where_two_arms_err_on_the_same_images(study: Any) -> None:
    report, base = study.study_report, np.arange(400) % 2 == 0
    better = base | (np.arange(400) % 20 == 1)
    text = report.difference([row("a-s0", 0, better, report.packed)], [row("b-s0", 0, base, report.packed)])
    mean, low, high = (float(x) for x in text.replace("(", "").replace(")", "").replace("to", "").split())
    assert mean == 5.0 and 2.5 < low < 5 < high < 7.5, "unpaired it would be 14 points wide"


def test_the_plot_of_arms_has_the_best_first_with_paired_intervals(
    study: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    plots, report, base = study.study_plots, study.study_report, np.arange(400) % 2 == 0
    some = base | (np.arange(400) % 20 == 1)
    arms = {"mr-mae-s0": base, "weight-10": base & (np.arange(400) % 20 != 2), "weight-3": some, "views-2": base}
    rows = [row(arm, 0, right, report.packed, probe) for arm, right in arms.items() for probe in ("knn", "linear")]
    figures: list[Any] = []
    monkeypatch.setattr(plots, "finish", lambda figure, path: figures.append(figure))
    plots.draw_arms(tmp_path / "arms.png", rows)
    axis = figures[0].axes[0]
    assert figures[0].axes[1].get_title() == "linear: arm − mr-mae (0.500)", "its own accuracy, not that of 10-NN"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["weight-10", "views-2", "weight-3"], "upwards"
    points = {
        round(float(line.get_xdata()[0]), 1): line.get_markerfacecolor()
        for line in axis.get_lines()
        if line.get_marker() == "o"
    }
    assert list(points) == [-5.0, 0.0, 5.0] and points[0.0] == "white" != points[5.0], (
        "hollow where 0 is inside the interval"
    )
    plots.pyplot().close(figures[0])
