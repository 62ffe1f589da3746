import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mrmae.extract.images.room import Room


def test_threads_never_hold_more_than_there_is_and_all_of_them_come_in() -> None:
    room, held, most, lock = Room(10), 0, 0, threading.Lock()

    def work(n: int) -> None:
        nonlocal held, most
        with room.taken(n):
            with lock:
                held += min(n, 10)
                most = max(most, held)
            time.sleep(0.002)
            with lock:
                held -= min(n, 10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 4, 100, 1, 7, 10, 2] * 8, timeout=60))  # 100: more than there is, so alone
    assert most == 10 and room.free_bytes == 10


def test_a_large_wish_is_not_passed_by_small_ones() -> None:
    room, came = Room(10), list[str]()

    def work(name: str, n: int) -> None:
        with room.taken(n):
            came.append(name)

    with room.taken(5):
        threads = []
        for name, n in (("large", 9), ("small", 1)):
            threads.append(threading.Thread(target=work, args=(name, n)))
            threads[-1].start()
            while len(room._queue) < len(threads):
                time.sleep(0.001)
    for thread in threads:
        thread.join(60)
    assert came == ["large", "small"]


def test_what_fails_inside_and_who_stops_waiting_give_the_room_back() -> None:
    room = Room(10)
    with pytest.raises(KeyError), room.taken(10):
        raise KeyError
    with pytest.raises(TypeError):
        with room.taken("ten"):  # type: ignore[arg-type]
            pass
    with room.taken(10):
        pass
    assert room.free_bytes == 10
