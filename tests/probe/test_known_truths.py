"""Real weights on real photos against numbers that were measured once, by other code."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mrmae.probe.job import ProbeOptions
from mrmae.probe.run import probe_features
from mrmae.probe.settings import settings_from

CLOTHING = {"10-NN, mean": 0.847, "10-NN, mean, centred": 0.858}
EUROSAT = {"10-NN, mean, centred": 0.900}
TOLERANCE = 0.035  # two standard errors on 372 images; decoders, resizing filters and crops differ


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name, size, counts, truths",
    [("clothing-small", 0, (1500, 372, 10), CLOTHING), ("eurosat-rgb", 256, (10_000, 2_000, 10), EUROSAT)],
)
def test_mobilenet_features_give_the_reference_accuracies(
    real_file: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    size: int,
    counts: tuple[int, ...],
    truths: dict[str, float],
) -> None:
    weights, photos = real_file("weights/mobilenetv2_100_imagenet1k.safetensors"), real_file(f"data/{name}.tar")
    source = f"timm:mobilenetv2_100@{weights}?pad_type=same&mean=0.5&std=0.5&interpolation=bilinear"
    options = ProbeOptions(source, [str(photos)], ("knn",), settings_from(["knn.k=10"]), out=tmp_path, size=size)
    (result,) = probe_features(options)
    found = {row["name"]: row["accuracy"] for row in result["rows"]}
    assert (result["n_train"], result["n_test"], result["n_classes"]) == counts
    for row, wanted in truths.items():
        assert found[row] == pytest.approx(wanted, abs=TOLERANCE), row
