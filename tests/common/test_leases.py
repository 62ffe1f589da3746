"""A lease has one holder, who keeps it while he renews it; who takes over what he left does so by his own clock, and alone."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from mrmae.common import backend, leases, uploads
from mrmae.common.backend import Url, files_below, locate
from mrmae.common.files import publish
from mrmae.common.leases import LeaseLost, expect_held, look_at, take_lease
from mrmae.common.uploads import NotStored, swap
from mrmae.shards import claims


@dataclasses.dataclass
class Time:
    """The clock of these tests: it goes on where something pauses, and whoever is due renews then."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        leases.renew_due(list(leases.held.values()))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Time that passes only in `pass_by`, and 5 s in every pause, renewals within it."""
    time = Time()
    monkeypatch.setattr(leases, "clock", time)
    monkeypatch.setattr(leases, "pause", lambda _: time.pass_by(5))
    monkeypatch.setattr(leases, "renew_all", leases.renewing.clear)
    return time


@pytest.fixture
def cache(store: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Url]:
    """An empty folder at a URL."""
    monkeypatch.setattr(uploads, "STORE_WAITS_SECONDS", ())
    monkeypatch.setitem(backend.RETRIES, "backoff", {"init_backoff": timedelta(milliseconds=1), "base": 2})
    url = locate(f"{store.bucket('leased')}/{request.node.name}")
    assert isinstance(url, Url)
    yield url
    leases.held.clear()


def killed(lease: Any) -> None:
    """As if the holder's process had ended."""
    del leases.held[str(lease.path)]


def test_a_lease_has_one_holder_who_keeps_it_by_renewing(clock: Time, cache: Url) -> None:
    lease = take_lease(cache / "x.lock", cache, "one")
    assert lease and take_lease(cache / "x.lock", cache, "two") is None
    for _ in range(30):
        clock.pass_by(5)
        seen = look_at(cache / "x.lock")
        assert seen and not seen.dead and seen.holder == "one" and lease.fresh
    assert seen.renewed and not lease.lost
    lease.release()
    assert look_at(cache / "x.lock") is None and not files_below(locate(str(cache)))


def test_leases_are_renewed_while_other_things_are_done(cache: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread, which ends with the last of them."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.1)
    lease = take_lease(cache / "x.lock", cache, "one")
    assert lease
    for true in (lambda: lease.count > 1, lambda: not leases.renewing.is_set()):
        end = time.monotonic() + 20
        while not true() and time.monotonic() < end:
            time.sleep(0.01)
        assert true()
        lease.release()


def test_a_lease_of_the_dead_is_taken_over_by_one_and_fences_them(
    clock: Time, cache: Url, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cache / "x.lock"
    lost = take_lease(path, cache, "a process long gone")
    assert lost and lost.fresh
    killed(lost)
    for waited in (0, 59, 2):
        clock.pass_by(waited)
        seen = look_at(path)
        assert seen and seen.dead == (waited == 2), "watched for its minute"
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(swap(path, b"taker %d" % n, seen.tag))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(tag is not None for tag in found) == 1, "four takers, one wins"
    assert take_lease(path, cache, "heir") is None, "it is another one, so its minute begins"
    clock.pass_by(61)
    heir = take_lease(path, cache, "heir")
    assert heir and "has not renewed its claim" in capsys.readouterr().err
    publish(locate(str(cache / "by the heir")), b"1")
    killed(heir)
    leases.held[str(path)] = lost  # it was asleep, and awakes
    with pytest.raises(LeaseLost, match="another process has taken this over.*run the same command again"):
        publish(locate(str(cache / "by the dead")), b"1")
    publish(locate(str(cache.parent / "another cache")), b"1")
    lost.release()
    assert look_at(path) is not None, "it is the heir's"


def test_what_is_sent_in_parts_gets_no_name_where_the_lease_was_lost_meanwhile(
    clock: Time, cache: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, send = take_lease(cache / "x.lock", cache, "one"), uploads.put_parts
    assert lease

    def slowly(path: Url, file: Any) -> None:
        send(path, file)
        lease.lost = True

    monkeypatch.setattr(uploads, "SINGLE_BYTES", 10)
    monkeypatch.setattr(uploads, "put_parts", slowly)
    with pytest.raises(LeaseLost):
        publish(locate(str(cache / "large")), bytes(100))
    assert files_below(locate(str(cache))) == [locate(str(cache / "x.lock"))]


def test_a_store_that_was_away_for_a_while_costs_no_lease(store: Any, clock: Time, cache: Url) -> None:
    """Though it had heard the renewals whose answers were lost."""
    lease = take_lease(cache / "x.lock", cache, "one")
    store.proxy.refusals = 10**9
    clock.pass_by(50)
    assert lease and not lease.fresh
    with pytest.raises(
        NotStored, match="x.lock: could not be renewed for .* seconds, and others may have taken it over"
    ):
        expect_held(locate(str(cache / "x")))
    store.proxy.refusals = 0
    publish(locate(str(cache / "waits for the renewal")), b"1")
    assert lease.fresh


def test_a_cache_at_a_url_is_shared_by_writers_or_held_alone(
    clock: Time, cache: Url, capsys: pytest.CaptureFixture[str]
) -> None:
    path = locate(str(cache))
    with claims.at_work(path), claims.at_work(path):
        with pytest.raises(ValueError, match="process .* is at work on this cache; expected nobody"):
            claims.alone(path)
    with claims.alone(path), pytest.raises(ValueError, match="process .* is at work on this cache"):
        claims.at_work(path)
    assert not files_below(path)
    left = claims.at_work(path)
    killed(left.descriptor)
    claims.said.clear()
    with claims.alone(path):
        assert "was at work on this cache; waiting for up to 60 seconds" in capsys.readouterr().err
    assert not files_below(path), "what the dead left is gone, too"


def test_writers_of_shards_at_a_url_are_seen(clock: Time, cache: Url) -> None:
    path = locate(str(cache))
    claim, left = claims.take(claims.shard_lock(path, 3)), claims.at_work(path)
    assert claim and claims.take(claims.shard_lock(path, 3)) is None
    assert list(claims.writers(path)) == [claims.held_by(claims.shard_lock(path, 3))]
    killed(left.descriptor)
    with claims.at_work(path):
        killed(claim.descriptor)
        clock.pass_by(61)
        assert not list(claims.writers(path))
        claims.remove_locks(path)
        assert len(files_below(path)) == 1, "what is left is who is at work"
