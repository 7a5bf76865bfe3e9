"""The loop that trains the lab's small models goes on where it stopped."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from videorepa.lab.models import training


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
            out=tmp_path / folder,
            seed=1,
        )
        return module

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_at=5)
    resumed = run("stopped")
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_memory_that_is_freed_is_taken_again_without_asking_the_system() -> None:
    """Sixty tensors one after the other are 12,800 pages each time, or only the first few times."""
    script = """if True:
        import resource, sys, torch
        from videorepa.system.device import keep_freed_memory
        if sys.argv[1] == "keep":
            assert keep_freed_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(60):
            torch.ones(50 * 2**20 // 4)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    keeping, not_keeping = (
        int(subprocess.run([sys.executable, "-c", script, how], capture_output=True).stdout)
        for how in ("keep", "as it is")
    )
    assert keeping < 20 * 12_800 < 59 * 12_800 < not_keeping
