"""`inspect-cache report`: a cache as a page, whatever its images are called."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from markupsafe import escape
from PIL import Image

from mrmae.extract.inspect.cache_page import binned, cache_page
from mrmae.extract.inspect.cli import main
from mrmae.extract.inspect.show import description
from mrmae.extract.options import Options
from mrmae.extract.run import extract_features
from mrmae.shards.format import ViewRecipe

Open = Callable[..., AbstractContextManager[Any]]


def test_it_says_what_a_cache_holds(tiny_cache: Path) -> None:
    text = cache_page(tiny_cache)
    for said in ("24 images x 2 views", "class 0", "a.pre_tail", "RANDOM WEIGHTS: the features of a, b", "SNR, worst shard", "dB",
                 "4 x 4 patches", "int8 in zarr, shards of 8 images", "sha256:", "Longer side of the images", "data:image/webp"):  # fmt: skip
        assert said in text, said
    assert "UNFINISHED" not in text


def test_an_unfinished_cache_and_one_without_labels_say_so(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", n=6, labels=False, bad=[1], finalise=False)
    text = cache_page(cache)
    ((key, reason),) = description(cache)["bad_images"].items()
    for said in ("UNFINISHED: ", "have no labels", f'<th scope="row">{key}</th><td>{escape(reason)}</td>'):
        assert said in text, said


def test_bins_hold_every_value() -> None:
    assert binned([64, 64, 32], " px") == {"32 px": 1.0, "64 px": 2.0}
    assert sum(binned(list(range(100)), " px").values()) == 100


def test_a_hostile_key_stays_text_in_a_browser(open_page: Open, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "<script>window.hit=1<"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), "teal").save(folder / f"<img src=x onerror=window.hit=1> {name}.png")
    (folder / "<img src=x onerror=window.hit=1>.png").write_bytes(b"no image")
    cache = tmp_path / "cache <b>"
    extract_features(
        Options([str(tmp_path / "images")], cache, recipe=ViewRecipe(32), grid=4, teachers=[], device="cpu", workers=1)
    )
    told = CliRunner().invoke(main, ["report", str(cache)])
    assert told.exit_code == 0 and told.output.strip() == str(cache / "report.html")
    with open_page(cache / "report.html") as page:
        assert page.evaluate("window.hit") is None
        text = page.locator("main").inner_text()
        assert "<script>window.hit=1</<img src=x onerror=window.hit=1>.png" in text and "decoding (threads)" in text
        assert page.locator("h1").inner_text() == "Cache cache <b>"
    assert CliRunner().invoke(main, ["verify", "--full", str(cache)]).exit_code == 0


def test_what_is_there_and_no_page_stays(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    told = CliRunner().invoke(main, ["report", str(tiny_cache), "--out", str(tmp_path / "mine.html")])
    assert told.exit_code == 1 and "is no page of mrmae's" in told.output
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.parametrize("url", ["s3://bucket/photos.cache"])
def test_a_page_of_a_cache_at_a_url_needs_a_place(url: str) -> None:
    told = CliRunner().invoke(main, ["report", url])
    assert told.exit_code == 1 and "say with --out where the page goes" in told.output
