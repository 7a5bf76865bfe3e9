"""Relation L2 (dREPA): squared differences of the student's and the teacher's similarities."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from videorepa.losses import Loss, check_same_grid, every_pair, relation_distance
from videorepa.tokens import TokenGrid


class RelationL2(Loss):
    """loss = mean over pairs i != j of a clip's tokens of (S_student - S_teacher)^2.

    S holds the cosines of all pairs. Pairs i = j have cosine 1 in both and add nothing.
    """

    name: Literal["relation_l2"] = "relation_l2"

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        frames, height, width = teacher.size
        tokens = frames * height * width
        # The factor turns the mean over all pairs into that over pairs of different tokens.
        pairs = every_pair(frames, height * width) * (tokens / max(1, tokens - 1))
        return relation_distance(student.tokens, teacher.tokens, pairs, "squared").mean()
