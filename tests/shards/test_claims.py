"""Locks of the file system: one holder, who takes the lock along when it ends."""

import threading
from pathlib import Path

import pytest
from processes import elsewhere

from mrmae.shards import claims


def test_a_lock_has_one_holder_and_goes_with_it(tmp_path: Path) -> None:
    file = tmp_path / "x.lock"
    with elsewhere(file) as process:
        assert claims.take(file) is None and claims.take(file, shared=True) is None
        assert (claims.held_by(file) or "").startswith(f"process {process.pid} on ")
    assert file.exists() and claims.held_by(file) is None, "killed: the file stays, the lock does not"
    with claims.take(file) or pytest.fail("it is free"):
        assert claims.take(file) is None, "nor has another thread of this process"
    assert not file.exists()
    one, two = (claims.take(file, shared=True) for _ in range(2))
    assert one and two and claims.take(file) is None
    one.release()
    assert file.exists() and claims.take(file) is None
    two.release()
    assert not file.exists()


def test_a_lock_file_removed_while_one_waits_for_it_is_not_held_by_two(tmp_path: Path) -> None:
    """Many threads take and release one lock; whoever has it is alone."""
    file, inside, most = tmp_path / "x.lock", [0], [0]

    def work() -> None:
        done = 0
        while done < 50:
            if (claim := claims.take(file)) is None:
                continue
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
            claim.release()
            done += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] and not file.exists()


def test_a_link_in_the_place_of_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to("elsewhere")
    with pytest.raises(ValueError, match="lock: is a link; expected the lock file of a command.*delete it"):
        claims.at_work(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
