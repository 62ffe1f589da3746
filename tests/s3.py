"""An S3 server of the test's own (moto), and a proxy before it that can cut connections and counts what passes."""

import http.client
import socket
import threading
import urllib.parse
from pathlib import Path


class Proxy:
    """A TCP proxy on 127.0.0.1. cuts: how many of the next answers are cut in their middle. refusals: how many are
    a 503 instead, or another `refusal`. deaf: conditions of requests are not passed on. requests, answer_bytes: so far."""

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
                    data = (
                        data.replace(b"if-none-match", b"x-none-matchx").replace(b"if-match", b"x-matchx")
                        if self.deaf
                        else data
                    )
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


class S3:
    """A server, and the environment that makes clients go to it through the proxy."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        self.proxy = Proxy(self.port)
        self.environment = {
            "AWS_ACCESS_KEY_ID": "AKIATESTONLY",
            "AWS_SECRET_ACCESS_KEY": "do-not-print-this",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
        }

    def ask(self, method: str, name: str, body: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        head = {
            "Authorization": "AWS test:test",
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(body or b"")),
        }
        connection.request(method, f"/{urllib.parse.quote(name)}", body, head)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert answer.status < 300, (method, name, answer.status, content)
        return content

    def upload(self, folder: Path, bucket: str, below: str = "some/photos.cache") -> str:
        """The URL of a copy of a folder."""
        self.ask("PUT", bucket)
        for file in folder.rglob("*"):
            if file.is_file():
                self.ask("PUT", f"{bucket}/{below}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"s3://{bucket}/{below}"

    def stop(self) -> None:
        self.proxy.listener.close()
        self.server.stop()
