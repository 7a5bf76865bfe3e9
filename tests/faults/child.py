"""A verb in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# Before conftest, whose import hook would check every tensor's shape in what users run without.
import videorepa.align.terms
import videorepa.backbones.cogvideox
import videorepa.cli
import videorepa.encoders.headed
import videorepa.encoders.videomae
import videorepa.export
import videorepa.lab.study.arms
import videorepa.probe
import videorepa.report
import videorepa.scan
import videorepa.train

# What verbs import when they need it, so that they are at work as soon as they are forked.
import peft  # noqa: F401  # isort: skip
import skimage.registration  # noqa: F401  # isort: skip
import sklearn.linear_model  # noqa: F401  # isort: skip
from diffusers import (  # noqa: F401  # isort: skip
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5EncoderModel, T5Tokenizer, VideoMAEModel  # noqa: F401  # isort: skip

PATIENCE = 60.0
"""Seconds until a verb on a tiny input counts as hung."""
PATIENCE_WITH_PROCESSES = 240.0
"""Likewise for verbs that start Python anew or run other verbs, on a busy machine."""
MEMORY_GB = 6.0
"""Address space that a verb may add to that of the campaign's process."""
TRACEBACK = "Traceback (most recent call last)"
HANGS = "Timeout (0:"
"""What faulthandler begins with."""


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: minus the signal's number where one ended it."""

    code: int
    out: str
    said: str
    seconds: float
    hung: bool = False

    @property
    def fault(self) -> str | None:
        """What is wrong with such an end, in a line that alike faults share; None if nothing is."""
        if self.hung:
            return f"hang: {_place(self.said)}"
        if TRACEBACK in self.said:
            last = self.said.rstrip().splitlines()[-1]
            return f"traceback: {_place(self.said)}: {last[:160]}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.code == 1 and "error: " not in self.said:
            return "exit code 1 without an error"
        return None


def _place(said: str) -> str:
    """The innermost line of the project that a traceback, or faulthandler's listing, names."""
    found = re.findall(r'File "[^"]*?/(videorepa/[^"]+)", line (\d+)', said)
    if not found:
        return "outside the project"
    latest_first = TRACEBACK not in said
    file, line = found[0 if latest_first else -1]
    return f"{file}:{line}"


class Child:
    """A running verb, the leader of a process group. Its output goes to `log`.out and `log`.err."""

    def __init__(self, arguments: list[str], folder: Path, log: Path, patience: float) -> None:
        self.log, self.began, self.patience = log, time.monotonic(), patience
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).touch()  # It may be killed before it does anything.
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_verb(arguments, folder, log, patience)
        self.ended: Ended | None = None

    def poll(self) -> Ended | None:
        """How it ended; None while it runs. A process that runs for too long is killed."""
        if self.ended is None:
            late = time.monotonic() - self.began > self.patience + 5
            if late:
                os.killpg(self.pid, signal.SIGKILL)
            pid, status = os.waitpid(self.pid, 0 if late else os.WNOHANG)
            if pid:
                out, said = (
                    self.log.with_suffix(suffix).read_text("utf-8", "replace")
                    for suffix in (".out", ".err")
                )
                seconds = time.monotonic() - self.began
                code = os.waitstatus_to_exitcode(status)
                self.ended = Ended(code, out, said, seconds, late or HANGS in said)
        return self.ended

    def wait(self) -> Ended:
        while (ended := self.poll()) is None:
            time.sleep(0.005)
        return ended

    def stop(self, after: float, how: signal.Signals) -> Ended:
        """Send a signal after so many seconds, and wait for the end."""
        while time.monotonic() - self.began < after and self.poll() is None:
            time.sleep(0.002)
        if self.poll() is None:
            os.kill(self.pid, how)
        return self.wait()


def run(arguments: list[str], folder: Path, log: Path, patience: float | None = None) -> Ended:
    """Run a verb to its end."""
    if patience is None:
        starts_others = arguments[0] in ("export", "verify", "demo", "lab")
        patience = PATIENCE_WITH_PROCESSES if starts_others else PATIENCE
    return Child(arguments, folder, log, patience).wait()


def _be_the_verb(arguments: list[str], folder: Path, log: Path, patience: float) -> None:
    """What the forked process does; it never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        gc.callbacks.clear()  # In hypothesis's, what a signal raises is dropped.
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, suffix in ((1, ".out"), (2, ".err")):
            file = os.open(log.with_suffix(suffix), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(file, number)
        # As Python makes them; under pytest they are pytest's own.
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(MEMORY_GB * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.enable()
        # Says where it hangs, and ends it even when the campaign has gone.
        faulthandler.dump_traceback_later(patience, exit=True)
        code = videorepa.cli.main(arguments)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
