"""Who is at work at a URL: lease objects, one for each thing that one process at a time may do, renewed by their holders.

A lease is taken by a write that only one of several can win, and renewed by one that its holder alone can. Clocks are never compared:
who wants a lease watches it, and takes it over where it has stayed the same for its whole length by his own clock. A holder writes
nothing to the store unless it has renewed within half that length: what it sends then arrives before anybody may take over.
"""

import contextlib
import dataclasses
import json
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mrmae.common.backend import Unreachable, Url
from mrmae.common.uploads import NotStored, Tag, discard, swap, tagged

LEASE_SECONDS = 60.0  # what a holder promises to renew within; it does four times as often
LONGEST_LEASE_SECONDS = 600.0  # believed of what a lease says of its length
RENEWALS = 4
held: dict[str, "Lease"] = {}  # by URL, of this process
watched: dict[str, "Watch"] = {}  # by URL: how long a lease of others has stayed the same
guard = threading.RLock()
renewing = threading.Event()


class LeaseLost(ValueError):
    """Another process has taken over what this one had claimed. Says what to do."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """A version of a lease, when it was first seen, and whether another one was seen before: then its holder lives."""

    tag: Tag
    since: float
    renewed: bool


@dataclasses.dataclass(frozen=True)
class Seen:
    """A lease as it is: who holds it, whether it has stayed the same for longer than it may, whether it was seen to be renewed."""

    tag: Tag
    holder: str
    dead: bool
    renewed: bool


@dataclasses.dataclass(eq=False)
class Lease:
    """A lease that this process holds, and renews in a thread until `release`.

    folder: what it writes to goes below this; the fence of `expect_held`. sent: when the last renewal that won was sent.
    """

    path: Url
    folder: Url
    holder: str
    tag: Tag
    sent: float
    seconds: float
    count: int = 0
    token: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    lost: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def fresh(self) -> bool:
        """Whether what is sent now arrives before anybody may take over."""
        return not self.lost and clock() - self.sent < self.seconds / 2

    def content(self) -> bytes:
        """What the object says: unlike any other version of it."""
        told = {"holder": self.holder, "seconds": self.seconds, "token": self.token, "renewed": self.count}
        return json.dumps(told).encode()

    def renew(self) -> None:
        """Say again that this process lives. NotStored or Unreachable where the store does not hear it."""
        with self.lock:
            if self.lost or held.get(str(self.path)) is not self:
                return
            began, self.count = clock(), self.count + 1
            tag = swap(self.path, self.content(), self.tag)
            if tag is None and (there := tagged(self.path)) and self.token.encode() in there[0]:
                tag = swap(
                    self.path, self.content(), there[1]
                )  # an earlier renewal arrived, and its answers were all lost
            self.lost = tag is None
            self.tag, self.sent = tag or self.tag, began

    def release(self) -> None:
        """Give it back. One that was not renewed in time is left to whoever watches it."""
        with self.lock, contextlib.suppress(NotStored, Unreachable):
            held.pop(str(self.path), None)
            if self.fresh:
                discard(self.path, quick=True)  # before anybody may take it over


def clock() -> float:
    """Seconds that pass for this machine, also while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def pause(seconds: float) -> None:
    """Let time pass, between two looks at something."""
    time.sleep(seconds)


def take_lease(path: Url, folder: Url, holder: str) -> Lease | None:
    """The lease at `path`, for who writes below `folder`; None where someone else holds it. NotStored or Unreachable."""
    lease = Lease(path, folder, holder, {}, clock(), LEASE_SECONDS)
    there = look_at(path)
    if str(path) in held or there is not None and not there.dead:
        return None
    tag = swap(path, lease.content(), there.tag if there else None)
    if tag is None:
        return None
    if there is not None:
        print(f"{path}: {there.holder} has not renewed its claim for as long as it said it would; it is taken over", file=sys.stderr, flush=True)  # fmt: skip
    lease.tag = tag
    with guard:
        watched.pop(str(path), None)
        held[str(path)] = lease
        if not renewing.is_set():
            renewing.set()
            threading.Thread(target=renew_all, name="leases", daemon=True).start()
    return lease


def renew_all() -> None:
    """Renew what this process holds, until it holds nothing."""
    while True:
        with guard:
            if not (leases := list(held.values())):
                renewing.clear()
                return
        renew_due(leases)
        time.sleep(min(lease.seconds for lease in leases) / (RENEWALS + 1) / 4)


def renew_due(leases: Sequence[Lease]) -> None:
    """Renew those of the leases that were not for a while."""
    for lease in leases:
        if clock() - lease.sent > lease.seconds / (RENEWALS + 1):
            with contextlib.suppress(NotStored, Unreachable):  # asked again soon; who writes meanwhile waits
                lease.renew()


def look_at(path: Url) -> Seen | None:
    """Who holds the lease at `path`, and for how long it has been watched in vain; None where nobody does."""
    found, now = tagged(path), clock()
    with guard:
        if found is None:
            watched.pop(str(path), None)
            return None
        content, tag = found
        before = watched.get(str(path))
        if before is None or before.tag != tag:
            watched[str(path)] = Watch(tag, now, before is not None)
        watch = watched[str(path)]
    holder, seconds = lease_told(content)
    return Seen(tag, holder, now - watch.since > seconds, watch.renewed)


def lease_told(content: bytes) -> tuple[str, float]:
    """Who holds a lease and how long it lasts, as the object says, fit to be printed."""
    try:
        fields = json.loads(content)
        text, seconds = str(fields["holder"])[:200], float(fields["seconds"])
    except (ValueError, TypeError, KeyError):
        text, seconds = "", LEASE_SECONDS
    return "".join(c for c in text if c.isprintable()) or "another process", min(
        max(seconds, 0.0), LONGEST_LEASE_SECONDS
    )


def expect_held(path: Path) -> None:
    """Return where every lease of this process whose folder holds `path` is fresh; waits for that while it may become so again.

    LeaseLost where one was taken over; NotStored where the store has not heard of this process for too long.
    """
    for lease in [lease for lease in list(held.values()) if str(lease.folder) in map(str, path.parents)]:
        began = clock()
        while not lease.fresh:
            if lease.lost:
                raise LeaseLost(f"{lease.path}: another process has taken this over, as this one did not renew it for {lease.seconds:g} "
                                "seconds (was it stopped, or the network away?); everything committed so far stays valid; run the same "
                                "command again")  # fmt: skip
            if clock() - began > 2 * lease.seconds:
                raise NotStored(f"{lease.path}: could not be renewed for {clock() - lease.sent:.0f} seconds, and others may have taken it "
                                "over; everything committed so far stays valid; check the network, then run the same command again")  # fmt: skip
            pause(min(0.2, lease.seconds / 20))
