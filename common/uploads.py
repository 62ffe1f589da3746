"""How an object of a cache reaches a store: complete under its name, or not at all; two writers of one name never mix.

A name is taken by a conditional write, which the store refuses where something has that name. What is larger than one request
arrives in parts under a name of its own attempt, is looked at there, and is copied inside the store on the same condition. A store
that ignores the condition is found out before anything is written, by `expect_conditions`.
"""

import contextlib
import functools
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar

from mrmae.common.backend import About, Unreachable, Url, cause, file_pieces, locate, no_credentials

SINGLE_BYTES = 8 << 20  # the most in one request, which is in memory
QUICK_BYTES = 1 << 20  # records, plans: they take effect soon after `may_write` was asked, or not at all
PART_BYTES, PARTS_AT_ONCE = 8 << 20, 4
LOOKED_AT_BYTES = 4096  # at both ends of what arrived in parts
STORE_WAITS_SECONDS = (
    1.0,
    5.0,
    20.0,
)  # before a store that stumbled is asked again, beside obstore's own five attempts
PASSES = re.compile(r"code: (408|409|429|5(?!01)\d\d)")  # what a store says when it may say otherwise later
DENIED = re.compile(r"code: (40[13]|AccessDenied)")
Tag = dict[str, str]  # what tells one version of an object from another: its ETag, its generation
Replied = TypeVar("Replied")


class NotStored(OSError):
    """A URL that cannot be written to now. Says what to do."""


def upload(
    path: Url, file: IO[bytes], n_bytes: int, sha256: str, may_write: Callable[[], None], *, replace: bool
) -> About:
    """What the object is, once these bytes lie under its name, and the store says that all of them do.

    may_write: raises where this process may not write to that name any more; asked before each request that would. replace: take the place of an older object. FileExistsError where there is another one and `replace` is False; bytes that are there
    already are a success, as an answer that is lost makes them so. NotStored where the store refuses or stays away.
    """
    small = n_bytes <= SINGLE_BYTES
    where = path if small or replace else path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        if small:
            file.seek(0)
            content = file.read()
            may_write()
            put(path, content, "overwrite" if replace else "create", quick=n_bytes <= QUICK_BYTES)
        else:
            may_write()
            put_parts(where, file)
        arrived = expect_arrived(where, file, n_bytes)
        if where == path:
            return arrived
        may_write()
        ask_store(path, lambda b: b.obstore.copy(b.store, where.key, path.key, overwrite=False))
    except FileExistsError:
        return expect_same(path, n_bytes, sha256)
    finally:
        if where != path:
            with contextlib.suppress(OSError, Unreachable):  # the first error says why
                discard(where)
    return expect_size(path, n_bytes)


def put(path: Url, content: bytes, mode: Any, *, quick: bool = False) -> Tag:
    """The version of the object that was written in one request. FileExistsError where `mode` forbids it. quick: soon, or not at all."""
    return tag_of(ask_store(path, lambda b: b.obstore.put(b.quick if quick else b.store, path.key, content, mode=mode, use_multipart=False)))  # fmt: skip


def put_parts(path: Url, file: IO[bytes]) -> None:
    """Write an object in parts, many at a time; it is there when the last has arrived."""

    def parts(bucket: Any) -> None:
        file.seek(0)
        bucket.obstore.put(bucket.store, path.key, file, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)  # fmt: skip

    ask_store(path, parts)


def expect_arrived(path: Url, file: IO[bytes], n_bytes: int) -> About:
    """What the object is, once it is as long as the file and begins and ends like it. NotStored where it does not."""
    arrived = expect_size(path, n_bytes)
    places = [(0, min(n_bytes, LOOKED_AT_BYTES)), (max(0, n_bytes - LOOKED_AT_BYTES), min(n_bytes, LOOKED_AT_BYTES))]
    if n_bytes > SINGLE_BYTES:
        for (offset, length), there in zip(places, path.bucket.ranges(path.key, places)):
            file.seek(offset)
            if file.read(length) != bytes(there):
                raise NotStored(
                    f"{path}: arrived with other bytes at {offset} than were sent; run the same command again"
                )
    return arrived


def expect_size(path: Url, n_bytes: int) -> About:
    """What the object is, once the store says that it has n_bytes. NotStored where it does not; as expect_there."""
    arrived = expect_there(path)
    if arrived.size_bytes != n_bytes:
        raise NotStored(f"{path}: {arrived.size_bytes} bytes arrived; {n_bytes} were sent; run the same command again")
    return arrived


def expect_there(path: Url) -> About:
    """What an object is that was there just now. FileExistsError where another writer has removed it meanwhile."""
    try:
        return path.bucket.about(path.key)
    except FileNotFoundError:
        raise FileExistsError(f"{path}: another process has removed this object as soon as it was written; each shard has one writer; is "
                              "the same command running twice?") from None  # fmt: skip


def expect_same(path: Url, n_bytes: int, sha256: str) -> About:
    """What the object of that name is, where it has these bytes. FileExistsError where it has others."""
    there, digest = expect_there(path), hashlib.sha256()
    for piece in file_pieces(locate(str(path))) if there.size_bytes == n_bytes else ():
        digest.update(piece)
    if digest.hexdigest() != sha256:
        raise FileExistsError(f"{path}: this object exists already, with other bytes; each shard has one writer; is the same command "
                              "running twice?")  # fmt: skip
    return there


def swap(path: Url, content: bytes, before: Tag | None) -> Tag | None:
    """The new version of a small object, written only where `before` is its version still (None: where there is none); else None.

    content: no other writer's, so that an answer that was lost is known again.
    """
    try:
        return put(path, content, "create" if before is None else before, quick=True)
    except FileExistsError:
        there = tagged(path)
        return there[1] if there is not None and there[0] == content else None


def tagged(path: Url) -> tuple[bytes, Tag] | None:
    """A small object and its version; None where there is none."""
    try:
        answer = ask_store(path, lambda b: b.obstore.get(b.quick, path.key), "read")
        return bytes(answer.bytes()), tag_of(answer.meta)
    except FileNotFoundError:
        return None


def discard(path: Url, *, quick: bool = False) -> None:
    """Remove an object, if it is there. NotStored. quick: soon, or not at all."""

    def gone(bucket: Any) -> None:
        try:
            bucket.obstore.delete(bucket.quick if quick else bucket.store, path.key)
        except FileNotFoundError:  # S3 does not say so
            pass

    ask_store(path, gone, "removed", () if quick else None)


@functools.lru_cache
def expect_conditions(folder: Url) -> None:
    """Return where the store refuses to write over an object when it is asked to. ValueError where it does not, or cannot be asked.

    Without that, two writers of a name would mix, and nobody could claim anything.
    """
    probe, copy = (folder / f".probe.{secrets.token_hex(4)}{n}.writing" for n in ("", "-copy"))
    steps: dict[str, Callable[[], object]] = {
        "a second write over an object": lambda: put(probe, b"2", "create"),
        "a write over a version that is gone": lambda: put(probe, b"3", {"e_tag": '"no-such-version"', "version": "1"}),
        "a second copy onto an object": lambda: ask_store(copy, lambda b: b.obstore.copy(b.store, probe.key, copy.key, overwrite=False)),
    }  # fmt: skip
    try:
        put(probe, b"1", "overwrite")
        ask_store(copy, lambda b: b.obstore.copy(b.store, probe.key, copy.key, overwrite=False))
        for what, step in steps.items():
            try:
                step()
            except FileExistsError:
                continue
            raise ValueError(f"{folder}: this store accepted {what}; one that refuses was expected (conditional writes: S3, "
                             "Google and Azure have them), else two writers would mix; extract to a folder, then copy that there, manifest.json last")  # fmt: skip
    finally:
        for one in (probe, copy):
            with contextlib.suppress(OSError):  # the first error says why
                discard(one)


def ask_store(
    path: Url, what: Callable[[Any], Replied], done: str = "written", waits: Sequence[float] | None = None
) -> Replied:
    """What the store answers, asked again where it stumbles, after so many seconds each.

    FileExistsError where a condition of the request does not hold, FileNotFoundError where there is no such object, NotStored otherwise.
    """
    if path.parts[0] == "hf:":
        raise ValueError(f"{path}: hf:// is only read; write to a folder, then upload it with `hf upload`")
    bucket = path.bucket
    bucket.forget(path.key)
    errors = bucket.obstore.exceptions
    for wait in (*(STORE_WAITS_SECONDS if waits is None else waits), None):
        try:
            return what(bucket)
        except (errors.AlreadyExistsError, errors.PreconditionError):
            raise FileExistsError(f"{path}: exists already, or is another version") from None
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error) or done == "written":
                raise NotStored(
                    in_writing(path, "there is no such bucket", done, "create it, or correct the URL")
                ) from None
            raise
        except (errors.BaseError, OSError) as error:
            said = cause(error)
            if wait is None or not passes(said):
                raise NotStored(in_writing(path, said, done, writing_advice(said))) from None
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def passes(said: str) -> bool:
    """Whether a store may say otherwise when it is asked again: it is busy, or the connection was lost."""
    final = DENIED.search(said) or "status code" in said or no_credentials(said)
    return bool(PASSES.search(said)) or not final


def in_writing(path: Url, said: str, done: str, todo: str) -> str:
    return f"{path}: could not be {done}: {said}; everything committed so far stays valid; {todo}"


def writing_advice(said: str) -> str:
    """What to do about an error of writing."""
    if found := no_credentials(said):
        return found
    if DENIED.search(said):
        return "the credentials in the environment may not write there; correct them, then run the same command again"
    if "status code: 501" in said or "not implemented" in said.lower() or "NotSupported" in said:
        return "this store has no conditional writes, which keep two writers apart; extract to a folder, then copy that there, manifest.json last"
    return "check the network, the endpoint and the URL, then run the same command again"


def tag_of(meta: Any) -> Tag:
    """What an answer says of the version of an object."""
    return {name: meta[name] for name in ("e_tag", "version") if meta[name]}
