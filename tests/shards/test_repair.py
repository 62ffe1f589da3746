"""What repair removes, and what it rather leaves: nothing is lost where nothing tells what was right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contents import contents

from mrmae.shards import check
from mrmae.shards.cache import open_cache
from mrmae.shards.repair import prepare_repair


@pytest.mark.parametrize("field", ["n_views", "recipe", "quantisers", "channel_mean", "standardised", "tap"])
def test_a_misspelt_field_of_the_plan_is_a_damaged_plan(every_kind: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(every_kind, tmp_path / "c")
    file = tmp_path / "c/plan.json"
    file.write_text(file.read_text().replace(f'"{field}"', f'"{field[:-1]}_"', 1))
    with pytest.raises(ValueError, match="plan.json: (damaged|fields)"):
        open_cache(tmp_path / "c")
    assert [problem.file for problem in check.find_problems(tmp_path / "c")] == ["plan.json"]
    prepare_repair(tmp_path / "c", check.find_problems(tmp_path / "c"))
    assert file.read_bytes() == (every_kind / "plan.json").read_bytes()


def edit_plan(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((path / "plan.json").read_bytes())
    change(fields)
    (path / "plan.json").write_text(json.dumps(fields))


PLAN_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a seed": lambda plan: plan["recipe"].update(seed=5),
    "a view too many": lambda plan: plan.update(n_views=3),
    "other shards": lambda plan: plan.update(shard_samples=2),
    "one teacher": lambda plan: plan["columns"][1].update(precision="bfloat16"),
    "where weights come from": lambda plan: plan["columns"][0].update(tag="other"),
}


@pytest.mark.parametrize("what", PLAN_EDITS)
def test_a_plan_that_the_shards_were_not_written_for_is_written_again_from_the_manifest(
    every_kind: Path, tmp_path: Path, what: str
) -> None:
    shutil.copytree(every_kind, tmp_path / "c")
    edit_plan(tmp_path / "c", PLAN_EDITS[what])
    problems = check.find_problems(tmp_path / "c", full=True)
    assert [problem.file for problem in problems] == ["plan.json"]
    assert prepare_repair(tmp_path / "c", problems) == []
    assert contents(tmp_path / "c") == contents(every_kind)


def test_records_of_one_teacher_are_not_removed_for_an_altered_plan(every_kind: Path, tmp_path: Path) -> None:
    """Without a manifest nothing tells what was right, so nothing is lost."""
    shutil.copytree(every_kind, tmp_path / "c")
    edit_plan(tmp_path / "c", PLAN_EDITS["one teacher"])
    (tmp_path / "c/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"4 of 12 commit records are of another plan.*nothing was changed"):
        prepare_repair(tmp_path / "c", check.find_problems(tmp_path / "c"))
