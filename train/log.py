"""What a run tells: one JSON line per interval and epoch, the same to TensorBoard and Weights & Biases, a progress line.

Losses come to the host without a wait: each step leaves one small vector, which is read once the device is done with it.
"""

import contextlib
import json
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from mrmae.common.files import explained, publish
from mrmae.common.progress import PLAIN_LINE_SECONDS, counted, human_time

BOARD, WANDB = "TensorBoard", "Weights & Biases"
T = TypeVar("T")


class Readback:
    """Brings one small vector per step to the host, in order, without making the device wait."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, step: int, values: Tensor) -> None:
        """Start the copy of `values` (1-D, on the device)."""
        if not values.is_cuda:
            self._pending.append((step, values.detach().clone(), None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.detach(), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((step, host, event))

    def ready(self, *, wait: bool = False) -> list[tuple[int, list[float]]]:
        """The vectors that have arrived since the last call; all of them with `wait`."""
        arrived = []
        while self._pending:
            step, host, event = self._pending[0]
            if event is not None and not event.query():  # type: ignore[no-untyped-call]
                if not wait:
                    break
                event.synchronize()
            self._pending.popleft()
            arrived.append((step, [float(v) for v in host.tolist()]))
        return arrived


@dataclass
class Sums:
    """Running sums of named values; steps that were skipped count apart and not in the means."""

    n: int = 0
    skipped: int = 0
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, float], *, skipped: bool) -> None:
        """Take one step's values in."""
        if skipped:
            self.skipped += 1
            return
        self.n += 1
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The mean of every value; NaN where no step counted."""
        return {name: total / self.n for name, total in self.totals.items()} if self.n else {"loss": math.nan}

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {"n": self.n, "skipped": self.skipped, "totals": dict(self.totals)}


def progress_line(row: Mapping[str, Any]) -> str:
    """One readable line of a log row: where, losses per term since the row before, speed, stall, learning rate, ETA."""
    skipped = f"  {row['skipped']} skipped" if row.get("skipped") else ""
    return (
        f"epoch {row['epoch']}/{row['epochs']} update {row['step']}  loss {_losses(row['loss'], row['terms'])}"
        f"  {row['images_per_s']:.4g} img/s  stall {100 * row['stall']:.1f} %  lr {row['lr']:.2e}{skipped}"
        f"  ETA {human_time(row['eta_s'])}"
    )


def epoch_line(row: Mapping[str, Any]) -> str:
    """One readable line of an epoch's row: its mean losses and what they explain, those of images held out, k-NN accuracy, RankMe."""
    aside = dict(row.get("held_out", {}))
    held = f"  held out {_losses(aside.pop('loss'), aside)}" if aside else ""
    knn = f"  {knn_words(row)}" if "knn_top1" in row else ""
    rank = f"  {rank_words(row)}" if "rankme" in row else ""
    resumed = f"  (continued after update {', '.join(map(str, row['resumed']))})" if row.get("resumed") else ""
    beyond = "".join(
        f"  explained beyond {kind.replace('_', ' ')} {', '.join(f'{name} {_percent(x)}' for name, x in shares.items())}"
        for kind, shares in row.get("explained", {}).items()
    )
    return f"epoch {row['epoch']}/{row['epochs']} done  mean loss {_losses(row['loss'], row['terms'])}{beyond}{held}{knn}{rank}{resumed}"


def knn_words(row: Mapping[str, Any]) -> str:
    """An epoch's k-NN accuracy with its k and its images."""
    of = row["knn"]
    return (
        f"{of['k']}-NN top-1 {100 * row['knn_top1']:.1f} % of {counted(of['queries'], 'image')} held out, by the labels of"
        f" {of['bank']:,} trained on"
    )


def rank_words(row: Mapping[str, Any]) -> str:
    """An epoch's RankMe with the images and the highest value that it can have."""
    of = row["rank"]
    return f"RankMe {row['rankme']:.1f} of at most {min(of.values())} on {counted(of['images'], 'image')} trained on"


def _losses(loss: float | None, terms: Mapping[str, float]) -> str:
    """`1.5000 (mimic/clip 0.5000, pixels 1.0000)`."""
    return f"{_short(loss)} ({', '.join(f'{name} {_short(value)}' for name, value in terms.items())})"


def _percent(share: float | None) -> str:
    return "nan" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def _short(value: float | None) -> str:
    return "nan" if value is None or not math.isfinite(value) else f"{value:.4f}"


def read_rows(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a log file, of one kind or all; a line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if kind is None or row.get("kind") == kind:
            rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """OUT/log.jsonl, OUT/tensorboard, Weights & Biases and the terminal, for one process of a run.

    step: the update the run continues from; rows of later updates (written before a kill) are dropped, so that the log
    reads as one run. wandb: the project to log to; ValueError where wandb is not installed.
    """

    def __init__(
        self,
        out: Path,
        *,
        step: int,
        total: int,
        console: Console | None = None,
        tensorboard: bool = True,
        wandb: str | None = None,
    ) -> None:
        if wandb:
            _check_wandb(wandb)  # first: it may refuse
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._failed: set[str] = set()
        self.path = out / "log.jsonl"
        rows = read_rows(self.path)
        kept = [row for row in rows if row.get("step", 0) <= step]
        publish(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode(), replace=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._board = self.attempt(BOARD, lambda: _board(out / "tensorboard", step)) if tensorboard else None
        self._wandb = self.attempt(WANDB, lambda: _start_wandb(wandb, out)) if wandb else None
        self._bar: Progress | None = None
        self._line_at = self._epoch_at = -math.inf
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("starting", total=total, completed=step)
            self._bar.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row to the log and its numbers to TensorBoard and Weights & Biases. OSError where the log cannot be written."""
        try:
            self._file.write(json.dumps(_finite(dict(row)), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise explained(error, self.path) from error
        values = {f"{row['kind']}/{name}": value for name, value in _scalars(row)}
        board, wandb = self._board, self._wandb
        if board is not None:
            self.attempt(BOARD, lambda: _add_scalars(board, values, row["step"]))
        if wandb is not None:
            self.attempt(WANDB, lambda: wandb.log(values, step=row["step"]))

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What `work` returns; None, and one warning per `what`, where it fails: a run never stops for a picture or a board."""
        try:
            return work()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
                warn(self.console, f"{what}: failed ({reason}); the run goes on without it, and this is said once")
        return None

    def show(self, row: Mapping[str, Any], *, always: bool = False) -> None:
        """Put the row on the progress bar, or, off a terminal, print it as a line every ten seconds at most."""
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=progress_line(row))
        elif always or time.monotonic() - self._line_at >= PLAIN_LINE_SECONDS:
            self._line_at = time.monotonic()
            self.say(progress_line(row))

    def show_epoch(self, row: Mapping[str, Any]) -> None:
        """Print an epoch's line: of the last one and where images were held out always, else every ten seconds at most."""
        due = time.monotonic() - self._epoch_at >= PLAIN_LINE_SECONDS
        if due or "held_out" in row or row["epoch"] == row["epochs"]:
            self._epoch_at = time.monotonic()
            self.say(epoch_line(row))

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        self.console.print(line, markup=False)

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
        board, wandb, self._board, self._wandb = self._board, self._wandb, None, None
        if board is not None:
            self.attempt(BOARD, board.close)
        if wandb is not None:
            self.attempt(WANDB, wandb.finish)
        with contextlib.suppress(OSError):  # every row was flushed, or its error raised
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def warn(console: Console, text: str) -> None:
    """Print one line that should not be overlooked."""
    console.print(f"WARNING {text}", markup=False, style="bold red")


def _add_scalars(board: Any, values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        board.add_scalar(name, value, step)


def _board(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # a second of imports, wanted by runs only

    return SummaryWriter(str(folder), purge_step=step + 1)


def _check_wandb(project: str) -> None:
    """Raise ValueError where wandb is missing."""
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]  # noqa: F401 (an optional extra: pip install 'mrmae[wandb]')
    except ImportError:
        raise ValueError(
            f"--wandb {project}: the package wandb is not installed; it was expected; pip install 'mrmae[wandb]', or leave it out"
        ) from None


def _start_wandb(project: str, out: Path) -> Any:
    """The run of this OUT at Weights & Biases, continued where there is one."""
    import wandb

    mark = out / "wandb" / "id"  # a new OUT is a new run there, the same OUT the same one
    if not mark.exists():
        publish(mark, uuid.uuid4().hex.encode(), replace=True)
    facts = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    config = {name: facts[name] for name in ("recipe", "student", "images", "teachers", "cache_ids") if name in facts}
    return wandb.init(project=project, name=out.name, id=mark.read_text(), resume="allow", dir=str(out), config=config)


def _scalars(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    pairs = [(name, value) for name, value in row.items() if isinstance(value, float) and name != "time"]
    pairs += [(f"loss/{name}", value) for name, value in row.get("terms", {}).items()]
    for kind, shares in row.get("explained", {}).items():
        pairs += [(f"explained_beyond_{kind}/{name}", value) for name, value in shares.items()]
    pairs += [(f"held_out/{name}", value) for name, value in row.get("held_out", {}).items()]
    pairs += [("resumed_after_update", float(row["resumed"][-1]))] if row.get("resumed") else []
    return [(name, value) for name, value in pairs if math.isfinite(value)]
