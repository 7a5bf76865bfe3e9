"""Alignment losses: each file holds one, a frozen description that is called with two grids."""

from __future__ import annotations

from abc import abstractmethod
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
    "check_same_grid",
    "every_pair",
    "pairs_in_space",
    "pairs_in_time",
    "relation_distance",
    "unit_tokens",
]


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
