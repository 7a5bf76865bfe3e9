"""The training loop of the lab's small models: every step is a function of its number, so that a
training which was stopped goes on as if it had not been."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.artifacts import checkpoint
from videorepa.artifacts.checkpoint import Checkpoint, copy_into
from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD
from videorepa.system.randomness import step_seed

CHECKPOINT_EVERY = 100

WARMUP_STEPS = 100


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: Callable[[float], float],
    folder: Path,
    seed: int,
    after: Callable[[int], None] = lambda step: None,
) -> float:
    """Minimise; returns the mean loss of the last 100 steps that were done here.

    module: all that a checkpoint has to hold. loss: of a step, counted from 0. rate: the learning
    rate at a progress from 0 to 1; the first WARMUP_STEPS go up to it. folder: of the checkpoints,
    from which the training goes on. after: what is to be done after a step.
    """
    found = checkpoint.newest(folder)
    start = 0
    if found is not None:
        start = found.step
        copy_into(found.trained, module.state_dict())
        optimizer.load_state_dict(found.optimizer)
    recent: list[float] = []
    begun = time.monotonic()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, steps):
        torch.manual_seed(step_seed(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps) * min(1.0, (step + 1) / WARMUP_STEPS)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        after(step)
        recent = [*recent[-99:], value.item()]
        done = step + 1
        if done % 50 == 0:
            pace = (time.monotonic() - begun) / (done - start)
            print(f"step {done} of {steps}  loss {np.mean(recent):.5f}  {pace:.2f} s", flush=True)
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            state = Checkpoint(done, module.state_dict(), {}, optimizer.state_dict())
            checkpoint.save(folder, state, keep=1)
    return float(np.mean(recent)) if recent else float("nan")


def normalised(frames: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Frames in [0, 1] as teachers are given them."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (frames - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def train_a_teacher(module: Any, loss: Callable[[int], Tensor], recipe: Any) -> dict[str, float]:
    """Train, write `module.encoder` as a transformers folder in bf16 and return the mean loss of
    the last steps.

    recipe: says `out`, `steps`, `learning_rate`, which falls along a cosine, and `seed`. A training
    that was stopped goes on from its last checkpoint, beside `recipe.out`.
    """
    found = train(
        module,
        torch.optim.AdamW(
            module.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
        ),
        loss,
        steps=recipe.steps,
        rate=lambda progress: recipe.learning_rate * (0.5 + 0.5 * math.cos(math.pi * progress)),
        folder=recipe.out.with_name(f"{recipe.out.name}-checkpoints"),
        seed=recipe.seed,
    )
    module.encoder.to(torch.bfloat16).save_pretrained(recipe.out)
    return {"loss": found}
