"""Several processes as one run: who am I, does anyone want to stop, did anyone fail, and gradients averaged over all.

Nothing here changes what is trained: order, views and masks do not depend on the number of ranks.
"""

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
REASONS = (*STOP_SIGNALS, "divergence")
FAILED = "mrmae/failed"  # what the first rank to fail leaves in the store that torchrun keeps for all
LONGEST_WAIT = timedelta(
    minutes=30
)  # of one rank for another; NCCL's own ten are too few for rank 0 to draw and save by itself
LAST_WORDS = timedelta(seconds=5)
BROKEN = ("connection", "socket", "timed out", "gloo", "nccl")  # in the text of an error that another rank's end causes


class OtherRankFailed(RuntimeError):
    """Another process of this run failed first; the message is its error."""


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `size`, number `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def join_ranks() -> Ranks:
    """Join the processes torchrun started (gloo on CPU, NCCL on GPU); one rank of one where it did not."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return Ranks()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


def leave_ranks() -> None:
    """Leave the processes `join_ranks` joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def agree_on(value: Any, ranks: Ranks) -> Any:
    """Rank 0's `value`, on every rank."""
    if ranks.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on every rank."""
    if ranks.size == 1:
        return [value]
    box = [None] * ranks.size
    dist.all_gather_object(box, value)
    return box


@contextlib.contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """Where one rank fails, the others stop with its error, not with the broken connection it leaves behind.

    Raises OtherRankFailed on every rank but the first to fail.
    """
    try:
        yield
    except Exception as error:
        first = first_failure(error, ranks) if ranks.size > 1 else None
        if first is None:
            raise
        raise OtherRankFailed(f"rank {ranks.rank} stopped because {first}") from error


def first_failure(error: Exception, ranks: Ranks) -> str | None:
    """What made another rank fail before this one; None where `error` is the first of all."""
    store = dist.distributed_c10d._get_default_store()
    own = f"rank {ranks.rank} failed: {type(error).__name__}: {error}"
    try:
        if is_broken_connection(error):
            store.wait([FAILED], LAST_WORDS)
            return str(store.get(FAILED).decode())
        first = str(store.compare_set(FAILED, "", own).decode())
        return None if first == own else first
    except RuntimeError:  # nobody told, or the store is gone with the machine that kept it
        return (
            "another process ended without a word (killed, or out of memory?)" if is_broken_connection(error) else None
        )


def is_broken_connection(error: Exception) -> bool:
    """Whether `error` is what a rank sees when another one is gone."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error).lower() for word in BROKEN)


def mean_over_ranks(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The mean of every rank's `values`."""
    if ranks.size > 1:
        dist.all_reduce(values)
        values = values / ranks.size
    return values


def replicated(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The model with gradients averaged over ranks in its backward pass."""
    if ranks.size == 1:
        return model
    where = [device.index or 0] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch renames the flag; our buffers never change
        return DistributedDataParallel(model, device_ids=where, broadcast_buffers=False, gradient_as_bucket_view=True)


class StopRequest:
    """Why this run should end, if it should: one of REASONS."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.received: str | None = None

    def agreed(self) -> str | None:
        """The reason once any rank has one: all ranks stop after the same update.

        A signal that arrives while the ranks are asking each other counts from the next update on: no rank knows more than
        what all agreed on.
        """
        if self._ranks.size == 1:
            return self.received
        flag = torch.tensor(REASONS.index(self.received) + 1 if self.received else 0)
        dist.all_reduce(flag, dist.ReduceOp.MAX)  # on the CPU: the device is not made to wait
        if int(flag) == 0:
            return None
        self.received = REASONS[int(flag) - 1]
        return self.received


@contextlib.contextmanager
def stop_requests(ranks: Ranks) -> Iterator[StopRequest]:
    """SIGTERM, SIGUSR1 and Ctrl-C become a request to stop after the update in flight; a second Ctrl-C interrupts at once.

    Outside the main thread signals cannot be caught, and nothing is changed.
    """
    request, before = StopRequest(ranks), {}

    def handler(number: int, _frame: FrameType | None) -> None:
        if request.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.received = signal.Signals(number).name
        if ranks.rank == 0:  # os.write, because the signal may have interrupted any other printing
            os.write(2, f"\n{request.received}: stopping after the update in flight\n".encode())

    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            with contextlib.suppress(ValueError):  # not the main thread
                number = getattr(signal, name)
                before[number] = signal.signal(number, handler)
    try:
        yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)
