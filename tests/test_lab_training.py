"""The loop that trains the lab's small models goes on where it stopped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from videorepa.lab import training


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)

    def run(folder: str, stop_at: int | None = None) -> nn.Linear:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)

        def loss(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            # The step's own random numbers.
            return (module(torch.randn(8, 3)) - step).square().mean()

        training.train(
            module,
            torch.optim.AdamW(module.parameters(), 0.1),
            loss,
            steps=7,
            rate=lambda progress: 0.1 * (1 - progress),
            folder=tmp_path / folder,
            seed=1,
        )
        return module

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_at=5)
    resumed = run("stopped")
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
