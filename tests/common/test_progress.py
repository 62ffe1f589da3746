"""How long a run will still take: from what was done in the last minute, on a terminal and off it."""

import io

import pytest
from rich.console import Console

from mrmae.common.progress import Progress, bytes_in


class Clock:
    """A console's clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def console_of(clock: Clock, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), get_time=clock, force_terminal=terminal, width=200)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_time_left_follows_the_last_minute(terminal: bool) -> None:
    clock = Clock()
    with Progress("writing", 1000, console=console_of(clock, terminal)) as progress:
        assert "ETA ?" in progress.line()
        for seconds in [1.0] * 100 + [3.0] * 100:
            clock.now += seconds
            progress.add()
        assert progress.seconds_left() == pytest.approx(800 * 3.0)
        assert progress.line() == "200/1000 images  0.333 images/s  ETA 40 min 00 s"


def test_what_was_found_done_says_nothing_of_how_fast_it_goes() -> None:
    clock = Clock()
    with Progress("extracting", 1000, console=console_of(clock)) as progress:
        clock.now += 1.0
        progress.add(0, already=800)
        for _ in range(10):
            clock.now += 2.0
            progress.add(2, already=3)
        assert progress.rate() == pytest.approx(1.0) and progress.seconds_left() == pytest.approx(150.0)


def test_things_slower_than_a_minute_are_timed_since_the_beginning() -> None:
    clock = Clock()
    with Progress("fine-tuning", 10, "epochs", console=console_of(clock)) as progress:
        for done in range(1, 4):
            clock.now += 100.0
            progress.add()
            assert progress.seconds_left() == pytest.approx(100.0 * (10 - done))


def test_off_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end() -> None:
    clock = Clock()
    console = console_of(clock)
    with Progress("hashing", 40, console=console) as progress:
        for _ in range(40):
            clock.now += 0.5
            progress.add(bytes=1000)
    assert text_of(console).splitlines() == [
        "hashing 20/40 images  2 images/s  20 kB  ETA 10 s",
        "hashing 40/40 images  2 images/s  40 kB  ETA 0 s",
        "hashing 40/40 images  2 images/s  40 kB  ETA 0 s",
    ]


def test_nothing_to_do_is_not_spoken_of() -> None:
    console = console_of(Clock())
    with Progress("hashing", 0, console=console):
        pass
    assert text_of(console) == ""


def test_where_all_was_found_done_no_rate_is_told() -> None:
    console = console_of(Clock())
    with Progress("extracting", 10, console=console) as progress:
        progress.add(0, already=10)
    assert text_of(console) == "extracting 10/10 images  ETA 0 s\n"


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"200GB": 200e9, "1.5 tb": 1.5e12, "512MiB": 512 << 20, "2k": 2000, " 1e9 ": 1e9, "7": 7, 12: 12}
    assert {text: bytes_in(text) for text in sizes} == sizes  # type: ignore[arg-type]
    for text in ("", "0", "much", "-5GB", "5 apples", "1e999", "1.2.3"):
        with pytest.raises(ValueError, match="is no number of bytes; one like 200GB"):
            bytes_in(text)
