"""A checkpoint is whole or absent; a damaged one is noticed and the one before it used."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae.train import checkpoint


def _save(folder: Path, step: int, keep: int = 3) -> Path:
    state = {
        "model": {"w": torch.full((1000,), float(step))},
        "step": step,
        "recipe": {"seed": 0, "betas": [0.9, 0.95]},
    }
    return checkpoint.save_checkpoint(folder, state, step=step, keep=keep)


def _refuse(message: str) -> None:
    raise AssertionError(message)


def test_newest_checkpoint_comes_back_and_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 1000, 20_000):
        _save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-000001000.pt", "step-000020000.pt"]
    state = checkpoint.latest_checkpoint(tmp_path, warn=_refuse)
    assert state is not None and state["step"] == 20_000
    assert torch.equal(state["model"]["w"], torch.full((1000,), 20_000.0))
    assert not list(tmp_path.glob(".*"))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path / "absent", warn=_refuse) is None


def _flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    where = data.find(torch.full((20,), 10.0).numpy().tobytes())  # inside the tensor: no parser would notice
    assert where > 0
    data[where] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip_bit, _truncate, _empty])
def test_damaged_newest_falls_back_to_the_one_before_loudly(tmp_path: Path, damage: Any) -> None:
    _save(tmp_path, 5)
    damage(_save(tmp_path, 10))
    said: list[str] = []
    state = checkpoint.latest_checkpoint(tmp_path, warn=said.append)
    assert state is not None and state["step"] == 5
    assert len(said) == 1 and "step-000000010.pt" in said[0]
    assert (tmp_path / "step-000000010.pt.damaged").exists()


def test_all_damaged_refuses_instead_of_starting_over(tmp_path: Path) -> None:
    _empty(_save(tmp_path, 5))
    with pytest.raises(ValueError, match="none of 1 checkpoints"):
        checkpoint.latest_checkpoint(tmp_path, warn=lambda _: None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_torch_reporting_a_full_disk_becomes_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, save = tmp_path / "step-000000001.pt", torch.save
    path.write_text("old")

    def full(content: Any, aside: Path) -> None:
        aside.symlink_to("/dev/full")
        save(content, aside)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="step-000000001.pt: could not be written"):
        checkpoint.save_tensors(path, {"w": torch.zeros(100_000)})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    (tmp_path / ".step-000000010.pt.123-ab.writing").write_bytes(b"half")
    assert checkpoint.latest_checkpoint(tmp_path, warn=_refuse) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005.pt"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "step-000000001.pt")
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.read_checkpoint(tmp_path / "step-000000001.pt")


def test_another_cache_is_refused_naming_the_id() -> None:
    saved = {"dataset": "sha256:aa", "columns.clip": "sha256:cc"}
    checkpoint.check_same_cache(saved, dict(saved), where="OUT")
    with pytest.raises(ValueError, match="columns.clip was sha256:cc and is now sha256:dd"):
        checkpoint.check_same_cache(saved, {**saved, "columns.clip": "sha256:dd"}, where="OUT")


def test_a_changed_recipe_is_refused_naming_fields_and_values() -> None:
    differences = [("optim.epochs", 10, 20), ("mask.ratio", 0.75, 0.5)]

    def longer(field: str, old: Any, new: Any) -> bool:
        return field == "optim.epochs" and new > old

    assert checkpoint.check_same_recipe(differences[:1], where="OUT", may_change=longer) == differences[:1]
    with pytest.raises(ValueError, match="mask.ratio was 0.75 and is now 0.5") as error:
        checkpoint.check_same_recipe(differences, where="OUT", may_change=longer)
    assert "epochs" not in str(error.value)
