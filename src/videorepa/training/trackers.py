"""Logs a run to TensorBoard and to Weights & Biases, besides the run's own file."""

from __future__ import annotations

from collections.abc import Callable

from videorepa.artifacts.run import Run
from videorepa.errors import UserError
from videorepa.recipe import Recipe


def trackers(recipe: Recipe, run: Run, start: int) -> list[Callable[[dict[str, float]], None]]:
    """Start the recipe's trackers, and return what to call with each step's record.

    Args:
      recipe: Names the trackers.
      run: The run to log.
      start: How many steps were done before.

    Raises:
      UserError: A tracker is not installed; the message says how to install it.
    """
    writers = []
    if "tensorboard" in recipe.train.trackers:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard is not installed: pip install 'videorepa[tensorboard]'."
            ) from None
        board = SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1)

        def to_board(record: dict[str, float]) -> None:
            for key, value in record.items():
                if key != "step":
                    board.add_scalar(key, value, record["step"])

        writers.append(to_board)
    if "wandb" in recipe.train.trackers:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("wandb is not installed: pip install 'videorepa[wandb]'.") from None
        session = wandb.init(
            project="videorepa", name=recipe.name, dir=run.path, id=run.path.name, resume="allow"
        )
        writers.append(lambda record: session.log(record, step=record["step"]))
    return writers
