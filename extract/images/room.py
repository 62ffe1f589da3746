"""Room in memory that the threads of a process share: who wants much waits until others are done."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class Room:
    """So many bytes, taken in the order of asking. Who asks for more than there are gets all of them, alone."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = self.free_bytes = size_bytes
        self._queue: deque[object] = (
            deque()
        )  # first come, first served: a large wish is not passed by small ones for ever
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, n_bytes: int) -> Iterator[None]:
        """Inside, `n_bytes` of the room are taken. Never inside another `taken` of the same room: both might wait."""
        n_bytes, place = min(n_bytes, self.size_bytes), object()
        with self._changed:
            self._queue.append(place)
            try:
                self._changed.wait_for(lambda: self._queue[0] is place and self.free_bytes >= n_bytes)
                self.free_bytes -= n_bytes
            finally:  # also when a signal ends the wait
                self._queue.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.free_bytes += n_bytes
                self._changed.notify_all()
