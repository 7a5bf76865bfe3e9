"""Several processes train what one does, however the model is shared between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from videorepa.errors import UserError
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.run import Run
from videorepa.train import train

# The whole batch is the same 4 clips: 2 in each of two processes, or 4 in one.
ONE = ("optim.batch_size=4", "optim.accumulate=2")
TWO = ("optim.batch_size=2", "optim.accumulate=2")


def launch(recipe: Recipe, out: Path, *changes: str, processes: int = 2) -> Run:
    """Train as a user would on several GPUs, here on CPU processes that talk over gloo."""
    own = recipe.override(*changes)
    path = out.with_suffix(".yaml")
    own.to_yaml(path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "videorepa", "train", str(path), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run.open(out)


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in run.log_path.read_text().splitlines()]


@pytest.fixture
def prepared(recipe: Recipe) -> Recipe:
    prepare(recipe)
    return recipe.override("train.ema=0.9")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
@pytest.mark.parametrize("lora", [False, True], ids=["all-weights", "lora"])
def test_two_processes_train_what_one_does(
    prepared: Recipe, tmp_path: Path, engine: str, lora: bool
) -> None:
    if lora:
        prepared = prepared.override("train.lora={rank: 2, alpha: 4}")
    alone = train(prepared.override(*ONE), tmp_path / "alone", device="cpu")
    shared = launch(prepared, tmp_path / "shared", *TWO, f"parallel={{engine: {engine}}}")
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    ours, theirs = alone.trained(), shared.trained()
    for a, b in ((ours.trained, theirs.trained), (ours.projector, theirs.projector)):
        assert a.keys() == b.keys()
        one, two = (torch.cat([x[key].flatten() for key in sorted(a)]) for x in (a, b))
        # Adam makes whole steps of rounding errors where a gradient is nearly 0.
        assert (one - two).norm() < 1e-3 * one.norm()
    # Killed after its first checkpoint, it goes on to the same end, bit for bit.
    for step in (4, 6):
        shutil.rmtree(shared.checkpoints / f"step-{step:08d}")
    resumed = launch(prepared, tmp_path / "shared", *TWO, f"parallel={{engine: {engine}}}")
    again = resumed.trained()
    assert all(torch.equal(theirs.trained[key], again.trained[key]) for key in again.trained)
    assert again.ema is not None and theirs.ema is not None
    assert all(torch.equal(theirs.ema[key], again.ema[key]) for key in again.ema)


def test_one_process_refuses_what_needs_several(prepared: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accelerate launch"):
        train(prepared.override("parallel={engine: ddp}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
