"""What a command goes on with, as a table: what is found, what is wanted, and what is agreed or refused; then the same on a disk."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contents import contents

from mrmae.shards.format import (
    BlockRule,
    Plan,
    Quantiser,
    Source,
    SourceTable,
    TeacherSpec,
    ViewRecipe,
    canonical_sources,
    listing_id,
)
from mrmae.shards.plans import EMPTY_ROW, Agreed, Found, Wanted, agree, compare, differ, negotiate

CACHE = Path("/nowhere/c")
Steps = tuple[str, ...]
BEGIN: Steps = ("write samples.arrow", "begin plan.json")
EXTEND: Steps = ("remove manifest.json", "replace plan.json")
APPEND: Steps = ("remove manifest.json", "write samples.arrow", "replace plan.json")


def images(names: str, sha256: str = "00" * 32) -> list[Source]:
    """An image for every letter, in canonical order."""
    return canonical_sources(Source(f"{name}.png", None, 3, sha256) for name in names)


def resized(rows: Sequence[Source], n_bytes: int) -> list[Source]:
    """The same images of another size."""
    return [dataclasses.replace(row, bytes=n_bytes) for row in rows]


def teacher(name: str, **other: Any) -> TeacherSpec:
    about: dict[str, Any] = {
        "name": name, "library": "timm", "model": "m", "weights": "random", "tag": None, "weights_sha256": name,
        "activation": None, "input_size": (8, 8), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "antialias": True,
        "tap": "last", "prefix_tokens": 0, "native_grid": (2, 2), "grid": (2, 2), "resample": "none", "width": 8, "has_cls": False,
        "has_attention": False, "precision": "fp32", "attention_backend": "none",
    }  # fmt: skip
    return TeacherSpec(**{**about, **other})


def plan(rows: Sequence[Source], **other: Any) -> Plan:
    id = listing_id(rows)
    about: dict[str, Any] = {"listing_id": id, "n_samples": len(rows), "recipe": ViewRecipe(8), "grid": (2, 2), "n_views": 1,
                             "shard_samples": 4, "dtype": "float16", "columns": (A,)}  # fmt: skip
    return Plan(**{**about, **other})


def wanted(
    rows: Sequence[Source], *, append: bool = False, extend: bool = True, limit: int = 0, **other: Any
) -> Wanted:
    return Wanted(plan(rows, **{"listing_id": "", **other}), rows=rows, append=append, extend=extend, limit=limit)


A, B = teacher("a"), teacher("b")
FIRST, MORE = images("abcde"), images("abcdefg")
CALIBRATED = {"a.last": Quantiser("float16")}
MADE = plan(FIRST, quantisers=CALIBRATED)
FINISHED = Found(CACHE, MADE, FIRST)
GREW = negotiate(FINISHED, wanted(MORE, append=True))
GROWN = Found(CACHE, GREW.plan, GREW.rows)


def altered(**other: Any) -> Found:
    """The cache, with another first row in its samples."""
    return Found(CACHE, MADE, [dataclasses.replace(FIRST[0], **other), *FIRST[1:]])


KEYS = {number: row.key for number, row in enumerate(FIRST)}
CONVERTED = {"a.last": Quantiser("float16", source="sha256:1")}

TABLE: list[tuple[str, Found, Wanted, Steps | str]] = [
    ("fresh", Found(CACHE), wanted(FIRST), BEGIN),
    ("killed before it was calibrated", Found(CACHE, plan(FIRST), FIRST), wanted(FIRST), ()),
    ("finished", FINISHED, wanted(FIRST), ()),
    ("more views", FINISHED, wanted(FIRST, n_views=2), EXTEND),
    ("fewer views", Found(CACHE, plan(FIRST, n_views=2), FIRST), wanted(FIRST), "n_views is 2 there and 1 in this command"),
    ("another teacher", FINISHED, wanted(FIRST, columns=(B, A)), EXTEND),
    ("a teacher less", Found(CACHE, plan(FIRST, columns=(A, B)), FIRST), wanted(FIRST), "has column b.last, which this command does"),
    ("other teacher", FINISHED, wanted(FIRST, columns=(B,)), "has column a.last, which this command does not ask for"),
    ("other weights", FINISHED, wanted(FIRST, columns=(teacher("a", weights_sha256="x"),)), r"columns\[0\].weights_sha256 is 'a'"),
    ("append", FINISHED, wanted(MORE, append=True), APPEND),
    ("append only new ones", FINISHED, wanted(images("fg"), append=True), APPEND),
    ("append nothing", FINISHED, wanted(images("ab"), append=True), ()),
    ("append again", GROWN, wanted(images("h"), append=True), APPEND),
    ("append and more views", FINISHED, wanted(MORE, append=True, n_views=2), APPEND),
    ("append to nothing", Found(CACHE), wanted(FIRST, append=True), "--append: there is no cache at /nowhere/c"),
    ("append other bytes", FINISHED, wanted(images("a", "01" * 32), append=True), "image 'a.png' has other bytes.*sha256 was 00.* now 01"),
    ("append longer images", FINISHED, wanted(resized(images("a"), 4), append=True), "image 'a.png' has other bytes.*3 bytes then and 4 now"),
    ("append and options", FINISHED, wanted(MORE, append=True, dtype="int8"), "dtype is 'float16' there and 'int8'"),
    ("grown, the same command again", GROWN, wanted(MORE, append=True), ()),
    ("grown, without --append", GROWN, wanted(MORE), ()),
    ("grown, more views", GROWN, wanted(MORE, n_views=2), EXTEND),
    ("grown, the first images", GROWN, wanted(FIRST), "with 7 images and this command has 5: 2 gone, 0 new"),
    ("more images", FINISHED, wanted(MORE), "0 gone, 2 new, 0 changed .new is .*add --append"),
    ("fewer images", FINISHED, wanted(images("abcd")), "1 gone, 0 new, 0 changed .gone is 'e.png'"),
    ("changed images", FINISHED, wanted(images("abcde", "01" * 32)), "0 gone, 0 new, 5 changed .changed is '..png', its sha256 was 00.* now 01"),
    ("longer images", FINISHED, wanted(resized(FIRST, 4)), "0 gone, 0 new, 5 changed .changed is '..png', 3 bytes then and 4 now"),
    ("images that are only listed", FINISHED, wanted(images("abcde", "")), ()),
    ("images that were only listed", Found(CACHE, MADE, images("abcde", "")), wanted(FIRST), ()),
    ("the same limit", FINISHED, wanted(FIRST, limit=5), ()),
    ("a larger limit", FINISHED, wanted(MORE, limit=7), "2 new, .*--limit 7 takes the first in canonical order.*add --append"),
    ("a larger limit, append", FINISHED, wanted(MORE, limit=7, append=True), APPEND),
    ("a smaller limit", FINISHED, wanted(images("abcd"), limit=4), "1 gone, 0 new.*--limit 4 takes the first in canonical order"),
    ("a smaller limit, append", FINISHED, wanted(images("abcd"), limit=4, append=True), ()),
    ("other seed", FINISHED, wanted(FIRST, recipe=ViewRecipe(8, seed=1)), "recipe.seed is 0 there and 1"),
    ("other size", FINISHED, wanted(FIRST, recipe=ViewRecipe(16)), "recipe.size is 8 there and 16"),
    ("other crops", FINISHED, wanted(FIRST, recipe=ViewRecipe(8, crop_scale=(0.5, 1.0))), r"recipe.crop_scale\[0\] is"),
    ("other flip", FINISHED, wanted(FIRST, recipe=ViewRecipe(8, flip=0.0)), "recipe.flip is 0.5 there and 0.0"),
    ("other dtype", FINISHED, wanted(FIRST, dtype="int8"), "dtype is 'float16' there and 'int8'"),
    ("other format", FINISHED, wanted(FIRST, format="webdataset"), "format is 'zarr' there and 'webdataset'"),
    ("other shards", FINISHED, wanted(FIRST, shard_samples=5), "shard_samples is 4 there and 5"),
    ("token blocks", FINISHED, wanted(FIRST, token_layout=BlockRule(0, 2)), "token_layout is '.absent.' there and"),
    ("other grid", FINISHED, wanted(FIRST, grid=(4, 4), columns=(teacher("a", grid=(4, 4)),)), r"grid\[0\] is 2 there and 4"),
    ("requantised", Found(CACHE, plan(FIRST, quantisers=CONVERTED), FIRST), wanted(FIRST), ()),
    ("requantised, more views", Found(CACHE, plan(FIRST, quantisers=CONVERTED), FIRST), wanted(FIRST, n_views=2),
     "a.last was made by inspect-cache convert"),
    ("may not extend", FINISHED, wanted(FIRST, n_views=2, extend=False), "n_views is 1 there and 2"),
    ("lost samples", Found(CACHE, MADE), wanted(FIRST), ("write samples.arrow",)),
    ("lost samples, too few", Found(CACHE, MADE), wanted(images("ab")), "lost, and IMAGES are 2; expected all 5 images"),
    ("lost samples, others", Found(CACHE, MADE), wanted(images("abcdx")), "lost, and these images are not those"),
    ("lost samples, strangers", Found(CACHE, MADE, keys=KEYS), wanted(images("vwxyz")), "lost, and '..png' is not among IMAGES"),
    ("lost samples of a grown cache", Found(CACHE, GREW.plan, keys={n: row.key for n, row in enumerate(GREW.rows) if row.key}),
     wanted(MORE), ("write samples.arrow",)),
    ("lost samples of a grown cache, no sidecars", Found(CACHE, GREW.plan), wanted(MORE), "sidecars do not all tell"),
    ("samples of another cache", Found(CACHE, plan(FIRST, listing_id="sha256:0"), FIRST), wanted(FIRST), "not those that the plan"),
    ("an altered hash in the samples", altered(sha256="01" * 32), wanted(FIRST), "0 gone, 0 new, 1 changed .changed is '..png', its sha256 was 01"),
    ("an altered length in the samples", altered(bytes=4), wanted(FIRST), "samples.arrow: its images are not those that the plan"),
    ("an altered key in the samples", altered(key="z"), wanted(FIRST), "samples.arrow: its images are not those that the plan"),
    ("an altered hash, append", altered(sha256="01" * 32), wanted(MORE, append=True), "image '..png' has other bytes"),
    ("an altered label", altered(label="x"), wanted(FIRST), "samples.arrow: the label of '..png' is 'x' there and None in IMAGES"),
    ("an altered label, append", altered(label="x"), wanted(MORE, append=True), "samples.arrow: the label of"),
    ("ids of others", Found(CACHE), wanted(FIRST, listing_id="sha256:0"), "listing id is not that of these images"),
    ("same images in other parts", GROWN, dataclasses.replace(wanted(MORE), plan=plan(MORE)), "listing_id is 'sha256:"),
    ("a damaged plan", Found(CACHE, damage="plan.json: not readable"), wanted(FIRST), "plan.json: not readable"),
    ("something else", Found(CACHE, others=["thesis.tex"]), wanted(FIRST), "is no cache .no plan.json. and holds 'thesis.tex'"),
]  # fmt: skip


@pytest.mark.parametrize("found, asked, expected", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_found_and_what_is_wanted_agree_or_are_refused(
    found: Found, asked: Wanted, expected: Steps | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            negotiate(found, asked)
        return
    agreed = negotiate(found, asked)
    assert agreed.steps == expected and agreed.before == found.plan
    assert len(agreed.rows) == agreed.plan.n_rows and sum(bool(row.key) for row in agreed.rows) == agreed.plan.n_images
    assert found.plan is None or agreed.plan.quantisers == found.plan.quantisers
    written = negotiate(Found(CACHE, agreed.plan, agreed.rows), asked)
    assert (written.plan, written.steps, written.new) == (agreed.plan, (), 0), "once written, nothing is left to write"


SAID_EARLY = (
    "dtype",
    "grid",
    "seed",
    "size",
    "crop",
    "flip",
    "format",
    "shards",
    "token",
    "fewer views",
    "thesis",
    "damaged",
    "to nothing",
)


@pytest.mark.parametrize("name", [row[0] for row in TABLE if any(word in row[0] for word in SAID_EARLY)])
def test_options_are_refused_before_images_are_listed(name: str) -> None:
    _, found, asked, expected = next(row for row in TABLE if row[0] == name)
    with pytest.raises(ValueError, match=str(expected)):
        negotiate(found, dataclasses.replace(asked, rows=None))


@pytest.mark.parametrize("name", ["more images", "fewer images", "lost samples, too few", "lost samples, strangers",
                                  "lost samples of a grown cache, no sidecars", "a teacher less", "other weights"])  # fmt: skip
def test_images_and_teachers_are_refused_before_images_are_read(name: str) -> None:
    _, found, asked, expected = next(row for row in TABLE if row[0] == name)
    listed = [dataclasses.replace(row, sha256="") for row in asked.rows or ()]
    with pytest.raises(ValueError, match=str(expected)):
        negotiate(found, dataclasses.replace(asked, rows=listed))


def test_an_appended_part_begins_with_a_shard_of_its_own() -> None:
    assert GREW == Agreed(GREW.plan, GREW.rows, 2, GREW.steps, MADE)
    assert list(GREW.rows) == [*FIRST, *[EMPTY_ROW] * 3, *images("fg")]
    assert [part.numbers for part in GREW.plan.parts] == [range(5), range(8, 10)]


def test_a_new_teacher_comes_behind_and_a_plan_without_an_id_gets_it_from_the_images() -> None:
    assert negotiate(FINISHED, wanted(FIRST, columns=(B, A))).plan.columns == (A, B)
    assert negotiate(Found(CACHE), wanted(FIRST)).plan == plan(FIRST)


Make = Callable[..., Path]


SMALL = {"n": 6, "size": 16, "grid": 2, "n_views": 1, "shard_samples": 4, "bad": (2,)}


@pytest.fixture(scope="module")
def made(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("made") / "c", **SMALL)


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"size": 32}, r"recipe\.size is 16 there and 32"),
    "grid": ({"grid": 4}, r"grid\[0\] is 2 there and 4"),
    "views": ({"n_views": 2}, r"n_views is 1 there and 2"),
    "shards": ({"shard_samples": 3}, r"shard_samples is 4 there and 3"),
    "dtype": ({"dtype": "float16"}, r"dtype is 'int8' there and 'float16'"),
    "teacher": ({"teachers": {"a": {"width": 9, "has_cls": True, "has_attention": True}}}, r"columns is "),
    "more images": ({"n": 7}, r"begun with 6 images and this command has 7: 0 gone, 1 new, 0 changed \(new is"),
    "fewer images": ({"n": 5}, r"1 gone, 0 new, 0 changed \(gone is 'class 2/bild 005"),
    "changed images": ({"seed": 5}, r"0 gone, 0 new, 5 changed"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_other_options_are_refused_and_change_nothing(make_cache: Make, made: Path, what: str) -> None:
    change, message = DIFFERENCES[what]
    before = contents(made)
    with pytest.raises(ValueError, match=message):
        make_cache(made, **{**SMALL, **change})
    assert contents(made) == before


def test_a_folder_of_something_else_is_refused(make_cache: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match="no cache .* holds 'thesis.tex'"):
        make_cache(tmp_path, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / "samples.arrow")
    with pytest.raises(ValueError, match="no cache .* holds 'samples.arrow'"):
        make_cache(tmp_path, **SMALL)
    assert (tmp_path / "samples.arrow").read_text() == "do not touch"


@pytest.mark.parametrize("seed", range(20))
def test_differences_by_columns_are_those_by_objects(seed: int) -> None:
    """Gaps before appended parts, lengths and hashes that changed or are not known, in either table, in any order."""
    rng = np.random.default_rng(seed)

    def table() -> list[Source]:
        names = rng.permutation([f"é{i}.png" for i in rng.choice(30, 20, replace=False)] + [""] * 4)
        hashes = ["", "00" * 32, "01" * 32]
        return [Source(name, None, int(rng.choice([3, 3, 3, 4])) * bool(name), hashes[rng.integers(3)] if name else "")
                for name in names.tolist()]  # fmt: skip

    there, rows = table(), table()
    found = compare(SourceTable.of(there), SourceTable.of(rows))
    then, now = ({row.key: row for row in each if row.key} for each in (there, rows))
    assert [there[i].key for i in found.gone] == [key for key in then if key not in now]
    assert [rows[i].key for i in found.new] == [key for key in now if key not in then]
    assert [rows[i].key for i in found.changed] == [k for k in now if k in then and differ(then[k], now[k])]
    assert [there[i].key if i >= 0 else None for i in found.at] == [
        row.key if row.key in then else None for row in rows
    ]


def test_the_plans_listing_id_must_be_that_of_the_images(tmp_path: Path) -> None:
    made = Plan("sha256:0", 1, ViewRecipe(size=8), (2, 2), 1, 1, "int8", ())
    with pytest.raises(ValueError, match="listing id is not that of these images"):
        agree(tmp_path / "c", Wanted(made, rows=[Source("a", None, 1, "00" * 32)]))
