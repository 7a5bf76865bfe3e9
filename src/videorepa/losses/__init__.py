"""Alignment losses: each file holds one, a frozen description that is called with two grids."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.errors import UserError
from videorepa.losses._relations import (
    every_pair,
    pairs_in_space,
    pairs_in_time,
    relation_distance,
    unit_length,
)
from videorepa.settings.section import Section
from videorepa.tokens import TokenGrid

if TYPE_CHECKING:
    from videorepa.encoders import EncoderSpec

__all__ = [
    "Loss",
    "Relations",
    "check_same_grid",
    "every_pair",
    "pairs_in_space",
    "pairs_in_time",
    "relation_distance",
    "unit_tokens",
]

SMALLEST_SPREAD = 1e-5
"""Standard deviation of a clip's relations below which they differ by rounding alone."""


class Loss(Section):
    """The base of all losses: `loss(student, teacher)` gives a scalar.

    The fields are what a recipe sets. The gradient reaches the student alone.
    """

    name: str

    @abstractmethod
    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        """The loss, a mean over clips, of two grids of the same shape.

        Raises:
          UserError: The grids differ, or the loss needs something that they lack.
        """

    def taught_by(self, encoder: EncoderSpec | None) -> Loss:
        """The loss with the encoder's values for what the recipe leaves open."""
        return self


def unit_tokens(grid: TokenGrid) -> Float[Tensor, "b t h w d"]:
    """The grid's tokens at unit length, in float32 (float64 stays), since half precision gives NaN.

    A token shorter than 1e-6 becomes zero and gets no gradient.
    """
    tokens = grid.tokens
    if tokens.dtype not in (torch.float32, torch.float64):
        tokens = tokens.float()
    return unit_length(tokens)[0]


class Relations:
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
        self.square: Float[Tensor, " b"] = mean.square().sum((1, 2))
        self.own: Float[Tensor, "b n"] = unit.square().sum(2) - self.square[:, None]

    def mean(self) -> Float[Tensor, " b"]:
        """The mean relation of different tokens."""
        tokens = self.own.shape[1]
        return self.square - self.own.sum(1) / max(1, tokens * (tokens - 1))

    def covariance(self, other: Relations) -> Float[Tensor, " b"]:
        """The covariance of two sides' relations, over the pairs of different tokens."""
        tokens = self.own.shape[1]
        pairs = max(1, tokens * (tokens - 1))
        with torch.autocast(self.away.device.type, enabled=False):
            between = self.away.mT @ other.away.to(self.away.dtype)
        products = between.square().sum((1, 2))
        products = products + 2 * tokens * (self.along * other.along).sum(1)
        # Over all pairs, those of a token with itself too, the sums of either side are zero.
        products = products - (self.own * other.own).sum(1)
        return (products - self.own.sum(1) * other.own.sum(1) / pairs) / pairs

    @cached_property
    def variance(self) -> Float[Tensor, " b"]:
        """The variance of the relations, over the pairs of different tokens."""
        return self.covariance(self)

    def correlation(self, other: Relations) -> Float[Tensor, " b"]:
        """Pearson's correlation of two sides' relations; 0 where those of either do not vary."""
        variances = self.variance * other.variance
        varies = variances > SMALLEST_SPREAD**4
        spread = torch.where(varies, variances, 1.0).sqrt()
        return torch.where(varies, self.covariance(other) / spread, 0.0)


def check_same_grid(student: TokenGrid, teacher: TokenGrid, widths: bool = False) -> None:
    """Check that two grids have the same steps, rows and columns.

    Args:
      student: The student's grid.
      teacher: The teacher's grid.
      widths: Check the widths of the tokens too, for losses that compare token with token.

    Raises:
      UserError: They differ; the message shows both grids.
    """
    if widths and student.width != teacher.width:
        raise UserError(
            f"The loss compares tokens of one width; the student's grid is {student}, the "
            f"teacher's {teacher}. Set align.projector to mlp or conv."
        )
    if student.tokens.shape[:4] != teacher.tokens.shape[:4]:
        raise UserError(
            f"The loss compares two equal grids; the student's is {student}, the teacher's "
            f"{teacher}. Bring the student over with videorepa.align.resample first."
        )
