"""k-NN and linear on a small share of the labels, drawn several times."""

import torch
from jaxtyping import Int64
from torch import Tensor

from mrmae.common.knn import knn_predict
from mrmae.common.progress import counted
from mrmae.probe.job import Outcome, Probing, headline
from mrmae.probe.linear import probe_linear
from mrmae.probe.pools import choose_pool
from mrmae.probe.report import mean_interval


def run_low_shot(job: Probing, name: str) -> Outcome:
    """Accuracy at every share of the labels, mean of the draws; linear at the smallest share is the headline.

    An interval is over the test images, each with the mean over the draws; `draws` are the single accuracies.
    """
    settings, (labels, truth), seed = job.options.settings.low_shot, job.labels, job.options.seed
    train, test = (choose_pool(part.pooled(), settings.pool).to(job.options.device) for part in (job.train, job.test))
    n_classes, rows, first = len(job.data.classes), [], torch.empty(0)
    notes: dict[str, None] = {}
    for share in sorted(settings.shares):
        neighbours: list[Tensor] = []
        heads: list[Tensor] = []
        for draw in range(settings.draws):
            few = few_labels(labels, share, seed=seed, draw=draw)
            k = min(settings.k, len(few))
            neighbours += knn_predict(train[few], labels[few].to(train.device), test, ks=[k], temperature=settings.temperature,
                                      n_classes=n_classes, centre=settings.centre).values()  # fmt: skip
            predicted, best, told = probe_linear(
                train[few], labels[few], test, settings.linear, n_classes=n_classes, seed=seed
            )
            heads.append(predicted[best])
            notes |= dict.fromkeys(f"{share:.3g} of the labels: {note}" for note in told)
        at = f"{100 * share:.3g} % of the labels ({counted(len(few), 'image')}), mean of {counted(settings.draws, 'draw')}"
        for what, answers in ((f"{k}-NN", neighbours), ("linear", heads)):
            rows.append(drawn_row(f"{what}, {settings.pool}, {at}", torch.stack(answers), truth, seed))
        first = first if len(first) else torch.stack(heads)
    return {"rows": rows, "notes": [*notes], **headline(rows[1])}, first


def few_labels(labels: Int64[Tensor, "n"], share: float, *, seed: int, draw: int) -> Int64[Tensor, "m"]:
    """Ascending positions of `share` of every class, at least one of each; of one draw, a larger share holds a smaller one."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    chosen = []
    for label in range(int(labels.max()) + 1):
        ids = (labels == label).nonzero().flatten()
        chosen.append(ids[torch.randperm(len(ids), generator=generator)[: max(1, round(share * len(ids)))]])
    return torch.cat(chosen).sort().values


def drawn_row(
    name: str, predicted: Int64[Tensor, "draws n"], truth: Int64[Tensor, "n"], seed: int
) -> dict[str, object]:
    """The mean accuracy of the draws with its interval, and each draw's own."""
    right = (predicted == truth).double()
    return {"name": name, "accuracy": float(right.mean()), "interval": list(mean_interval(right.mean(0), seed=seed)),
            "draws": right.mean(1).tolist()}  # fmt: skip
