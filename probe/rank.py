"""How many directions features use, without labels: RankMe, effective rank, uniformity, and the spectrum as a picture."""

import io
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from mrmae.common.files import publish
from mrmae.common.spectrum import RESOLVED, entropy_rank, singular_values
from mrmae.probe import report
from mrmae.probe.job import Outcome, Probing, evenly
from mrmae.probe.pools import pools

PAIR_ROWS = 1024  # per chunk of similarities


def run_rank(job: Probing, name: str) -> Outcome:
    """The measures of every pooling over all images of DATA, and a picture of the centred spectra."""
    parts = [job.train.pooled(), *([job.test.pooled()] if job.data.test is not job.data.train else [])]
    whole = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
    few = evenly(len(whole["mean"]), job.options.settings.rank.images)
    rows: list[dict[str, Any]] = []
    spectra = {}
    for kind, vectors in pools({kind: x[few] for kind, x in whole.items()}).items():
        x = vectors.double()
        plain = singular_values(x)
        spectra[kind] = singular_values(x - x.mean(0), floor=RESOLVED * float(plain[0]))
        rows.append({"vectors": kind, "RankMe": entropy_rank(plain), "effective rank, centred": entropy_rank(spectra[kind]),
                     "uniformity": uniformity(x), "channels": x.shape[1], "images": len(x)})  # fmt: skip
    picture = Path("pictures") / f"{name}.png"
    draw_spectra(
        job.home / picture, spectra, title=f"Singular values of centred features\n{report.title(job.source.name)}"
    )
    told = [f"{row['vectors']}: RankMe {row['RankMe']:.1f}, effective rank {row['effective rank, centred']:.1f} (centred) of at most "
            f"{min(row['channels'], row['images'])}, uniformity {row['uniformity']:.3f}" for row in rows]  # fmt: skip
    notes = [f"{len(few)} images and {x.shape[1]} channels: no rank is above {len(few)}; give more images"] * (
        len(few) < x.shape[1]
    )
    return {"measures": rows, "told": told, "notes": notes, "pictures": [str(picture)], "headline": told[0], "accuracy": None,
            "interval": None}, None  # fmt: skip


def uniformity(x: Float[Tensor, "n d"]) -> float:
    """log of the mean of exp(-2 |u - v|^2) over all pairs of different rows, as unit vectors (arXiv 2005.10242, t = 2).

    0 where all are alike; about -4 where they are spread over many directions. NaN of a single row.
    """
    x, total = F.normalize(x.double(), dim=1), 0.0
    for rows in torch.split(x, PAIR_ROWS):
        total += float((4 * (rows @ x.T) - 4).exp().sum())
    n = len(x)
    return math.log(max((total - n) / (n * (n - 1)), sys.float_info.min)) if n > 1 else math.nan


def draw_spectra(path: Path, spectra: Mapping[str, Float[Tensor, "k"]], *, title: str) -> None:
    """Write one PNG: every spectrum relative to its largest value, both axes logarithmic."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    for name, values in spectra.items():
        shown = values[values > 0] / values.amax().clamp_min(1e-300)
        axis.loglog(range(1, len(shown) + 1), shown.numpy(), label=f"{name}: effective rank {entropy_rank(values):.1f}")
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="direction", ylabel="singular value, of the largest")
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    publish(path, out.getvalue(), replace=True)
