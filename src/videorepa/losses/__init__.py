"""Alignment losses: each file holds one, a frozen description that is called with two grids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from videorepa.errors import UserError
from videorepa.losses._relations import unit_length
from videorepa.settings.section import Section
from videorepa.tokens import TokenGrid

if TYPE_CHECKING:
    from videorepa.encoders import EncoderSpec


class Loss(Section):
    """What a loss module calls its class's base: `loss(student, teacher)` gives a scalar.

    Both grids have the same shape. The gradient reaches the student alone.
    """

    name: str

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        raise NotImplementedError

    def taught_by(self, encoder: EncoderSpec | None) -> Loss:
        """The loss with what this encoder wants where the recipe leaves it open."""
        return self


def unit_tokens(grid: TokenGrid) -> Tensor:
    """The grid's tokens in float32 (or float64) at unit length; half precision gives NaN here.

    A token shorter than 1e-6 becomes zero and gets no gradient.
    """
    tokens = grid.tokens
    if tokens.dtype not in (torch.float32, torch.float64):
        tokens = tokens.float()
    return unit_length(tokens)[0]


def check_same_grid(student: TokenGrid, teacher: TokenGrid, widths: bool = False) -> None:
    """Raises UserError, with both grids, unless their shapes are the same.

    widths: tokens are compared with tokens, so that their widths must be equal too.
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
