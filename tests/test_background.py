"""Work ahead and behind: the order stays, errors come through, and nothing waits for ever."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from videorepa.system import background
from videorepa.system.background import ahead, behind


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def wait_for_none(prefix: str) -> None:
    until = time.monotonic() + 5
    while any(name.startswith(prefix) for name in names()):
        assert time.monotonic() < until, names()
        time.sleep(0.005)


def test_results_come_in_order_from_several_threads_and_not_too_far_ahead() -> None:
    taken, done, at_once = [], [], set()

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        at_once.add(threading.current_thread().name)
        time.sleep(0.004 * (number % 3))
        return number * number

    for result in ahead(work, items(), threads=3, most=5):
        done.append(result)
        assert len(taken) - len(done) < 5
    assert done == [number * number for number in range(20)]
    assert len(at_once) == 3
    wait_for_none("ahead")


def test_an_error_is_raised_in_its_place_and_ends_the_threads() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise OSError(errno.EIO, "the disk is gone")
        return number

    done = []
    with pytest.raises(OSError, match="the disk is gone"):
        done.extend(ahead(work, range(10), threads=2, most=4))
    wait_for_none("ahead")
    results = ahead(work, range(10), threads=2, most=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()
    wait_for_none("ahead")


def test_who_stops_early_does_not_wait_for_a_reader_that_hangs(monkeypatch) -> None:
    monkeypatch.setattr(background, "PATIENCE", 0.05)
    hanging = threading.Event()

    def work(number: int) -> int:
        if number:
            hanging.wait()
        return number

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in ahead(work, range(9), threads=2, most=4):
            raise KeyboardInterrupt
    assert time.monotonic() - begun < 2
    hanging.set()
    wait_for_none("ahead")


def test_calls_are_made_in_order_while_others_go_on() -> None:
    made: list[int] = []
    go = threading.Event()
    with behind(most=3) as later:
        later(go.wait)
        later(made.append, 1)
        later(made.append, 2)
        assert made == []
        threading.Timer(0.02, go.set).start()
        later(made.append, 3)  # Waits for room.
        assert go.is_set()
    assert made == [1, 2, 3]
    wait_for_none("behind")


@pytest.mark.parametrize("calls_after", [0, 1, 20])
def test_a_failed_write_is_raised_and_nothing_is_written_after_it(calls_after: int) -> None:
    made: list[int] = []

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), behind(most=3) as later:
        later(made.append, 0)
        later(full)
        for number in range(calls_after):
            later(made.append, 1 + number)
    assert made == [0]
    wait_for_none("behind")


def test_a_block_that_fails_drops_what_has_not_begun() -> None:
    made: list[int] = []
    go = threading.Event()

    def slow() -> None:
        go.wait()
        made.append(0)

    with pytest.raises(KeyboardInterrupt), behind(most=5) as later:
        later(slow)
        later(made.append, 1)
        threading.Timer(0.05, go.set).start()
        time.sleep(0.01)
        raise KeyboardInterrupt
    wait_for_none("behind")
    assert made == [0]
