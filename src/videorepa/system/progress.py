"""Progress bars with the time left, or plain lines if the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

console = Console(stderr=True, markup=False, highlight=False)
"""Prints messages as they are. They quote paths and captions, whose brackets are no markup."""

PLAIN_FIRST_SECONDS, PLAIN_EVERY_SECONDS = 1.0, 10.0
"""When plain lines are written: after so long, then every so often, and at the end."""


def track(
    items: Iterable[T], what: str, total: int | None = None, done: int = 0, shown: bool = True
) -> Iterator[T]:
    """Yield the items and show the progress.

    Args:
      items: The work that is left.
      what: The name of the work.
      total: Number of all items, with those that are done already; by default the length of `items`
        plus `done`.
      done: Number of items that an earlier call has finished.
      shown: False if another process shows the progress.
    """
    if not shown:
        yield from items
        return
    if total is None:
        total = (len(items) if isinstance(items, Sized) else 0) + done
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done)
            for item in items:
                yield item
                bar.advance(task)
        return
    start = time.monotonic()
    due = start + PLAIN_FIRST_SECONDS
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now > due or done + count == total:
            left = (now - start) / count * (total - done - count)
            print(f"{what}: {done + count}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)
            due = now + PLAIN_EVERY_SECONDS
