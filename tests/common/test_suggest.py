"""The end of many error messages: which known names are like a mistyped one."""

from mrmae.common.suggest import did_you_mean, nearest


def test_only_names_that_are_alike_are_suggested() -> None:
    assert nearest("vit_bse", ["resnet50", "vit_base", "vit_tiny"]) == ["vit_base", "vit_tiny"]
    assert nearest("zzz", ["resnet50"]) == [] and nearest("zzz", ["resnet50"], 1, cutoff=0.0) == ["resnet50"]


def test_where_none_is_alike_all_are_named() -> None:
    assert did_you_mean("blokc", ["block", "random"]) == "did you mean block?"
    assert did_you_mean("zzz", ["block", "random"]) == "expected one of block, random"
