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
