"""LaMo's motion drift: the predicted latents move on the whole as the clip's own do.

LaMo (arXiv 2605.23878), the motion drift loss. No teacher: with `block: clean` and
`target: latents` both grids hold latents, the model's prediction and the clip's.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from videorepa.errors import UserError
from videorepa.losses import Loss, check_same_grid
from videorepa.tokens import TokenGrid


class Drift(Loss):
    """Mean squared difference of the two drifts. Drift is the mean over a frame of z_{t+lag} - z_t.

    lag: steps between the two latents.
    """

    name: Literal["drift"] = "drift"
    lag: int = Field(default=2, ge=1)

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
