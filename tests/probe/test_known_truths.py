"""Real weights on real photos against numbers that were measured once, by other code."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mrmae.probe.run import Options, probe_features
from mrmae.probe.settings import settings_from

POOLED_10_NN = {"10-NN, mean": 0.847, "10-NN, mean, centred": 0.858}
TOLERANCE = 0.035  # two standard errors on 372 images; decoders and resizing filters differ


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_mobilenet_features_of_clothing_give_the_reference_accuracies(
    real_file: Callable[[str], Path], tmp_path: Path
) -> None:
    weights, photos = real_file("weights/mobilenetv2_100_imagenet1k.safetensors"), real_file("data/clothing-small.tar")
    source = f"timm:mobilenetv2_100@{weights}?pad_type=same&mean=0.5&std=0.5&interpolation=bilinear"
    (result,) = probe_features(Options(source, [str(photos)], ("knn",), settings_from(["knn.k=10"]), out=tmp_path))
    found = {row["name"]: row["accuracy"] for row in result["rows"]}
    assert (result["n_train"], result["n_test"], result["n_classes"]) == (1500, 372, 10)
    for name, wanted in POOLED_10_NN.items():
        assert found[name] == pytest.approx(wanted, abs=TOLERANCE), name
