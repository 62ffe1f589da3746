"""Object stores of the tests' own: moto (S3), a stand-in for Google's (gcs.py), Azurite where it is installed; a proxy before each."""

import base64
import hashlib
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from pathlib import Path

import gcs
import pytest

from mrmae.common import backend
from mrmae.common.backend import Url

AZURITE = os.environ.get("AZURITE") or shutil.which("azurite-blob")
# Of every Azurite, as its manual has them: no secret.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


# Of tests that take seconds each: with the others than S3 they are for `make soak`.
others_soak = pytest.mark.parametrize(
    "store_server", ["s3", *(pytest.param(scheme, marks=pytest.mark.soak) for scheme in ("gs", "az"))], indirect=True
)


class Proxy:
    """A TCP proxy on 127.0.0.1. cuts: how many of the next answers are cut in their middle. refusals: how many are
    a 503 instead, or another `refusal`. deaf: conditions of requests are not passed on. requests, answer_bytes: so far."""

    CONDITIONS = (b"x-goog-if-generation-match", b"if-none-match", b"if-match")

    def __init__(self, port: int) -> None:
        self.deaf, self.refusal = False, b"503 Slow Down"
        self.to, self.cuts, self.refusals, self.requests, self.answer_bytes = port, 0, 0, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                here, _ = self.listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self.to))
            for one, other, answers in ((here, there, False), (there, here, True)):
                threading.Thread(target=self.pump, args=(one, other, answers), daemon=True).start()

    def pump(self, one: socket.socket, other: socket.socket, answers: bool) -> None:
        try:
            while data := one.recv(1 << 16):
                if not answers:
                    self.requests += data.count(b" HTTP/1.1\r\n")
                    for name in self.CONDITIONS if self.deaf else ():
                        data = data.replace(name, b"x-" + b"y" * (len(name) - 2))
                elif self.refusals > 0 and data.startswith(b"HTTP/1.1 "):
                    self.refusals -= 1
                    other.sendall(b"HTTP/1.1 " + self.refusal + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    break
                elif self.cuts > 0:
                    self.cuts -= 1
                    other.sendall(data[: len(data) // 2])
                    break
                else:
                    self.answer_bytes += len(data)
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        one.close()  # the other direction closes the other


class Store:
    """A server, and the environment that makes clients go to it through the proxy."""

    scheme: str

    def __init__(self, port: int, environment: dict[str, str]) -> None:
        self.port, self.environment, self.proxy = port, environment, Proxy(port)

    def bucket(self, name: str) -> str:
        """The URL of a bucket, which is made where there is none."""
        self.ask("PUT", name)
        return f"{self.scheme}://{name}"

    def put(self, url: str | Url, content: bytes) -> None:
        """Write an object, or write over one."""
        self.ask("PUT", str(url).removeprefix(f"{self.scheme}://"), content)

    def remove(self, url: str | Url) -> None:
        self.ask("DELETE", str(url).removeprefix(f"{self.scheme}://"))

    def ask(self, method: str, name: str, body: bytes | None = None) -> bytes:
        """What the server answers, asked past the proxy. name: BUCKET or BUCKET/KEY."""
        return self.send(method, f"/{urllib.parse.quote(name)}", body, {"Authorization": "AWS test:test"})

    def send(
        self, method: str, path: str, body: bytes | None, head: dict[str, str], also: tuple[int, ...] = ()
    ) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        about = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body or b""))}
        connection.request(method, path, body, about | head)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert answer.status < 300 or answer.status in also, (method, path, answer.status, content)
        return content

    def upload(self, folder: Path, bucket: str, below: str = "some/photos.cache") -> str:
        """The URL of a copy of a folder."""
        url = self.bucket(bucket)
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{url}/{below}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"{url}/{below}"

    def deafen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on, let no condition of a request pass."""
        self.proxy.deaf = True

    def stop(self) -> None:
        self.proxy.listener.close()


class S3(Store):
    scheme = "s3"

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        super().__init__(self.server.get_host_and_port()[1], {})
        self.environment = {
            "AWS_ACCESS_KEY_ID": "AKIATESTONLY",
            "AWS_SECRET_ACCESS_KEY": "do-not-print-this",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
        }

    def stop(self) -> None:
        super().stop()
        self.server.stop()


class Google(Store):
    scheme = "gs"

    def __init__(self) -> None:
        self.server = gcs.Server()
        super().__init__(self.server.server_port, {})
        account = {"client_email": "", "private_key": "do-not-print-this", "private_key_id": "", "disable_oauth": True}
        account["gcs_base_url"] = f"http://127.0.0.1:{self.proxy.port}"
        self.environment = {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account)}

    def stop(self) -> None:
        super().stop()
        self.server.stop()


class Azure(Store):
    """Azurite, keeping everything in memory."""

    scheme = "az"

    def __init__(self) -> None:
        assert AZURITE is not None
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = [AZURITE, "--inMemoryPersistence", "--blobPort", str(port), "--silent", "--disableTelemetry"]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        super().__init__(port, {})
        self.environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.proxy.port}/{ACCOUNT}",
        }

    def ask(self, method: str, name: str, body: bytes | None = None) -> bytes:
        a_bucket = "/" not in name
        query = ("restype=container&" if a_bucket else "") + shared_access()
        path = f"/{ACCOUNT}/{urllib.parse.quote(name)}?{query}"
        return self.send(
            method, path, body, {} if a_bucket else {"x-ms-blob-type": "BlockBlob"}, also=(409,) * a_bucket
        )

    def deafen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As above, with a shared access signature: one by key is also of the conditions. Azurite removes nothing for it."""
        super().deafen(monkeypatch)
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", shared_access())
        backend.bucket_of.cache_clear()

    def stop(self) -> None:
        super().stop()
        self.process.terminate()
        self.process.wait(30)


def shared_access() -> str:
    """The query of a shared access signature of the account, for everything."""
    told = {"sv": "2021-12-02", "ss": "b", "srt": "sco", "sp": "rwdlac", "se": "2099-01-01T00:00:00Z"}
    fields = (ACCOUNT, told["sp"], told["ss"], told["srt"], "", told["se"], "", "", told["sv"], "", "")
    signature = hmac.new(base64.b64decode(ACCOUNT_KEY), "\n".join(fields).encode(), hashlib.sha256).digest()
    return urllib.parse.urlencode(told | {"sig": base64.b64encode(signature).decode()})
