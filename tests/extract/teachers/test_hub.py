"""Weights from the hub or a URL: found, downloaded, or refused in one line within seconds."""

import http.server
import socket
import threading
import time

import pytest

from mrmae.extract.teachers import hub


def fetch(**how):
    given = {"repository": "o/r", "names": ["m.safetensors", "m.bin"], "url": None, "local_hint": "a=timm:x@FILE"}
    return hub.fetch_weights("a=timm:x", **(given | how))


@pytest.fixture
def hub_at(monkeypatch):
    def use(port):
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}")  # fmt: skip

    return use


@pytest.fixture
def server(hub_at):
    """A hub on this machine; its files by address, and a repository `o/gated` that it keeps to itself."""

    class Answer(http.server.BaseHTTPRequestHandler):
        files = {"/o/r/resolve/main/m.bin": b"weights", "/w.pth": b"more"}

        def do_HEAD(self):
            content = self.files.get(self.path)
            self.send_response(200 if content else 404)
            self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "EntryNotFound")
            self.send_header("X-Repo-Commit", "c0ffee")
            self.send_header("ETag", '"etag"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD() or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        hub_at(server.server_port)
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_first_name_that_the_hub_has_is_downloaded_else_the_url(empty_cache, server):
    assert fetch().read_bytes() == b"weights"
    assert fetch(repository="o/none", url=f"{server}/w.pth") == empty_cache / "torch" / "checkpoints" / "w.pth"


def test_what_the_hub_says_is_one_line(empty_cache, server):
    with pytest.raises(ValueError, match="o/none: Entry Not Found for url.*; expected a network.*a=timm:x@FILE"):
        fetch(repository="o/none")
    with pytest.raises(ValueError, match="o/gated: Cannot access gated repo.*w.pth: HTTP Error 404") as error:
        fetch(repository="o/gated", url=f"{server}/no/w.pth")
    assert "\n" not in str(error.value)


def test_a_host_that_does_not_answer_gives_one_error_in_time(empty_cache, hub_at, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        port = silent.getsockname()[1]
        hub_at(port)
        monkeypatch.setattr(hub, "LOOK_SECONDS", 0.3)
        start = time.monotonic()
        with pytest.raises(ValueError, match="a=timm:x: the weights are not in the local cache.*pass a local file"):
            fetch(url=f"http://127.0.0.1:{port}/w.pth")
        assert 0.6 <= time.monotonic() - start < 3


def test_offline_mode_asks_no_host(empty_cache, no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; pass a local file instead: a=timm:x@FILE"):
        fetch()


def test_cached_files_are_found_without_a_network(empty_cache, no_network):
    target = empty_cache / "torch" / "checkpoints" / "w.pth"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"x")
    assert fetch(url="https://example.com/a/w.pth") == target
    snapshot = empty_cache / "hub" / "models--o--r" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    (snapshot / "m.bin").write_bytes(b"y")
    assert fetch() == snapshot / "m.bin"
