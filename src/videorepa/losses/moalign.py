"""MoAlign: relations within a frame, and across frames the more the nearer they are in time."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from videorepa.losses import Loss, check_same_grid
from videorepa.losses._relations import pairs_in_space, pairs_in_time, relation_distance
from videorepa.tokens import TokenGrid


class MoAlign(Loss):
    """Mean over pairs of one frame, plus weighted mean over pairs of different frames, of |dS|.

    dS is the difference of student and teacher similarity. Pairs dt steps apart weigh
    exp(-dt / decay), and their sum is divided by how many there are, not by the sum of weights:
    the more they decay, the less time counts against space.

    margin: relu(|dS| - margin) is what counts; 0 to 2.
    decay: in steps of the grid.
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
