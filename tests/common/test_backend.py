"""Caches at URLs give the bytes of local ones; lost connections, missing objects and secrets are dealt with."""

import http.server
import os
import pickle
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mrmae.common import backend
from mrmae.common.backend import Unreachable, Url, exists, locate, read_bytes
from mrmae.extract.inspect.cli import main
from mrmae.shards.cache import Cache, open_cache

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def uploaded(store_server: Any, tiny_cache: Path) -> str:
    return str(store_server.upload(tiny_cache, "tiny-photos"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.RETRIES, "backoff", {"init_backoff": timedelta(milliseconds=1), "base": 2})


def batch(cache: Cache, numbers: Any = None) -> list[torch.Tensor]:
    numbers = np.random.default_rng(0).permutation(cache.numbers) if numbers is None else numbers
    views = np.arange(len(numbers)) % cache.n_views
    raw = [t for c in cache.columns for t in cache.read_column(c, numbers, views, tuple(cache.columns[c].layout.arrays())).values()]  # fmt: skip
    return [cache.read_pixels(numbers, views), *raw]


def read_bytes_of(cache: Cache) -> list[bytes]:
    """The same batch as bytes; also to be called in another process."""
    return [t.numpy().tobytes() for t in batch(cache)]


ELSEWHERE = f"""
import pickle, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from {Path(__file__).stem} import read_bytes_of
sys.stdout.buffer.write(pickle.dumps(read_bytes_of(pickle.load(sys.stdin.buffer))))
"""


def test_a_batch_from_a_url_is_the_local_one(store: Any, uploaded: str, tiny_cache: Path) -> None:
    local, far = open_cache(tiny_cache), open_cache(uploaded)
    assert far.ids == local.ids and far.threads == remote_threads()
    for ours, theirs in zip(batch(local), batch(far), strict=True):
        assert torch.equal(ours, theirs) or bool((ours.isnan() & theirs.isnan()).any())
    assert torch.equal(local[3].views[1]["a"]["cls"], far[3].views[1]["a"]["cls"])
    assert local.tail("a").keys() == far.tail("a").keys()


def test_columns_in_tars_are_read_at_a_url(s3: Any, make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", format="webdataset", n=8, n_views=1)
    url = s3.upload(path, "tar-photos")
    assert read_bytes_of(open_cache(url)) == read_bytes_of(open_cache(path))
    assert CliRunner().invoke(main, ["verify", url, "--full"]).exit_code == 0


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_one_token_block_is_read_at_a_url(s3: Any, make_cache: Make, tmp_path: Path, format: str) -> None:
    path = make_cache(tmp_path / "c", format=format, n=8, n_views=1, blocks=4)
    near, far = open_cache(path), open_cache(s3.upload(path, f"blocks-{format}"))
    where = near.numbers, near.numbers * 0
    one, two = (cache.read_block("a.pre_tail", *where, near.numbers % 4) for cache in (near, far))
    assert all(torch.equal(one[name], two[name]) for name in ("tokens", "scale"))
    assert torch.equal(near.read_tokens("a.pre_tail", *where), far.read_tokens("a.pre_tail", *where))


def remote_threads() -> int:
    from mrmae.shards.cache import REMOTE_THREADS

    return REMOTE_THREADS


def test_an_opened_cache_is_pickled_and_read_by_threads(s3: Any, tiny_cache: Path, warm: list[str]) -> None:
    far = open_cache(s3.upload(tiny_cache, "pickled-photos"))
    expected = read_bytes_of(open_cache(tiny_cache))
    assert read_bytes_of(pickle.loads(pickle.dumps(far))) == expected
    done = subprocess.run([*warm, "-c", ELSEWHERE], input=pickle.dumps(far), capture_output=True, check=True)
    assert pickle.loads(done.stdout) == expected
    found: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: found.append(read_bytes_of(far))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_neighbours_come_in_one_request(store: Any, uploaded: str) -> None:
    far = open_cache(uploaded)
    numbers, views = range(8), [0] * 8  # one shard
    far.read_column("a.pre_tail", numbers, views, ("tokens",))
    before = store.proxy.requests
    far.read_column("a.pre_tail", numbers, views, ("tokens",))
    assert store.proxy.requests - before == 1


def test_places_behind_the_end_of_an_object_are_an_error(store: Any, uploaded: str) -> None:
    plan = locate(f"{uploaded}/plan.json")
    size = len(read_bytes(plan))
    for places in ([(0, 10), (size + 5, 10)], [(size + 5, 10)], [(0, 0)], [(5, -2)], [(1 << 70, 1)]):
        with pytest.raises(OSError, match=re.escape(str(plan))):
            plan.bucket.ranges(plan.key, places)  # type: ignore[attr-defined]
    assert not exists(locate(f"{uploaded}/no.json"))


def test_a_lost_connection_is_tried_again_then_named(store: Any, uploaded: str, tiny_cache: Path) -> None:
    far = open_cache(uploaded, threads=1)
    expected = read_bytes_of(open_cache(tiny_cache))
    store.proxy.cuts, before = 3, store.proxy.requests
    assert read_bytes_of(far) == expected
    store.proxy.cuts, before = 10**9, store.proxy.requests
    with pytest.raises(Unreachable) as caught:
        far.read_column("a.pre_tail", [5], [0], ("tokens",))
    assert store.proxy.requests - before == 5
    text = str(caught.value)
    assert "sample 5 (" in text and "shard 0 of a.pre_tail" in text
    assert f"{uploaded}/views/0/a.pre_tail.zarr/tokens/c/0/0/0" in text and "run the same command again" in text


def test_missing_and_truncated_objects_are_all_named_at_open(store: Any, tiny_cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    shutil.copytree(tiny_cache, copy)
    for name in ("views/1/a.pre_tail.zarr/norm/c/2/0", "views/0/b.pre_tail.zarr/zarr.json"):
        (copy / name).unlink()
    tar = copy / "views/0/pixels/000001.tar"
    tar.write_bytes(tar.read_bytes()[:-100])
    url = store.upload(copy, "damaged-photos")
    with pytest.raises(ValueError) as caught:
        open_cache(url)
    text = str(caught.value)
    assert (
        "3 problems" in text
        and "norm/c/2/0: no such object" in text
        and "missing metadata" in text
        and "or upload these files again" in text
    )
    assert "000001.tar: " in text and "bytes; the manifest says" in text
    with pytest.raises(ValueError, match="there is no cache here"):
        open_cache(url + "-not")


def test_objects_altered_after_opening_are_noticed(store: Any, tiny_cache: Path) -> None:
    url = store.upload(tiny_cache, "changing-photos")
    far = open_cache(url)
    name = "views/0/a.pre_tail.zarr/tokens/c/0/0/0"
    data = bytearray((tiny_cache / name).read_bytes())
    data[40] ^= 1
    store.put(f"{url}/{name}", bytes(data))
    with pytest.raises(ValueError, match="fails its crc32c for sample 0 .*or upload this file again"):
        far.read_column("a.pre_tail", [0], [0])
    store.put(f"{url}/{name}", bytes(data[:60]))
    with pytest.raises(ValueError, match="tokens/c/0/0/0: .*(shorter|too short|ends within)"):
        open_cache_again(far).read_column("a.pre_tail", [0], [0])
    store.remove(f"{url}/{name}")
    with pytest.raises(ValueError, match="tokens/c/0/0/0: .*no such object"):
        open_cache_again(far).read_column("a.pre_tail", [0], [0])


def open_cache_again(cache: Cache) -> Cache:
    """As in another process: nothing of the files is in memory."""
    return pickle.loads(pickle.dumps(cache))  # type: ignore[no-any-return]


def test_no_credentials_and_no_secret_in_any_message(
    s3: Any, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = s3.upload(tiny_cache, "private-photos")
    s3.proxy.cuts = 10**9
    with pytest.raises(Unreachable) as caught:
        open_cache(uploaded)
    texts = [str(caught.value), repr(caught.value.__cause__)]
    for url in ("s3://user:do-not-print-this@photos/x", "s3://photos/x?X-Amz-Signature=do-not-print-this"):
        with pytest.raises(ValueError, match="credentials in the environment") as refused:
            open_cache(url)
        texts.append(str(refused.value))
        texts.append(CliRunner().invoke(main, ["show", url]).output)
    said = backend.cause(ValueError("GET https://u:pw@h/x?sig=abc failed with do-not-print-this\nmore"))
    assert said == "GET https://h/x?... failed with ***"
    assert len(texts) == 6 and not any("do-not-print-this" in text for text in texts)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    backend.bucket_of.cache_clear()
    with pytest.raises(Unreachable, match="there are no credentials in the environment; set AWS_ACCESS_KEY_ID"):
        open_cache(uploaded)


@pytest.mark.parametrize("refused", [(404, 2), (503, 10)], ids=["no role", "no answer"])
def test_google_and_azure_without_credentials_are_told_soon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: tuple[int, int]
) -> None:
    """A machine's own role is asked for, a few times; the server stands for what tells of it."""
    pytest.importorskip("obstore")
    code, most = refused
    asked = list[str]()

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "AZURE_", "IDENTITY_", "MSI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    backend.bucket_of.cache_clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
            monkeypatch.setenv(name, host)
        with pytest.raises(
            Unreachable, match="gs://bucket/c.*no credentials in the env.*set GOOGLE_APPLICATION_CREDENTIALS"
        ):
            open_cache("gs://bucket/c")
        with pytest.raises(Unreachable, match="az://holder.*no credentials in the env.*set AZURE_STORAGE_ACCOUNT_NAME"):
            open_cache("az://holder/c")
        backend.bucket_of.cache_clear()
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"http://{host}/msi")
        monkeypatch.setenv("IDENTITY_HEADER", "x")
        with pytest.raises(
            Unreachable, match="az://holder/c.*no credentials in the env.*set AZURE_STORAGE_ACCOUNT_NAME"
        ):
            open_cache("az://holder/c")
        server.shutdown()
    backend.bucket_of.cache_clear()
    assert {"google" in path.lower() for path in asked} == {True, False} and len(asked) <= 2 * most, asked
    for url in ("gs://bucket/a/b.cache", "az://holder/a/b.cache"):
        path = locate(url)
        assert isinstance(path, Url) and (str(path), path.key) == (url, "a/b.cache")
        assert str(path / "plan.json") == f"{url}/plan.json"


def test_inspect_cache_reads_urls(store: Any, make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", n=8, n_views=1)
    uploaded = store.upload(path, "small-photos")
    runner = CliRunner()
    shown = runner.invoke(main, ["show", uploaded])
    assert shown.exit_code == 0 and "8 (0 bad)" in shown.output and uploaded in shown.output
    for options in ([], ["--full"]):
        checked = runner.invoke(main, ["verify", uploaded, *options])
        assert checked.exit_code == 0 and "are as they were written" in checked.output
    assert runner.invoke(main, ["diff", uploaded, str(path)]).exit_code == 0


def test_urls_are_told_from_folders() -> None:
    far = locate("s3://photos/a/b.cache")
    assert isinstance(far, Url) and str(far / "plan.json") == "s3://photos/a/b.cache/plan.json"
    assert str(locate(Path("s3://photos/a"))) == "s3://photos/a" and far == pickle.loads(pickle.dumps(far))
    assert (far / "x/y.tar").relative_to(far).as_posix() == "x/y.tar" and str(far.parent) == "s3://photos/a"
    assert not isinstance(locate("photos.cache"), Url)
    for url, message in (("https://host/x", "s3, gs, az"), ("s3://", "has no bucket")):
        with pytest.raises(ValueError, match=message):
            locate(url)


def test_the_extra_is_named_where_obstore_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    backend.bucket_of.cache_clear()
    with pytest.raises(ValueError, match=r"s3://photos: .*pip install 'mrmae\[s3\]'"):
        open_cache("s3://photos/x")
