"""Measures how fast a training is: seconds a step, clips a second, and the share of the device's
peak rate."""

from __future__ import annotations

import time

from videorepa.recipe import Recipe
from videorepa.system.device import compute_dtype, peak_rate
from videorepa.training.cost import predict
from videorepa.training.parallel import Alone


class Pace:
    """The pace of a training, from the moment that this is made.

    The share is the MFU (model FLOPs utilisation; PaLM, arXiv 2204.02311, appendix B). It counts
    what the losses and their gradients need, and not what activation checkpointing computes again.
    The operations are counted on shapes, by the formulas of torch's FlopCounterMode.

    Args:
      recipe: Describes the training.
      workers: The processes that share it.
      start: The number of steps that were done before.
    """

    def __init__(self, recipe: Recipe, workers: Alone, start: int) -> None:
        self._clips = recipe.optim.clips(workers.parts)
        self._start = start
        self._operations = 0.0
        given = recipe.speed.peak_tflops
        dtype = compute_dtype(recipe.train.precision, workers.device)
        self._peak = given * 1e12 if given else peak_rate(workers.device, dtype)
        if self._peak is not None:
            # What else `memory` says changes no operation that is needed.
            once = recipe.override("memory={}")
            whole = predict(once, workers.device).operations
            self._operations = whole / workers.context
        self._begun = self._step_begun = time.monotonic()

    def begin_step(self) -> None:
        """Begin to measure a step."""
        self._step_begun = time.monotonic()

    def of_step(self, done: int) -> dict[str, float]:
        """Give the values to log for the step that ends now, the `done`-th of the training."""
        now = time.monotonic()
        seconds = now - self._step_begun
        pace = {
            "step_seconds": seconds,
            "clips_per_second": (done - self._start) * self._clips / (now - self._begun),
        }
        if self._peak is not None:
            pace["mfu"] = self._operations / seconds / self._peak
        return pace
