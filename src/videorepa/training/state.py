"""The state of a training: student, optimiser, averaged weights and learning rate."""

from __future__ import annotations

import math

from torch import Tensor

from videorepa.artifacts.checkpoint import Checkpoint, copy_into
from videorepa.recipe import Recipe
from videorepa.settings.sections import Optim
from videorepa.training.context import share_tokens
from videorepa.training.memory import make_optimizer
from videorepa.training.parallel import Alone
from videorepa.training.student import Student


def schedule(optim: Optim, step: int) -> float:
    """Give the learning rate's factor at a step, 0 to 1: linear warm-up, then `optim.schedule`."""
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

    Args:
      recipe: Describes the training.
      workers: The processes that share it.
      student: With the base model's weights; its parameters can become shards.
    """

    def __init__(self, recipe: Recipe, workers: Alone, student: Student) -> None:
        self.recipe, self.workers, self.student = recipe, workers, student
        share_tokens(student, workers)
        parameters = [*student.trained.values(), *student.terms.parameters()]
        optimizer = make_optimizer(recipe, parameters, workers.device)
        # From here on, parameters can be shards.
        self.model = workers.share(student, optimizer, student.sharing())
        self.optimizer = optimizer
        self.trained = student.trained
        self.ema: dict[str, Tensor] | None = None
        if recipe.train.ema is not None:
            self.ema = {key: value.detach().clone() for key, value in self.trained.items()}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises UserError if it is of another model."""
        terms, held_as = self.student.terms, self.workers.sharded_like
        copy_into(checkpoint.trained, self.trained, held_as)
        copy_into(checkpoint.projector, terms.state_dict(), held_as)
        terms.load_stopping_state(checkpoint.stopping)
        if self.ema is not None:
            copy_into(checkpoint.ema or {}, self.ema, held_as)
        self.workers.load_optimizer_state(self.optimizer, checkpoint.optimizer)

    def clip_gradients(self) -> Tensor:
        """Scale gradients to the recipe's largest norm, and return the norm before that."""
        limit = self.recipe.optim.max_grad_norm
        together, apart = self.student.terms.clipped()
        for probe in apart:
            self.workers.clip_gradients(probe, limit)
        return self.workers.clip_gradients([*self.trained.values(), *together], limit)

    def update(self, rate: float) -> None:
        """Step with this learning rate, clear the gradients, and update the averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = self.recipe.train.ema
        if self.ema is not None and decay is not None:
            for key, value in self.trained.items():
                self.ema[key].lerp_(value.detach(), 1 - decay)

    def state(self, step: int) -> Checkpoint:
        """Gather the whole state on the first process. All processes call it."""
        collected = self.workers.collected
        return Checkpoint(
            step,
            collected(self.trained),
            collected(self.student.terms.state_dict()),
            self.workers.optimizer_state(self.optimizer),
            None if self.ema is None else collected(self.ema),
            self.student.terms.stopping_state(),
            self.recipe.optim.clips(self.workers.parts),
        )
