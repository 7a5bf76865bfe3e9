"""U-REPA: REPA plus squared differences of relations (arXiv 2503.18414)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from videorepa.losses import Loss, check_same_grid, every_pair, relation_distance
from videorepa.losses.cosine import Cosine
from videorepa.tokens import TokenGrid

REPA = Cosine()


class URepa(Loss):
    """loss = REPA + relations * mean over all pairs of tokens of (S_student - S_teacher)^2.

    Args:
      relations: Coefficient of the second term; 3 as published.
    """

    name: Literal["u_repa"] = "u_repa"
    relations: float = Field(default=3.0, ge=0.0)

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher, widths=True)
        frames, height, width = teacher.size
        pairs = every_pair(frames, height * width)
        squares = relation_distance(student.tokens, teacher.tokens, pairs, "squared")
        return REPA(student, teacher) + self.relations * squares.mean()
