"""Logs a run to TensorBoard and to Weights & Biases, besides the run's own file."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from videorepa.artifacts.run import Run
from videorepa.recipe import Recipe
from videorepa.system.files import atomic_write, read_text
from videorepa.training.extras import extra_for


def trackers(recipe: Recipe, run: Run, start: int) -> list[Callable[[dict[str, float]], None]]:
    """Start the recipe's trackers.

    Args:
      recipe: Names the trackers.
      run: The run to log.
      start: The number of steps that were done before.

    Returns:
      For each tracker, a function to call with each step's record.

    Raises:
      UserError: A tracker is not installed; the message says how to install it.
    """
    writers = []
    if "tensorboard" in recipe.train.trackers:
        extra_for("train.trackers tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1)

        def to_board(record: dict[str, float]) -> None:
            for key, value in record.items():
                if key != "step":
                    board.add_scalar(key, value, record["step"])

        writers.append(to_board)
    if "wandb" in recipe.train.trackers:
        wandb = extra_for("train.trackers wandb")
        session = wandb.init(
            project="videorepa",
            name=recipe.name,
            dir=run.path,
            id=_wandb_id(run),
            resume="allow",
            reinit="finish_previous",  # By default it would give a script the one before.
        )
        writers.append(lambda record: session.log(record, step=record["step"]))
    return writers


def _wandb_id(run: Run) -> str:
    """Give the id of a run's session, the same whenever it goes on, and no other run's."""
    path = run.path / "wandb-id"
    if not path.exists():
        # Earlier versions took the folder's name, and runs that began with them go on there.
        began_before = (run.path / "wandb").exists()
        atomic_write(path, run.path.name if began_before else secrets.token_hex(8))
    return read_text(path)
