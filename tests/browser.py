"""Pages in a real browser: opened from their file, every error and every request noted."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


def program() -> str | None:
    """The Chromium that is installed, if any."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """A headless Chromium; playwright drives the installed one and downloads nothing."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program(), args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(chromium: Any, path: Path, *, forgive: bool = False, **how: Any) -> Iterator[Any]:
    """The page, loaded, its charts drawn, its pictures decoded. how: of the browser's context, such as color_scheme="dark".

    Fails where an error is told, a request goes elsewhere than to the file, or a picture has not loaded; forgive: notes only,
    in `page.told`, `page.asked` and `page.answered`.
    """
    context = chromium.new_context(**how)
    page = context.new_page()
    page.told, page.asked, page.answered = [], [], []
    page.on("console", lambda said: page.told.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("response", lambda response: page.answered.append(response.url))
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('svg.main-svg'))"
    )
    yield page
    if not forgive:
        assert not page.told, page.told
        assert not (
            others := [url[:100] for url in page.asked if url != path.as_uri() and not url.startswith("data:")]
        ), others
        unseen = page.evaluate("[...document.images].filter((i) => !(i.complete && i.naturalWidth)).map((i) => i.alt)")
        assert not unseen, f"not loaded: {unseen}"
        assert page.evaluate("[...document.images].every((i) => i.alt.trim())"), "a picture without words"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    context.close()
