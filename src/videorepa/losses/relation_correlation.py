"""Relation correlation: the student's relations rank and space as the teacher's, at any scale."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.losses import Loss, check_same_grid, unit_tokens
from videorepa.tokens import TokenGrid

SMALLEST_SPREAD = 1e-5
"""Standard deviation of a clip's relations below which they differ by rounding alone."""


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
        with torch.autocast(student.tokens.device.type, enabled=False):
            ours, theirs = _Relations(student), _Relations(teacher.detach())
            variances = ours.covariance(ours) * theirs.covariance(theirs)
            varies = variances > SMALLEST_SPREAD**4
            spread = torch.where(varies, variances, 1.0).sqrt()
            return 1 - torch.where(varies, ours.covariance(theirs) / spread, 0.0).mean()


class _Relations:
    """The relations of each clip's N tokens, of which none is formed.

    With m the mean of the tokens x, and u = x - m, x_i x_j - m^2 = u_i m + u_j m + u_i u_j, and u
    sums to zero. So every sum over pairs follows from sums over tokens. It takes 2 N D E operations
    for widths D and E, where all pairs would take 2 N^2 (D + E), and no cancellation costs digits.
    """

    def __init__(self, grid: TokenGrid) -> None:
        unit = unit_tokens(grid).flatten(1, 3)
        mean = unit.mean(1, keepdim=True)
        self.away: Float[Tensor, "b n d"] = unit - mean
        self.along: Float[Tensor, "b n"] = (self.away * mean).sum(2)
        self.own: Float[Tensor, "b n"] = (unit.square() - mean.square()).sum(2)

    def covariance(self, other: _Relations) -> Float[Tensor, " b"]:
        """The covariance of two sides' relations, over the pairs of different tokens."""
        tokens = self.own.shape[1]
        pairs = max(1, tokens * (tokens - 1))
        products = (self.away.mT @ other.away.to(self.away.dtype)).square().sum((1, 2))
        products = products + 2 * tokens * (self.along * other.along).sum(1)
        # Over all pairs, those of a token with itself too, the sums of either side are zero.
        products = products - (self.own * other.own).sum(1)
        return (products - self.own.sum(1) * other.own.sum(1) / pairs) / pairs
