"""Work in background threads: results ahead of their use, in order, and writes behind.

They are threads and not processes, so that none can be killed alone and leave the others waiting,
and what they read need not be copied. Decoding, scaling and writing release Python's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 5.0
"""Seconds that work which nobody wants any more gets to end before it is left alone."""


class _Workers:
    """Threads that take work in its order. They do not keep a process alive that wants to end."""

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._serve, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del future, work, task  # Results are large.

    def submit(self, work: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        self._tasks.put((future, work))
        return future

    def close(self, unwanted: Iterable[Future[Any]] = ()) -> None:
        """Let the threads end, after what they have begun; drop what they have not."""
        begun = [future for future in unwanted if not future.cancel()]
        for _ in self._threads:
            self._tasks.put(None)
        wait(begun, PATIENCE)


def ahead(work: Callable[[T], R], items: Iterable[T], threads: int, most: int) -> Generator[R]:
    """Do `work` on items in threads, and yield the results in the order of the items.

    An error of `work` is raised in its item's place. A caller that stops early waits a few seconds
    at most for what has begun.

    Args:
      work: Is called with each item, in any thread.
      items: Are taken when there is room.
      threads: How many items are worked on at a time.
      most: How many results may be there or in the making, which bounds the memory.
    """
    workers, coming = _Workers(threads, "ahead"), deque[Future[R]]()
    try:
        for item in items:
            coming.append(workers.submit(lambda item=item: work(item)))
            if len(coming) >= most:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        workers.close(coming)


@contextmanager
def behind(most: int) -> Iterator[Callable[..., None]]:
    """Give a function that calls another one later, in a thread, in the order of the calls.

    The first error of a call is raised by the next `later`, or at the end of the `with` block, and
    no further call is made. At its end the block waits for all calls; if it fails itself, it waits
    a few seconds for the one that has begun, and drops the others.

    Args:
      most: How many calls may wait, which bounds the memory of their arguments.
    """
    workers, waiting = _Workers(1, "behind"), deque[Future[None]]()
    failed = False

    def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        nonlocal failed
        if failed:
            return
        try:
            function(*arguments)
        except BaseException:
            failed = True
            raise

    def later(function: Callable[..., Any], *arguments: Any) -> None:
        while len(waiting) >= most or (waiting and waiting[0].done()):
            waiting.popleft().result()
        waiting.append(workers.submit(lambda: call(function, arguments)))

    try:
        yield later
        while waiting:
            waiting.popleft().result()
    finally:
        workers.close(waiting)
