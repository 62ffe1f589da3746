"""What is written to an object store is there whole or not at all, has one writer, and survives a store that stumbles."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from mrmae.common import backend, uploads
from mrmae.common.backend import Unreachable, Url, files_below, locate, read_bytes
from mrmae.common.files import is_still, make_folder, publish, remove, remove_leftovers
from mrmae.common.uploads import NotStored, expect_conditions, swap, tagged

BIG = b"0123456789abcdef" * 1000


@pytest.fixture
def place(store: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Url:
    """An empty folder at a URL; what is larger than 8 KB arrives in parts."""
    monkeypatch.setattr(uploads, "SINGLE_BYTES", 8 << 10)
    monkeypatch.setattr(uploads, "STORE_WAITS_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setitem(backend.RETRIES, "backoff", {"init_backoff": timedelta(milliseconds=1), "base": 2})
    url = locate(f"{store.bucket('written')}/{request.node.name}")
    assert isinstance(url, Url)
    return url


@pytest.mark.parametrize("content", [b"", b"small", BIG], ids=["empty", "small", "in parts"])
def test_an_object_is_written_once_and_replaced_when_asked(place: Any, content: bytes) -> None:
    file = publish(place / "x", content)
    assert read_bytes(place / "x") == content and is_still(file)
    assert publish(place / "x", content) == file, (
        "the very bytes are there: a repeated request whose first answer was lost"
    )
    with pytest.raises(FileExistsError, match="x: this object exists already, with other bytes"):
        publish(place / "x", content + b"!")
    assert read_bytes(place / "x") == content
    publish(place / "x", content + b"!", replace=True)
    assert read_bytes(place / "x") == content + b"!" and not is_still(file)
    assert files_below(place) == [place / "x"], "nothing else stays"
    remove(place / "x")
    remove(place / "x")
    assert not files_below(place)


@pytest.mark.parametrize("content", [b"small", BIG], ids=["small", "in parts"])
@pytest.mark.parametrize("what, times", [("cuts", 1), ("cuts", 3), ("refusals", 1), ("refusals", 3)])
def test_a_store_that_stumbles_is_asked_again(store: Any, place: Any, content: bytes, what: str, times: int) -> None:
    setattr(store.proxy, what, times)
    publish(place / "x", content)
    assert read_bytes(place / "x") == content


def test_a_store_that_is_asked_too_often_is_asked_again(store: Any, place: Any) -> None:
    """As Google says of a second write of a name within a second."""
    store.proxy.refusals, store.proxy.refusal = 3, b"429 Too Many Requests"
    publish(place / "x", b"1")
    assert read_bytes(place / "x") == b"1" and store.proxy.refusals == 0
    store.proxy.refusal = b"503 Slow Down"


def test_other_variables_lead_to_an_endpoint_too(
    store: Any, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in store.environment:
        monkeypatch.delenv(name)
    if store.scheme == "s3":
        environment = {
            **store.environment,
            "AWS_ENDPOINT": store.environment["AWS_ENDPOINT_URL"],
            "AWS_ENDPOINT_URL": "",
        }
    elif store.scheme == "gs":
        (tmp_path / "account.json").write_text(store.environment["GOOGLE_SERVICE_ACCOUNT_KEY"])
        environment = {"GOOGLE_SERVICE_ACCOUNT": str(tmp_path / "account.json")}
    else:
        url = f"http://127.0.0.1:{store.proxy.port}"
        environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": url}
    for name, value in environment.items():
        if value:
            monkeypatch.setenv(name, value)
    publish(place / "x", BIG)
    assert read_bytes(place / "x") == BIG


def test_a_refusal_within_a_batch_is_final() -> None:
    """How obstore tells of an object that could not be removed in a request for several, as it removes at S3 and Azure."""
    for request, code in (("Bulk delete", "403"), ("DeleteObjects", "AccessDenied")):
        said = f"{request} request failed for key a/x: not authorized (code: {code})"
        assert not uploads.passes(said) and "may not write there" in uploads.writing_advice(said)
    assert uploads.passes("Bulk delete request failed for key a/x: busy (code: 503)")


@pytest.mark.parametrize("what", ["cuts", "refusals"])
def test_a_store_that_stays_away_is_named(store: Any, place: Any, what: str) -> None:
    setattr(store.proxy, what, 10**9)
    with pytest.raises(
        (NotStored, Unreachable),
        match="x: could not be written.*; everything committed so far stays valid; check the network",
    ):
        publish(place / "x", b"content")


def test_what_arrives_short_or_altered_gets_no_name(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(change: Callable[[bytes], bytes]) -> Any:
        def put_parts(path: Url, file: Any) -> None:
            file.seek(0)
            uploads.put(path, change(file.read()), "create")

        return put_parts

    for change, said in (
        (lambda data: data[:-1], "15999 bytes arrived; 16000 were sent"),
        (lambda data: data[:-1] + b"!", "with other bytes at"),
    ):
        monkeypatch.setattr(uploads, "put_parts", losing(change))
        with pytest.raises(NotStored, match=said):
            publish(place / "x", BIG)
        assert not files_below(place)


def test_what_a_killed_writer_left_is_removed(place: Any) -> None:
    uploads.put(place / "deep" / ".x.0a.writing", b"half", "create")
    publish(place / "deep" / "x", b"whole")
    remove_leftovers(place)
    assert files_below(place) == [place / "deep" / "x"]


def test_a_version_is_replaced_by_one_of_two(store: Any, place: Any) -> None:
    first = swap(place / "x", b"1", None)
    assert first and swap(place / "x", b"one", None) is None
    store.proxy.cuts = 1
    second = swap(place / "x", b"2", first)
    assert second and tagged(place / "x") == (b"2", second), "though the answer was lost"
    assert swap(place / "x", b"two", first) is None and swap(place / "y", b"3", second) is None
    assert tagged(place / "y") is None


def test_a_store_without_conditional_writes_is_refused(store: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        store.deafen(patched)
        with pytest.raises(
            ValueError,
            match="accepted a second write over an object; one that refuses was expected.*extract to a folder",
        ):
            make_folder(place)
    backend.bucket_of.cache_clear()
    remove_leftovers(place)
    store.proxy.deaf, store.proxy.refusals, store.proxy.refusal = False, 9, b"501 Not Implemented"
    with pytest.raises(NotStored, match="has no conditional writes"):
        uploads.put(place / "x", b"1", "create")
    store.proxy.refusals, store.proxy.refusal = 0, b"503 Slow Down"
    uploads.discard(place / "x")
    expect_conditions(place)
    assert not files_below(place)


def test_a_bucket_that_is_not_there_or_may_not_be_written_is_named(store: Any, place: Any) -> None:
    with pytest.raises(
        NotStored,
        match="://no-such-bucket/a/x: could not be written: there is no such bucket.*create it, or correct the URL",
    ):
        publish(locate(f"{store.scheme}://no-such-bucket/a/x"), b"1")
    store.proxy.refusals, store.proxy.refusal = 9, b"403 Forbidden"
    with pytest.raises(NotStored, match="the credentials in the environment may not write there"):
        publish(place / "x", b"1")
    assert store.proxy.refusals == 8, "it is not asked again"
    store.proxy.refusal = b"503 Slow Down"
