"""The Ray engine: its driver against a stand-in for Ray that fails as told, and once against Ray itself."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contents import contents_without_records as contents

from mrmae.common.backend import files_below, locate, read_bytes
from mrmae.extract import ray_engine
from mrmae.extract.options import Options
from mrmae.extract.pipeline import HopelessQuality
from mrmae.extract.ray_engine import (
    DEATHS,
    SHARD_TRIES,
    Driver,
    RayPool,
    ShardWorker,
    connected,
    extract_on_ray,
    living_nodes,
    sized,
)
from mrmae.extract.run import extract_features
from mrmae.extract.teachers import Teacher
from mrmae.shards.format.spec import ViewRecipe

VIT = "vit=timm:test_vit/random"
Does = Callable[[int, str, int | None], Any]  # (number of the actor, method, shard) -> result; raises what goes wrong


class Dead(Exception):
    pass


class Evicted(Exception):
    """Of an actor that Ray killed where a node's memory ran out: no kind of the other."""


class Task(Exception):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class StandIn:
    """As much of Ray as the driver uses: calls are done one after another, when they are waited for."""

    exceptions = SimpleNamespace(RayActorError=Dead, OutOfMemoryError=Evicted, RayTaskError=Task)

    def __init__(self, does: Does, room: int = 100) -> None:
        self.does, self.room, self.started, self.killed = does, room, 0, []

    def remote(self, of: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: self.actor()))

    def actor(self) -> Any:
        number = self.started
        self.started += 1

        class Actor:
            def __getattr__(self, method: str) -> Any:
                return SimpleNamespace(remote=lambda shard=None: (number, method, shard, object()))

        return Actor()

    def wait(self, calls: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done = [call for call in calls if call[0] < self.room][:num_returns]
        return done, []

    def get(self, call: Any) -> Any:
        number, method, shard, _ = call
        if method in ("__ray_ready__", "leave"):
            return None
        try:
            return self.does(number, method, shard)
        except (Dead, Evicted):
            raise
        except Exception as error:
            raise Task(error) from None

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def nodes(self) -> list[Any]:
        return [{"Alive": True}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


def driven(ray: StandIn, tmp_path: Path, said: list[str] | None = None) -> dict[str, Any]:
    driver = Driver(
        ray, Options(images=[], cache=tmp_path), RayPool(3, 1, 0), (said if said is not None else []).append
    )
    with contextlib.closing(driver):
        return driver.run()


def plain(method: str, done: list[int], shard: int | None, n: int = 9) -> Any:
    if method == "begin":
        return ["the plan"], {number: 10 for number in range(n)}
    if method == "finish":
        assert sorted(done) == list(range(n)), "nothing is finished before all is committed"
        return "the summary", {"n_valid": n}
    assert shard is not None and method == "extract"
    done.append(shard)
    return None


def test_every_shard_is_done_once_and_one_actor_finishes(tmp_path: Path) -> None:
    done, said = [], []
    ray = StandIn(lambda _, method, shard: plain(method, done, shard))
    assert (
        driven(ray, tmp_path, said) == {"n_valid": 9} and done == list(range(9)) and said == ["the plan", "the summary"]
    )
    assert len(ray.killed) == ray.started == 3


def test_actors_that_die_are_replaced_and_their_shards_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def does(number: int, method: str, shard: int | None) -> Any:
        if number < 7 and (method == "extract" or number == 1):
            raise (Dead, Evicted)[number % 2](f"actor {number} was killed")
        return plain(method, done, shard)

    ray = StandIn(does)
    assert driven(ray, tmp_path) and sorted(done) == list(range(9)) and ray.started == 10


def test_a_shard_that_always_fails_is_told_while_the_others_go_on(tmp_path: Path) -> None:
    done: list[int] = []
    tried: list[int] = []

    def does(_: int, method: str, shard: int | None) -> Any:
        if shard in (2, 5):
            tried.append(shard)
            if shard == 2 or len(tried) < 3:
                raise RuntimeError(f"no such stripe in shard {shard}")
        return plain(method, done, shard)

    with pytest.raises(ValueError, match=r"1 shard could not be done; all others are committed; the same command tries again:\n"
                                         r"  shard 2: RuntimeError: no such stripe in shard 2"):  # fmt: skip
        driven(StandIn(does), tmp_path)
    assert tried.count(2) == SHARD_TRIES and sorted(done) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_a_shard_that_is_too_coarse_is_not_tried_again(tmp_path: Path) -> None:
    done, tried = [], list[int | None]()

    def does(_: int, method: str, shard: int | None) -> Any:
        tried.append(shard)
        if shard == 2:
            raise HopelessQuality("int8 keeps an SNR of 3 dB")
        return plain(method, done, shard)

    with pytest.raises(ValueError, match="shard 2: HopelessQuality: int8 keeps an SNR of 3 dB"):
        driven(StandIn(does), tmp_path)
    assert tried.count(2) == 1 and sorted(done) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_what_a_user_can_mend_ends_the_command(tmp_path: Path) -> None:
    def does(_: int, method: str, shard: int | None) -> Any:
        raise ValueError("--grid 7: the cache has 4")

    with pytest.raises(ValueError, match="^--grid 7: the cache has 4$"):
        driven(StandIn(does), tmp_path)


@pytest.mark.parametrize("method", ["begin", "extract"])
def test_actors_do_not_die_for_ever(tmp_path: Path, method: str) -> None:
    done: list[int] = []

    def does(_: int, asked: str, shard: int | None) -> Any:
        if asked == method and shard in (None, 4):
            raise Dead("out of memory")
        return plain(asked, done, shard)

    told = {"begin": f"{DEATHS} of Ray's actors in a row died before they began; the last: out of memory",
            "extract": f"shard 4: its actors died {DEATHS} times; the last: out of memory"}  # fmt: skip
    with pytest.raises(ValueError, match=told[method]):
        driven(StandIn(does), tmp_path)


def test_who_joins_late_takes_part_and_nobody_waits_for_him(tmp_path: Path) -> None:
    done: list[int] = []
    by: list[int] = []

    def does(number: int, method: str, shard: int | None) -> Any:
        if shard == 3:
            ray.room = 2  # the third seat is never filled
        if method == "extract":
            by.append(number)
        return plain(method, done, shard)

    ray = StandIn(does, room=1)
    assert driven(ray, tmp_path) and set(by) == {0, 1} and len(ray.killed) == 3


def test_a_cluster_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "GRACE_SECONDS", -1.0)
    with pytest.raises(
        ValueError,
        match=r"no actor was started for .*; the cluster has CPU 2, GPU 0, and an actor asks for CPU 1, GPU 0; change",
    ):
        driven(StandIn(lambda *_: None, room=0), tmp_path)


def test_a_pool_has_an_actor_per_gpu_or_per_node(tmp_path: Path) -> None:
    def cluster(gpus: float, nodes: int) -> Any:
        return SimpleNamespace(cluster_resources=lambda: {"GPU": gpus}, nodes=lambda: [{"Alive": True}] * nodes)

    assert sized(cluster(0, 3), RayPool(), "auto") == RayPool(3, 1.0, 0.0)
    assert sized(cluster(8, 2), RayPool(), "auto") == RayPool(8, 1.0, 1.0)
    assert sized(cluster(8, 2), RayPool(gpus=0.5), "cuda") == RayPool(16, 1.0, 0.5)
    assert sized(cluster(8, 2), RayPool(), "cpu") == RayPool(2, 1.0, 0.0)
    assert sized(cluster(8, 2), RayPool(workers=3), "auto") == RayPool(3, 1.0, 1.0)
    assert living_nodes(SimpleNamespace(nodes=lambda: [{"Alive": True}, {"Alive": False}])) == 1


def test_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(images=[tmp_path], cache=tmp_path / "c")
    with pytest.raises(ValueError, match="--shards 0/2: --engine ray deals out all shards itself"):
        extract_on_ray(Options(images=[tmp_path], cache=tmp_path / "c", shards="0/2"), RayPool())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"Ray cannot be imported .*pip install 'mrmae\[ray\]'"):
        extract_on_ray(options, RayPool())


def test_half_a_batch_where_memory_does_not_suffice(
    photo_folder: Path,
    tmp_path: Path,
    extract: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In every engine: it goes on with what fits, and gives up at one image."""
    forward, most = Teacher.forward, [2]

    def small(self: Teacher, views: torch.Tensor) -> Any:
        if len(views) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, views)

    extract(photo_folder, tmp_path / "a", VIT, batch_size=2, shard_samples=8)
    extract(photo_folder, tmp_path / "b", VIT, batch_size=2, shard_samples=8, shards="2/3")  # planned and calibrated
    monkeypatch.setattr(Teacher, "forward", small)
    extract(photo_folder, tmp_path / "b", VIT, batch_size=8, shard_samples=8)
    assert "--batch-size 8 is too much for the memory of cpu; going on with 4" in capsys.readouterr().err
    extract(photo_folder, tmp_path / "new", VIT, batch_size=8, shard_samples=8)  # halved while it calibrates
    assert "going on with 2" in capsys.readouterr().err
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "new")
    extract(photo_folder, tmp_path / "c", VIT, batch_size=2, shard_samples=8, shards="2/3")
    most[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        extract(photo_folder, tmp_path / "c", VIT, batch_size=8, shard_samples=8)


def test_an_actor_keeps_the_batch_that_sufficed(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    worker = ShardWorker(options_of(photo_folder, tmp_path / "cache"), str(tmp_path))
    _, todo = worker.begin()
    forward = Teacher.forward

    def small(self: Teacher, views: torch.Tensor) -> Any:
        if len(views) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, views)

    monkeypatch.setattr(Teacher, "forward", small)
    for shard in todo:
        worker.extract(shard)
    assert len(todo) > 1 and capsys.readouterr().err.count("is too much for the memory") == 2  # 4, then 2
    assert worker.finish()[1]["n_valid"] > 0
    worker.leave()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of this machine, of three CPUs as it believes."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mrmae[ray]'")
    with connected(RayPool(3)) as ray:
        yield ray


def kill_one(killed: list[int]) -> None:
    """SIGKILL for an actor that has not been killed yet, whatever it is at."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(file.parent.name)
        with contextlib.suppress(OSError):
            if b"ray::ShardWorker" in file.read_bytes() and pid not in killed:
                killed.append(pid)
                return os.kill(pid, signal.SIGKILL)


def options_of(images: Path, cache: Path, shard_samples: int = 4) -> Options:
    return Options(images=[images], cache=cache, recipe=ViewRecipe(32), grid=4, batch_size=4, device="cpu", workers=1, views=2,
                   teachers=(VIT,), shard_samples=shard_samples)  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 3])
def test_any_pool_makes_the_same_bytes(cluster: Any, photo_folder: Path, tmp_path: Path, workers: int) -> None:
    extract_features(options_of(photo_folder, tmp_path / "a"), say=lambda _: None)
    extract_on_ray(options_of(photo_folder, tmp_path / "b"), RayPool(workers, gpus=0), say=lambda _: None)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_several_nodes_share_an_extraction_and_one_may_be_lost(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes as Ray understands them, each with processes and an object store of its own, at an address; all see one folder."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mrmae[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    extract_features(options_of(photo_folder, tmp_path / "a", shard_samples=1), say=lambda _: None)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = [nodes.add_node(num_cpus=1) for _ in range(2)][-1]
    ended, gone = threading.Event(), list[str]()

    def lose_one() -> None:
        while not list((tmp_path / "b").glob("commits/*/*/*.json")) and not ended.wait(0.05):
            pass
        if not ended.is_set():
            nodes.remove_node(lost, allow_graceful=False)
            gone.append(lost.node_id)

    thread = threading.Thread(target=lose_one)
    thread.start()
    try:
        cache = options_of(photo_folder, tmp_path / "b", shard_samples=1)
        with connected(RayPool(address=nodes.address)) as ray:
            assert sized(ray, RayPool(gpus=0), "cpu").workers == 3, "one actor per node"
            manifest = extract_on_ray(cache, RayPool(gpus=0, address=nodes.address), say=lambda _: None)
    finally:
        ended.set()
        thread.join(60)
        nodes.shutdown()
    assert gone and manifest["n_valid"] == 20 and contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.soak
def test_twenty_actors_are_killed_at_work_and_the_bytes_are_the_same(
    cluster: Any, photo_folder: Path, tmp_path: Path
) -> None:
    extract_features(options_of(photo_folder, tmp_path / "a", shard_samples=1), say=lambda _: None)
    killed: list[int] = []
    for number in range(20):
        cache = tmp_path / f"b{number}"
        with killer(killed, cache, at_most=20):
            extract_on_ray(options_of(photo_folder, cache, shard_samples=1), RayPool(2, gpus=0), say=lambda _: None)
        assert contents(tmp_path / "a") == contents(cache)
        if len(killed) == 20:
            return
    raise AssertionError(f"{len(killed)} actors were killed")


@contextlib.contextmanager
def killer(killed: list[int], cache: Path, *, at_most: int) -> Iterator[None]:
    """A thread that kills an actor whenever something more of the cache is committed."""
    ended = threading.Event()

    def kill() -> None:
        seen = 0
        while len(killed) < at_most and not ended.wait(0.05):
            if (there := len(list(cache.glob("commits/*/*/*.json")))) > seen:
                seen = there
                kill_one(killed)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(60)


def test_ray_itself_makes_the_bytes_that_one_process_makes_here_and_at_a_url(
    s3: Any, cluster: Any, photo_folder: Path, tmp_path: Path
) -> None:
    """At a URL actors share nothing but the store; `s3` comes first, as they inherit the environment of the cluster."""
    extract_features(options_of(photo_folder, tmp_path / "a"), say=lambda _: None)
    here = contents(tmp_path / "a")
    said: list[str] = []
    manifest = extract_on_ray(options_of(photo_folder, tmp_path / "b"), RayPool(2, gpus=0), say=said.append)
    assert manifest["n_valid"] == 20 and here == contents(tmp_path / "b")
    extract_on_ray(options_of(photo_folder, tmp_path / "b"), RayPool(1, gpus=0), say=said.append)
    assert "nothing was left to do" in said[-1]
    s3.ask("PUT", "ray")
    url = locate("s3://ray/c")
    extract_on_ray(options_of(photo_folder, url), RayPool(2, gpus=0), say=lambda _: None)
    far = {file.relative_to(url).as_posix(): read_bytes(file) for file in files_below(url)}
    assert {name: data for name, data in far.items() if not name.startswith("commits/")} == {
        name: data for name, data in here.items() if name != ".digests"
    }
