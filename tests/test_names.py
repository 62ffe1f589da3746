"""A public name is defined once in the project: who finds it has found the only one."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "kernels", "shards", "extract", "train", "probe")

TWINS = "one signature by design: reference, Triton and dispatch are compared with each other"
STORAGE = "the functions of the protocol Storage, one module per format"
CONSTEXPR = "Triton reads constants of its own module only, as constexpr; a test holds them equal to the reference's"
# Why a name may have several definitions.
EXCEPTIONS = {
    **dict.fromkeys(
        ("code_components", "embed_tokens", "gather_patches", "mimic_loss", "mimic_loss_backward", "pixel_loss", "pixel_loss_backward"), TWINS
    ),
    **dict.fromkeys(("LN_EPS", "NORM_PIX_EPS", "UNIT_EPS"), CONSTEXPR),
    **dict.fromkeys(
        ("METADATA", "OVERHEAD_BYTES", "column_folder", "create_column", "metadata", "metadata_paths", "open_shard",
         "read_attributes", "shard_files", "write_column_shard"), STORAGE,
    ),
    "GOLDEN": "splitmix64's constant, in torch's words for masks and in numpy's for token blocks; kernels and shards know nobody",
    "LIBRARY": "the handle by which torch registers the operators of this file",
    "main": "the entry of each command",
}  # fmt: skip


def defined(path: Path) -> Iterator[str]:
    """The public names that a module defines at its top level."""
    for node in ast.parse(path.read_text()).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def test_public_names_are_defined_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for name in sorted(set(defined(path))):
                places[name].append(path.relative_to(ROOT).as_posix())
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not (told := {name: where for name, where in twice.items() if name not in EXCEPTIONS}), told
    assert not (stale := EXCEPTIONS.keys() - twice.keys()), f"defined once by now: {sorted(stale)}"
