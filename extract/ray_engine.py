"""`extract-features --engine ray`: a pool of Ray actors, each with teachers of its own, does the shards that are missing.

An actor is a process like any other that shares an extraction (workers.py): it claims what it writes, and the bytes do not depend on
who wrote them. The first one plans and calibrates, on its own device. The driver deals out shards, replaces actors that die, and keeps
no state: the commits in the cache are the state, and Ray's own checkpoints are not used.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

from mrmae.common.backend import locate
from mrmae.common.device import keep_memory
from mrmae.common.progress import Progress, counted, human_time
from mrmae.extract.options import Options
from mrmae.extract.pipeline import ExtractJob, HopelessQuality, extract_missing, unfinished, view_count
from mrmae.extract.report import summary
from mrmae.extract.run import Say, begin, finish_cache, is_finished, what_is_asked
from mrmae.extract.workers import GRACE_SECONDS, LONGEST_SECONDS, SAY_AFTER_SECONDS, ProcessPart

SHARD_TRIES = 3  # of a shard, by actors that lived to say what went wrong
DEATHS = 10  # of actors at one shard, or in a row before one of them began
TURN_SECONDS = 1.0
LEAVE_SECONDS = 10.0
SHOWN_SHARDS = 3
OBJECT_STORE_BYTES = 100 * 2**20  # of a cluster of our own: nothing passes through it


@dataclasses.dataclass(frozen=True)
class RayPool:
    """How many actors, and what Ray reserves for each.

    workers: 0 is one per GPU of the cluster, or one per node where there is none. gpus: may be a fraction; -1 is 1 where the cluster
    has any. address: of a running cluster; empty is RAY_ADDRESS, else one that is started on this machine for the time of the command.
    """

    workers: int = 0
    cpus: float = 1.0
    gpus: float = -1.0
    address: str = ""


class ShardWorker:
    """An actor: it plans, or joins what another has planned, then does the shards it is told to. folder: relative paths start there."""

    def __init__(self, options: Options, folder: str) -> None:
        os.chdir(folder)
        keep_memory(options.device)
        self.options, self.held, self.since = options, contextlib.ExitStack(), time.monotonic()
        self.job: ExtractJob | None = None
        self.complete = False

    def begin(self) -> tuple[list[str], dict[int, int]]:
        """(what was said, how many views are to be done of each shard that is not committed)."""
        said: list[str] = []
        options = self.options.resolved()
        sources, teachers, wanted = what_is_asked(options, said.append)
        self.job, _ = begin(options, sources, teachers, wanted, said.append, self.held)
        self.complete = is_finished(self.job)
        return said, {shard: view_count(self.job, shard, units) for shard, units in unfinished(self.job).items()}

    def extract(self, shard: int) -> None:
        """Compute, write and commit what a shard lacks."""
        assert self.job is not None, "begin comes first"
        self.job = extract_missing(self.job, {}, shards=[shard])

    def finish(self) -> tuple[str, dict[str, Any]]:
        """(the summary, the manifest), once every shard is committed."""
        assert self.job is not None, "begin comes first"
        manifest = finish_cache(self.job)
        return summary(self.job, manifest, time.monotonic() - self.since, nothing_done=self.complete), manifest

    def leave(self) -> None:
        """Give back what it holds of the cache."""
        self.held.close()


def extract_on_ray(options: Options, pool: RayPool, *, say: Say = print) -> dict[str, Any]:
    """The manifest of the finished cache; the same options again resume, with this engine or without.

    Raises ValueError for what a user can mend, and where shards failed: all others are committed then.
    """
    if options.shards:
        raise ValueError(f"--shards {options.shards}: --engine ray deals out all shards itself; leave it out")
    workers = options.workers or max(1, int(pool.cpus))
    options = dataclasses.replace(options, workers=workers, part=ProcessPart())
    with connected(pool) as ray:
        driver = Driver(ray, options, sized(ray, pool, options.device), say)
        with contextlib.closing(driver):
            return driver.run()


@contextlib.contextmanager
def connected(pool: RayPool) -> Iterator[Any]:
    """The module ray, connected to a cluster. ValueError where it is not installed, or nobody answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster of our own: its actors are the command
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"--engine ray: Ray cannot be imported ({error}); pip install 'mrmae[ray]', or leave --engine "
                         "out: any number of processes share an extraction without it") from None  # fmt: skip
    if ray.is_initialized():
        yield ray
        return
    address = pool.address or os.environ.get("RAY_ADDRESS", "")
    ours: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, math.ceil(pool.workers * pool.cpus)), "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES}  # fmt: skip
    try:
        ray.init(address=address or "local", configure_logging=False, **({} if address else ours))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"--engine ray: no cluster at {address or 'this machine'} ({error}); expected the address of "
                         "a running one, host:6379; correct --ray-address or RAY_ADDRESS, or leave them out") from None  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


def sized(ray: Any, pool: RayPool, device: str) -> RayPool:
    """The pool with its numbers chosen for this cluster."""
    there = float(ray.cluster_resources().get("GPU", 0))
    gpus = pool.gpus if pool.gpus >= 0 else float(there > 0 and not device.startswith("cpu"))
    return dataclasses.replace(
        pool, gpus=gpus, workers=pool.workers or max(1, int(there / gpus) if gpus else living_nodes(ray))
    )


def living_nodes(ray: Any) -> int:
    """How many nodes the cluster has; those that left it are listed, too."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


@dataclasses.dataclass
class Seat:
    """A place in the pool: its actor, what that is doing (a method, and its shard), and since when."""

    actor: Any = None
    method: str = ""
    shard: int | None = None
    since: float = 0.0


class Driver:
    """Deals out shards to actors as they come and go."""

    def __init__(self, ray: Any, options: Options, pool: RayPool, say: Say) -> None:
        self.ray, self.pool, self.say = ray, pool, say
        self.options = options
        self.actors: Any = ray.remote(ShardWorker).options(num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=0)
        self.cache = locate(options.cache)
        self.seats: dict[Any, Seat] = {}  # by the reference to what their actors are doing
        self.idle: list[Seat] = []
        self.views: Mapping[int, int] | None = None  # of each shard to do; None before one has planned
        self.left: deque[int] = deque()  # shards that nobody does
        self.tries, self.deaths = Counter[int](), Counter[int | None]()
        self.errors: dict[int, str] = {}  # of each shard's last try
        self.failed: list[int] = []
        self.ended: tuple[str, dict[str, Any]] | None = None
        self.progress: Progress | None = None

    def run(self) -> dict[str, Any]:
        """The manifest, once all shards are committed."""
        for _ in range(self.pool.workers):
            self.start(Seat())
        while self.views is None:
            self.turn()
        many = f"{counted(self.pool.workers, 'actor')} on {counted(living_nodes(self.ray), 'node')}"
        with Progress(f"extracting, {many}", sum(self.views.values()), "views") as self.progress:
            while self.left or any(seat.method == "extract" for seat in self.seats.values()):
                self.turn()
        self.refuse_failed()
        while self.ended is None:
            if self.idle and not any(seat.method == "finish" for seat in self.seats.values()):
                self.order(self.idle.pop(), "finish")
            self.turn()
        self.say(self.ended[0])
        return self.ended[1]

    def close(self) -> None:
        """Stop all actors; what they have not committed is done again by the next command."""
        leaving = [seat.actor.leave.remote() for seat in self.idle]
        if leaving:
            self.ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_SECONDS)
        for seat in [*self.seats.values(), *self.idle]:
            self.ray.kill(seat.actor)

    def start(self, seat: Seat) -> None:
        """Give a seat a new actor, which begins as soon as the cluster has room for it."""
        seat.actor = self.actors.remote(self.options, os.getcwd())
        self.order(seat, "__ray_ready__")

    def order(self, seat: Seat, method: str, shard: int | None = None) -> None:
        """Tell an actor what to do next."""
        seat.method, seat.shard, seat.since = method, shard, time.monotonic()
        call = getattr(seat.actor, method)
        self.seats[call.remote() if shard is None else call.remote(shard)] = seat

    def turn(self) -> None:
        """Take what the next actor has done, if any is done soon, and give out what is left."""
        done, _ = self.ray.wait(list(self.seats), num_returns=1, timeout=TURN_SECONDS)
        deaths = (self.ray.exceptions.RayActorError, self.ray.exceptions.OutOfMemoryError)  # the latter: killed by Ray
        for reference in done:
            seat = self.seats.pop(reference)
            try:
                result = self.ray.get(reference)
            except deaths as error:
                self.bury(seat, error)
            except self.ray.exceptions.RayTaskError as error:
                self.note(seat, error.cause if isinstance(error.cause, Exception) else error)
            else:
                self.take(seat, result)
        while self.left and self.idle:
            self.order(self.idle.pop(), "extract", self.left.popleft())
        self.refuse_waiting()

    def take(self, seat: Seat, result: Any) -> None:
        """What an actor has done well."""
        if seat.method == "__ray_ready__":
            return self.order(seat, "begin")
        if seat.method == "begin":
            self.deaths[None] = 0
            if self.views is None:
                said, self.views = result
                self.left.extend(sorted(self.views))
                for line in said:
                    self.say(line)
        elif seat.method == "extract" and seat.shard is not None:
            assert self.progress is not None and self.views is not None
            self.errors.pop(seat.shard, None)
            self.progress.add(self.views[seat.shard])
        elif seat.method == "finish":
            self.ended = result
        self.idle.append(seat)

    def note(self, seat: Seat, error: Exception) -> None:
        """What an actor that lives could not do: a shard is tried again later, by whoever is free."""
        if seat.shard is None:
            raise error
        self.idle.append(seat)
        self.tries[seat.shard] += 1
        self.errors[seat.shard] = f"{type(error).__name__}: {error}"
        hopeful = self.tries[seat.shard] < SHARD_TRIES and not isinstance(error, HopelessQuality)
        self.again(seat.shard, hopeful)

    def bury(self, seat: Seat, error: Exception) -> None:
        """An actor is dead: another takes its seat, and its shard is done again."""
        self.deaths[seat.shard] += 1
        hopeless = self.deaths[seat.shard] >= DEATHS
        if seat.shard is not None:
            self.errors[seat.shard] = f"its actors died {counted(DEATHS, 'time')}; the last: {error}"
            self.again(seat.shard, not hopeless)
        elif hopeless:
            raise ValueError(f"{self.cache}: {DEATHS} of Ray's actors in a row died before they began; the last: {error}")  # fmt: skip
        self.start(seat)

    def again(self, shard: int, hopeful: bool) -> None:
        """Put a shard behind those that are left, or give it up."""
        (self.left if hopeful else self.failed).append(shard)

    def refuse_failed(self) -> None:
        """ValueError, with their errors, where shards could not be done."""
        if self.failed:
            told = "\n".join(f"  shard {shard}: {self.errors[shard]}" for shard in sorted(self.failed)[:SHOWN_SHARDS])
            more = f"\n  ... and {len(self.failed) - SHOWN_SHARDS} more" * (len(self.failed) > SHOWN_SHARDS)
            raise ValueError(f"{self.cache}: {counted(len(self.failed), 'shard')} could not be done; all others are committed; the "
                             f"same command tries again:\n{told}{more}")  # fmt: skip

    def refuse_waiting(self) -> None:
        """ValueError where the cluster has no room for a first actor; an actor that does one thing for a day is replaced."""
        now = time.monotonic()
        for seat in self.seats.values():
            if seat.method != "__ray_ready__" and now - seat.since > LONGEST_SECONDS:
                self.ray.kill(seat.actor)
        if self.idle or any(seat.method != "__ray_ready__" for seat in self.seats.values()):
            return
        waited = now - min(seat.since for seat in self.seats.values())
        there = ", ".join(f"{name} {self.ray.cluster_resources().get(name, 0):g}" for name in ("CPU", "GPU"))
        text = f"the cluster has {there}, and an actor asks for CPU {self.pool.cpus:g}, GPU {self.pool.gpus:g}"
        if waited > GRACE_SECONDS:
            raise ValueError(f"--engine ray: no actor was started for {human_time(waited)}; {text}; change --ray-cpus or "
                             "--ray-gpus, or start more nodes")  # fmt: skip
        if SAY_AFTER_SECONDS < waited <= SAY_AFTER_SECONDS + TURN_SECONDS:
            self.say(f"waiting for Ray to start an actor: {text}")
