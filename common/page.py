"""A page that one can send: a single HTML file that opens without a server or a network.

Pieces are functions from data to `Html`; `document` joins them:

    write_document(path, document("Title", section("Numbers", facts({"images": 300}), chart("Loss", [Curve("a", x, y)], x="epoch"))))

Whatever is given as text is escaped: no key, label or name becomes markup. The page's own security policy forbids it every
request, and every script but the ones of this file. Charts are drawn by plotly's script, which a page with a chart contains.
"""

import base64
import functools
import hashlib
import html
import io
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from mrmae.common.files import publish
from mrmae.common.versions import versions

Html = Markup  # text that is markup already: what the functions here make
# Okabe-Ito's colours; gray, because black is not seen on black
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#808080")
NAME_CHARACTERS = 24
PICTURE_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
CHART, SLIDER = '<figure class="chart">', '<figure class="slider">'  # as in page.html; escaped text cannot contain them
NUMBER = re.compile(r"[-+]?\d[\d.,e+-]*( ?[^\s\d]{1,5})?( (\[|to ).*)?")  # 12, 1,200, 3.4 dB, 0.81 [0.79, 0.83]
MARK, HEAD_BYTES = b'<meta name="generator" content="mrmae">', 400  # every page has it within so many bytes
HEIGHT, LEGEND_HEIGHT = 320, 16  # pixels of a chart, and of a line of its legend, which on a phone has a line per curve
ROW_HEIGHT, BAR_HEIGHT = 34, 22  # of a row of `intervals` and of one of `bars`


def document(title: str, *parts: Html, lead: str = "", warnings: Sequence[str] = ()) -> str:
    """The whole page as text. lead: a sentence below the title; warnings: what nobody may overlook, such as random weights."""
    body = Html("\n").join(parts)
    charts, sliders = CHART in body, SLIDER in body
    scripts = [plotly_script()] if charts else []
    scripts += [script("page.js")] if charts or sliders else []
    foot = (
        f"mrmae {versions().get('mrmae', '')}: this page holds everything that it shows and asks nothing of a network."
    )
    filled = macros().document(title, lead, warnings, body, Html(script("page.css")), [Html(s) for s in scripts],
                               security_policy(scripts), foot)  # fmt: skip
    return str(filled)


def security_policy(scripts: Sequence[str]) -> str:
    """What a browser may do for the page: show its pictures and run these scripts, known by their hashes; no request at all."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none';"
            " form-action 'none'")  # fmt: skip


def write_document(path: Path, text: str) -> Path:
    """Where the page was written, whole or not at all; an older page is replaced. ValueError where something else has that name."""
    if os.path.lexists(path) and not (path.is_file() and MARK in path.read_bytes()[:HEAD_BYTES]):
        raise ValueError(f"{path}: is there and is no page of mrmae's; a new name, or that of an older page, was expected; choose "
                         "another (nothing was changed)")  # fmt: skip
    publish(path, text.encode(), replace=True)
    return path


# --- pieces of text


def section(heading: str, *parts: Html) -> Html:
    """The parts under a heading."""
    return made("section", heading, Html("\n").join(parts))


def folded(heading: str, *parts: Html) -> Html:
    """The parts behind a line that one opens: for what few want to read. Not for charts, which need a width to be drawn."""
    return made("folded", heading, Html("\n").join(parts))


def paragraph(words: str, kind: str = "") -> Html:
    """A paragraph. kind: "warning" for what nobody may overlook, "quiet" for what is said in passing."""
    return made("paragraph", words, kind)


def beside(*parts: Html) -> Html:
    """The parts side by side where there is room, else below each other."""
    return made("beside", parts)


def facts(rows: Mapping[str, object]) -> Html:
    """Names with what is said of each, a line per entry."""
    return made("facts", list(rows.items()))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> Html:
    """A table whose first column names the rows; cells that are numbers (with a unit or an interval) are aligned right.

    A wide one scrolls by itself. Numbers are shown as they are: format them before.
    """
    cells = [[(words, NUMBER.fullmatch(str(words)) is not None) for words in row] for row in rows]
    heads = [(words, any(row[i][1] for row in cells if i)) for i, words in enumerate(headings)]
    return made("table", heads, cells, caption)


def code(words: str) -> Html:
    """Commands or code to be copied, line by line as given."""
    return made("code", words)


# --- pictures


def picture(source: bytes | Path, *, alt: str, caption: str = "") -> Html:
    """A picture (PNG, JPEG, WebP or GIF: bytes or a file), which the page then contains. alt: what is seen on it, in words."""
    return made("picture", data_url(source), alt, caption)


def slider(pictures: Mapping[str, bytes | Path], *, alt: str, caption: str = "") -> Html:
    """Pictures of the same kind by label (`epoch 4`), one of them shown, the last at first, chosen with a slider."""
    return made("slider", [(label, data_url(source)) for label, source in pictures.items()], alt, caption)


def as_webp(source: bytes | Path, *, quality: int = 90) -> bytes:
    """The picture as WebP, a third or less of a PNG's bytes: for pages that hold many."""
    out = io.BytesIO()
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
        image.convert("RGB").save(out, "WEBP", quality=quality)
    return out.getvalue()


def data_url(source: bytes | Path) -> str:
    """A picture as an address that contains it. ValueError for what is no picture."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    kinds = [kind for magic, kind in PICTURE_KINDS.items() if content.startswith(magic)]
    if not kinds:
        what = "these bytes" if isinstance(source, bytes) else source
        raise ValueError(
            f"{what}: begin with {content[:8]!r}; a PNG, JPEG, WebP or GIF was expected; give another picture"
        )
    return f"data:image/{kinds[0]};base64,{base64.b64encode(content).decode()}"


# --- charts


@dataclass(frozen=True)
class Curve:
    """One line of a chart; None and NaN are gaps. dashed: for images held out; dotted: for yardsticks; hollow: marks alone, no line.

    hue: which of HUES; None for the next one. Give a dashed or dotted line that of the line it belongs to.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False
    dotted: bool = False
    hollow: bool = False
    hue: int | None = None


def chart(
    title: str, curves: Sequence[Curve], *, x: str, y: str = "", logarithmic: bool = False, digits: int = 4
) -> Html:
    """Lines over a common x, with their values where the pointer is and buttons for a linear and a logarithmic axis.

    x, y: what is on the axes. logarithmic: at first. digits: significant ones of the values shown.
    """
    traces = [trace(curve, i, digits) for i, curve in enumerate(curves)]
    few = max((len(curve.x) for curve in curves), default=0) <= 30
    for one, curve in zip(traces, curves):
        one["mode"] = (
            "markers" if curve.hollow else "lines+markers" if few and one["line"]["dash"] == "solid" else "lines"
        )
    layout = {
        **common_layout(x, buttons=True),
        "height": HEIGHT + LEGEND_HEIGHT * len(curves) * (len(curves) > 1),
        "hovermode": "x unified",
        "yaxis": {"title": {"text": plain_text(y)}, "type": "log" if logarithmic else "linear", "automargin": True,
                  "exponentformat": "power", "zeroline": False},
        "showlegend": len(curves) > 1,
        "updatemenus": [{"type": "buttons", "direction": "right", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom",
                         "active": int(logarithmic), "showactive": True, "pad": {"t": 0, "b": 0}, "font": {"size": 12},
                         "buttons": [{"label": kind, "method": "relayout", "args": [{"yaxis.type": kind, "yaxis.autorange": True}]}
                                     for kind in ("linear", "log")]}],
    }  # fmt: skip
    return made("chart", title, {"data": traces, "layout": layout}, f"{title}, over {x}: {spoken(curves)}")


def intervals(title: str, rows: Mapping[str, tuple[float, float, float]], *, x: str, zero: bool = False) -> Html:
    """A dot with its interval per row: name -> (value, low, high). zero: draw the line of no difference."""
    values, lows, highs = (list(column) for column in zip(*rows.values())) if rows else ([], [], [])
    data = {
        "type": "scatter", "mode": "markers", "x": values, "y": [wrapped(name) for name in rows],
        "marker": {"color": HUES[0], "size": 9}, "customdata": list(zip(lows, highs)),
        "error_x": {"type": "data", "symmetric": False, "array": [h - v for v, h in zip(values, highs)],
                    "arrayminus": [v - l for v, l in zip(values, lows)], "thickness": 1.5, "width": 5},
        "hovertemplate": "%{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
    }  # fmt: skip
    layout = {
        **common_layout(x),
        "height": 62 + max(ROW_HEIGHT, 10 + 16 * max((wrapped(name).count("<br>") + 1 for name in rows), default=1)) * len(rows),
        "yaxis": {"range": [len(rows) - 0.5, -0.5], "automargin": True, "type": "category"},
        "shapes": [{"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1,
                    "line": {"dash": "dot", "width": 1, "color": HUES[-1]}}] * zero,
    }  # fmt: skip
    said = "; ".join(f"{name} {v:.4g} ({l:.4g} to {h:.4g})" for name, (v, l, h) in rows.items())
    return made("chart", title, {"data": [data], "layout": layout}, f"{title}, {x}: {said}")


def bars(title: str, rows: Mapping[str, float], *, x: str) -> Html:
    """A bar per row, as long as its value: labels with their counts, or the bins of a histogram."""
    data = {
        "type": "bar", "orientation": "h", "x": list(rows.values()), "y": [wrapped(name) for name in rows],
        "marker": {"color": HUES[0]}, "hovertemplate": "%{y}: %{x:,}<extra></extra>",
    }  # fmt: skip
    layout = {
        **common_layout(x),
        "height": 62 + BAR_HEIGHT * max(len(rows), 1),
        "bargap": 0.25,
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category", "dtick": 1},
    }
    said = ", ".join(f"{name} {value:,.4g}" for name, value in rows.items())
    return made("chart", title, {"data": [data], "layout": layout}, f"{title}, {x}: {said}")


def trace(curve: Curve, place: int, digits: int) -> dict[str, Any]:
    """A curve as plotly has it."""
    return {
        "type": "scatter",
        "name": plain_text(curve.name),
        "x": list(curve.x),
        "y": [None if v is None or not math.isfinite(v) else v for v in curve.y],
        "line": {"color": HUES[(place if curve.hue is None else curve.hue) % len(HUES)], "width": 1.8,
                 "dash": "dot" if curve.dotted else "dash" if curve.dashed else "solid"},
        "marker": {"size": 11, "symbol": "diamond-open"} if curve.hollow else {"size": 5},
        "hovertemplate": f"%{{y:.{digits}g}}",
    }  # fmt: skip


def common_layout(x: str, *, buttons: bool = False) -> dict[str, Any]:
    """What all charts share; page.css gives text and grid the colours of the page."""
    return {
        "autosize": True,
        "margin": {"l": 50, "r": 12, "t": 34 if buttons else 8, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "xaxis": {"title": {"text": plain_text(x)}, "zeroline": False, "automargin": True, "hoverformat": ",.4~g"},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
    }


def plain_text(words: str) -> str:
    """Text that plotly, which knows a little HTML of its own, shows as it is."""
    return html.escape(words, quote=False)


def wrapped(words: str) -> str:
    """The name of a row, in lines short enough to leave a phone room for the rest."""
    return "<br>".join(map(plain_text, textwrap.wrap(words, NAME_CHARACTERS))) or " "


def spoken(curves: Sequence[Curve]) -> str:
    """The curves in words, for who cannot see them: each from its first value to its last."""
    found = []
    for curve in curves:
        known = [v for v in curve.y if v is not None and math.isfinite(v)]
        found.append(
            f"{curve.name} from {known[0]:.4g} to {known[-1]:.4g}" if known else f"{curve.name} without a value"
        )
    return "; ".join(found)


# --- the template


def made(piece: str, *arguments: Any) -> Html:
    """A piece of page.html, filled; arguments that are not Html are escaped."""
    return Html(getattr(macros(), piece)(*arguments))


@functools.cache
def macros() -> Any:
    """The macros of page.html."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    how = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return how.get_template("page.html").module


@functools.cache
def script(name: str) -> str:
    """A file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@functools.cache
def plotly_script() -> str:
    """plotly's script as its package ships it, line ends as a browser counts them."""
    from plotly.offline import get_plotlyjs  # a second of imports, wanted by pages with charts only

    return str(get_plotlyjs()).replace("\r\n", "\n")
