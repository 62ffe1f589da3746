"""What a cache holds, and the ids that prove it: hashes of canonical JSON, never of pickles, paths, hosts or times.

docs/format.md, "Identity", is the normative text; golden values stand in tests/shards/format/test_spec.py.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mrmae.common.errors import shortened

Array = np.ndarray[Any, np.dtype[Any]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]  # of samples, views, shards, patches

FORMAT_VERSION = 4
HASHED_AT_ONCE = 1 << 16  # keys

LARGEST_SIDE = 65_500  # pixels of a view: JPEG's own limit
LARGEST_GRID = 1024  # patches per side
LARGEST_WIDTH = 1 << 20  # channels of a token
MAP_DTYPES = ("uint16", "float16")  # ids or bits, and scores
BAND_DTYPES = ("uint8", "uint16", "float16", "float32")
MOST_BANDS = 32
BANDS_FORM = re.compile(rf"npy:([1-9][0-9]?)x({'|'.join(BAND_DTYPES)})")
ENCODING_FORM = (
    "jpeg95, png, png16, or npy:NxDTYPE like npy:14xuint16 (1 to 32 bands of " + ", ".join(BAND_DTYPES) + ")"
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
FACET_TAP = re.compile(r"(input|qkv|q|k|v)_([1-9]\d*)")  # a block's input, and what follows from it
# Where weights came from and how they were called does not change a number; their sha256 does.
NOT_HASHED = ("name", "weights", "tag")
UNSAID = (
    "bands",
    "levels",
)  # of a teacher's fields, where they are None: it sees RGB views, as all did before there were others


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a view's pixels are stored: `[h, w, bands]` of a dtype, in a member with this extension.

    as_shown: RGB as a viewer shows an image; else the bands are the file's own numbers.
    """

    name: str
    extension: str
    bands: int
    dtype: str
    as_shown: bool

    @property
    def words(self) -> str:
        """For a person: `JPEG, quality 95`, `14 bands of uint16`."""
        if self.as_shown:
            return {"jpg": "JPEG, quality 95", "png": "PNG"}[self.extension]
        return f"{self.bands} band{'s' * (self.bands > 1)} of {self.dtype}"

    @property
    def unit(self) -> int:
        """The number that counts as 1: the dtype's largest, and 1 of floats."""
        return {"uint8": 255, "uint16": 65535}.get(self.dtype, 1)


def encoding_of(name: str) -> Encoding:
    """The encoding of this name. ValueError for one that is not known."""
    known = {
        "jpeg95": Encoding(name, "jpg", 3, "uint8", as_shown=True),
        "png": Encoding(name, "png", 3, "uint8", as_shown=True),
        "png16": Encoding(name, "png", 1, "uint16", as_shown=False),
    }
    found = BANDS_FORM.fullmatch(name) if isinstance(name, str) else None
    expect(name in known or (found is not None and int(found[1]) <= MOST_BANDS), "encoding", name, ENCODING_FORM)
    return known[name] if found is None else Encoding(name, "npy.zst", int(found[1]), found[2], as_shown=False)


@dataclasses.dataclass(frozen=True)
class ViewRecipe:
    """How views are drawn and stored: RandomResizedCrop's parameters, flip probability, seed, encoding.

    size: pixels per side of the square view. crop_scale: share of the image's area. crop_ratio: width / height.
    encoding: `jpeg95`, `png`, `png16` or like `npy:14xuint16` (`encoding_of`).
    """

    size: int
    crop_scale: tuple[float, float] = (0.4, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    seed: int = 0
    interpolation: str = "bicubic"
    encoding: str = "jpeg95"

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            object.__setattr__(self, name, floats(getattr(self, name)))
        object.__setattr__(self, "flip", float(self.flip))
        low, high = self.crop_scale
        expect(0 < self.size <= LARGEST_SIDE, "size", self.size, f"1 to {LARGEST_SIDE} pixels")
        expect(0 < low <= high <= 1, "crop_scale", self.crop_scale, "0 < low <= high <= 1")
        expect(0 < self.crop_ratio[0] <= self.crop_ratio[1], "crop_ratio", self.crop_ratio, "0 < low <= high")
        expect(0 <= self.flip <= 1, "flip", self.flip, "a probability")
        expect(0 <= self.seed < 2**64, "seed", self.seed, "0 <= seed < 2**64")
        expect(self.interpolation in ("bilinear", "bicubic", "lanczos"), "interpolation", self.interpolation,
               "bilinear, bicubic or lanczos")  # fmt: skip
        encoding_of(self.encoding)

    @property
    def stored(self) -> Encoding:
        """How its views are stored."""
        return encoding_of(self.encoding)


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """Everything about a teacher that changes its numbers, and three fields that do not (name, weights, tag).

    input_size, native_grid, grid: (height, width). weights_sha256: of the visual tower's state dict as fp32.
    A map has the library `map`, its dtype as model, and the sha256 of the values that were given instead of weights; a computed one
    its teacher's, and `made`, `of` and what it is made with as model_options.
    bands: which of the views' bands its channels are, from 1; levels: the numbers in them that are its 0 and 1, what lies beyond
    being cut. None for RGB views.
    """

    name: str
    library: str
    model: str
    weights: str
    tag: str | None
    weights_sha256: str
    activation: str | None
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    antialias: bool
    tap: str
    prefix_tokens: int
    native_grid: tuple[int, int]
    grid: tuple[int, int]
    resample: str
    width: int
    has_cls: bool
    has_attention: bool
    precision: str
    attention_backend: str
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    bands: tuple[int, ...] | None = None
    levels: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, floats(getattr(self, name)))
        if self.bands is not None and self.levels is not None:
            object.__setattr__(self, "bands", tuple(int(band) for band in self.bands))
            object.__setattr__(self, "levels", floats(self.levels))
            expect(
                all(1 <= band <= MOST_BANDS for band in self.bands),
                "bands",
                self.bands,
                f"numbers of bands, 1 to {MOST_BANDS}",
            )
            expect(self.levels[0] < self.levels[1], "levels", self.levels, "low < high")
        expect(
            (self.bands is None) == (self.levels is None), "levels", self.levels, "both bands and levels, or neither"
        )
        for name in ("input_size", "native_grid", "grid"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        object.__setattr__(self, "model_options", dict(self.model_options))
        expect(bool(NAME.fullmatch(self.name)) and self.name != "pixels", "teacher name", self.name,
               "1 to 64 letters, digits, - or _, starting with a letter or digit, and not 'pixels'")  # fmt: skip
        expect(bool(NAME.fullmatch(self.tap)), "tap", self.tap, "letters, digits, - or _")
        expect(self.weights in ("hub", "file", "random"), "weights", self.weights, "hub, file or random")
        ways = ("none", "nearest", "area") if self.is_map else ("none", "bilinear")
        expect(self.resample in ways, "resample", self.resample, " or ".join(ways))
        expect(not self.is_map or self.model in MAP_DTYPES, "map", self.model, " or ".join(MAP_DTYPES))
        expect(0 < self.width <= LARGEST_WIDTH, "width", self.width, f"1 to {LARGEST_WIDTH} channels")
        expect(
            all(0 < n <= LARGEST_GRID for n in self.grid), "grid", self.grid, f"1 to {LARGEST_GRID} patches per side"
        )

    @property
    def column(self) -> str:
        """Name of this teacher's column: `<teacher>.<tap>`."""
        return f"{self.name}.{self.tap}"

    @property
    def tail_name(self) -> str:
        """Name of what follows its tokens: `tail_name`."""
        return tail_name(self.name, self.tap)

    @property
    def is_map(self) -> bool:
        """Whether this is no teacher but a map: one value per patch."""
        return self.library == "map"

    @property
    def made(self) -> str:
        """How a map is computed from a teacher's stored tokens, `text` or `kmeans`; empty for one that was given, and for teachers."""
        return str(self.model_options.get("made", "")) if self.is_map else ""


def tail_name(teacher: str, tap: str) -> str:
    """Name of what makes other taps of this one: the teacher's, whose norm and projection follow; for a block's facets that of its input."""
    block = FACET_TAP.fullmatch(tap)
    return f"{teacher}.input_{block[2]}" if block else teacher


Spec = TypeVar("Spec", ViewRecipe, TeacherSpec)


def expect(true: bool, field: str, value: object, wanted: str) -> None:
    """Raise ValueError naming `field`, its value and what was wanted, unless `true`."""
    if not true:
        raise ValueError(f"{field}: {shown(value)} cannot be used; expected {wanted}; correct this option")


def floats(values: Iterable[float]) -> tuple[float, ...]:
    """The values as Python floats, so that 1 and 1.0 have one id."""
    return tuple(float(value) for value in values)


def from_json(kind: type[Spec], fields: Mapping[str, Any], where: str) -> Spec:
    """`kind` built from a JSON object; ValueError where a field is missing or unknown."""
    known = {field.name for field in dataclasses.fields(kind)}
    if wrong := sorted((known ^ set(fields)) - (set(UNSAID) - set(fields))):
        raise ValueError(f"{where}: fields {shown(wrong)} are missing or unknown; expected {sorted(known)}; "
                         "read it with the version of mrmae that wrote it")  # fmt: skip
    return kind(**fields)


def key_hash(key: str) -> int:
    """First 8 bytes of sha256 of the key's UTF-8, little-endian, unsigned. ValueError for text that is not Unicode."""
    try:
        data = key.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key!r}: this name is not valid Unicode; keys are UTF-8; rename the file") from None
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def signed_hashes(keys: Sequence[str]) -> Numbers:
    """The keys' hashes reinterpreted as int64, the only 64-bit integer torch computes with."""
    found = np.empty(len(keys), "<i8")
    for start in range(0, len(keys), HASHED_AT_ONCE):
        part = keys[start : start + HASHED_AT_ONCE]
        try:
            words = b"".join([hashlib.sha256(key.encode()).digest()[:8] for key in part])
        except UnicodeEncodeError:
            words = b"".join([key_hash(key).to_bytes(8, "little") for key in part])  # names the one
        found[start : start + len(part)] = np.frombuffer(words, "<i8")
    return found


def canonical_order(keys: Sequence[str]) -> list[int]:
    """Positions that sort the keys by (hash, key): any prefix is a random sample of the data set.

    ValueError names duplicate keys.
    """
    order = sorted(range(len(keys)), key=lambda i: (key_hash(keys[i]), keys[i]))
    twice = [keys[a] for a, b in itertools.pairwise(order) if keys[a] == keys[b]]
    if twice:
        raise ValueError(f"{twice[0]!r}: this key occurs twice ({len(twice)} such keys); a key names one image; "
                         "rename one, or choose with --include")  # fmt: skip
    return order


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces, floats as their shortest repr. ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def content_id(value: Any) -> str:
    """`sha256:` and the hex digest of the value's canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def geometry_id(listing_id: str, recipe: ViewRecipe) -> str:
    """Id of the views of listed images. Not of their number: views may be added later."""
    return content_id({"format_version": FORMAT_VERSION, "listing": listing_id, "recipe": dataclasses.asdict(recipe)})


def column_id(
    teacher: TeacherSpec, geometry_id: str, quantiser: Mapping[str, Any], token_layout: Mapping[str, Any] | None = None
) -> str:
    """Id of one column's numbers: teacher, geometry and quantiser (`Quantiser.to_json()`, calibration included).

    token_layout: the rule of the blocks; raster order, None, is no part of the id.
    """
    fields = {name: value for name, value in plain(teacher).items() if name not in NOT_HASHED}
    content = {
        "format_version": FORMAT_VERSION,
        "teacher": fields,
        "geometry": geometry_id,
        "quantiser": dict(quantiser),
    }
    return content_id(content if token_layout is None else {**content, "token_layout": dict(token_layout)})


def compare_specs(old: Any, new: Any, where: str, *, field: str = "") -> None:
    """Return silently when both are the same; ValueError names the first differing field and both values.

    old, new: dataclasses, or JSON values. where: what holds `old`, e.g. the path of plan.json.
    """
    old, new = plain(old), plain(new)
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{field}.{name}" if field else name
            compare_specs(old.get(name, "(absent)"), new.get(name, "(absent)"), where, field=inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            compare_specs(a, b, where, field=f"{field}[{i}]")
    elif old != new:
        raise ValueError(f"{where}: {shortened(field, 200)} is {shown(old)} there and {shown(new)} in this command; both must agree; "
                         "repeat the first command's options, or write to a new folder (nothing was changed)")  # fmt: skip


def plain(value: Any) -> Any:
    """The value as JSON would give it back: dataclasses become dicts, without what goes unsaid, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.asdict(value)
        value = {name: inner for name, inner in fields.items() if name not in UNSAID or inner is not None}
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """The value's repr, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
