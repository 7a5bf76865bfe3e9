"""The state of a training: student, optimiser, averaged weights and learning rate."""

from __future__ import annotations

import math

from torch import Tensor

from videorepa.artifacts.checkpoint import Checkpoint, copy_into
from videorepa.recipe import Recipe
from videorepa.settings.sections import Optim
from videorepa.training.memory import make_optimizer
from videorepa.training.parallel import Alone
from videorepa.training.student import Student


def schedule(optim: Optim, step: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then as the recipe says, to 0."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    if optim.schedule == "linear":
        return 1.0 - progress
    if optim.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * progress)
    return 1.0


class Training:
    """The student, shared by all processes, with its optimiser and the averages of its weights.

    found: the checkpoint to go on from.
    """

    def __init__(
        self, recipe: Recipe, workers: Alone, student: Student, found: Checkpoint | None
    ) -> None:
        self.recipe, self.workers, self.student = recipe, workers, student
        if found is not None:
            student.load(found)
        optimizer = make_optimizer(recipe, [*student.trained.values(), *student.terms.parameters()])
        # From here on parameters can be shares of what they were.
        self.model = workers.share(student, optimizer, student.block_classes())
        self.optimizer = optimizer
        self.trained = student.trained
        self.ema: dict[str, Tensor] | None = None
        if recipe.train.ema is not None:
            self.ema = {key: value.detach().clone() for key, value in self.trained.items()}
        if found is not None:
            self._take_up(found)

    def _take_up(self, found: Checkpoint) -> None:
        if self.ema is not None:
            wanted = {key: self.workers.whole(value) for key, value in self.ema.items()}
            copy_into(found.ema or {}, wanted)
            for key, value in wanted.items():
                self.ema[key].copy_(self.workers.sharded_like(value, self.ema[key]))
        self.workers.load_optimizer_state(self.optimizer, found.optimizer)

    def clip_gradients(self) -> Tensor:
        """Scale gradients to the recipe's norm; gives what it was."""
        limit = self.recipe.optim.max_grad_norm
        together, apart = self.student.terms.clipped()
        for probe in apart:
            self.workers.clip_gradients(probe, limit)
        return self.workers.clip_gradients([*self.trained.values(), *together], limit)

    def update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = self.recipe.train.ema
        if self.ema is not None and decay is not None:
            for key, value in self.trained.items():
                self.ema[key].lerp_(value.detach(), 1 - decay)

    def state(self, step: int) -> Checkpoint:
        """All of it, whole, on the first process; all of them have to ask."""
        collected = self.workers.collected
        return Checkpoint(
            step,
            collected(self.trained),
            collected(self.student.terms.state_dict()),
            self.workers.optimizer_state(self.optimizer),
            None if self.ema is None else collected(self.ema),
            self.student.terms.stopping_state(),
            self.recipe.optim.clips(self.workers.count),
        )
