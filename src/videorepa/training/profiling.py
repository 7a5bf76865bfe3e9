"""Profiles the first steps of a training into its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from videorepa.artifacts.run import Run
from videorepa.errors import UserError
from videorepa.system.files import atomic_path
from videorepa.system.progress import console


def check_profiled(count: int, steps: range) -> None:
    """Raise UserError unless a training that does these steps can profile `count` of them."""
    if count < 0 or (count and len(steps) <= count):
        raise UserError(
            f"--profile {count} asks for {count} steps after one that warms up, and the training "
            f"has {len(steps)} left. Profile from 1 to {max(1, len(steps) - 1)}, or raise "
            "optim.steps."
        )


@contextmanager
def profiled(run: Run, count: int, steps: range) -> Iterator[Callable[[], None]]:
    """Profile `count` steps with torch.profiler, after one that warms up.

    When they are over, or the training ends before, the trace is written into the run's folder.

    Args:
      run: Gets the trace.
      count: How many steps to profile; 0 profiles none.
      steps: The steps that the training will do, from 0.

    Yields:
      A function to call at the end of each step.
    """
    if not count:
        yield lambda: None
        return
    from torch import profiler

    # The steps as the log counts them, from 1.
    first, last = steps.start + 2, steps.start + 1 + count

    def write(recorded: profiler.profile) -> None:
        path = run.path / f"profile-{first}-{last}.json.gz"
        with atomic_path(path) as temporary:
            recorded.export_chrome_trace(str(temporary))
        console.print(f"{path} has the trace from step {first} on. Open it at ui.perfetto.dev.")

    plan = profiler.schedule(wait=0, warmup=1, active=count, repeat=1)
    with profiler.profile(schedule=plan, on_trace_ready=write, record_shapes=True) as recorder:
        yield recorder.step
