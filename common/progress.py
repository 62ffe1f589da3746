"""How long work says how far it is: a bar on a terminal, a line every ten seconds elsewhere; rate, bytes, ETA."""

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

PLAIN_LINE_SECONDS = 10.0
RATE_WINDOW_SECONDS = 60.0  # a rate over the last minute follows a disk that slows down, and forgets the warm-up


def human_time(seconds: float) -> str:
    """`seconds` as a reader says them: '45 s', '3 min 20 s', '5 h 02 min', '2 d 03 h'; '?' for none."""
    if not math.isfinite(seconds):
        return "?"
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86_400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86_400} d {s % 86_400 // 3600:02d} h"


def counted(n: float, one: str, many: str = "") -> str:
    """`n` things: '1 epoch', '1,600 epochs'. one, many: the words (many: one with an s)."""
    return f"{n:,.9g} {one if n == 1 else many or one + 's'}"


def human_bytes(n: float) -> str:
    """`n` bytes in decimal units, three significant digits: '301 kB', '1.29 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.0f} B" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


class Pace:
    """How long things of several kinds take, from the recent past, through all stages of a run.

    The first things of a kind pay for its start: they count only as long as there are no others.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}  # by kind: seconds each
        self._seen: dict[str, list[tuple[float, int]]] = {}  # by kind: (seconds, things) so far, without the first

    def add(self, kind: str, n: int, seconds: float) -> None:
        """`n` things of this kind took so long."""
        if kind not in self._seen:
            self._first[kind], self._seen[kind] = seconds / n, [(0.0, 0)]
            return
        marks = self._seen[kind]
        marks.append((marks[-1][0] + seconds, marks[-1][1] + n))
        recent = marks[-1][0] - max(RATE_WINDOW_SECONDS, marks[-1][0] / 2)
        while len(marks) > 2 and marks[1][0] < recent:
            marks.pop(0)

    def seconds_each(self, kind: str) -> float:
        """Seconds per thing; 0 for a kind that was not seen yet."""
        marks = self._seen.get(kind, [(0.0, 0)])
        n = marks[-1][1] - marks[0][1]
        return (marks[-1][0] - marks[0][0]) / n if n else self._first.get(kind, 0.0)

    def seconds_left(self, left: Mapping[str, int]) -> float:
        """How long these many things will take; infinite as long as nothing is known."""
        if not self._seen:
            return math.inf
        return sum(n * self.seconds_each(kind) for kind, n in left.items() if n > 0)


class Progress:
    """Counts `total` things called `unit`; use it as a context manager, call `add` as they are done.

    left: how often each kind of work has still to be done until the run ends, in later stages too; with it, `spent` tells what
    was, and the ETA is that of the run. pace: what is known of kinds from stages before.
    """

    def __init__(
        self, what: str, total: int, unit: str = "images", *, console: Console | None = None,
        left: Mapping[str, int] | None = None, pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self.what, self.total, self.unit = what, total, unit
        self.plain = left is None  # one kind of work, timed from one `add` to the next
        self.left, self.pace = dict(left or {unit: total}), pace or Pace()
        self.done = 0
        self.bytes = 0
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=self.console) if self.console.is_terminal else None
        self._marks = [(time.monotonic(), 0)]  # (time, done), at most the last minute's
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self.total:
            self.console.print(f"{self.what} {self.line()}")

    def spent(self, kind: str, n: int, seconds: float) -> None:
        """`n` times this kind of work is done and took so long."""
        if n:
            self.left[kind] -= n
            self.pace.add(kind, n, seconds)

    def add(self, n: int = 1, *, bytes: int = 0) -> None:
        """`n` more are done, `bytes` more were written."""
        self.done += n
        self.bytes += bytes
        now = time.monotonic()
        if n:
            if self.plain:
                self.spent(self.unit, n, now - self._marks[-1][0])
            self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] < now - RATE_WINDOW_SECONDS:
            self._marks.pop(0)
        if self._bar:
            self._bar.update(self._task, completed=self.done, description=self.rates())
        elif now - self._said >= PLAIN_LINE_SECONDS:
            self._said = now
            self.console.print(f"{self.what} {self.line()}")

    def rate(self) -> float:
        """Things per second over the last minute."""
        (t0, n0), (t1, n1) = self._marks[0], self._marks[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def rates(self) -> str:
        """Rate, bytes so far and ETA."""
        written = f"  {human_bytes(self.bytes)}" if self.bytes else ""
        return f"{self.rate():.3g} {self.unit}/s{written}  ETA {human_time(self.pace.seconds_left(self.left))}"

    def line(self) -> str:
        """One plain line: how many of how many, and the rates."""
        return f"{self.done}/{self.total} {self.unit}  {self.rates()}"
