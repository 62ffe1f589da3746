"""A lease has one holder, who keeps it while he renews it; who takes over what he left does so by his own clock, and alone."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mrmae.common import leases, uploads
from mrmae.common.backend import Url, files_below, locate
from mrmae.common.files import publish
from mrmae.common.leases import LeaseLost, look_at, take_lease
from mrmae.common.uploads import swap
from mrmae.shards import claims


@pytest.fixture
def cache(s3: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Url]:
    """An empty folder at a URL, where leases last 0.3 s."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(uploads, "STORE_WAITS_SECONDS", ())
    s3.ask("PUT", "leased")
    url = locate(f"s3://leased/{request.node.name}")
    assert isinstance(url, Url)
    yield url
    leases.held.clear()


def killed(lease: Any) -> None:
    """As if the holder's process had ended."""
    del leases.held[str(lease.path)]


def soon(ready: Callable[[], Any]) -> Any:
    """What `ready` gives as soon as it gives something, within seconds."""
    end = time.monotonic() + 5
    while not (found := ready()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_a_lease_has_one_holder_who_keeps_it_by_renewing(cache: Url) -> None:
    lease = take_lease(cache / "x.lock", cache, "one")
    assert lease and take_lease(cache / "x.lock", cache, "two") is None
    first, end = lease.tag, time.monotonic() + 0.7
    while time.monotonic() < end:
        seen = look_at(cache / "x.lock")
        assert seen and not seen.dead and seen.holder == "one"
        time.sleep(0.05)
    assert lease.tag != first and seen and seen.renewed and not lease.lost
    lease.release()
    assert look_at(cache / "x.lock") is None and not files_below(locate(str(cache)))


def test_a_lease_of_the_dead_is_taken_over_by_one_and_fences_them(
    cache: Url, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cache / "x.lock"
    lost = take_lease(path, cache, "a process long gone")
    assert lost and lost.fresh
    killed(lost)
    seen = look_at(path)
    assert seen and not seen.dead, "nobody knows yet"
    assert soon(lambda: (seen := look_at(path)) and seen.dead)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(swap(path, b"taker %d" % n, seen.tag))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(tag is not None for tag in found) == 1, "four takers, one wins"
    heir = soon(lambda: take_lease(path, cache, "heir"))
    assert heir and "has not renewed its claim" in capsys.readouterr().err
    publish(locate(str(cache / "by the heir")), b"1")
    killed(heir)
    leases.held[str(path)] = lost  # it was asleep, and awakes
    with pytest.raises(LeaseLost, match="another process has taken this over.*run the same command again"):
        publish(locate(str(cache / "by the dead")), b"1")
    publish(locate(str(cache.parent / "another cache")), b"1")
    lost.release()
    assert look_at(path) is not None, "it is the heir's"


def test_a_store_that_was_away_for_a_while_costs_no_lease(s3: Any, cache: Url) -> None:
    lease = take_lease(cache / "x.lock", cache, "one")
    s3.proxy.refusals = 10**9
    assert lease and soon(lambda: not lease.fresh)
    threading.Timer(0.2, lambda: setattr(s3.proxy, "refusals", 0)).start()
    publish(locate(str(cache / "waits for the renewal")), b"1")
    assert lease.fresh


def test_a_cache_at_a_url_is_shared_by_writers_or_held_alone(cache: Url, capsys: pytest.CaptureFixture[str]) -> None:
    path = locate(str(cache))
    with claims.at_work(path), claims.at_work(path):
        with pytest.raises(ValueError, match="process .* is at work on this cache; expected nobody"):
            claims.alone(path)
    with claims.alone(path), pytest.raises(ValueError, match="process .* is at work on this cache"):
        claims.at_work(path)
    assert not files_below(path)
    left = claims.at_work(path)
    killed(left.descriptor)
    with claims.alone(path):
        assert "was at work on this cache; waiting for up to 0.3 seconds" in capsys.readouterr().err
    assert not files_below(path), "what the dead left is gone, too"


def test_writers_of_shards_at_a_url_are_seen(cache: Url) -> None:
    path = locate(str(cache))
    claim = claims.take(claims.shard_lock(path, 3))
    assert claim and claims.take(claims.shard_lock(path, 3)) is None
    assert list(claims.writers(path)) == [claims.held_by(claims.shard_lock(path, 3))]
    killed(claim.descriptor)
    assert soon(lambda: not list(claims.writers(path)))
    claims.remove_locks(path)
    assert not files_below(path)
