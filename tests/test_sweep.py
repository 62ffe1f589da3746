"""examples/sweep.py: one student per teacher from one cache, and a table; the shipped yaml's teachers are known."""

import importlib
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mrmae.extract.cli import main as extract
from mrmae.extract.teachers.catalogue import known_teachers
from mrmae.probe.cli import main as probe
from mrmae.train.cli import main as train

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_shipped_sweep_names_teachers_that_there_are() -> None:
    told = yaml.safe_load((EXAMPLES / "sweeps" / "quality-captions.yaml").read_text())
    assert set(told["teachers"].values()) <= set(known_teachers()) and len(told["teachers"]) == 6


def test_a_sweep_ends_in_a_table_and_goes_on(
    tiny_images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "extract": "--size 32 --grid 4 --device cpu --shard-samples 8",
        "teachers": {"vit": "timm:test_vit/random", "cnn": "timm:test_efficientnet/random"},
        "train": "--recipe mr-mae --student test_vit --epochs 1 --batch-size 8 --device cpu --panels-every 0 "
        "--set 'student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}'",
        "probe": "--probe knn --device cpu --no-baselines --allow-shared --set knn.k=3",
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(small))
    data = tmp_path / "data"
    for key, content in tiny_images.items():
        for part in ("train", "test"):
            (data / part / key).parent.mkdir(parents=True, exist_ok=True)
            (data / part / key).write_bytes(content)
    programs = {"mrmae.extract.cli": extract, "mrmae.train.cli": train, "mrmae.probe.cli": probe}
    said: list[str] = []

    def call(words: list[str]) -> int:
        """The command in this process, where all is imported."""
        result = CliRunner().invoke(programs[words[2]], words[3:])
        said.append(result.output)
        return result.exit_code

    monkeypatch.syspath_prepend(EXAMPLES)
    sweep = importlib.import_module("sweep")
    monkeypatch.setattr(subprocess, "call", call)
    words = [str(tmp_path / "s.yaml"), str(data / "train"), str(tmp_path / "o"), "--data", str(data)]
    done = CliRunner().invoke(sweep.main, words)
    assert done.exit_code == 0, done.output + said[-1]
    assert "terms.mimic.teachers=[vit]" in done.output, done.output
    assert "| cnn | 1.000 |" in said[-1] and "| vit | 1.000 |" in said[-1], "the images of the train part themselves"
    (tmp_path / "s.yaml").write_text("extract: x\n")
    done = CliRunner().invoke(sweep.main, words)
    assert done.exit_code == 1 and "has the keys without, extract; expected" in done.output
