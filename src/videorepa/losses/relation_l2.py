"""Relation L2: the student's similarities follow the teacher's in the least squares (dREPA)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from videorepa.losses import Loss, check_same_grid
from videorepa.losses._relations import every_pair, relation_distance
from videorepa.tokens import TokenGrid


class RelationL2(Loss):
    """Mean over pairs of different tokens of a clip of the squared difference in similarity.

    A token with itself has similarity 1 in both grids and adds nothing to the sum.
    """

    name: Literal["relation_l2"] = "relation_l2"

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        frames, height, width = teacher.size
        tokens = frames * height * width
        # From the mean over all pairs to that over pairs of different tokens.
        pairs = every_pair(frames, height * width) * (tokens / max(1, tokens - 1))
        return relation_distance(student.tokens, teacher.tokens, pairs, "squared").mean()
