"""Relation correlation: relations go with the teacher's, whatever their mean and spread."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from videorepa.losses import Loss, Relations, check_same_grid
from videorepa.tokens import TokenGrid


class RelationCorrelation(Loss):
    """loss = 1 - mean over clips of r, the correlation (Pearson) of the two sides' relations.

    A clip's relations are the cosines of all pairs i != j of its tokens. TRD wants the student's to
    equal the teacher's, in mean and spread too, which are properties of a network and not of a
    clip. Here both are free. Relational distillation (arXiv 1904.05068) divides distances by their
    mean for the same reason. The loss is from 0 to 2. It is 1, without gradient, where a side's
    relations do not vary.
    """

    name: Literal["relation_correlation"] = "relation_correlation"

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        return 1 - Relations(student).correlation(Relations(teacher.detach())).mean()
