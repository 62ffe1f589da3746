"""As much of S3 as a reader of caches asks for, over a folder, at so many MB/s for all connections together: a token bucket.

    python benchmarks/slow_store.py FOLDER --mb-per-s 50        # prints the port it listens on, then serves until it is killed

The bucket is empty at the start and holds a tenth of a second. Latency is that of this machine: none.
"""

import email.utils
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

import click

PIECE = 1 << 16


class Line:
    """A line of so many bytes per second, which all connections share."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.free_at, self.lock = bytes_per_s, time.monotonic(), threading.Lock()

    def take(self, n_bytes: int) -> None:
        """Return once so many bytes may pass."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic() - 0.1) + n_bytes / self.bytes_per_s
            wait = self.free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class Answers(BaseHTTPRequestHandler):
    """GET and HEAD of objects, ranges of them, and lists. The first part of a path is the bucket, which is the folder."""

    protocol_version = "HTTP/1.1"
    folder: Path
    line: Line

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.answer(content=False)

    def do_GET(self) -> None:
        self.answer(content=True)

    def answer(self, *, content: bool) -> None:
        """One answer."""
        place, _, query = self.path.partition("?")
        key = urllib.parse.unquote(place).lstrip("/").partition("/")[2]
        if "list-type=2" in query:
            self.send(200, listing(self.folder, urllib.parse.parse_qs(query).get("prefix", [""])[0]), content)
            return
        file = self.folder / key
        if not file.is_file():
            self.send(404, b"<Error><Code>NoSuchKey</Code></Error>", content)
            return
        size, asked = file.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        end = min(size, int(asked[2]) + 1) if asked and asked[2] else size
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - first))
        self.send_header("Last-Modified", email.utils.formatdate(file.stat().st_mtime, usegmt=True))
        self.send_header("ETag", f'"{size}"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        self.end_headers()
        if content:
            with open(file, "rb") as opened:
                opened.seek(first)
                for at in range(first, end, PIECE):
                    piece = opened.read(min(PIECE, end - at))
                    self.line.take(len(piece))
                    self.wfile.write(piece)

    def send(self, status: int, body: bytes, content: bool) -> None:
        """A small answer."""
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if content:
            self.wfile.write(body)


def listing(folder: Path, prefix: str) -> bytes:
    """ListObjectsV2 in one page."""
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (key := file.relative_to(folder).as_posix()).startswith(prefix):
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(file.stat().st_mtime))
            found.append(f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>&quot;{file.stat().st_size}&quot;</ETag>"
                         f"<Size>{file.stat().st_size}</Size></Contents>")  # fmt: skip
    text = "".join(found)
    return f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>{text}</ListBucketResult>".encode()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--mb-per-s", default=50.0, type=click.FloatRange(0.001))
def main(folder: Path, mb_per_s: float) -> None:
    """Serve FOLDER as any bucket."""
    Answers.folder, Answers.line = folder, Line(mb_per_s * 1e6)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
