"""What a person asked for: `NAME=LIBRARY:MODEL[/TAG][@FILE][?key=value&...]`, parsed and checked, nothing built yet."""

import ast
import dataclasses
import math
import re
from typing import Any
from urllib.parse import unquote

from mrmae.shards.format import MOST_BANDS, NAME

LIBRARIES = ("open_clip", "timm", "python")
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
FORM = "NAME=LIBRARY:MODEL[/TAG][@FILE][?key=value&...], e.g. clip=open_clip:ViT-B-16-quickgelu/openai"
RESERVED_NAMES = ("pixels", "view")
NOT_OPTIONS = {"checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}  # of timm.create_model
CHANNELS = 3
TEXT_OPTION = "text_"  # begins the options of a text tower


@dataclasses.dataclass(frozen=True)
class TeacherRequest:
    """A teacher as asked for. None: the model's or tag's own configuration decides.

    weights: `hub`, `file` or `random`. bands, levels: of the views, as in TeacherSpec. options: what goes to the model's constructor. input_size: pixels per side.
    """

    name: str
    library: str
    model: str
    weights: str
    tag: str | None = None
    file: str | None = None
    tap: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    input_size: int | None = None
    activation: str | None = None
    bands: tuple[int, ...] | None = None
    levels: tuple[float, float] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.library == "python":
            return
        if ":" in self.model or (found := sorted(NOT_OPTIONS & set(self.options))):
            what = f"model {self.model!r}" if ":" in self.model else f"?{found[0]}="
            raise ValueError(f"{self.where}: {what} names a place of weights; expected a name of the library's own; give weights "
                             "with /TAG or @FILE")  # fmt: skip

    @property
    def where(self) -> str:
        """How messages name this teacher: `NAME=LIBRARY:MODEL[/TAG]`."""
        tag = "random" if self.weights == "random" else self.tag
        dot = "." if self.library == "timm" and tag != "random" else "/"
        return f"{self.name}={self.library}:{self.model}" + (f"{dot}{tag}" if tag else "")


def parse_teacher(text: str) -> TeacherRequest:
    """The request in `text`; ValueError where it does not have the form above.

    `/random` asks for random weights. `tap mean std interpolation input_size activation bands levels` are ours; every other key goes
    to the model's constructor, its value read as a Python literal (`16`, `0.5`, `true`, `(2, 2)`) or else as text.
    mean, std: one number, or three with commas, of pixels in [0, 1]. bands: `3,2,1`, what it sees as red, green and blue, from 1. levels:
    `0,10000`, the numbers that are its 0 and 1. timm's tag may follow a dot.
    """
    name, equals, rest = text.partition("=")
    library, colon, rest = rest.partition(":")
    if not (equals and colon):
        raise ValueError(f"--teacher {text}: has no name or no library; expected {FORM}")
    if not NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ValueError(
            f"--teacher {text}: {name!r} cannot name a teacher; expected letters, digits, - or _ (a folder is named "
            f"after it), and none of {', '.join(RESERVED_NAMES)}"
        )
    if library not in LIBRARIES:
        raise ValueError(
            f"--teacher {text}: unknown library {library!r}; expected {', '.join(LIBRARIES[:-1])} or {LIBRARIES[-1]}; {FORM}"
        )
    rest, ours, options = split_query(rest, text)
    if library == "python":
        if not FUNCTION.fullmatch(rest):
            raise ValueError(
                f"--teacher {text}: {rest!r} names no function; expected NAME=python:package.module:function[?key=value&...]"
            )
        return TeacherRequest(name, library, rest, "file", options=options, **ours)
    model, at, file = rest.partition("@")
    model, _, tag = model.partition("/")
    random = tag == "random"
    tag = "" if random else tag
    if library == "timm" and not tag:
        model, _, tag = model.partition(".")
    if not model or (at and not file) or ":" in model:
        raise ValueError(f"--teacher {text}: has no model or an empty @FILE; expected {FORM}")
    if random and file:
        raise ValueError(f"--teacher {text}: asks for random weights and for a file; leave one out")
    weights = "random" if random else "file" if file else "hub"
    return TeacherRequest(name, library, model, weights, tag or None, file or None, options=options, **ours)


def split_query(rest: str, text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(what stands before the last `?`, our keys, the constructor's keys)."""
    before, mark, query = rest.rpartition("?")
    if not mark or (query and "=" not in query):  # a question mark in a file name
        return rest, {}, {}
    ours: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not (key and equals) or key in ours or key in options:
            raise ValueError(f"--teacher {text}: {pair!r} is not key=value, or the key stands twice; expected {FORM}")
        value = unquote(value)
        if key in OUR_KEYS:
            ours[key] = read_ours(key, value, text)
        else:
            options[key] = literal(value)
    return before, ours, options


def read_ours(key: str, value: str, text: str) -> Any:
    try:
        return OUR_KEYS[key](value)
    except ValueError as error:
        raise ValueError(f"--teacher {text}: ?{key}={value}: {error}") from None


def read_channels(value: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in value.split(","))
    if len(values) not in (1, CHANNELS):
        raise ValueError(f"has {len(values)} numbers; expected one, or one per channel: 0.485,0.456,0.406")
    return values * (CHANNELS // len(values))


def read_std(value: str) -> tuple[float, ...]:
    values = read_channels(value)
    if min(values) <= 0:
        raise ValueError("a standard deviation must be above zero")
    return values


def read_bands(value: str) -> tuple[int, ...]:
    words = value.split(",")
    if len(words) != CHANNELS or not all(word.isdecimal() and 1 <= int(word) <= MOST_BANDS for word in words):
        raise ValueError(f"expected {CHANNELS} numbers of bands, from 1 to {MOST_BANDS}: 3,2,1")
    return tuple(int(word) for word in words)


def read_levels(value: str) -> tuple[float, float]:
    low, comma, high = value.partition(",")
    if not (comma and math.isfinite(float(low)) and float(low) < float(high) < math.inf):
        raise ValueError("expected two numbers, the lower first: 0,10000")
    return float(low), float(high)


def read_size(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError("expected pixels per side, a whole number above zero")
    return int(value)


def read_interpolation(value: str) -> str:
    if value not in INTERPOLATIONS:
        raise ValueError(f"expected {', '.join(INTERPOLATIONS)}")
    return value


def read_word(value: str) -> str:
    if not value:
        raise ValueError("is empty")
    return value.lower()


OUR_KEYS = {
    "tap": read_word,
    "mean": read_channels,
    "std": read_std,
    "interpolation": read_interpolation,
    "input_size": read_size,
    "activation": read_word,
    "bands": read_bands,
    "levels": read_levels,
}


def literal(value: str) -> Any:
    """`value` as the Python literal it spells (true, false and none in any case), or as it is."""
    word = value.capitalize() if value.lower() in ("true", "false", "none") else value
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return value


def without_text(request: TeacherRequest) -> TeacherRequest:
    """The request without the options of a text tower, which begin with `text_`."""
    kept = {key: value for key, value in request.options.items() if not key.startswith(TEXT_OPTION)}
    return dataclasses.replace(request, options=kept)
