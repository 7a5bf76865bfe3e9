"""Lets signals end a process in good order: SIGTERM as Ctrl-C does, and both where nothing is lost.

A batch system such as Slurm sends SIGTERM some seconds before it kills.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NOTICE = b"\nStopping after this step, with a checkpoint. Ctrl-C stops at once.\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM asks the process to end."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated where SIGTERM comes inside the `with` block."""

    def stop(*_: object) -> None:
        raise Terminated

    with _handled(stop, signal.SIGTERM):
        yield


class StopRequest:
    """Whether the process is asked to end.

    Attributes:
      interrupt: What to raise for it; None as long as nobody asks.
    """

    interrupt: KeyboardInterrupt | None = None


@contextmanager
def postponed(shown: bool = True) -> Iterator[StopRequest]:
    """Let Ctrl-C and SIGTERM wait until the `with` block ends, and raise their exception then.

    The block is to end soon when it sees the request. Ctrl-C is raised at once if it is the second
    signal. SIGTERM then changes nothing: Slurm sends it to all processes of a job, and a launcher
    such as torchrun passes on its own to those that it has started.

    Args:
      shown: False if another process says that a signal has come.
    """
    request = StopRequest()

    def note(number: int, _: FrameType | None) -> None:
        if request.interrupt is not None:
            if number == signal.SIGTERM:
                return
            raise request.interrupt
        request.interrupt = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if shown:
            os.write(2, _NOTICE)  # print could be interrupted in the middle of another print.

    with _handled(note, signal.SIGINT, signal.SIGTERM):
        yield request
    if request.interrupt is not None:
        raise request.interrupt


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *signals: int) -> Iterator[None]:
    """Handle signals inside the `with` block, except those that are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread gets signals.
        return
    before = {number: signal.getsignal(number) for number in signals}
    try:
        for number, old in before.items():
            if old is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
