"""LaMo's motion drift loss: a frame's mean latent moves as the clip's own does (arXiv 2605.23878).

It needs no teacher. With `block: clean` and `target: latents` the grids hold latents: those that
the model predicts and the clip's own.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.errors import UserError
from videorepa.losses import Loss, check_same_grid
from videorepa.settings.bounds import Frames
from videorepa.tokens import TokenGrid


class LatentDrift(Loss):
    """The squared error of the drift m(z_{t+lag}) - m(z_t), where m is the mean over a frame.

    loss = mean over steps and channels of (drift of the prediction - drift of the clip)^2

    Args:
      lag: Steps of the grid between the two frames.
    """

    name: Literal["drift"] = "drift"
    lag: Frames = 2

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher, widths=True)
        if student.size[0] <= self.lag:
            raise UserError(
                f"The drift over {self.lag} steps needs more of them than the grid {student} has. "
                "Lower loss.lag, or give longer clips."
            )
        with torch.autocast(student.tokens.device.type, enabled=False):
            difference = self._drift(student) - self._drift(teacher).detach()
            return difference.square().mean()

    def _drift(self, grid: TokenGrid) -> Float[Tensor, "b t d"]:
        means = grid.tokens.float().mean((2, 3))
        return means[:, self.lag :] - means[:, : -self.lag]
