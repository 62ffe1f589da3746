"""Fixtures of many tests. What imports torch is imported where it is used: the process that only deals out the tests needs none of it."""

import fcntl
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import stores

# Of their tests some take seconds, most of which is a wait for other processes.
LONG = ("test_demo.py", "test_docs.py", "test_fuzz.py", "test_gate.py", "test_kills.py", "test_ranks.py", "test_ray_engine.py", "test_slurm.py",
        "test_triton.py")  # fmt: skip

gc.disable()  # while libraries are imported and tests collected, a quarter of whose time the collector took


def pytest_collection_finish() -> None:
    """What collection imported stays: the garbage collector need not walk through it again and again, nor through what tests make after every 700 objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first: at the end there are only short ones, and no process waits for another."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in tests end without curves and pages, half a second each; `drawn`, a marker, is for tests that look at them."""
    if "mrmae.train.loop" in sys.modules and not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr("mrmae.train.loop.draw_report", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """No test cuts the power: what is written need not reach the disk before the test goes on. Commands in processes of their own do sync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parents[2] / "shared"
    parser.addoption("--data-root", type=Path, default=default, help="Folder with data/ and weights/ of real images.")


@pytest.fixture
def real_file(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The function that finds a file below --data-root, such as `data/eurosat-rgb.tar`, or skips the test."""

    def find(name: str) -> Path:
        path = Path(request.config.getoption("--data-root")) / name
        request.node.user_properties.append(("real file", path.exists()))
        if not path.exists():
            pytest.skip(f"{path} is absent: this test needs real data; pass --data-root=DIR")
        return path

    return find


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """A local S3 server. Skips where moto or obstore is not installed."""
    for module in ("obstore", "moto.server", "flask"):
        pytest.importorskip(module, reason=f"NO S3 SERVER: {module} is not installed; pip install -e '.[dev]'")
    yield from running(stores.S3)


def running(make: Callable[[], Any]) -> Iterator[Any]:
    """A server, until it is not needed any more."""
    server = make()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def google_server() -> Iterator[Any]:
    """A stand-in for Google Cloud Storage. Skips where obstore is not installed."""
    pytest.importorskip("obstore", reason="NO S3 SERVER: obstore is not installed; pip install -e '.[dev]'")
    yield from running(stores.Google)


@pytest.fixture(scope="session")
def azure_server() -> Iterator[Any]:
    """Azurite. Skips where it or obstore is not installed."""
    pytest.importorskip("obstore", reason="NO S3 SERVER: obstore is not installed; pip install -e '.[dev]'")
    if not stores.AZURITE:
        pytest.skip("NO AZURITE: npm install -g azurite, or set AZURITE to the path of its azurite-blob")
    yield from running(stores.Azure)


@pytest.fixture(scope="session", params=["s3", "gs", "az"])
def store_server(request: pytest.FixtureRequest) -> Any:
    """A server of each kind in turn."""
    return request.getfixturevalue({"s3": "s3_server", "gs": "google_server", "az": "azure_server"}[request.param])


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The local S3 server, with the environment that leads there."""
    yield from entered(s3_server, monkeypatch, tmp_path_factory)


@pytest.fixture
def store(
    store_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A local server of each kind in turn, with the environment that leads there."""
    yield from entered(store_server, monkeypatch, tmp_path_factory)


def entered(server: Any, monkeypatch: pytest.MonkeyPatch, folders: pytest.TempPathFactory) -> Iterator[Any]:
    """A server, with its environment and no other's."""
    from mrmae.common import backend, uploads

    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders.mktemp("home")))
    for cached in (backend.bucket_of, uploads.expect_conditions):
        cached.cache_clear()
    yield server
    server.proxy.cuts = server.proxy.refusals = 0
    server.proxy.deaf = False
    backend.bucket_of.cache_clear()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The first words of a command whose process has nothing to import: [*warm, "-m", "mrmae.train.cli", ...]; see warm.py."""
    of_xdist = "PYTEST_XDIST_WORKER" in os.environ
    owner = os.getppid() if of_xdist else os.getpid()
    shared, name, program = tmp_path_factory.getbasetemp(), f"mrmae-warm-{owner}", Path(__file__).with_name("warm.py")
    with open((shared.parent if of_xdist else shared) / "warm", "a") as started:
        fcntl.flock(started, fcntl.LOCK_EX)
        if not os.fstat(started.fileno()).st_size:
            command = [sys.executable, str(program), "serve", name, str(owner)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            started.write(name)
    return [sys.executable, "-S", str(program), name]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser. Skips where none is installed."""
    pytest.importorskip("playwright", reason="NO BROWSER: playwright is not installed; pip install -e '.[dev]'")
    if not browser.program():
        pytest.skip(f"NO BROWSER: none of {', '.join(browser.NAMES)} is installed; apt-get install chromium")
    with browser.started() as found:
        yield found


@pytest.fixture
def open_page(chromium: Any) -> Callable[..., Any]:
    """The context manager that opens a page in a browser: `with open_page(path) as page`; see browser.py."""
    return functools.partial(browser.opened, chromium)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    unseen = [r for r in terminalreporter.stats.get("skipped", []) if "NO BROWSER" in str(r.longrepr)]
    if unseen:
        terminalreporter.write_line(
            f"!! {len(unseen)} tests of pages SKIPPED: install chromium and playwright", red=True
        )
    for missing, todo in (
        ("NO S3 SERVER", "install the dev extra"),
        ("NO AZURITE", "npm install -g azurite (needs node)"),
    ):
        without = [r for r in terminalreporter.stats.get("skipped", []) if missing in str(r.longrepr)]
        if without:
            terminalreporter.write_line(f"!! {len(without)} tests of caches at URLs SKIPPED: {todo}", red=True)
    reports = [r for kind in terminalreporter.stats.values() for r in kind if getattr(r, "when", "") == "call"]
    found = [value for report in reports for name, value in report.user_properties if name == "real file"]
    if found.count(False):
        terminalreporter.write_line(f"!! {found.count(False)} tests on real images and weights SKIPPED", red=True)
    if found.count(True):
        terminalreporter.write_line(f"{found.count(True)} tests ran on real images and weights")


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., Path]:
    """The function that writes a synthetic cache: make_cache(path, n=24, size=32, grid=4, ...)."""
    from small_caches import write_synthetic_cache

    return write_synthetic_cache


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache: 24 images of 32 px, grid 4 x 4, 2 views, teachers a (CLS, attention) and b. Do not change it."""
    from small_caches import write_synthetic_cache

    return write_synthetic_cache(tmp_path_factory.mktemp("caches") / "tiny")


@pytest.fixture(scope="session")
def tiny_images() -> dict[str, bytes]:
    """The encoded images that `tiny_cache` was made from, by key."""
    from small_caches import smooth_images

    return smooth_images(24, seed=0, labels=True)


@pytest.fixture
def read_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every chunk that is read from a shard, from now on."""
    from mrmae.shards.store import reader

    sizes: list[int] = []
    real = os.preadv

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        got = real(file, buffers, offset, flags)
        if not flags:  # else only asks whether the place lies in memory
            sizes.append(got)
        return got

    monkeypatch.setattr(reader.os, "preadv", preadv)
    return sizes
