"""Pages: text stays text, a browser shows them without asking anybody, and they fit its screen."""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from PIL import Image

from mrmae.common import page
from mrmae.common.page import Curve, Html

HOSTILE = '</script><script>window.hit=1</script><img src=x onerror="window.hit=1"> & "quoted" %{x} ü'
Open = Callable[..., AbstractContextManager[Any]]


def png(colour: str, side: int = 8) -> bytes:
    """A square of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG")
    return out.getvalue()


def everything(text: str) -> str:
    """A page with every piece, given `text` wherever there is text."""
    steps = [1.0, 2.0, 3.0, 4.0]
    curves = [Curve(text, steps, [1.0, 0.1, None, 0.01]), Curve("plain", steps, [2.0, float("nan"), 1.0, 0.5]),
              Curve("yardstick", steps, [0.4] * 4, dashed=True, hue=1)]  # fmt: skip
    return page.document(
        text,
        page.section(
            text,
            page.paragraph(text, "quiet"),
            page.facts({text: text, "n": 3}),
            page.table([text, "n"], [[text, text], ["row", "0.81 [0.79, 0.83]"]], caption=text),
            page.code(text),
            page.folded(text, page.paragraph(text)),
        ),
        page.section(
            "Drawn",
            page.beside(page.chart(text, curves, x=text, y=text), page.intervals(text, {text: (0.5, 0.4, 0.6)}, x=text)),
            page.picture(png("red"), alt=text, caption=text),
            page.slider({f"epoch 1 {text}": png("red"), f"epoch 2 {text}": png("blue")}, alt=text, caption=text),
        ),
        lead=text,
        warnings=[text],
    )  # fmt: skip


def written(folder: Path, text: str) -> Path:
    """The page as a file."""
    return page.write_document(folder / "page.html", text)


def test_text_is_never_markup() -> None:
    def tags(text: str) -> list[str]:
        found: list[str] = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.append(tag)  # type: ignore[method-assign]
        parser.feed(text)
        return found

    hostile = everything(HOSTILE)
    assert tags(hostile) == tags(everything("tame"))
    assert "<script>window.hit" not in hostile and hostile.count("onerror=&#34;") > 10


def test_a_page_without_charts_is_small_and_runs_no_script() -> None:
    text = page.document("Small", page.facts({"a": 1}))
    assert len(text) < 10_000 and "<script" not in text and "script-src &#39;none&#39;" in text


def test_numbers_are_aligned_and_words_are_not() -> None:
    cells = ["-0.5", "1,234", "3.4 dB", "12 %", "0.81 [0.79, 0.83]", "2 of 4 shards were lost", "20-NN, mean", "a1", ""]
    assert [page.table(["", ""], [["row", cell]]).count('td class="number"') for cell in cells] == [
        1,
        1,
        1,
        1,
        1,
        0,
        0,
        0,
        0,
    ]


def test_what_is_no_picture_or_no_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begin with b'<svg onl'; a PNG, JPEG, WebP or GIF was expected"):
        page.picture(b"<svg onload=alert(1)>", alt="no")
    (tmp_path / "page.html").write_text("<p>somebody's")
    with pytest.raises(ValueError, match="is no page of mrmae's"):
        written(tmp_path, page.document("new"))
    assert (tmp_path / "page.html").read_text() == "<p>somebody's"
    (tmp_path / "page.html").unlink()
    written(tmp_path, page.document("new"))
    assert "newer" in written(tmp_path, page.document("newer")).read_text()


@pytest.fixture(scope="module")
def shown(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page with hostile text everywhere, in a browser; opened once, because that takes a second or two."""
    with browser.opened(chromium, written(tmp_path_factory.mktemp("page"), everything(HOSTILE))) as page:
        yield page


def test_a_browser_shows_text_as_it_is(shown: Any) -> None:
    assert shown.evaluate("window.hit") is None
    assert shown.locator("h1").inner_text() == HOSTILE
    assert shown.evaluate("document.querySelector('.legendtext').textContent") == HOSTILE


def test_curves_are_read_off_and_have_both_axes(shown: Any) -> None:
    kind = "document.querySelector('.plot')._fullLayout.yaxis.type"
    assert shown.evaluate(kind) == "linear"
    shown.locator(".updatemenu-button", has_text="log").click()
    shown.wait_for_function(f"{kind} === 'log'")
    shown.locator(".plot .nsewdrag").first.hover(position={"x": 2, "y": 40})
    shown.wait_for_function("document.querySelector('.hoverlayer').textContent.includes('yardstick : 0.4')")


def test_the_slider_shows_one_picture_and_moves(shown: Any) -> None:
    seen = "[...document.querySelectorAll('.slider img')].map((i) => i.checkVisibility())"
    assert shown.evaluate(seen) == [False, True]
    shown.locator(".slider input").press("ArrowLeft")
    assert shown.evaluate(seen) == [True, False]
    assert shown.locator(".slider output").inner_text() == f"epoch 1 {HOSTILE}"


def test_a_dark_phone_can_read_it(open_page: Open, tmp_path: Path, shown: Any) -> None:
    ask = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.xtick text')).fill]"
    paper, ink = map(brightness, shown.evaluate(ask))
    assert paper > 0.8 and ink < 0.2
    with open_page(written(tmp_path, everything("tame " * 12)), color_scheme="dark", **browser.PHONE) as phone:
        paper, ink = map(brightness, phone.evaluate(ask))
        assert paper < 0.2 and ink > 0.8


def brightness(colour: str) -> float:
    """Of `rgb(r, g, b)`, 0 to 1."""
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 765


def test_on_paper_it_is_unfolded_and_narrow_and_has_no_buttons(shown: Any) -> None:
    shown.emulate_media(media="print")
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    shown.wait_for_function("[...document.querySelectorAll('.main-svg')].every((chart) => chart.clientWidth <= 640)")
    assert shown.evaluate("[...document.querySelectorAll('details')].every((folded) => folded.open)")
    assert (
        not shown.locator(".slider input").is_visible() and not shown.locator(".updatemenu-button").first.is_visible()
    )


def test_its_policy_stops_what_no_piece_would_make(open_page: Open, tmp_path: Path) -> None:
    smuggled = Html('<script>window.hit=1</script><img src="http://localhost:9/x.png" alt="x" onclick="window.hit=2">')
    with open_page(written(tmp_path, page.document("smuggled", smuggled)), forgive=True) as met:
        met.locator("img").dispatch_event("click")
        assert met.evaluate("window.hit") is None
        assert sum("Content Security Policy" in told for told in met.told) >= 2
        assert not [url for url in met.answered if url.startswith("http")]
