"""MoAlign: relations within frames, and across frames with weights that decay over time.

MoAlign (arXiv 2510.19022).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from videorepa.losses import (
    Loss,
    check_same_grid,
    pairs_in_space,
    pairs_in_time,
    relation_distance,
)
from videorepa.tokens import TokenGrid


class MoAlign(Loss):
    """The sum of a spatial and a temporal relation loss. With dS = S_student - S_teacher,

        loss = mean over pairs within a frame of |dS|
             + mean over pairs dt > 0 steps apart of exp(-dt / decay) |dS|.

    The second mean divides by the number of pairs and not by the sum of their weights: the faster
    they decay, the less time counts against space.

    Args:
      margin: relu(|dS| - margin) takes the place of |dS|; 0 to 2.
      decay: Steps of the grid over which a pair's weight falls by a factor of e.
    """

    name: Literal["moalign"] = "moalign"
    margin: float = Field(default=0.0, ge=0.0, le=2.0)
    decay: float = Field(default=10.0, gt=0.0)

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        frames, height, width = teacher.size
        steps = torch.arange(frames, dtype=torch.float64)
        nearness = torch.exp(-(steps[:, None] - steps).abs() / self.decay)
        pairs = pairs_in_space(frames, height * width)
        pairs = pairs + nearness * pairs_in_time(frames, height * width)
        return relation_distance(student.tokens, teacher.tokens, pairs, "hinge", self.margin).mean()
