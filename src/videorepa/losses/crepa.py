"""CREPA: each student token points where the teacher's does now, a little before and after.

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
    """Minus the mean over tokens of the cosines with the teacher's token and its two neighbours.

    Of a token at step f it is cos(s_f, y_f) + sum over k = f - n and f + n of
    exp(-seconds between k and f / tau) cos(s_f, y_k). Neighbours past the ends of the clip are left
    out. Published is a distance and a tau of one latent frame; given in seconds they mean the same
    on every grid, and the defaults are one latent frame of CogVideoX.

    distance: to the neighbours, in seconds; rounded to n steps of the grid, at least one. The
        weight goes by where the neighbour then is.
    tau: how fast the weight falls, in seconds.
    fps: frames a second of the clips.
    """

    name: Literal["crepa"] = "crepa"
    distance: float = Field(default=0.5, gt=0.0)
    tau: float = Field(default=0.5, gt=0.0)
    fps: float = Field(default=8.0, gt=0.0)

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        seconds_a_step = teacher.stride / self.fps
        steps = max(1, round(self.distance / seconds_a_step))
        weight = math.exp(-steps * seconds_a_step / self.tau)
        with torch.autocast(student.tokens.device.type, enabled=False):
            ours, theirs = unit_tokens(student), unit_tokens(teacher).detach()
            now = (ours * theirs).sum()
            before = (ours[:, steps:] * theirs[:, :-steps]).sum()
            after = (ours[:, :-steps] * theirs[:, steps:]).sum()
            return -(now + weight * (before + after)) / ours[..., 0].numel()
