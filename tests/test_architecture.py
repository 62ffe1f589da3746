"""docs/architecture.md speaks of what there is: every file, folder and function that it names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("common", "kernels", "shards", "extract", "train", "probe")
STEP = re.compile(r"^\d+\. `([\w/]+\.py):([\w.]+)`", re.MULTILINE)


def definitions(file: Path) -> set[str]:
    """Functions, classes and `Class.method` of a module."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_step_of_both_ways_exists_and_none_has_more_than_fifteen() -> None:
    ways = PAGE.split("\n## The way of ")[1:]
    assert len(ways) == 2
    for way in ways:
        steps = STEP.findall(way.partition("\n## ")[0])
        assert 5 <= len(steps) <= 15, steps
        for file, name in steps:
            assert (ROOT / file).is_file(), file
            assert name in definitions(ROOT / file), f"{file} defines no {name}"


def test_every_file_and_folder_it_names_exists() -> None:
    for name in re.findall(r"`(\w+/[\w./-]*)`", PAGE):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), name
    assert (ROOT / "docs" / re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)[0]).is_file()


def test_it_names_every_package_sub_package_and_module() -> None:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            folder = path.parent.relative_to(ROOT).as_posix()
            if path.name == "__init__.py":
                assert f"`{folder}/`" in PAGE, f"{folder}/ is not in the page"
            else:
                row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{folder}/`"))
                assert re.search(rf"\b{path.stem}\b", row), f"{path.relative_to(ROOT)} is not in the row of {folder}/"


# Test files that are named by a behaviour: what several modules do together, or one claim of the project.
BY_BEHAVIOUR = {
    "kernels": {"ops", "triton"},
    "extract": {
        "append",
        "bands",
        "blocks",
        "derived",
        "destructive",
        "encodings",
        "extend",
        "formats",
        "parity",
        "taps",
        "url_caches",
        "writers",
    },
    "extract/images": {"zoo"},
    "train": {
        "bands",
        "blocks",
        "boxes",
        "caches",
        "derived",
        "every_recipe",
        "exact",
        "maps",
        "maskalign",
        "methods",
        "slurm",
        "statistics",
    },
    "train/method": {"hidden", "latents", "pairs", "pruning", "satvision"},
    "probe": {"known_truths"},
}


def test_a_test_file_lies_where_its_module_does_and_bears_its_name() -> None:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder, name = path.parent.relative_to(ROOT / "tests").as_posix(), path.stem.removeprefix("test_")
        if folder == ".":
            assert not any((ROOT / package / f"{name}.py").exists() for package in PACKAGES), (
                f"{path} belongs to a package"
            )
            continue
        module = (ROOT / folder / f"{name}.py").exists()
        assert module != (name in BY_BEHAVIOUR.get(folder, ())), f"{path}: {folder}/{name}.py is there: {module}"
