"""How a student does on images it is not trained on, and how many directions it uses: losses, k-NN accuracy, RankMe.

Views and masks are those of epoch 0 every time, so one epoch's number can be held against another's. The model is in evaluation
mode (no drop path), and nothing of training changes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mrmae.common.knn import knn_predict
from mrmae.common.spectrum import entropy_rank, singular_values
from mrmae.shards.format import Numbers
from mrmae.train import batches
from mrmae.train.batches import Loaded
from mrmae.train.feed import Feed, load_masked
from mrmae.train.method import draw_of, evaluating
from mrmae.train.online import with_targets
from mrmae.train.ranks import gather
from mrmae.train.run import Run

NEIGHBOURS, TEMPERATURE = 20, 0.07
BANK, QUERIES = 10_000, 2_000  # images at most, the first in canonical order: a random sample of the data set


def chunks_of(numbers: Numbers, run: Run) -> list[Numbers]:
    """This rank's share of `numbers`, in pieces of one micro-batch."""
    size = run.share.micro_size
    pieces = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return pieces[run.ranks.rank :: run.ranks.size]


@torch.no_grad()
def held_out_loss(run: Run) -> dict[str, float]:
    """The mean loss, and every term's, over the images held out."""
    total = torch.zeros(2 + len(run.model.terms), dtype=torch.float64)
    with evaluating(run.model):
        for batch, masks in loaded_in_turn(run, chunks_of(run.held_out, run), features=True):
            whole = with_targets((batch, masks), run.online, run.needed, model=run.model)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                loss, terms = run.model(*whole)
            values = torch.stack([torch.ones_like(loss), loss, *terms.values()]).double().cpu()
            total += len(batch.samples) * values
    total = torch.stack(gather(total, run.ranks)).sum(0)
    means = (total[1:] / total[0]).tolist()
    return dict(zip(["loss", *(term.name for term in run.model.terms)], means))


def loaded_in_turn(run: Run, chunks: list[Numbers], *, features: bool) -> Iterator[Loaded]:
    """These chunks on the device, read ahead; only their pixels without `features`."""

    def load(_epoch: int, at: int, _micro: int) -> Loaded:
        if features:
            return load_masked(run, chunks[at], epoch=0)
        return batches.load_batch(run.cache, chunks[at], epoch=0, needed={}), draw_of(run.recipe, run.info, 0)

    with Feed(load, ((0, at, 0) for at in range(len(chunks))), run.device) as feed:
        yield from feed


def probe_student(run: Run) -> dict[str, Any]:
    """RankMe of the student's features of images trained on and, with labels on both sides, k-NN accuracy of those held out.

    Features: the mean of the student's patch tokens of the whole stored view, without any training on labels. `rank` and `knn`
    say what the two numbers are of.
    """
    bank, queries = bank_and_queries(run)
    features = image_features(run, bank)
    found: dict[str, Any] = {
        "rankme": entropy_rank(singular_values(features)),
        "rank": {"images": len(bank), "channels": features.shape[1]},
    }
    if not len(queries):
        return found
    names = sorted({str(run.cache.labels[number]) for number in [*bank, *queries]})
    labels = {name: i for i, name in enumerate(names)}
    truth = [torch.tensor([labels[str(run.cache.labels[n])] for n in numbers]) for numbers in (bank, queries)]
    k, asked = min(NEIGHBOURS, len(bank)), image_features(run, queries)
    told = knn_predict(features, truth[0], asked, ks=[k], temperature=TEMPERATURE, n_classes=len(names))[k]
    of = {"k": k, "bank": len(bank), "queries": len(queries)}
    return found | {"knn_top1": float((told == truth[1]).double().mean()), "knn": of}


def bank_and_queries(run: Run) -> tuple[Numbers, Numbers]:
    """The labelled images whose neighbours vote, from those trained on, and those asked about, from those held out.

    Without labels on either side: any images trained on, and none asked about.
    """
    bank, queries = (batches.labelled(run.cache, numbers) for numbers in (run.numbers, run.held_out))
    return (bank[:BANK], queries[:QUERIES]) if len(bank) and len(queries) else (run.numbers[:BANK], queries[:0])


@torch.no_grad()
def image_features(run: Run, numbers: Numbers) -> Float[Tensor, "n d"]:
    """The mean of the student's patch tokens of each sample's first view, fp32 on the CPU, in the order of `numbers`."""
    chunks, found = chunks_of(numbers, run), []
    with evaluating(run.model):
        for batch, _ in loaded_in_turn(run, chunks, features=False):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                found.append(run.model.tokens(batch.pixels).float().mean(1).cpu())
    mine = {int(piece[0]): rows for piece, rows in zip(chunks, found)}
    parts = {first: rows for share in gather(mine, run.ranks) for first, rows in share.items()}
    return torch.cat([parts[int(number)] for number in numbers[:: run.share.micro_size]])
