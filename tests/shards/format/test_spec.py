"""Ids: the golden values here may never change, or caches people have already written become strangers."""

import dataclasses
import json

import numpy as np
import pytest

from mrmae.shards.format import spec
from mrmae.shards.format.quantiser import Quantiser
from mrmae.shards.format.spec import TeacherSpec, ViewRecipe

TEACHER = TeacherSpec(
    name="clip", library="open_clip", model="ViT-B-16", weights="hub", tag="openai", weights_sha256="ab" * 32,
    activation="quick_gelu", input_size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    interpolation="bicubic", antialias=True, tap="pre_tail", prefix_tokens=1, native_grid=(14, 14), grid=(14, 14),
    resample="none", width=4, has_cls=True, has_attention=True, precision="fp32", attention_backend="math",
    model_options={"pad_type": "same"},
)  # fmt: skip
QUANTISER = Quantiser(
    "int8", np.array([0.1, -2, 3e-7, 4], np.float32), np.array([1, 0.3, 1e-5, 70], np.float32), standardised=True
)


def test_key_hashes_are_golden() -> None:
    assert spec.key_hash("a.jpg") == 13457784010303183696
    assert spec.key_hash("b/ü c.png") == 13631999778942687286
    assert spec.signed_hashes(["b/ü c.png"]).tolist() == [13631999778942687286 - 2**64]


def test_geometry_id_is_golden() -> None:
    assert spec.geometry_id("sha256:data", ViewRecipe(size=224)) == (
        "sha256:775837cb34c3a3d49f6836e9e443d4e29d3bd33ac14d2ae3bcbcb8af076638ad"
    )


def test_column_id_is_golden() -> None:
    assert spec.column_id(TEACHER, "sha256:geometry", QUANTISER.to_json()) == (
        "sha256:bb11eaa39f3dc4805d497d1c4287c41aea3fe7b788277c76850e1aa49b66d8d5"
    )


def test_column_id_ignores_the_name_and_origin_of_weights_only() -> None:
    same = dataclasses.replace(TEACHER, name="other", weights="file", tag=None)
    assert column(same) == column(TEACHER)
    changes = {
        "library": "timm", "model": "x", "weights_sha256": "cd" * 32, "activation": "gelu", "input_size": (196, 196),
        "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear", "antialias": False, "tap": "last",
        "prefix_tokens": 5, "native_grid": (7, 7), "grid": (7, 7), "resample": "bilinear", "width": 5, "has_cls": False,
        "has_attention": False, "precision": "bf16", "attention_backend": "flash", "model_options": {},
    }  # fmt: skip
    assert set(changes) | {"name", "weights", "tag", *spec.UNSAID} == {f.name for f in dataclasses.fields(TeacherSpec)}
    ids = {column(dataclasses.replace(TEACHER, **{name: value})) for name, value in changes.items()}
    assert len(ids | {column(TEACHER)}) == len(changes) + 1
    assert spec.column_id(TEACHER, "sha256:geometry", Quantiser("float16").to_json()) != column(TEACHER)


def test_what_a_teacher_sees_of_bands_is_part_of_its_columns_id_and_goes_unsaid_where_it_sees_rgb() -> None:
    assert not set(spec.UNSAID) & set(spec.plain(TEACHER))
    seen = [dataclasses.replace(TEACHER, bands=bands, levels=levels)
            for bands in ((3, 2, 1), (1, 2, 3)) for levels in ((0, 1), (0, 2))]  # fmt: skip
    assert len({column(TEACHER), *map(column, seen)}) == 5
    for teacher in (TEACHER, *seen):
        assert spec.from_json(TeacherSpec, json.loads(json.dumps(spec.plain(teacher))), "plan.json") == teacher
    for wrong in (
        {"bands": (1, 2, 3)},
        {"levels": (0, 1)},
        {"bands": (0, 1, 2), "levels": (0, 1)},
        {"bands": (1,), "levels": (1, 1)},
    ):
        with pytest.raises(ValueError, match="bands|levels"):
            dataclasses.replace(TEACHER, **wrong)


def column(teacher: TeacherSpec) -> str:
    return spec.column_id(teacher, "sha256:geometry", QUANTISER.to_json())


def test_integers_and_floats_of_equal_value_have_one_id() -> None:
    whole = dataclasses.replace(TEACHER, mean=(0, 0, 0), std=(1, 1, 1))
    assert column(whole) == column(dataclasses.replace(TEACHER, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))


def test_canonical_json_is_sorted_compact_and_refuses_nan() -> None:
    assert spec.canonical_json({"b": 0.1, "a": [1, "ü"], "c": None}) == '{"a":[1,"ü"],"b":0.1,"c":null}'.encode()
    with pytest.raises(ValueError):
        spec.canonical_json([float("nan")])


def test_specs_survive_json() -> None:
    assert spec.from_json(TeacherSpec, spec.plain(TEACHER), "here") == TEACHER
    recipe = ViewRecipe(size=96, crop_scale=(1, 1), flip=0)
    assert spec.from_json(ViewRecipe, spec.plain(recipe), "here") == recipe
    with pytest.raises(ValueError, match=r"here: fields \['colour'\]"):
        spec.from_json(ViewRecipe, {**spec.plain(recipe), "colour": 1}, "here")


def test_canonical_order_is_by_hash_and_names_duplicates() -> None:
    keys = [f"{i}.jpg" for i in range(50)]
    order = spec.canonical_order(keys)
    hashes = [spec.key_hash(keys[i]) for i in order]
    assert hashes == sorted(hashes) and sorted(order) == list(range(50))
    with pytest.raises(ValueError, match=r"'7\.jpg': this key occurs twice"):
        spec.canonical_order([*keys, "7.jpg"])


def test_keys_that_are_not_unicode_are_refused() -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        spec.key_hash(b"\xff.jpg".decode("utf-8", "surrogateescape"))


def test_differing_specs_name_the_first_field_and_both_values() -> None:
    old = {"recipe": ViewRecipe(size=224), "columns": [TEACHER]}
    spec.compare_specs(old, spec.plain(old), "plan.json")
    with pytest.raises(
        ValueError, match=r"plan\.json: recipe\.size is 224 there and 192 in this command; .*nothing was changed"
    ):
        spec.compare_specs(old, {**old, "recipe": ViewRecipe(size=192)}, "plan.json")
    other = dataclasses.replace(TEACHER, mean=(0.1, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"columns\[0\]\.mean\[0\] is 0\.5 there and 0\.1"):
        spec.compare_specs(old, {**old, "columns": [other]}, "plan.json")
    with pytest.raises(ValueError, match="extra is '.absent.' there and 1"):
        spec.compare_specs(old, {**old, "extra": 1}, "plan.json")


@pytest.mark.parametrize("wrong", [{"size": 0}, {"crop_scale": (0, 1)}, {"crop_scale": (0.9, 0.4)}, {"flip": 1.5},
                                   {"seed": -1}, {"interpolation": "nearest"}, {"encoding": "png8"}])  # fmt: skip
def test_wrong_recipes_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ViewRecipe(**{"size": 32, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pixels", "a.b", "", "a/b", "-x", "ü"])
def test_teacher_names_that_would_break_paths_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="teacher name"):
        dataclasses.replace(TEACHER, name=name)


def test_column_id_of_blocks_is_golden() -> None:
    rule = {"rule": "splitmix64", "seed": 7, "blocks": 4}
    assert spec.column_id(TEACHER, "sha256:geometry", QUANTISER.to_json(), rule) == (
        "sha256:9dc98bb4ec567080a2872357c216347eff4e12b483daa7ff4410c37e3fb47c24"
    )
