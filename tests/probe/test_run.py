"""probe-features end to end: every probe, results that are kept, what is refused and what is said."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from click.testing import CliRunner
from PIL import Image

from mrmae.probe import attentive, features
from mrmae.probe.cli import main
from mrmae.probe.job import ProbeOptions
from mrmae.probe.run import RUNNERS, probe_features
from mrmae.probe.settings import PROBES, Settings, settings_from
from mrmae.train.run_page import write_run_page

FEW = (
    "linear.epochs=20",
    "attentive.epochs=3",
    "attentive.queries=4",
    "attentive.blrs=[1.0]",
    "dense.images=3",
    "dense.clusters=3",
    "low_shot.linear.epochs=5",
    "stability.jpeg=[50]",
    "stability.images=3",
)


def probe(
    source: Path | str, data: Path | str, *probes: str, sets: tuple[str, ...] = (), **how: Any
) -> tuple[list[Any], list[str]]:
    said: list[str] = []
    options = ProbeOptions(str(source), [str(data)], probes, settings_from([*FEW, *sets]), workers=2, **how)
    return probe_features(options, say=said.append), said


def test_the_command_knows_every_probe() -> None:
    assert [*PROBES] == [*RUNNERS] and {probe.replace("-", "_") for probe in PROBES} == {
        f.name for f in fields(Settings)
    }


def test_all_probes_of_features_give_results_files_and_pictures(trained: Path, images: Path, tmp_path: Path) -> None:
    results, said = probe(trained, images, "knn", "linear", "attentive", "dense", out=tmp_path)
    nn, heads, ep, picture = results
    assert nn["accuracy"] > 0.8 and heads["accuracy"] > 0.8  # the colour is the class
    assert [row["name"] for row in nn["rows"]][:2] == ["5-NN, mean", "10-NN, mean"]
    assert len(nn["rows"]) == 3 * 2 * 3 and len(heads["rows"]) == 8
    for result in (nn, heads, ep):
        low, high = result["interval"]
        assert 0 <= low <= result["accuracy"] <= high <= 1 and result["n_test"] == 12
        stored = json.loads((tmp_path / "results" / f"{result['probe']}-{result['id'][7:19]}.json").read_text())
        assert stored["rows"] == result["rows"] and stored["view"]["centre_crop"] == 32
    predicted = safetensors.torch.load_file(tmp_path / "results" / f"knn-{nn['id'][7:19]}.safetensors")["predicted"]
    assert len(predicted) == 12
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") >= 3 + 18 + 8 and picture["pictures"][0] in table
    for result in (ep, picture):
        pixels = np.asarray(Image.open(tmp_path / result["pictures"][0]).convert("RGB"))
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 20
    assert any(line.startswith("linear  ") for line in said)


def test_what_needs_no_label_takes_any_folder_and_gives_measures_and_pictures(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in images.rglob("train/*/*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    (rank, moved), said = probe(trained, flat, "rank", "stability", out=tmp_path / "out")
    assert [row["vectors"] for row in rank["measures"]] == ["mean", "cls", "both"] and rank["measures"][0][
        "images"
    ] == 24
    assert all(0 < row["effective rank, centred"] <= 24 for row in rank["measures"])
    assert [row["change"] for row in moved["measures"]][3:5] == ["JPEG, quality 50", "blur, std 0.5 px"]
    assert all(row["tokens"] > 0 for row in moved["measures"])
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| vectors | RankMe | effective rank, centred |" in table and "| shift, 4 px | " in table
    for result in (rank, moved):
        assert Image.open(tmp_path / "out" / result["pictures"][0]).width > 500
    assert any(line.startswith("rank  ") and "mean: RankMe " in line for line in said)
    both, _ = probe(trained, images, "rank", out=tmp_path / "both")
    assert both[0]["measures"][0]["images"] == 36, "train and test part"
    with pytest.raises(ValueError, match="none of .* keys match|matches none of"):
        probe(trained, flat, "rank", "knn", out=tmp_path / "no")


def test_stability_of_a_column_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--probe stability needs a model"):
        probe(f"{tiny_cache}#a", tiny_cache, "stability", out=tmp_path)


def test_a_runs_page_tells_what_was_found_and_its_failure_is_a_note(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    page = write_run_page(tmp_path / "out")
    assert "Nothing was measured yet" in page.read_text()
    (found,), said = probe(tmp_path / "out", images, "knn")
    assert f"{found['accuracy']:.3f} [{found['interval'][0]:.3f}, " in page.read_text() and said[-1].endswith(
        f"{page}, too"
    )
    (tmp_path / "out" / "recipe.yaml").unlink()
    (again,), said = probe(tmp_path / "out", images, "knn")
    assert again["accuracy"] == found["accuracy"] and said[-1].startswith(f"note: {page} could not be drawn: ")


def test_the_same_again_computes_nothing_and_another_seed_uses_the_same_features(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, said = probe(trained, images, "knn", "attentive", out=tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(features.PooledFeatures, "forward", refuse)
    other, _ = probe(trained, images, "knn", out=tmp_path, seed=1)
    assert other[0]["id"] != first[0]["id"] and other[0]["accuracy"] == first[0]["accuracy"]
    monkeypatch.setattr(attentive, "train_probe", refuse)
    again, told = probe(trained, images, "knn", "attentive", out=tmp_path)
    assert json.loads(json.dumps(again, default=list)) == json.loads(json.dumps(first, default=list)) and told == said
    monkeypatch.undo()
    (tmp_path / first[1]["pictures"][0]).unlink()
    assert probe(trained, images, "attentive", out=tmp_path)[0][0]["accuracy"] == first[1]["accuracy"]  # drawn again


def test_results_lie_beside_the_run(trained: Path, images: Path) -> None:
    probe(trained, images, "knn")
    assert (trained / "probes" / "results.md").is_file() and list((trained / "probes" / "features").iterdir())
    shutil.rmtree(trained / "probes")


def test_test_images_of_the_students_own_cache_are_refused_unless_allowed(
    trained: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    parts = {"train_include": ["*bild 00*"], "test_include": ["*bild 01*"], "out": tmp_path}
    with pytest.raises(ValueError, match=r"10 of 10 test images are in the student's own cache .* pass --allow-shared"):
        probe(trained, tiny_cache, "knn", **parts)
    results, said = probe(trained, tiny_cache, "knn", **parts, allow_shared=True)
    assert any("10 of 10 test images were seen in pre-training" in line for line in said)
    assert results[0]["view"] == {"stored_view": 0, "px": 32} and results[0]["notes"]


def test_a_column_is_probed_on_its_cache(tiny_cache: Path, tmp_path: Path) -> None:
    results, _ = probe(f"{tiny_cache}#a", tiny_cache, "knn", "linear", "attentive", "dense", out=tmp_path,
                       train_include=["*bild 00*", "*bild 02*"], test_include=["*bild 01*"])  # fmt: skip
    assert results[0]["accuracy"] > 0.5 and results[0]["n_classes"] == 3


def test_stored_views_of_another_size_are_resized_and_it_is_said(
    trained: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    _, said = probe(trained, tiny_cache, "knn", out=tmp_path, train_include=["*bild 00*"], test_include=["*bild 01*"],
                    allow_shared=True, size=48)  # fmt: skip
    assert any("stored at 32 px and resized to the model's 48 px" in line for line in said)
    assert any("positions interpolated" in line for line in said)


def test_one_image_per_class_still_gives_results_and_says_what_is_missing(
    trained: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    few = make_images(tmp_path / "images", {"train": 1, "test": 1})
    results, said = probe(trained, few, "knn", "linear", "attentive", out=tmp_path, sets=("attentive.blrs=[0.1, 1.0]",))
    assert [result["n_train"] for result in results] == [3, 3, 3]
    assert any("k = 20 of 3 train images: 3 is reported instead" in line for line in said)
    assert sum("one train image per class: none can be held out" in line for line in said) == 2


def test_a_moved_cache_is_said(trained: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "probes"))
    facts = json.loads((tmp_path / "run" / "run.json").read_text()) | {"cache": str(tmp_path / "gone")}
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    assert any("whether it held test images is not known" in line for line in probe(tmp_path / "run", images, "knn")[1])


@pytest.mark.parametrize("sets, told", [
    ("knn.kk=3", "knn.kk is not a key"),
    ("knn.k=0", "knn.k=0: expected a number above 0"),
    ("linear.lrs=[]", "linear.lrs="),
    ("knn.pool=max", "knn.pool"),
    ("finetune.drop_path=1.0", "0 <= drop_path < 1"),
    ("low-shot.shares=[0.1, 2.0]", "shares of the labels, at most 1"),
    ("stability.jpeg=[101]", "qualities from 1 to 100"),
    ("attentive.queries=5", "5 queries cannot share 64 / 1 channels"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(trained: Path, images: Path, tmp_path: Path, sets: str, told: str) -> None:
    out = CliRunner().invoke(main, [str(trained), str(images), "--probe", "attentive", "--set", sets, "--out", str(tmp_path),
                                    "--workers", "2"])  # fmt: skip
    assert out.exit_code == 1 and told in out.output and "Traceback" not in out.output


def test_the_command_prints_a_line_per_probe(trained: Path, images: Path, tmp_path: Path) -> None:
    out = CliRunner().invoke(
        main, [str(trained), str(images), "--set", "knn.k=5", "--out", str(tmp_path), "--workers", "2"]
    )
    assert out.exit_code == 0 and "5-NN, mean, 12 test images" in out.output and "RANDOM" in out.output
    out = CliRunner().invoke(main, [str(trained / "no"), str(images)])
    assert out.exit_code == 1 and "expected OUT of train-mrmae" in out.output
