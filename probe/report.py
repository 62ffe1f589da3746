"""What a probe found: accuracies with bootstrap intervals, as JSON, a line for the terminal, and a Markdown table."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from mrmae.common.files import publish

RESAMPLES = 2000
LEVEL = 0.95
ABSOLUTE = re.compile(r"(?<![\w.~-])/(?:[^\s/?#]+/)+")
Result = dict[str, Any]


def interval(right: Bool[Tensor, "n"], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of an accuracy over the test images (drawn with replacement).

    The number of right ones among n drawn with replacement is binomial, so it is drawn as such: exact, at no cost.
    """
    n, p = len(right), float(right.double().mean())
    means = np.random.default_rng(seed).binomial(n, p, resamples) / n
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values: Float[Tensor, "n"], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of a mean over test images whose values are of a few kinds.

    How many of each kind are among n drawn with replacement is multinomial: exact, at no cost.
    """
    kinds, counts = np.unique(values.numpy(), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), resamples)
    low, high = np.quantile(drawn @ kinds / len(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_interval(
    right: Shaped[Tensor, "n"], other: Shaped[Tensor, "n"], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the difference of two accuracies, test images drawn for both at once.

    right, other: which images each got right, or in what share of several draws.
    """
    return mean_interval(right.double() - other.double(), seed=seed, resamples=resamples)


def row(name: str, predicted: Int64[Tensor, "n"], labels: Int64[Tensor, "n"], *, seed: int) -> dict[str, Any]:
    """One accuracy: name, share of right test images, interval."""
    return share_row(name, predicted == labels, seed=seed)


def share_row(name: str, right: Bool[Tensor, "n"], *, seed: int) -> dict[str, Any]:
    """One share of test images: name, share, interval."""
    low, high = interval(right, seed=seed)
    return {"name": name, "accuracy": float(right.double().mean()), "interval": [low, high]}


def result_path(home: Path, probe: str, id: str) -> Path:
    """Where a probe's result lies; its name is the hash of everything that decides it."""
    return home / "results" / f"{probe}-{id[7:19]}.json"


def load_result(home: Path, probe: str, id: str) -> Result | None:
    """A result from before; None where there is none that can be read."""
    path = result_path(home, probe, id)
    try:
        found: Result = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    pictures = [home / name for name in found.get("pictures", [])]
    return found if found.get("id") == id and all(p.exists() for p in pictures) else None


def save_result(home: Path, result: Mapping[str, Any], predicted: Int64[Tensor, "*draws n"] | None) -> Path:
    """Write the JSON, the headline's predicted classes beside it (for paired comparisons), and results.md anew."""
    path = result_path(home, result["probe"], result["id"])
    if predicted is not None:
        data = safetensors.torch.save({"predicted": predicted.contiguous()})
        publish(path.with_suffix(".safetensors"), data, replace=True)
    publish(path, (json.dumps(result, indent=2, default=list) + "\n").encode(), replace=True)
    publish(home / "results.md", markdown(all_results(home)).encode(), replace=True)
    return path


def load_predicted(home: Path, result: Mapping[str, Any]) -> Int64[Tensor, "*draws n"]:
    """The headline's predicted classes of a result of this folder."""
    path = result_path(home, result["probe"], result["id"]).with_suffix(".safetensors")
    return safetensors.torch.load_file(path)["predicted"]


def right_answers(home: Path, result: Mapping[str, Any], labels: Int64[Tensor, "n"]) -> Float[Tensor, "n"]:
    """1 for every test image that the headline got right, else 0; of several draws their mean."""
    return (load_predicted(home, result) == labels).double().reshape(-1, len(labels)).mean(0)


def all_results(home: Path) -> list[Result]:
    """Every result of a folder, in the order of source, data and probe."""
    found = [json.loads(path.read_bytes()) for path in sorted((home / "results").glob("*.json"))]
    return sorted(found, key=lambda r: (r["source"], r["data"], r["probe"], r["id"]))


def line(result: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    where = f"{result['probe']}  {cell(result['source'])}"
    if result.get("accuracy") is None:
        return f"{where}: " + "; ".join([*result.get("told", []), *result["pictures"]])
    low, high = result["interval"]
    return (
        f"{where}: {result['accuracy']:.3f} [{low:.3f}, {high:.3f}]  {result['headline']}, {result['n_test']} test images of "
        f"{cell(result['data'])}, {result['n_train']} train images"
    )


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of headlines, then every row of every result, for documents. A score is what its headline names, else an accuracy."""
    head = ["| source | probe | headline | score | 95 % interval | train / test / classes | seed |",
            "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    rows = [f"| {cell(r['source'])} | {r['probe']} | {cell(r['headline'])} | {r['accuracy']:.3f} | {span(r)} | "
            f"{r['n_train']} / {r['n_test']} / {r['n_classes']} | {r['seed']} |"
            for r in results if r.get("accuracy") is not None]  # fmt: skip
    details = [text for r in results for text in detail(r)]
    return "\n".join(["# Probes", "", *head, *rows, "", *details]) + "\n"


def detail(result: Mapping[str, Any]) -> list[str]:
    """One result in full: settings, notes, all rows, pictures."""
    text = [f"## {result['probe']}: {cell(result['source'])} on {cell(result['data'])}", ""]
    text += [f"- {note}" for note in result["notes"]]
    text += [f"- settings: `{json.dumps(result['settings'])}`", f"- id: `{result['id']}`", ""]
    if result["rows"]:
        text += ["| | score | 95 % interval |", "| --- | --- | --- |"]
        text += [f"| {cell(r['name'])} | {r['accuracy']:.3f} | {span(r)} |" for r in result["rows"]]
        text.append("")
    if measures := result.get("measures"):
        text += [*measures_table(measures), ""]
    return text + [f"![{Path(picture).stem}]({picture})\n" for picture in result.get("pictures", [])]


def measures_table(measures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Measures as a table; all rows have the first one's names."""
    head = [f"| {' | '.join(map(cell, measures[0]))} |", f"| {' | '.join('---' for _ in measures[0])} |"]
    return head + [f"| {' | '.join(measured(value) for value in row.values())} |" for row in measures]


def measured(value: Any) -> str:
    """A measure in a table: numbers with four digits, nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else cell(str(value))


def span(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{low:.3f} to {high:.3f}"


def cell(text: str) -> str:
    """Text that cannot break a Markdown table, absolute paths shortened to their last part."""
    return ABSOLUTE.sub("", text).replace("|", "\\|").replace("\n", " ")


def title(source: str) -> str:
    """A source's name that fits above a picture: no absolute path, no options, at most 48 characters."""
    name = cell(source).partition("?")[0]
    return name if len(name) <= 48 else f"{name[:22]}...{name[-23:]}"
