"""Lets signals end a process in good order: SIGTERM as Ctrl-C does, and both where nothing is lost.

A batch system such as Slurm sends SIGTERM some seconds before it kills.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NOTICE = b"\nStopping after this step, with a checkpoint. Ctrl-C stops at once.\n"

AGAIN_SECONDS = 0.05
"""After how long a signal is sent again whose interrupt was dropped."""


class Terminated(KeyboardInterrupt):
    """SIGTERM asks the process to end."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C inside the `with` block, and Terminated for SIGTERM.

    If the code where it is raised makes another exception of it, as compiled code that calls Python
    does, the block ends with the interrupt none the less. Where Python drops exceptions, as while
    it frees an object, the signal comes once more a moment later.
    """
    request = StopRequest()

    def stop(number: int, _: FrameType | None) -> None:
        request.interrupt = _interrupt(number)
        raise request.interrupt

    with _handled(stop, signal.SIGINT, signal.SIGTERM), _sent_again(request):
        try:
            yield
        except Exception as error:
            if request.interrupt is None:
                raise
            raise request.interrupt from error


@contextmanager
def _sent_again(request: StopRequest) -> Iterator[None]:
    """Send the signal of an interrupt again that Python dropped."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if request.interrupt is None or dropped.exc_value is not request.interrupt:
            before(dropped)
            return
        is_term = isinstance(request.interrupt, Terminated)
        number = signal.SIGTERM if is_term else signal.SIGINT
        # By a thread, since it would be dropped again from here.
        later = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
        later.daemon = True
        later.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


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
      shown: False if nothing is to be said of it here.
    """
    request = StopRequest()

    def note(number: int, _: FrameType | None) -> None:
        if request.interrupt is not None:
            if number == signal.SIGTERM:
                return
            raise request.interrupt
        request.interrupt = _interrupt(number)
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
