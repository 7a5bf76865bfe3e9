"""The training loop of the lab's small models.

Every step is a function of its number, so that a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from videorepa.artifacts import checkpoint
from videorepa.artifacts.checkpoint import Checkpoint, copy_into
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
    out: Path,
    seed: int,
) -> float:
    """Minimise a loss and write checkpoints, resuming from the last one.

    Args:
        module: Everything that a checkpoint has to hold.
        loss: Computes the loss of a step, counted from 0.
        rate: Computes the learning rate at a progress in [0, 1]. A linear ramp over the first
            WARMUP_STEPS multiplies it.
        out: The model's folder. Checkpoints go into a folder beside it.

    Returns:
        The mean loss of the last 100 steps of this call, or NaN if no step was left.
    """
    folder = out.with_name(f"{out.name}-checkpoints")
    saved = checkpoint.newest(folder)
    start = 0
    if saved is not None:
        start = saved.step
        copy_into(saved.trained, module.state_dict())
        optimizer.load_state_dict(saved.optimizer)
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
        recent = [*recent[-99:], value.item()]
        done = step + 1
        if done % 50 == 0:
            pace = (time.monotonic() - begun) / (done - start)
            print(f"step {done} of {steps}  loss {np.mean(recent):.5f}  {pace:.2f} s", flush=True)
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            state = Checkpoint(done, module.state_dict(), {}, optimizer.state_dict())
            checkpoint.save(folder, state, keep=1)
    return float(np.mean(recent)) if recent else float("nan")
