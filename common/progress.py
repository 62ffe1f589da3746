"""How long work says how far it is: a bar on a terminal, a line every ten seconds elsewhere; rate, bytes, ETA."""

import math
import re
import threading
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


def bytes_in(text: str | int) -> int:
    """How many bytes `text` says: '200GB', '1.5 TB', '512 MiB', '1e9'. ValueError for what is none, or not above 0."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(?:([kMGT]?)(i?)B?)", str(text).strip(), re.IGNORECASE)
    try:
        assert found
        n = int(
            float(found[1]) * (1024 if found[3] else 1000) ** ("kmgt".find(found[2].lower()) + 1 if found[2] else 0)
        )
        assert n > 0
    except (AssertionError, ValueError, OverflowError):
        raise ValueError(
            f"{text!r}: is no number of bytes; one like 200GB, 1.5TB, 512MiB or 1000000 was expected"
        ) from None
    return n


class Progress:
    """Counts `total` things called `unit`; use it as a context manager, call `add` as they are done.

    What is left, and how fast it goes, is rich's own estimate, on a terminal and off it. quiet: nothing is shown.
    """

    def __init__(
        self, what: str, total: int, unit: str = "images", *, console: Console | None = None, quiet: bool = False
    ) -> None:
        self.what, self.unit, self.bytes = what, unit, 0
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        columns = (TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=self.console, speed_estimate_period=RATE_WINDOW_SECONDS,
                        disable=not self.console.is_terminal)  # fmt: skip
        self._bar.add_task("", total=total)
        (self._task,) = self._bar.tasks
        self._already, self._counting = 0, threading.Lock()
        self._said = self._bar.get_time()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._bar.disable and kind is None and self._task.total:
            self.console.print(f"{self.what} {self.line()}")

    def add(self, n: int = 1, *, already: int = 0, bytes: int = 0) -> None:
        """`n` more are done, `bytes` more were written, said by any thread. already: were found done, and say nothing of how fast it goes."""
        with self._counting:
            self.bytes += bytes
            self._already += already
            self._task.completed += already
            self._bar.update(self._task.id, advance=n)
            self._bar.update(self._task.id, description=self.rates().lstrip())
            if self._bar.disable and self._bar.get_time() - self._said >= PLAIN_LINE_SECONDS:
                self._said = self._bar.get_time()
                self.console.print(f"{self.what} {self.line()}")

    def left(self) -> float:
        """How many things are left to do."""
        return self._task.remaining or 0.0

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text, markup=False)

    def rate(self) -> float:
        """Things per second over the last minute; where fewer than two were done in it, since the beginning."""
        done, seconds = self._task.completed - self._already, self._task.elapsed or 0.0
        return self._task.speed or (done / seconds if seconds > 0 else 0.0)

    def seconds_left(self) -> float:
        """How long what is left will take at this rate; infinite as long as nothing is known."""
        left, rate = self.left(), self.rate()
        return left / rate if rate > 0 else 0.0 if left <= 0 else math.inf

    def rates(self) -> str:
        """Rate, bytes so far and ETA; no rate where nothing was done but what was found done."""
        written = f"  {human_bytes(self.bytes)}" if self.bytes else ""
        rate = f"  {self.rate():.3g} {self.unit}/s" if self.rate() else ""
        return f"{rate}{written}  ETA {human_time(self.seconds_left())}"

    def line(self) -> str:
        """One plain line: how many of how many, and the rates."""
        return f"{self._task.completed:.0f}/{self._task.total:.0f} {self.unit}{self.rates()}"
