"""Where a run's log goes besides the run's own file."""

from __future__ import annotations

from collections.abc import Callable

from videorepa.artifacts.run import Run
from videorepa.errors import UserError
from videorepa.recipe import Recipe


def trackers(recipe: Recipe, run: Run, start: int) -> list[Callable[[dict[str, float]], None]]:
    """What is called with each step's record; start is the number of steps done before.

    Raises UserError, with what to install, if a tracker is not there.
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
