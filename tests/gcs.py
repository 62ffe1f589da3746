"""As much of Google Cloud Storage's XML API as obstore's client asks for, in memory: docs.cloud.google.com/storage/docs/xml-api.

No emulator that could be installed speaks it (fake-gcs-server 1.54 and gcp-storage-emulator 2026.7 answer its uploads with 400 and
its listings with nothing, or ignore conditions). This one follows the public reference, asks for no credentials, and was never
compared with the service.
"""

import dataclasses
import email.utils
import hashlib
import re
import threading
import time
import urllib.parse
import xml.etree.ElementTree as xml
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

PAGE = 25  # objects in an answer to a listing, so that every listing of a cache has several; Google's is 1,000
LEAST_PART_BYTES = 5 << 20  # of all parts of an upload but the last
CONDITION = "x-goog-if-generation-match"


@dataclasses.dataclass(frozen=True)
class Blob:
    """What lies under a name. generation: of every write another one, and larger; 0 stands for nothing."""

    content: bytes
    generation: int
    etag: str
    time: float


class Refused(Exception):
    """An error of the API: status, and the code in its body."""


class Server(ThreadingHTTPServer):
    """Buckets and their objects, and uploads in parts that have begun. Every change is made under the lock."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.buckets: dict[str, dict[str, Blob]] = {}
        self.uploads: dict[str, dict[int, Blob]] = {}
        self.lock, self.generation = threading.Lock(), time.time_ns() // 1000
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def blob(self, content: bytes, *, parts: bool = False) -> Blob:
        """A new version. Its ETag is the MD5 of what came in one request, and an opaque one of what came in parts."""
        self.generation += 1
        etag = f"-C{self.generation:x}E=" if parts else hashlib.md5(content).hexdigest()
        return Blob(content, self.generation, f'"{etag}"', time.time())

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Answers(BaseHTTPRequestHandler):
    """Paths are /BUCKET/OBJECT."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def answer(self) -> None:
        """One answer, to any method."""
        place, _, query = self.path.partition("?")
        self.bucket, _, self.key = (urllib.parse.unquote(part) for part in place.lstrip("/").partition("/"))
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            with self.server.lock:
                getattr(self, f"{self.command.lower()}_{'object' if self.key else 'bucket'}")()
        except Refused as error:
            status, code = error.args
            self.send(status, f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code></Error>".encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def send(self, status: int, body: bytes = b"", head: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (head or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def objects(self) -> dict[str, Blob]:
        if self.bucket not in self.server.buckets:
            raise Refused(404, "NoSuchBucket")
        return self.server.buckets[self.bucket]

    def found(self) -> Blob:
        if self.key not in self.objects:
            raise Refused(404, "NoSuchKey")
        return self.objects[self.key]

    def put_bucket(self) -> None:
        self.server.buckets.setdefault(self.bucket, {})
        self.send(200)

    def get_bucket(self) -> None:
        """A page of the names that begin with a prefix, in order of their UTF-8."""
        prefix, after = self.query.get("prefix", ""), self.query.get("continuation-token", "")
        names = sorted((name for name in self.objects if name.startswith(prefix) and name > after), key=str.encode)
        page, more = names[:PAGE], len(names) > PAGE
        listed = "".join(
            f"<Contents><Key>{escape(name)}</Key><Generation>{blob.generation}</Generation><LastModified>{iso(blob.time)}"
            f"</LastModified><ETag>{blob.etag}</ETag><Size>{len(blob.content)}</Size></Contents>"
            for name, blob in ((name, self.objects[name]) for name in page)
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        self.send(200, f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult><Name>{self.bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
                       f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{listed}</ListBucketResult>".encode())  # fmt: skip

    def get_object(self) -> None:
        """An object, or a range of it."""
        blob = self.found()
        size, head = len(blob.content), told(blob) | {"Last-Modified": email.utils.formatdate(blob.time, usegmt=True)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked is None:
            return self.send(200, blob.content, head)
        start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
        if start >= size:
            raise Refused(416, "InvalidRange")
        self.send(206, blob.content[start : end + 1], head | {"Content-Range": f"bytes {start}-{end}/{size}"})

    head_object = get_object

    def put_object(self) -> None:
        """An object of a request, a part of an upload, or a copy of another object; on a condition, of the generation that is there."""
        if "uploadId" in self.query:
            part = self.server.blob(self.body)
            self.upload()[int(self.query["partNumber"])] = part
            return self.send(200, head={"ETag": part.etag})
        there, asked = self.objects.get(self.key), self.headers[CONDITION]
        if asked is not None and int(asked) != (there.generation if there else 0):
            raise Refused(412, "PreconditionFailed")
        source, body = self.headers["x-goog-copy-source"], self.body
        if source is not None:
            bucket, _, name = (urllib.parse.unquote(part) for part in source.lstrip("/").partition("/"))
            if name not in self.server.buckets.get(bucket, {}):
                raise Refused(404, "NoSuchKey")
            body = self.server.buckets[bucket][name].content
        blob = self.objects[self.key] = self.server.blob(body)
        done = f"<CopyObjectResult><LastModified>{iso(blob.time)}</LastModified><ETag>{blob.etag}</ETag></CopyObjectResult>"
        self.send(200, done.encode() if source is not None else b"", told(blob))

    def upload(self) -> dict[int, Blob]:
        if self.query["uploadId"] not in self.server.uploads:
            raise Refused(404, "NoSuchUpload")
        return self.server.uploads[self.query["uploadId"]]

    def post_object(self) -> None:
        """The beginning of an upload in parts, or its end, which puts the parts together in the order of their numbers."""
        if "uploads" in self.query:
            assert self.objects is not None
            self.server.generation += 1
            name = f"upload-{self.server.generation}"
            self.server.uploads[name] = {}
            return self.send(200, f"<InitiateMultipartUploadResult><Bucket>{self.bucket}</Bucket><Key>{escape(self.key)}</Key>"
                                  f"<UploadId>{name}</UploadId></InitiateMultipartUploadResult>".encode())  # fmt: skip
        parts = self.upload()
        given = [(int(part.findtext("PartNumber", "")), part.findtext("ETag")) for part in xml.fromstring(self.body)]
        if given != sorted(given) or any(number not in parts or parts[number].etag != etag for number, etag in given):
            raise Refused(400, "InvalidPart")
        if any(len(parts[number].content) < LEAST_PART_BYTES for number, _ in given[:-1]):
            raise Refused(400, "EntityTooSmall")
        blob = self.server.blob(b"".join(parts[number].content for number, _ in given), parts=True)
        self.objects[self.key] = blob
        del self.server.uploads[self.query["uploadId"]]
        self.send(200, f"<CompleteMultipartUploadResult><Bucket>{self.bucket}</Bucket><Key>{escape(self.key)}</Key><ETag>{blob.etag}</ETag>"
                       "</CompleteMultipartUploadResult>".encode(), told(blob))  # fmt: skip

    def delete_object(self) -> None:
        if "uploadId" in self.query:
            assert self.upload() is not None
            del self.server.uploads[self.query["uploadId"]]
        else:
            assert self.found() is not None
            del self.objects[self.key]
        self.send(204)


def told(blob: Blob) -> dict[str, str]:
    """What an answer's head tells of a version."""
    return {
        "ETag": blob.etag,
        "x-goog-generation": str(blob.generation),
        "x-goog-stored-content-length": str(len(blob.content)),
    }


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}Z"
