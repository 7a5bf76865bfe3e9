"""CREPA: student tokens align with the teacher's of the same frame and of two neighbouring ones.

Cross-frame Representation Alignment (arXiv 2506.09229).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from videorepa.losses import Loss, check_same_grid, unit_tokens
from videorepa.tokens import TokenGrid


class Crepa(Loss):
    """REPA with neighbouring frames. With n steps of dt seconds to a neighbour,

        loss = -mean over tokens of cos(s_f, y_f) + sum over k = f - n, f + n of
            exp(-n dt / tau) cos(s_f, y_k),

    where neighbours past the ends of the clip are left out. The paper sets the distance and tau to
    one latent frame. In seconds they mean the same on every grid; the defaults are one latent frame
    of CogVideoX.

    Args:
      distance: Seconds to the neighbours, rounded to n steps of the grid, at least one.
      tau: Seconds over which a neighbour's weight falls by a factor of e.
      fps: Frames per second of the clips.
    """

    name: Literal["crepa"] = "crepa"
    distance: float = Field(default=0.5, gt=0.0)
    tau: float = Field(default=0.5, gt=0.0)
    fps: float = Field(default=8.0, gt=0.0)

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher, widths=True)
        seconds_a_step = teacher.stride / self.fps
        steps = max(1, round(self.distance / seconds_a_step))
        weight = math.exp(-steps * seconds_a_step / self.tau)
        with torch.autocast(student.tokens.device.type, enabled=False):
            s, y = unit_tokens(student), unit_tokens(teacher).detach()
            same = (s * y).sum()
            before = (s[:, steps:] * y[:, :-steps]).sum()
            after = (s[:, :-steps] * y[:, steps:]).sum()
            return -(same + weight * (before + after)) / s[..., 0].numel()
