"""Sources side by side: the same numbers as alone, paired differences, and what nobody trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from mrmae.probe.cli import main
from mrmae.probe.compare import compare_sources, sources_and_data
from mrmae.probe.job import ProbeOptions
from mrmae.probe.run import probe_features
from mrmae.probe.settings import settings_from
from mrmae.probe.sources import open_source
from mrmae.probe.students import locate_student, read_student

VIT = "timm:test_vit/random"


def run(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def options(images: Path, out: Path, *probes: str) -> ProbeOptions:
    return ProbeOptions(
        "", [str(images)], probes or ("knn",), settings_from(["knn.k=5", "linear.epochs=5"]), out=out, workers=2
    )


def test_a_comparison_has_each_source_s_own_result_and_the_paired_differences(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    chosen = options(images, tmp_path / "out", "knn", "linear")
    found = compare_sources([str(trained), VIT], chosen, say=said.append)
    for probe in ("knn", "linear"):
        table = found["probes"][probe]
        assert [row["source"] for row in table["rows"]] == [
            str(trained), VIT, "pixels", f"untrained:{trained}", f"untrained:{VIT}"
        ]  # fmt: skip
        assert [row["kind"] for row in table["rows"]] == ["given", "given", "pixels", "untrained", "untrained"]
        assert (table["n_train"], table["n_test"], table["n_classes"]) == (24, 12, 3)
        pairs = {(pair["a"], pair["b"]): pair for pair in table["differences"]}
        assert len(pairs) == 1 + 2 * 3, "no difference of two that nobody asked for"
        pair, (ours, theirs) = pairs[str(trained), VIT], table["rows"][:2]
        assert pair["difference"] == pytest.approx(ours["accuracy"] - theirs["accuracy"])
        assert pair["interval"][0] <= pair["difference"] <= pair["interval"][1]
    alone = probe_features(
        ProbeOptions(str(trained), [str(images)], ("knn",), chosen.settings, tmp_path / "alone", workers=2)
    )
    assert alone[0]["accuracy"] == found["probes"]["knn"]["rows"][0]["accuracy"]
    (text,) = (tmp_path / "out/comparisons").glob("*.md")
    assert json.loads(text.with_suffix(".json").read_text()) == json.loads(json.dumps(found))
    assert "| paired, on the same test images | difference | 95 % interval |" in text.read_text()
    page = text.with_suffix(".html").read_text()
    assert "5 sources" not in page and "2 sources compared" in page and page.count("points [95 %]") == 2
    assert said[-1].endswith(f", {text.with_suffix('.html')}")
    notes = [line for line in said if line.startswith("note: ")]
    assert said[-1].startswith(str(text)) and len(notes) == len({*notes}) > 1


def test_an_untrained_source_that_is_given_does_not_come_again_under_another_name(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    given = [str(trained), f"untrained:{trained / 'student'}"]
    found = compare_sources(given, options(images, tmp_path), say=lambda line: None)
    assert [row["source"] for row in found["probes"]["knn"]["rows"]] == [*given, "pixels"]


def test_what_has_no_answer_per_image_stands_side_by_side(images: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = compare_sources([VIT, "pixels"], options(images, tmp_path, "rank"), say=said.append)
    table = found["probes"]["rank"]
    assert table["differences"] == [] and {row["source"] for row in table["measures"]} == {
        VIT,
        "pixels",
        f"untrained:{VIT}",
    }
    of_pixels = next(row for row in table["measures"] if row["source"] == "pixels")
    assert of_pixels["channels"] == 768 and 1 < of_pixels["RankMe"] <= of_pixels["images"]
    assert "| source | vectors | RankMe | effective rank, centred | uniformity | channels | images |" in said
    (page,) = (tmp_path / "comparisons").glob("*.html")
    assert "RankMe" in page.read_text() and "points [95 %]" not in page.read_text()


@pytest.mark.soak
def test_segmentations_stand_side_by_side(images: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = compare_sources(
        [VIT, f"{VIT}?mean=0.5"], options(images, tmp_path, "segment"), baselines=False, say=said.append
    )
    assert found["probes"]["segment"]["differences"] == []
    assert all(0 <= row["accuracy"] <= 1 for row in found["probes"]["segment"]["rows"])
    assert not any("paired" in line for line in said)
    assert "| source | value | 95 % interval | |" in said and not any("accuracy" in line for line in said)


def test_sixteen_by_sixteen_pixels_are_the_view_itself(images: Path, tmp_path: Path) -> None:
    (result,) = probe_features(ProbeOptions("pixels", [str(images)], out=tmp_path, workers=2))
    assert result["view"]["centre_crop"] == 16
    (features,) = [safetensors.torch.load_file(path)["mean"] for path in (tmp_path / "features").rglob("pooled-*")
                   if len(safetensors.torch.load_file(path)["mean"]) == 12]  # fmt: skip
    source = open_source("pixels")
    assert source.teacher and features.shape == (12, 3 * 16 * 16) and 0 <= features.min() and features.max() <= 1
    shown = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))
    assert torch.allclose(source.teacher.forward(shown).tokens[:, 0], shown.permute(0, 3, 1, 2).flatten(1) / 255)


def test_untrained_weights_are_those_a_run_begins_from(trained: Path) -> None:
    there, before = open_source(str(trained)), open_source(f"untrained:{trained}")
    assert there.about["weights_sha256"] != before.about["weights_sha256"]
    assert {k: v for k, v in there.about.items() if k != "weights_sha256"} == {
        k: v for k, v in before.about.items() if k != "weights_sha256"
    }
    assert before.cache is None and "initial weights (seed 0): nothing was trained" in before.notes
    assert open_source(f"untrained:{VIT}").name == f"untrained:{VIT}"
    assert read_student(locate_student(trained)).model.training is False


@pytest.mark.parametrize(
    "words, data, expected",
    [
        (["RUN", "photos"], [], (("RUN",), ("photos",))),
        (["RUN", "train.tar", "test.tar"], [], (("RUN",), ("train.tar", "test.tar"))),
        (["RUN", "timm:x"], ["photos"], (("RUN", "timm:x"), ("photos",))),
        (["RUN"], ["a", "b"], (("RUN",), ("a", "b"))),
    ],
)
def test_words_are_sources_and_images(words: list[str], data: list[str], expected: Any) -> None:
    assert sources_and_data(words, data) == expected


def test_compare_takes_data_among_its_words(trained: Path, images: Path) -> None:
    run_, photos = str(trained), str(images)
    for words in ([photos, run_, "pixels"], [run_, "pixels", photos]):
        assert sources_and_data(words, [], compare=True) == ((run_, "pixels"), (photos,))
    assert sources_and_data([run_, "b"], [photos], compare=True) == ((run_, "b"), (photos,))
    for words in ([run_], [photos], [photos, "runs/typo", "runs/typos", run_]):
        with pytest.raises(ValueError, match="--compare: of .* these are SOURCES: .*; expected them and one DATA"):
            sources_and_data(words, [], compare=True)


def test_several_sources_without_data_are_told_how_to_compare_them(
    trained: Path, images: Path, tiny_cache: Path
) -> None:
    for other in (trained, trained / "student", VIT, f"{tiny_cache}#a", "pixels"):
        out = run(trained, other, images)
        assert out.exit_code == 1, out.output
        assert f"DATA: {other} is a SOURCE, not images" in out.output
        assert f"probe-features {trained} {other} --data {images}" in out.output
    assert "DATA: missing" in run(trained).output


def test_what_cannot_be_compared_is_refused(trained: Path, images: Path, tmp_path: Path) -> None:
    dense = run(trained, VIT, "--data", images, "--probe", "dense", "--out", tmp_path)
    assert dense.exit_code == 1 and "--probe dense: gives no number that could be compared" in dense.output
    twice = run(trained, trained, "--data", images, "--out", tmp_path)
    assert twice.exit_code == 1 and "is given twice" in twice.output
    pixels = run("pixels", images, "--probe", "finetune", "--out", tmp_path)
    assert pixels.exit_code == 1 and "no model to fine-tune, and bare pixels have none" in pixels.output
