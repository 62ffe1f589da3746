"""The page of a comparison: what was found, paired, and nothing that a source's name could do."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mrmae.common.page import write_document
from mrmae.probe.compare_page import comparison_page, short_names

HOSTILE = "<img src=x onerror=window.hit=1>"


def comparison(name: str) -> dict[str, Any]:
    """Two sources and bare pixels, as `compare_sources` gives them."""

    def row(source: str, kind: str, accuracy: float) -> dict[str, Any]:
        return {"source": source, "kind": kind, "accuracy": accuracy, "interval": [accuracy - 0.02, accuracy + 0.02],
                "headline": "20-NN, mean", "id": "sha256:0", "notes": [f"said of {source}"]}  # fmt: skip

    def pair(a: str, b: str, ahead: float) -> dict[str, Any]:
        return {"a": a, "b": b, "difference": ahead, "interval": [ahead - 0.03, ahead + 0.03]}

    table = {"n_train": 1000, "n_test": 200, "n_classes": 10,
             "rows": [row(name, "given", 0.81), row("runs/b", "given", 0.79), row("pixels", "pixels", 0.43)],
             "called": "accuracy", "differences": [pair(name, "runs/b", 0.02), pair(name, "pixels", 0.38), pair("pixels", name, -0.38)]}  # fmt: skip
    return {"data": "photos.tar", "sources": [name, "runs/b"], "seed": 3, "probes": {"knn": table}}


def test_it_says_who_is_ahead_and_where_nobody_can_tell() -> None:
    text = comparison_page(comparison("runs/a"))
    for said in ("2 sources compared", "On photos.tar; seed 3.", "knn: 1,000 train and 200 test images of 10 classes", "81.0 [79.0, 83.0]",
                 "pixels alone", "+2.0 [-1.0, +5.0]", "neither is shown to be ahead", "the first is ahead", "the second is ahead",
                 "runs/a: said of runs/a"):  # fmt: skip
        assert said in text, said


def test_names_are_short_unless_two_would_be_the_same() -> None:
    assert short_names(["/runs/a", "untrained:/runs/a", "b"]) == {
        "/runs/a": "a",
        "untrained:/runs/a": "untrained:a",
        "b": "b",
    }
    assert short_names(["/x/a", "/y/a"]) == {"/x/a": "/x/a", "/y/a": "/y/a"}


def test_a_hostile_source_stays_text_in_a_browser(
    open_page: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    with open_page(write_document(tmp_path / "page.html", comparison_page(comparison(HOSTILE)))) as page:
        assert page.evaluate("window.hit") is None
        assert page.locator("th", has_text=HOSTILE).count() >= 3
        assert page.locator(".plot svg.main-svg").count() >= 2
